"""Capture files made by hand, memory with a wall behind it, and records taken apart again: for the tests of formats."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from appliance.formats.decoder import (
    STATUS_DAMAGED,
    STATUS_END,
    STATUS_NEED_INPUT,
    STATUS_OUTPUT_FULL,
    Decoder,
)
from appliance.formats.pcap import PcapDecoder
from appliance.formats.pcapng import PcapngDecoder

RECORD_PACKET, RECORD_INTERFACE = 6, 1
END_OF_OPTIONS = (0, b"")


@dataclass(frozen=True)
class Packet:
    timestamp_ns: int
    data: bytes
    original: int = -1  # -1: as long as the data
    interface: int = 0

    @property
    def original_bytes(self) -> int:
        return len(self.data) if self.original < 0 else self.original


def pcap_file(
    packets: Iterable[Packet],
    *,
    order: str = "<",
    nanoseconds: bool = True,
    version: tuple[int, int] = (2, 4),
    network: int = 1,
    snaplen: int = 262144,
) -> bytes:
    magic, tick_ns = (0xA1B23C4D, 1) if nanoseconds else (0xA1B2C3D4, 1000)
    parts = [struct.pack(order + "IHHiIII", magic, *version, 0, 0, snaplen, network)]
    for packet in packets:
        seconds, rest_ns = divmod(packet.timestamp_ns, 10**9)
        header = struct.pack(order + "IIII", seconds, rest_ns // tick_ns, len(packet.data), packet.original_bytes)
        parts.append(header + packet.data)
    return b"".join(parts)


def block(order: str, block_type: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(order + "I", 12 + len(body))
    return struct.pack(order + "I", block_type) + length + body + length


def option_list(order: str, options: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join(struct.pack(order + "HH", code, len(v)) + v + bytes(-len(v) % 4) for code, v in options)


def section(order: str = "<", version: tuple[int, int] = (1, 0), options: Iterable[tuple[int, bytes]] = ()) -> bytes:
    body = struct.pack(order + "IHHq", 0x1A2B3C4D, *version, -1) + option_list(order, options)
    return block(order, 0x0A0D0D0A, body)


def interface(
    order: str = "<", linktype: int = 1, snaplen: int = 262144, options: Iterable[tuple[int, bytes]] = ()
) -> bytes:
    return block(order, 1, struct.pack(order + "HHI", linktype, 0, snaplen) + option_list(order, options))


def enhanced(packet: Packet, order: str = "<", tick_ns: int = 1000, options: Iterable[tuple[int, bytes]] = ()) -> bytes:
    ticks = packet.timestamp_ns // tick_ns
    head = (packet.interface, ticks >> 32, ticks & 0xFFFFFFFF, len(packet.data), packet.original_bytes)
    data = packet.data + bytes(-len(packet.data) % 4)
    return block(order, 6, struct.pack(order + "IIIII", *head) + data + option_list(order, options))


class Walled:
    """Memory that ends exactly before a page that nobody may touch: one byte too far is a SIGSEGV."""

    def __init__(self, length: int) -> None:
        page = mmap.PAGESIZE
        pages_bytes = (length + page - 1) // page * page
        self._map = mmap.mmap(-1, pages_bytes + page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        if libc.mprotect(base + pages_bytes, page, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self.address = base + pages_bytes - length
        self.length = length

    def put(self, data: bytes) -> int:
        """Places `data` directly before the wall; returns its address."""
        at = self.address + self.length - len(data)
        ctypes.memmove(at, data, len(data))
        return at


@dataclass
class Decoded:
    """What came out of a decoder: records, how it ended, and the decoder with its counts."""

    decoder: Decoder
    status: int = -1
    records: list[bytes] = field(default_factory=list)

    @property
    def packets(self) -> list[Packet]:
        return [as_packet(record) for record in self.records if record[:4] == struct.pack("=I", RECORD_PACKET)]

    @property
    def whole(self) -> bool:
        return self.status == STATUS_END


def as_packet(record: bytes) -> Packet:
    _, _, interface_number, high, low, captured, original = struct.unpack_from("=7I", record)
    data = record[28 : 28 + captured]
    return Packet(high << 32 | low, data, -1 if original == captured else original, interface_number)


def packet_options(record: bytes) -> bytes:
    (captured,) = struct.unpack_from("=I", record, 20)
    return record[28 + (captured + 3 & ~3) : -4]


def split_records(batch: bytes) -> list[bytes]:
    records = []
    offset = 0
    while offset < len(batch):
        (length,) = struct.unpack_from("=I", batch, offset + 4)
        record = batch[offset : offset + length]
        assert len(record) == length
        assert length % 4 == 0
        assert struct.unpack_from("=I", record, length - 4) == (length,)
        records.append(record)
        offset += length
    return records


def decoder_for(data: bytes) -> Decoder:
    return PcapngDecoder() if data[:4] == b"\n\r\r\n" else PcapDecoder()


def decode(
    data: bytes, *, piece_bytes: int = 0, room: int = 1 << 16, walls: tuple[Walled, Walled] | None = None
) -> Decoded:
    """Runs `data` through its decoder in pieces of `piece_bytes` (0: all at once), into `room` bytes at a time.

    Input and output lie before walls, so reading or writing behind them ends the test run.
    """
    source, target = walls or (Walled(max(len(data), 1)), Walled(room))
    result = Decoded(decoder_for(data))
    begin, end = 0, 0 if piece_bytes else len(data)
    room = target.length
    while True:
        at = source.put(data[begin:end])
        status, consumed, produced = result.decoder.decode(at, end - begin, target.address, room, end == len(data))
        assert consumed <= end - begin
        assert produced <= room
        result.records += split_records(ctypes.string_at(target.address, produced))
        begin += consumed
        result.status = status
        if status == STATUS_OUTPUT_FULL:
            assert produced or result.decoder.needed_room > room
            if not produced:
                target = Walled(result.decoder.needed_room)
                room = target.length
        elif status == STATUS_NEED_INPUT:
            end = min(len(data), end + piece_bytes)
        else:
            assert status in (STATUS_END, STATUS_DAMAGED)
            return result
