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
from appliance.formats.stream import looks_like_erf
from appliance.formats.unpack import MAGICS

LIVE_SCHEMES = ("ring", "pcap", "int")
# Nothing in these files tells what they are, so their scheme must.
FIXED_RECORD_SCHEMES = ("legacyeth", "legacypos", "legacyatm", "tsh", "fr+")
FILE_SCHEMES = ("pcapfile", "pcapng", "erf", "rawerf", *FIXED_RECORD_SCHEMES)
OUTPUT_SCHEMES = ("pcapfile", "pcapng", "erf")
SENDING_SCHEMES = ("int", "ring")
EVERY_INTERFACE = "*"
STANDARD_STREAM = "-"

# libtrace's other names of what is here.
_LIVE_ALIASES = {"pcapint": "pcap"}
_OUTPUT_ALIASES = {"rawerf": "erf", "pcap": "pcapfile", "pcapint": "int"}

_DAG_CARD = "needs a DAG card; record on the card's host, and read the file here: erf:PATH"
_DPDK = "takes the interface away from the kernel; bind it to its kernel driver again, and use ring:INTERFACE"
_MULTICAST = "needs a DAG card's multicast sender; record there, and read the file here: erf:PATH"
_LAWFUL = "carries lawful interception (ETSI TS 102 232), not packets; use the agency's own receiver"
_PF_RING = "needs the kernel module pf_ring; ring:INTERFACE does the same without it"
_CONVERT = "; convert it once: traceconvert"

# libtrace has these too: why they are not here, and what to use instead.
_REFUSED = {
    "atmhdr": f"holds 4 octets of each ATM cell and no packet{_CONVERT} atmhdr:PATH erf:NEW",
    "bpf": "is of BSD's kernels; on Linux use ring:INTERFACE",
    "dag": _DAG_CARD,
    "dpdk": _DPDK,
    "dpdkndag": _MULTICAST,
    "dpdkvdev": _DPDK,
    "duck": "holds the state of a DAG card's clock and no packet; read the trace beside it: erf:PATH",
    "etsifile": _LAWFUL,
    "etsilive": _LAWFUL,
    "legacynzix": f"has times that only its file name gives a beginning{_CONVERT} legacynzix:PATH pcapfile:NEW",
    "ndag": _MULTICAST,
    "ndagtcp": _MULTICAST,
    "pfring": _PF_RING,
    "pfringold": _PF_RING,
    "pktmeta": "holds descriptions and no packet; read the trace beside it",
    "rt": "needs a sender of libtrace's RT protocol (WDCAP), which no longer is packaged; on the sender's host run "
    "mtracecap pcapng:- ring:INTERFACE, and feed it here through ssh: pcapng:-",
    "tzsplive": "is TZSP over UDP; record the sender's interface: ring:INTERFACE with filter udp port 37008",
    "xdp": "takes the packets away from the host, and gains nothing without a driver for it; use ring:INTERFACE",
}

# IFNAMSIZ is 16 with the final zero (linux/if.h). The kernel takes nearly any byte; what goes into file names, labels
# and messages is this much and no more.
_INTERFACE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,14}", re.ASCII)
_PCAPNG_MAGIC = b"\x0a\x0d\x0d\x0a"
_HEAD_BYTES = 64


@dataclass(frozen=True)
class Uri:
    """`target` is an interface's name, `*` (every interface) or a path; `-` is standard input or output."""

    scheme: str
    target: str
    is_live: bool

    @property
    def is_every_interface(self) -> bool:
        return self.is_live and self.target == EVERY_INTERFACE

    @property
    def told_format(self) -> str:
        """What CaptureReader must be told about the file; "" where its content says enough."""
        if self.scheme in FIXED_RECORD_SCHEMES:
            return self.scheme
        return "erf" if self.scheme in ("erf", "rawerf") else ""

    def __str__(self) -> str:
        return f"{self.scheme}:{self.target}"


def parse(text: str) -> Uri:
    """An input URI. UsageError says what is wrong with it."""
    scheme, _, target = text.partition(":")
    if scheme == "pcap" and _is_path(target):  # libtrace's name for a file through libpcap
        return Uri("pcapfile", target, is_live=False)
    uri = _split(text, LIVE_SCHEMES + FILE_SCHEMES, "reads", _LIVE_ALIASES)
    if uri.is_live and uri.target != EVERY_INTERFACE:
        check_interface_name(uri.target)
    return uri


