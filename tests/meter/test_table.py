"""The flow table: what is one flow, when it ends and why, and that every packet is accounted for."""

from __future__ import annotations

import itertools
import random
import resource
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from meter.flow_packets import (
    ACK,
    FIN,
    ICMP,
    PSH,
    RST,
    SECOND,
    START,
    SYN,
    TCP,
    UDP,
    Memory,
    Packet,
    advance,
    digests,
    feed,
    flush,
    make_table,
    take_rows,
)

from appliance.meter.table import FLOW_BYTES, ROW_BYTES

IDLE, ACTIVE, END, FORCED, RESOURCES = 1, 2, 3, 4, 5
MILLISECOND = SECOND // 1000


def all_rows(packets: list[Packet], **settings: Any) -> list[dict[str, Any]]:
    table = make_table(**settings)
    return feed(table, digests(packets)) + flush(table)


def at(seconds: float, packet: Packet, **changes: Any) -> Packet:
    return replace(packet, time_ns=START + round(seconds * SECOND), **changes)


# ---- what a flow is ----


def test_both_directions_are_one_flow_and_the_first_packet_gives_the_direction() -> None:
    packet = Packet(octets=60)
    (row,) = all_rows([packet, at(1, packet, **packet.back, octets=500), at(2, packet, octets=40)])
    assert (row["source_address"], row["source_port"]) == (packet.source, 1000)
    assert (row["destination_address"], row["destination_port"]) == (packet.destination, 80)
    assert (row["forward"]["packets"], row["forward"]["octets"]) == (2, 100)
    assert (row["reverse"]["packets"], row["reverse"]["octets"]) == (1, 500)
    assert (row["start_ns"], row["end_ns"]) == (START, START + 2 * SECOND)
    assert (row["reverse"]["first_ns"], row["reverse"]["last_ns"]) == (START + SECOND, START + SECOND)


def test_the_direction_does_not_depend_on_the_order_of_addresses() -> None:
    packet = Packet(source=bytes([200, 0, 0, 1]), destination=bytes([10, 0, 0, 1]), source_port=9, destination_port=10)
    (row,) = all_rows([packet, at(1, packet, **packet.back)])
    assert (row["source_address"], row["source_port"], row["reverse"]["packets"]) == (packet.source, 9, 1)


@pytest.mark.parametrize(
    "other",
    [
        {"source": bytes([10, 0, 0, 3])},
        {"destination": bytes([10, 0, 1, 2])},
        {"source_port": 1001},
        {"destination_port": 81},
        {"protocol": TCP},
        {"source": bytes([10, 0, 0, 1] + [0] * 12), "destination": bytes([10, 0, 0, 2] + [0] * 12)},
        {"source_port": 80, "destination_port": 1000},
    ],
)
def test_a_difference_in_the_key_is_another_flow(other: dict[str, Any]) -> None:
    assert len(all_rows([Packet(), replace(Packet(), **other)])) == 2


def test_vlans_and_interfaces_are_in_the_key_as_told() -> None:
    packets = [Packet(vlan=0x2005, interface=1), Packet(vlan=0x6005, interface=2), Packet(vlan=0x2006, interface=2)]
    assert len(all_rows(packets)) == 2  # priority bits do not matter
    assert len(all_rows(packets, vlan_in_key=False)) == 1
    assert len(all_rows(packets, interface_in_key=True)) == 3
    assert [row["vlan_outer"] for row in all_rows(packets, vlan_in_key=False)] == [0x2005]


def test_a_flow_between_equal_ends_has_one_direction() -> None:
    packet = Packet(destination=bytes([10, 0, 0, 1]), destination_port=1000)
    (row,) = all_rows([packet, at(1, packet)])
    assert (row["forward"]["packets"], row["reverse"]["packets"]) == (2, 0)


