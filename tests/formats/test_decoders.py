"""The decoders against files made by hand: every format variant, every cut, every damaged byte, every way of feeding.

All input and output lies directly before pages that nobody may touch.
"""

from __future__ import annotations

import struct
from fractions import Fraction

import pytest
from formats.craft import (
    END_OF_OPTIONS,
    Packet,
    Walled,
    block,
    decode,
    enhanced,
    interface,
    option_list,
    packet_options,
    pcap_file,
    section,
)
from hypothesis import given, strategies as st

from appliance.formats.decoder import STATUS_NOT_YET, STATUS_OUTPUT_FULL
from appliance.formats.encode import InterfaceDescription
from appliance.formats.pcap import PcapDecoder

ORDERS = ("<", ">")
TIMESTAMP_MAX_NS = 2**63 - 2
S = 10**9

PACKETS = st.lists(
    st.builds(
        Packet,
        timestamp_ns=st.integers(0, (2**32 - 1) * S),
        data=st.binary(max_size=90),
        original=st.just(-1) | st.integers(100, 2**32 - 1),
    ),
    max_size=12,
)
SEED_PACKETS = [Packet(S + 1000, b""), Packet(2 * S, b"abcde"), Packet(3 * S, b"x" * 60, 1500), Packet(3 * S, b"1234")]


