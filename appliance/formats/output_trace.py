"""Output traces, and input traces: packets to and from a URI, in the manner of libtrace's Python binding (`plt`).

>>> import os, tempfile
>>> directory = tempfile.mkdtemp()
>>> trace = output_trace(f"pcapng:{directory}/a.pcapng.gz")
>>> trace.conf_compress_type(ZLIB_COMPRESSION)
>>> trace.conf_compress_level(5)
>>> trace.conf_file_flags(0o640)
>>> trace.start_output()
>>> trace.write_packet(Packet(1_700_000_000_000_000_001, bytes(60)))
>>> trace.close_output()
>>> oct(os.stat(f"{directory}/a.pcapng.gz").st_mode & 0o777)
'0o640'

With the context manager, and many packets in one call:

>>> with output_trace(f"erf:{directory}/a.erf") as trace:
...     trace.write_packets(Packet(1_700_000_000_000_000_000 + i, bytes(60)) for i in range(1000))
>>> with input_trace(f"{directory}/a.erf") as trace:
...     packets = list(trace)
>>> len(packets), packets[7]
(1000, Packet(timestamp_ns=1700000000000000007, data=<60 bytes>, wire_length=60, link_type=1))

Whatever fails raises plt_exc_libtrace, which is a ValueError, so that both habits of the original's users catch it:

>>> output_trace("pcapfile")
Traceback (most recent call last):
...
appliance.formats.output_trace.plt_exc_libtrace: 'pcapfile' names no kind of output; say e.g. pcapfile:pcapfile

Where the original's documentation and its code differ, the documentation is what happens here: levels are 1 to 9 and 5
by default, O_APPEND appends to a valid file so that the result is one, and permission bits are the file's, exactly.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Self

from appliance.capture import opener, uri as capture_uri
from appliance.errors import ApplianceError, FormatError, MissingInputError, UsageError
from appliance.formats import packet as packets_of
from appliance.formats.encode import (
    SNAPLEN_MAX,
    TSRESOL_MICROSECONDS,
    InterfaceDescription,
    interface_description,
    pcap_header,
    section_header,
)
from appliance.formats.erf import LINKTYPES as ERF_LINKTYPES
from appliance.formats.live_input import LiveReader
from appliance.formats.packet import Packet
from appliance.formats.reader import BATCH_BYTES, CaptureReader
from appliance.formats.stream import InputStream
from appliance.merge.compressor import (
    ENVIRONMENT,
    CompressorSink,
    FileSink,
    SinkError,
    StreamSink,
    compressor_argv,
)

__all__ = [
    "BZIP2_COMPRESSION",
    "LZ4_COMPRESSION",
    "LZMA_COMPRESSION",
    "LZO_COMPRESSION",
    "NO_COMPRESSION",
    "O_APPEND",
    "ZLIB_COMPRESSION",
    "ZSTD_COMPRESSION",
    "InputTrace",
    "OutputTrace",
    "Packet",
    "input_trace",
    "output_trace",
    "plt_exc_libtrace",
]

NO_COMPRESSION, ZLIB_COMPRESSION, BZIP2_COMPRESSION, LZO_COMPRESSION = range(4)
LZMA_COMPRESSION, ZSTD_COMPRESSION, LZ4_COMPRESSION = range(4, 7)
O_APPEND = os.O_APPEND
DEFAULT_LEVEL = 5

# Each with the names of the programs that do it, the first that is installed is taken.
_PROGRAMS: dict[int, tuple[str, ...]] = {
    ZLIB_COMPRESSION: ("gzip", "pigz"),  # what libtrace calls zlib is a gzip file
    BZIP2_COMPRESSION: ("bzip2", "pbzip2"),
    LZO_COMPRESSION: ("lzop",),
    LZMA_COMPRESSION: ("xz",),
    ZSTD_COMPRESSION: ("zstd",),
    LZ4_COMPRESSION: ("lz4",),
}
_READ_BACK = {"": 0, "gz": 1, "bz2": 2, "xz": 4, "zst": 5, "lz4": 6}  # unpack.MAGICS -> compression

_PERMISSIONS = 0o777
_OWNER_READS = 0o400
# What open(2) calls the bits below 0o400, and what may stand beside them.
_OPEN_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_EXCL
_OTHER_FLAGS = os.O_APPEND | os.O_TRUNC | os.O_CLOEXEC | getattr(os, "O_LARGEFILE", 0) | 0o100000
_BUFFER_BYTES = 1 << 18
_PACKETS_AT_ONCE = 4096
_COMPRESSOR_TIMEOUT_S = 60.0
_SEND_BUFFER_BYTES = 4 << 20


class plt_exc_libtrace(ValueError):  # noqa: N801, N818  the original's name
    """A configuration, a start or a write failed; the message says of what, and why."""


class OutputTrace:
    """An output for packets. Files: `pcapfile:` `pcap:` (nanosecond times), `pcapng:`, `erf:` and `rawerf:`, with a
    path, or `-` for standard output; `int:`, `ring:` and `pcapint:` send on an interface.

    First `conf_*`, then `start_output`, then any number of packets, then `close_output`; as a context manager it starts
    and closes itself. It is not for several threads at once. plt_exc_libtrace: the URI is none of these.
    """

    def __init__(self, uri: str) -> None:
        try:
            self.uri = capture_uri.parse_trace_output(uri)
        except UsageError as error:
            raise plt_exc_libtrace(str(error)) from None
        self._flags = 0
        self._compression = NO_COMPRESSION
        self._level: int | None = None
        self._writer: _FileWriter | _InterfaceWriter | None = None
        self._closed = False

    new = classmethod(lambda cls, uri: cls(uri))  # the documentation's other way to make one

    def conf_file_flags(self, flags: int) -> None:
        """O_APPEND, and the file's permission bits (0o640), which are then exactly these, whatever the umask.

        O_APPEND adds to a file that is there: it must be whole, and hold what the new packets can stand behind. Without
        it the file begins anew. Without the owner's right to read among the lowest nine bits, these are taken for
        open(2)'s flags instead, whose numbers are the same: O_EXCL then refuses a file that is there.
        """
        self._before_start("conf_file_flags")
        if isinstance(flags, bool) or not isinstance(flags, int):
            raise plt_exc_libtrace(f"{self.uri}: file flags are a number, not {flags!r}")
        low = _PERMISSIONS if flags & _OWNER_READS else _OPEN_FLAGS
        if flags < 0 or flags & ~(low | _OTHER_FLAGS):
            raise plt_exc_libtrace(
                f"{self.uri}: file flags {flags:#o}: permission bits, O_APPEND, O_TRUNC, O_CREAT and O_EXCL are taken"
            )
        self._flags = flags

    def conf_compress_type(self, compression: int) -> None:
        """NO_, ZLIB_ (gzip), BZIP2_, LZO_, LZMA_ (xz), ZSTD_ or LZ4_COMPRESSION, through the program of that name."""
        self._before_start("conf_compress_type")
        if compression not in range(LZ4_COMPRESSION + 1):
            raise plt_exc_libtrace(f"{self.uri}: compression type {compression!r} is none of 0 to {LZ4_COMPRESSION}")
        if compression and self.uri.is_live:
            raise plt_exc_libtrace(f"{self.uri}: packets that are sent cannot be compressed")
        self._compression = compression

    def conf_compress_level(self, level: int) -> None:
        """1 (fast) to 9 (small); 5 without it. 0 is no compression, whatever its type."""
        self._before_start("conf_compress_level")
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= 9:
            raise plt_exc_libtrace(f"{self.uri}: compression level {level!r} is not within 1 to 9")
        self._level = level

    def start_output(self) -> None:
        """Opens the file or the interface. plt_exc_libtrace: it cannot be had, or was started or closed before."""
        self._before_start("start_output")
        try:
            self._writer = self._open()
        except (ApplianceError, OSError) as error:
            raise plt_exc_libtrace(f"{self.uri}: {_reason(error)}") from error

    start = start_output

    def write_packet(self, packet: Packet) -> None:
        """Writes one packet. ValueError: it is no Packet; plt_exc_libtrace: not started, or it cannot be written."""
        self._write([packet])

    def write_packets(self, packets: Iterable[Packet]) -> None:
        """Writes many packets; several times as fast as one by one. What comes before a failure has been written."""
        pending = iter(packets)
        while batch := list(itertools.islice(pending, _PACKETS_AT_ONCE)):
            self._write(batch)

    def write_records(self, records: memoryview, interfaces: Sequence[InterfaceDescription]) -> int:
        """Writes a batch of `InputTrace.batches` without making objects of its packets; returns how many there were.

        `interfaces`: the input's, which must stay the same list as long as this trace is open.
        """
        try:
            return self._started().write_records(records, interfaces)
        except (ApplianceError, OSError) as error:
            raise plt_exc_libtrace(f"{self.uri}: {_reason(error)}") from error

    def close_output(self) -> None:
        """Everything is in the file, and the compressor has ended well. Again: nothing. It cannot be started again."""
        writer, self._writer = self._writer, None
        self._closed = True
        if writer is not None:
            try:
                writer.close()
            except (ApplianceError, OSError) as error:
                raise plt_exc_libtrace(f"{self.uri}: {_reason(error)}") from error

    def __enter__(self) -> Self:
        if self._writer is None:
            self.start_output()
        return self

    def __exit__(self, *_: object) -> None:
        self.close_output()

    def _write(self, packets: list[Packet]) -> None:
        try:
            self._started().write(packets)
        except TypeError as error:
            raise plt_exc_libtrace(f"{self.uri}: {error}") from None
        except (ApplianceError, OSError) as error:
            raise plt_exc_libtrace(f"{self.uri}: {_reason(error)}") from error

    def _started(self) -> _FileWriter | _InterfaceWriter:
        if self._writer is None:
            raise plt_exc_libtrace(f"{self.uri}: OutputTrace {'is closed' if self._closed else 'not started'}")
        return self._writer

    def _before_start(self, what: str) -> None:
        if self._closed:
            raise plt_exc_libtrace(f"{self.uri}: {what}: OutputTrace is closed, and cannot be started again")
        if self._writer is not None:
            raise plt_exc_libtrace(f"{self.uri}: {what}: OutputTrace is started already")

    def _open(self) -> _FileWriter | _InterfaceWriter:
        if self.uri.is_live:
            return _InterfaceWriter(self.uri.target)
        mode = self._flags & _PERMISSIONS if self._flags & _OWNER_READS else None
        exclusive = mode is None and bool(self._flags & os.O_EXCL)
        compression = NO_COMPRESSION if self._level == 0 else self._compression
        argv = _compressor(compression, self._level or DEFAULT_LEVEL)
        layout = _layout(self.uri.scheme)
        path = self.uri.target
        known = None
        if self._flags & os.O_APPEND and path != "-" and os.path.exists(path) and os.path.getsize(path):
            known = _Appended(path, layout, compression)
        return _FileWriter(path, layout, argv, _open_file(path, mode, known is not None, exclusive), known)


class InputTrace:
    """An input of packets: every URI that the appliance reads, or a bare name, guessed by its content. An interface
    never ends; reading waits until packets come.

    Iterating over it gives `Packet`s, `read_batch` lists of them, `batches` records. plt_exc_libtrace: the URI is none
    of these.
    """

    def __init__(self, uri: str) -> None:
        try:
            self.uri = capture_uri.guess(uri)
        except UsageError as error:
            raise plt_exc_libtrace(str(error)) from None
        if self.uri.is_every_interface:
            raise plt_exc_libtrace(f"{self.uri}: an input trace reads one interface; name it")
        self._reader: CaptureReader | LiveReader | None = None
        self._buffer = bytearray(BATCH_BYTES)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._pending: Iterator[Packet] = iter(())
        self._closed = False

    new = classmethod(lambda cls, uri: cls(uri))

    def start_input(self) -> None:
        """Opens the file. plt_exc_libtrace: it cannot be had, is of no kind that is read, or was closed before."""
        if self._closed or self._reader is not None:
            raise plt_exc_libtrace(f"{self.uri}: InputTrace is {'closed' if self._closed else 'started already'}")
        try:
            if self.uri.is_live:
                self._reader = LiveReader(self.uri.target)
            else:
                self._reader = CaptureReader(self.uri.target, format=self.uri.told_format)
        except ApplianceError as error:
            raise plt_exc_libtrace(str(error)) from error

    start = start_input

    @property
    def interfaces(self) -> list[InterfaceDescription]:
        """Those met so far, in the order of their numbers: a list that grows while the file is read."""
        return self._started().interfaces

    @property
    def dropped_packets(self) -> int:
        """Of an interface: what was lost because nobody read fast enough. A file loses nothing."""
        reader = self._started()
        return reader.dropped_packets if isinstance(reader, LiveReader) else 0

    def read_packet(self) -> Packet | None:
        """The next packet; None at the end. A damaged file gives its whole packets, then plt_exc_libtrace."""
        packet = next(self._pending, None)
        if packet is None and (batch := self.read_batch()):
            self._pending = iter(batch)
            packet = next(self._pending, None)
        return packet

    def read_batch(self) -> list[Packet]:
        """The next packets, some thousands at a time; an empty list at the end."""
        rest = list(self._pending)
        while not rest and (length := self._fill()):
            types = [interface.linktype for interface in self.interfaces]
            rest = packets_of.unpack(self._address, length, types)
        return rest

    def batches(self) -> Iterator[memoryview]:
        """Batches of records (ring/layout.h) for `OutputTrace.write_records`; each is valid until the next one."""
        while length := self._fill():
            yield memoryview(self._buffer)[:length]

    def close_input(self) -> None:
        reader, self._reader = self._reader, None
        self._closed = True
        if reader is not None:
            reader.close()

    def __enter__(self) -> Self:
        if self._reader is None:
            self.start_input()
        return self

    def __exit__(self, *_: object) -> None:
        self.close_input()

    def __iter__(self) -> Iterator[Packet]:
        while batch := self.read_batch():
            yield from batch

    def _fill(self) -> int:
        """Bytes of records in the buffer; 0 at the end."""
        reader = self._started()
        try:
            while not (filled := reader.fill(self._address, BATCH_BYTES)).produced_bytes and not filled.end:
                pass
        except ApplianceError as error:
            raise plt_exc_libtrace(str(error)) from error
        return filled.produced_bytes

    def _started(self) -> CaptureReader | LiveReader:
        if self._reader is None:
            raise plt_exc_libtrace(f"{self.uri}: InputTrace {'is closed' if self._closed else 'not started'}")
        return self._reader


# As the originals' documentation has it: `output_trace(uri)`, and `output_trace.new(uri)`.
output_trace = OutputTrace
input_trace = InputTrace


class _Appended:
    """What stands in a file that packets are to be added to. FormatError: they could not be read behind it."""

    def __init__(self, path: str, layout: int, compression: int) -> None:
        self.linktype: int | None = None
        self.layout = layout
        expected = {packets_of.PCAPNG: "pcapng", packets_of.ERF: "erf"}.get(layout, "pcap")
        with CaptureReader(path, format="erf" if expected == "erf" else "") as reader:
            if _READ_BACK[reader.stream.compression] != compression:
                raise FormatError(
                    f"{path} is {reader.stream.compression or 'not'} compressed: append with the same compression type"
                )
            if reader.stream.format != expected:
                raise FormatError(f"{path} is a {reader.stream.format} file, to which no {expected} can be appended")
            batch = bytearray(BATCH_BYTES)
            address = ctypes.addressof(ctypes.c_char.from_buffer(batch))
            while not reader.fill(address, BATCH_BYTES).end:
                pass
            if expected == "pcap":
                (interface,) = reader.interfaces
                self.linktype = interface.linktype
                nanoseconds = interface.source_tsresol != TSRESOL_MICROSECONDS
                self.layout = packets_of.PCAP_NS if nanoseconds else packets_of.PCAP_US
                if _first_bytes(path) != pcap_header(1, nanoseconds=nanoseconds)[:4]:
                    raise FormatError(
                        f"{path} is of the other byte order or an old kind: packets of this host do not fit"
                    )


class _FileWriter:
    """Packets into a file, behind a header that its format may need."""

    def __init__(
        self, path: str, layout: int, argv: Sequence[str] | None, fd: int, appended: _Appended | None = None
    ) -> None:
        self._layout = appended.layout if appended else layout
        self._numbers: dict[int, int] = {}  # of our interfaces in the file, by link type
        self._targets: list[int] = []  # the same by the number of the batches' interface
        self._described = 0  # interfaces in the file, of this section
        self._buffer = bytearray()
        self._sink: FileSink | StreamSink | CompressorSink
        if argv is not None:
            self._sink = CompressorSink(path, fd, argv, _COMPRESSOR_TIMEOUT_S, locked=path != "-")
        elif path == "-":
            self._sink = StreamSink("standard output", fd)
        else:
            self._sink = FileSink(path, fd)
            self._sink.written = os.lseek(fd, 0, os.SEEK_CUR)
        self._has_header = appended is not None or layout == packets_of.ERF
        if appended is not None and appended.linktype is not None:
            self._numbers[appended.linktype] = 0
        if layout == packets_of.PCAPNG:
            self._put(section_header())  # appended: a section of its own
            self._has_header = True

    def write(self, packets: list[Packet]) -> None:
        for linktype in packets_of.link_types(packets):
            self._announce(linktype)
        self._put(packets_of.encode(packets, self._layout, self._numbers))

    def write_records(self, records: memoryview, interfaces: Sequence[InterfaceDescription]) -> int:
        types = [interface.linktype for interface in interfaces]
        for interface in interfaces[len(self._targets) :]:
            if self._layout == packets_of.PCAPNG:
                self._targets.append(self._describe(interface))
            else:
                self._announce(interface.linktype)
                self._targets.append(len(self._targets) & 3 if self._layout == packets_of.ERF else 0)
        buffer = (ctypes.c_char * len(records)).from_buffer(records)
        data, count = packets_of.encode_records(
            ctypes.addressof(buffer), len(records), self._layout, types, self._targets
        )
        self._put(data)
        return count

    def close(self) -> None:
        try:
            if not self._has_header:
                self._put(pcap_header(1, nanoseconds=True))  # no packet: still a valid file
            self._flush()
            self._sink.finish(_COMPRESSOR_TIMEOUT_S)
        finally:
            self._sink.abandon()

    def _announce(self, linktype: int) -> None:
        """Makes room for packets of a link type. FormatError: the file cannot hold them."""
        if linktype in self._numbers:
            return
        if self._layout == packets_of.PCAPNG:
            self._numbers[linktype] = self._describe(InterfaceDescription(linktype))
        elif self._layout == packets_of.ERF:
            if linktype not in ERF_LINKTYPES:
                raise FormatError(f"ERF has no type for link type {linktype}; write pcapng: instead")
            self._numbers[linktype] = 0
        elif self._numbers:
            (first,) = self._numbers
            raise FormatError(
                f"a pcap file holds one link type, {first} here, not {linktype} as well; write pcapng: instead"
            )
        else:
            self._put(pcap_header(linktype, nanoseconds=True))
            self._has_header = True
            self._numbers[linktype] = 0

    def _describe(self, interface: InterfaceDescription) -> int:
        """libpcap refuses a file whose interfaces have different snaplens, so all of them say the same."""
        self._put(interface_description(replace(interface, snaplen=SNAPLEN_MAX)))
        self._described += 1
        return self._described - 1

    def _put(self, data: bytes | bytearray) -> None:
        self._buffer += data
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        if data:
            self._sink.write(memoryview(data), _no_beat)


class _InterfaceWriter:
    """Packets onto an interface, as fast as it takes them. It needs CAP_NET_RAW."""

    def __init__(self, interface: str) -> None:
        try:
            index = socket.if_nametoindex(interface)
        except OSError:
            raise MissingInputError(f"there is no interface {interface}") from None
        self._linktype = _interface_linktype(interface)
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            self._socket.bind((interface, 0))  # protocol 0: nothing is received
        except OSError:
            self._socket.close()
            raise
        self.index = index

    def write(self, packets: list[Packet]) -> None:
        for linktype in packets_of.link_types(packets):
            if linktype != self._linktype:
                raise FormatError(f"the interface sends link type {self._linktype}, not {linktype}")
        sent, reason = packets_of.send(self._socket.fileno(), packets)
        if reason:
            raise FormatError(f"packet of {len(packets[sent].data)} bytes, {sent} sent before it: {reason}")

    def write_records(self, records: memoryview, interfaces: Sequence[InterfaceDescription]) -> int:
        buffer = (ctypes.c_char * len(records)).from_buffer(records)
        types = [interface.linktype for interface in interfaces]
        packets = packets_of.unpack(ctypes.addressof(buffer), len(records), types)
        self.write(packets)
        return len(packets)

    def close(self) -> None:
        self._socket.close()


def _layout(scheme: str) -> int:
    return {"pcapng": packets_of.PCAPNG, "erf": packets_of.ERF}.get(scheme, packets_of.PCAP_NS)


def _compressor(compression: int, level: int) -> tuple[str, ...] | None:
    """The argv to compress with. MissingInputError: its program is not installed."""
    if compression == NO_COMPRESSION:
        return None
    programs = _PROGRAMS[compression]
    program = next((name for name in programs if shutil.which(name, path=ENVIRONMENT["PATH"])), None)
    if program is None:
        if compression == LZ4_COMPRESSION:
            return compressor_argv("lz4")  # built in, with one level
        raise MissingInputError(f"compression needs the program {' or '.join(programs)}: install it")
    return compressor_argv((program, "-q", "-c", f"-{level}"))


def _open_file(path: str, mode: int | None, append: bool, exclusive: bool) -> int:
    if path == "-":
        return os.dup(1)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if append else os.O_TRUNC) | (os.O_EXCL if exclusive else 0)
    fd = os.open(path, flags, 0o666 if mode is None else mode)
    try:
        if mode is not None:
            os.fchmod(fd, mode)
        if append:
            os.lseek(fd, 0, os.SEEK_END)
    except OSError:
        os.close(fd)
        raise
    return fd


def _first_bytes(path: str) -> bytes:
    """The first four plain bytes."""
    stream = InputStream(path)
    try:
        head = bytearray(4)
        stream.read_into(memoryview(head))
        return bytes(head)
    finally:
        stream.close()


def _interface_linktype(interface: str) -> int:
    return opener.LINKTYPES.get(opener.hardware_type(interface), opener.LINKTYPE_RAW)


def _reason(error: Exception) -> str:
    if isinstance(error, SinkError | ApplianceError):
        return str(error)
    if isinstance(error, PermissionError):
        return f"{error.strerror}: CAP_NET_RAW or the right to write is missing"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _no_beat() -> None:
    """Nobody watches us wait."""