def test_extremes_and_unions_are_kept_for_each_direction() -> None:
    packet = Packet(protocol=TCP, flags=SYN, ttl=60, octets=60, tos=8, sequence=77, status=0x190)
    answer = at(1, packet, **packet.back, flags=SYN | ACK, ttl=50, octets=70_000, status=0x1A0)
    (row,) = all_rows([packet, answer, at(2, packet, flags=ACK | PSH, ttl=70, octets=1500, tos=9, sequence=99)])
    forward, reverse = row["forward"], row["reverse"]
    assert (forward["min_ttl"], forward["max_ttl"], forward["min_length"], forward["max_length"]) == (60, 70, 60, 1500)
    assert (forward["tos"], forward["tcp_sequence"], forward["fragment_flags"]) == (8, 77, 0x40)
    assert (forward["tcp_flags"], forward["tcp_initial_flags"], forward["tcp_later_flags"]) == (0x1A, 0x02, 0x18)
    assert (reverse["octets"], reverse["max_length"], reverse["fragment_flags"]) == (70_000, 65535, 0x20)
    assert row["biflow_direction"] == 1


def test_icmp_has_no_ports_and_keeps_type_and_code_of_the_first_packet() -> None:
    packet = Packet(protocol=ICMP, source_port=0, destination_port=0, icmp=(8, 1), status=0x200)
    (row,) = all_rows([packet, at(1, packet, **packet.back, icmp=(0, 0))])
    assert (row["icmp_type_code"], row["reverse"]["packets"]) == (0x0801, 1)


# ---- when it ends ----


def test_a_silent_flow_ends_without_another_packet() -> None:
    table = make_table()
    feed(table, Packet().digest)
    assert advance(table, START + 30 * SECOND - 1) == []
    (row,) = advance(table, START + 30 * SECOND + table.tick_ns)
    assert (row["end_reason"], row["end_ns"], table.active_flows) == (IDLE, START, 0)


def test_a_packet_at_the_idle_time_out_begins_a_new_flow_and_one_before_it_does_not() -> None:
    assert len(all_rows([Packet(), at(30, Packet())])) == 2
    assert len(all_rows([Packet(), replace(Packet(), time_ns=START + 30 * SECOND - 1)])) == 1


def test_an_active_time_out_keeps_direction_and_identity() -> None:
    packet = Packet()
    talk = [at(20 * i, packet, **(packet.back if i % 2 else {})) for i in range(40)]
    # The first packet of the second record goes backwards; the direction stays.
    rows = all_rows(talk)
    assert [row["end_reason"] for row in rows] == [ACTIVE, ACTIVE, FORCED]
    assert {row["flow_id"] for row in rows} == {1}
    assert {row["source_address"] for row in rows} == {packet.source}
    assert [row["forward"]["packets"] + row["reverse"]["packets"] for row in rows] == [15, 15, 10]
    assert rows[1]["start_ns"] == START + 300 * SECOND and rows[1]["reverse"]["first_ns"] == rows[1]["start_ns"]


def test_a_flow_that_falls_silent_after_an_active_time_out_leaves_no_empty_record() -> None:
    table = make_table(active_timeout_ns=20 * SECOND)
    rows = feed(table, digests([Packet(), at(19, Packet())])) + advance(table, START + 100 * SECOND)
    assert [row["end_reason"] for row in rows] == [ACTIVE]
    assert table.active_flows == 0


def handshake_and_end() -> list[Packet]:
    packet = Packet(protocol=TCP, flags=SYN, status=0x180)
    return [
        packet,
        at(0.1, packet, **packet.back, flags=SYN | ACK),
        at(0.2, packet, flags=FIN | ACK),
        at(0.3, packet, **packet.back, flags=FIN | ACK),
        at(0.4, packet, flags=ACK),
    ]


def test_fin_from_both_sides_ends_a_flow_with_its_last_acknowledgement() -> None:
    table = make_table()
    rows = feed(table, digests(handshake_and_end())) + advance(table, START + 2 * SECOND)
    assert [(row["end_reason"], row["forward"]["packets"], row["reverse"]["packets"]) for row in rows] == [(END, 3, 2)]


def test_fin_from_one_side_does_not_end_a_flow() -> None:
    table = make_table()
    feed(table, digests(handshake_and_end()[:3]))
    assert advance(table, START + 20 * SECOND) == []


