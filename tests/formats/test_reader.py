"""Files as users have them: any compression, cut and damaged streams, foreign formats, pipes, other programs' work."""

from __future__ import annotations

import bz2
import ctypes
import gzip
import lzma
import os
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import lz4.frame  # type: ignore[import-untyped]
import pytest
import zstandard
from formats.craft import Packet, as_packet, block, enhanced, interface, pcap_file, section, split_records

from appliance.errors import FormatError, MissingInputError, MissingPermissionError
from appliance.formats.encode import interface_description, section_header
from appliance.formats.reader import BATCH_BYTES, CaptureReader, read_interfaces, read_records
from appliance.formats.record import clamp_snaplen, count_packets, pcap_packet

S = 10**9
# Data that does not compress to nothing, so that a compressed stream has many places to cut.
PACKETS = [Packet(S + i * 1000, bytes(zlib.crc32(b"%d" % (i * j)) & 0xFF for j in range(40))) for i in range(300)]

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "lz4": lambda data: lz4.frame.compress(data, block_size=lz4.frame.BLOCKSIZE_MAX64KB),
    "zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    "xz": lzma.compress,
    "bz2": bz2.compress,
}


def packets_in(path: Path) -> tuple[int, str]:
    """(packets, error) of a file."""
    count = 0
    try:
        for batch in read_records(path):
            count += sum(record[0] == 6 for record in split_records(bytes(batch)))
    except FormatError as error:
        assert error.packets == count
        return count, str(error)
    return count, ""


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["", *COMPRESSIONS])
def test_a_file_is_recognised_by_its_content_whatever_its_name_says(tmp_path: Path, name: str) -> None:
    data = pcap_file(PACKETS)
    path = write(tmp_path / "capture.txt", COMPRESSIONS[name](data) if name else data)
    with CaptureReader(path) as reader:
        assert (reader.stream.format, reader.stream.compression) == ("pcap", name)
    assert packets_in(path) == (len(PACKETS), "")


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_all_members_of_a_compressed_file_are_read(tmp_path: Path, name: str) -> None:
    data = pcap_file(PACKETS)
    pieces = [COMPRESSIONS[name](data[at : at + 1000]) for at in range(0, len(data), 1000)]
    assert packets_in(write(tmp_path / "members", b"".join(pieces))) == (len(PACKETS), "")


@pytest.mark.parametrize("name", ["gz", "xz"])
def test_zero_padding_behind_a_compressed_stream_is_no_damage(tmp_path: Path, name: str) -> None:
    pack = COMPRESSIONS[name]
    data = pcap_file(PACKETS)
    padded = pack(data[:5000]) + bytes(8) + pack(data[5000:]) + bytes(1024)
    assert packets_in(write(tmp_path / "padded", padded)) == (len(PACKETS), "")


