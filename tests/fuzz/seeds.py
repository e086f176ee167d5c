"""What the fuzzers begin with: packets and files made here, and real and damaged captures where they are to be had."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
import zlib
from pathlib import Path

import lz4.frame
import zstandard
from capture.payloads import (
    INITIAL_1,
    alpn,
    client_hello,
    digests,
    extension,
    handshake,
    question,
    record as tls_record,
    server_name,
    tcp,
    udp,
)
from formats.craft import Packet, block, enhanced, interface, pcap_file, section
from merge.rings import DIGEST, PACKET, record
from meter.craft_ipfix import VARIABLE, a_set, message, options_template, template, variable
from support.frames import Shape, numbered_frame

from appliance.capture.application import Inspector
from appliance.generator import FrameMaker, StreamShape
from fuzz.targets import LINKTYPES

PROJECT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("APPLIANCE_SHARED_DATA", PROJECT.parent / "shared" / "data")) / "captures"
SEED_BYTES_MAX = 20_000
MAC = b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02"


def packets() -> list[bytes]:
    """Ethernet frames with headers of every kind that the parser knows."""
    tcp = struct.pack("!HHIIBBHHH", 40000, 443, 1, 2, 0x50, 0x12, 512, 0, 0)
    ip = bytes.fromhex("4500003c000040004006000a0a0000010a000002")
    ip6 = struct.pack("!IHBB", 0x60000000, 28, 0, 64) + bytes(32)
    return [
        numbered_frame(1, 2),
        numbered_frame(1, 2, Shape(vlan=7)),
        numbered_frame(1, 2, Shape((200,), udp=True)),
        MAC + b"\x08\x00" + ip + tcp + bytes(20),
        MAC + b"\x88\xa8\x00\x05\x81\x00\x00\x06\x08\x00" + ip + tcp,
        MAC + b"\x86\xdd" + ip6 + b"\x2b\0\1\4\0\0\0\0" + b"\x2c\0\1\4\0\0\0\0" + b"\6\0\0\1\0\0\0\7" + tcp,
        MAC + b"\x88\x47" + struct.pack("!II", 0x00010040, 0x00011140) + ip + tcp,
        MAC + b"\x88\x64\x11\0\0\1\0\x40\0\x21" + ip + tcp,
        MAC + b"\x00\x2c\xaa\xaa\3\0\0\0\x08\0" + ip + tcp,
        MAC + b"\x08\x00" + b"\x46" + ip[1:] + b"\x94\4\0\0" + tcp,
    ]


def captures() -> list[bytes]:
    """Files of each format, byte order and compression."""
    some = [Packet(10**18 + i * 1000, data) for i, data in enumerate(packets())]
    found = [pcap_file(some, order=order, nanoseconds=nano) for order in "<>" for nano in (True, False)]
    for order in "<>":
        body = section(order) + interface(order=order) + b"".join(enhanced(packet, order) for packet in some)
        found.append(body + block(order, 5, bytes(12)) + block(order, 3, struct.pack(order + "I", 4) + b"abcd"))
    whole = found[4]
    zstd = zstandard.ZstdCompressor(write_checksum=True).compress(whole)
    packed = [gzip.compress(whole), bz2.compress(whole), lzma.compress(whole), lz4.frame.compress(whole), zstd]
    return found + packed + shared()


def shared() -> list[bytes]:
    if not SHARED.is_dir():
        return []
    paths = [path for path in sorted(SHARED.rglob("*")) if path.is_file() and path.suffix not in (".tsv", ".md")]
    return [path.read_bytes() for path in paths if path.stat().st_size <= SEED_BYTES_MAX]


def rings() -> list[bytes]:
    records = b"".join(record(PACKET, struct.pack("=II", 20, 20) + bytes(20), at) for at in range(4))
    empty = b"".join(record(DIGEST, bytes(96), at) for at in range(4))
    return [bytes([0, 0, 0, 0]) + bytes(8) + records, bytes([2, 1, 0, 9]) + bytes(8) + empty, bytes(64)]


def flow_files() -> list[bytes]:
    template = struct.pack("!HHHHHH", 2, 12, 256, 1, 2, 8)
    data = struct.pack("!HHQ", 256, 12, 7)
    message = struct.pack("!HHIII", 10, 16 + len(template) + len(data), 0, 0, 1) + template + data
    return [message, message * 3, message + message[:20]]


def conversations() -> list[bytes]:
    """Payloads of one connection, each with its length before it, behind an octet that says over what."""

    def of(kind: int, *payloads: bytes) -> bytes:
        return bytes([kind]) + b"".join(len(one).to_bytes(2, "big") + one for one in payloads)

    hello = client_hello()
    names = tls_record(handshake(server_name(b"a.example") + alpn(b"h2", b"http/1.1") + extension(21, bytes(400))))
    frames = b"\x06\x00\x40\xff" + hello[5:260] + b"\x00\x01\x02\x05\x00\x01\x00\x00"
    return [
        of(1, hello), of(1, names), of(1, hello[:100], hello[100:300], hello[300:]), of(0, INITIAL_1), of(0, frames),
        of(2, question("www.example.org")), of(3, b"\x00\x21" + question("www.example.org")),
        of(7, b"GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"), of(7, b"HTTP/1.1 200 OK\r\n\r\n"),
        of(1, b"SSH-2.0-OpenSSH_9.2\r\n"),
    ]  # fmt: skip


def payloads() -> list[bytes]:
    """Test traffic beside other packets, with and without a check sequence behind it."""
    maker = FrameMaker(StreamShape(stream=1))
    frames = [maker.frame(n, 10**18 + n) for n in range(4)]
    return packets() + frames + [frame + zlib.crc32(frame).to_bytes(4, "little") for frame in frames]


def erf_files() -> list[bytes]:
    """One of each kind of record, and records of each fixed length; the first byte is the format's."""

    def record(kind: int, body: bytes, *, flags: int = 4, extensions: bytes = b"") -> bytes:
        length = 16 + len(extensions) + len(body)
        return (
            struct.pack("<II", 1 << 31, 10**9) + struct.pack(">BBHHH", kind, flags, length, 1, 64) + extensions + body
        )

    plain = b"".join(record(2, b"\0\0" + packet) for packet in packets())
    kinds = b"".join(record(kind, bytes(40)) for kind in (1, 3, 7, 16, 22, 24, 27, 48))
    extended = record(2 | 0x80, b"\0\0" + packets()[0], extensions=b"\x84" + bytes(7) + b"\5" + bytes(7))
    fixed = [bytes([1 + i]) + bytes(range(64)) * 4 for i in range(5)]
    return [b"\0" + plain, b"\0" + kinds + extended, b"\0", *fixed]


