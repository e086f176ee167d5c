"""ERF both ways: records made by hand, every cut, every type; and what libtrace and Wireshark say of the same files."""

from __future__ import annotations

import ctypes
import itertools
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from formats.craft import Packet as Crafted, Walled, as_packet, packet_options, split_records
from hypothesis import given, strategies as st
from support.judges import capinfos, packets_by_wireshark

from appliance.formats.decoder import STATUS_DAMAGED, STATUS_END, STATUS_NEED_INPUT, STATUS_OUTPUT_FULL, Decoder
from appliance.formats.erf import ErfDecoder
from appliance.formats.fixed import LAYOUTS, FixedDecoder
from appliance.formats.output_trace import input_trace
from appliance.formats.packet import ERF, Packet, encode

S = 10**9
START_S = 1_700_000_000
needs_libtrace = pytest.mark.skipif(shutil.which("tracepktdump") is None, reason="needs libtrace-tools")


def erf_record(  # one record, as the card writes it
    payload: bytes,
    *,
    type: int = 2,
    flags: int = 4,
    wire: int | None = None,
    lost: int = 0,
    seconds: int = START_S,
    fraction: int = 0,
    extensions: bytes = b"",
) -> bytes:
    length = 16 + len(extensions) + len(payload)
    wire = len(payload) if wire is None else wire
    head = struct.pack("<II", fraction, seconds) + struct.pack(">BBHHH", type, flags, length, lost, wire)
    return head + extensions + payload


def ethernet(data: bytes, original: int | None = None, **fields: int) -> bytes:
    return erf_record(bytes(2) + data, wire=(len(data) if original is None else original) + 4, **fields)  # type: ignore[arg-type]


SEED = b"".join((
    ethernet(b"first packet", 1500),
    erf_record(b"\xff\x03" + bytes(9), type=1, flags=5),
    erf_record(b"\x0f\x00\x08\x00" + bytes(20), type=1, lost=3, fraction=1 << 31),
    erf_record(bytes(24), type=0x80 | 22, extensions=b"\x84" + bytes(7) + b"\x05" + bytes(7)),
    erf_record(bytes(16), type=48),
    erf_record(bytes(40), type=27),
    ethernet(b"last", flags=7),
))  # fmt: skip


def run(decoder: Decoder, data: bytes, piece_bytes: int = 0) -> tuple[int, list[bytes]]:
    """(status, records) of `data`, handed in by pieces, before walls that end the test run when they are touched."""
    source, target = Walled(max(1, len(data))), Walled(1 << 16)
    begin, end = 0, min(piece_bytes or len(data), len(data))
    records: list[bytes] = []
    while True:
        at = source.put(data[begin:end])
        status, consumed, produced = decoder.decode(at, end - begin, target.address, target.length, end >= len(data))
        records += split_records(ctypes.string_at(target.address, produced))
        begin += consumed
        if status == STATUS_NEED_INPUT:
            end = min(len(data), end + (piece_bytes or len(data)))
        elif status != STATUS_OUTPUT_FULL:
            return status, records


def packets_of(records: list[bytes]) -> list[Crafted]:
    return [as_packet(record) for record in records if record[0] == 6]


def test_each_type_of_record_becomes_a_packet_of_its_link_type() -> None:
    decoder = ErfDecoder()
    status, records = run(decoder, SEED)
    assert status == STATUS_END
    assert [(i.linktype, i.name) for i in decoder.interfaces] == [
        (1, "port0"), (50, "port1"), (104, "port0"), (101, "port0"), (197, "port0"), (1, "port3"),
    ]  # fmt: skip
    found = packets_of(records)
    assert [len(packet.data) for packet in found] == [12, 11, 24, 24, 56, 4]
    assert found[0] == Crafted(START_S * S, b"first packet", 1500)
    assert found[2].timestamp_ns == START_S * S + S // 2
    assert struct.unpack("=HHQ", packet_options([r for r in records if r[0] == 6][2])[:12]) == (4, 8, 3)


