"""Later fragments get the ports of the first, in a bounded table; nothing that comes makes it lose a packet."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from capture.crafted import A4, B4, C4, D4, ETHERNET, RAW, ethernet, ipv4, ipv6, packet_record, tag
from meter.flow_packets import SECOND, START, feed, flush, make_table

from appliance.capture import headers
from appliance.meter.fragments import FragmentTable
from appliance.meter.table import FlowTable

TIMEOUT = 30 * SECOND
UDP, TCP, ICMP = 17, 6, 1
MORE = 0x2000

Timed = tuple[int, bytes]  # ns after START, IP packet


def udp_part(source_port: int = 4000, destination_port: int = 53, octets: int = 16) -> bytes:
    """The first `octets` of a datagram that has many more."""
    return struct.pack(">HHHH", source_port, destination_port, 4000, 0) + b"u" * (octets - 8)


def fragment(part: bytes, offset: int, more: bool, identification: int = 7, **more_fields: Any) -> bytes:
    """An IPv4 fragment; `offset` in octets."""
    packet = bytearray(ipv4(UDP, part, fragment=offset // 8 | (MORE if more else 0), **more_fields))
    struct.pack_into(">H", packet, 4, identification)
    return bytes(packet)


def fragment6(part: bytes, offset: int, more: bool, next_header: int = UDP, identification: int = 7) -> bytes:
    return ipv6(44, struct.pack(">BBHI", next_header, 0, offset | more, identification) + part)


def table(*, max_datagrams: int = 1024, **settings: Any) -> FlowTable:
    return make_table(fragments=FragmentTable(max_datagrams=max_datagrams, timeout_ns=TIMEOUT), **settings)


def meter(flows: FlowTable, packets: list[Timed]) -> list[dict[str, Any]]:
    records = b"".join(packet_record(packet, timestamp_ns=START + after) for after, packet in packets)
    digests, ignored = headers.digests(records, [RAW])
    assert not any(ignored.values())
    return feed(flows, digests) + flush(flows)


def ports_and_packets(rows: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    return sorted((row["source_port"], row["destination_port"], row["forward"]["packets"]) for row in rows)


def fragment_counters(flows: FlowTable) -> tuple[int, int, int, int]:
    counters = flows.counters()
    names = ("fragments_keyed", "fragments_unmatched", "fragments_overlapping", "fragment_evictions")
    return tuple(counters[name] for name in names)  # type: ignore[return-value]


IN_ORDER = [(0, fragment(udp_part(), 0, True)), (1, fragment(b"v" * 16, 16, True)), (2, fragment(b"w" * 5, 32, False))]


def test_later_fragments_are_metered_in_the_flow_of_the_first() -> None:
    flows = table()
    (row,) = meter(flows, IN_ORDER)
    assert (row["source_port"], row["destination_port"], row["protocol"]) == (4000, 53, UDP)
    assert (row["forward"]["packets"], row["forward"]["octets"]) == (3, 20 * 3 + 16 + 16 + 5)
    assert fragment_counters(flows) == (2, 0, 0, 0)


def test_without_the_table_later_fragments_are_a_flow_without_ports() -> None:
    flows = make_table()
    assert ports_and_packets(meter(flows, IN_ORDER)) == [(0, 0, 2), (4000, 53, 1)]
    assert "fragments_keyed" not in flows.counters()


def test_whole_datagrams_between_the_fragments_change_nothing() -> None:
    whole = ipv4(UDP, struct.pack(">HHHH", 9, 9, 8, 0), ends=A4 + B4)
    packets = [entry for after, packet in IN_ORDER for entry in ((after, packet), (after, whole))]
    assert ports_and_packets(meter(table(), packets)) == [(9, 9, 3), (4000, 53, 3)]


@pytest.mark.parametrize("next_header", [UDP, 60])
def test_ipv6_fragments_are_known_by_addresses_and_identification_alone(next_header: int) -> None:
    """Behind destination options in the fragmentable part, later fragments do not say what the transport is."""
    options = b"\x11\0\1\4\0\0\0\0" if next_header == 60 else b""
    packets = [
        (0, fragment6(options + udp_part(), 0, True, next_header)),
        (1, fragment6(b"w" * 9, len(options) + 16, False, next_header)),
    ]
    (row,) = meter(table(), packets)
    assert (row["source_port"], row["protocol"], row["forward"]["packets"]) == (4000, UDP, 2)


@pytest.mark.parametrize(
    "other",
    [
        fragment(b"w" * 5, 32, False, identification=8),
        fragment(b"w" * 5, 32, False, ends=C4 + B4),
        fragment(b"w" * 5, 32, False, ends=B4 + A4),
        fragment6(b"w" * 8, 32, False),
    ],
)
def test_fragments_of_another_datagram_do_not_get_these_ports(other: bytes) -> None:
    flows = table()
    rows = meter(flows, [IN_ORDER[0], (1, other)])
    assert ports_and_packets(rows) == [(0, 0, 1), (4000, 53, 1)]
    assert fragment_counters(flows) == (0, 1, 0, 0)


def test_a_later_fragment_of_another_protocol_does_not_get_these_ports() -> None:
    tcp_part = bytearray(fragment(b"t" * 8, 16, False))
    tcp_part[9] = TCP
    assert ports_and_packets(meter(table(), [IN_ORDER[0], (1, bytes(tcp_part))])) == [(0, 0, 1), (4000, 53, 1)]


def test_fragments_in_another_vlan_are_another_datagram_when_vlans_are_in_the_key() -> None:
    frames = [ethernet(0x8100, tag(vlan, 0x0800, packet)) for vlan, (_, packet) in zip((5, 6), IN_ORDER, strict=False)]
    for vlan_in_key, expected in ((True, [(0, 0, 1), (4000, 53, 1)]), (False, [(4000, 53, 2)])):
        flows = table(vlan_in_key=vlan_in_key)
        digests, _ = headers.digests(b"".join(map(packet_record, frames)), [ETHERNET])
        assert ports_and_packets(feed(flows, digests) + flush(flows)) == expected


def test_fragments_of_protocols_without_ports_are_neither_keyed_nor_unmatched() -> None:
    icmp = [bytearray(packet) for _, packet in IN_ORDER]
    for packet in icmp:
        packet[9] = ICMP
    flows = table()
    (row,) = meter(flows, [(i, bytes(packet)) for i, packet in enumerate(icmp)])
    assert row["forward"]["packets"] == 3
    assert fragment_counters(flows) == (0, 0, 0, 0)


def test_a_first_fragment_without_its_ports_gives_none() -> None:
    flows = table()
    cut = fragment(b"\x0f", 0, True)
    assert ports_and_packets(meter(flows, [(0, cut), (1, IN_ORDER[2][1])])) == [(0, 0, 2)]
    assert fragment_counters(flows) == (0, 1, 0, 0)


def test_a_datagram_is_forgotten_a_time_out_after_its_newest_fragment() -> None:
    last = IN_ORDER[2][1]
    for late, expected in ((TIMEOUT - 1, (2, 0)), (TIMEOUT, (1, 1))):
        flows = table(idle_timeout_ns=1000 * SECOND)
        meter(flows, [IN_ORDER[0], (SECOND, IN_ORDER[1][1]), (SECOND + late, last)])
        assert fragment_counters(flows)[:2] == expected


def test_a_last_fragment_that_comes_early_does_not_end_its_datagram() -> None:
    flows = table()
    (row,) = meter(flows, [IN_ORDER[0], (1, IN_ORDER[2][1]), (2, IN_ORDER[1][1])])
    assert row["forward"]["packets"] == 3
    assert fragment_counters(flows) == (2, 0, 1, 0)


def test_overlapping_and_repeated_fragments_are_counted_and_metered() -> None:
    flows = table()
    teardrop = fragment(b"w" * 16, 8, False)  # into the first one
    (row,) = meter(flows, [IN_ORDER[0], (1, IN_ORDER[0][1]), (2, teardrop)])
    assert row["forward"]["packets"] == 3
    assert fragment_counters(flows) == (1, 0, 2, 0)


def test_an_identification_that_is_used_again_means_the_newest_datagram() -> None:
    again = [(after + 10, packet) for after, packet in IN_ORDER]
    again[0] = (10, fragment(udp_part(5000), 0, True))
    flows = table()
    assert ports_and_packets(meter(flows, IN_ORDER + again)) == [(4000, 53, 3), (5000, 53, 3)]
    assert fragment_counters(flows) == (4, 0, 0, 0)


# ---- bounds ----


def test_a_flood_of_first_fragments_is_bounded_counted_and_loses_no_packet() -> None:
    flows = table(max_datagrams=64, max_flows=50_000)
    bytes_before = flows.memory_bytes
    flood = [
        (i, fragment(udp_part(i % 60_000), 0, True, i % 65536, ends=struct.pack(">I", i) + D4)) for i in range(5000)
    ]
    rows = meter(flows, flood)
    assert sum(row["forward"]["packets"] for row in rows) == 5000
    assert fragment_counters(flows) == (0, 0, 0, 5000 - 64)
    assert flows.memory_bytes == bytes_before
    assert FragmentTable(max_datagrams=64, timeout_ns=1).memory_bytes == 64 * 64


def test_ended_datagrams_make_room_first_and_cost_nothing() -> None:
    flows = table(max_datagrams=8)
    held = [(i, fragment(udp_part(100 + i), 0, True, i)) for i in range(4)]
    passing = [
        entry
        for i in range(100, 300)
        for entry in ((i, fragment(udp_part(i), 0, True, i)), (i, fragment(b"w" * 8, 16, False, i)))
    ]
    ends = [(1000, fragment(b"w" * 8, 16, False, i)) for i in range(4)]
    meter(flows, held + passing + ends)
    assert fragment_counters(flows) == (204, 0, 0, 0)


def test_the_silent_datagram_goes_before_the_one_that_goes_on() -> None:
    flows = table(max_datagrams=8)
    held = [(i, fragment(udp_part(100 + i), 0, True, i)) for i in range(8)]
    alive = (10, fragment(b"w" * 8, 16, True, 0))
    newcomer = (11, fragment(udp_part(200), 0, True, 50))
    ends = [(20, fragment(b"w" * 8, 24, False, i)) for i in (0, 1)]
    meter(flows, [*held, alive, newcomer, *ends])
    assert fragment_counters(flows) == (2, 1, 0, 1)


def test_a_row_buffer_that_is_full_counts_no_fragment_twice() -> None:
    packets = [
        (i * SECOND, packet)
        for i in range(200)
        for packet in (fragment(udp_part(i), 0, True, i), fragment(b"w" * 8, 16, False, i))
    ]
    flows = table(row_capacity=1, idle_timeout_ns=3 * SECOND)
    rows = meter(flows, packets)
    assert [row["forward"]["packets"] for row in rows] == [2] * 200
    assert fragment_counters(flows) == (200, 0, 0, 0)


@pytest.mark.parametrize("wrong", [{"max_datagrams": 0}, {"max_datagrams": 1 << 25}, {"timeout_ns": 0}])
def test_sizes_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"max_datagrams|time-out"):
        FragmentTable(**({"max_datagrams": 64, "timeout_ns": 1} | wrong))
