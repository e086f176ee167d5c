"""Numbered frames: every loss, duplicate, corruption and disorder of them can be seen.

A frame carries the number of its interface and its own number, under a checksum. It is either a bare Ethernet frame of
the experimental EtherType 0x88b5, or a UDP datagram in IPv4, for tests of flows:

    Ethernet (14) [802.1Q (4)] [IPv4 (20) UDP (8)] | magic 4 | interface u16 | sequence u64 | crc32 u32 | filling

All numbers are big-endian. The checksum covers the filling, then magic, interface and sequence: in that order a sender
computes the filling's part once, and a frame's own part costs 14 bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

ETHERTYPE_NUMBERED = 0x88B5  # IEEE 802 local experimental EtherType 1
ETHERTYPE_IPV4 = 0x0800
ETHERTYPES_VLAN = (0x8100, 0x88A8)
MAGIC = b"NFR1"
HEADER = struct.Struct("!4sHQI")  # magic, interface, sequence, crc32
COUNTED = struct.Struct("!4sHQ")  # what the checksum covers, after the filling
PATCH = struct.Struct("!QI")  # sequence and crc32: what differs between the frames of one template
INTERFACE_OFFSET = 4  # within the payload
PATCH_OFFSET = 6
SOURCE_ID_OFFSET = 10  # the interface's number, in the source address

ETHERNET_BYTES = 14
VLAN_BYTES = 4
IPV4_UDP_BYTES = 28
MINIMUM_BYTES = 60  # of an Ethernet frame, its check sequence not counted

UDP_SOURCE_PORT = 20000  # of flow 0; flow n has 20000 + n, and after so many the next destination port begins
UDP_DESTINATION_PORT = 9
FLOWS_PER_DESTINATION_PORT = 45000
MAXIMUM_FLOWS = 45_000_000

IMIX_SIZES = (60,) * 7 + (590,) * 4 + (1514,)


@dataclass(frozen=True)
class Shape:
    """What the frames of one run have in common; `sizes` (bytes, no check sequence) and `flows` go round."""

    sizes: tuple[int, ...] = (MINIMUM_BYTES,)
    vlan: int | None = None
    udp: bool = False
    flows: int = 1

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < self.overhead_bytes + HEADER.size:
            raise ValueError(f"a frame of this kind has at least {self.overhead_bytes + HEADER.size} bytes")
        if not 1 <= self.flows <= MAXIMUM_FLOWS or (self.flows > 1 and not self.udp):
            raise ValueError(f"1 to {MAXIMUM_FLOWS} flows, and more than one in UDP only")

    @property
    def overhead_bytes(self) -> int:
        """Bytes before the numbered payload."""
        return ETHERNET_BYTES + (VLAN_BYTES if self.vlan is not None else 0) + (IPV4_UDP_BYTES if self.udp else 0)

    def size_of(self, sequence: int) -> int:
        return self.sizes[sequence % len(self.sizes)]

    def flow_of(self, sequence: int) -> int:
        return sequence % self.flows


class Template:
    """A frame of one interface and size, ready but for its number; `number` makes it the frame `sequence`."""

    def __init__(self, interface_id: int, size: int, shape: Shape) -> None:
        self.interface_id = interface_id
        self.size = size
        self.interface_offset = shape.overhead_bytes + INTERFACE_OFFSET
        self.patch_offset = shape.overhead_bytes + PATCH_OFFSET
        self.port_offset = shape.overhead_bytes - 8 if shape.udp else None
        filling = bytes(i & 0xFF for i in range(size - shape.overhead_bytes - HEADER.size))
        self._filling_crc = zlib.crc32(filling)
        payload = HEADER.pack(MAGIC, interface_id, 0, 0) + filling
        self.frame = _headers(interface_id, shape, len(payload)) + payload

    def checksum(self, sequence: int) -> int:
        return zlib.crc32(COUNTED.pack(MAGIC, self.interface_id, sequence), self._filling_crc)

    def number(self, frame: bytearray | memoryview, offset: int, sequence: int, flow: int) -> None:
        """Turns the copy of `self.frame` at `offset` into the frame number `sequence` of `flow`."""
        PATCH.pack_into(frame, offset + self.patch_offset, sequence, self.checksum(sequence))
        if self.port_offset is not None:
            block, place = divmod(flow, FLOWS_PER_DESTINATION_PORT)
            ports = (UDP_SOURCE_PORT + place, UDP_DESTINATION_PORT + block)
            struct.pack_into("!HH", frame, offset + self.port_offset, *ports)


def numbered_frame(interface_id: int, sequence: int, shape: Shape = Shape()) -> bytes:
    """The frame number `sequence` of an interface, as the sender sends it."""
    template = Template(interface_id, shape.size_of(sequence), shape)
    frame = bytearray(template.frame)
    template.number(frame, 0, sequence, shape.flow_of(sequence))
    return bytes(frame)


def parse_sizes(text: str) -> tuple[int, ...]:
    """`imix`, or sizes in bytes with commas between them."""
    return IMIX_SIZES if text == "imix" else tuple(int(size) for size in text.split(","))


def format_sizes(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))


def _headers(interface_id: int, shape: Shape, payload_bytes: int) -> bytes:
    source = b"\x02\x00\x00\x00" + struct.pack("!H", interface_id)
    header = b"\x02\x00\x00\x00\xff\xff" + source
    if shape.vlan is not None:
        header += struct.pack("!HH", ETHERTYPES_VLAN[0], shape.vlan)
    if not shape.udp:
        return header + struct.pack("!H", ETHERTYPE_NUMBERED)
    udp_bytes = 8 + payload_bytes
    # A UDP checksum of 0 says that there is none (RFC 768), so that ports and numbers can change.
    udp = struct.pack("!HHHH", UDP_SOURCE_PORT, UDP_DESTINATION_PORT, udp_bytes, 0)
    host = struct.pack("!BBH", 10, 1, interface_id)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + udp_bytes, 0, 0, 64, 17, 0, host, b"\x0a\x02\x00\x01")
    ip = ip[:10] + struct.pack("!H", _internet_checksum(ip)) + ip[12:]
    return header + struct.pack("!H", ETHERTYPE_IPV4) + ip + udp


def _internet_checksum(header: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