def in_microseconds(packet: Packet) -> Packet:
    return Packet(packet.timestamp_ns // 1000 * 1000, packet.data, packet.original, packet.interface)


def pcapng_seed(order: str) -> bytes:
    """A small file with everything in it: two interfaces, options, all packet blocks, blocks to pass over."""
    flags = struct.pack(order + "I", 1)
    return b"".join((
        section(order, options=[(4, b"by hand"), END_OF_OPTIONS]),
        interface(order, options=[(2, b"eth0"), (9, b"\x09"), END_OF_OPTIONS]),
        interface(order, 113),
        enhanced(Packet(5 * S, b"abcdefg"), order, 1, [(1, b"note"), (2, flags), END_OF_OPTIONS]),
        block(order, 4, bytes(20)),
        enhanced(Packet(6 * S, b"cooked", 99, 1), order),
        block(order, 3, struct.pack(order + "I", 5) + b"simpl"),
        block(order, 2, struct.pack(order + "HHIIII", 1, 7, 0, 7_000_000, 3, 3) + b"old\0"),
        block(order, 0x40000BAD, b"private"),
        block(order, 5, struct.pack(order + "III", 0, 0, 0)),
    ))  # fmt: skip


@given(PACKETS, st.sampled_from(ORDERS))
def test_a_nanosecond_pcap_comes_back_packet_by_packet(packets: list[Packet], order: str) -> None:
    result = decode(pcap_file(packets, order=order))
    assert result.whole
    assert result.packets == packets


@given(PACKETS, st.sampled_from(ORDERS))
def test_a_microsecond_pcap_comes_back_and_says_what_its_times_were(packets: list[Packet], order: str) -> None:
    result = decode(pcap_file(packets, order=order, nanoseconds=False, network=113, snaplen=90))
    assert result.packets == [in_microseconds(packet) for packet in packets]
    assert InterfaceDescription.parse(result.records[0]) == InterfaceDescription(113, 90, source_tsresol=6)


@given(PACKETS, st.sampled_from(ORDERS), st.integers(1, 200), st.integers(40, 300))
def test_the_way_a_file_is_fed_makes_no_difference(packets: list[Packet], order: str, piece: int, room: int) -> None:
    data = pcap_file(packets, order=order)
    assert decode(data, piece_bytes=piece, room=room).records == decode(data).records


@given(st.sampled_from(ORDERS), st.integers(1, 150), st.integers(40, 300))
def test_the_way_a_pcapng_file_is_fed_makes_no_difference(order: str, piece: int, room: int) -> None:
    data = pcapng_seed(order) + pcapng_seed("<")
    pieces = decode(data, piece_bytes=piece, room=room)
    assert pieces.whole
    assert pieces.records == decode(data).records


@given(st.lists(st.tuples(PACKETS, st.sampled_from(ORDERS)), min_size=1, max_size=4))
def test_sections_in_any_byte_order_follow_each_other_with_running_interface_numbers(
    sections: list[tuple[list[Packet], str]],
) -> None:
    data = b""
    expected = []
    for number, (packets, order) in enumerate(sections):
        data += section(order) + interface(order, options=[(2, b"eth%d" % number), (9, b"\x09"), END_OF_OPTIONS])
        for packet in packets:
            data += enhanced(packet, order, tick_ns=1)
            expected.append(Packet(packet.timestamp_ns, packet.data, packet.original, number))
    result = decode(data)
    assert result.whole
    assert result.packets == expected
    assert [known.name for known in result.decoder.interfaces] == [f"eth{i}" for i in range(len(sections))]
    assert result.decoder.interface_packets == [len(packets) for packets, _ in sections]


def test_an_interface_is_announced_before_its_first_packet() -> None:
    data = section() + interface() + enhanced(Packet(S, b"a")) + interface() + enhanced(Packet(S, b"b", -1, 1))
    assert [record[0] for record in decode(data).records] == [1, 6, 1, 6]


def test_everything_in_a_pcapng_file_is_read_in_both_byte_orders() -> None:
    expected = [
        Packet(5 * S, b"abcdefg"),
        Packet(6 * S, b"cooked", 99, 1),
        Packet(0, b"simpl"),
        Packet(7 * S, b"old", -1, 1),
    ]
    for order in ORDERS:
        result = decode(pcapng_seed(order))
        assert result.whole
        assert result.packets == expected
        assert result.decoder.untimed_packets == 1
        assert (result.decoder.first_ns, result.decoder.last_ns) == (5 * S, 7 * S)
        assert result.decoder.in_order
        assert result.decoder.bytes == 7 + 99 + 5 + 3
        assert result.decoder.captured_bytes == 7 + 6 + 5 + 3


@pytest.mark.parametrize("data", [
    pcap_file(SEED_PACKETS),
    pcap_file(SEED_PACKETS, order=">", nanoseconds=False),
    pcapng_seed("<"),
    pcapng_seed(">"),
], ids=["pcap", "pcap-big-endian", "pcapng", "pcapng-big-endian"])  # fmt: skip
def test_a_file_cut_anywhere_yields_exactly_its_whole_records(data: bytes) -> None:
    complete = decode(data)
    # Where each record is whole: feed byte by byte and look when it comes.
    ends = [decode(data[:length]).decoder.whole_offset for length in range(len(data) + 1)]
    assert ends[-1] == len(data)
    for length in range(len(data)):
        result = decode(data[:length])
        assert result.records == complete.records[: len(result.records)]
        assert result.whole == (ends[length] == length and length > 0)
        assert result.decoder.whole_offset == max(end for end in ends if end <= length)
        assert decode(data[: ends[length]] or b"\0").records == result.records
        if not result.whole:
            assert "end" in result.decoder.damage or "empty" in result.decoder.damage


@pytest.mark.parametrize("order", ORDERS)
def test_a_whole_record_is_never_held_back(order: str) -> None:
    data = pcap_file(SEED_PACKETS, order=order)
    end = 24
    for count, packet in enumerate(SEED_PACKETS, 1):
        end += 16 + len(packet.data)
        assert len(decode(data[:end]).packets) == count
        assert len(decode(data[: end - 1]).packets) == count - 1


@pytest.mark.parametrize("data", [
    pcap_file(SEED_PACKETS), pcap_file(SEED_PACKETS, order=">", version=(2, 2)), pcapng_seed("<"), pcapng_seed(">"),
], ids=["pcap", "pcap-big-endian", "pcapng", "pcapng-big-endian"])  # fmt: skip
def test_no_damaged_byte_leads_out_of_the_memory_or_into_a_broken_record(data: bytes) -> None:
    walls = Walled(len(data)), Walled(1 << 16)
    for offset in range(len(data)):
        for value in (0, 1, 0x7F, 0x80, 0xFF, data[offset] ^ 1, data[offset] ^ 0x20):
            damaged = data[:offset] + bytes((value,)) + data[offset + 1 :]
            # `decode` checks lengths and framing of all that comes out.
            result = decode(damaged, walls=walls)
            assert result.whole == (result.decoder.damage == "")


@given(
    st.binary(max_size=300), st.sampled_from([pcap_file([]), section() + interface(), section(">") + interface(">")])
)
def test_no_garbage_behind_a_header_does_harm(garbage: bytes, head: bytes) -> None:
    result = decode(head + garbage)
    assert sum(map(len, result.records)) < 5000 + 8 * len(garbage)


def test_before_version_2_3_the_original_length_comes_first() -> None:
    head = pcap_file([], version=(2, 2))
    result = decode(head + struct.pack("<IIII", 1, 0, 9, 4) + b"abcd")
    assert result.packets == [Packet(S, b"abcd", 9)]


def test_in_version_2_3_the_smaller_length_is_the_captured_one() -> None:
    head = pcap_file([], version=(2, 3))
    packets = struct.pack("<IIII", 1, 0, 9, 4) + b"abcd" + struct.pack("<IIII", 1, 0, 4, 9) + b"efgh"
    assert decode(head + packets).packets == [Packet(S, b"abcd", 9), Packet(S, b"efgh", 9)]


@pytest.mark.parametrize("order", ORDERS)
def test_the_modified_format_has_eight_more_bytes_before_each_packet(order: str) -> None:
    head = struct.pack(order + "IHHiIII", 0xA1B2CD34, 2, 4, 0, 0, 262144, 1)
    packet = struct.pack(order + "IIIIIHBx", 1, 5, 3, 3, 2, 0x800, 0) + b"abc"
    assert decode(head + packet * 2).packets == [Packet(S + 5000, b"abc")] * 2


@pytest.mark.parametrize(("version", "named"), [((1, 4), "1.4"), ((3, 0), "3.0"), ((2, 5), "2.5")])
def test_other_pcap_versions_are_refused_by_name(version: tuple[int, int], named: str) -> None:
    assert named in decode(pcap_file(SEED_PACKETS, version=version)).decoder.damage


@pytest.mark.parametrize("version", [(1, 1), (2, 0), (0, 0)])
def test_other_pcapng_versions_are_refused_by_name(version: tuple[int, int]) -> None:
    assert f"{version[0]}.{version[1]}" in decode(section(version=version) + interface()).decoder.damage


def test_the_length_of_the_frame_check_sequence_is_told_apart_from_the_link_type() -> None:
    result = decode(pcap_file(SEED_PACKETS, network=0x24000001))
    assert result.whole
    assert (result.decoder.interfaces[0].linktype, result.decoder.interfaces[0].fcs_bits) == (1, 32)


def test_reserved_bits_beside_the_link_type_are_refused() -> None:
    assert "reserved bits" in decode(pcap_file(SEED_PACKETS, network=0x00300001)).decoder.damage


def test_a_captured_length_above_the_original_one_is_taken_as_it_is() -> None:
    assert decode(pcap_file([Packet(S, b"abcdef", 2)])).packets == [Packet(S, b"abcdef", 2)]


@pytest.mark.parametrize("captured", [262145, 2**31, 2**32 - 1])
def test_an_absurd_captured_length_is_damage_and_not_an_allocation(captured: int) -> None:
    result = decode(pcap_file(SEED_PACKETS[:1]) + struct.pack("<IIII", 1, 0, captured, captured) + bytes(100))
    assert len(result.packets) == 1
    assert str(captured) in result.decoder.damage


def test_the_largest_packet_goes_through() -> None:
    packet = Packet(S, bytes(262144))
    assert decode(pcap_file([packet])).packets == [packet]
    assert decode(section() + interface() + enhanced(packet)).packets == [packet]


@pytest.mark.parametrize(("blocks", "reason"), [
    (struct.pack("<II", 6, 8) + bytes(8), "impossible length 8"),
    (struct.pack("<II", 0x99, 15) + bytes(8), "impossible length 15"),
    (struct.pack("<II", 6, 1 << 21) + bytes(64), "impossible length 2097152"),
    (struct.pack("<II", 1, 1 << 30) + bytes(64), "impossible length 1073741824"),
    (struct.pack("<III", 0x99, 16, 0) + struct.pack("<I", 20), "two lengths differ"),
    (enhanced(Packet(S, b"abc"))[:-4] + struct.pack("<I", 99), "two lengths differ"),
    (enhanced(Packet(S, b"abc", -1, 1)), "interface 1"),
    (enhanced(Packet(S, b"abc", -1, 2**32 - 1)), "interface 4294967295"),
    (block("<", 6, struct.pack("<IIIII", 0, 0, 0, 9, 9) + b"12345678"), "9 captured bytes"),
    (block("<", 6, struct.pack("<IIIII", 0, 0, 0, 2**32 - 1, 9) + b"12345678"), "4294967295 captured bytes"),
    (block("<", 6, bytes(16)), "captured bytes"),
    (block("<", 3, struct.pack("<I", 2**32 - 1) + b"1234"), "262144 captured bytes"),
    (block("<", 3, b""), "captured bytes"),
    (interface(options=[(9, b"\6\6")]), "option 9"),
])  # fmt: skip
def test_hostile_lengths_and_numbers_are_refused_with_their_value(blocks: bytes, reason: str) -> None:
    result = decode(section() + interface() + enhanced(Packet(S, b"ok")) + blocks)
    assert result.packets == [Packet(S, b"ok")]
    assert reason in result.decoder.damage
    assert result.decoder.whole_offset == len(section() + interface() + enhanced(Packet(S, b"ok")))


def test_a_packet_before_any_interface_is_refused() -> None:
    assert "interface 0" in decode(section() + enhanced(Packet(S, b"abc"))).decoder.damage
    assert "interface 0" in decode(section() + interface() + section() + enhanced(Packet(S, b"abc"))).decoder.damage


def test_an_option_of_the_section_header_that_leaves_its_block_is_refused() -> None:
    bad = block("<", 0x0A0D0D0A, struct.pack("<IHHqHH", 0x1A2B3C4D, 1, 0, -1, 4, 12336) + b"0000")
    assert "option 4 claims 12336 bytes" in decode(bad).decoder.damage


def test_a_block_to_pass_over_is_never_held_however_long_it_is() -> None:
    data = section() + interface() + block("<", 4, bytes(3 << 20)) + enhanced(Packet(S, b"behind"))
    walls = Walled(70_000), Walled(1 << 16)
    result = decode(data, piece_bytes=65_536, walls=walls)
    assert result.whole
    assert result.packets == [Packet(S, b"behind")]


def test_the_number_of_interfaces_is_bounded() -> None:
    result = decode(section() + interface() * 65537)
    assert result.decoder.interface_count == 65536
    assert "more than 65536 interfaces" in result.decoder.damage


@given(st.integers(0, 255), st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1) | st.integers(-(2**34), 2**34))
def test_times_of_every_resolution_and_offset_become_exact_nanoseconds(tsresol: int, ticks: int, offset_s: int) -> None:
    options = [(9, bytes((tsresol,))), (14, struct.pack("<q", offset_s)), END_OF_OPTIONS]
    body = struct.pack("<IIIII", 0, ticks >> 32, ticks & 0xFFFFFFFF, 0, 0)
    result = decode(section() + interface(options=options) + block("<", 6, body))
    unit_ns = Fraction(S, 2 ** (tsresol & 127) if tsresol & 128 else 10**tsresol)
    expected = int(ticks * unit_ns) + offset_s * S
    assert result.packets[0].timestamp_ns == max(0, min(expected, TIMESTAMP_MAX_NS))
    assert result.decoder.clamped_timestamps == (not 0 <= expected <= TIMESTAMP_MAX_NS)