@pytest.mark.parametrize("name", ["lz4", "zst"])
def test_frames_of_user_data_are_passed_over(tmp_path: Path, name: str) -> None:
    pack = COMPRESSIONS[name]
    data = pcap_file(PACKETS)
    user = struct.pack("<II", 0x184D2A50, 5) + b"hello"
    path = write(tmp_path / "user", user * 2 + pack(data[:5000]) + user + pack(data[5000:]) + user)
    assert packets_in(path) == (len(PACKETS), "")
    with CaptureReader(path) as reader:
        assert reader.stream.compression == name


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_cut_compressed_file_gives_all_that_its_library_can_unpack(tmp_path: Path, name: str) -> None:
    packed = COMPRESSIONS[name](pcap_file(PACKETS[:150])) + COMPRESSIONS[name](pcap_file(PACKETS[150:])[24:])
    first_bytes = len(COMPRESSIONS[name](pcap_file(PACKETS[:150])))
    for length in (first_bytes + 1, first_bytes + 40, len(packed) - 5, len(packed) - 1):
        count, error = packets_in(write(tmp_path / "cut", packed[:length]))
        assert 150 <= count <= 300
        assert f"the {name} stream ends too early" in error or "bytes that are not" in error
    assert packets_in(write(tmp_path / "half", packed[:first_bytes])) == (150, "")


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_compressed_file_cut_at_any_byte_is_refused_or_read_in_part(tmp_path: Path, name: str) -> None:
    packed = COMPRESSIONS[name](pcap_file(PACKETS[:20]))
    counts = []
    for length in range(1, len(packed)):
        try:
            count, error = packets_in(write(tmp_path / "cut", packed[:length]))
        except FormatError as refused:
            count, error = 0, str(refused)
        assert error
        counts.append(count)
    assert counts == sorted(counts)
    assert packets_in(write(tmp_path / "whole", packed)) == (20, "")


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_damaged_compressed_byte_is_reported_or_the_packets_are_right(tmp_path: Path, name: str) -> None:
    packed = COMPRESSIONS[name](pcap_file(PACKETS[:50]))
    for at in range(0, len(packed), max(1, len(packed) // 100)):
        damaged = packed[:at] + bytes((packed[at] ^ 0x55,)) + packed[at + 1 :]
        try:
            count, _ = packets_in(write(tmp_path / "damaged", damaged))
        except FormatError:
            continue
        assert count <= 1000


def test_garbage_behind_a_compressed_stream_is_reported_after_the_packets(tmp_path: Path) -> None:
    for name, pack in COMPRESSIONS.items():
        count, error = packets_in(write(tmp_path / "garbage", pack(pcap_file(PACKETS)) + b"garbage!"))
        assert count == len(PACKETS)
        assert f"bytes that are not {name} follow" in error


@pytest.mark.parametrize(("content", "said"), [
    (b"", "is empty"),
    (b"snoop\0\0\0\0\0\0\2\0\0\0\4", "snoop"),
    (b"\x02!L\x18" + bytes(20), "legacy"),
    (b"PK\x03\x04" + bytes(20), "zip"),
    (b"\x12\xcb\xe2\xa1" + bytes(20), "netsniff-ng"),
    (struct.pack("<IIBBHHH", 0, 1_500_000_000, 2, 4, 0x5000, 0, 60) + bytes(20), "beginning of a record"),
    (b"GET / HTTP/1.1\r\n\r\n", "neither pcap nor pcapng"),
    (b"\xd4", "neither pcap nor pcapng"),
    (gzip.compress(b""), "empty gz file"),
    (gzip.compress(b"some text"), "neither pcap nor pcapng"),
    (b"\x1f\x8b", "gz stream ends too early"),
    (struct.pack("<II", 0x184D2A50, 500) + b"hello", "ends inside a frame of user data"),
    (section(version=(7, 0)), "pcapng version is 7.0"),
    (pcap_file([], version=(1, 0)), "pcap version is 1.0"),
    (pcap_file([])[:20], "ends inside its header"),
])  # fmt: skip
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    path = write(tmp_path / "strange", content)
    with pytest.raises(FormatError, match=said) as refused:
        list(read_records(path))
    assert str(path) in str(refused.value)
    assert refused.value.packets == 0


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pcap", tmp_path, tmp_path / "file" / "below.pcap"):
        with pytest.raises(MissingInputError, match=str(path)):
            CaptureReader(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "secret", pcap_file(PACKETS))
    path.chmod(0)
    with pytest.raises(MissingPermissionError, match=str(path)):
        CaptureReader(path)


def test_damage_is_located_and_the_packets_before_it_are_counted(tmp_path: Path) -> None:
    data = pcap_file(PACKETS[:3])
    path = write(tmp_path / "damaged.pcap", data + struct.pack("<IIII", 1, 0, 2**31, 0) + bytes(50))
    count, error = packets_in(path)
    assert count == 3
    assert error == (
        f"{path} is damaged behind byte {len(data)} (3 packets are whole): "
        "a packet claims to have 2147483648 captured bytes, the most is 262144"
    )
    with CaptureReader(path) as reader:
        batch = bytearray(BATCH_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(batch))
        with pytest.raises(FormatError):
            while reader.fill(address, BATCH_BYTES).produced_bytes:
                pass
        assert reader.rest_bytes() == 66


def test_a_pipe_is_read_as_it_comes() -> None:
    program = (
        "from appliance.formats.reader import read_records\n"
        "print(b''.join(bytes(batch) for batch in read_records('-')).hex())"
    )
    data = section() + interface() + b"".join(enhanced(packet) for packet in PACKETS)
    result = subprocess.run([sys.executable, "-c", program], input=gzip.compress(data), capture_output=True, check=True)
    records = split_records(bytes.fromhex(result.stdout.decode()))
    assert [as_packet(record) for record in records[1:]] == PACKETS


def test_records_of_a_slow_pipe_are_not_held_back() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, pcap_file(PACKETS[:2]))
    with CaptureReader(f"/proc/self/fd/{read_end}") as reader:
        batch = bytearray(BATCH_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(batch))
        # This would block for ever if a call waited for more than what is there.
        while reader.counts.packets < 2:
            assert not reader.fill(address, BATCH_BYTES).end
    os.close(read_end)
    os.close(write_end)


def test_the_interfaces_are_known_without_reading_the_packets(tmp_path: Path) -> None:
    data = section() + interface(linktype=1) + interface(linktype=113) + enhanced(PACKETS[0]) + interface(linktype=5)
    described = read_interfaces(write(tmp_path / "two.pcapng", data))
    assert [known.linktype for known in described] == [1, 113]


BOMBS: dict[str, Callable[[], bytes]] = {
    "gz": lambda: gzip.compress(bytes(32 << 20)) * 8,
    "lz4": lambda: lz4.frame.compress(bytes(32 << 20)) * 8,
    # One frame of run-length blocks: each 4 bytes claim 128 KiB.
    "zst": lambda: b"\x28\xb5\x2f\xfd\x00\x58" + struct.pack("<I", 131072 << 3 | 1 << 1)[:3].ljust(4, b"\0") * 10_000,
    "xz": lambda: lzma.compress(bytes(32 << 20)) * 8,
    "bz2": lambda: bz2.compress(bytes(32 << 20)) * 4,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_unpacked_in_bounded_memory(tmp_path: Path, name: str) -> None:
    """A pcapng file with one block of 4 GB to pass over, all zeros, so that the bomb is really unpacked."""
    head = section() + interface() + struct.pack("<II", 4, 0xFFFFFFFC)
    path = write(tmp_path / "bomb", COMPRESSIONS[name](head) + BOMBS[name]())
    program = (
        "import re, sys\n"
        "from appliance.formats.reader import read_records\n"
        "from appliance.errors import FormatError\n"
        "try:\n"
        "    list(read_records(sys.argv[1]))\n"
        "except FormatError as error:\n"
        "    print(error)\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, path],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20)),
    )
    message, peak_kib = result.stdout.splitlines()
    assert "damaged" in message
    assert int(peak_kib) < 120 << 10


def test_a_window_larger_than_the_limit_is_refused_and_not_allocated(tmp_path: Path) -> None:
    data = pcap_file(PACKETS)
    window_of_2_gib = b"\x28\xb5\x2f\xfd\x00\xa8" + struct.pack("<I", len(data) << 3 | 1)[:3] + data
    with pytest.raises(FormatError, match="zst stream is damaged"):
        list(read_records(write(tmp_path / "window.zst", window_of_2_gib)))


def test_batches_are_shortened_in_place_and_keep_their_options_and_interfaces(tmp_path: Path) -> None:
    data = section() + interface() + enhanced(Packet(S, b"abcdefghij"), options=[(1, b"note"), (0, b"")])
    data += enhanced(Packet(S, b"abc")) + enhanced(Packet(S, b"abcdefgh"))
    batch = bytearray().join(map(bytes, read_records(write(tmp_path / "a.pcapng", data))))
    before = split_records(bytes(batch))
    address = ctypes.addressof(ctypes.c_char.from_buffer(batch))
    length, shortened = clamp_snaplen(address, len(batch), 5)
    after = split_records(bytes(batch[:length]))
    assert shortened == 2
    assert after[0] == before[0]
    assert after[2] == before[2]
    assert struct.unpack("=II", after[1][20:28]) == (5, 10)
    assert after[1][28:36] == b"abcde\0\0\0"
    assert after[1][36:-4] == before[1][40:-4]
    assert struct.unpack("=II", after[3][20:28]) == (5, 8)
    assert count_packets(address, length) == 3


def test_a_corrupt_batch_is_refused() -> None:
    batch = bytearray(block("<", 6, bytes(24)))
    batch[4] = 0x70
    address = ctypes.addressof(ctypes.c_char.from_buffer(batch))
    with pytest.raises(FormatError, match="corrupt record at byte 0"):
        count_packets(address, len(batch))
    with pytest.raises(FormatError, match="corrupt record at byte 0"):
        clamp_snaplen(address, len(batch), 5)


@pytest.mark.parametrize("nanoseconds", [True, False])
def test_a_record_becomes_a_packet_of_a_pcap_file(nanoseconds: bool) -> None:
    record = enhanced(Packet(5 * S + 123_456_789, b"abcde", 99), "<" if sys.byteorder == "little" else ">", 1)
    expected = struct.pack("=IIII", 5, 123_456_789 if nanoseconds else 123_456, 5, 99) + b"abcde"
    assert pcap_packet(record, nanoseconds) == expected
    with pytest.raises(FormatError):
        pcap_packet(record[:20] + struct.pack("=I", 99) + record[24:], nanoseconds)


def test_times_beyond_2106_stay_at_the_end_of_the_format() -> None:
    record = enhanced(Packet(2**33 * S, b""), "<" if sys.byteorder == "little" else ">", 1)
    assert pcap_packet(record, True)[:4] == b"\xff\xff\xff\xff"


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def capinfos(path: Path) -> dict[str, str]:
    """One row of capinfos' table, by its column names."""
    command = [tool("capinfos"), "-TM", "-c", "-d", "-s", "-a", "-e", "-o", "-S", "-t", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(zip(lines[0].split("\t"), lines[1].split("\t"), strict=False))


@pytest.mark.parametrize("kind", ["pcap", "nsecpcap", "pcapng", "modpcap"])
def test_files_that_editcap_writes_come_back(tmp_path: Path, kind: str) -> None:
    original = write(tmp_path / "original.pcap", pcap_file(PACKETS))
    converted = tmp_path / "converted"
    subprocess.run([tool("editcap"), "-F", kind, original, converted], check=True)
    records = [record for batch in read_records(converted) for record in split_records(bytes(batch)) if record[0] == 6]
    expected = [
        pcap_packet(record, kind in ("nsecpcap", "pcapng"))
        for batch in read_records(original)
        for record in split_records(bytes(batch))
        if record[0] == 6
    ]
    assert [pcap_packet(record, kind in ("nsecpcap", "pcapng")) for record in records] == expected


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nanoseconds", [True, False])
def test_capinfos_and_we_count_the_same_in_both_byte_orders(tmp_path: Path, order: str, nanoseconds: bool) -> None:
    path = write(tmp_path / "a.pcap", pcap_file(PACKETS, order=order, nanoseconds=nanoseconds))
    with CaptureReader(path) as reader:
        batch = bytearray(BATCH_BYTES)
        address = ctypes.addressof(ctypes.c_char.from_buffer(batch))
        while not reader.fill(address, BATCH_BYTES).end:
            pass
        counts = reader.counts
    told = capinfos(path)
    assert int(told["Number of packets"]) == counts.packets
    assert int(told["Data size (bytes)"]) == counts.bytes
    assert counts.first_ns is not None
    assert told["Start time"].split(".")[0] == str(counts.first_ns // S)


def test_records_written_back_are_a_file_that_mergecap_made(tmp_path: Path) -> None:
    """mergecap merges two files into a pcapng file; its records, written as blocks again, are the same packets."""
    one = write(tmp_path / "one.pcap", pcap_file(PACKETS[::2]))
    other = write(tmp_path / "other.pcap", pcap_file(PACKETS[1::2], order=">"))
    merged = tmp_path / "merged.pcapng"
    subprocess.run([tool("mergecap"), "-F", "pcapng", "-I", "none", "-w", merged, one, other], check=True)
    described = read_interfaces(merged)
    assert len(described) == 2
    again = tmp_path / "again.pcapng"
    blocks = [record for batch in read_records(merged) for record in split_records(bytes(batch)) if record[0] == 6]
    again.write_bytes(section_header() + b"".join(map(interface_description, described)) + b"".join(blocks))
    fields = ["-T", "fields", "-e", "frame.time_epoch", "-e", "frame.interface_id", "-e", "frame.len"]

    def told(path: Path) -> str:
        command = [tool("tshark"), "-n", "-r", str(path)]
        return "".join(
            subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout
            for more in (fields, ["-x"])
        )

    assert told(again) == told(merged)


@pytest.mark.parametrize("command", [
    ["gzip", "-c"], ["pigz", "-c"], ["lz4", "-q", "-c"], ["lz4", "-q", "-c", "-B4", "-BD"], ["zstd", "-q", "-c"],
    ["zstd", "-q", "-19", "--long=27", "-c"], ["xz", "-c"], ["bzip2", "-c"],
], ids=" ".join)  # fmt: skip
def test_what_the_compression_programs_write_is_read(tmp_path: Path, command: list[str]) -> None:
    tool(command[0])
    packed = subprocess.run(command, input=pcap_file(PACKETS), capture_output=True, check=True).stdout
    assert packets_in(write(tmp_path / "packed", packed)) == (len(PACKETS), "")
