"""Packets made by hand: a frame of every link layer, extension header and tunnel that the header parser reads."""

from __future__ import annotations

import struct

ETHERNET, RAW, NULL, LOOP, SLL, SLL2, PPP, PPP_HDLC, C_HDLC = 1, 101, 0, 108, 113, 276, 9, 50, 104
PPP_ETHER, ATM, PPP_WITH_DIRECTION, MPLS = 51, 100, 204, 219

MACS = bytes.fromhex("020000000002020000000001")
A4, B4 = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
A6, B6 = bytes.fromhex("20010db8" + "00" * 11 + "01"), bytes.fromhex("20010db8" + "00" * 11 + "02")


def ethernet(ethertype: int, payload: bytes) -> bytes:
    return MACS + struct.pack(">H", ethertype) + payload


def tag(tci: int, ethertype: int, payload: bytes) -> bytes:
    return struct.pack(">HH", tci, ethertype) + payload


def ipv4(
    protocol: int,
    payload: bytes,
    *,
    options: bytes = b"",
    fragment: int = 0,
    total: int | None = None,
    ends: bytes = A4 + B4,
) -> bytes:
    header_octets = 20 + len(options)
    if total is None:
        total = header_octets + len(payload)
    first = 0x40 | header_octets // 4
    return struct.pack(">BBHHHBBH", first, 0xB8, total, 7, fragment, 61, protocol, 0) + ends + options + payload


def ipv6(next_header: int, payload: bytes, *, length: int | None = None, ends: bytes = A6 + B6) -> bytes:
    length = len(payload) if length is None else length
    return struct.pack(">IHBB", 0x6B800000, length, next_header, 62) + ends + payload


def tcp(payload: bytes = b"", *, flags: int = 0x18, offset: int = 5) -> bytes:
    return struct.pack(">HHIIBBHHH", 40000, 443, 1000, 2000, offset << 4, flags, 512, 0, 0) + payload


def udp(payload: bytes = b"") -> bytes:
    return struct.pack(">HHHH", 5353, 53, 8 + len(payload), 0) + payload


def fragment6(next_header: int, offset: int, more: bool, payload: bytes) -> bytes:
    return struct.pack(">BBHI", next_header, 0, offset | more, 99) + payload


