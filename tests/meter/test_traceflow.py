"""TraceFlow: the names and the meaning of the original's documentation, and what was wrong there done right."""

from __future__ import annotations

import doctest
import gc
import ipaddress
import json
import os
import plistlib
import sys
import warnings
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.judges import capinfos, packets

from appliance.meter import traceflow
from appliance.meter.traceflow import Buffer, Dumper, FormatWarning, Index, Packet, TraceFlow, flow_label

S = 1_000_000_000
START_NS = 1_700_000_000 * S
FRAME = bytes(12) + b"\x08\x00" + bytes(40)


def packet(index: int, *, at_s: float = -1, back: bool = False, port: int = 40000, **fields: Any) -> Packet:
    ends = [("192.0.2.1", port), ("192.0.2.2", 80)]
    if back:
        ends.reverse()
    (src, srcport), (dst, dstport) = ends
    timestamp = START_NS + (index if at_s < 0 else int(at_s * S))
    values: dict[str, Any] = {"protocol": 1, "frame": FRAME, "timestamp": timestamp} | fields
    return Packet(index=index, src=src, srcport=srcport, dst=dst, dstport=dstport, **values)


def indexes(flows: TraceFlow) -> list[tuple[int, ...]]:
    return [entry.index for entry in flows.index]


# Each example line of the original's documentation --------------------------------------------------------------------


def test_the_modules_examples_run() -> None:
    result = doctest.testmod(traceflow)
    assert (result.failed, result.attempted > 5) == (0, True)


def test_pcapkit_traceflow_without_arguments_writes_pcap_into_tmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flows = TraceFlow()
    flows(packet(1))
    (entry,) = flows.index
    assert entry.fpout == f"./tmp/{entry.label}.pcap"
    assert capinfos(entry.fpout).packets == 1


def test_pcapkit_traceflow_takes_fout_format_byteorder_nanosecond(tmp_path: Path) -> None:
    for byteorder in ("little", "big"):
        for nanosecond in (False, True):
            flows = TraceFlow(str(tmp_path / f"{byteorder}{nanosecond}"), "pcap", byteorder, nanosecond)
            flows(packet(1))
            (entry,) = flows.index
            path = Path(str(entry.fpout))
            assert capinfos(path).file_type == ("nsecpcap" if nanosecond else "pcap")
            assert path.read_bytes()[0] in ((0xD4, 0x4D) if byteorder == "little" else (0xA1,))
            assert [p.time_ns for p in packets(path)] == [START_NS + 1 if nanosecond else START_NS]


def test_pcapkit_trace_returns_the_dumper_or_the_label(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path))
    dumper = flows.trace(packet(1))
    assert isinstance(dumper, Dumper)
    label = flows.trace(packet(2), output=False)
    assert label == "192.0.2.1_40000-192.0.2.2_80-1700000000.000000001"
    assert flows.trace(packet(3)) is dumper


def test_pcapkit_dump_appends_the_packet_and_call_is_dump(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path))
    flows.dump(packet(1))
    flows(packet(2))
    (entry,) = flows.index
    assert [bytes(p.data) for p in packets(str(entry.fpout))] == [FRAME, FRAME]


def test_pcapkit_submit_gives_open_flows_first_and_then_the_finished_ones(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path))
    flows(packet(1, port=1))
    flows(packet(2, port=2))
    flows(packet(3, port=1, fin=True))
    submitted = flows.submit()
    assert all(isinstance(entry, Index) for entry in submitted)
    assert [entry.index for entry in submitted] == [(2,), (1, 3)]
    assert flows.index == submitted


def test_pcapkit_buffer_holds_the_open_flows_by_their_buffer_id(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path))
    flows(packet(1))
    key = (ipaddress.ip_address("192.0.2.1"), 40000, ipaddress.ip_address("192.0.2.2"), 80)
    buffer = flows._buffer[key]
    assert isinstance(buffer, Buffer)
    assert (buffer.index, buffer.label[:16]) == ([1], "192.0.2.1_40000-")
    assert isinstance(buffer.fpout, Dumper)
    flows(packet(2, fin=True))
    assert flows._buffer == {}


