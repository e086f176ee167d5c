"""The configuration: its shape, its defaults, and the one place where it is checked.

The models are plain frozen values: `load` reads them from a TOML file, other programs of the package build them
directly. Whatever is wrong is reported at once, every fault with its key; nothing here looks at the machine (which
interfaces, programs and directories exist is the plan's and the doctor's matter), so a configuration can be checked
anywhere.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from appliance.capture import uri as capture_uri
from appliance.errors import ConfigError, MissingInputError, MissingPermissionError, UsageError

KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))
ERF_SNAPLEN = 65517  # formats.erf.SNAPLEN_MAX: the most of a packet that fits into an ERF record
MAX_SNAPLEN = 262144  # libpcap's MAXIMUM_SNAPLEN: more is refused by the readers
MIN_RING_BYTES = MIB  # the longest record must fit (RECORD_MAX_BYTES in ring/layout.h)
MAX_LABEL_CHARACTERS = 64
MAX_CAPTURE_FILTERS, MAX_CAPTURE_FILTER_BYTES = 16, 1024  # PORT_FILTERS, PORT_FILTER_TEXT_BYTES of ring/port.h
_MAX_SOCKET_PATH_BYTES = 107  # sun_path holds 108 with the final zero (sys/un.h)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}", re.ASCII)
_EXPORT_SCHEMES: dict[str, Literal["udp", "tcp", "tls"]] = {"udp": "udp", "tcp": "tcp", "tls": "tls"}
_FILE_ENDINGS = re.compile(r"(\.(gz|lz4|zst|xz|bz2|pcap|pcapng|cap|ntar|dmp|erf))+$", re.IGNORECASE)


# Kinds of values -----------------------------------------------------------------------------------------------------


def _between(low: int, high: int) -> AfterValidator:
    def check(value: int) -> int:
        if not low <= value <= high:
            raise ValueError(f"must be between {low} and {high}, is {value}")
        return value

    return AfterValidator(check)


def _zero_or_between(low: int, high: int) -> AfterValidator:
    def check(value: int) -> int:
        if value != 0 and not low <= value <= high:
            raise ValueError(f"must be 0 or between {low} and {high}, is {value}")
        return value

    return AfterValidator(check)


def _at_least_one(heading: str) -> AfterValidator:
    def check(tables: tuple[Any, ...]) -> tuple[Any, ...]:
        if not tables:
            raise ValueError(f"there must be at least one {heading}")
        return tables

    return AfterValidator(check)


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"must be 1 to 64 of A-Z a-z 0-9 _ . -, beginning with a letter, a digit or _, is {value!r}")
    return value


def _label(value: str) -> str:
    return _name(value) if value else value


def _printable(value: str) -> str:
    if not value.replace("\n", " ").replace("\t", " ").isprintable() or len(value) > 4096:
        raise ValueError("must be printable text of at most 4096 characters")
    return value


def _short(value: str) -> str:
    if len(value.encode()) > MAX_CAPTURE_FILTER_BYTES:
        raise ValueError(f"must have at most {MAX_CAPTURE_FILTER_BYTES} bytes")
    return value


def _at_most_filters(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(values) > MAX_CAPTURE_FILTERS:
        raise ValueError(f"there can be {MAX_CAPTURE_FILTERS} filters, not {len(values)}")
    return values


def _path(value: object) -> object:
    if isinstance(value, str):
        if not value or "\0" in value:
            raise ValueError("must be a path")
        return Path(value)
    return value


def _path_or_nothing(value: object) -> object:
    return None if value == "" else _path(value)


def _socket_path(value: Path | None) -> Path | None:
    if value is not None and len(os.fsencode(value)) > _MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"must be at most {_MAX_SOCKET_PATH_BYTES} bytes long: a unix socket's address holds no more")
    return value


def _compressor(value: object) -> object:
    """A list of strings becomes a tuple; TOML has no other way to write an argv."""
    if value in ("none", "lz4"):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(word, str) and "\0" not in word for word in value):
        argv = tuple(value)
        if argv[0]:
            return argv
    raise ValueError(f'must be "none", "lz4" or a list of strings such as ["zstd", "-q", "-1"], is {_shown(value)}')


def _capture_uri(value: str) -> str:
    try:
        capture_uri.parse(value)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return value


def _argv(value: object) -> object:
    """A list of strings becomes a tuple."""
    if isinstance(value, list | tuple) and all(isinstance(word, str) and "\0" not in word for word in value):
        argv = tuple(value)
        if not argv or argv[0]:
            return argv
    raise ValueError(f'must be a list of strings such as ["/usr/local/bin/notify", "-q"], is {_shown(value)}')


def _export_uri(value: str) -> str:
    parse_destination(value)
    return value


def _listen(value: str) -> str:
    if value:
        parse_address(value)
    return value


CaptureFilter = Annotated[str, AfterValidator(_printable), AfterValidator(_short)]
Seconds = Annotated[int, _between(1, 86400)]
Milliseconds = Annotated[int, _between(1, 60_000)]
Bytes = Annotated[int, _between(0, 1 << 60)]
RotateSeconds = Annotated[int, _zero_or_between(1, 7 * 86400)]
RingBytes = Annotated[int, _zero_or_between(MIN_RING_BYTES, TIB)]
OptionalPath = Annotated[Path | None, BeforeValidator(_path_or_nothing)]
Cpus = tuple[Annotated[int, _between(0, 8191), Field(strict=True)], ...]


@dataclass(frozen=True)
class Destination:
    """Where flow records go. `path` is set for files only (None: below the state directory), host and port else."""

    scheme: Literal["udp", "tcp", "tls", "file"]
    host: str = ""
    port: int = 0
    path: Path | None = None


def parse_destination(text: str) -> Destination:
    """`udp://HOST:PORT`, `tcp://...`, `tls://...`, `file:` or `file:DIRECTORY`; ValueError says what is wrong."""
    if text.startswith("file:"):
        path = text.removeprefix("file:")
        if "\0" in path:
            raise ValueError(f"{text!r} holds a zero byte")
        return Destination("file", path=Path(path) if path else None)
    scheme, separator, address = text.partition("://")
    if scheme in ("dtls", "sctp"):
        raise ValueError(f"{scheme}:// is not supported; flow records go to udp:// tcp:// tls:// file:")
    if not separator or scheme not in _EXPORT_SCHEMES:
        raise ValueError(
            f"must be udp://HOST:PORT, tcp://HOST:PORT, tls://HOST:PORT, file: or file:DIRECTORY, is {text!r}"
        )
    host, port = parse_address(address)
    if port == 0:
        raise ValueError(f"{text!r} names no port")
    return Destination(_EXPORT_SCHEMES[scheme], host=host, port=port)


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[IPV6]:PORT` -> (host, port); ValueError says what is wrong."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"must be HOST:PORT or [IPV6]:PORT, is {text!r} ({error})") from None
    if not host or port is None or parts.netloc != text or parts.username is not None:
        raise ValueError(f"must be HOST:PORT or [IPV6]:PORT, is {text!r}")
    return host, port


# The shape -----------------------------------------------------------------------------------------------------------


class _Table(BaseModel):
    # No defaults are validated, no strings taken for numbers: what stands in the file is what counts.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_by_name=True, validate_by_alias=True)


class RecordingTrigger(_Table):
    """From which packet to which one an interface is recorded."""

    start: Literal["on", "filter", "fcserr", "plderr"] = Field(
        default="on",
        description='recorded from the first packet on ("on"), or from one that matches start_filter ("filter"), has a '
        'wrong check sequence ("fcserr": needs rx-fcs) or a wrong checksum ("plderr")',
    )
    start_filter: CaptureFilter = Field(default="", description="BPF filter")
    stop: Literal["userstop", "filter", "fcserr", "plderr"] = Field(
        default="userstop", description='recorded to the end ("userstop"), or up to such a packet, which is the last'
    )
    stop_filter: CaptureFilter = Field(default="", description="BPF filter")
    repeat: bool = Field(default=True, description='after a stop, start can be met again (not "on")')


class RecordingKeep(_Table):
    """Which of those packets are recorded."""

    kind: Literal["all", "filter", "tpld", "notpld", "fcserr", "plderr"] = Field(
        default="all",
        description='"all", those that match filter ("filter"), with our test payload of one stream ("tpld") or with '
        'none ("notpld"), with a wrong check sequence ("fcserr") or a wrong checksum ("plderr")',
    )
    filter: CaptureFilter = Field(default="", description="BPF filter")
    stream: Annotated[int, _between(0, (1 << 32) - 1)] = Field(default=0, description='the stream of "tpld"')


class Interface(_Table):
    """One source of packets, read by `fanout` capture workers."""

    uri: Annotated[str, AfterValidator(_capture_uri)] = Field(
        description="where packets come from: ring:IF (fast, Linux), ring:* (every interface that is up, without "
        "bridge ports and container veths), pcap:IF or int:IF (through libpcap), or a file: pcapfile:PATH, "
        "pcapng:PATH, erf:PATH (what it is, its content tells), legacyeth:, legacypos:, legacyatm:, tsh:, fr+:"
    )
    label: Annotated[str, AfterValidator(_label)] = Field(
        default="", description='its name in files, metrics and messages; "" = from the uri'
    )
    filter: Annotated[str, AfterValidator(_printable)] = Field(
        default="", description='BPF filter, as for tcpdump; "" = every packet'
    )
    snaplen: Annotated[int, _between(64, MAX_SNAPLEN)] = Field(
        default=MAX_SNAPLEN, description="bytes kept of each packet; the original length is always recorded"
    )
    promiscuous: bool = Field(default=True, description="also take frames that are addressed to others")
    ring_bytes: RingBytes = Field(
        default=0, description="shared memory between capture and merge; 0 = a share of memory_bytes"
    )
    kernel_ring_bytes: Annotated[int, _between(MIB, 16 * GIB)] = Field(
        default=64 * MIB, description="the kernel's own ring (ring: only); locked memory, not part of memory_bytes"
    )
    block_timeout_ms: Annotated[int, _zero_or_between(1, 1000)] = Field(
        default=0,
        description="the kernel hands over a block that is not full after this long (ring: only); 0 = 8, and more for "
        "more than four capture workers, up to 24",
    )
    reorder_us: Annotated[int, _between(0, 1_000_000)] = Field(
        default=1000, description="disorder between receive CPUs that is put right; what is later is counted as late"
    )
    fanout: Annotated[int, _between(1, 64)] = Field(default=1, description="capture workers (ring: only)")
    cpus: Cpus = Field(
        default=(),
        strict=False,
        description="CPUs that the capture workers run on, and whose memory their rings take; [] = any",
    )
    speed: Literal["full", "recorded"] = Field(
        default="full", description='files only: as fast as it goes, or "recorded" = with the pauses of the recording'
    )
    output: Annotated[str, AfterValidator(_name)] = Field(
        default="main", description="the name of the [[output]] that records it"
    )
    capture_buffer_bytes: Annotated[int, _zero_or_between(64 * KIB, 4 * GIB)] = Field(
        default=16 * MIB,
        description="port capture (ring: only): memory for captured packets, taken when one is started; 0 = none",
    )
    capture_filters: Annotated[tuple[CaptureFilter, ...], AfterValidator(_at_most_filters)] = Field(
        default=(), strict=False, description="port capture: BPF filters that triggers and keep rules name by index"
    )

    trigger: RecordingTrigger = RecordingTrigger()
    keep: RecordingKeep = RecordingKeep()

    @property
    def gates_recording(self) -> bool:
        """Whether triggers or keep rules leave packets out of the recording."""
        return self.trigger != RecordingTrigger() or self.keep != RecordingKeep()

    @property
    def source(self) -> capture_uri.Uri:
        return capture_uri.parse(self.uri)


class Output(_Table):
    """One time-ordered stream of capture files, written by one merge worker."""

    name: Annotated[str, AfterValidator(_name)] = Field(
        default="main", description="its name in metrics, sidecars and [[interface]] output"
    )
    max_wait_ms: Milliseconds = Field(
        default=50, description="how long a packet may be held back for the sake of order; files wait for each other"
    )
    directory: Annotated[Path, BeforeValidator(_path)] = Field(
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
    rotate_bytes: Annotated[int, _zero_or_between(4096, 1 << 60)] = Field(
        default=GIB, description="a new file before this size is passed, before compression; 0 = never"
    )
    rotate_packets: Annotated[int, _between(0, 1 << 60)] = Field(
        default=0, description="a new file after this many packets; 0 = never"
    )
    empty_segments: Literal["header", "skip"] = Field(
        default="header", description='files without packets are written ("header") or left out ("skip")'
    )
    compressor: Annotated[str | tuple[str, ...], BeforeValidator(_compressor)] = Field(
        default="lz4",
        description='"none", "lz4" (built in) or the argv of a program that compresses standard input to standard '
        'output, e.g. ["zstd", "-q", "-1"]',
    )
    compressor_timeout_s: Annotated[int, _between(1, 3600)] = Field(
        default=60, description="a compressor that takes no byte or does not end for so long has failed"
    )
    hook: Annotated[tuple[str, ...], BeforeValidator(_argv)] = Field(
        default=(),
        description="the argv of a program that is run after each publication, with the file's path behind it; without "
        "rights, one at a time; [] = none",
    )
    hook_timeout_s: Annotated[int, _between(1, 3600)] = Field(
        default=60, description="a hook that has not ended after so long is ended"
    )
    close_write: bool = Field(
        default=False, description="each published file is opened and closed once more, for readers that wait for that"
    )
    cpus: Cpus = Field(default=(), strict=False, description="CPUs that the merge and its compressor run on; [] = any")
    group_readable: bool = Field(default=True, description="files have mode 0640; false = 0600")
    retain_bytes: Bytes = Field(default=0, description="oldest files go when all together are larger; 0 = unlimited")
    retain_seconds: Annotated[int, _between(0, 1 << 40)] = Field(
        default=0, description="files go when their last packet is older; 0 = unlimited"
    )
    min_free_bytes: Bytes = Field(
        default=GIB, description="oldest files go when the file system has less left; 0 = never"
    )


class MeterExport(_Table):
    """One destination of flow records."""

    uri: Annotated[str, AfterValidator(_export_uri)] = Field(
        description="udp://HOST:PORT, tcp://HOST:PORT, tls://HOST:PORT, file: (flows/ below the meter's directory) or "
        "file:DIRECTORY"
    )
    template_refresh_s: Seconds = Field(default=60, description="udp:// only: templates are sent again after this long")
    template_refresh_messages: Annotated[int, _between(0, 1_000_000)] = Field(
        default=1000, description="udp:// only: ... or after this many messages; 0 = by time alone"
    )
    mtu_bytes: Annotated[int, _between(512, 65535)] = Field(
        default=1400, description="longest message; over udp:// never longer than the path takes"
    )
    domain: Annotated[int, _between(0, (1 << 32) - 1)] = Field(default=1, description="observation domain ID")
    biflow: bool = Field(
        default=True, description="both directions in one record (RFC 5103); false = one record for each direction"
    )
    rotate_seconds: RotateSeconds = Field(
        default=60, description="file: only: a new file at every multiple of this many seconds; 0 = never"
    )
    tls_ca: OptionalPath = Field(
        default=None,
        description='tls:// only: the authorities that the collector\'s certificate must come from (PEM); "" = the '
        "system's",
    )
    tls_certificate: OptionalPath = Field(
        default=None, description='tls:// only: our certificate, for collectors that ask for one (PEM); "" = none'
    )
    tls_key: OptionalPath = Field(
        default=None, description='tls:// only: the key of tls_certificate (PEM); "" = in the same file'
    )
    tls_name: Annotated[str, AfterValidator(_printable)] = Field(
        default="", description='tls:// only: the name that the collector\'s certificate must hold; "" = HOST'
    )

    @property
    def destination(self) -> Destination:
        return parse_destination(self.uri)


class Meter(_Table):
    """The flow meter: all interfaces, one flow table."""

    enabled: bool = Field(default=True, description="meter flows at all")
    directory: OptionalPath = Field(
        default=None, description='flows/ is made below it; "" = the directory of the first [[output]]'
    )
    idle_timeout_s: Seconds = Field(default=30, description="a flow ends after this long without a packet")
    active_timeout_s: Seconds = Field(default=300, description="a flow that goes on is reported this often")
    max_flows: Annotated[int, _between(64, 100_000_000)] = Field(
        default=1_000_000, description="flows in the table; when it is full the one idle for longest is exported early"
    )
    vlan_in_key: bool = Field(
        default=True, description="packets of different VLANs are different flows; false = they may be one flow"
    )
    interface_in_key: bool = Field(
        default=False,
        description="packets of different interfaces are different flows; false = both halves of a tap meet in one",
    )
    tcp_analysis: bool = Field(
        default=True,
        description="count repeats, disorder, losses, stalls and round trips of TCP; 256 bytes more for each flow",
    )
    packet_sampling: Annotated[int, _between(1, 1_000_000)] = Field(
        default=1, description="one packet of so many is metered, and tcp_analysis is off; 1 = all"
    )
    flow_sampling: Annotated[int, _between(1, 1_000_000)] = Field(
        default=1, description="one flow of so many is metered; 1 = all"
    )
    packet_sequence: Annotated[int, _between(0, 20)] = Field(
        default=0,
        description="of so many first packets of a flow: times, lengths, directions, TCP flags, in a record beside",
    )
    max_fragmented: Annotated[int, _between(0, 1 << 24)] = Field(
        default=65_536,
        description="datagrams in fragments at once, whose later fragments get the ports of the first (64 bytes each); "
        "0 = they have none",
    )
    fragment_timeout_s: Seconds = Field(
        default=30, description="a datagram in fragments is forgotten this long after the last of them"
    )
    zero_length: Literal["field", "frame"] = Field(
        default="field",
        description='IP octets of a packet whose length field is 0 (BIG TCP, other offloads): "field" = 0 (IPv6: 40), '
        '"frame" = what its frame held',
    )
    tunnels: Literal["outer", "inner"] = Field(
        default="outer",
        description='the flow of a packet in a tunnel: "outer" = that of the tunnel, "inner" = that of the packet '
        "inside, as far as it can be read",
    )
    elements: tuple[Annotated[str, AfterValidator(_printable)], ...] = Field(
        default=(),
        strict=False,
        description="elements of your own in every flow record, each NAME(ENTERPRISE/NUMBER)<TYPE> = a field of the "
        'flow table or a constant, e.g. ["siteNumber(99999/1)<unsigned16> = 7", '
        "\"siteName(99999/2)<string> = 'north'\", "
        '"longestPacket(99999/3)<unsigned16> = forward.max_length"]',
    )
    cpus: Cpus = Field(default=(), strict=False, description="CPUs that the meter runs on; [] = any")
    exports: tuple[MeterExport, ...] = Field(default=(), validation_alias="export", strict=False)


class Traceflow(_Table):
    """TCP flow traces of the running service: one file for each flow; see `appliance trace` for those of files."""

    enabled: bool = Field(default=False, description="write each TCP flow into a file of its own as well")
    directory: OptionalPath = Field(
        default=None,
        description='work/ and ready/ are made below it; "" = traces/ in the directory of the first [[output]]',
    )
    interfaces: tuple[str, ...] = Field(
        default=(), strict=False, description="labels of the interfaces whose packets are traced; [] = all"
    )
    format: Literal["pcap", "json", "plist", "tree"] = Field(
        default="pcap",
        description='"pcap" (nanoseconds), or "json", "plist", "tree", which cost much more time for each packet',
    )
    bidirectional: bool = Field(default=False, description="both directions of a connection are one flow")
    idle_timeout_s: Annotated[int, _between(0, 86400)] = Field(
        default=300, description="a flow ends after this long without a packet; 0 = never"
    )
    linger_s: Annotated[int, _between(0, 86400)] = Field(
        default=60, description="what comes this long behind FIN or RST is still the flow's; 0 = for ever"
    )
    max_flows: Annotated[int, _between(1, 10_000_000)] = Field(
        default=100_000, description="flows in memory at once; beyond it the one longest without a packet ends early"
    )
    buffer_bytes: Annotated[int, _between(64 * KIB, 64 * GIB)] = Field(
        default=64 * MIB, description="memory for packets that wait to be written, all flows together"
    )
    ring_bytes: RingBytes = Field(
        default=0, description="shared memory between each output's merge and the traces; 0 = a share of memory_bytes"
    )
    max_flow_bytes: Annotated[int, _zero_or_between(KIB, 1 << 60)] = Field(
        default=64 * MIB, description="a flow's file holds its first packets up to this size; 0 = all"
    )
    retain_bytes: Annotated[int, _between(MIB, 1 << 60)] = Field(
        default=GIB, description="oldest files go when all together are larger, the unfinished ones included"
    )
    retain_files: Annotated[int, _between(1, 100_000_000)] = Field(
        default=100_000, description="oldest files go when there are more"
    )
    retain_seconds: Annotated[int, _between(0, 1 << 40)] = Field(
        default=0, description="files go so long after they were finished; 0 = unlimited"
    )
    min_free_bytes: Bytes = Field(
        default=GIB,
        description="oldest files go, then packets are left out, when the file system has less left; 0 = never",
    )
    tunnels: Literal["outer", "inner"] = Field(
        default="outer", description='TCP in a tunnel: "outer" = not looked for, "inner" = of the innermost IP packet'
    )
    cpus: Cpus = Field(default=(), strict=False, description="CPUs that the traces' worker runs on; [] = any")


class Monitor(_Table):
    """Metrics, status page, control socket."""

    listen: Annotated[str, AfterValidator(_listen)] = Field(
        default="127.0.0.1:9750", description='HOST:PORT of /metrics, /healthz and the status page; "" = none'
    )
    control_socket: Annotated[OptionalPath, AfterValidator(_socket_path)] = Field(
        default=Path("/run/appliance/control.sock"),
        description='unix socket of `appliance status` and `rotate`; "" = none',
    )

    @property
    def address(self) -> tuple[str, int] | None:
        return parse_address(self.listen) if self.listen else None


class Service(_Table):
    """How the processes are run."""

    user: Annotated[str, AfterValidator(_label)] = Field(
        default="", description='run as this user when started as root; "" = keep the user, drop the capabilities'
    )
    restart_limit: Annotated[int, _between(0, 1000)] = Field(
        default=5, description="a worker that ends more often than this within restart_window_s ends the service"
    )
    restart_window_s: Seconds = Field(default=60, description="see restart_limit")
    drain_timeout_s: Annotated[int, _between(1, 600)] = Field(
        default=10, description="how long the workers have to write what they hold when the service stops"
    )
    heartbeat_timeout_s: Annotated[int, _between(1, 600)] = Field(
        default=5, description="a worker that shows no sign of life for so long is restarted"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description='least severity that is logged: "debug", "info", "warning", "error"'
    )


class Config(_Table):
    """The whole configuration. Inside it every interface but ring:* has a label, and the cross checks below hold."""

    memory_bytes: Annotated[int, _zero_or_between(8 * MIB, TIB)] = Field(
        default=0, description="all rings together; 0 = an eighth of the machine or cgroup, at most 1 GiB"
    )
    interfaces: Annotated[tuple[Interface, ...], _at_least_one("[[interface]]")] = Field(
        validation_alias="interface", strict=False
    )
    outputs: Annotated[tuple[Output, ...], _at_least_one("[[output]]")] = Field(
        default=(Output(),), validation_alias="output", strict=False
    )
    meter: Meter = Meter()
    traceflow: Traceflow = Traceflow()
    monitor: Monitor = Monitor()
    service: Service = Service()

    @field_validator("interfaces")
    @classmethod
    def _label_interfaces(cls, interfaces: tuple[Interface, ...]) -> tuple[Interface, ...]:
        """Labels that were not given are made from the URIs, and differ from all others; ring:* has none."""
        taken = {interface.label for interface in interfaces if interface.label}
        labelled = []
        for interface in interfaces:
            if not interface.label and not interface.source.is_every_interface:
                label = _free_label(_derived_label(interface.source), taken)
                taken.add(label)
                interface = interface.model_copy(update={"label": label})
            labelled.append(interface)
        return tuple(labelled)

    @model_validator(mode="after")
    def _cross_check(self, info: ValidationInfo) -> Config:
        already_faulty: frozenset[str] = (info.context or {}).get("faulty", frozenset())
        faults = [
            fault
            for fields, check in _CROSS_CHECKS
            if not any(field == bad or field.startswith(f"{bad}.") for field in fields for bad in already_faulty)
            for fault in check(self)
        ]
        if faults:
            raise _CrossFaultsError(faults)
        return self

    def output_of(self, interface: Interface) -> Output:
        return next(output for output in self.outputs if output.name == interface.output)

    def interfaces_of(self, output: Output) -> tuple[Interface, ...]:
        return tuple(interface for interface in self.interfaces if interface.output == output.name)

    @property
    def flows_directory(self) -> Path:
        """Where `file:` without a directory puts its flow files."""
        return (self.meter.directory or self.outputs[0].directory) / "flows"

    @property
    def traces_directory(self) -> Path:
        return self.traceflow.directory or self.outputs[0].directory / "traces"


def _derived_label(source: capture_uri.Uri) -> str:
    if source.target == "-":
        return "stdin"
    text = source.target if source.is_live else _FILE_ENDINGS.sub("", os.path.basename(source.target))
    text = re.sub(r"[^A-Za-z0-9_.\-]", "_", text)[:MAX_LABEL_CHARACTERS].lstrip(".-")
    return text or "file"


def _free_label(label: str, taken: set[str]) -> str:
    candidate, number = label, 2
    while candidate in taken:
        suffix = f"-{number}"
        candidate, number = label[: MAX_LABEL_CHARACTERS - len(suffix)] + suffix, number + 1
    return candidate


# What several keys must hold together --------------------------------------------------------------------------------

Fault = tuple[str, str]  # (key, what is wrong with it)


class _CrossFaultsError(ValueError):
    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in faults))
        self.faults = faults


def _repeated(values: Iterable[object]) -> Iterator[tuple[int, int]]:
    """(index, index of the first equal value) for every value that was there before."""
    first: dict[object, int] = {}
    for i, value in enumerate(values):
        if value in first:
            yield i, first[value]
        else:
            first[value] = i


def _outputs_have_their_own_name(config: Config) -> Iterator[Fault]:
    for i, j in _repeated(output.name for output in config.outputs):
        yield f"output[{i}].name", f"output[{j}] is called {config.outputs[i].name!r} too"


def _outputs_have_their_own_directory(config: Config) -> Iterator[Fault]:
    # Salvage at the start and retention take all that lies in a directory for their own.
    for i, j in _repeated(os.path.abspath(output.directory) for output in config.outputs):
        yield f"output[{i}].directory", f"output[{j}] has {str(config.outputs[i].directory)!r} too; each needs its own"


def _interfaces_have_their_own_label(config: Config) -> Iterator[Fault]:
    for i, j in _repeated(interface.label or id(interface) for interface in config.interfaces):
        yield f"interface[{i}].label", f"interface[{j}] is called {config.interfaces[i].label!r} too"


def _every_output_exists_and_is_used(config: Config) -> Iterator[Fault]:
    names = [output.name for output in config.outputs]
    for i, interface in enumerate(config.interfaces):
        if interface.output not in names:
            known = ", ".join(names)
            yield f"interface[{i}].output", f"there is no [[output]] called {interface.output!r}, only {known}"
    used = {interface.output for interface in config.interfaces}
    if not used <= set(names):
        return  # the name that is unused is likely the one that was meant
    for i, name in enumerate(names):
        if name not in used:
            yield f"output[{i}].name", f'no interface has output = "{name}"'


def _an_output_has_one_clock(config: Config) -> Iterator[Fault]:
    first: dict[str, Interface] = {}
    for i, interface in enumerate(config.interfaces):
        other = first.setdefault(interface.output, interface)
        if other.source.is_live != interface.source.is_live:
            pair = f"{interface.uri} and {other.uri}"
            yield f"interface[{i}].uri", f"{pair} need different outputs: a file's clock is not the host's"


def _a_meter_has_one_clock(config: Config) -> Iterator[Fault]:
    domains = {interface.source.is_live for interface in config.interfaces}
    if config.meter.enabled and len(domains) > 1:
        yield "meter.enabled", "files and live interfaces cannot be metered together: a file's clock is not the host's"


def _traces_have_one_clock_and_their_interfaces(config: Config) -> Iterator[Fault]:
    if not config.traceflow.enabled:
        return
    labels = [interface.label for interface in config.interfaces]
    for i, label in enumerate(config.traceflow.interfaces):
        if label not in labels and all(labels):
            yield f"traceflow.interfaces[{i}]", f"no interface is called {label!r}, only {', '.join(labels)}"
    if len({interface.source.is_live for interface in config.interfaces}) > 1:
        yield (
            "traceflow.enabled",
            "files and live interfaces cannot be traced together: a file's clock is not the host's",
        )


def _keys_fit_the_kind_of_source(config: Config) -> Iterator[Fault]:
    for i, interface in enumerate(config.interfaces):
        if interface.fanout > 1 and interface.source.scheme != "ring":
            yield f"interface[{i}].fanout", f"only ring: can have several workers, not {interface.uri}"
        if interface.speed != "full" and interface.source.is_live:
            yield f"interface[{i}].speed", f"only a file can be replayed, not {interface.uri}"
        if interface.gates_recording and interface.source.scheme != "ring":
            yield f"interface[{i}].trigger", f"only a ring: source is recorded by triggers, not {interface.uri}"
        if interface.trigger != RecordingTrigger() and interface.fanout > 1:
            yield f"interface[{i}].trigger", "a trigger needs all packets in one worker: fanout must be 1"
        if interface.source.is_every_interface and interface.label:
            yield f"interface[{i}].label", f"{interface.uri} stands for several; each is called by its own name"


def _criteria_have_their_filters(config: Config) -> Iterator[Fault]:
    for i, interface in enumerate(config.interfaces):
        for table, criterion, key in (
            ("trigger", interface.trigger.start, "start_filter"),
            ("trigger", interface.trigger.stop, "stop_filter"),
            ("keep", interface.keep.kind, "filter"),
        ):
            expression = getattr(getattr(interface, table), key)
            if (criterion == "filter") != bool(expression):
                missing = "is missing" if criterion == "filter" else f'is given, and the criterion is "{criterion}"'
                yield f"interface[{i}].{table}.{key}", missing


def _sources_can_be_taken_once(config: Config) -> Iterator[Fault]:
    sources = [interface.source for interface in config.interfaces]
    for what, matches in (
        ("every interface", [i for i, source in enumerate(sources) if source.is_every_interface]),
        ("standard input", [i for i, source in enumerate(sources) if not source.is_live and source.target == "-"]),
    ):
        for i in matches[1:]:
            yield f"interface[{i}].uri", f"interface[{matches[0]}] takes {what} already"


# The fields that a check reads come with it: while one of those is itself at fault, the check would only add noise.
_CROSS_CHECKS: tuple[tuple[tuple[str, ...], Callable[[Config], Iterator[Fault]]], ...] = (
    (("output.name",), _outputs_have_their_own_name),
    (("output.directory",), _outputs_have_their_own_directory),
    (("interface.label",), _interfaces_have_their_own_label),
    (("interface.output", "output.name"), _every_output_exists_and_is_used),
    (("interface.uri", "interface.output"), _an_output_has_one_clock),
    (("interface.uri", "meter.enabled"), _a_meter_has_one_clock),
    (("interface.uri", "interface.label", "traceflow"), _traces_have_one_clock_and_their_interfaces),
    (("interface.uri", "interface.fanout", "interface.speed", "interface.label"), _keys_fit_the_kind_of_source),
    (("interface.trigger", "interface.keep"), _criteria_have_their_filters),
    (("interface.uri",), _sources_can_be_taken_once),
)


# Reading -------------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Config:
    """The configuration in a TOML file.

    MissingInputError: there is no such file. MissingPermissionError: it may not be read. ConfigError: it is wrong;
    the message lists every fault on a line of its own.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            tables = tomllib.load(file)
    except FileNotFoundError:
        raise MissingInputError(f"{name}: there is no such configuration file") from None
    except PermissionError:
        raise MissingPermissionError(f"{name}: may not be read by user {os.geteuid()}; check its mode") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: is not TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text: byte {error.start}: {error.reason}") from None
    return parse(tables, name)


