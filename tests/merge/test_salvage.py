"""Leftovers of a crash, cut anywhere, plain and compressed: all whole records come back in a valid file."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import resource
import shutil
import stat
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import lz4.frame  # type: ignore[import-untyped]
import pytest
import zstandard

from appliance.errors import CannotCreateError, FormatError, InputOutputError, MissingInputError
from appliance.formats.encode import (
    InterfaceDescription,
    interface_description,
    interface_statistics,
    pcap_header,
    section_header,
)
from appliance.formats.packet import ERF, Packet as ErfPacket, encode
from appliance.formats.reader import read_records
from appliance.merge.salvage import salvage

S = 10**9
PAGE = 4096
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "lz4": lambda data: lz4.frame.compress(data, block_size=lz4.frame.BLOCKSIZE_MAX64KB),
    "zst": zstandard.ZstdCompressor().compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}


def packet_data(number: int) -> bytes:
    return bytes(zlib.crc32(b"%d" % (number * i)) & 0xFF for i in range(number % 50))


def pcapng(packets: int) -> bytes:
    """Two interfaces, their packets by turns, statistics at the end."""
    blocks = [section_header()]
    blocks += [interface_description(InterfaceDescription(1, name=name)) for name in ("left", "right")]
    for number in range(packets):
        data = packet_data(number)
        padded = data + bytes(-len(data) % 4)
        length = 32 + len(padded)
        at = S + number
        head = struct.pack("=IIIIIII", 6, length, number % 2, at >> 32, at & 0xFFFFFFFF, len(data), len(data))
        blocks.append(head + padded + struct.pack("=I", length))
    return b"".join(blocks) + interface_statistics(0, 2 * S, received=packets)


def pcap(packets: int) -> bytes:
    def packet(number: int) -> bytes:
        data = packet_data(number)
        return struct.pack("=IIII", *divmod(S + number, S), len(data), len(data)) + data

    return pcap_header(1, nanoseconds=True) + b"".join(map(packet, range(packets)))


def packets_in(path: Path) -> int:
    """Of a whole file: damage raises."""
    count = 0
    for batch in read_records(path):
        offset = 0
        while offset < len(batch):
            kind, length = struct.unpack_from("=II", batch, offset)
            count += kind == 6
            offset += length
    return count


@pytest.mark.parametrize("make", [pcap, pcapng], ids=["pcap", "pcapng"])
def test_a_plain_leftover_cut_at_any_byte_becomes_its_longest_whole_beginning(
    tmp_path: Path, make: Callable[[int], bytes]
) -> None:
    data = make(6)
    leftover = tmp_path / "work"
    counts = []
    for length in range(1, len(data)):
        leftover.write_bytes(data[:length])
        output = tmp_path / f"salvaged-{length}"
        result = salvage(leftover, output, compress=False)
        assert leftover.read_bytes() == data[:length]
        if result.outcome == "salvaged":
            assert data.startswith(output.read_bytes())
            assert result.bytes + result.lost_bytes == length
            assert result.bytes == output.stat().st_size
            assert packets_in(output) == result.packets == sum(result.interface_packets)
        else:
            assert not output.exists()
            assert result.outcome == ("whole" if packets_if_whole(leftover) is not None else "undecodable")
        counts.append(result.packets)
    assert counts == sorted(counts)
    assert counts[-1] == (6 if make is pcapng else 5)


def packets_if_whole(path: Path) -> int | None:
    try:
        return packets_in(path)
    except FormatError:
        return None


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("make", [pcap, pcapng], ids=["pcap", "pcapng"])
def test_a_compressed_leftover_gives_what_can_be_unpacked(
    tmp_path: Path, make: Callable[[int], bytes], name: str, compress: bool
) -> None:
    # Two members: formats that unpack only whole blocks give at least the first.
    data = make(400)
    packed = COMPRESSIONS[name](data[:4000]) + COMPRESSIONS[name](data[4000:])
    leftover = tmp_path / f"a.{name}"
    leftover.write_bytes(packed[: len(packed) - 20])
    result = salvage(leftover, tmp_path / "out", compress=compress)
    assert (result.outcome, result.compression) == ("salvaged", name)
    assert f"{name} stream ends too early" in result.reason
    assert 50 < result.packets <= 400
    assert packets_in(tmp_path / "out") == result.packets
    written = (tmp_path / "out").read_bytes()
    plain = lz4.frame.decompress(written) if compress else written
    assert data.startswith(plain)
    assert len(plain) == result.bytes


@pytest.mark.parametrize("name", ["", *COMPRESSIONS])
def test_a_leftover_that_is_whole_is_left_as_it_is(tmp_path: Path, name: str) -> None:
    leftover = tmp_path / "a"
    leftover.write_bytes(COMPRESSIONS[name](pcapng(50)) if name else pcapng(50))
    result = salvage(leftover, tmp_path / "out", compress=True)
    assert (result.outcome, result.reason, result.output) == ("whole", "", "")
    assert result.packets == 50
    assert result.interface_packets == (25, 25)
    assert [known.name for known in result.interfaces] == ["left", "right"]
    assert (result.first_ns, result.last_ns, result.late_packets) == (S, S + 49, 0)
    assert not (tmp_path / "out").exists()


def test_a_leftover_with_damage_in_the_middle_is_kept_up_to_there(tmp_path: Path) -> None:
    data = bytearray(pcap(100))
    data[24 + 8 : 24 + 12] = b"\0\0\0\0"
    spoiled = bytes(data[:5000]) + b"\xff" * 64 + bytes(data[5000:])
    (tmp_path / "a").write_bytes(spoiled)
    result = salvage(tmp_path / "a", tmp_path / "out", compress=False)
    assert result.outcome == "salvaged"
    assert result.bytes + result.lost_bytes == len(spoiled)
    assert packets_in(tmp_path / "out") == result.packets


@pytest.mark.parametrize("content", [b"", b"not a capture at all", pcap(0)[:23], gzip.compress(pcap(9))[:15]])
def test_what_cannot_be_decoded_is_said_and_nothing_is_written(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    result = salvage(tmp_path / "a", tmp_path / "out", compress=False)
    assert result.outcome == "undecodable"
    assert str(tmp_path / "a") in result.reason
    assert not (tmp_path / "out").exists()


def with_a_hole(path: Path, content: bytes, first_page: int) -> None:
    """The file as a power failure may leave it: one page in the middle never came to the disk."""
    with path.open("wb") as file:
        file.write(content[: first_page * PAGE])
        file.seek((first_page + 1) * PAGE)
        file.write(content[(first_page + 1) * PAGE :])
        file.flush()
        os.fsync(file.fileno())
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE) != first_page * PAGE:
            pytest.skip("the file system of the tests' directory has no holes")


def large_pcap(packets: int, octets: int) -> bytes:
    packet = struct.pack("=IIII", 1, 1, octets, octets) + b"x" * octets
    return pcap_header(1, nanoseconds=True) + packet * packets


@pytest.mark.parametrize(
    ("content", "whole"),
    [(large_pcap(500, 60), 107), (large_pcap(40, PAGE + 100), 1)],
    ids=["small packets", "packets larger than a page"],
)
def test_a_page_that_a_power_failure_took_out_of_the_middle_ends_the_file(
    tmp_path: Path, content: bytes, whole: int
) -> None:
    with_a_hole(tmp_path / "left", content, 2)
    found = salvage(tmp_path / "left", tmp_path / "result", compress=False)
    assert (found.outcome, found.packets) == ("salvaged", whole)
    assert (tmp_path / "result").read_bytes() == content[: found.bytes]
    assert found.bytes + found.lost_bytes == len(content)


def test_a_leftover_that_ends_right_before_a_hole_is_not_whole(tmp_path: Path) -> None:
    content = large_pcap(500, 2 * PAGE - 24 - 16)
    with_a_hole(tmp_path / "left", content, 2)
    found = salvage(tmp_path / "left", tmp_path / "result", compress=False)
    assert (found.outcome, found.packets, found.bytes) == ("salvaged", 1, 2 * PAGE)
    assert "hole" in found.reason
    assert (tmp_path / "result").read_bytes() == content[: 2 * PAGE]


def test_zeros_behind_the_last_packet_are_no_packets(tmp_path: Path) -> None:
    content = pcap(100)
    (tmp_path / "left").write_bytes(content + bytes(64))
    found = salvage(tmp_path / "left", tmp_path / "result", compress=False)
    assert (found.outcome, found.packets, found.lost_bytes) == ("salvaged", 100, 64)
    assert "zeros" in found.reason
    assert (tmp_path / "result").read_bytes() == content


def test_the_result_never_replaces_a_file_or_follows_a_link(tmp_path: Path) -> None:
    leftover = tmp_path / "a"
    leftover.write_bytes(pcap(5)[:-1])
    (tmp_path / "there").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "link", "no/such/folder"):
        with pytest.raises(CannotCreateError, match=name):
            salvage(leftover, tmp_path / name, compress=False)
    assert (tmp_path / "there").read_bytes() == b"mine"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_result_has_its_mode_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    (tmp_path / "a").write_bytes(pcap(5)[:-1])
    before = os.umask(umask)
    try:
        salvage(tmp_path / "a", tmp_path / "out", compress=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_a_result_that_cannot_be_written_in_full_does_not_remain(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(pcap(2000)[:-1])
    _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard_limit))
    try:
        with pytest.raises(InputOutputError, match="out cannot be written"):
            salvage(tmp_path / "a", tmp_path / "out", compress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard_limit, hard_limit))
    assert not (tmp_path / "out").exists()


def test_a_leftover_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="gone"):
        salvage(tmp_path / "gone", tmp_path / "out", compress=False)


def test_capinfos_counts_the_packets_of_the_result(tmp_path: Path) -> None:
    if shutil.which("capinfos") is None:
        pytest.skip("capinfos is not installed")
    (tmp_path / "a").write_bytes(pcapng(100)[:-150])
    result = salvage(tmp_path / "a", tmp_path / "out.pcapng.lz4", compress=True)
    command = ["capinfos", "-TMr", "-c", str(tmp_path / "out.pcapng.lz4")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(told.split("\t")[1]) == result.packets


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_erf_file_is_salvaged_to_its_last_whole_record(tmp_path: Path, packed: bool) -> None:
    packets = [ErfPacket(1_700_000_000 * S + i, bytes([i]) * 60) for i in range(20)]
    whole = bytes(encode(packets, ERF, {1: 0}))
    record_bytes = len(whole) // 20
    left = tmp_path / "left.erf"
    cut = whole[:-7]
    left.write_bytes(lz4.frame.compress(cut) if packed else cut)
    found = salvage(left, tmp_path / "out", compress=False)
    assert (found.outcome, found.format, found.packets) == ("salvaged", "erf", 19)
    assert (tmp_path / "out").read_bytes() == whole[: 19 * record_bytes]
