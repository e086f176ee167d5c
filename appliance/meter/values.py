"""Octets of an IPFIX field into a value, by abstract data type (RFC 7012, 3.1), and a value into text.

Whatever comes from a wire has a value: octets that are no value of their type stay octets.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

NS_PER_S = 1_000_000_000
NTP_OFFSET_S = 2_208_988_800  # from 1900 to 1970
NTP_ERA_S = 1 << 32
HALF_NTP_ERA_S = 1 << 31

# How struct reads a field of this type and length; whatever is not here is read as octets.
STRUCT_CODES = {
    **{("unsigned", length): code for length, code in ((1, "B"), (2, "H"), (4, "I"), (8, "Q"))},
    **{("signed", length): code for length, code in ((1, "b"), (2, "h"), (4, "i"), (8, "q"))},
    **{("float", length): code for length, code in ((4, "f"), (8, "d"))},
}
TIMES = {"dateTimeSeconds": 4, "dateTimeMilliseconds": 8, "dateTimeMicroseconds": 8, "dateTimeNanoseconds": 8}
DIGITS = {"dateTimeSeconds": 0, "dateTimeMilliseconds": 3, "dateTimeMicroseconds": 6, "dateTimeNanoseconds": 9}
STRUCTURED = ("basicList", "subTemplateList", "subTemplateMultiList")
LONGEST_INTEGER = 32  # unsigned256

Convert = Callable[[Any], Any]


def number_kind(type_name: str) -> str:
    """`unsigned`, `signed` or `float` for `unsigned64` and the like, else the name itself."""
    return type_name.rstrip("0123456789")


def reader_of(type_name: str, length: int) -> tuple[str, Convert | None]:
    """(struct code, what makes a value of that) for a field of `length` octets; no conversion: it is the value."""
    code = STRUCT_CODES.get((number_kind(type_name), length))
    return (code, None) if code else (f"{length}s", converter(type_name, length))


def converter(type_name: str, length: int) -> Convert | None:
    """What makes a value of `length` octets; None: the octets are it."""
    kind = number_kind(type_name)
    if kind in ("unsigned", "signed"):
        return _integer(kind == "signed") if 0 < length <= LONGEST_INTEGER else None
    if kind == "float":
        code = STRUCT_CODES.get((kind, length))
        return (lambda octets: struct.unpack(f"!{code}", octets)[0]) if code else None
    if type_name in TIMES:
        return _CONVERTERS[type_name] if length == TIMES[type_name] else None
    if _LENGTHS.get(type_name, length) != length:
        return None
    return _CONVERTERS.get(type_name)


def _integer(signed: bool) -> Convert:
    return lambda octets: int.from_bytes(octets, "big", signed=signed)


def _boolean(octets: bytes) -> bool | int:
    return {1: True, 2: False}.get(octets[0], octets[0])  # RFC 7011, 6.1.5: nothing else is a truth value


def _string(octets: bytes) -> str:
    return octets.rstrip(b"\0").decode("utf-8", "replace")


def _ip4(octets: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET, octets)


def _ip6(octets: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET6, octets)


def _mac(octets: bytes) -> str:
    return octets.hex(":")


def _seconds(octets: bytes) -> int:
    return int.from_bytes(octets, "big") * NS_PER_S


def _milliseconds(octets: bytes) -> int:
    return int.from_bytes(octets, "big") * 1_000_000


def ntp_to_ns(timestamp: int) -> int:
    """Nanoseconds since 1970 of an NTP time stamp, to the nearest. Seconds below 2^31 belong to the era that begins
    in 2036 (RFC 4330, 3)."""
    seconds, fraction = divmod(timestamp, 1 << 32)
    if seconds < HALF_NTP_ERA_S:
        seconds += NTP_ERA_S
    return (seconds - NTP_OFFSET_S) * NS_PER_S + ((fraction * NS_PER_S + (1 << 31)) >> 32)


def _microseconds(octets: bytes) -> int:
    return (ntp_to_ns(int.from_bytes(octets, "big")) + 500) // 1000 * 1000  # the low 11 bits mean nothing


def _nanoseconds(octets: bytes) -> int:
    return ntp_to_ns(int.from_bytes(octets, "big"))


_CONVERTERS: dict[str, Convert] = {
    "boolean": _boolean,
    "string": _string,
    "ipv4Address": _ip4,
    "ipv6Address": _ip6,
    "macAddress": _mac,
    "dateTimeSeconds": _seconds,
    "dateTimeMilliseconds": _milliseconds,
    "dateTimeMicroseconds": _microseconds,
    "dateTimeNanoseconds": _nanoseconds,
}
_LENGTHS = {"boolean": 1, "ipv4Address": 4, "ipv6Address": 16, "macAddress": 6}


# Into text and JSON ---------------------------------------------------------------------------------------------------


def shower_of(type_name: str) -> Convert | None:
    """What makes a value that JSON holds of a value of this type; None: it is one."""
    if type_name in TIMES:
        digits = DIGITS[type_name]
        return lambda value: time_text(value, digits) if isinstance(value, int) else plain(value)
    return None if number_kind(type_name) in ("unsigned", "signed") else plain


def plain(value: Any) -> Any:
    """Octets in hex, numbers that JSON does not know as text."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


@lru_cache(4096)
def _second_text(second: int) -> str | None:
    try:
        return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return None


def time_text(time_ns: int, digits: int) -> str:
    """ISO 8601 in UTC with `digits` of the second; `@SECONDS` since 1970 when the calendar does not reach there."""
    second, fraction = divmod(time_ns, NS_PER_S)
    text = _second_text(second)
    part = f".{fraction:09d}"[: digits + 1] if digits else ""
    return f"@{second}{part}" if text is None else f"{text}{part}Z"
