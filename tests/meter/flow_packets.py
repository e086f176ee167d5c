"""Digests made by hand, captures turned into digests, and a small reader of IPFIX: for the tests of the meter."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.capture import headers
from appliance.formats.reader import CaptureReader
from appliance.meter.table import FlowTable

SHARED = Path(os.environ.get("APPLIANCE_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
NO_SHARED = f"the shared captures are not in {SHARED}"

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
TCP, UDP, ICMP = 6, 17, 1
SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND
VARIABLE = 65535  # length of a field that says its length itself

DIGEST = struct.Struct("=5I4B16s16s4H5I2HI2H6s6s4B2I2HI")


@dataclass(frozen=True)
class Packet:
    """One packet as the meter sees it; the fields of digest.h."""

    time_ns: int = START
    source: bytes = bytes([10, 0, 0, 1])
    destination: bytes = bytes([10, 0, 0, 2])
    source_port: int = 1000
    destination_port: int = 80
    protocol: int = UDP
    octets: int = 100
    flags: int = 0
    vlan: int = 0
    vlan_inner: int = 0
    interface: int = 0
    ttl: int = 64
    tos: int = 0
    status: int = 0x80
    sequence: int = 0
    acknowledgement: int = 0
    window: int = 512
    payload: int = 0
    mss: int = 0  # instead of `icmp`
    window_scale: int | None = None
    icmp: tuple[int, int] = (0, 0)
    version: int = 1

    @property
    def digest(self) -> bytes:
        high, low = divmod(self.time_ns, 1 << 32)
        ip_version = 4 if len(self.source) == 4 else 6
        scale = 0 if self.window_scale is None else self.window_scale + 1
        two = struct.pack("=H", self.mss) if self.mss else bytes(self.icmp)
        return DIGEST.pack(
            0x80000D16, 128, self.interface, high, low,
            self.version, self.ttl, ip_version, self.protocol,
            self.source.ljust(16, b"\0"), self.destination.ljust(16, b"\0"),
            self.source_port, self.destination_port, self.vlan, self.vlan_inner,
            self.octets, self.payload, self.octets + 14,
            self.sequence & 0xFFFFFFFF, self.acknowledgement & 0xFFFFFFFF, self.window, self.flags | scale << 12,
            0, 0, self.status, b"\2\0\0\0\0\1", b"\2\0\0\0\0\2",
            *two, 1 if self.vlan else 0, self.tos, 0, self.octets + 14, 0, 0, 128,
        )  # fmt: skip

    @property
    def back(self) -> dict[str, Any]:
        """The ends exchanged, for an answer: `replace(packet, **packet.back, time_ns=...)`."""
        return {
            "source": self.destination,
            "destination": self.source,
            "source_port": self.destination_port,
            "destination_port": self.source_port,
        }


def digests(packets: Iterable[Packet]) -> bytes:
    return b"".join(packet.digest for packet in packets)


class Memory:
    """Bytes at an address, aligned as a ring's records are."""

    def __init__(self, content: bytes | bytearray) -> None:
        self._buffer = (ctypes.c_uint64 * (len(content) // 8 + 1))()
        self.address = ctypes.addressof(self._buffer)
        self.length = len(content)
        ctypes.memmove(self.address, bytes(content), len(content))


def make_table(**settings: Any) -> FlowTable:
    defaults = {
        "max_flows": 1000,
        "idle_timeout_ns": 30 * SECOND,
        "active_timeout_ns": 300 * SECOND,
        "tcp_linger_ns": SECOND,
    }
    return FlowTable(**(defaults | settings))


def take_rows(table: FlowTable) -> list[dict[str, Any]]:
    rows = table.rows()
    table.clear_rows()
    return rows


def feed(table: FlowTable, records: bytes) -> list[dict[str, Any]]:
    """All records into the table; the rows that left on the way."""
    memory = Memory(records)
    rows: list[dict[str, Any]] = []
    done = 0
    while done < memory.length:
        done += table.update(memory.address + done, memory.length - done)
        rows += take_rows(table)
    return rows


def advance(table: FlowTable, time_ns: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while not table.advance(time_ns):
        rows += take_rows(table)
    return rows + take_rows(table)


def flush(table: FlowTable) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while not table.flush():
        rows += take_rows(table)
    return rows + take_rows(table)


def capture_digests(path: Path, *, inner: bool = False) -> Iterator[tuple[bytes, dict[str, int]]]:
    """The digests of a capture file in batches, and what was ignored in each. FormatError as the reader raises it."""
    room = (ctypes.c_uint64 * (1 << 18))()
    address, length = ctypes.addressof(room), ctypes.sizeof(room)
    with CaptureReader(path) as reader:
        end = False
        while not end:
            filled = reader.fill(address, length)
            linktypes = [interface.linktype for interface in reader.interfaces]
            yield headers.digests(memoryview(room).cast("B")[: filled.produced_bytes], linktypes, inner=inner)
            end = filled.end


# ---- IPFIX ----


BASIC_LIST = 291


@dataclass
class Decoded:
    """One IPFIX message. A template is a list of (enterprise, element number, length)."""

    length: int
    export_time_s: int
    sequence: int
    domain: int
    templates: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)
    scopes: dict[int, int] = field(default_factory=dict)
    records: list[tuple[int, dict[tuple[int, int], bytes]]] = field(default_factory=list)


class Decoder:
    """Reads messages strictly: whatever RFC 7011 forbids is an AssertionError. Templates last as long as it.

    A record is by (enterprise, element); a basicList by (291, place in the template)."""

    def __init__(self) -> None:
        self.templates: dict[int, list[tuple[int, int, int]]] = {}

    def stream(self, data: bytes) -> list[Decoded]:
        messages = []
        while data:
            length = int.from_bytes(data[2:4], "big")
            messages.append(self.message(data[:length]))
            data = data[length:]
        return messages

    def message(self, data: bytes) -> Decoded:
        version, length, export_time_s, sequence, domain = struct.unpack_from("!HHIII", data)
        assert version == 10 and length == len(data) and length > 16, "header"
        decoded = Decoded(length, export_time_s, sequence, domain)
        offset = 16
        while offset < length:
            set_id, set_length = struct.unpack_from("!HH", data, offset)
            assert set_length > 4 and offset + set_length <= length, "empty or overlong set"
            body = data[offset + 4 : offset + set_length]
            if set_id in (2, 3):
                self._templates(decoded, body, options=set_id == 3)
            else:
                assert set_id >= 256 and set_id in self.templates, f"data set {set_id} before its template"
                self._records(decoded, set_id, body)
            offset += set_length
        return decoded

    def _templates(self, decoded: Decoded, body: bytes, *, options: bool) -> None:
        while len(body) >= 4:
            template_id, count = struct.unpack_from("!HH", body)
            offset = 6 if options else 4
            if options:
                decoded.scopes[template_id] = int.from_bytes(body[4:6], "big")
            fields = []
            for _ in range(count):
                number, length = struct.unpack_from("!HH", body, offset)
                offset += 4
                enterprise = 0
                if number & 0x8000:
                    enterprise = int.from_bytes(body[offset : offset + 4], "big")
                    offset += 4
                fields.append((enterprise, number & 0x7FFF, length))
            known = self.templates.setdefault(template_id, fields)
            assert known == fields, f"template {template_id} was redefined"
            decoded.templates[template_id] = fields
            body = body[offset:]

    def _records(self, decoded: Decoded, template_id: int, body: bytes) -> None:
        offset = 0
        while offset < len(body):
            record: dict[tuple[int, int], bytes] = {}
            for place, (enterprise, element, length) in enumerate(self.templates[template_id]):
                if length == 65535:  # variable
                    length, offset = body[offset], offset + 1
                    if length == 255:
                        length, offset = int.from_bytes(body[offset : offset + 2], "big"), offset + 2
                key = (enterprise, element) if element != BASIC_LIST else (BASIC_LIST, place)
                record[key] = body[offset : offset + length]
                assert len(record[key]) == length, "a field is cut, or there is padding"
                offset += length
            decoded.records.append((template_id, record))


def number(record: dict[tuple[int, int], bytes], element: int, enterprise: int = 0) -> int:
    return int.from_bytes(record[enterprise, element], "big")


def flow_records(messages: Iterable[Decoded]) -> list[dict[tuple[int, int], bytes]]:
    return [record for message in messages for template_id, record in message.records if template_id < 280]
