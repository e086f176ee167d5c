"""What the fuzzers begin with: packets and files made here, and real and damaged captures where they are to be had."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
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
from support.frames import Shape, numbered_frame

from appliance.capture.application import Inspector
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


def seeds(target: str) -> list[bytes]:
    if target == "payload":
        return conversations()
    if target == "headers":
        return [bytes([LINKTYPES.index(1)]) + packet for packet in packets()] + [
            bytes([number]) + packet[14:] for number in range(len(LINKTYPES)) for packet in packets()
        ]
    if target in ("reader", "salvage"):
        return captures()
    if target == "table":
        messages = [tcp(client_hello()), udp(question("a.example"), 999, 53), tcp(b"SSH-2.0-a\r\n")]
        return [*rings(), b"".join(digests(messages, Inspector(entropy=True)))]
    if target == "ring":
        return rings()
    if target == "ipfix":
        return flow_files()
    return [path.read_bytes() for path in sorted((PROJECT / "config").glob("*.toml"))]