SEEDS: dict[str, tuple[int, bytes]] = {
    "tcp over ipv4": (ETHERNET, ethernet(0x0800, ipv4(6, tcp(b"x" * 10)))),
    "padded to 60 octets": (ETHERNET, ethernet(0x0800, ipv4(17, udp())) + b"\xee" * 18),
    "tcp with options over ipv4 with options": (
        ETHERNET,
        ethernet(0x0800, ipv4(6, tcp(b"\1" * 12 + b"data", offset=8), options=b"\x94\4\0\0")),
    ),
    "udp over ipv6": (ETHERNET, ethernet(0x86DD, ipv6(17, udp(b"abc")))),
    "syn": (ETHERNET, ethernet(0x0800, ipv4(6, tcp(b"\2\4\5\xb4\4\2\1\1\3\3\7\0", flags=2, offset=8)))),
    "icmp": (ETHERNET, ethernet(0x0800, ipv4(1, b"\3\1\0\0" + b"\0" * 4 + ipv4(6, tcp())))),
    "icmpv6": (ETHERNET, ethernet(0x86DD, ipv6(58, b"\x80\0\0\0\0\1\0\1"))),
    "sctp": (ETHERNET, ethernet(0x0800, ipv4(132, struct.pack(">HHII", 1, 2, 3, 4) + b"c" * 16))),
    "qinq": (ETHERNET, ethernet(0x88A8, tag(0x2064, 0x8100, tag(0x0065, 0x0800, ipv4(17, udp()))))),
    "mpls": (ETHERNET, ethernet(0x8847, struct.pack(">II", 0x0001_0040, 0x0001_1140) + ipv4(6, tcp()))),
    "mpls pseudowire": (
        ETHERNET,
        ethernet(0x8847, struct.pack(">II", 0x0002_0140, 0) + ethernet(0x8100, tag(5, 0x86DD, ipv6(17, udp())))),
    ),
    "pppoe": (ETHERNET, ethernet(0x8864, b"\x11\0\0\1\0\x40\0\x21" + ipv4(6, tcp()))),
    "snap": (ETHERNET, ethernet(44, b"\xaa\xaa\3\0\0\0\x08\0" + ipv4(17, udp()))),
    "ipv6 extension headers": (
        ETHERNET,
        ethernet(
            0x86DD, ipv6(0, b"\x2b\0" + b"\1\4\0\0\0\0" + b"\x3c\2\4\0" + b"\0" * 20 + b"\6\0\1\4\0\0\0\0" + tcp())
        ),
    ),
    "ipv6 first fragment": (RAW, ipv6(44, fragment6(17, 0, True, udp(b"z" * 8)))),
    "ipv6 later fragment": (RAW, ipv6(44, fragment6(17, 1232, False, b"q" * 9))),
    "ipv4 later fragment": (RAW, ipv4(17, b"p" * 16, fragment=185)),
    "jumbogram": (RAW, ipv6(0, b"\6\0\xc2\4" + struct.pack(">I", 70000) + tcp(b"j" * (70000 - 28)), length=0)),
    "authentication header": (RAW, ipv4(51, b"\6\4" + b"\0" * 22 + tcp())),
    "loopback, little endian": (NULL, b"\2\0\0\0" + ipv4(17, udp())),
    "loopback, big endian": (LOOP, b"\0\0\0\x1e" + ipv6(17, udp())),
    "cooked": (SLL, struct.pack(">HHH8sH", 4, 1, 6, MACS[6:] + b"\0\0", 0x0800) + ipv4(6, tcp())),
    "cooked 2": (SLL2, struct.pack(">HHIHBB8s", 0x86DD, 0, 3, 1, 0, 6, MACS[6:] + b"\0\0") + ipv6(6, tcp())),
    "ppp": (PPP, b"\xff\3\0\x21" + ipv4(6, tcp())),
    "ppp, compressed": (PPP_HDLC, b"\x57" + ipv6(6, tcp())),
    "cisco hdlc": (C_HDLC, b"\x0f\0\x08\0" + ipv4(6, tcp())),
    "ppp with a direction": (PPP_WITH_DIRECTION, b"\0\xff\3\0\x21" + ipv4(6, tcp())),
    "pppoe without ethernet": (PPP_ETHER, b"\x11\0\0\1\0\x40\0\x21" + ipv4(6, tcp())),
    "llc alone": (ATM, b"\xaa\xaa\3\0\0\0\x08\0" + ipv4(6, tcp())),
    "mpls alone": (MPLS, struct.pack(">I", 0x0001_1140) + ipv6(6, tcp())),
    "mpls pseudowire without control word": (
        ETHERNET,
        ethernet(0x8847, struct.pack(">I", 0x0003_0140) + ethernet(0x0800, ipv4(6, tcp()))),
    ),
    "mpls pseudowire without control word, to an address like ip": (
        ETHERNET,
        ethernet(0x8847, struct.pack(">I", 0x0001_1140) + b"\x45" + ethernet(0x0800, ipv4(6, tcp()))[1:]),
    ),
    "segment routing": (
        RAW,
        ipv6(43, b"\6\4\4\1\1\0\0\0" + A6 + B6 + tcp(b"srv6")),
    ),
    "esp": (RAW, ipv4(50, b"\0\0\0\1\0\0\0\1" + b"e" * 32)),
    "priority tag and 802.1ad in 802.1q": (
        ETHERNET,
        ethernet(0x8100, tag(0xE000, 0x88A8, tag(7, 0x86DD, ipv6(17, udp())))),
    ),
}

# ---- tunnels: every one carries INSIDE, or INSIDE6, and begins with another IP header ----

C4, D4 = bytes([172, 16, 0, 3]), bytes([172, 16, 0, 4])
C6, D6 = bytes.fromhex("20010db8" + "00" * 11 + "03"), bytes.fromhex("20010db8" + "00" * 11 + "04")
INNER_MACS = bytes.fromhex("020000000012020000000011")
INSIDE = ipv4(6, tcp(b"inside"), ends=C4 + D4)
INSIDE6 = ipv6(6, tcp(b"inside"), ends=C6 + D6)