def parse_output(text: str) -> Uri:
    """An output URI: a format and a path."""
    return _split(text, OUTPUT_SCHEMES, "writes", _OUTPUT_ALIASES)


def parse_trace_output(text: str) -> Uri:
    """The URI of an output trace: a format and a path, or an interface to send on."""
    uri = _split(text, OUTPUT_SCHEMES + SENDING_SCHEMES, "writes", _OUTPUT_ALIASES)
    if uri.is_live:
        check_interface_name(uri.target)
    return uri


def guess(text: str) -> Uri:
    """An input URI, or a bare name as libtrace takes it: a file if there is one of that name, else an interface; "-" is
    standard input."""
    if text == STANDARD_STREAM:
        return parse(f"pcapfile:{text}")  # what it is, its first bytes tell
    if ":" in text:
        return parse(text)
    if os.path.isfile(text):
        return parse(f"{_file_scheme(text)}:{text}")
    if _INTERFACE_NAME.fullmatch(text) and text in (name for _, name in socket.if_nameindex()):
        return parse(f"ring:{text}")
    raise UsageError(
        f"{text!r} is neither a file nor an interface; say what it is: {_list(LIVE_SCHEMES + FILE_SCHEMES)}"
    )


def file_of(text: str) -> tuple[str, str]:
    """The path, and what CaptureReader must be told about it, of `scheme:PATH` or a path alone, which may have a colon
    too."""
    scheme, colon, path = text.partition(":")
    return (path, Uri(scheme, path, is_live=False).told_format) if colon and scheme in FILE_SCHEMES else (text, "")


def check_interface_name(name: str) -> None:
    """Raise UsageError unless `name` is within the allow-list for interfaces."""
    if not is_interface_name(name):
        raise UsageError(
            f"{name!r} is no interface name: 1 to 15 of A-Z a-z 0-9 _ . -, beginning with a letter, a digit or _"
        )


def _split(text: str, known: tuple[str, ...], verb: str, aliases: dict[str, str]) -> Uri:
    scheme, colon, target = text.partition(":")
    if not colon:
        examples = " or ".join(f"{name}:{text}" for name in dict.fromkeys((known[0], "pcapfile")))
        raise UsageError(f"{text!r} names no kind of {'source' if verb == 'reads' else 'output'}; say e.g. {examples}")
    if scheme in _REFUSED:
        raise UsageError(f"{scheme}: {_REFUSED[scheme]}")
    given, scheme = scheme, aliases.get(scheme, scheme)
    if scheme not in known:
        near = difflib.get_close_matches(scheme, known, n=1)
        hint = f"did you mean {near[0]}:? " if near else ""
        what = "is only read" if scheme in LIVE_SCHEMES + FILE_SCHEMES else "is an unknown scheme"
        raise UsageError(f"{given!r} {what}; {hint}The appliance {verb} {_list(known)}")
    if not target:
        raise UsageError(f"{text!r} names no {'interface' if scheme in LIVE_SCHEMES else 'path'}")
    if "\0" in target:
        raise UsageError(f"{text!r} holds a zero byte")
    return Uri(scheme, target, is_live=scheme in LIVE_SCHEMES)


def _is_path(target: str) -> bool:
    """Whether `pcap:` means a file: no interface can have such a name, or a file has it and no interface."""
    if target == STANDARD_STREAM or "/" in target:
        return True
    return os.path.isfile(target) and target not in (name for _, name in socket.if_nameindex())


def _file_scheme(path: str) -> str:
    """By the first plain bytes; the reader finds out about compression, and what is below it, by itself."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return "pcapfile"
    if head.startswith(_PCAPNG_MAGIC):
        return "pcapng"
    if head.startswith(tuple(MAGICS.values())):  # a gzip header may look like ERF
        return "pcapfile"
    return "erf" if looks_like_erf(head) else "pcapfile"


def _list(schemes: tuple[str, ...]) -> str:
    return " ".join(f"{scheme}:" for scheme in schemes)


def is_interface_name(text: str) -> bool:
    """Whether we take it for one. The kernel itself allows nearly everything, `a;id` and line feeds too."""
    return _INTERFACE_NAME.fullmatch(text) is not None