def messages() -> list[bytes]:
    """Every kind of set: templates, options, withdrawals, lists within lists, and type information (RFC 5610)."""
    flow = [(8, 4), (12, 4), (7, 2), (11, 2), (4, 1), (2, 8), (152, 8), (82, VARIABLE), (1, 4, 29305)]
    row = bytes(4 + 4 + 2 + 2 + 1) + struct.pack("!QQ", 3, 10**12) + variable(b"eth0\x1b[2J") + bytes(4)
    basic = variable(b"\4" + struct.pack("!HH", 2, 8) + bytes(16))
    multi = variable(b"\4" + struct.pack("!HH", 256, 4 + len(row)) + row)
    about = [(346, 4), (303, 2), (339, 1), (341, VARIABLE)]
    described = struct.pack("!IHB", 9999, 7, 13) + variable(b"ownName")
    return [
        message(template(256, flow), a_set(256, row * 3)),
        message(template(257, [(291, VARIABLE)]), a_set(257, basic + basic)),
        message(template(256, flow), template(258, [(293, VARIABLE), (292, VARIABLE)]), a_set(258, multi + basic)),
        message(options_template(259, 2, about), a_set(259, described), template(260, [(7, 2, 9999)])),
        message(a_set(2, struct.pack("!HH", 256, 0)), a_set(2, struct.pack("!HH", 2, 0)), a_set(300, bytes(8))),
        b"".join(message(template(256, flow), a_set(256, row), sequence=i) for i in range(3)),
    ]


def seeds(target: str) -> list[bytes]:
    if target == "application":
        return conversations()
    if target == "headers":
        return [bytes([LINKTYPES.index(1)]) + packet for packet in packets()] + [
            bytes([number]) + packet[14:] for number in range(len(LINKTYPES)) for packet in packets()
        ]
    if target in ("reader", "salvage"):
        return captures()
    if target == "table":
        frames = [tcp(client_hello()), udp(question("a.example"), 999, 53), tcp(b"SSH-2.0-a\r\n")]
        return [*rings(), b"".join(digests(frames, Inspector(entropy=True)))]
    if target == "ring":
        return rings()
    if target in ("ipfix", "collector"):
        return flow_files() + messages()
    if target == "erf":
        return erf_files()
    if target in ("flows", "traces"):
        return [bytes([0xFF & 29 * number]) + capture for number, capture in enumerate(captures())]
    if target == "payload":
        return [bytes([LINKTYPES.index(1), 37 * number & 0xFF]) + packet for number, packet in enumerate(payloads())]
    if target == "port":
        return [b"".join(packets()), bytes(range(256)), bytes(64)]
    return [path.read_bytes() for path in sorted((PROJECT / "config").glob("*.toml"))]
