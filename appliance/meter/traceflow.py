"""TCP flow traces: one file and one index for each TCP flow, with the names and the meaning of pcapkit's TraceFlow.

>>> import tempfile
>>> flows = TraceFlow(fout=tempfile.mkdtemp(), format="json")
>>> def packet(index, **flags):
...     return Packet(protocol=1, index=index, frame=bytes(54), src="192.0.2.1", dst="192.0.2.2", srcport=40000,
...                   dstport=80, timestamp=1_700_000_000_000_000_000 + index, **flags)
>>> flows(packet(1, syn=True))
>>> flows(packet(2, fin=True))
>>> [(entry.label, entry.index) for entry in flows.index]
[('192.0.2.1_40000-192.0.2.2_80-1700000000.000000001', (1, 2))]

A flow is one direction by default, as in the original; `bidirectional=True` joins both. What is different is what was
wrong there: time stamps are whole nanoseconds; RST and time-outs end flows, and a port that is used again begins one;
what comes late for a closed flow is still its own; two flows of one label get two files; open files are bounded.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, ClassVar, Literal

from appliance.errors import CannotCreateError, InputOutputError
from appliance.meter import traceflow_formats as formats
from appliance.meter.traceflow_formats import Description, FlowFormat
from appliance.meter.traceflow_table import NONE, FlowFiles

__all__ = ["Buffer", "BufferID", "Dumper", "FormatWarning", "Index", "Packet", "TraceFlow", "flow_label"]

S = 1_000_000_000
FILE_MODE = 0o640
REASONS = ("idle", "closed", "reused", "evicted", "end")  # of traceflow_table: IDLE and so on
MAX_NAMES = 1_000_000  # of one label: more flows than that never begin at one moment

Address = str | ipaddress.IPv4Address | ipaddress.IPv6Address
BufferID = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int, ipaddress.IPv4Address | ipaddress.IPv6Address, int]
"""(src, srcport, dst, dstport): of a flow's first packet."""


class FormatWarning(UserWarning):
    """A format that nobody registered: its flows have labels and indexes, and no files."""


@dataclass(frozen=True, slots=True)
class Packet:
    """A TCP packet as `TraceFlow` takes it.

    `protocol` is the link type (1: Ethernet), `index` the frame's number, `frame` its bytes, or a mapping that the
    textual formats write as it is. `timestamp` is nanoseconds since 1970, or a Decimal of seconds; a float is refused,
    because it has lost digits already. With `seq` a repeated SYN is told from a port that is used again.
    """

    protocol: int
    index: int
    frame: bytes | Mapping[str, Any]
    src: Address
    dst: Address
    srcport: int
    dstport: int
    timestamp: int | Decimal
    syn: bool = False
    fin: bool = False
    rst: bool = False
    ack: bool = False
    seq: int | None = None
    wire_length: int | None = None

    @property
    def timestamp_ns(self) -> int:
        if isinstance(self.timestamp, Decimal):
            return int(self.timestamp * S)
        if isinstance(self.timestamp, bool) or not isinstance(self.timestamp, int):
            raise TypeError(
                f"timestamp {self.timestamp!r}: give whole nanoseconds, or a Decimal of seconds: a float loses digits"
            )
        return self.timestamp

    @property
    def flags(self) -> int:
        return self.fin | self.syn << 1 | self.rst << 2 | self.ack << 4


@dataclass(slots=True)
class Buffer:
    """An open flow: its dumper, its frame numbers so far, its label."""

    fpout: Any
    index: list[int]
    label: str
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Index:
    """A flow: its file (None: its format makes none), its frame numbers, its label."""

    fpout: str | None
    index: tuple[int, ...]
    label: str


