"""What a flow's file holds: a header, an entry for each packet, and an end that makes it a whole file at any time."""

from __future__ import annotations

import json
import plistlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from appliance.formats.encode import SNAPLEN_MAX, pcap_header

S = 1_000_000_000
TCP_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR", "AE")  # from bit 0 on

Info = Mapping[str, Any]


class Description(NamedTuple):
    """A flow, as the table knows it. Source and destination are the first packet's; addresses are 4 or 16 bytes."""

    serial: int
    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    linktype: int
    first_ns: int
    last_ns: int
    packets: int
    octets: int  # on the wire
    is_closed: bool  # by FIN or RST
    frames: tuple[int, ...]  # the packets' numbers, when they are kept
    cut_packets: int = 0  # the last ones, left out of its file


@dataclass(frozen=True)
class FlowFormat:
    """`entry(number, info)` is a packet's, with `separator` in front, which the first one of a file does not get.
    None: a pcap file, whose packets are written by compiled code."""

    extension: str
    header: Callable[[int, bool], bytes]  # (link type, nanoseconds)
    entry: Callable[[int, Info], bytes] | None
    separator: bytes = b""
    end: bytes = b""


def time_text(timestamp_ns: int) -> str:
    """Seconds since 1970, with all nine digits."""
    return f"{timestamp_ns // S}.{timestamp_ns % S:09}"


def flags_text(tcp_flags: int) -> str:
    return " ".join(name for bit, name in enumerate(TCP_FLAGS) if tcp_flags >> bit & 1)


def pcap_packet(timestamp_ns: int, data: bytes, wire_length: int, *, nanoseconds: bool, byteorder: str) -> bytes:
    """A packet of a pcap file of either byte order."""
    order = "<" if byteorder == "little" else ">"
    fraction = timestamp_ns % S if nanoseconds else timestamp_ns % S // 1000
    return struct.pack(order + "IIII", timestamp_ns // S, fraction, len(data), wire_length) + data


def pcap_file_header(linktype: int, *, nanoseconds: bool, byteorder: str) -> bytes:
    magic, major, minor, zone, digits, snaplen, network = struct.unpack(
        "=IHHiIII", pcap_header(linktype, nanoseconds=nanoseconds, snaplen=SNAPLEN_MAX)
    )
    order = "<" if byteorder == "little" else ">"
    return struct.pack(order + "IHHiIII", magic, major, minor, zone, digits, snaplen, network)


def _json_entry(number: int, info: Info) -> bytes:
    return f',\n"Frame {number}": {json.dumps(info, default=_plain)}'.encode()


def _plist_entry(number: int, info: Info) -> bytes:
    text = plistlib.dumps(_storable(info), sort_keys=False)
    begin, end = text.index(b"<dict"), text.rindex(b"</plist>")
    return f"<key>Frame {number}</key>\n".encode() + text[begin:end]


def _tree_entry(number: int, info: Info) -> bytes:
    return ("\n".join([f"Frame {number}", *_branches(info, "  ")]) + "\n").encode()


def _branches(info: Info, indent: str) -> list[str]:
    lines = []
    for key, value in info.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}|-- {key}", *_branches(value, f"{indent}|   ")]
        else:
            lines.append(f"{indent}|-- {key} -> {_plain(value) if isinstance(value, bytes) else value}")
    return lines


def _plain(value: object) -> object:
    return bytes(value).hex() if isinstance(value, bytes | bytearray | memoryview) else str(value)


def _storable(value: Any) -> Any:
    """As a property list takes it, which knows neither None nor other types."""
    if isinstance(value, Mapping):
        return {str(key): _storable(each) for key, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [_storable(each) for each in value]
    return value if isinstance(value, str | int | bool) else _plain(value)


PCAP = FlowFormat(".pcap", lambda linktype, nanoseconds: pcap_header(linktype, nanoseconds=nanoseconds), None)
JSON = FlowFormat(".json", lambda *_: b"{\n", _json_entry, b",\n", b"\n}\n")
PLIST = FlowFormat(
    ".plist",
    lambda *_: plistlib.dumps({}, sort_keys=False).replace(b"<dict/>\n</plist>\n", b"<dict>\n"),
    _plist_entry,
    end=b"</dict>\n</plist>\n",
)
TREE = FlowFormat(".txt", lambda *_: b"", _tree_entry)

FORMATS = {
    "pcap": PCAP,
    "cap": PCAP,
    "plist": PLIST,
    "xml": PLIST,
    "json": JSON,
    "tree": TREE,
    "txt": TREE,
    "text": TREE,
}
