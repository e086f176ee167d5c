"""Elements of the user's own in flow records: each is defined by an IESpec, and is a field of the flow table or a
constant.

    siteNumber(99999/1)<unsigned16> = 7
    siteName(99999/2)<string> = 'north'
    longestPacket(99999/3)<unsigned16> = forward.max_length
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from appliance.errors import ConfigError
from appliance.meter.ipfix import Element, define_element
from appliance.meter.pack import ROW_FIELDS

DEFINITION = re.compile(r"\s*(?P<spec>\S+>(?:\[\d+\])?)\s*=\s*(?P<source>\S.*?)\s*")
MAX_CONSTANT_OCTETS = 64
MAX_OCTETS = 96  # of all together: a record must fit into the shortest message
INTEGER_FIELDS = {name for name, (_, octets) in ROW_FIELDS.items() if octets in (1, 2, 4, 8)}
TIME_FIELDS = {name for name in INTEGER_FIELDS if name.endswith("_ns")}
MAC_FIELDS = {name for name in ROW_FIELDS if name.endswith("_mac")}
KINDS = {"dateTimeMilliseconds": "milliseconds", "dateTimeNanoseconds": "nanoseconds", "macAddress": "copy"}


@dataclass(frozen=True, slots=True)
class OwnElement:
    """`source`: of ROW_FIELDS, read as `kind`; "": `constant` stands in every record."""

    element: Element
    source: str = ""
    kind: str = "constant"
    constant: bytes = b""

    @property
    def spec(self) -> str:
        return f"{self.element.name}[{self.element.length}]"


def own_elements(definitions: Sequence[str]) -> list[OwnElement]:
    """ConfigError names the definition that is wrong, and what would be right."""
    found: list[OwnElement] = []
    for text in definitions:
        one = _own_element(text)
        if any(other.element.name == one.element.name for other in found):
            raise ConfigError(f"meter.elements: {text}: {one.element.name} is there twice")
        found.append(one)
    octets = sum(one.element.length for one in found)
    if octets > MAX_OCTETS:
        raise ConfigError(f"meter.elements: together {octets} octets, at most {MAX_OCTETS} fit into a record")
    return found


def _own_element(text: str) -> OwnElement:
    matched = DEFINITION.fullmatch(text)
    if matched is None:
        raise ConfigError(f"meter.elements: {text!r}: must be NAME(ENTERPRISE/NUMBER)<TYPE> = FIELD or VALUE")
    source = matched["source"]
    try:
        element, type_name = define_element(matched["spec"])
        if source in ROW_FIELDS:
            return _from_field(element, type_name, source)
        return _constant(element, type_name, source)
    except ValueError as error:
        raise ConfigError(f"meter.elements: {text}: {error}") from None


def _from_field(element: Element, type_name: str, source: str) -> OwnElement:
    fields = {
        "macAddress": MAC_FIELDS,
        "dateTimeMilliseconds": TIME_FIELDS,
        "dateTimeNanoseconds": TIME_FIELDS,
    }
    if type_name.startswith("unsigned"):
        suitable = INTEGER_FIELDS - TIME_FIELDS
    else:
        suitable = fields.get(type_name, set())
    if source not in suitable:
        which = f"for {type_name} there are {', '.join(sorted(suitable))}" if suitable else "it needs a constant"
        raise ValueError(f"{source} cannot be a {type_name}; {which}")
    return OwnElement(element, source, KINDS.get(type_name, "unsigned"))


def _constant(element: Element, type_name: str, source: str) -> OwnElement:
    try:
        octets = _encoded(type_name, source, element.length)
    except (ValueError, OverflowError, OSError, struct.error):
        raise ValueError(f"{source} is neither a field of the flow table nor a value of {type_name}") from None
    if not 0 < len(octets) <= MAX_CONSTANT_OCTETS:
        raise ValueError(f"{len(octets)} octets; must be 1 to {MAX_CONSTANT_OCTETS}")
    return OwnElement(Element(element.name, element.enterprise, element.number, len(octets)), constant=octets)


def _encoded(type_name: str, source: str, length: int) -> bytes:
    is_variable = length == 65535
    if type_name.startswith(("unsigned", "signed")):
        return int(source, 0).to_bytes(length, "big", signed=type_name.startswith("signed"))
    if type_name in ("float32", "float64"):
        return struct.pack("!f" if length == 4 else "!d", float(source))
    if type_name == "boolean":
        return {"true": b"\1", "false": b"\2"}.get(source) or _fail()
    if type_name == "ipv4Address":
        return socket.inet_pton(socket.AF_INET, source)
    if type_name == "ipv6Address":
        return socket.inet_pton(socket.AF_INET6, source)
    if type_name == "macAddress":
        return _of_length(bytes.fromhex(source.replace(":", "")), 6)
    if type_name == "octetArray":
        octets = bytes.fromhex(source)
        return octets if is_variable else _of_length(octets, length)
    if type_name == "string" and len(source) > 2 and source[0] == source[-1] == "'":
        octets = source[1:-1].encode()
        return octets if is_variable else _of_length(octets.ljust(length, b"\0"), length)
    return _fail()


def _of_length(octets: bytes, length: int) -> bytes:
    return octets if len(octets) == length else _fail()


def _fail() -> bytes:
    raise ValueError("no value")