def test_rst_ends_a_flow() -> None:
    table = make_table()
    packet = Packet(protocol=TCP, flags=SYN, status=0x180)
    feed(table, digests([packet, at(0.1, packet, **packet.back, flags=RST | ACK)]))
    assert [row["end_reason"] for row in advance(table, START + 2 * SECOND)] == [END]


def test_a_syn_on_an_ended_connection_begins_a_new_flow_at_once() -> None:
    packets = [*handshake_and_end(), at(0.5, handshake_and_end()[0])]
    rows = all_rows(packets)
    assert [(row["end_reason"], row["forward"]["packets"]) for row in rows] == [(END, 3), (FORCED, 1)]
    assert len({row["flow_id"] for row in rows}) == 2


def test_flags_of_other_protocols_end_nothing() -> None:
    table = make_table()
    feed(table, Packet(flags=RST | FIN).digest)
    assert advance(table, START + 20 * SECOND) == []


def test_a_flush_ends_everything_with_the_reason_forced() -> None:
    rows = all_rows([Packet(source_port=port) for port in range(100)])
    assert Counter(row["end_reason"] for row in rows) == {FORCED: 100}


# ---- time ----


def test_late_packets_count_and_are_counted() -> None:
    table = make_table()
    feed(table, digests([at(10, Packet()), at(5, Packet()), at(7, Packet())]))
    (row,) = flush(table)
    assert (row["start_ns"], row["end_ns"], row["forward"]["packets"]) == (START + 5 * SECOND, START + 10 * SECOND, 3)
    assert table.counters()["late_packets"] == 2


def test_after_a_step_of_the_clock_a_flow_goes_on() -> None:
    table = make_table()
    feed(table, Packet().digest)
    table.step(-3600 * SECOND)
    assert feed(table, at(-3599, Packet()).digest) == []
    assert table.stream_time_ns == START - 3599 * SECOND
    assert table.active_flows == 1 and table.counters()["late_packets"] == 0
    assert len(advance(table, START - 3500 * SECOND)) == 1


@pytest.mark.parametrize("time_ns", [0, 1, (1 << 62) + 5, (1 << 63), (1 << 64) - 1])
def test_absurd_time_stamps_neither_stall_nor_lose(time_ns: int) -> None:
    packets = [Packet(), Packet(time_ns=time_ns, source_port=2), at(1, Packet()), at(2, Packet(source_port=3))]
    table = make_table()
    rows = feed(table, digests(packets)) + flush(table)
    assert sum(row["forward"]["packets"] for row in rows) == 4


def test_time_begins_anywhere_without_walking_there() -> None:
    table = make_table()
    feed(table, digests([Packet(time_ns=5), Packet(time_ns=1 << 61)]))
    assert table.active_flows == 1


# ---- bounds and accounting ----


def check_identity(table: Any) -> None:
    counters, gauges = table.counters(), table.gauges()
    seen = counters["metered_packets"] + counters["ignored_packets"] + counters["unsampled_packets"]
    assert counters["observed_packets"] == seen
    assert counters["metered_packets"] == counters["exported_packets"] + gauges["active_flow_packets"]
    reasons = ("idle_timeout", "active_timeout", "end_of_flow", "forced_end", "lack_of_resources")
    assert counters["exported_flows"] == sum(counters[f"flows_{reason}"] for reason in reasons)


def test_a_flood_stays_within_the_bound_and_every_packet_is_accounted_for() -> None:
    table = make_table(max_flows=1000)
    rows = 0
    for batch in range(20):
        memory = Memory(
            digests(
                Packet(source=(batch * 1000 + i).to_bytes(4, "big"), time_ns=START + i, octets=40) for i in range(1000)
            )
        )
        done = 0
        while done < memory.length:
            done += table.update(memory.address + done, memory.length - done)
            check_identity(table)
            rows += len(take_rows(table))
    assert table.active_flows == 1000 == table.gauges()["peak_flows"]
    assert table.counters()["flows_lack_of_resources"] == rows == 19_000


