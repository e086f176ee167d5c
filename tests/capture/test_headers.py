"""The header parser: what it reads, what it refuses and why, and that nothing behind the captured length matters."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from capture.crafted import (
    A4,
    B4,
    CRAFTED,
    ETHERNET,
    MACS,
    NULL,
    PPP,
    RAW,
    SEEDS,
    SLL,
    ethernet,
    fragment6,
    ipv4,
    ipv6,
    packet_record,
    tag,
    tcp,
    udp,
)
from hypothesis import example, given, settings, strategies as st

from appliance.capture import headers
from appliance.counters import IGNORED_REASONS

TRUNCATED, OUTGOING, DF, MORE, LATER, PORTS, TCP_READ = 0x1, 0x4, 0x10, 0x20, 0x40, 0x80, 0x100
ZERO_LENGTH, CUT_TRANSPORT, OPTIONS = 0x400, 0x800, 0x2000

SHARED = Path(os.environ.get("APPLIANCE_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def test_reasons_stand_in_the_order_of_the_counter_page() -> None:
    assert headers.IGNORED == IGNORED_REASONS


@pytest.mark.parametrize("name", SEEDS)
def test_every_seed_is_metered(name: str) -> None:
    linktype, packet = SEEDS[name]
    assert "ignored" not in headers.parse(packet, linktype)


def test_tcp_fields_are_read() -> None:
    fields = headers.parse(SEEDS["tcp with options over ipv4 with options"][1], ETHERNET)
    assert (fields["source_address"], fields["destination_address"]) == (A4, B4)
    assert (fields["source_port"], fields["destination_port"], fields["protocol"]) == (40000, 443, 6)
    assert (fields["tcp_sequence"], fields["tcp_acknowledgement"], fields["tcp_window"]) == (1000, 2000, 512)
    assert (fields["tcp_flags"], fields["ttl"], fields["tos"]) == (0x18, 61, 0xB8)
    assert (fields["ip_octets"], fields["payload_octets"], fields["payload_offset"]) == (60, 4, 14 + 24 + 32)
    assert (fields["source_mac"], fields["destination_mac"]) == (MACS[6:], MACS[:6])
    assert fields["status"] & (PORTS | TCP_READ | OPTIONS) == PORTS | TCP_READ | OPTIONS


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    ("options", "mss", "scale"),
    [
        (b"\2\4\5\xb4\4\2\x08\x0a" + b"\0" * 8 + b"\1\3\3\7", 1460, 7),
        (b"\3\3\0\0", 0, 0),  # a scale of 0 is not the same as none
        (b"\3\3\xff\0", 0, 14),
        (b"\1\1\1\1", 0, None),
        (b"\0\2\4\5\xb4\0\0\0", 0, None),  # behind the end of options
        (b"\x08\x00\2\4\5\xb4\0\0", 0, None),  # a length of 0
        (b"\x08\x40\2\4\5\xb4\0\0", 0, None),  # a length beyond the header
        (b"\2\3\5\1\3\4\1\1", 0, None),  # lengths that do not belong to them
    ],
)
def test_a_syn_declares_its_segment_size_and_window_scale(
    plain: bool, options: bytes, mss: int, scale: int | None
) -> None:
    packet = ethernet(0x0800, ipv4(6, tcp(options, flags=2, offset=5 + len(options) // 4)))
    fields = headers.parse(packet, ETHERNET, plain=plain)
    assert (fields["tcp_mss"], fields["tcp_window_scale"], fields["tcp_flags"]) == (mss, scale, 2)
    later = ethernet(0x0800, ipv4(6, tcp(options, flags=0x10, offset=5 + len(options) // 4)))
    fields = headers.parse(later, ETHERNET, plain=plain)
    assert (fields["tcp_mss"], fields["tcp_window_scale"]) == (0, None)


@pytest.mark.parametrize("plain", [True, False])
def test_options_behind_the_capture_are_not_read(plain: bool) -> None:
    packet = ethernet(0x0800, ipv4(6, tcp(b"\1\1\1\1\2\4\5\xb4", flags=2, offset=7)))
    fields = headers.parse(packet, ETHERNET, captured_length=len(packet) - 2, plain=plain)
    assert (fields["tcp_mss"], fields["status"] & 0x100) == (0, 0x100)


def test_ethernet_padding_is_no_payload() -> None:
    fields = headers.parse(SEEDS["padded to 60 octets"][1], ETHERNET)
    assert (fields["ip_octets"], fields["payload_octets"], fields["original_length"]) == (28, 0, 60)


def test_ports_do_not_come_from_the_padding() -> None:
    fields = headers.parse(ethernet(0x0800, ipv4(17, b"")) + b"\xee" * 26, ETHERNET)
    assert fields["source_port"] == 0 and fields["status"] & CUT_TRANSPORT and not fields["status"] & PORTS


def test_both_vlan_tags_are_kept_whole() -> None:
    fields = headers.parse(SEEDS["qinq"][1], ETHERNET)
    assert (fields["vlan_tags"], fields["vlan_outer"], fields["vlan_inner"]) == (2, 0x2064, 0x0065)


def test_the_top_label_is_kept() -> None:
    assert headers.parse(SEEDS["mpls"][1], ETHERNET)["mpls"] == 0x0001_0040


def test_ipv6_extension_headers_lead_to_the_transport() -> None:
    fields = headers.parse(SEEDS["ipv6 extension headers"][1], ETHERNET)
    assert (fields["protocol"], fields["source_port"], fields["ip_octets"]) == (6, 40000, 40 + 40 + 20)


def test_the_first_fragment_has_ports_and_later_ones_have_none() -> None:
    first = headers.parse(SEEDS["ipv6 first fragment"][1], RAW)
    assert first["source_port"] == 5353 and first["status"] & (MORE | LATER) == MORE
    for name, offset, identification in (("ipv6 later fragment", 1232, 99), ("ipv4 later fragment", 1480, 7)):
        later = headers.parse(SEEDS[name][1], RAW)
        assert (later["source_port"], later["protocol"], later["fragment_offset"]) == (0, 17, offset)
        assert later["fragment_id"] == identification and later["status"] & LATER


def test_an_atomic_fragment_is_no_fragment() -> None:
    fields = headers.parse(ipv6(44, fragment6(17, 0, False, udp())), RAW)
    assert fields["source_port"] == 5353 and not fields["status"] & (MORE | LATER)


def test_a_jumbogram_counts_its_option_length() -> None:
    fields = headers.parse(SEEDS["jumbogram"][1], RAW)
    assert (fields["ip_octets"], fields["payload_octets"]) == (70040, 70000 - 28)
    assert not fields["status"] & ZERO_LENGTH


def test_a_zero_ip_length_is_marked_and_the_octets_are_those_of_the_frame() -> None:
    fields = headers.parse(ethernet(0x0800, ipv4(6, tcp(b"s" * 3000), total=0)), ETHERNET)
    assert (fields["ip_octets"], fields["source_port"], fields["payload_octets"]) == (3040, 40000, 3000)
    assert fields["status"] & ZERO_LENGTH


def test_an_ipv6_payload_length_of_zero_is_marked_and_the_octets_are_those_of_the_frame() -> None:
    fields = headers.parse(ethernet(0x86DD, ipv6(6, tcp(b"s" * 70_000), length=0)), ETHERNET)
    assert (fields["ip_octets"], fields["source_port"], fields["payload_octets"]) == (70_060, 40000, 70_000)
    assert fields["status"] & ZERO_LENGTH


def test_icmp_type_and_code_are_no_ports() -> None:
    fields = headers.parse(SEEDS["icmp"][1], ETHERNET)
    assert (fields["icmp_type"], fields["icmp_code"], fields["source_port"], fields["destination_port"]) == (3, 1, 0, 0)


def test_an_outgoing_cooked_packet_is_marked() -> None:
    assert headers.parse(SEEDS["cooked"][1], SLL)["status"] & OUTGOING


def test_a_packet_that_the_capture_cut_keeps_its_lengths() -> None:
    packet = ethernet(0x0800, ipv4(6, tcp(b"x" * 1000)))
    fields = headers.parse(packet[:54], ETHERNET, original_length=len(packet))
    assert (fields["ip_octets"], fields["payload_octets"], fields["captured_length"]) == (1040, 1000, 54)
    assert fields["status"] & TRUNCATED


@pytest.mark.parametrize(
    ("reason", "linktype", "packet"),
    [
        ("not_ip", ETHERNET, ethernet(0x0806, b"\0" * 28)),
        ("not_ip", ETHERNET, ethernet(38, b"\x42\x42\3" + b"\0" * 35)),
        ("not_ip", NULL, b"\7\0\0\0" + b"\0" * 20),
        ("not_ip", PPP, b"\xff\3\xc0\x21" + b"\0" * 8),
        ("malformed", RAW, b"\x44" + ipv4(6, tcp())[1:]),
        ("malformed", RAW, b"\x4f" + ipv4(6, b"")[1:]),
        ("malformed", RAW, ipv4(6, tcp(), total=19)),
        ("malformed", RAW, b"\x55" + ipv4(6, tcp())[1:]),
        ("malformed", RAW, ipv6(6, tcp())[:30]),
        ("malformed", RAW, ipv6(0, b"\6\xff" + b"\0" * 30)),
        ("malformed", ETHERNET, MACS),
        ("malformed", RAW, b""),
        ("link_type", 105, ethernet(0x0800, ipv4(6, tcp()))),
        ("too_many_layers", ETHERNET, ethernet(0x8100, tag(1, 0x8100, b"") * 99 + tag(1, 0x0800, ipv4(6, tcp())))),
        ("too_many_layers", ETHERNET, ethernet(0x8847, b"\0\1\0\x40" * 100 + b"\0\1\1\x40" + ipv4(6, tcp()))),
        ("too_many_layers", RAW, ipv6(60, b"\x3c\0\1\4\0\0\0\0" * 99 + b"\6\0\1\4\0\0\0\0" + tcp())),
    ],
)
def test_what_is_not_metered_has_a_reason(reason: str, linktype: int, packet: bytes) -> None:
    assert headers.parse(packet, linktype) == {"ignored": reason}


@pytest.mark.parametrize("name", SEEDS)
def test_a_capture_that_ends_in_the_headers_is_truncated_never_malformed(name: str) -> None:
    linktype, packet = SEEDS[name]
    for length in range(min(len(packet), 150)):
        result = headers.parse(packet[:length], linktype, original_length=len(packet))
        assert result.get("ignored", "truncated") in ("truncated", "not_ip"), f"cut at {length}"


def test_sixteen_tags_are_taken() -> None:
    packet = ethernet(0x8100, tag(1, 0x8100, b"") * 15 + tag(1, 0x0800, ipv4(6, tcp())))
    assert headers.parse(packet, ETHERNET)["vlan_tags"] == 16


# ---- safety: only what was captured counts ----


def results_under_tails(
    packet: bytes, linktype: int, length: int, original: int
) -> list[dict[bool, dict[str, object]]]:
    """With the outer and with the inner header's flow, under each tail."""
    return [
        {
            inner: headers.parse(
                packet[:length] + tail * 80, linktype, original_length=original, captured_length=length, inner=inner
            )
            for inner in (False, True)
        }
        for tail in (b"\x00", b"\xff", packet[:14] or b"\x45")
    ]


