"""The judges find what is wrong, and call right what is right."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from support.captures import START_NS, Timed, write_pcap
from support.frames import MAGIC, Shape, numbered_frame
from support.judges import (
    JudgeError,
    capinfos,
    check_numbered,
    packet_count,
    packets,
    packets_by_wireshark,
    tshark_fields,
)
from support.lab import requires_tool

SMALL = Shape()


def numbered(numbers: Iterable[int], interface_id: int = 0, shape: Shape = SMALL) -> list[Timed]:
    return [(1000 * i, numbered_frame(interface_id, number, shape)) for i, number in enumerate(numbers)]


def test_a_complete_file_has_no_faults(tmp_path: Path) -> None:
    report = check_numbered([write_pcap(tmp_path / "a.pcap", numbered(range(100)))])
    report.assert_exact({0: 100})
    assert (report.packets, report.received, report.first_ns) == (100, 100, START_NS)


def test_every_kind_of_fault_is_found_and_named(tmp_path: Path) -> None:
    frames = numbered([0, 1, 4, 3, 3, 6, 12])
    damaged = bytearray(frames[1][1])
    damaged[-1] ^= 1
    frames[1] = (frames[1][0], bytes(damaged))
    frames[2] = (frames[2][0] + 5000, frames[2][1])
    frames.append((9000, bytes(60)))
    faults = check_numbered([write_pcap(tmp_path / "a.pcap", frames)]).faults({0: 9, 1: 1})
    assert faults == [
        "interface 0: 5 of 9 missing: 1-2, 5, 7-8",
        "interface 0: never sent: 12",
        "interface 0: 1 duplicates",
        "interface 0: 1 corrupt",
        "interface 0: 1 disordered",
        "interface 1: 1 of 1 missing: 0",
        "4 inversions, the worst 4000 ns back",
        "1 foreign and 0 unreadable packets",
    ]


def test_a_duplicate_and_an_inversion_across_two_files_are_found(tmp_path: Path) -> None:
    first = write_pcap(tmp_path / "1.pcap", numbered(range(10)))
    second = write_pcap(tmp_path / "2.pcap", [(8500, numbered_frame(0, 9))])
    report = check_numbered([first, second])
    assert (report[0].duplicates, report.inversions, report.worst_inversion_ns) == (1, 1, 500)


def test_a_truncated_frame_counts_by_its_number_without_its_checksum(tmp_path: Path) -> None:
    frames = numbered(range(3), shape=Shape((200,)))
    report = check_numbered([write_pcap(tmp_path / "a.pcap", frames, captured_bytes=40)])
    assert (report[0].received, report[0].truncated, report[0].corrupt) == (3, 3, 0)
    report = check_numbered([write_pcap(tmp_path / "b.pcap", frames, captured_bytes=20)])
    assert report.unreadable == 3


@pytest.mark.parametrize("shape", [Shape((60, 1514), vlan=9), Shape((60,), udp=True, flows=2)], ids=["vlan", "udp"])
def test_numbers_are_found_below_tags_and_datagrams(tmp_path: Path, shape: Shape) -> None:
    path = write_pcap(tmp_path / "a.pcap", numbered(range(20), 3, shape), order=">")
    check_numbered([path]).assert_exact({3: 20})


def test_the_filling_is_under_the_checksum() -> None:
    frame = numbered_frame(1, 2, Shape((1000,)))
    assert len(frame) == 1000
    assert frame[14:18] == MAGIC


@requires_tool("tshark")
def test_tshark_finds_the_datagrams_of_a_flow_shape_well_formed(tmp_path: Path) -> None:
    path = write_pcap(tmp_path / "a.pcap", numbered(range(4), 3, Shape((80,), udp=True, flows=2)))
    fields = ("frame.len", "ip.checksum.status", "udp.srcport", "frame.time_epoch")
    assert tshark_fields(path, *fields)[3][:3] == ("80", "2", "20001")
    assert tshark_fields(path, "udp.length", display_filter="udp.srcport == 20000") == [("46",), ("46",)]


@requires_tool("capinfos", "editcap")
def test_our_reader_and_wireshark_agree_on_pcap_and_pcapng(tmp_path: Path) -> None:
    plain = write_pcap(tmp_path / "a.pcap", numbered(range(50)))
    as_pcapng = tmp_path / "a.pcapng"
    subprocess.run(["editcap", "-F", "pcapng", plain, as_pcapng], check=True)
    for path in (plain, as_pcapng):
        mine, theirs = list(packets(path)), packets_by_wireshark(path)
        assert [(p.time_ns, bytes(p.data), p.original_length) for p in mine] == [
            (p.time_ns, bytes(p.data), p.original_length) for p in theirs
        ]
        info = capinfos(path)
        assert (info.packets, info.data_bytes, info.in_order) == (50, 3000, True)


@requires_tool("lz4", "zstd", "xz", "gzip", "bzip2", "capinfos")
@pytest.mark.parametrize(
    "program", [["lz4", "-q", "-m"], ["zstd", "-q"], ["xz", "-k"], ["gzip", "-k"], ["bzip2", "-k"]]
)
def test_compressed_files_are_judged_through_their_own_programs(tmp_path: Path, program: list[str]) -> None:
    plain = write_pcap(tmp_path / "a.pcap", numbered(range(10)))
    subprocess.run([*program, plain], check=True)
    (packed,) = set(tmp_path.iterdir()) - {plain}
    check_numbered([packed]).assert_exact({0: 10})
    assert packet_count([packed, plain]) == 20
    packed.write_bytes(packed.read_bytes()[:-5])
    with pytest.raises(JudgeError, match=packed.name):
        check_numbered([packed])


@requires_tool("capinfos", "editcap")
@pytest.mark.parametrize("kind", ["pcap", "pcapng"])
def test_a_file_that_ends_inside_a_record_is_refused_by_both(tmp_path: Path, kind: str) -> None:
    path = write_pcap(tmp_path / "a.pcap", numbered(range(10)))
    cut = tmp_path / f"cut.{kind}"
    subprocess.run(["editcap", "-F", "nsecpcap" if kind == "pcap" else kind, path, cut], check=True)
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.raises(JudgeError, match="cut"):
        check_numbered([cut])
    with pytest.raises(JudgeError, match="cut"):
        capinfos(cut)


@requires_tool("capinfos")
def test_an_empty_file_has_no_times(tmp_path: Path) -> None:
    info = capinfos(write_pcap(tmp_path / "a.pcap", []))
    assert (info.packets, info.first_time, info.last_time, info.in_order) == (0, None, None, None)


def test_a_hundred_thousand_frames_are_judged_in_seconds(tmp_path: Path) -> None:
    path = write_pcap(tmp_path / "a.pcap", numbered(range(100_000)))
    started = time.process_time()
    check_numbered([path]).assert_exact({0: 100_000})
    assert time.process_time() - started < 10