def test_a_resolution_finer_than_a_nanosecond_is_rounded_down_and_remembered() -> None:
    data = (
        section()
        + interface(options=[(9, b"\x0c"), END_OF_OPTIONS])
        + block("<", 6, struct.pack("<IIIII", 0, *divmod(7_999_999, 2**32), 0, 0))
    )
    result = decode(data)
    assert result.packets[0].timestamp_ns == 7999
    assert InterfaceDescription.parse(result.records[0]).source_tsresol == 12


def test_a_simple_packet_is_cut_at_the_snaplen_of_the_first_interface() -> None:
    data = section() + interface(snaplen=4) + block("<", 3, struct.pack("<I", 100) + b"abcd")
    assert decode(data).packets == [Packet(0, b"abcd", 100)]


@pytest.mark.parametrize("order", ORDERS)
def test_options_travel_with_their_packet_in_host_byte_order(order: str) -> None:
    def listed(into: str) -> list[tuple[int, bytes]]:
        return [
            (1, b"a comment"),
            (2, struct.pack(into + "I", 0x00000102)),
            (3, b"\1hash"),
            (4, struct.pack(into + "Q", 2**40)),
            (6, struct.pack(into + "I", 3)),
            (2988, struct.pack(into + "I", 32473) + b"text"),
        ]

    written = [*listed(order), (19373, struct.pack(order + "I", 32473) + b"not to be copied"), END_OF_OPTIONS]
    result = decode(section(order) + interface(order) + enhanced(Packet(S, b"abcde"), order, options=written))
    assert packet_options(result.records[1]) == option_list("=", [*listed("="), END_OF_OPTIONS])
    assert result.decoder.dropped_options == 0


