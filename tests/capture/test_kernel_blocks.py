"""What a live interface's capture makes of the kernel's blocks: here they lie in a file, and no interface is needed."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
from merge.rings import DIGEST, PACKET, Source
from support.frames import Shape, numbered_frame
from support.kernel_ring import BLOCK_BYTES, KernelRing

from appliance.capture.afpacket import LiveCapture
from appliance.counters import CAPTURE_FIELDS, CounterPages

RING_BYTES = 8 << 20
IFINDEX = 3
PACKET_OUTGOING = 4
TP_STATUS_VLAN_VALID = 0x10
BEGIN_NS = 1_700_000_000_123_456_789


def captured(frame: bytes, *, snaplen: int = 262_144) -> tuple[list[bytes], int]:
    """The packet records of one block that is full of this frame, and how many packets the block had."""
    page = CounterPages([("capture/a", CAPTURE_FIELDS)])["capture/a"]
    with contextlib.closing(KernelRing(frame, 1, IFINDEX)) as kernel, contextlib.closing(Source(RING_BYTES)) as ring:
        capture = LiveCapture(
            kernel.fd, BLOCK_BYTES, 1, ring.producer, None, page,
            socket_serial=1, linktype=1, cooked=False, snaplen=snaplen, ifindex=IFINDEX, reorder_us=0,
        )  # fmt: skip
        kernel.hand_over(BEGIN_NS)
        assert capture.pump() == kernel.packets
        ring.consumer.refresh()
        records = list(iter(ring.consumer.pop, None))
        return [record for record in records if record[:4] == struct.pack("<I", PACKET)], kernel.packets


def packet_block(data: bytes, original: int, timestamp_ns: int) -> bytes:
    """draft-ietf-opsawg-pcapng, section 4.3, by itself."""
    padded = data + bytes(-len(data) % 4)
    length = 32 + len(padded)
    head = struct.pack("<7I", PACKET, length, 0, timestamp_ns >> 32, timestamp_ns & 0xFFFFFFFF, len(data), original)
    return head + padded + struct.pack("<I", length)


@pytest.mark.parametrize("size", [*range(1, 140), 255, 256, 257, 1514, 9014])
def test_a_frame_of_any_length_is_recorded_octet_for_octet(size: int) -> None:
    frame = bytes((7 * i + size) & 0xFF or 1 for i in range(size))
    records, packets = captured(frame)
    assert len(records) == packets
    for number, record in enumerate(records):
        assert record == packet_block(frame, size, BEGIN_NS + 1000 * number)


@pytest.mark.parametrize("snaplen", [64, 65, 66, 67, 128, 129])
def test_a_frame_that_is_cut_keeps_its_length_and_no_octet_too_much(snaplen: int) -> None:
    frame = bytes(range(1, 201))
    records, _ = captured(frame, snaplen=snaplen)
    assert records[0] == packet_block(frame[:snaplen], 200, BEGIN_NS)


def found_in(kernel: KernelRing, *, snaplen: int, metered: bool) -> tuple[list[bytes], list[bytes], dict[str, int]]:
    """All packet records of what was handed over, their digests, and what was counted of packets."""
    page = CounterPages([("capture/a", CAPTURE_FIELDS)])["capture/a"]
    with contextlib.closing(Source(RING_BYTES)) as ring, contextlib.closing(Source(RING_BYTES)) as digest_ring:
        capture = LiveCapture(
            kernel.fd, BLOCK_BYTES, 2, ring.producer, digest_ring.producer if metered else None, page,
            socket_serial=1, linktype=1, cooked=False, snaplen=snaplen, ifindex=IFINDEX, reorder_us=3,
        )  # fmt: skip
        assert capture.pump() == kernel.packets
        records, digests = records_of(ring, PACKET), records_of(digest_ring, DIGEST)
    kinds = ("read", "published", "dropped", "foreign", "reordered", "late", "truncated", "unpublished", "last")
    return records, digests, {name: page[name] for name in CAPTURE_FIELDS if name.startswith(kinds)}


def records_of(ring: Source, kind: int) -> list[bytes]:
    ring.consumer.refresh()
    return [record for record in iter(ring.consumer.pop, None) if record[:4] == struct.pack("<I", kind)]


@pytest.mark.parametrize("frame", [numbered_frame(0, 0), numbered_frame(0, 0, Shape(udp=True))], ids=["not IP", "UDP"])
@pytest.mark.parametrize("snaplen", [60, 262_144])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5])
def test_packets_that_are_taken_in_runs_are_recorded_and_counted_like_those_that_are_looked_at(
    share: float, snaplen: int, frame: bytes
) -> None:
    """Whole runs are taken: with a meter of plain packets alone. Exceptions stand anywhere between them."""
    random = np.random.default_rng(1)
    with contextlib.closing(KernelRing(frame, 2, IFINDEX)) as kernel:
        kernel.hand_over(BEGIN_NS)
        headers = kernel.headers
        foreign, outgoing, tagged, longer, shorter, older = (random.random(headers.shape) < share for _ in range(6))
        headers["ifindex"][foreign] = IFINDEX + 1
        headers["pkttype"][outgoing] = PACKET_OUTGOING
        headers["status"][tagged] |= TP_STATUS_VLAN_VALID
        headers["vlan_tci"][tagged] = 7
        headers["len"][longer] = 1500
        headers["snaplen"][shorter] = 50
        headers["nsec"][older] -= 2500
        records, _, counts = found_in(kernel, snaplen=snaplen, metered=False)
        kernel.hand_over_again()
        metered_records, digests, metered_counts = found_in(kernel, snaplen=snaplen, metered=True)
    assert (records, counts) == (metered_records, metered_counts)
    assert counts["read_packets"] == kernel.packets == len(records) + int(foreign.sum())
    expected = records if frame[12:14] == b"\x08\x00" else []
    assert [digest[8:20] for digest in digests] == [record[8:20] for record in expected], "interface and time"
