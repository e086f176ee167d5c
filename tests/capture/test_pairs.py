"""Digests beside their records: the right one beside each, over batches, and hostile records refused."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import pytest
from support.captures import write_pcap
from support.frames import Shape, numbered_frame

from appliance.capture.pairs import DIGEST_BYTES, DigestPairs
from appliance.errors import FormatError
from appliance.formats.encode import InterfaceDescription
from appliance.formats.reader import read_records

UDP = Shape(sizes=(100,), udp=True, flows=7)
ETHERNET = [InterfaceDescription(1)]


def batch_of(path: Path, frames: list[bytes]) -> bytearray:
    write_pcap(path, enumerate(frames))
    return bytearray(b"".join(bytes(batch) for batch in read_records(path)))


def address_of(batch: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(batch))


def pairs_of(batch: bytearray, pairs: DigestPairs) -> list[tuple[int, int, int, bytes]]:
    """(packet's number, link type, time of the digest, the record's data) of every pair."""
    found = []
    done, more = 0, True
    while more:
        more = pairs.pair(address_of(batch) + done, len(batch) - done, ETHERNET)
        for i in range(pairs.count):
            offset, linktype, high, low = struct.unpack("=4I", ctypes.string_at(pairs.origins_address + 16 * i, 16))
            digest = ctypes.string_at(pairs.digests_address + DIGEST_BYTES * i, 20)
            (captured,) = struct.unpack_from("=I", batch, done + offset + 20)
            data = bytes(batch[done + offset + 28 : done + offset + 28 + captured])
            time_ns = struct.unpack_from("=I", digest, 12)[0] << 32 | struct.unpack_from("=I", digest, 16)[0]
            found.append((high << 32 | low, linktype, time_ns, data))
        done += pairs.consumed_bytes
    return found


@pytest.mark.parametrize("before", [0, (1 << 32) - 5000])
def test_each_digest_stands_beside_its_record_and_packets_without_one_count(tmp_path: Path, before: int) -> None:
    frames = [numbered_frame(1, i, UDP) if i % 3 else b"\2" * 12 + b"\x88\xb5" + bytes(50) for i in range(9000)]
    pairs = DigestPairs(before)
    found = pairs_of(batch_of(tmp_path / "a", frames), pairs)
    numbers = [number - before - 1 for number, *_ in found]
    assert [frames[number] for number in numbers] == [data for *_, data in found]
    assert numbers == [i for i in range(9000) if i % 3]
    assert pairs.packets == before + 9000
    assert len(found) + sum(pairs.ignored) == 9000
    times = [time_ns for _, _, time_ns, _ in found]
    assert times == sorted(times)


@pytest.mark.parametrize("damage", ["length", "captured", "interface"])
def test_a_record_that_points_outside_of_itself_is_refused(tmp_path: Path, damage: str) -> None:
    batch = batch_of(tmp_path / "a", [numbered_frame(1, i, UDP) for i in range(3)])
    first = struct.unpack_from("=I", batch, 4)[0]  # behind the interface's record
    offset, value = {"length": (4, 1 << 20), "captured": (20, 5000), "interface": (8, 1)}[damage]
    struct.pack_into("=I", batch, first + offset, value)
    with pytest.raises(FormatError, match=f"corrupt record at byte {first}"):
        DigestPairs().pair(address_of(batch), len(batch), ETHERNET)