def parse(tables: Mapping[str, Any], origin: str = "configuration") -> Config:
    """The configuration in tables as `tomllib` reads them. ConfigError lists every fault with its key."""
    try:
        return Config.model_validate(dict(tables), by_name=False, by_alias=True)
    except ValidationError as error:
        faults = list(_faults(error))
        faults += _cross_faults_of_the_rest(tables, error)
    lines = "\n".join(f"  {key}: {text}" if key else f"  {text}" for key, text in faults)
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise ConfigError(f"{origin}: {count}\n{lines}")


def _cross_faults_of_the_rest(tables: Mapping[str, Any], error: ValidationError) -> list[Fault]:
    """Pydantic stops before the cross checks when a single key is wrong: look again without the wrong ones."""
    rest = copy.deepcopy(dict(tables))
    faulty = set()
    for detail in error.errors():
        if not detail["loc"]:
            return []  # the cross checks have spoken already
        _take_out(rest, detail["loc"])
        faulty.add(".".join(part for part in detail["loc"] if isinstance(part, str)))
    try:
        Config.model_validate(rest, by_name=False, by_alias=True, context={"faulty": frozenset(faulty)})
    except ValidationError as second:
        return [fault for detail in second.errors() for fault in _details_cross_faults(detail)]
    return []