class Dumper:
    """One flow's file; called with a packet, it appends it. Between the calls the file is whole, and may be closed."""

    format: ClassVar[FlowFormat] = formats.PCAP

    def __init__(self, fname: str, *, byteorder: str = sys.byteorder, nanosecond: bool = False) -> None:
        self.path = fname
        self.byteorder = byteorder
        self.nanosecond = nanosecond
        self._fd = -1

    def __call__(self, packet: Packet, name: str = "") -> None:
        self.append(self.entry(packet), packet.protocol)

    def entry(self, packet: Packet) -> bytes:
        if self.format.entry is not None:
            return self.format.entry(packet.index, _info(packet))
        if not isinstance(packet.frame, bytes):
            raise TypeError(f"frame {packet.index} is no bytes, and a pcap file holds nothing else")
        return formats.pcap_packet(
            packet.timestamp_ns,
            packet.frame,
            _wire_length(packet),
            nanoseconds=self.nanosecond,
            byteorder=self.byteorder,
        )

    def header(self, linktype: int) -> bytes:
        if self.format is formats.PCAP:
            return formats.pcap_file_header(linktype, nanoseconds=self.nanosecond, byteorder=self.byteorder)
        return self.format.header(linktype, self.nanosecond)

    def append(self, entries: bytes, linktype: int) -> None:
        try:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
            put(self._fd, self.format, entries, lambda: self.header(linktype))
        except OSError as error:
            raise InputOutputError(f"{self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Gives the descriptor back; the next packet opens the file again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class PcapDumper(Dumper):
    format = formats.PCAP


class JsonDumper(Dumper):
    format = formats.JSON


class PlistDumper(Dumper):
    format = formats.PLIST


class TreeDumper(Dumper):
    format = formats.TREE


class NoDumper(Dumper):
    """Of an unknown format: no file."""

    def __call__(self, packet: Packet, name: str = "") -> None:
        """Nothing."""


class TraceFlow:
    """See the module's text. `fout` is the directory, `./tmp` without one; `format` is pcap without one.

    Further than the original: `bidirectional`; `idle_timeout_s` and `linger_s` after which an open or a closed flow is
    over, in packet time, 0 for never; `max_flows` in memory at once; `max_open_files`.
    """

    __output__: ClassVar[dict[str, tuple[str | type, str | None, str | None]]] = {
        name: (__name__, cls, extension)
        for cls, extension, names in (
            ("PcapDumper", ".pcap", ("pcap", "cap")),
            ("PlistDumper", ".plist", ("plist", "xml")),
            ("JsonDumper", ".json", ("json",)),
            ("TreeDumper", ".txt", ("tree", "txt", "text")),
        )
        for name in names
    }

    def __init__(
        self,
        fout: str | None = None,
        format: str | None = None,
        byteorder: Literal["little", "big"] = sys.byteorder,
        nanosecond: bool = False,
        *,
        bidirectional: bool = False,
        idle_timeout_s: float = 300.0,
        linger_s: float = 60.0,
        max_flows: int = 1_000_000,
        max_open_files: int = 256,
    ) -> None:
        self._directory = fout or "./tmp"
        self._dumper, self._extension = self.make_fout(self._directory, format or "pcap")
        self._byteorder = byteorder
        self._nanosecond = nanosecond
        self._max_open_files = max(1, max_open_files)
        self._buffer: dict[BufferID, Buffer] = {}  # the open flows
        self._stream: list[Index] = []  # the finished ones
        self._slots: dict[int, tuple[BufferID, Buffer]] = {}  # open, or closed and lingering
        self._closed: dict[int, int] = {}  # slot -> its place in _stream
        self._open: OrderedDict[int, Any] = OrderedDict()  # dumpers with a descriptor, longest unused first
        self._table = FlowFiles(
            write=_nothing,
            ended=self._ended,
            content=NONE,
            bidirectional=bidirectional,
            idle_timeout_ns=int(idle_timeout_s * S),
            linger_ns=int(linger_s * S),
            max_flows=max_flows,
        )

    @classmethod
    def register(cls, format: str, module: str | type, class_: str | None = None, ext: str | None = None) -> None:
        """A further format: `register("ndjson", "my.module", "MyDumper", ".ndjson")`, or the class itself instead of
        module and name. A dumper is made with its file's name, and called with `(frame, name="Frame 7")`."""
        if isinstance(module, str) and class_ is None:
            raise TypeError(f"format {format!r}: name the class in {module} too")
        cls.__output__ = {**cls.__output__, format.lower(): (module, class_, ext)}

    @classmethod
    def make_fout(cls, fout: str = "./tmp", format: str = "pcap") -> tuple[type, str | None]:
        """The class of a format's dumpers and the extension of its files; the directory `fout` is made."""
        module, name, extension = cls.__output__.get(format.lower(), (NoDumper, None, None))
        if module is NoDumper:
            known = " ".join(sorted(cls.__output__))
            warnings.warn(f"unknown format {format!r}: no files are made; known are {known}", FormatWarning, 2)
            return NoDumper, None
        dumper = getattr(importlib.import_module(module), str(name)) if isinstance(module, str) else module
        try:
            os.makedirs(fout, exist_ok=True)
        except OSError as error:
            raise CannotCreateError(f"{fout} cannot be made: {error.strerror}") from error
        return dumper, extension

    def __call__(self, packet: Packet) -> None:
        """The same as `dump`."""
        self.dump(packet)

    def dump(self, packet: Packet) -> None:
        """Appends the packet to its flow's file."""
        dumper = self.trace(packet, output=True)
        if isinstance(dumper, Dumper):
            dumper(packet)
        else:
            dumper(packet.frame, name=f"Frame {packet.index}")

    def trace(self, packet: Packet, output: bool = True) -> Any:
        """Notes the packet in its flow's index. Returns the flow's dumper, or its label when `output` is False."""
        source, destination = ipaddress.ip_address(packet.src), ipaddress.ip_address(packet.dst)
        key: BufferID = (source, packet.srcport, destination, packet.dstport)
        timestamp_ns = packet.timestamp_ns
        is_new = self._table.observe(
            source.packed,
            destination.packed,
            packet.srcport,
            packet.dstport,
            timestamp_ns,
            packet.flags,
            packet.seq,
            packet.index,
            _wire_length(packet),
            packet.protocol,
        )
        slot = self._table.last_slot
        if is_new:
            self._begin(slot, key, timestamp_ns)
        key, buffer = self._slots[slot]
        buffer.index.append(packet.index)
        if slot in self._closed:
            self._stream[self._closed[slot]] = Index(buffer.path, tuple(buffer.index), buffer.label)
        elif self._table.describe(slot).is_closed:
            self._close(slot, key, buffer)
        if not output:
            return buffer.label
        return self._use(slot, buffer.fpout)

    def submit(self) -> tuple[Index, ...]:
        """All flows: the open ones first, then the finished ones."""
        opened = (Index(buffer.path, tuple(buffer.index), buffer.label) for buffer in self._buffer.values())
        return (*opened, *self._stream)

    @property
    def index(self) -> tuple[Index, ...]:
        return self.submit()

    def close(self) -> None:
        """Ends every flow, and gives all descriptors back."""
        self._table.finish_all()

    def _begin(self, slot: int, key: BufferID, timestamp_ns: int) -> None:
        label = flow_label(str(key[0]), key[1], str(key[2]), key[3], timestamp_ns)
        path = None
        if self._extension is not None:
            label, path = new_file(self._directory, label, self._extension)
        make: Callable[..., Any] = self._dumper
        if issubclass(self._dumper, Dumper):
            dumper = make(path or "", byteorder=self._byteorder, nanosecond=self._nanosecond)
        else:
            dumper = make(path or "")
        buffer = Buffer(dumper, [], label, path)
        self._slots[slot] = (key, buffer)
        self._buffer[key] = buffer

    def _close(self, slot: int, key: BufferID, buffer: Buffer) -> None:
        self._closed[slot] = len(self._stream)
        self._stream.append(Index(buffer.path, tuple(buffer.index), buffer.label))
        if self._buffer.get(key) is buffer:
            del self._buffer[key]

    def _use(self, slot: int, dumper: Any) -> Any:
        """Its descriptor is the newest; the one longest unused goes when there are too many."""
        self._open[slot] = dumper
        self._open.move_to_end(slot)
        while len(self._open) > self._max_open_files:
            _, oldest = self._open.popitem(last=False)
            _close_dumper(oldest)
        return dumper

    def _ended(self, slot: int, description: Description, reason: int) -> None:
        key, buffer = self._slots.pop(slot)
        if self._closed.pop(slot, None) is None:
            self._close(slot, key, buffer)
            del self._closed[slot]
        self._open.pop(slot, None)
        _close_dumper(buffer.fpout)


@dataclass
class FlowDirectory:
    """The files of flows whose bytes compiled code collects: `write` and `ended` are those of FlowFiles.

    One file is open at a time, for as long as one write takes. `note` gets each flow that is over: what `flows.jsonl`
    has about it.
    """

    directory: str
    format: FlowFormat
    nanoseconds: bool
    note: Callable[[dict[str, Any]], None]
    files: int = 0
    _paths: dict[int, tuple[str, str]] = field(default_factory=dict)

    def write(self, slot: int, description: Description | None, entries: bytes, packets: int) -> None:
        linktype = 0
        if description is not None:
            linktype = description.linktype
            self._paths[slot] = new_file(self.directory, description_label(description), self.format.extension)
            self.files += 1
        _, path = self._paths[slot]
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                put(fd, self.format, entries, lambda: self.format.header(linktype, self.nanoseconds))
            finally:
                os.close(fd)
        except OSError as error:
            raise InputOutputError(f"{path}: {error.strerror}") from error

    def ended(self, slot: int, description: Description, reason: int) -> None:
        label, path = self._paths.pop(slot, (description_label(description), ""))
        self.note(index_entry(label, os.path.basename(path), description, reason))


def index_entry(label: str, file: str, description: Description, reason: int) -> dict[str, Any]:
    """A flow's line in an index. `file`: its name, "" when it has none."""
    return {
        "label": label,
        "file": file or None,
        "src": str(ipaddress.ip_address(description.source)),
        "srcport": description.source_port,
        "dst": str(ipaddress.ip_address(description.destination)),
        "dstport": description.destination_port,
        "packets": description.packets,
        "octets": description.octets,
        "first_ns": description.first_ns,
        "last_ns": description.last_ns,
        "ended": REASONS[reason],
        **({"frames": description.frames} if description.frames else {}),
    }


def put(fd: int, format: FlowFormat, entries: bytes, header: Callable[[], bytes]) -> None:
    """Appends entries to a flow's file in front of its end; an empty file gets its header first."""
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0:
        data = header() + entries.removeprefix(format.separator) + format.end
    else:
        data = entries + format.end
        os.lseek(fd, size - len(format.end), os.SEEK_SET)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def new_file(directory: str, label: str, extension: str) -> tuple[str, str]:
    """A new empty file for a flow: its label and its path. Where a file of that label is already, `-2` and so on follow
    it: no file is ever overwritten."""
    for number in range(1, MAX_NAMES):
        name = label if number == 1 else f"{label}-{number}"
        path = os.path.join(directory, name + extension)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE))
        except FileExistsError:
            continue
        except OSError as error:
            raise CannotCreateError(f"{path} cannot be created: {error.strerror}") from error
        return name, path
    raise CannotCreateError(f"{directory} has {MAX_NAMES} files of the label {label}")


