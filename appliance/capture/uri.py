"""Capture URIs, `scheme:target`: which interface or file a worker reads, or which format goes where.

The names are those of libtrace (`ring:eth0`, `pcapfile:a.pcap`). Those that are not read or written here are refused
by name, never guessed at.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
from dataclasses import dataclass

from appliance.errors import UsageError

LIVE_SCHEMES = ("ring", "pcap", "int")
FILE_SCHEMES = ("pcapfile", "pcapng")
OUTPUT_SCHEMES = ("pcapfile", "pcapng")
EVERY_INTERFACE = "*"

# libtrace has these; we say so instead of calling them misspelt.
_NOT_YET = (
    "atmhdr",
    "bpf",
    "dag",
    "dpdk",
    "dpdkvdev",
    "duck",
    "erf",
    "etsifile",
    "etsilive",
    "fr+",
    "legacyatm",
    "legacyeth",
    "legacynzix",
    "legacypos",
    "ndag",
    "ndagtcp",
    "pcapint",
    "pfring",
    "pfringold",
    "rawerf",
    "rt",
    "tsh",
    "tzsplive",
    "xdp",
)

# IFNAMSIZ is 16 with the final zero (linux/if.h). The kernel takes nearly any byte; what goes into file names, labels
# and messages is this much and no more.
_INTERFACE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,14}", re.ASCII)
_PCAPNG_MAGIC = b"\x0a\x0d\x0d\x0a"


@dataclass(frozen=True)
class Uri:
    """`target` is an interface's name, `*` (every interface) or a path; `-` is standard input or output."""

    scheme: str
    target: str
    is_live: bool

    @property
    def is_every_interface(self) -> bool:
        return self.is_live and self.target == EVERY_INTERFACE

    def __str__(self) -> str:
        return f"{self.scheme}:{self.target}"


def parse(text: str) -> Uri:
    """An input URI. UsageError says what is wrong with it."""
    uri = _split(text, LIVE_SCHEMES + FILE_SCHEMES, "reads")
    if uri.is_live and uri.target != EVERY_INTERFACE:
        check_interface_name(uri.target)
    return uri


def parse_output(text: str) -> Uri:
    """An output URI: a format and a path."""
    return _split(text, OUTPUT_SCHEMES, "writes")


def guess(text: str) -> Uri:
    """An input URI, or a bare name as libtrace takes it: a file if there is one of that name, else an interface."""
    if ":" in text:
        return parse(text)
    if os.path.isfile(text):
        return parse(f"{_file_scheme(text)}:{text}")
    if _INTERFACE_NAME.fullmatch(text) and text in (name for _, name in socket.if_nameindex()):
        return parse(f"ring:{text}")
    raise UsageError(
        f"{text!r} is neither a file nor an interface; say what it is: {_list(LIVE_SCHEMES + FILE_SCHEMES)}"
    )


def check_interface_name(name: str) -> None:
    """Raise UsageError unless `name` is within the allow-list for interfaces."""
    if not is_interface_name(name):
        raise UsageError(
            f"{name!r} is no interface name: 1 to 15 of A-Z a-z 0-9 _ . -, beginning with a letter, a digit or _"
        )


def _split(text: str, known: tuple[str, ...], verb: str) -> Uri:
    scheme, colon, target = text.partition(":")
    if not colon:
        raise UsageError(f"{text!r} names no kind of source; say e.g. ring:{text} or pcapfile:{text}")
    if scheme in _NOT_YET or (scheme in LIVE_SCHEMES and scheme not in known):
        raise UsageError(f"{scheme}: is not supported yet; the appliance {verb} {_list(known)}")
    if scheme not in known:
        near = difflib.get_close_matches(scheme, known, n=1)
        hint = f"did you mean {near[0]}:? " if near else ""
        raise UsageError(f"{scheme!r} is an unknown scheme; {hint}The appliance {verb} {_list(known)}")
    if not target:
        raise UsageError(f"{text!r} names no {'interface' if scheme in LIVE_SCHEMES else 'path'}")
    if "\0" in target:
        raise UsageError(f"{text!r} holds a zero byte")
    return Uri(scheme, target, is_live=scheme in LIVE_SCHEMES)


def _file_scheme(path: str) -> str:
    """Only the plain pcapng magic decides; the reader finds out about compression by itself."""
    try:
        with open(path, "rb") as file:
            return "pcapng" if file.read(4) == _PCAPNG_MAGIC else "pcapfile"
    except OSError:
        return "pcapfile"


def _list(schemes: tuple[str, ...]) -> str:
    return " ".join(f"{scheme}:" for scheme in schemes)


def is_interface_name(text: str) -> bool:
    """Whether we take it for one. The kernel itself allows nearly everything, `a;id` and line feeds too."""
    return _INTERFACE_NAME.fullmatch(text) is not None