def _take_out(tables: dict[str, Any], location: tuple[int | str, ...]) -> None:
    *parents, last = location
    table: Any = tables
    try:
        for part in parents:
            table = table[part]
        if isinstance(last, int):
            table[last] = {"uri": "ring:*"}  # keeps the numbers of the others; checks of "uri" are off then
        elif last == "uri":
            table[last] = "file:" if "export" in parents else "ring:*"
        else:
            table.pop(last, None)
    except (KeyError, IndexError, TypeError, AttributeError):
        return  # its parent went before


def _faults(error: ValidationError) -> Iterator[Fault]:
    for detail in error.errors():
        if not detail["loc"]:
            yield from _details_cross_faults(detail)
        else:
            yield _key(detail["loc"]), _wording(detail)


def _details_cross_faults(detail: Mapping[str, Any]) -> Sequence[Fault]:
    cause = detail.get("ctx", {}).get("error")
    return cause.faults if isinstance(cause, _CrossFaultsError) else []


def _key(location: Iterable[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _wording(detail: Mapping[str, Any]) -> str:
    """What is wrong, in words that fit every key; `detail` is one of ValidationError.errors()."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    names = {"int_type": "a whole number", "bool_type": "true or false", "string_type": 'text in "quotes"'}
    if kind == "missing":
        return "is missing" if detail["loc"][-1] != "interface" else "there must be at least one [[interface]]"
    if kind == "extra_forbidden":
        return _unknown_key(detail["loc"])
    if kind in names:
        return f"must be {names[kind]}, is {_shown(value)}"
    if kind == "literal_error":
        return f"must be {context['expected']}, is {_shown(value)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a table, is {_shown(value)}"
    if kind == "tuple_type":
        return f"must be a list of tables, written [[{detail['loc'][-1]}]], is {_shown(value)}"
    if kind == "value_error":
        return str(context["error"])
    return str(detail["msg"])


def _unknown_key(location: tuple[int | str, ...]) -> str:
    name = str(location[-1])
    section = ".".join(part for part in location[:-1] if isinstance(part, str))
    by_section = {section: [key.name for key in keys() if key.section == section] for section in _SECTIONS}
    own = by_section[section] + [s.rpartition(".")[2] for s in _SECTIONS if s and s.rpartition(".")[0] == section]
    homes = [other for other, names in by_section.items() if name in names]
    if homes:
        return f"unknown key here; it belongs into {' or '.join(_heading(home) for home in homes)}"
    near = difflib.get_close_matches(name, own, n=1)
    if near:
        return f"unknown key; did you mean {near[0]!r}?"
    return "unknown key"


def _shown(value: object) -> str:
    text = repr(value)
    if isinstance(value, bool):
        text = text.lower()
    return text if len(text) <= 80 else text[:77] + "..."


# Telling ------------------------------------------------------------------------------------------------------------

_SECTIONS: dict[str, tuple[type[_Table], bool]] = {  # section: (its shape, whether it can be there several times)
    "": (Config, False),
    "interface": (Interface, True),
    "interface.trigger": (RecordingTrigger, False),
    "interface.keep": (RecordingKeep, False),
    "output": (Output, True),
    "meter": (Meter, False),
    "meter.export": (MeterExport, True),
    "traceflow": (Traceflow, False),
    "monitor": (Monitor, False),
    "service": (Service, False),
}


@dataclass(frozen=True)
class Key:
    """A key of the file. `default` is as in TOML ("" for no path); None: it must be given."""

    section: str
    name: str
    default: int | bool | str | None
    help: str


def keys() -> tuple[Key, ...]:
    """Every key that a configuration file can have, in the order of the file; tables are not keys."""
    return tuple(
        Key(section, name, _toml_default(field.get_default()), field.description)
        for section, (shape, _) in _SECTIONS.items()
        for name, field in shape.model_fields.items()
        if field.description
    )


def _toml_default(value: object) -> int | bool | str | None:
    if isinstance(value, int | str):
        return value
    return str(value) if isinstance(value, Path) else ("" if value is None else None)


def _heading(section: str) -> str:
    if not section:
        return "the top of the file"
    return f"[[{section}]]" if _SECTIONS[section][1] else f"[{section}]"


# Every interface ----------------------------------------------------------------------------------------------------


class HostInterface(Protocol):
    """What is asked of an interface of this host; appliance/capture/interfaces.py finds them."""

    @property
    def name(self) -> str: ...

    @property
    def left_out_because(self) -> str:
        """Why `ring:*` does not take it; "" when it does."""


def expand_interfaces(config: Config, host_interfaces: Iterable[HostInterface]) -> Config:
    """The same configuration with `ring:*` (or `pcap:*`, `int:*`) replaced by the interfaces that it stands for.

    Interfaces that have an [[interface]] of their own are left to it. MissingInputError: none is left.
    """
    wildcard = next((interface for interface in config.interfaces if interface.source.is_every_interface), None)
    if wildcard is None:
        return config
    own = {interface.source.target for interface in config.interfaces if interface.source.is_live}
    hosts = list(host_interfaces)
    found = [host.name for host in hosts if not host.left_out_because and host.name not in own]
    if not found:
        reasons = "; ".join(f"{host.name}: {host.left_out_because or 'has an [[interface]] already'}" for host in hosts)
        raise MissingInputError(f"{wildcard.uri} finds no interface to record ({reasons or 'this host has none'})")
    expanded: list[Interface] = []
    for interface in config.interfaces:
        if interface is wildcard:
            scheme = wildcard.source.scheme
            expanded += [wildcard.model_copy(update={"uri": f"{scheme}:{name}", "label": ""}) for name in found]
        else:
            expanded.append(interface)
    return Config(
        memory_bytes=config.memory_bytes,
        interfaces=tuple(expanded),
        outputs=config.outputs,
        meter=config.meter,
        traceflow=config.traceflow,
        monitor=config.monitor,
        service=config.service,
    )
