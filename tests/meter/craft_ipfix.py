"""IPFIX messages made by hand, for the tests of what reads them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

VARIABLE = 65535
EXPORTED_S = 1_700_000_000
ELEMENT = tuple[int, ...]  # (number, length) or (number, length, enterprise)


def message(*sets: bytes, sequence: int = 0, domain: int = 1) -> bytes:
    body = b"".join(sets)
    return struct.pack("!HHIII", 10, 16 + len(body), EXPORTED_S, sequence, domain) + body


def a_set(set_id: int, body: bytes) -> bytes:
    return struct.pack("!HH", set_id, 4 + len(body)) + body


def field(element: ELEMENT) -> bytes:
    number, length, *enterprise = element
    if enterprise:
        return struct.pack("!HHI", number | 0x8000, length, enterprise[0])
    return struct.pack("!HH", number, length)


def template(template_id: int, elements: Sequence[ELEMENT]) -> bytes:
    return a_set(2, struct.pack("!HH", template_id, len(elements)) + b"".join(map(field, elements)))


def options_template(template_id: int, scope: int, elements: Sequence[ELEMENT]) -> bytes:
    return a_set(3, struct.pack("!HHH", template_id, len(elements), scope) + b"".join(map(field, elements)))


def variable(octets: bytes) -> bytes:
    """A value of variable length with its length before it (RFC 7011, 7)."""
    if len(octets) < 255:
        return bytes([len(octets)]) + octets
    return b"\xff" + struct.pack("!H", len(octets)) + octets