@pytest.mark.parametrize("listed", [
    option_list("<", [(1, b"fine")]) + struct.pack("<HH", 2, 400),
    option_list("<", [(2, b"\1\2")]),
    option_list("<", [(1, bytes(40_000)), (1, bytes(40_000))]),
], ids=["too-long", "wrong-size", "too-many"])  # fmt: skip
def test_broken_options_are_left_out_and_counted_and_the_packet_stays(listed: bytes) -> None:
    body = struct.pack("<IIIII", 0, 0, 1_000_000, 3, 3) + b"abc\0" + listed
    result = decode(section() + interface() + block("<", 6, body))
    assert result.whole
    assert result.packets == [Packet(S, b"abc")]
    assert packet_options(result.records[1]) == b""
    assert result.decoder.dropped_options == 1


def test_padding_is_always_zero_whatever_the_file_has_there() -> None:
    body = struct.pack("<IIIII", 0, 0, 0, 1, 1) + b"a\xff\xff\xff"
    assert decode(section() + interface() + block("<", 6, body)).records[1][28:32] == b"a\0\0\0"


def test_disorder_is_counted_and_first_and_last_are_the_oldest_and_the_newest() -> None:
    result = decode(pcap_file([Packet(t * S, b"") for t in (5, 7, 6, 7, 4, 8)]))
    assert result.decoder.late_packets == 2
    assert not result.decoder.in_order
    assert (result.decoder.first_ns, result.decoder.last_ns) == (4 * S, 8 * S)