def inner_ethernet(ethertype: int = 0x0800, payload: bytes = INSIDE) -> bytes:
    return INNER_MACS + struct.pack(">H", ethertype) + payload


def over_udp(port: int, payload: bytes, *, source_port: int = 50000) -> bytes:
    return ipv4(17, struct.pack(">HHHH", source_port, port, 8 + len(payload), 0) + payload)


def gre(flags: int, protocol: int, payload: bytes, options: bytes = b"") -> bytes:
    return ipv4(47, struct.pack(">HH", flags, protocol) + options + payload)


def vxlan(frame: bytes, vni: int = 99) -> bytes:
    return struct.pack(">II", 0x0800_0000, vni << 8) + frame


def gtp(payload: bytes, *, flags: int = 0x30, options: bytes = b"") -> bytes:
    return struct.pack(">BBHI", flags, 0xFF, len(options) + len(payload), 0xABCD) + options + payload


def capwap(frame_control: bytes, extra: bytes = b"") -> bytes:
    """CAPWAP's header, that of an 802.11 data frame, and LLC."""
    addresses = INNER_MACS + MACS[:6]
    frame = frame_control + b"\0\0" + addresses + b"\0\0" + extra + b"\xaa\xaa\3\0\0\0\x08\0"
    return b"\0\x10\x43\0" + b"\0" * 4 + frame


def teredo(payload: bytes, before: bytes = b"") -> bytes:
    return over_udp(3544, before + payload)


