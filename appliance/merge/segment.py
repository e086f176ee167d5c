"""One segment: a capture file from its first byte in `work/` to its last, with what is known about its packets.

The merge worker owns the open segment. What is closed goes to the publisher (publish.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from appliance.errors import ApplianceError, CannotCreateError
from appliance.formats.encode import (
    SNAPLEN_MAX,
    InterfaceDescription,
    interface_description,
    interface_statistics,
    pcap_header,
    section_header,
)
from appliance.merge.compressor import CompressorSink, FileSink, SinkError, StreamSink
from appliance.merge.naming import STANDARD_OUTPUT, Naming, prepare_directories

MOST = (1 << 64) - 1  # that a pcapng option can say
Sink = FileSink | StreamSink | CompressorSink


@dataclass
class OutputInterface:
    """An interface of the output's files: its number is its place in the list of them."""

    description: InterfaceDescription
    source: int  # of the merge
    local: int  # the source's own number


@dataclass(frozen=True)
class SourceCounts:
    """A source's own cumulative counters as they came with its packets (RECORD_COUNTERS in ring/layout.h)."""

    received: int = 0
    dropped_kernel: int = 0
    dropped_filter: int = 0
    dropped_ring: int = 0
    published: int = 0

    def since(self, earlier: SourceCounts) -> SourceCounts:
        """Never negative: the counts come out of shared memory, and nothing in there may end the merge."""
        return SourceCounts(
            max(0, self.received - earlier.received),
            max(0, self.dropped_kernel - earlier.dropped_kernel),
            max(0, self.dropped_filter - earlier.dropped_filter),
            max(0, self.dropped_ring - earlier.dropped_ring),
            max(0, self.published - earlier.published),
        )


@dataclass(frozen=True)
class FileFormat:
    """What the files are: pcapng, pcap with nanoseconds or microseconds, or ERF."""

    is_pcapng: bool
    nanoseconds: bool = True
    is_erf: bool = False

    def header(self, interfaces: Sequence[OutputInterface]) -> bytes:
        if self.is_erf:
            return b""
        if not self.is_pcapng:
            linktype = interfaces[0].description.linktype if interfaces else 1
            return pcap_header(linktype, nanoseconds=self.nanoseconds)
        blocks = [section_header()]
        blocks += [self.interface_block(interface) for interface in interfaces]
        return b"".join(blocks)

    @staticmethod
    def interface_block(interface: OutputInterface) -> bytes:
        # libpcap refuses a file whose interfaces have different snaplens, so all of them say the same.
        return interface_description(dataclasses.replace(interface.description, snaplen=SNAPLEN_MAX))


@dataclass
class Segment:
    """The open segment, and later everything that the publisher needs to know about it."""

    sequence: int
    path: str
    sink: Sink
    start_ns: int  # CLOCK_REALTIME, or the first packet's time for files
    opened_ns: int  # CLOCK_REALTIME
    packets: int = 0  # that the sink took
    bytes: int = 0  # before compression
    source_packets: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    first_ns: int | None = None
    last_ns: int | None = None
    late: int = 0
    late_max_ns: int = 0
    closed_because: str = ""
    closed_ns: int = 0  # CLOCK_MONOTONIC
    failure: str = ""  # why it goes to quarantine; empty: it is published
    is_aside: bool = False  # it is in quarantine

    def add_batch(self, packets: dict[str, int], first_ns: int, last_ns: int, late: int, late_max_ns: int) -> None:
        """A batch was written: `packets` of each source, with these times and this lateness."""
        for label, count in packets.items():
            self.source_packets[label] = self.source_packets.get(label, 0) + count
        self.first_ns = first_ns if self.first_ns is None else min(self.first_ns, first_ns)
        self.last_ns = last_ns if self.last_ns is None else max(self.last_ns, last_ns)
        self.packets += sum(packets.values())
        self.late += late
        self.late_max_ns = max(self.late_max_ns, late_max_ns)


class NoReaderError(CannotCreateError):
    """A FIFO that nobody reads yet: the output can begin when somebody does."""


