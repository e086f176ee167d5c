"""What is wrong with a frame: checked against frames that are right, single changes to them, and tshark."""

from __future__ import annotations

import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from support.judges import packets
from support.lab import requires_tool

from appliance.capture.payload import has_wrong_checksum, has_wrong_fcs, parse_test_payload
from appliance.generator import HEADER_BYTES, MIN_FRAME_BYTES, FrameMaker, StreamShape, damaged

LINKTYPES = (1, 101, 276)
ETHERNET_BYTES = 14
VLAN = b"\x81\x00\x00\x07"


def frame(size: int = 200, sequence: int = 5, stream: int = 3) -> bytes:
    return FrameMaker(StreamShape(stream=stream, frame_bytes=size)).frame(sequence, 1_700_000_000_000_000_123)


def with_fcs(data: bytes) -> bytes:
    return data + struct.pack("<I", zlib.crc32(data))


def fragmented(data: bytes) -> bytes:
    return data[:20] + b"\x20\x00" + data[22:]


@pytest.mark.parametrize("size", [14, 60, 61, 64, 67, 1514])
def test_a_check_sequence_is_the_crc_32_of_all_before_it(size: int) -> None:
    whole = with_fcs(bytes(i * 7 & 0xFF for i in range(size)))
    assert not has_wrong_fcs(whole)
    for at in (0, size // 2, size, size + 3):
        assert has_wrong_fcs(whole[:at] + bytes((whole[at] ^ 1,)) + whole[at + 1 :])


def test_what_is_too_short_for_a_check_sequence_is_wrong() -> None:
    assert has_wrong_fcs(b"")
    assert has_wrong_fcs(with_fcs(bytes(13)))


@pytest.mark.parametrize("tags", [0, 1, 2, 16])
def test_right_checksums_are_right_and_each_changed_byte_under_one_is_found(tags: int) -> None:
    good = frame(101)
    tagged = good[:12] + VLAN * tags + good[12:]
    assert not has_wrong_checksum(tagged)
    for at in (14 + 8, 14 + 12, 34, HEADER_BYTES, len(good) - 1):
        at += 4 * tags
        assert has_wrong_checksum(tagged[:at] + bytes((tagged[at] ^ 0x10,)) + tagged[at + 1 :]), at


def test_what_cannot_be_judged_is_not_called_wrong() -> None:
    wrong = damaged(frame())
    assert has_wrong_checksum(wrong)
    assert not has_wrong_checksum(fragmented(wrong))
    no_checksum = wrong[:40] + b"\0\0" + wrong[42:]
    assert not has_wrong_checksum(no_checksum)
    assert not has_wrong_checksum(wrong, 127)  # a link type that is not looked into
    assert not has_wrong_checksum(wrong[:12] + VLAN * 17 + wrong[12:])
    assert not has_wrong_checksum(b"")


def test_a_cut_frame_is_not_judged_wherever_it_is_cut() -> None:
    wrong = damaged(frame())
    assert not any(has_wrong_checksum(wrong[:length]) for length in range(len(wrong)))


@given(data=st.binary(max_size=300), linktype=st.sampled_from(LINKTYPES))
def test_no_bytes_lead_a_check_out_of_the_frame(data: bytes, linktype: int) -> None:
    has_wrong_checksum(data, linktype)
    parse_test_payload(data)
    parse_test_payload(data + struct.pack("!I", 0x54504C31) + data[:32].ljust(32, b"\xff"))


@pytest.mark.parametrize("size", [MIN_FRAME_BYTES, MIN_FRAME_BYTES + 1, 200, 1514])
def test_a_test_payload_is_read_as_it_was_sent(size: int) -> None:
    assert parse_test_payload(frame(size)) == (3, 5, 1_700_000_000_000_000_123, True, True)


def test_damage_is_told_from_a_trailer_that_means_nothing() -> None:
    good = frame()
    assert parse_test_payload(damaged(good)) == (3, 5, 1_700_000_000_000_000_123, True, False)
    in_trailer = good[:-20] + bytes((good[-20] ^ 1,)) + good[-19:]
    found = parse_test_payload(in_trailer)
    assert found is not None and found[3:] == (False, False)
    assert parse_test_payload(good[:-1]) is None
    assert parse_test_payload(good[-30:]) is None


@requires_tool("tshark")
@pytest.mark.parametrize(
    "name",
    ["mixed.pcap", "many-protocols.pcap", "mix-apps.pcap", "skype.pcap", "ipv6_ext_headers.pcap", "vlan.pcap"]
    + ["wikipedia.pcap", "reassembly.pcap", "http-qinq-0.pcap"],
)
def test_real_packets_are_wrong_where_tshark_says_so(shared_data: Path, name: str) -> None:
    path = shared_data / "captures" / name
    if not path.exists():
        pytest.skip(f"no {name}")
    judged = wrong = 0
    for packet, (versions, total, *statuses) in zip(packets(path), verdicts(path), strict=True):
        if len(packet.data) < packet.original_length or len(versions) != 1:
            continue  # cut, or an IP header within another, of which tshark tells both
        if total and ETHERNET_BYTES + int(total) > len(packet.data):
            continue  # cut before it was recorded
        judged += 1
        wrong += has_wrong_checksum(bytes(packet.data), packet.linktype)
        assert has_wrong_checksum(bytes(packet.data), packet.linktype) == ("0" in statuses), (name, judged)
    assert judged
    assert (wrong > 0) == (name in ("mix-apps.pcap", "reassembly.pcap"))


def verdicts(path: Path) -> list[tuple[str, ...]]:
    """Per packet tshark's IP versions, the IPv4 length, and its status of the three checksums (0: bad)."""
    switches = [word for kind in ("ip", "tcp", "udp") for word in ("-o", f"{kind}.check_checksum:TRUE")]
    fields = ["ip.version", "ip.len", "ip.checksum.status", "tcp.checksum.status", "udp.checksum.status"]
    command = ["tshark", "-n", "-r", str(path), *switches, "-T", "fields"]
    command += [word for field in fields for word in ("-e", field)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [tuple(line.split("\t")) for line in done.stdout.splitlines()]