_ERSPAN_2 = struct.pack(">II", 0x1000_0001, 0)
_TUNNELS: dict[str, bytes] = {
    "ipv4 in ipv4": ipv4(4, INSIDE),
    "6in4": ipv4(41, INSIDE6),
    "4in6": ipv6(4, INSIDE),
    "6in6": ipv6(41, INSIDE6),
    "4in6 behind destination options": ipv6(60, b"\4\0\1\4\0\0\0\0" + INSIDE),
    "6in6 behind a segment routing header": ipv6(43, b"\x29\2\4\0\0\0\0\0" + B6 + INSIDE6),
    "ethernet behind a segment routing header": ipv6(43, b"\x8f\2\4\0\0\0\0\0" + B6 + inner_ethernet()),
    "4in6in4": ipv4(41, ipv6(4, INSIDE)),
    "ipv4 in ah in ipv4": ipv4(51, b"\4\4" + b"\0" * 22 + INSIDE),
    "gre": gre(0, 0x0800, INSIDE),
    "gre with checksum, key and sequence number": gre(0xB000, 0x86DD, INSIDE6, b"\0" * 12),
    "gre with source routes": gre(0x4000, 0x0800, INSIDE, b"\0" * 4 + b"\x08\0\0\4" + C4 + b"\0" * 4),
    "gre with mpls": gre(0, 0x8847, struct.pack(">I", 0x0002_0140) + INSIDE),
    "nvgre": gre(0x2000, 0x6558, inner_ethernet(), b"\0\0\x63\1"),
    "gre in gre": gre(0, 0x0800, gre(0, 0x0800, INSIDE)),
    "pptp": gre(0x3081, 0x880B, b"\xff\3\0\x21" + INSIDE, struct.pack(">HHII", 50, 7, 1, 2)),
    "pptp, compressed": gre(0x3001, 0x880B, b"\x21" + INSIDE, struct.pack(">HHI", 50, 7, 1)),
    "erspan i": gre(0, 0x88BE, inner_ethernet()),
    "erspan ii": gre(0x1000, 0x88BE, _ERSPAN_2 + inner_ethernet(), b"\0\0\0\1"),
    "erspan iii": gre(0x1000, 0x22EB, b"\x20\0\0\1" + b"\0" * 8 + inner_ethernet(), b"\0\0\0\1"),
    "erspan iii with a subheader": gre(
        0x1000, 0x22EB, b"\x20\0\0\1" + b"\0" * 7 + b"\1" + b"\0" * 8 + inner_ethernet(), b"\0\0\0\1"
    ),
    "mpls in ip": ipv4(137, struct.pack(">I", 0x0002_0140) + INSIDE),
    "etherip": ipv4(97, b"\x30\0" + inner_ethernet()),
    "vxlan": over_udp(4789, vxlan(inner_ethernet())),
    "vxlan on linux's port": over_udp(8472, vxlan(inner_ethernet())),
    "vxlan with a tagged frame": over_udp(4789, vxlan(inner_ethernet(0x8100, tag(0x2003, 0x0800, INSIDE)))),
    "vxlan over ipv6": ipv6(
        17, struct.pack(">HHHH", 50000, 4789, 16 + len(inner_ethernet()), 0) + vxlan(inner_ethernet())
    ),
    "vxlan-gpe with ipv4": over_udp(4790, b"\x0c\0\0\1\0\0\x63\0" + INSIDE),
    "vxlan-gpe with ipv6": over_udp(4790, b"\x0c\0\0\2\0\0\x63\0" + INSIDE6),
    "vxlan-gpe with ethernet": over_udp(4790, b"\x0c\0\0\3\0\0\x63\0" + inner_ethernet()),
    "geneve": over_udp(6081, b"\0\0\x65\x58\0\0\x63\0" + inner_ethernet()),
    "geneve with options and ipv6": over_udp(6081, b"\2\0\x86\xdd\0\0\x63\0" + b"\1\2\3\1\0\0\0\1" + INSIDE6),
    "gtp-u": over_udp(2152, gtp(INSIDE)),
    "gtp-u with a sequence number": over_udp(2152, gtp(INSIDE6, flags=0x32, options=b"\0\1\0\0")),
    "gtp-u with a pdu session container": over_udp(2152, gtp(INSIDE, flags=0x34, options=b"\0\0\0\x85" + b"\1\0\1\0")),
    "gtp-u from its port": over_udp(40000, gtp(INSIDE), source_port=2152),
    "teredo": teredo(INSIDE6),
    "teredo with an origin": teredo(INSIDE6, b"\0\0\x12\x34\xf5\xff\xff\xfe"),
    "teredo with authentication and origin": teredo(
        INSIDE6, b"\0\1\2\3idkey" + b"\0" * 9 + b"\0\0\x12\x34\xf5\xff\xff\xfe"
    ),
    "teredo from its port": over_udp(50001, INSIDE6, source_port=3544),
    "l2tp": over_udp(1701, b"\0\2\0\1\0\2" + b"\xff\3\0\x21" + INSIDE),
    "l2tp with length, sequence and offset": over_udp(
        1701, b"\x4a\2\0\x40\0\1\0\2\0\3\0\4\0\2\xee\xee" + b"\0\x57" + INSIDE6
    ),
    "mpls over udp": over_udp(6635, struct.pack(">I", 0x0002_1140) + INSIDE, source_port=50002),
    "gre over udp": over_udp(4754, b"\0\0\x08\0" + INSIDE),
    "capwap with ethernet": over_udp(5247, b"\0\x10\2\0" + b"\0" * 4 + inner_ethernet()),
    "capwap with 802.11": over_udp(5247, capwap(b"\x08\x01") + INSIDE),
    "capwap with 802.11 of exchanged octets": over_udp(5247, capwap(b"\x01\x08") + INSIDE),
    "capwap with 802.11 and quality of service": over_udp(5247, capwap(b"\x02\x88", b"\0\0") + INSIDE),
    "gtp-u in vxlan": over_udp(4789, vxlan(inner_ethernet(0x0800, over_udp(2152, gtp(INSIDE))))),
}
TUNNELS: dict[str, tuple[int, bytes]] = {
    name: (ETHERNET, ethernet(0x0800 if packet[0] >> 4 == 4 else 0x86DD, packet)) for name, packet in _TUNNELS.items()
}
CRAFTED = SEEDS | TUNNELS


def packet_record(
    packet: bytes, *, interface: int = 0, timestamp_ns: int = 0, original: int = 0, options: bytes = b""
) -> bytes:
    """An Enhanced Packet Block in the framing of the rings (ring/layout.h)."""
    body = packet + b"\0" * (-len(packet) % 4) + options
    length = 32 + len(body)
    high, low = divmod(timestamp_ns, 1 << 32)
    head = struct.pack("=7I", 6, length, interface, high, low, len(packet), original or len(packet))
    return head + body + struct.pack("=I", length)