def test_single_packets_go_before_conversations_when_the_table_is_full() -> None:
    table = make_table(max_flows=100)
    talk = Packet(protocol=TCP, flags=ACK, status=0x180)
    conversations = [replace(talk, source_port=port) for port in range(20)]
    feed(table, digests(conversations))
    feed(table, digests([replace(p, **p.back) for p in conversations]))
    flood = [Packet(source=i.to_bytes(4, "big"), time_ns=START + i) for i in range(5000)]
    rows = feed(table, digests(flood)) + flush(table)
    reasons = Counter((row["protocol"], row["end_reason"]) for row in rows)
    assert reasons[TCP, FORCED] == 20, "no conversation had to go"
    assert reasons[UDP, RESOURCES] == 5000 - 80


def test_half_open_connections_go_before_answered_ones_and_what_went_is_counted() -> None:
    table = make_table(max_flows=100)
    talk = Packet(protocol=TCP, flags=ACK, status=0x180)
    answered = [replace(talk, source_port=port) for port in range(40)]
    feed(table, digests([*answered, *(replace(p, **p.back) for p in answered)]))
    syn = Packet(protocol=TCP, flags=SYN, status=0x180)
    half_open = [replace(syn, source_port=1000 + i // 2, time_ns=START + i) for i in range(120)]  # each SYN is repeated
    rows = feed(table, digests(half_open))
    flood = [replace(syn, source=(i // 2).to_bytes(4, "big"), time_ns=START + 200 + i) for i in range(4000)]
    rows += feed(table, digests(flood))
    assert {row["destination_port"] for row in rows if row["reverse"]["packets"]} == set(), "no conversation had to go"
    counters = table.counters()
    assert counters["evicted_half_open_flows"] + counters["evicted_single_packet_flows"] == len(rows) == 2000 - 40 + 40
    assert counters["evicted_half_open_flows"] > 1900 and counters["evicted_other_flows"] == 0


def test_an_old_flow_with_one_packet_since_its_last_record_is_no_single_packet() -> None:
    table = make_table(max_flows=10, active_timeout_ns=10 * SECOND)
    old = Packet(source_port=7)
    feed(table, digests([old, at(5, old), at(11, old), *(at(11, Packet(source_port=20 + i)) for i in range(9))]))
    rows = feed(table, digests(at(12, Packet(source=bytes([i, 0, 0, 9]))) for i in range(200)))
    assert len(rows) == 200 and 7 not in {row["source_port"] for row in rows}


def test_the_table_of_a_flood_with_analysis_stays_within_its_bound() -> None:
    table = make_table(max_flows=500, tcp_analysis=True)
    flood = [Packet(protocol=TCP, flags=SYN, status=0x190, source=i.to_bytes(4, "big")) for i in range(5000)]
    feed_quietly(table, digests(flood))
    check_identity(table)
    assert table.memory_bytes == 500 * 512 + 1024 * 3 // 2 * 8 + 4096 * ROW_BYTES + 8193 * 4
    assert table.counters()["evicted_single_packet_flows"] == 4500


# ---- sampling ----


def test_every_nth_packet_is_metered_and_the_others_are_counted() -> None:
    table = make_table(packet_sampling=10, row_capacity=3)
    rows = feed(table, digests(Packet(source_port=i) for i in range(95))) + flush(table)
    assert sorted(row["source_port"] for row in rows) == list(range(0, 95, 10))
    assert table.counters()["unsampled_packets"] == 85
    check_identity(table)


def test_a_flow_is_sampled_with_all_packets_of_both_directions_or_not_at_all() -> None:
    table = make_table(flow_sampling=8, max_flows=5000)
    there = [Packet(source_port=port) for port in range(4000)]
    rows = feed(table, digests([*there, *(replace(p, **p.back) for p in there)])) + flush(table)
    assert 350 < len(rows) < 650  # 500 expected; 7 standard deviations
    assert {(row["forward"]["packets"], row["reverse"]["packets"]) for row in rows} == {(1, 1)}
    assert table.counters()["unsampled_packets"] == 8000 - 2 * len(rows)
    check_identity(table)


def test_what_sampling_passes_over_moves_the_time_all_the_same() -> None:
    table = make_table(packet_sampling=2)
    rows = feed(table, digests([Packet(), at(31, Packet(source_port=5))]))
    assert len(rows) == 1 or len(advance(table, START + 32 * SECOND)) == 1


# ---- the first packets ----


def test_the_first_packets_of_a_flow_are_told_one_by_one_in_its_first_row_alone() -> None:
    table = make_table(packet_sequence=3, active_timeout_ns=10 * SECOND)
    packet = Packet(protocol=TCP, flags=SYN, status=0x180, octets=60)
    talk = [
        packet,
        at(1, packet, **packet.back, flags=SYN | ACK, octets=70_000),
        at(2, packet, flags=ACK),
        at(3, packet),
    ]
    first, second = feed(table, digests([*talk, at(11, packet)])) + flush(table)
    assert first["packet_sequence"] == [
        (START, 60, 1, SYN),
        (START + SECOND, 65535, -1, SYN | ACK),
        (START + 2 * SECOND, 60, 1, ACK),
    ]
    assert second["packet_sequence"] == []


def test_sequences_of_flows_that_leave_together_do_not_mix() -> None:
    table = make_table(packet_sequence=2, max_flows=50, row_capacity=7)
    rows = feed(table, digests(Packet(source_port=i, octets=100 + i) for i in range(500))) + flush(table)
    assert len(rows) == 500
    assert all(row["packet_sequence"] == [(START, 100 + row["source_port"], 1, 0)] for row in rows)


def test_packet_sequences_are_within_the_memory_that_is_told() -> None:
    plain, noting = make_table(max_flows=1000), make_table(max_flows=1000, packet_sequence=20)
    assert noting.memory_bytes - plain.memory_bytes == 16 * 20 * (1000 + 4096)
    with pytest.raises(ValueError, match="packet_sequence"):
        make_table(packet_sequence=21)


# ---- the index under chosen keys ----


def probes_for_each(packets: list[Packet]) -> float:
    table = make_table(max_flows=len(packets))
    feed_quietly(table, digests(packets))
    flows, probes = table.index_probes()
    assert flows == len(packets)
    return probes / flows


def colliding_elsewhere(count: int) -> list[Packet]:
    """Keys whose hashes end in the same 6 bits in another table: what somebody could choose who knew its secrets."""
    other, rng, found = make_table(), random.Random(5), []
    while len(found) < count:
        packet = Packet(source=rng.randbytes(4), source_port=rng.randrange(1 << 16))
        if other.hash_of(Memory(packet.digest).address) & 63 == 0:
            found.append(packet)
    return found


CHOSEN_KEYS = {
    "one network, ascending": lambda n: [Packet(source=(0x0A000000 + i).to_bytes(4, "big")) for i in range(n)],
    "one pair of hosts, all ports": lambda n: [
        Packet(source_port=i % 256, destination_port=i // 256) for i in range(n)
    ],
    "steps of 2^16": lambda n: [Packet(source=(i << 16 & 0xFFFFFFFF | i >> 16).to_bytes(4, "big")) for i in range(n)],
    "the same sum of both ports": lambda n: [Packet(source_port=i, destination_port=60_000 - i) for i in range(n)],
    "the same exclusive or of both hosts": lambda n: [
        Packet(source=i.to_bytes(4, "big"), destination=(i ^ 0x5A5A5A5A).to_bytes(4, "big")) for i in range(n)
    ],
    "equal hashes in another table": colliding_elsewhere,
}


@pytest.mark.parametrize("name", CHOSEN_KEYS)
def test_chosen_keys_cost_no_more_than_three_times_the_probes_of_random_ones(name: str) -> None:
    count = 3000
    rng = random.Random(3)
    at_random = probes_for_each(
        [Packet(source=rng.randbytes(4), source_port=rng.randrange(65536)) for _ in range(count)]
    )
    assert at_random < 2  # half full at most: about 1.5 by theory (Knuth, 6.4)
    assert probes_for_each(CHOSEN_KEYS[name](count)) <= 3 * at_random


# ---- how late ----


def test_the_time_from_a_flows_end_to_its_record_is_counted() -> None:
    table = make_table(active_timeout_ns=100 * SECOND)
    feed(table, Packet().digest)
    while not table.advance(START + 60 * SECOND):
        pass
    assert table.row_count == 1 and table.rows()[0]["due_ns"] == START + 30 * SECOND
    table.count_delays(START + 30 * SECOND + 60 * MILLISECOND)
    counters = table.counters()
    assert (counters["export_delay_250_ms"], counters["export_delay_ns"]) == (1, 60 * MILLISECOND)


def test_a_flow_that_was_ended_before_its_time_has_no_delay() -> None:
    table = make_table()
    feed(table, Packet().digest)
    assert table.flush() and table.rows()[0]["due_ns"] == 0
    table.count_delays(START + 99 * SECOND)
    assert table.counters()["export_delay_ns"] == 0


def test_after_a_step_of_the_clock_a_delay_is_told_by_the_new_time() -> None:
    table = make_table()
    feed(table, Packet().digest)
    table.step(1000 * SECOND)
    assert table.advance(START + 1030 * SECOND + table.tick_ns)
    assert table.rows()[0]["due_ns"] == START + 1030 * SECOND


def test_memory_stays_below_the_bound_under_five_times_as_many_flows() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    table = make_table(max_flows=20_000)
    rng = random.Random(1)
    for _ in range(10):
        feed_quietly(table, digests(Packet(source=rng.randbytes(4)) for _ in range(10_000)))
    assert table.memory_bytes < 20_000 * (FLOW_BYTES + 48) + 4096 * ROW_BYTES + (1 << 17)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert grown < table.memory_bytes + (24 << 20)  # the packets of one batch, made by the test


@pytest.mark.parametrize("max_flows", [10_000, 100_000])
def test_flows_are_found_again_while_the_index_grows(max_flows: int) -> None:
    table = make_table(max_flows=max_flows)
    for _ in range(2):  # the second round finds the index grown, and empty
        packets = [Packet(source=i.to_bytes(4, "big")) for i in range(10_000)]
        for first in range(0, 10_000, 500):  # each new flow, then one packet more for all before it
            feed_quietly(table, digests(packets[first : first + 500]))
            feed_quietly(table, digests(packets[:first:50]))
        assert table.active_flows == 10_000
        rows = flush(table)
        expected = [1 + (19 - i // 500 if i % 50 == 0 else 0) for i in range(10_000)]
        found = {int.from_bytes(row["source_address"], "big"): row["forward"]["packets"] for row in rows}
        assert [found[i] for i in range(10_000)] == expected


def feed_quietly(table: Any, records: bytes) -> None:
    memory = Memory(records)
    done = 0
    while done < memory.length:
        done += table.update(memory.address + done, memory.length - done)
        table.clear_rows()


def test_a_full_row_buffer_stops_the_update_and_loses_nothing() -> None:
    table = make_table(row_capacity=7)
    memory = Memory(
        digests(
            [Packet(source_port=port) for port in range(100)]
            + [at(60, Packet(source_port=port)) for port in range(100)]
        )
    )
    rows, done, stops = [], 0, 0
    while done < memory.length:
        consumed = table.update(memory.address + done, memory.length - done)
        done += consumed
        stops += done < memory.length
        check_identity(table)
        rows += take_rows(table)
    rows += flush(table)
    assert stops > 10
    assert sorted(row["source_port"] for row in rows) == sorted([*range(100), *range(100)])


def test_other_records_are_passed_over_and_unknown_digests_counted() -> None:
    other = (0x80000C07).to_bytes(4, "little") + (24).to_bytes(4, "little") + bytes(16)
    table = make_table()
    rows = feed(table, other + Packet().digest + other + Packet(version=9).digest + Packet().digest + other)
    counters = table.counters()
    assert rows == []
    assert (counters["observed_packets"], counters["metered_packets"], counters["ignored_packets"]) == (3, 2, 1)


@pytest.mark.parametrize("length", [0, 8, 20, 127, 130, 4096, 0xFFFFFFFC])
def test_a_damaged_record_is_named_and_what_stands_before_it_is_metered(length: int) -> None:
    bad = bytearray(Packet().digest)
    bad[4:8] = length.to_bytes(4, "little")
    memory = Memory(digests([Packet()] * 50) + bytes(bad))
    table = make_table()
    with pytest.raises(ValueError, match=f"offset {50 * 128}"):
        table.update(memory.address, memory.length)
    assert table.counters()["metered_packets"] == 50


@given(st.lists(st.binary(min_size=96, max_size=96), max_size=60))
@settings(max_examples=100, deadline=None)
def test_digests_of_any_content_are_metered_within_bounds(contents: list[bytes]) -> None:
    head, version = Packet().digest[:8], b"\1"
    records = b"".join(head + content[:12] + version + content[12:] + bytes(23) for content in contents)
    table = make_table(max_flows=16, row_capacity=5)
    rows = feed(table, records) + flush(table)
    check_identity(table)
    assert sum(row["forward"]["packets"] + row["reverse"]["packets"] for row in rows) == len(contents)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_flows": 0},
        {"max_flows": 1 << 28},
        {"row_capacity": 0},
        {"idle_timeout_ns": 0},
        {"active_timeout_ns": 0},
        {"packet_sampling": 0},
        {"flow_sampling": 0},
    ],
)
def test_sizes_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        make_table(**wrong)


# ---- against a model ----


@dataclass
class ModelFlow:
    flow_id: int
    source: tuple[bytes, int]
    last: int
    start: int
    closed: bool = False
    counts: dict[str, list[int]] = field(default_factory=lambda: {"forward": [0, 0, 0], "reverse": [0, 0, 0]})

    @property
    def packets(self) -> int:
        return self.counts["forward"][0] + self.counts["reverse"][0]


class Model:
    """The table as a plain dictionary that looks at every flow before every packet. Flags live in counts[2]."""

    def __init__(self, idle: int, active: int, linger: int) -> None:
        self.idle, self.active, self.linger = idle, active, linger
        self.flows: dict[tuple[Any, ...], ModelFlow] = {}
        self.rows: list[tuple[Any, ...]] = []
        self.next_id = 1

    def emit(self, flow: ModelFlow, reason: int) -> None:
        if flow.packets:
            self.rows.append((flow.flow_id, flow.source, tuple(map(tuple, flow.counts.values())), reason))

    def expire(self, now: int) -> None:
        for key, flow in list(self.flows.items()):
            while True:
                silent = flow.last + (self.linger if flow.closed else self.idle)
                splits = flow.packets and flow.start + self.active < silent
                if (flow.start + self.active if splits else silent) > now:
                    break
                if splits:
                    self.emit(flow, ACTIVE)
                    flow.counts = {"forward": [0, 0, 0], "reverse": [0, 0, 0]}
                    continue
                self.emit(flow, END if flow.closed else IDLE)
                del self.flows[key]
                break

    def packet(self, p: Packet) -> None:
        self.expire(p.time_ns)
        ends = ((p.source, p.source_port), (p.destination, p.destination_port))
        key = (frozenset(ends), p.protocol)
        flow = self.flows.get(key)
        if flow and flow.closed and p.flags & (SYN | ACK) == SYN:
            self.emit(flow, END)
            flow = None
        if flow is None:
            flow = self.flows[key] = ModelFlow(self.next_id, ends[0], p.time_ns, p.time_ns)
            self.next_id += 1
        if not flow.packets:
            flow.start = p.time_ns
        count = flow.counts["forward" if ends[0] == flow.source else "reverse"]
        count[0] += 1
        count[1] += p.octets
        count[2] |= p.flags
        flow.last = p.time_ns
        if p.protocol == TCP:
            both = flow.counts["forward"][2] & flow.counts["reverse"][2] & FIN
            flow.closed = flow.closed or bool(p.flags & RST or (p.flags & FIN and both))

    def finish(self) -> list[tuple[Any, ...]]:
        for flow in self.flows.values():
            self.emit(flow, END if flow.closed else FORCED)
        return sorted(self.rows)


def as_model(row: dict[str, Any]) -> tuple[Any, ...]:
    counts = tuple((row[d]["packets"], row[d]["octets"], row[d]["tcp_flags"]) for d in ("forward", "reverse"))
    return row["flow_id"], (row["source_address"], row["source_port"]), counts, row["end_reason"]


packet_shapes = st.tuples(
    st.integers(0, 40),  # time since the packet before, in units
    st.sampled_from([b"\x0a\0\0\1", b"\x0a\0\0\2", b"\xc8\0\0\1"]),
    st.sampled_from([b"\x0a\0\0\1", b"\x0a\0\0\2"]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([TCP, UDP]),
    st.sampled_from([0, ACK, SYN, SYN | ACK, FIN | ACK, RST]),
)


@pytest.mark.parametrize("unit_ns", [1, MILLISECOND, SECOND])
@given(
    shapes=st.lists(packet_shapes, max_size=80), cuts=st.lists(st.integers(0, 80), max_size=6), watermarks=st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_the_table_agrees_with_a_dictionary(
    unit_ns: int, shapes: list[tuple[Any, ...]], cuts: list[int], watermarks: bool
) -> None:
    """Whatever the batches, and whether watermarks come in between or not. Units of 1 ns are far below the wheel's
    tick, those of a second far above it."""
    now, packets = START, []
    for gap, source, destination, source_port, destination_port, protocol, flags in shapes:
        now += gap * unit_ns
        flags = flags if protocol == TCP else 0
        packets.append(Packet(now, source, destination, source_port, destination_port, protocol, flags=flags))
    model = Model(idle=30 * unit_ns, active=100 * unit_ns, linger=5 * unit_ns)
    for packet in packets:
        model.packet(packet)
    table = make_table(
        idle_timeout_ns=30 * unit_ns, active_timeout_ns=100 * unit_ns, tcp_linger_ns=5 * unit_ns, row_capacity=3
    )
    rows: list[dict[str, Any]] = []
    borders = [0, *sorted(min(cut, len(packets)) for cut in cuts), len(packets)]
    for begin, end in itertools.pairwise(borders):
        rows += feed(table, digests(packets[begin:end]))
        if watermarks and end:
            rows += advance(table, packets[end - 1].time_ns)
        check_identity(table)
    rows += flush(table)
    check_identity(table)
    assert sorted(map(as_model, rows)) == model.finish()


@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=600), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_a_small_table_never_loses_a_packet_or_a_flow(
    keys: list[tuple[int, bool]], max_flows: int, row_capacity: int
) -> None:
    table = make_table(max_flows=max_flows, row_capacity=row_capacity)
    packets = []
    for i, (port, back) in enumerate(keys):
        packet = Packet(time_ns=START + i * MILLISECOND, source_port=port)
        packets.append(replace(packet, **packet.back) if back else packet)
    rows = feed(table, digests(packets))
    assert table.active_flows <= max_flows
    check_identity(table)
    rows += flush(table)
    check_identity(table)
    assert sum(row["forward"]["packets"] + row["reverse"]["packets"] for row in rows) == len(packets)
    per_port = Counter(port for port, _ in keys)
    seen: Counter[int] = Counter()
    for row in rows:
        port = row["source_port"] if row["source_address"] == Packet().source else row["destination_port"]
        seen[port] += row["forward"]["packets"] + row["reverse"]["packets"]
    assert seen == per_port


@pytest.mark.parametrize(("source", "field"), [(bytes([10, 0, 0, 1]), 0), (bytes(15) + b"\1", 40)])
def test_a_length_field_of_zero_counts_as_it_stands_or_as_the_frame_held(source: bytes, field: int) -> None:
    """BIG TCP: the digest has what the frame held, and says that the field is 0."""
    offloaded = Packet(source=source, destination=source[:-1] + b"\2", octets=80_000, status=0x80 | 0x400)
    for frame_octets, expected in ((False, field), (True, 80_000)):
        table = make_table(frame_octets=frame_octets)
        feed(table, offloaded.digest)
        (row,) = flush(table)
        assert row["forward"]["octets"] == table.counters()["metered_octets"] == expected
        assert row["forward"]["max_length"] == min(expected, 65535)