@pytest.mark.parametrize("cut", range(len(SEED)))
def test_every_cut_gives_the_whole_records_and_then_says_where_it_ends(cut: int) -> None:
    decoder = ErfDecoder()
    status, records = run(decoder, SEED[:cut], piece_bytes=7)
    ends = list(itertools.accumulate(len(r) for r in records_of(SEED)))
    if cut in (0, *ends):
        assert status == STATUS_END
    else:
        assert status == STATUS_DAMAGED
        assert "after the beginning of a record" in decoder.damage
    assert decoder.whole_offset == max((end for end in ends if end <= cut), default=0)
    assert len(packets_of(records)) == decoder.packets


def records_of(data: bytes) -> list[bytes]:
    records = []
    while data:
        (length,) = struct.unpack_from(">H", data, 10)
        records.append(data[:length])
        data = data[length:]
    return records


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (erf_record(b"")[:10] + b"\0\x0f" + bytes(4), "impossible length 15"),
        (erf_record(b"", type=49), "unknown type 49"),
        (erf_record(b"\x80" * 20, type=0x82), "extension headers"),
        (erf_record(b"\0", type=2), "impossible length"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    decoder = ErfDecoder()
    assert run(decoder, data)[0] == STATUS_DAMAGED
    assert reason in decoder.damage


@given(st.binary(max_size=300))
def test_no_bytes_lead_the_decoders_astray(data: bytes) -> None:
    for decoder in (ErfDecoder(), *map(fixed, LAYOUTS)):
        status, _ = run(decoder, data, piece_bytes=13)
        assert status in (STATUS_END, STATUS_DAMAGED)


def test_damaged_bytes_in_a_good_file_never_give_a_packet_that_is_longer_than_its_record() -> None:
    chance = random.Random(5)
    for _ in range(3000):
        data = bytearray(SEED)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        _, records = run(ErfDecoder(), bytes(data))
        assert sum(len(packet.data) for packet in packets_of(records)) <= len(data)


@given(st.integers(0, 2**32 * S - 1), st.binary(min_size=1, max_size=80))
def test_what_is_written_comes_back_to_the_nanosecond(timestamp_ns: int, data: bytes) -> None:
    for linktype, number in ((1, 3), (50, 0), (101, 1)):
        if linktype == 50:
            data = b"\xff\x03" + data
        packet = Packet(timestamp_ns, data, len(data) + 7, linktype)
        decoder = ErfDecoder()
        status, records = run(decoder, bytes(encode([packet], ERF, {linktype: number})))
        assert status == STATUS_END
        assert packets_of(records) == [Crafted(timestamp_ns, data, len(data) + 7)]
        assert decoder.interfaces[0].linktype == linktype
        assert decoder.interfaces[0].name == f"port{number}"


def test_a_packet_beyond_a_records_length_is_cut_to_it() -> None:
    written = encode([Packet(1, bytes(200_000))], ERF, {1: 0})
    assert len(written) == 65535
    assert written[14:16] == b"\xff\xff"


def test_a_link_type_that_erf_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be held"):
        encode([Packet(1, bytes(20), link_type=113)], ERF, {113: 0})


def some_packets() -> list[Packet]:
    chance = random.Random(7)
    times = [START_S * S + i * 1_234_567 + chance.randrange(1000) for i in range(200)]
    return [Packet(time, chance.randbytes(chance.randint(60, 1500)), 1514) for time in times]


def test_wireshark_reads_the_same_packets_and_times(tmp_path: Path) -> None:
    packets = some_packets()
    path = tmp_path / "a.erf"
    path.write_bytes(encode(packets, ERF, {1: 0}))
    assert capinfos(path).file_type == "erf"
    assert capinfos(path).packets == len(packets)
    read = packets_by_wireshark(path)  # link type ERF: the record's header and padding stand before the data
    assert [p.time_ns for p in read] == [p.timestamp_ns for p in packets]
    assert [bytes(p.data[18:]) for p in read] == [p.data for p in packets]


@needs_libtrace
def test_libtrace_converts_it_to_the_same_packets(tmp_path: Path) -> None:
    packets = some_packets()
    path, copy = tmp_path / "a.erf", tmp_path / "copy.pcap"
    path.write_bytes(encode(packets, ERF, {1: 0}))
    subprocess.run(["traceconvert", f"erf:{path}", f"pcapfile:{copy}"], check=True, capture_output=True)
    read = packets_by_wireshark(copy)
    # traceconvert writes microseconds.
    assert [p.time_ns // 1000 for p in read] == [p.timestamp_ns // 1000 for p in packets]
    assert [bytes(p.data) for p in read] == [p.data for p in packets]
    assert [p.original_length for p in read] == [1514] * len(packets)


@needs_libtrace
def test_what_libtrace_writes_is_read_with_the_same_packets(tmp_path: Path) -> None:
    packets = some_packets()
    source, copy = tmp_path / "a.erf", tmp_path / "copy.erf"
    source.write_bytes(encode(packets, ERF, {1: 2}))
    subprocess.run(["traceconvert", f"erf:{source}", f"erf:{copy}"], check=True, capture_output=True)
    with input_trace(f"erf:{copy}") as trace:  # traceconvert compresses what it writes
        assert list(trace) == packets


# Records of fixed length ----------------------------------------------------------------------------------------------

ERF_TIME = struct.pack("<II", 1 << 30, START_S)
FIXED = {
    "legacyeth": (ERF_TIME + struct.pack("<H", 1000), 54, 1000, START_S * S + S // 4, 1),
    "legacypos": (ERF_TIME + struct.pack(">II", 48, 700) + b"\xff\x03", 48, 700, START_S * S + S // 4, 50),
    "legacyatm": (ERF_TIME + bytes(4), 52, 53, START_S * S + S // 4, 147),
    "tsh": (struct.pack(">II", START_S, 1 << 24 | 250_000) + struct.pack(">HH", 0x4500, 1480), 36, 1480)
    + (START_S * S + S // 4, 101),
    "fr+": (struct.pack(">II", START_S, 999_999) + struct.pack(">HH", 0x4500, 40), 36, 40)
    + (START_S * S + 999_999_000, 101),
}


def fixed(name: str) -> FixedDecoder:
    decoder = FixedDecoder()
    decoder.use(name)
    return decoder


def fixed_record(name: str) -> bytes:
    return FIXED[name][0].ljust(LAYOUTS[name][1], b"\x11")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_fixed_record_is_a_packet_with_its_time_and_lengths(name: str) -> None:
    _, captured, original, timestamp_ns, linktype = FIXED[name]
    decoder = fixed(name)
    status, records = run(decoder, fixed_record(name) * 3)
    assert status == STATUS_END
    data = fixed_record(name)[-captured:]
    assert packets_of(records) == [Crafted(timestamp_ns, data, original)] * 3
    assert [interface.linktype for interface in decoder.interfaces] == [linktype]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_cut_of_fixed_records_ends_cleanly_or_says_where(name: str) -> None:
    record = fixed_record(name)
    for cut in range(2 * len(record) + 1):
        decoder = fixed(name)
        status, records = run(decoder, (record * 2)[:cut], piece_bytes=5)
        assert (status == STATUS_END) == (cut % len(record) == 0)
        assert len(packets_of(records)) == cut // len(record)


@needs_libtrace
@pytest.mark.parametrize("name", ["legacyeth", "legacypos", "tsh"])
def test_libtrace_reads_the_same_times_and_lengths_of_fixed_records(tmp_path: Path, name: str) -> None:
    """tracestats sums up wire lengths; libtrace counts the frame check sequence of legacyeth, which we do not."""
    path = tmp_path / "a"
    path.write_bytes(fixed_record(name) * 3)
    done = subprocess.run(["tracestats", f"{name}:{path}"], check=True, capture_output=True, text=True)
    total = next(line.split() for line in done.stdout.splitlines() if "Total:" in line)
    original = FIXED[name][2] + (4 if name == "legacyeth" else 0)
    assert [int(total[1]), int(total[2])] == [3, 3 * original]
