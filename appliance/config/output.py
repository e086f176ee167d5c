"""[[output]]: one stream of capture files, from their rotation to their end by retention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from appliance.config.values import (
    GIB,
    Bytes,
    Cpus,
    Name,
    RotateSeconds,
    SomePath,
    Table,
    between,
    shown,
    zero_or_between,
)

ERF_SNAPLEN = 65517  # formats.erf.SNAPLEN_MAX: the most of a packet that fits into an ERF record


def _compressor(value: object) -> object:
    """A list of strings becomes a tuple; TOML has no other way to write an argv."""
    if value in ("none", "lz4"):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(word, str) and "\0" not in word for word in value):
        argv = tuple(value)
        if argv[0]:
            return argv
    raise ValueError(f'must be "none", "lz4" or a list of strings such as ["zstd", "-q", "-1"], is {shown(value)}')


def _argv(value: object) -> object:
    """A list of strings becomes a tuple."""
    if isinstance(value, list | tuple) and all(isinstance(word, str) and "\0" not in word for word in value):
        argv = tuple(value)
        if not argv or argv[0]:
            return argv
    raise ValueError(f'must be a list of strings such as ["/usr/local/bin/notify", "-q"], is {shown(value)}')


Milliseconds = Annotated[int, between(1, 60_000)]
Compressor = Annotated[str | tuple[str, ...], BeforeValidator(_compressor)]
OptionalArgv = Annotated[tuple[str, ...], BeforeValidator(_argv)]


class Output(Table):
    """One time-ordered stream of capture files, written by one merge worker."""

    name: Name = Field(default="main", description="its name in metrics, sidecars and [[interface]] output")
    max_wait_ms: Milliseconds = Field(
        default=50, description="how long a packet may be held back for the sake of order; files wait for each other"
    )
    directory: SomePath = Field(
        default=Path("/var/lib/appliance"),
        description="work/ ready/ meta/ flows/ quarantine/ are made below it; must be this output's alone",
    )
    format: Literal["pcapng", "pcap", "pcap-us", "erf"] = Field(
        default="pcapng",
        description='"pcapng" (tells interfaces and losses), "pcap" (nanoseconds), "pcap-us" (microseconds) or "erf" '
        "(Ethernet, IP and HDLC; at most 65517 bytes of a packet)",
    )
    linktype: Literal["", "sll2"] = Field(
        default="", description='"" = as captured; "sll2" makes several link types one (Linux cooked capture v2)'
    )
    rotate_seconds: RotateSeconds = Field(
        default=60, description="a new file at every multiple of this many seconds, idle or not; 0 = never"
    )
    rotate_bytes: Annotated[int, zero_or_between(4096, 1 << 60)] = Field(
        default=GIB, description="a new file before this size is passed, before compression; 0 = never"
    )
    rotate_packets: Annotated[int, between(0, 1 << 60)] = Field(
        default=0, description="a new file after this many packets; 0 = never"
    )
    empty_segments: Literal["header", "skip"] = Field(
        default="header", description='files without packets are written ("header") or left out ("skip")'
    )
    compressor: Compressor = Field(
        default="lz4",
        description='"none", "lz4" (built in) or the argv of a program that compresses standard input to standard '
        'output, e.g. ["zstd", "-q", "-1"]',
    )
    compressor_timeout_s: Annotated[int, between(1, 3600)] = Field(
        default=60, description="a compressor that takes no byte or does not end for so long has failed"
    )
    direct_io: bool = Field(
        default=True,
        description='live packets at a high rate go to the disk past the page cache; only with compressor = "none"',
    )
    hook: OptionalArgv = Field(
        default=(),
        description="the argv of a program that is run after each publication, with the file's path behind it; without "
        "rights, one at a time; [] = none",
    )
    hook_timeout_s: Annotated[int, between(1, 3600)] = Field(
        default=60, description="a hook that has not ended after so long is ended"
    )
    close_write: bool = Field(
        default=False, description="each published file is opened and closed once more, for readers that wait for that"
    )
    cpus: Cpus = Field(default=(), strict=False, description="CPUs that the merge and its compressor run on; [] = any")
    group_readable: bool = Field(default=True, description="files have mode 0640; false = 0600")
    retain_bytes: Bytes = Field(default=0, description="oldest files go when all together are larger; 0 = unlimited")
    retain_seconds: Annotated[int, between(0, 1 << 40)] = Field(
        default=0, description="files go when their last packet is older; 0 = unlimited"
    )
    min_free_bytes: Bytes = Field(
        default=GIB, description="oldest files go when the file system has less left; 0 = never"
    )