@pytest.mark.parametrize(
    ("format", "extension"),
    [
        ("pcap", ".pcap"),
        ("cap", ".pcap"),
        ("plist", ".plist"),
        ("xml", ".plist"),
        ("json", ".json"),
        ("tree", ".txt"),
        ("txt", ".txt"),
        ("text", ".txt"),
    ],
)
def test_pcapkit_make_fout_gives_dumper_and_extension(tmp_path: Path, format: str, extension: str) -> None:
    dumper, found = TraceFlow.make_fout(str(tmp_path / "made"), format)
    assert issubclass(dumper, Dumper)
    assert found == extension
    assert (tmp_path / "made").is_dir()
    module, name, listed = TraceFlow.__output__[format]
    assert (getattr(sys.modules[str(module)], str(name)), listed) == (dumper, extension)


def test_pcapkit_an_unknown_format_warns_and_makes_no_file(tmp_path: Path) -> None:
    with pytest.warns(FormatWarning, match="unknown format 'csv'"):
        flows = TraceFlow(str(tmp_path), "csv")
    flows(packet(1))
    (entry,) = flows.index
    assert (entry.fpout, entry.index) == (None, (1,))
    assert list(tmp_path.iterdir()) == []


class LineDumper:
    """A dumper of a user's own."""

    made: ClassVar[list[str]] = []

    def __init__(self, fname: str) -> None:
        self.made.append(fname)
        self.fname = fname

    def __call__(self, frame: object, name: str) -> None:
        with open(self.fname, "a") as file:
            file.write(f"{name}: {frame}\n")


@pytest.mark.parametrize("how", ["class", "name"])
def test_pcapkit_register_adds_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(TraceFlow, "__output__", TraceFlow.__output__)
    if how == "class":
        TraceFlow.register("lines", LineDumper, ext=".lines")
    else:
        monkeypatch.setitem(sys.modules, "users_module", sys.modules[__name__])
        TraceFlow.register("lines", "users_module", "LineDumper", ".lines")
    flows = TraceFlow(str(tmp_path), "lines")
    flows(packet(7, frame={"a": 1}))
    (entry,) = flows.index
    assert str(entry.fpout).endswith(".lines")
    assert Path(str(entry.fpout)).read_text() == "Frame 7: {'a': 1}\n"


def test_pcapkit_labels_have_dots_for_the_colons_of_ipv6(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path))
    label = flows.trace(packet(1, back=False).__class__(1, 1, FRAME, "2001:db8::1", "2001:db8::2", 5, 6, 7), False)
    assert label == "2001.db8..1_5-2001.db8..2_6-0.000000007"
    assert flow_label("::1", 1, "::2", 2, S) == "..1_1-..2_2-1.000000000"


def test_pcapkit_fin_ends_a_flow_behind_its_packet(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path))
    flows(packet(1, syn=True))
    flows(packet(2, fin=True))
    assert flows._buffer == {}
    assert indexes(flows) == [(1, 2)]


# What was wrong there -------------------------------------------------------------------------------------------------


def test_the_last_ack_belongs_to_the_closed_flow_and_makes_no_file_of_its_own(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path))
    for one in (packet(1, fin=True), packet(2, ack=True), packet(3, ack=True)):
        flows(one)
    assert indexes(flows) == [(1, 2, 3)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_reset_ends_a_flow(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path))
    flows(packet(1))
    flows(packet(2, rst=True))
    assert (flows._buffer, indexes(flows)) == ({}, [(1, 2)])


def test_a_flow_that_was_silent_too_long_ends_and_the_next_packet_begins_another(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path), idle_timeout_s=10)
    for index, at_s in ((1, 0), (2, 10), (3, 20.5)):
        flows(packet(index, at_s=at_s))
    assert indexes(flows) == [(3,), (1, 2)]


def test_without_a_timeout_a_silent_flow_goes_on(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path), idle_timeout_s=0)
    flows(packet(1, at_s=0))
    flows(packet(2, at_s=1_000_000))
    assert indexes(flows) == [(1, 2)]


def test_a_port_that_is_used_again_begins_a_flow_and_a_repeated_syn_does_not(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path))
    for index, seq in ((1, 100), (2, 100), (3, 5000)):
        flows(packet(index, syn=True, seq=seq))
    assert indexes(flows) == [(3,), (1, 2)]


def test_without_sequence_numbers_a_syn_behind_fin_begins_a_flow(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path))
    for one in (packet(1, syn=True), packet(2, syn=True), packet(3, fin=True), packet(4, syn=True)):
        flows(one)
    assert indexes(flows) == [(4,), (1, 2, 3)]


