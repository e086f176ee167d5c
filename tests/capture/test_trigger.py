"""Triggers and keep rules, packet by packet, and the buffer behind them."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings, strategies as st

from appliance.capture import bpf
from appliance.capture.trigger import Gate, PortTap
from appliance.capturer import CapturedPacket, enums, parse_captured
from appliance.generator import FrameMaker, StreamShape, damaged
from appliance.ring.port import (
    COMMAND_START,
    COMMAND_STOP,
    FILTER_INSTRUCTIONS,
    PACKET_HEADER_BYTES,
    PortMemory,
    allocate,
)

START, STOP, KEEP = enums.StartTrigger, enums.StopTrigger, enums.PacketType
GENERATION = 9
BEGIN_NS = 1_700_000_000_000_000_000
SMALL = 1 << 16
HEAD_OFFSET = 312  # of port_header.head, ring/port.h
RET_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0xFFFFFFFF)


class Bench:
    """A port, and both its ends. Packet n has the number n in its first four bytes, and comes n us after the start."""

    def __init__(self, capacity: int = SMALL) -> None:
        self.fd = allocate(capacity, GENERATION, "test")
        PortMemory.provide(self.fd)
        self.memory = PortMemory(self.fd, GENERATION)
        self.tap = PortTap(self.fd, GENERATION)
        self.tap.attach(1, 1)
        self.shown = 0

    def set(
        self,
        start: int = START.ON,
        stop: int = STOP.USERSTOP,
        keep: int = KEEP.ALL,
        *,
        start_filter: int = 0,
        stop_filter: int = 1,
        index: int = 0,
        byte_count: int = 0,
        pretrigger: int = 0,
        fcs: bool = False,
    ) -> None:
        self.memory.configure(
            start, start_filter, stop, stop_filter, keep, index, byte_count, pretrigger, 4 if fcs else 0
        )

    def filter(self, index: int, expression: str) -> None:
        self.memory.set_filter(index, expression.encode(), bpf.compile_offline(1, expression).instructions)

    @property
    def now_ns(self) -> int:
        return BEGIN_NS + self.shown * 1000

    def start(self) -> None:
        request = self.memory.command(COMMAND_START, self.now_ns)
        self.tap.rest(self.now_ns)
        assert self.memory.is_answered(request)

    def stop(self) -> None:
        request = self.memory.command(COMMAND_STOP, self.now_ns - 1)
        self.tap.rest(self.now_ns)
        assert self.memory.is_answered(request)

    def show(self, packets: Sequence[bytes]) -> None:
        for packet in packets:
            self.tap.show(packet, self.now_ns)
            self.shown += 1

    def show_numbered(self, count: int, size: int = 60) -> None:
        self.show([struct.pack("!I", n).ljust(size, b"\xaa") for n in range(self.shown, self.shown + count)])

    def captured(self) -> list[CapturedPacket]:
        figures = self.memory.figures()
        begins, data = self.memory.read(figures["tail"], 1 << 40)
        assert begins == figures["tail"]
        found = list(parse_captured(data))
        assert len(found) == figures["packets"]
        return found

    def numbers(self) -> list[int]:
        return [struct.unpack_from("!I", one.data)[0] for one in self.captured()]

    @property
    def state(self) -> tuple[str, str]:
        figures = self.memory.figures()
        return figures["state"], figures["stopped_because"]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    os.close(made.fd)


def is_number(n: int) -> str:
    return f"ether[0:4] = {n}"


def test_nothing_is_captured_before_the_start_and_after_the_stop(bench: Bench) -> None:
    bench.set()
    bench.show_numbered(5)
    bench.start()
    assert bench.state == ("capturing", "")
    bench.show_numbered(5)
    bench.stop()
    bench.show_numbered(5)
    assert bench.numbers() == [5, 6, 7, 8, 9]
    assert bench.state == ("stopped", "user")


def test_packets_that_had_arrived_before_the_start_do_not_belong_to_it(bench: Bench) -> None:
    bench.set()
    bench.memory.command(COMMAND_START, 0)
    bench.tap.rest(BEGIN_NS + 2500)
    bench.show_numbered(5)
    assert bench.numbers() == [3, 4]


def test_packets_that_arrived_before_the_stop_still_belong_to_it(bench: Bench) -> None:
    bench.set()
    bench.start()
    request = bench.memory.command(COMMAND_STOP, BEGIN_NS + 2000)
    bench.show_numbered(3)
    assert not bench.memory.is_answered(request)
    bench.show_numbered(3)
    assert bench.memory.is_answered(request)
    assert bench.numbers() == [0, 1, 2]


def test_the_first_packet_met_the_start_criterion_and_the_last_the_stop_criterion(bench: Bench) -> None:
    bench.filter(0, is_number(10))
    bench.filter(1, is_number(20))
    bench.set(START.FILTER, STOP.FILTER)
    bench.start()
    bench.show_numbered(10)
    assert bench.state == ("waiting", "")
    bench.show_numbered(20)
    assert bench.state == ("stopped", "trigger")
    captured = bench.captured()
    assert bench.numbers() == list(range(10, 21))
    assert [one.met_start for one in captured] == [True] + [False] * 10
    assert [one.met_stop for one in captured] == [False] * 10 + [True]
    assert [one.number for one in captured] == list(range(10, 21))


@pytest.mark.parametrize(("pretrigger", "first"), [(0, 100), (1, 99), (7, 93), (100, 0), (1000, 0)])
def test_so_many_packets_from_before_the_start_criterion_are_kept(bench: Bench, pretrigger: int, first: int) -> None:
    bench.filter(0, is_number(100))
    bench.set(START.FILTER, STOP.USERSTOP, pretrigger=pretrigger)
    bench.start()
    bench.show_numbered(105)
    bench.stop()
    assert bench.numbers() == list(range(first, 105))
    assert [one.is_pretrigger for one in bench.captured()] == [True] * (100 - first) + [False] * 5


def test_one_packet_cannot_start_and_stop_a_capture(bench: Bench) -> None:
    bench.filter(0, "ether[3] = 10 or ether[3] = 12")
    bench.set(START.FILTER, STOP.FILTER, stop_filter=0)
    bench.start()
    bench.show_numbered(20)
    assert bench.numbers() == [10, 11, 12]


def test_full_keeps_the_earliest_and_stops(bench: Bench) -> None:
    bench.set(stop=STOP.FULL)
    bench.start()
    bench.show_numbered(2000)
    fit = SMALL // ((PACKET_HEADER_BYTES + 60 + 7) // 8 * 8)
    assert bench.numbers() == list(range(fit))
    assert bench.state == ("stopped", "full")
    assert bench.memory.figures()["overwritten_packets"] == 0


def test_full_with_packets_from_before_keeps_the_latest_of_those_and_the_earliest_of_the_others(bench: Bench) -> None:
    bench.filter(0, is_number(3000))
    bench.set(START.FILTER, STOP.FULL, pretrigger=100_000)
    bench.start()
    bench.show_numbered(3005)
    assert bench.state == ("stopped", "full")
    assert bench.numbers()[-1] == 2999
    bench.set(START.FILTER, STOP.FULL, pretrigger=10)
    bench.filter(0, is_number(3100))
    bench.start()
    bench.show_numbered(2000)
    numbers = bench.numbers()
    assert numbers == list(range(3090, 3090 + len(numbers)))
    assert bench.state == ("stopped", "full")


def test_every_other_stop_keeps_the_latest(bench: Bench) -> None:
    bench.filter(1, is_number(5000))
    bench.set(START.ON, STOP.FILTER)
    bench.start()
    bench.show_numbered(6000)
    numbers = bench.numbers()
    assert numbers == list(range(5001 - len(numbers), 5001))
    figures = bench.memory.figures()
    assert figures["overwritten_packets"] == 5001 - len(numbers)
    assert figures["seen_packets"] == 5001


@given(sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_the_circle_holds_the_latest_packets_whole_whatever_their_sizes(sizes: list[int]) -> None:
    bench = Bench()
    try:
        bench.set()
        bench.start()
        packets = [bytes((i,)) * size for i, size in enumerate(sizes)]
        bench.show(packets)
        held = [one.data for one in bench.captured()]
        assert held == packets[len(packets) - len(held) :]
        used = [(PACKET_HEADER_BYTES + len(data) + 7) // 8 * 8 for data in packets[::-1]]
        room = sum(1 for i in range(len(used)) if sum(used[: i + 1]) <= SMALL)
        assert len(held) == room
    finally:
        os.close(bench.fd)


@pytest.mark.parametrize(("byte_count", "kept"), [(-1, 60), (0, 60), (1, 1), (59, 59), (61, 60)])
def test_so_many_bytes_of_each_packet_are_kept(bench: Bench, byte_count: int, kept: int) -> None:
    bench.set(byte_count=byte_count & 0xFFFFFFFF)
    bench.start()
    bench.show_numbered(3)
    assert [(len(one.data), one.original_length) for one in bench.captured()] == [(kept, 60)] * 3


def with_fcs(frame: bytes) -> bytes:
    return frame + struct.pack("<I", zlib.crc32(frame))


def test_wrong_check_sequences_start_stop_and_are_kept(bench: Bench) -> None:
    good = with_fcs(bytes(range(60)))
    bad = good[:20] + b"\xff" + good[21:]
    bench.set(START.FCSERR, STOP.FCSERR, fcs=True)
    bench.start()
    bench.show([good, good, bad, good, bad, good])
    assert [one.has_fcs_error for one in bench.captured()] == [True, False, True]
    assert bench.state == ("stopped", "trigger")
    bench.set(keep=KEEP.FCSERR, fcs=True)
    bench.start()
    bench.show([good, bad, good, bad])
    assert [one.data for one in bench.captured()] == [bad, bad]


def test_frames_of_this_host_have_no_check_sequence_that_could_be_wrong(bench: Bench) -> None:
    bench.set(keep=KEEP.FCSERR, fcs=True)
    bench.start()
    bench.tap.show(bytes(60), bench.now_ns, outgoing=True)
    assert bench.captured() == []


def test_wrong_checksums_start_stop_and_are_kept(bench: Bench) -> None:
    good = FrameMaker(StreamShape(stream=1)).frame(0, BEGIN_NS)[:-36] + bytes(
        36
    )  # no trailer, so its checksum is wrong
    right = FrameMaker(StreamShape(stream=1)).frame(0, BEGIN_NS)
    bench.set(START.PLDERR, STOP.PLDERR)
    bench.start()
    bench.show([right, good, right, good, right])
    assert [one.has_payload_error for one in bench.captured()] == [True, False, True]
    assert bench.state == ("stopped", "trigger")


def test_checksums_are_not_judged_where_they_are_not_there_yet_or_cut_off(bench: Bench) -> None:
    wrong = damaged(FrameMaker(StreamShape()).frame(0, BEGIN_NS))
    fragment = wrong[:20] + b"\x20\x00" + wrong[22:-36] + bytes(36)
    bench.set(keep=KEEP.PLDERR)
    bench.start()
    bench.tap.show(wrong, bench.now_ns, checksum_not_ready=True)
    bench.tap.show(wrong[:-4], bench.now_ns, len(wrong))
    bench.tap.show(fragment, bench.now_ns)
    assert bench.captured() == []
    bench.tap.show(wrong, bench.now_ns)
    assert len(bench.captured()) == 1


def test_packets_with_and_without_test_payload_are_told_apart(bench: Bench) -> None:
    stream_3 = FrameMaker(StreamShape(stream=3)).frame(7, BEGIN_NS)
    stream_4 = FrameMaker(StreamShape(stream=4)).frame(8, BEGIN_NS)
    other = bytes(60)
    for keep, index, kept in (
        (KEEP.TPLD, 3, [stream_3]),
        (KEEP.TPLD, 4, [stream_4]),
        (KEEP.TPLD, 5, []),
        (KEEP.NOTPLD, 0, [other]),
        (KEEP.ALL, 0, [stream_3, other, stream_4]),
    ):
        bench.set(keep=keep, index=index)
        bench.start()
        bench.show([stream_3, other, stream_4])
        bench.stop()
        assert [one.data for one in bench.captured()] == kept, (keep, index)


def test_a_packet_knows_its_latency_and_the_gap_before_it(bench: Bench) -> None:
    maker = FrameMaker(StreamShape(stream=3))
    bench.set(keep=KEEP.TPLD, index=3)
    bench.start()
    bench.show([bytes(60), maker.frame(41, bench.now_ns - 500), bytes(60), maker.frame(42, bench.now_ns)])
    found = [(one.stream, one.sequence, one.latency_ns, one.gap_ns, one.number) for one in bench.captured()]
    assert found == [(3, 41, 1500, 1000, 1), (3, 42, 3000, 1000, 3)]


def test_loss_disorder_errors_and_latency_are_counted_per_stream(bench: Bench) -> None:
    one, two = FrameMaker(StreamShape(stream=1)), FrameMaker(StreamShape(stream=257))  # the same place in the table
    bench.set(keep=KEEP.FILTER)  # no filter: nothing is kept, all is counted
    bench.start()
    for sequence in (10, 11, 14, 13, 15):
        bench.tap.show(one.frame(sequence, bench.now_ns - sequence), bench.now_ns)
    bench.tap.show(two.frame(0, bench.now_ns), bench.now_ns)
    bench.tap.show(damaged(two.frame(1, bench.now_ns)), bench.now_ns)
    first, second = bench.memory.streams_seen()
    assert (first["stream"], first["packets"], first["lost"], first["misordered"]) == (1, 5, 1, 1)
    assert (first["latency_min_ns"], first["latency_max_ns"], first["latency_sum_ns"]) == (10, 15, 63)
    assert (second["stream"], second["packets"], second["lost"], second["payload_errors"]) == (257, 2, 0, 1)
    assert bench.captured() == []


def test_more_streams_than_the_table_holds_are_counted_as_unknown(bench: Bench) -> None:
    bench.set()
    bench.start()
    for stream in range(300):
        bench.tap.show(FrameMaker(StreamShape(stream=stream)).frame(0, bench.now_ns), bench.now_ns)
    assert len(bench.memory.streams_seen()) == 256
    assert bench.memory.figures()["unknown_stream_packets"] == 44


def test_a_start_clears_what_was_there(bench: Bench) -> None:
    bench.set()
    bench.start()
    bench.tap.show(FrameMaker(StreamShape()).frame(0, bench.now_ns), bench.now_ns)
    bench.stop()
    bench.show_numbered(3)
    bench.start()
    assert bench.captured() == []
    assert bench.memory.streams_seen() == []
    assert bench.memory.figures()["seen_packets"] == 0


def test_a_successor_goes_on_where_its_predecessor_was(bench: Bench) -> None:
    bench.filter(1, is_number(30))
    bench.set(stop=STOP.FILTER)
    bench.start()
    bench.show_numbered(20)
    del bench.tap
    bench.tap = PortTap(bench.fd, GENERATION)
    bench.tap.attach(1, 1)
    bench.show_numbered(20)
    assert bench.numbers() == list(range(31))
    assert bench.state == ("stopped", "trigger")


def test_a_stop_that_nobody_heard_is_heard_by_the_successor(bench: Bench) -> None:
    bench.set()
    bench.start()
    bench.show_numbered(5)
    request = bench.memory.command(COMMAND_STOP, bench.now_ns)
    del bench.tap
    bench.tap = PortTap(bench.fd, GENERATION)
    bench.tap.attach(1, 1)
    bench.tap.rest(bench.now_ns)
    assert bench.memory.is_answered(request)
    assert bench.state == ("stopped", "user")


@pytest.mark.parametrize(
    "program",
    [
        struct.pack("=HBBI", 0x05, 0, 0, 0xFFFFFFFF) + RET_ALL,  # jumps to itself
        struct.pack("=HBBI", 0x05, 0, 0, 0xFFFFFFFE) * 2 + RET_ALL,
        struct.pack("=HBBI", 0x15, 200, 200, 0) + RET_ALL,  # jumps out
        struct.pack("=HBBI", 0x20, 0, 0, 0),  # does not end
        b"\xff" * 8,
    ],
)
def test_a_program_that_is_none_is_not_run(bench: Bench, program: bytes) -> None:
    bench.set(START.FILTER)
    bench.memory.set_filter(0, b"x", program)
    bench.start()
    bench.show_numbered(5)
    assert bench.state == ("stopped", "bad filter")
    assert bench.captured() == []


def test_what_is_out_of_range_is_refused_before_it_is_shared(bench: Bench) -> None:
    with pytest.raises(ValueError):
        bench.memory.configure(4, 0, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError):
        bench.memory.configure(0, 16, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError):
        bench.memory.configure(0, 0, 0, 0, 0, 0, 0, 0, 3)
    with pytest.raises(ValueError):
        bench.memory.set_filter(16, b"x", RET_ALL)
    with pytest.raises(ValueError):
        bench.memory.set_filter(0, b"x" * 1025, RET_ALL)
    with pytest.raises(ValueError):
        bench.memory.set_filter(0, b"x", RET_ALL * (FILTER_INSTRUCTIONS + 1))
    assert bench.memory.settings == (0,) * 9


def test_memory_of_another_run_is_none(bench: Bench) -> None:
    with pytest.raises(ValueError, match="another run"):
        PortMemory(bench.fd, GENERATION + 1)
    with pytest.raises(ValueError, match="power of two"):
        allocate(100_000, GENERATION, "x")


def test_a_reader_is_told_where_what_it_gets_begins(bench: Bench) -> None:
    bench.set()
    bench.start()
    bench.show_numbered(3000)
    figures = bench.memory.figures()
    begins, data = bench.memory.read(0, 1000)
    assert begins == figures["tail"] and len(data) == 1000
    assert bench.memory.read(figures["head"], 1000) == (figures["head"], b"")
    assert bench.memory.read(figures["head"] + 8, 10)[0] == figures["tail"]


@given(head=st.integers(0, (1 << 64) - 1), tail=st.integers(0, (1 << 64) - 1), packets=st.integers(0, (1 << 64) - 1))
@settings(max_examples=100, deadline=None)
def test_damaged_positions_lead_nobody_out_of_the_memory(head: int, tail: int, packets: int) -> None:
    bench = Bench()
    try:
        bench.set()
        bench.start()
        bench.show_numbered(2000)
        with mmap.mmap(bench.fd, 4096) as shared:
            shared[HEAD_OFFSET : HEAD_OFFSET + 24] = struct.pack("=QQQ", head, tail, packets)
        with contextlib.suppress(ValueError):  # it says that they are damaged
            bench.memory.read(tail, 1 << 20)
        bench.show_numbered(2000)
        bench.stop()
        bench.start()
        bench.shown = 0
        bench.show_numbered(10)
        bench.stop()
        assert bench.memory.figures()["packets"] <= 10
    finally:
        os.close(bench.fd)


def program(expression: str) -> bytes:
    return bpf.compile_offline(1, expression).instructions


def verdicts(gate: Gate, count: int) -> list[int]:
    return [n for n in range(count) if gate.lets_pass(struct.pack("!I", n).ljust(60, b"\0"))]


def test_a_gate_opens_and_closes_with_the_packets_that_meet_its_criteria() -> None:
    opens, closes = program("ether[3] = 10 or ether[3] = 50"), program("ether[3] = 20 or ether[3] = 60")
    assert verdicts(Gate(1, START.FILTER, opens, STOP.FILTER, closes, KEEP.ALL, b""), 100) == [
        *range(10, 21),
        *range(50, 61),
    ]
    once = Gate(1, START.FILTER, opens, STOP.FILTER, closes, KEEP.ALL, b"", repeats=False)
    assert verdicts(once, 100) == list(range(10, 21))
    assert once.state == 2


def test_a_gate_that_is_open_from_the_beginning_closes_for_good() -> None:
    gate = Gate(1, START.ON, b"", STOP.FILTER, program("ether[3] = 20"), KEEP.FILTER, program("ether[3] & 1 = 0"))
    assert verdicts(gate, 100) == list(range(0, 21, 2))
    assert gate.state == 2


def test_a_gate_that_nothing_closes_keeps_a_kind() -> None:
    assert verdicts(Gate(1, START.ON, b"", STOP.USERSTOP, b"", KEEP.TPLD, b"", stream=7), 5) == []
    assert verdicts(Gate(1, START.ON, b"", STOP.USERSTOP, b"", KEEP.NOTPLD, b""), 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rules", [(4, 4, 0), (0, 0, 0), (0, 5, 0), (0, 4, 6)])
def test_a_gate_by_no_such_criterion_is_refused(rules: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError):
        Gate(1, rules[0], b"", rules[1], b"", rules[2], b"")