@pytest.mark.parametrize("name", CRAFTED)
def test_octets_behind_the_captured_length_change_nothing(name: str) -> None:
    linktype, packet = CRAFTED[name]
    for length in range(min(len(packet), 200) + 1):
        for original in (length, len(packet)):
            first, *others = results_under_tails(packet, linktype, length, original)
            assert all(other == first for other in others), f"cut at {length} of {original}"


@pytest.mark.parametrize("name", CRAFTED)
def test_a_wrong_octet_anywhere_in_the_headers_reads_nothing_behind_them(name: str) -> None:
    linktype, packet = CRAFTED[name]
    for position in range(min(len(packet), 100)):
        for value in (0x00, 0x01, 0x7F, 0x80, 0xFF, packet[position] ^ 0x10):
            mutated = packet[:position] + bytes([value]) + packet[position + 1 :]
            length = min(len(packet), 120)
            first, *others = results_under_tails(mutated, linktype, length, len(packet))
            assert all(other == first for other in others), f"octet {position} = {value}"


@given(st.binary(max_size=200), st.sampled_from([0, 1, 9, 50, 101, 104, 108, 113, 228, 229, 276, 147]))
@settings(max_examples=300, deadline=None)
def test_any_octets_give_a_digest_or_a_reason(packet: bytes, linktype: int) -> None:
    first, *others = results_under_tails(packet, linktype, len(packet), len(packet))
    assert all(other == first for other in others)
    assert all(result.get("ignored") in (*headers.IGNORED, None) for result in first.values())