def flow_label(source: str, source_port: int, destination: str, destination_port: int, first_ns: int) -> str:
    """`{src}_{srcport}-{dst}_{dstport}-{seconds}.{nanoseconds}`; the colons of IPv6 become dots.

    >>> flow_label("2001:db8::1", 40000, "2001:db8::2", 443, 1_700_000_000_000_000_001)
    '2001.db8..1_40000-2001.db8..2_443-1700000000.000000001'
    """
    addresses = f"{source}_{source_port}-{destination}_{destination_port}".replace(":", ".")
    return f"{addresses}-{formats.time_text(first_ns)}"


def description_label(description: Description) -> str:
    source, destination = (ipaddress.ip_address(address) for address in (description.source, description.destination))
    return flow_label(
        str(source), description.source_port, str(destination), description.destination_port, description.first_ns
    )


def text_encoder(format: FlowFormat) -> Callable[..., bytes] | None:
    """`encode` of FlowFiles for a textual format; None for pcap."""
    entry = format.entry
    if entry is None:
        return None

    def encode(
        number: int,
        timestamp_ns: int,
        linktype: int,
        wire_length: int,
        data: bytes,
        source: bytes,
        destination: bytes,
        source_port: int,
        destination_port: int,
        flags: int,
        sequence: int,
        acknowledgement: int,
        window: int,
    ) -> bytes:
        return entry(
            number,
            {
                "number": number,
                "time": formats.time_text(timestamp_ns),
                "link_type": linktype,
                "wire_length": wire_length,
                "src": str(ipaddress.ip_address(source)),
                "srcport": source_port,
                "dst": str(ipaddress.ip_address(destination)),
                "dstport": destination_port,
                "flags": formats.flags_text(flags),
                "seq": sequence,
                "ack": acknowledgement,
                "window": window,
                "frame": data.hex(),
            },
        )

    return encode


def _info(packet: Packet) -> Mapping[str, Any]:
    """What the textual formats write of a packet that came by its fields."""
    if not isinstance(packet.frame, bytes):
        return packet.frame
    return {
        "number": packet.index,
        "time": formats.time_text(packet.timestamp_ns),
        "link_type": packet.protocol,
        "wire_length": _wire_length(packet),
        "src": str(packet.src),
        "srcport": packet.srcport,
        "dst": str(packet.dst),
        "dstport": packet.dstport,
        "flags": formats.flags_text(packet.flags),
        "frame": packet.frame.hex(),
    }


def _wire_length(packet: Packet) -> int:
    if packet.wire_length is not None:
        return packet.wire_length
    return len(packet.frame) if isinstance(packet.frame, bytes) else 0


def _close_dumper(dumper: Any) -> None:
    close = getattr(dumper, "close", None)
    if close is not None:
        close()


def _nothing(*_: object) -> None:
    """The table keeps no bytes here."""
