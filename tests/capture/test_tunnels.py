"""Tunnels: a packet's flow is that of the tunnel or that of the packet inside; tshark finds the same headers."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from capture.crafted import (
    A4,
    B4,
    C4,
    C6,
    CRAFTED,
    D4,
    D6,
    ETHERNET,
    INNER_MACS,
    INSIDE,
    INSIDE6,
    MACS,
    RAW,
    TUNNELS,
    ethernet,
    gre,
    gtp,
    inner_ethernet,
    ipv4,
    ipv6,
    over_udp,
    tag,
    tcp,
    vxlan,
)
from support.judges import IpHeader, ip_headers, packets

from appliance.capture import headers

LATER, PORTS, ZERO_LENGTH, CUT_TRANSPORT = 0x40, 0x80, 0x400, 0x800
DECODE_AS = (  # what tshark has to be told
    "udp.port==8472,vxlan",
    "udp.port==4754,gre",
    "udp.port==6635,mpls",
    "mpls.label==32,pwethcw",
    "mpls.label==48,pwethnocw",
)


def inner(packet: bytes, linktype: int = RAW, original_length: int | None = None) -> dict[str, object]:
    return headers.parse(packet, linktype, original_length, inner=True)


def ends(fields: dict[str, object]) -> tuple[object, object]:
    return fields["source_address"], fields["destination_address"]


@pytest.mark.parametrize("name", TUNNELS)
def test_the_inner_header_is_found_in_every_tunnel(name: str) -> None:
    fields = inner(TUNNELS[name][1], ETHERNET)
    expected = {46: (C4, D4), 66: (C6, D6)}[fields["ip_octets"]]  # type: ignore[index]
    assert ends(fields) == expected
    assert (fields["protocol"], fields["source_port"], fields["destination_port"]) == (6, 40000, 443)
    assert (fields["tcp_sequence"], fields["payload_octets"]) == (1000, 6)
    at = int(str(fields["payload_offset"]))
    assert TUNNELS[name][1][at : at + 6] == b"inside"


@pytest.mark.parametrize("name", TUNNELS)
def test_the_outer_header_describes_the_tunnel(name: str) -> None:
    fields = headers.parse(TUNNELS[name][1], ETHERNET)
    assert ends(fields) not in ((C4, D4), (C6, D6))
    assert fields["ip_octets"] == len(TUNNELS[name][1]) - 14


@pytest.mark.parametrize("name", [name for name in CRAFTED if name not in TUNNELS])
def test_without_a_tunnel_inner_and_outer_are_the_same(name: str) -> None:
    linktype, packet = CRAFTED[name]
    assert inner(packet, linktype) == headers.parse(packet, linktype)


def test_tags_and_link_addresses_are_those_of_the_innermost_frame() -> None:
    frame = ethernet(0x8100, tag(9, 0x0800, over_udp(4789, vxlan(inner_ethernet(0x8100, tag(0x2003, 0x0800, INSIDE))))))
    fields = inner(frame, ETHERNET)
    assert (fields["vlan_tags"], fields["vlan_outer"], fields["vlan_inner"]) == (1, 0x2003, 0)
    assert (fields["destination_mac"], fields["source_mac"]) == (INNER_MACS[:6], INNER_MACS[6:])
    fields = inner(ethernet(0x8100, tag(9, 0x0800, ipv4(41, INSIDE6))), ETHERNET)
    assert (fields["vlan_tags"], fields["vlan_outer"]) == (1, 9)
    assert (fields["destination_mac"], fields["source_mac"]) == (MACS[:6], MACS[6:])


def test_labels_are_those_inside_when_the_tunnel_carries_labels() -> None:
    inside = gre(0, 0x8847, struct.pack(">I", 0x0002_0140) + INSIDE)
    outside = ethernet(0x8847, struct.pack(">I", 0x0001_0140) + inside)
    assert headers.parse(outside, ETHERNET)["mpls"] == 0x0001_0140
    assert inner(outside, ETHERNET)["mpls"] == 0x0002_0140


NO_PACKET_INSIDE = {
    "arp in vxlan": over_udp(4789, vxlan(inner_ethernet(0x0806, b"\0" * 28))),
    "vxlan without its flag": over_udp(4789, b"\0" * 8 + inner_ethernet()),
    "an answer to a client on vxlan's port": over_udp(4789, b"\x08" + b"d" * 40, source_port=53),
    "gtp echo": over_udp(2152, struct.pack(">BBHIHBB", 0x32, 1, 4, 0, 1, 0, 0)),
    "l2tp control": over_udp(1701, b"\xc8\2\0\x0c\0\1\0\0\0\0\0\0"),
    "l2tp of another version": over_udp(1701, b"\0\3\0\1\0\2" + b"\xff\3\0\x21" + INSIDE),
    "gtp version 2": over_udp(2152, b"\x48" + gtp(INSIDE)[1:]),
    "gtp extension of length 0": over_udp(2152, gtp(INSIDE, flags=0x34, options=b"\0\0\0\x85" + b"\0\0\0\0")),
    "geneve of another version": over_udp(6081, b"\x40\0\x65\x58\0\0\x63\0" + inner_ethernet()),
    "teredo bubble to nowhere": over_udp(3544, b"\x45" + INSIDE6[1:]),
    "vxlan-gpe with nsh": over_udp(4790, b"\x0c\0\0\4\0\0\x63\0" + INSIDE),
    "gre of version 2": gre(2, 0x0800, INSIDE),
    "gre with isis": gre(0, 0x00FE, b"\x83" * 30),
    "pptp acknowledgement": gre(0x2081, 0x880B, b"", struct.pack(">HHI", 0, 7, 2)),
    "pptp with an encrypted payload": gre(0x3001, 0x880B, b"\0\xfd" + b"e" * 30, struct.pack(">HHI", 32, 7, 2)),
    "erspan ii of another version": gre(0x1000, 0x88BE, b"\x30" + b"\0" * 7 + inner_ethernet(), b"\0\0\0\1"),
    "etherip of another version": ipv4(97, b"\x40\0" + inner_ethernet()),
    "capwap keep-alive": over_udp(5247, b"\0\x10\2\x08" + b"\0" * 4 + inner_ethernet()),
    "encrypted capwap": over_udp(5247, b"\1\x10\2\0" + b"\0" * 4 + inner_ethernet()),
    "ipv6 where ipv4 is announced": ipv4(4, INSIDE6),
    "ipv4 of a header that is too short": ipv4(4, b"\x44" + INSIDE[1:]),
    "no next header": ipv6(59, b""),
    "nothing in ipv4": ipv4(4, b""),
}


@pytest.mark.parametrize("name", NO_PACKET_INSIDE)
def test_a_packet_that_carries_none_belongs_to_the_tunnel(name: str) -> None:
    packet = NO_PACKET_INSIDE[name]
    assert inner(packet) == headers.parse(packet, RAW)
    assert "ignored" not in inner(packet)


def test_esp_ends_the_way() -> None:
    fields = inner(ipv4(4, ipv4(50, b"\0" * 40 + INSIDE, ends=C4 + D4)))
    assert (ends(fields), fields["protocol"], fields["source_port"]) == ((C4, D4), 50, 0)


def test_headers_that_an_icmp_error_quotes_are_no_packet() -> None:
    fields = inner(ipv4(1, b"\3\4\0\0" + b"\0" * 4 + INSIDE))
    assert (ends(fields), fields["protocol"], fields["icmp_type"], fields["icmp_code"]) == ((A4, B4), 1, 3, 4)


def test_the_first_fragment_of_a_tunnel_leads_inside_and_later_ones_do_not() -> None:
    whole = over_udp(4789, vxlan(inner_ethernet()))[20:]
    first = inner(ipv4(17, whole, fragment=0x2000))
    assert ends(first) == (C4, D4) and not int(str(first["status"])) & LATER
    later = inner(ipv4(17, whole, fragment=185))
    assert ends(later) == (A4, B4) and int(str(later["status"])) & LATER


def test_what_the_outer_header_says_leaves_no_trace_in_the_inner_one() -> None:
    outer6 = ipv6(60, b"\4\0\1\4\0\0\0\0" + INSIDE)
    assert inner(outer6) == {
        **inner(INSIDE),
        **{k: inner(outer6)[k] for k in ("payload_offset", "original_length")},
    } | {"captured_length": len(outer6)}


def test_an_offloaded_segment_in_a_tunnel_keeps_its_payload() -> None:
    inside = ipv4(6, tcp(b"s" * 3000), total=0, ends=C4 + D4)
    fields = inner(ipv4(4, inside, total=0))
    assert (fields["ip_octets"], fields["payload_octets"], ends(fields)) == (3040, 3000, (C4, D4))
    assert int(str(fields["status"])) & ZERO_LENGTH


def test_an_inner_transport_header_that_the_capture_cut_leaves_the_inner_addresses() -> None:
    packet = ipv4(4, INSIDE)
    fields = inner(packet[:41], original_length=len(packet))
    assert ends(fields) == (C4, D4) and int(str(fields["status"])) & CUT_TRANSPORT


@pytest.mark.parametrize("name", TUNNELS)
def test_a_tunnel_that_the_capture_cut_is_the_inner_flow_the_tunnels_flow_or_truncated(name: str) -> None:
    linktype, packet = TUNNELS[name]
    whole = inner(packet, linktype)
    for length in range(len(packet)):
        cut = inner(packet[:length], linktype, original_length=len(packet))
        if "ignored" in cut:
            assert cut == {"ignored": "truncated"} and length < 14 + 40 + 24, f"cut at {length}"
        elif ends(cut) == ends(whole):
            assert cut["ip_octets"] == whole["ip_octets"]


# ---- bombs ----


def nested(wrap: object, count: int) -> bytes:
    packet = INSIDE
    for _ in range(count):
        packet = wrap(packet)  # type: ignore[operator]
    return packet


BOMBS = {
    "ipv4 in ipv4": lambda inside: ipv4(4, inside),
    "gre": lambda inside: gre(0, 0x0800, inside),
    "gre with frames": lambda inside: gre(0, 0x6558, inner_ethernet(0x0800, inside)),
    "vxlan": lambda inside: over_udp(4789, vxlan(inner_ethernet(0x0800, inside))),
    "gtp-u": lambda inside: over_udp(2152, gtp(inside)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_hundred_tunnels_are_too_many_layers_inside_and_one_flow_outside(name: str) -> None:
    bomb = nested(BOMBS[name], 100)
    assert inner(bomb) == {"ignored": "too_many_layers"}
    assert ends(headers.parse(bomb, RAW)) == (A4, B4)


@pytest.mark.parametrize("name", ["ipv4 in ipv4", "gre", "gtp-u"])
def test_sixteen_tunnels_are_taken(name: str) -> None:
    assert ends(inner(nested(BOMBS[name], 16))) == (C4, D4)
    assert inner(nested(BOMBS[name], 17)) == {"ignored": "too_many_layers"}


def test_endless_source_routes_and_gtp_extensions_are_too_many_layers() -> None:
    routes = b"\0\0\0\0" + b"\x08\0\0\4" * 100
    assert inner(gre(0x4000, 0x0800, INSIDE, routes)) == {"ignored": "too_many_layers"}
    extensions = b"\0\0\0\x85" + b"\1\0\1\x85" * 100
    assert inner(over_udp(2152, gtp(INSIDE, flags=0x34, options=extensions))) == {"ignored": "too_many_layers"}


# ---- tshark ----


def write_pcap(path: Path, linktype: int, packets: list[bytes]) -> None:
    out = bytearray(struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, linktype))
    for number, packet in enumerate(packets):
        out += struct.pack("<IIII", 1_700_000_000 + number, 0, len(packet), len(packet)) + packet
    path.write_bytes(out)


# What tshark 4.0 reads otherwise, and why.
NOT_FOR_TSHARK = {
    "mpls pseudowire without control word, to an address like ip",  # takes 0x45 for IPv4 whatever its length says
    "jumbogram",  # shows the length field, which is 0; the digest has the jumbo payload option's length
    "capwap with 802.11",  # expects the two octets of the frame control exchanged
    "mpls alone",  # does not know this link type
}


def judged(fields: dict[str, object]) -> IpHeader:
    status, octets = int(str(fields["status"])), fields["ip_octets"]
    if status & ZERO_LENGTH:
        octets = 0 if fields["ip_version"] == 4 else 40
    ports = (fields["source_port"], fields["destination_port"]) if status & PORTS else None
    return IpHeader(fields["source_address"], fields["destination_address"], octets, ports)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "linktype", sorted({linktype for name, (linktype, _) in CRAFTED.items() if name not in NOT_FOR_TSHARK})
)
def test_tshark_finds_the_same_outermost_and_innermost_headers(linktype: int, tmp_path: Path) -> None:
    frames = {name: packet for name, (of, packet) in CRAFTED.items() if of == linktype and name not in NOT_FOR_TSHARK}
    write_pcap(tmp_path / "crafted.pcap", linktype, list(frames.values()))
    found = ip_headers(tmp_path / "crafted.pcap", *DECODE_AS)
    theirs = {name: (found[0], found[-1]) for name, found in zip(frames, found, strict=True)}
    ours = {
        name: (judged(headers.parse(packet, linktype)), judged(inner(packet, linktype)))
        for name, packet in frames.items()
    }
    assert ours == theirs


# ---- real captures ----

DECODED_CAPTURES = (
    "6in4tunnel.pcap",
    "HDLC.pcap",
    "LINKTYPE_IPV4.pcap",
    "Teredo.pcap",
    "dlt_ppp.pcap",
    "erspan.pcap",
    "gre-within-gre.pcap",
    "gso-ipv4.pcap",
    "gtp-u.pcap",
    "http-qinq-0.pcap",
    "icmp-tunnel.pcap",
    "ip-in-mpls.pcap.gz",
    "ip4_fragments.pcap",
    "ip6_fragments.pcap",
    "ip_fragmented_garbage.pcap",
    "ipsec_isakmp_esp.pcap",
    "ipv6-gtp6.pcap",
    "ipv6-http-atomic-frag.pcap",
    "ipv6-srh-ext-header.pcap",
    "linux_dlt_sll2.pcap",
    "many-protocols.pcap",
    "mix-apps.pcap",
    "mixed-vlan-mpls.pcap",
    "mpls-basic.pcap",
    "pppoe-over-qinq.pcap",
    "raw_ip.pcap",
    "sctp-www.pcap",
    "sll.pcap",
    "tcpdump-geneve.pcap",
    "test_loopback.pcap",
    "vlan.pcap",
    "vxlan.pcap",
)


@pytest.mark.parametrize("name", DECODED_CAPTURES)
def test_tshark_finds_the_same_headers_in_every_packet_of_real_captures(name: str, shared_data: Path) -> None:
    path = shared_data / "captures" / name
    different = []
    for number, (packet, theirs) in enumerate(zip(packets(path), ip_headers(path), strict=True), 1):
        data, original = bytes(packet.data), packet.original_length
        outer, innermost = (headers.parse(data, packet.linktype, original, inner=i) for i in (False, True))
        if "ignored" in outer:
            agree = not theirs and outer == innermost and outer["ignored"] in ("not_ip", "truncated")
        else:
            agree = bool(theirs) and (judged(outer), judged(innermost)) == (theirs[0], theirs[-1])
        if not agree:
            different.append((number, outer, innermost, theirs))
    assert different == []
