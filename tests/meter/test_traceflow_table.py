"""The table of flow traces against a plain model of its rules, on random packets."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings, strategies as st

from appliance.meter import traceflow_table as table
from appliance.meter.traceflow_formats import Description

FIN, SYN, RST, ACK = 1, 2, 4, 16
IDLE_NS, LINGER_NS = 100, 30


@dataclass
class ModelFlow:
    key: tuple[object, ...]
    frames: list[int] = field(default_factory=list)
    last_ns: int = 0
    first_sequence: dict[bool, int] = field(default_factory=dict)
    fin: set[bool] = field(default_factory=set)
    closed: bool = False
    used: int = 0  # when it had its last packet, in packets


class Model:
    """The rules as traceflow_table.pyi has them, with dictionaries and no haste."""

    def __init__(self, bidirectional: bool, max_flows: int) -> None:
        self.bidirectional, self.max_flows = bidirectional, max_flows
        self.flows: list[ModelFlow] = []
        self.over: list[tuple[tuple[int, ...], int]] = []
        self.now_ns = 0

    def end(self, flow: ModelFlow, reason: int) -> None:
        self.flows.remove(flow)
        self.over.append((tuple(flow.frames), reason))

    def packet(self, number: int, ends: tuple[int, int], time_ns: int, flags: int, sequence: int) -> None:
        back = self.bidirectional and ends[0] > ends[1]
        key = tuple(sorted(ends)) if self.bidirectional else ends
        self.now_ns = max(self.now_ns, time_ns)
        for closed, limit_ns, reason in ((True, LINGER_NS, table.CLOSED), (False, IDLE_NS, table.IDLE)):
            listed = sorted((f for f in self.flows if f.closed == closed), key=lambda f: f.used)
            for flow in listed:  # in the order of the last packet; the first that stays keeps the rest
                if self.now_ns - flow.last_ns <= limit_ns:
                    break
                self.end(flow, reason)
        found = next((f for f in self.flows if f.key == key), None)
        if found is not None and flags & SYN:
            anew = found.first_sequence[back] != sequence if back in found.first_sequence else found.closed
            if anew:
                self.end(found, table.CLOSED if found.closed else table.REUSED)
                found = None
        if found is None:
            if len(self.flows) >= self.max_flows:
                oldest = min(self.flows, key=lambda f: (not f.closed, f.used))
                self.end(oldest, table.CLOSED if oldest.closed else table.EVICTED)
            found = ModelFlow(key, last_ns=time_ns)
            self.flows.append(found)
        found.frames.append(number)
        found.last_ns = max(found.last_ns, time_ns)
        found.used = number
        if not flags & RST:
            found.first_sequence.setdefault(back, sequence if flags & SYN else (sequence - 1) % 2**32)
        if flags & FIN:
            found.fin.add(back)
        if flags & RST or len(found.fin) == 2 or (flags & FIN and not self.bidirectional):
            found.closed = True


PACKETS = st.lists(
    st.tuples(
        st.tuples(st.integers(1, 4), st.integers(1, 4)),
        st.integers(0, 40),
        st.sampled_from([SYN, SYN, ACK, ACK, ACK, FIN | ACK, RST]),
        st.integers(0, 3),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(PACKETS, st.booleans(), st.sampled_from([2, 5, 100]))
def test_every_packet_is_in_the_flow_that_the_rules_say(
    packets: list[tuple[tuple[int, int], int, int, int]], bidirectional: bool, max_flows: int
) -> None:
    ended: list[tuple[tuple[int, ...], int]] = []

    def note(slot: int, flow: Description, reason: int) -> None:
        ended.append((flow.frames, reason))

    flows = table.FlowFiles(
        write=lambda *_: None,
        ended=note,
        content=table.NONE,
        bidirectional=bidirectional,
        idle_timeout_ns=IDLE_NS,
        linger_ns=LINGER_NS,
        max_flows=max_flows,
        keep_frames=True,
    )
    model = Model(bidirectional, max_flows)
    time_ns = 0
    for number, (ends, pause_ns, flags, sequence) in enumerate(packets, 1):
        time_ns += pause_ns
        address = [bytes([10, 0, 0, end]) for end in ends]
        flows.observe(*address, 80, 80, time_ns, flags, sequence, number, 60, 1)
        model.packet(number, ends, time_ns, flags, sequence)
        assert flows.flow_count == len(model.flows) <= max_flows
    assert ended == model.over
    left = [tuple(flow.frames) for flow in model.flows]
    flows.finish_all()
    assert [frames for frames, _ in ended[len(model.over) :]] == sorted(left)
    assert sorted(number for frames, _ in ended for number in frames) == list(range(1, len(packets) + 1))


def test_many_flows_are_found_again_after_the_table_has_grown() -> None:
    ended: list[Description] = []
    flows = table.FlowFiles(
        write=lambda *_: None, ended=lambda _slot, flow, _reason: ended.append(flow), content=table.NONE
    )
    for _ in range(2):
        for i in range(20_000):
            flows.observe(i.to_bytes(4, "big"), bytes(4), 1, 2, 5, ACK, 1, 1, 60, 1)
    assert (flows.flow_count, flows.total_flows) == (20_000, 20_000)
    flows.finish_all()
    assert [flow.packets for flow in ended] == [2] * 20_000
    assert [flow.source for flow in ended] == [i.to_bytes(4, "big") for i in range(20_000)]


def test_addresses_of_two_versions_are_no_packet() -> None:
    flows = table.FlowFiles(write=lambda *_: None, ended=lambda *_: None, content=table.NONE)
    with pytest.raises(ValueError, match="not both IPv4 or both IPv6"):
        flows.observe(bytes(4), bytes(16), 1, 2, 0, 0, None, 1, 60, 1)


def test_time_without_packets_ends_flows_and_a_clock_that_was_set_ends_all() -> None:
    ended: list[tuple[int, int]] = []
    flows = table.FlowFiles(
        write=lambda *_: None,
        ended=lambda _slot, flow, reason: ended.append((flow.serial, reason)),
        content=table.NONE,
        idle_timeout_ns=IDLE_NS,
        linger_ns=LINGER_NS,
    )

    def packet(port: int, time_ns: int, flags: int = ACK) -> None:
        flows.observe(bytes(4), bytes(4), port, 80, time_ns, flags, 1, 1, 60, 1)

    packet(1, 1000)
    packet(2, 1000, FIN)
    assert flows.held_packets == 2
    flows.advance(1000 + LINGER_NS)
    assert ended == []
    flows.advance(1001 + LINGER_NS)
    assert ended == [(2, table.CLOSED)]
    flows.advance(1001 + IDLE_NS)
    flows.advance(5)  # time does not go back by itself
    assert ended == [(2, table.CLOSED), (1, table.IDLE)]
    packet(3, 2000)
    flows.begin_anew()
    assert ended[2:] == [(3, table.END)]
    assert (flows.held_packets, flows.flow_count) == (0, 0)
    packet(4, 50)
    packet(4, 60)
    assert (flows.flow_count, flows.held_packets) == (1, 2)