def test_a_decoder_stops_before_a_packet_that_is_not_due() -> None:
    for data in (
        pcap_file([Packet(S, b"a"), Packet(2 * S, b"b")]),
        section() + interface() + enhanced(Packet(S, b"a")) + enhanced(Packet(2 * S, b"b")),
    ):
        walls = Walled(len(data)), Walled(4096)
        at = walls[0].put(data)
        decoder = decode(data).decoder.__class__()
        status, consumed, _ = decoder.decode(at, len(data), walls[1].address, 4096, True, 2 * S - 1)
        assert (status, decoder.packets, decoder.next_ns) == (STATUS_NOT_YET, 1, 2 * S)
        status, _, _ = decoder.decode(at + consumed, len(data) - consumed, walls[1].address, 4096, True, 2 * S)
        assert decoder.packets == 2


def test_too_little_room_names_what_the_record_needs_and_consumes_nothing_of_it() -> None:
    data = pcap_file([Packet(S, bytes(100))])
    source, target = Walled(len(data)), Walled(4096)
    decoder = PcapDecoder()
    at = source.put(data)
    status, consumed, _ = decoder.decode(at, len(data), target.address, 60, True)
    assert (status, consumed, decoder.packets) == (STATUS_OUTPUT_FULL, 24, 0)
    assert decoder.needed_room == 132


def test_a_damaged_file_stays_damaged() -> None:
    data = pcap_file([]) + struct.pack("<IIII", 1, 0, 2**30, 0)
    source, target = Walled(len(data)), Walled(4096)
    decoder = PcapDecoder()
    at = source.put(data)
    status, consumed, _ = decoder.decode(at, len(data), target.address, 4096)
    again = decoder.decode(at + consumed, len(data) - consumed, target.address, 4096)
    assert again == (status, 0, 0)