def test_two_flows_of_one_label_get_two_files(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path))
    for index, seq in ((1, 100), (2, 5000), (3, 9000)):
        flows(packet(index, at_s=0, syn=True, seq=seq))
    names = sorted(os.path.basename(str(entry.fpout)) for entry in flows.index)
    stem = "192.0.2.1_40000-192.0.2.2_80-1700000000.000000000"
    assert names == [f"{stem}-2.pcap", f"{stem}-3.pcap", f"{stem}.pcap"]
    assert {capinfos(tmp_path / name).packets for name in names} == {1}


def test_directions_are_flows_of_their_own_unless_they_are_joined(tmp_path: Path) -> None:
    for bidirectional, expected in ((False, [(1, 3), (2,)]), (True, [(1, 2, 3)])):
        flows = TraceFlow(str(tmp_path / str(bidirectional)), bidirectional=bidirectional)
        for one in (packet(1), packet(2, back=True), packet(3)):
            flows(one)
        assert indexes(flows) == expected


def test_a_joined_flow_ends_with_the_fin_of_both_sides(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path), bidirectional=True)
    flows(packet(1, fin=True))
    assert len(flows._buffer) == 1
    flows(packet(2, back=True, fin=True))
    assert (flows._buffer, indexes(flows)) == ({}, [(1, 2)])


def test_the_label_of_a_joined_flow_is_of_its_first_packet(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path), bidirectional=True)
    assert flows.trace(packet(1, back=True), output=False).startswith("192.0.2.2_80-192.0.2.1_40000-")
    assert flows.trace(packet(2), output=False).startswith("192.0.2.2_80-192.0.2.1_40000-")


def test_open_files_and_flows_are_bounded_and_nothing_is_lost(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path), max_open_files=5, max_flows=50)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    most = 0
    for i in range(600):
        flows(packet(i + 1, port=1 + i % 60))
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
        assert len(flows._slots) <= 50
    assert most <= 6
    flows.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert sorted(number for entry in flows.index for number in entry.index) == list(range(1, 601))
    assert sum(capinfos(str(entry.fpout)).packets for entry in flows.index[:20]) == sum(
        len(entry.index) for entry in flows.index[:20]
    )


def test_times_are_whole_nanoseconds_or_decimals_and_never_floats(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path), nanosecond=True)
    flows(packet(1, timestamp=Decimal("1700000000.123456789")))
    (entry,) = flows.index
    assert entry.label.endswith("-1700000000.123456789")
    assert [p.time_ns for p in packets(str(entry.fpout))] == [START_NS + 123_456_789]
    with pytest.raises(TypeError, match="a float loses digits"):
        flows(packet(2, timestamp=1.5))


@pytest.mark.parametrize("format", ["json", "plist"])
def test_structured_files_are_whole_after_every_packet(tmp_path: Path, format: str) -> None:
    flows = TraceFlow(str(tmp_path), format)
    for number in range(1, 4):
        flows(packet(number, syn=number == 1, frame=FRAME if number < 3 else {"layers": {"tcp": 1}}))
        path = Path(str(flows.index[0].fpout))
        content = json.loads(path.read_text()) if format == "json" else plistlib.loads(path.read_bytes())
        assert list(content) == [f"Frame {i}" for i in range(1, number + 1)]
    assert content["Frame 1"]["flags"] == "SYN"
    assert content["Frame 1"]["frame"] == FRAME.hex()
    assert content["Frame 3"] == {"layers": {"tcp": 1}}


def test_a_tree_has_a_branch_for_each_field(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path), "tree")
    flows(packet(1, frame={"eth": {"type": 2048}, "note": "x"}))
    text = Path(str(flows.index[0].fpout)).read_text()
    assert text == "Frame 1\n  |-- eth\n  |   |-- type -> 2048\n  |-- note -> x\n"


def test_packets_of_different_link_types_are_different_flows(tmp_path: Path) -> None:
    flows = TraceFlow(str(tmp_path))
    flows(packet(1))
    flows(packet(2, protocol=101))
    assert len(flows.index) >= 1
    assert sorted(capinfos(path).encapsulation for path in tmp_path.iterdir()) == ["ether", "rawip"]


def test_nothing_warns_for_a_known_format(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TraceFlow(str(tmp_path), "JSON")