class GuardedPage:
    """A page of memory with an unreadable one behind it: a packet at its end cannot be read past."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 3 * mmap.PAGESIZE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        guard = ctypes.c_void_p(base + 2 * mmap.PAGESIZE)
        if libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self._view = memoryview(self._map)

    def at_the_end(self, packet: bytes) -> memoryview:
        end = 2 * mmap.PAGESIZE
        self._view[end - len(packet) : end] = packet
        return self._view[end - len(packet) : end]


def test_no_read_crosses_into_an_unreadable_page() -> None:
    page = GuardedPage()
    for linktype, packet in CRAFTED.values():
        for length, inner in product(range(min(len(packet), 250)), (False, True)):
            in_place = headers.parse(page.at_the_end(packet[:length]), linktype, len(packet), inner=inner)
            assert in_place == headers.parse(packet[:length], linktype, len(packet), inner=inner)


PAGE = GuardedPage()


@settings(max_examples=2000, deadline=None)
@given(
    st.sampled_from(list(CRAFTED.values())),
    st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), max_size=4),
    st.integers(0, 220),
    st.integers(0, 3000),
)
def test_damaged_packets_of_every_kind_are_read_within_their_bounds(
    crafted: tuple[int, bytes], changes: list[tuple[int, int]], length: int, longer: int
) -> None:
    linktype, packet = crafted
    damaged = bytearray(packet[:length])
    for at, value in changes:
        if at < len(damaged):
            damaged[at] = value
    for inner in (False, True):
        in_place = headers.parse(PAGE.at_the_end(bytes(damaged)), linktype, len(damaged) + longer, inner=inner)
        elsewhere = bytes(damaged) + b"\xff" * 300
        assert in_place == headers.parse(elsewhere, linktype, len(damaged) + longer, len(damaged), inner=inner)


# ---- batches of records ----


def test_a_batch_gives_one_digest_for_every_metered_packet() -> None:
    arp = ethernet(0x0806, b"\0" * 28)
    time_ns = 1_700_000_000_123_456_789
    records = (
        packet_record(SEEDS["tcp over ipv4"][1], timestamp_ns=time_ns)
        + packet_record(arp)
        + struct.pack("=III", 1, 20, 0)
        + b"\0" * 4
        + struct.pack("=I", 20)
        + packet_record(SEEDS["ppp"][1], interface=1)
        + packet_record(SEEDS["ppp"][1], interface=2)
    )
    out, ignored = headers.digests(records, [ETHERNET, PPP])
    assert len(out) == 2 * 128
    record_type, length, interface, high, low = struct.unpack_from("=5I", out)
    assert (record_type, length, interface, high << 32 | low) == (0x80000D16, 128, 0, time_ns)
    assert struct.unpack_from("=I", out, 124) == (128,)
    assert struct.unpack_from("=I", out, 128 + 8) == (1,)
    octets = len(arp) + len(SEEDS["ppp"][1])
    assert ignored == dict.fromkeys(headers.IGNORED, 0) | {"not_ip": 1, "link_type": 1, "octets": octets}


def test_octets_that_are_not_metered_are_those_on_the_wire() -> None:
    arp = ethernet(0x0806, b"\0" * 28)
    _, ignored = headers.digests(packet_record(arp, original=1500), [ETHERNET])
    assert (ignored["not_ip"], ignored["octets"]) == (1, 1500)


@pytest.mark.parametrize(("flags", "status"), [(1, 0x8), (2, 0x4), (0, 0)])
def test_the_direction_of_a_packet_block_travels_along(flags: int, status: int) -> None:
    options = struct.pack("=HH4s", 1, 4, b"note") + struct.pack("=HHI", 2, 4, flags) + struct.pack("=HH", 0, 0)
    out, _ = headers.digests(packet_record(SEEDS["tcp over ipv4"][1], options=options), [ETHERNET])
    assert struct.unpack_from("=H", out, 94)[0] & 0xC == status


@pytest.mark.parametrize("damage", ["length too small", "length too large", "captured length beyond the record", "cut"])
def test_damaged_framing_is_refused(damage: str) -> None:
    good = packet_record(SEEDS["tcp over ipv4"][1])
    bad = bytearray(good)
    if damage == "length too small":
        struct.pack_into("=I", bad, 4, 8)
    elif damage == "length too large":
        struct.pack_into("=I", bad, 4, len(bad) + 4)
    elif damage == "captured length beyond the record":
        struct.pack_into("=I", bad, 20, 0xFFFFFFFF)
    else:
        del bad[10:]
    with pytest.raises(ValueError, match=f"offset {len(good)}"):
        headers.digests(good + bytes(bad), [ETHERNET])


# ---- real captures ----


def pcap_packets(path: Path) -> Iterator[tuple[int, int, bytes, int]]:
    """(link type, time in the file's own units, captured octets, original length) of a classic pcap file."""
    data = path.read_bytes()
    order = {
        b"\xd4\xc3\xb2\xa1": "<",
        b"\x4d\x3c\xb2\xa1": "<",
        b"\xa1\xb2\xc3\xd4": ">",
        b"\xa1\xb2\x3c\x4d": ">",
    }.get(data[:4])
    if order is None:
        return
    linktype = struct.unpack_from(order + "I", data, 20)[0] & 0xFFFF
    offset = 24
    while offset + 16 <= len(data):
        _, _, captured, original = struct.unpack_from(order + "4I", data, offset)
        packet = data[offset + 16 : offset + 16 + captured]
        if len(packet) < captured:
            return
        yield linktype, 0, packet, original
        offset += 16 + captured


def shared_captures() -> list[Path]:
    return sorted(SHARED.glob("captures/**/*.pcap")) if SHARED.is_dir() else []


@pytest.mark.skipif(not shared_captures(), reason="no shared captures beside the repository (APPLIANCE_SHARED_DATA)")
def test_real_and_damaged_captures_never_read_behind_a_packet() -> None:
    checked = 0
    for path in shared_captures():
        for number, (linktype, _, packet, original) in enumerate(pcap_packets(path)):
            if number == 60:  # of each file: the kinds repeat
                break
            for length in {*range(0, min(len(packet), 130), 3), len(packet)}:
                first, *others = results_under_tails(packet, linktype, length, max(original, length))
                assert all(other == first for other in others), f"{path.name} packet {number} cut at {length}"
                checked += 1
    assert checked > 10_000


@example(SEEDS["syn"][1], [(17, 44)], 0, 0, False)  # the IP length ends within the options
@settings(max_examples=2000)
@given(
    st.sampled_from([packet for linktype, packet in CRAFTED.values() if linktype == ETHERNET]),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=3),
    st.integers(0, 120),
    st.integers(0, 120),
    st.booleans(),
)
def test_the_short_way_for_common_packets_gives_what_the_long_one_gives(
    packet: bytes, changes: list[tuple[int, int]], captured: int, longer: int, inner: bool
) -> None:
    changed = bytearray(packet)
    for at, value in changes:
        if at < len(changed):
            changed[at] = value
    captured = min(captured or len(changed), len(changed))
    short = headers.parse(changed, ETHERNET, captured + longer, captured, inner=inner)
    assert short == headers.parse(changed, ETHERNET, captured + longer, captured, inner=inner, plain=False)
    assert short == headers.parse(changed, ETHERNET, captured + longer, captured, inner=inner, left=True)