class SegmentOpener:
    """Opens staging files and starts their compressors, one ahead, so that a rotation waits for neither."""

    def __init__(self, naming: Naming, argv: Sequence[str] | None, timeout_s: float, mode: int, ahead: bool) -> None:
        self._naming = naming
        self._argv = argv
        self._timeout_s = timeout_s
        self._mode = mode
        self._ahead = ahead and argv is not None
        self._spare: tuple[int, str, Sink] | None = None

    @property
    def is_stream(self) -> bool:
        """One stream without staging: it cannot be begun anew."""
        return self._naming.stream is not None

    def open(self, start_ns: int) -> Segment:
        """The next segment, empty. ApplianceError (CannotCreateError, SinkError, NoReaderError, or the number file's
        InputOutputError): it cannot be had now."""
        if self._spare is not None and not self._spare[2].is_alive:
            self.discard_spare()
        try:
            sequence, path, sink = self._spare or self._start()
        except CannotCreateError:
            # Somebody may have removed the directories below us: the next try finds them.
            with contextlib.suppress(ApplianceError, OSError):
                prepare_directories(self._naming)
            raise
        self._spare = None
        return Segment(sequence, path, sink, start_ns, time.time_ns())

    def prepare(self) -> None:
        """Starts the next compressor, if that is not done yet. Failures wait for `open` to report them."""
        if self._ahead and self._spare is None:
            with contextlib.suppress(ApplianceError):
                self._spare = self._start()

    def discard_spare(self) -> None:
        if self._spare is not None:
            sequence, path, sink = self._spare
            self._spare = None
            self._remove(sequence, path, sink)

    def discard(self, segment: Segment) -> None:
        """A segment that holds no packet is not worth a file."""
        self._remove(segment.sequence, segment.path, segment.sink)

    def _remove(self, sequence: int, path: str, sink: Sink) -> None:
        sink.abandon()
        if not self.is_stream:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._give_back(sequence)

    def _give_back(self, sequence: int) -> None:
        with contextlib.suppress(ApplianceError):
            self._naming.give_back(sequence)

    def _start(self) -> tuple[int, str, Sink]:
        try:
            sequence = self._naming.next_sequence()
            path = self._naming.staging_path(sequence)
        except OSError as error:
            raise CannotCreateError(f"{error.filename}: {error.strerror}") from error
        try:
            fd = open_stream(path) if self.is_stream else create_exclusively(path, self._mode)
        except OSError as error:
            self._give_back(sequence)
            if error.errno == errno.ENXIO:
                raise NoReaderError(f"{path}: nobody reads it yet") from error
            raise CannotCreateError(f"{path}: cannot be created: {error.strerror}") from error
        try:
            return sequence, path, self._sink(path, fd)
        except (OSError, SinkError) as error:
            if not self.is_stream:
                os.unlink(path)
            self._give_back(sequence)
            if isinstance(error, SinkError):
                raise
            raise CannotCreateError(f"{path}: cannot be locked: {error.strerror}") from error

    def _sink(self, path: str, fd: int) -> Sink:
        if self._argv is None:
            return StreamSink(path, fd) if self.is_stream else FileSink(path, fd)
        if self.is_stream:
            os.set_blocking(fd, True)  # compressors wait for their reader
        return CompressorSink(path, fd, self._argv, self._timeout_s, locked=not self.is_stream)


def create_exclusively(path: str, mode: int) -> int:
    """A new file, never another one's and never through a link. Its mode is exact from the first moment, whatever the
    umask: nobody may read what is about to be written."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0)
    os.fchmod(fd, mode)
    return fd


def open_stream(path: str) -> int:
    """Standard output ("-"), a device or a FIFO, without waiting. OSError ENXIO: a FIFO without a reader."""
    if path != STANDARD_OUTPUT:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISFIFO(os.fstat(1).st_mode):
        # A file description of our own: its mode is ours, and the other end of standard output keeps its own.
        with contextlib.suppress(OSError):
            return os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return os.dup(1)


def statistics_blocks(
    interfaces: Sequence[OutputInterface],
    counts: Sequence[SourceCounts],
    delivered: Sequence[int],
    start_ns: int,
    end_ns: int,
) -> bytes:
    """The Interface Statistics Blocks at a segment's end: this segment's own deltas, one block an interface.

    `counts`, `delivered`: per source of the merge. A source of several interfaces (a file) tells nothing apart, so only
    its first interface gets a block.
    """
    blocks = []
    for number, interface in enumerate(interfaces):
        if interface.local != 0:
            continue
        count = counts[interface.source]
        blocks.append(
            interface_statistics(
                number,
                end_ns,
                start_ns=start_ns,
                end_ns=end_ns,
                received=count.received,
                dropped=0,
                # Not `received` less the filtered: the kernel counts a packet before we look at it, and a file may end
                # in between.
                filter_accepted=min(count.published + count.dropped_ring + count.dropped_kernel, MOST),
                os_dropped=min(count.dropped_kernel + count.dropped_ring, MOST),
                delivered=delivered[interface.source],
            )
        )
    return b"".join(blocks)
