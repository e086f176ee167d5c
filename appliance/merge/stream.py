"""The merged stream into segments: opens, writes, rotates, closes, and counts every packet on its way.

The merge worker's loop (workers/merge.py) calls this between the compiled calls: per batch, never per packet. While no
segment is open, the merge is held: the rings keep what comes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from appliance.counters import CounterPage
from appliance.errors import CannotCreateError, ConfigError, InputOutputError
from appliance.formats.encode import InterfaceDescription
from appliance.formats.erf import LINKTYPES as ERF_LINKTYPES, PORTS as ERF_PORTS
from appliance.merge.books import Books
from appliance.merge.compressor import SinkError
from appliance.merge.order import Merge
from appliance.merge.publish import Publisher
from appliance.merge.rotation import NEVER, TIME, WRITE_ERROR, RotationPolicy
from appliance.merge.segment import (
    FileFormat,
    NoReaderError,
    OutputInterface,
    Segment,
    SegmentOpener,
    SourceCounts,
    statistics_blocks,
)

log = logging.getLogger(__name__)

REOPEN_S = 1.0  # after a failure, the rings keep what comes for this long before the next segment is tried


@dataclass(frozen=True)
class StreamSettings:
    """What the configuration says about the files of one output."""

    format: FileFormat
    rotation: RotationPolicy
    live: bool
    skip_empty: bool = False
    count_captured_bytes: bool = False  # rotate_bytes counts packet bytes alone


class OutputStream:
    """One output's files. `labels`: the sources' names; `source_pages`: their pages of MERGE_SOURCE_FIELDS.
    `unsettled`: per source, packets of a predecessor that are still being looked for, and count as held.

    A live output outlives its failures: they are counted, and tried again. Recorded inputs do not run away, so there a
    failure ends the run: InputOutputError or CannotCreateError. The same where the output is one stream, which cannot
    be begun anew.
    """

    def __init__(
        self,
        merge: Merge,
        settings: StreamSettings,
        opener: SegmentOpener,
        publisher: Publisher,
        page: CounterPage,
        labels: Sequence[str],
        source_pages: Sequence[CounterPage],
        beat: Callable[[], None],
        may_open: Callable[[], bool],
        unsettled: Sequence[int] = (),
        is_successor: bool = False,
    ) -> None:
        self.has_opened = False
        self.segment: Segment | None = None
        self.failed = False
        self.books = Books(merge, page, source_pages)
        self._merge = merge
        self._settings = settings
        self._opener = opener
        self._publisher = publisher
        self._page = page
        self._labels = labels
        self._beat = beat
        self._may_open = may_open
        self._unsettled = unsettled or [0] * len(labels)
        self._interfaces: list[OutputInterface] = []
        self._announced = [0] * len(labels)
        # What no file has told yet begins here. A source's counters began with its first life: a successor's first file
        # must not tell once more what its predecessor's files told.
        self._told: list[SourceCounts | None] = [None if is_successor else SourceCounts()] * len(labels)
        self._told_dropped = [merge.source_totals(i)[1] for i in range(len(labels))]
        self._told_until_ns = time.time_ns()
        self._writer_dropped = 0
        self._retry_at = 0.0
        self._failed_at = -REOPEN_S
        self._said = ""
        merge.count_captured_bytes = settings.count_captured_bytes
        merge.hold()

    # ---- interfaces ----

    def add_interface(self, source: int, description: InterfaceDescription) -> None:
        """A source announces an interface: it gets a number in the files. ConfigError: this format cannot hold it."""
        local = self._announced[source]
        self._announced[source] += 1
        if not description.name:
            name = self._labels[source] if local == 0 else f"{self._labels[source]}.{local}"
            description = replace(description, name=name)
        interface = OutputInterface(description, source, local)
        if self._settings.format.is_pcapng:
            number = len(self._interfaces)
        elif self._settings.format.is_erf:
            number = self._erf_number(interface)
        else:
            self._check_linktype(interface)
            number = 0
        self._merge.map_interface(source, local, number)
        self._interfaces.append(interface)
        if self.segment is not None and self._settings.format.is_pcapng:
            block = self._settings.format.interface_block(interface)
            self._put(memoryview(block))
            self._merge.bytes_left = max(0, self._merge.bytes_left - len(block) - len(self._statistics([interface])))

    def describe_filter(self, source: int, text: str) -> None:
        """Which filter a source's packets pass, in the files from the next one on."""
        for interface in self._interfaces:
            if interface.source == source:
                interface.description = replace(interface.description, filter=text)

    def skip_interface(self, source: int) -> None:
        """A source announced an interface in a way that cannot be read: its packets are dropped, and counted."""
        self._announced[source] += 1

    def _check_linktype(self, interface: OutputInterface) -> None:
        if self._interfaces and self._interfaces[0].description.linktype != interface.description.linktype:
            first = self._interfaces[0]
            raise ConfigError(
                f"{self._labels[first.source]} has link type {first.description.linktype}, "
                f"{self._labels[interface.source]} has {interface.description.linktype}: one pcap file cannot hold "
                "both; "
                'use pcapng, or linktype = "sll2" on live interfaces'
            )

    def _erf_number(self, interface: OutputInterface) -> int:
        """What the merge writes into records of this interface: the port, and the link type."""
        linktype, label = interface.description.linktype, self._labels[interface.source]
        if linktype not in ERF_LINKTYPES:
            raise ConfigError(f"{label} has link type {linktype}, for which ERF has no type; use pcapng or pcap")
        if len(self._interfaces) == ERF_PORTS:
            log.warning("ERF numbers %d interfaces: %s has the number of another one", ERF_PORTS, label)
        return len(self._interfaces) % ERF_PORTS | linktype << 8

    @property
    def needs_nanoseconds(self) -> bool:
        return any(interface.description.needs_nanoseconds for interface in self._interfaces)

    def use_format(self, file_format: FileFormat) -> None:
        self._settings = replace(self._settings, format=file_format)

    def use_rotation(self, rotation: RotationPolicy, *, skip_empty: bool) -> None:
        """From the next segment on."""
        self._settings = replace(self._settings, rotation=rotation, skip_empty=skip_empty)

    # ---- segments ----

    def open(self, start_ns: int) -> bool:
        """Opens the next segment if none is open. False: it cannot be had now (logged); try again later."""
        if self.segment is not None:
            return True
        if time.monotonic() < self._retry_at:
            return False
        if start_ns > self._merge.horizon_ns:
            start_ns = time.time_ns()
        try:
            self.segment = segment = self._opener.open(start_ns)
        except NoReaderError as error:
            self._wait_for_reader(error)
            return False
        except (CannotCreateError, InputOutputError) as error:
            self._fail(error)
            return False
        if not self._put(memoryview(self._settings.format.header(self._interfaces))):
            self.segment = None
            self._opener.discard(segment)
            self._fail(InputOutputError(segment.failure))
            return False
        self.has_opened = True
        self._said = ""
        self._page.add("segments_opened")
        self._page["segment_opened_ns"] = segment.opened_ns
        self._begin(start_ns)
        self._opener.prepare()
        return True

    def _fail(self, error: CannotCreateError | InputOutputError) -> None:
        self.failed = True
        self._retry_at = time.monotonic() + REOPEN_S
        if not self._outlives_failures:
            raise error
        self._publisher.count_write_error()
        if str(error) != self._said:
            self._said = str(error)
            log.error("no file can be written: %s; tried again every %g s", error, REOPEN_S)

    def _wait_for_reader(self, error: NoReaderError) -> None:
        self._retry_at = time.monotonic() + REOPEN_S
        if str(error) != self._said:
            self._said = str(error)
            log.warning("%s", error)

    @property
    def _outlives_failures(self) -> bool:
        return self._settings.live and not self._opener.is_stream

    def _begin(self, start_ns: int) -> None:
        assert self.segment is not None
        policy = self._settings.rotation
        room = policy.max_bytes
        if room != NEVER and not self._settings.count_captured_bytes:
            room = max(0, room - self.segment.bytes - len(self._statistics(self._interfaces)))
        # A batch that waits to be written may hold late packets: the segment's time is that of its newest.
        newest_ns = min(self._merge.batch_last_ns, self._merge.horizon_ns)
        boundary_ns = policy.boundary_after(max(start_ns, newest_ns))
        self._merge.begin_segment(boundary_ns, policy.max_packets, room)

    def rotate(self, reason: str) -> None:
        """Closes the open segment and opens the next one, for the records that wait now."""
        position = self._merge.next_ns or time.time_ns()
        if position > self._merge.horizon_ns:
            position = time.time_ns()
        if reason == TIME and position < self._merge.boundary_ns:
            # Forced: some source is silent, or its records come late. The next segment must not end where this one did.
            position = max(self._merge.boundary_ns, time.time_ns() if self._settings.live else 0)
        segment = self.segment
        if segment is not None and self._settings.skip_empty and segment.packets == 0:
            self._page.add("segments_skipped")
            segment.start_ns = position
            segment.opened_ns = self._page["segment_opened_ns"] = time.time_ns()
            self._begin(position)
            return
        self.close(reason)
        if self._may_open():
            self.open(position)

    def close(self, reason: str) -> None:
        """Closes the open segment, if there is one, and hands it to the publisher. The merge is held from then on."""
        self._merge.hold()
        segment = self.segment
        if segment is None:
            return
        segment.closed_because = reason
        self._describe(segment)
        if segment.sink.keeps_whole_writes:
            segment.failure = ""  # cut back to its last whole batch
        if self._settings.format.is_pcapng and not segment.failure:
            self._put(memoryview(self._statistics(self._interfaces)))
        if segment.sink.keeps_whole_writes:
            segment.failure = ""  # there may be no room for the statistics: the packets are worth more
        segment.sink.close_input()
        segment.closed_ns = time.monotonic_ns()
        self._tell()
        self.segment = None
        self._page["open_packets"] = 0
        self._page["segment_opened_ns"] = 0
        self._publisher.submit(segment, self._beat)

    def _describe(self, segment: Segment) -> None:
        stages = {"kernel": 0, "filter": 0, "ring": 0, "merge": 0, "writer": self._writer_dropped}
        for i in range(len(self._labels)):
            delta = self._untold(i)
            stages["kernel"] += delta.dropped_kernel
            stages["filter"] += delta.dropped_filter
            stages["ring"] += delta.dropped_ring
            stages["merge"] += self._merge.source_totals(i)[1] - self._told_dropped[i]
        segment.dropped = stages

    def _statistics(self, interfaces: Sequence[OutputInterface]) -> bytes:
        """The statistics blocks that the open segment would end with now."""
        segment = self.segment
        assert segment is not None
        if not self._settings.format.is_pcapng:
            return b""
        start_ns, end_ns = self._told_until_ns, time.time_ns()
        if not self._settings.live:
            start_ns, end_ns = segment.first_ns or 0, segment.last_ns or 0
        deltas = [self._untold(i) for i in range(len(self._labels))]
        delivered = [segment.source_packets.get(label, 0) for label in self._labels]
        return statistics_blocks(interfaces, deltas, delivered, start_ns, end_ns)

    def _untold(self, source: int) -> SourceCounts:
        """What a source counted since the last file that told it."""
        counts = SourceCounts(*self._merge.source_counters(source))
        told = self._told[source]
        if told is None:
            if counts.received:
                self._told[source] = counts
            return SourceCounts()
        return counts.since(told)

    def _tell(self) -> None:
        """The segment that is closed now has told everything."""
        for i in range(len(self._labels)):
            counts = SourceCounts(*self._merge.source_counters(i))
            if self._told[i] is not None:
                self._told[i] = counts
            self._told_dropped[i] = self._merge.source_totals(i)[1]
        self._told_until_ns = time.time_ns()
        self._writer_dropped = 0

    # ---- packets ----

    @property
    def plain_fd(self) -> int:
        """What a batch can simply be written to; -1: there is none, or it needs more care."""
        return -1 if self.segment is None or self.segment.failure else self.segment.sink.plain_fd

    def write(self, done: int = 0) -> None:
        """Writes what the merge has put out, all but the first `done` bytes, which the open segment has already.
        Whatever happens to it, every packet is counted once."""
        self.books.set_unsettled(self._unsettled)
        self.books.note_batch()
        written = False
        try:
            written = self._write(self._merge.output(), done)
        finally:
            if not written:
                self._writer_dropped += self.books.count_dropped()
            self._merge.emptied()

    def _write(self, data: memoryview, done: int) -> bool:
        """A compressor that died may have taken half of the batch into its file, which goes to quarantine, and a full
        disk's file is cut: the whole batch is written again into the next one."""
        for start in (done, 0):
            if not self.open(self._merge.batch_first_ns or time.time_ns()):
                return False
            if self._put(data, start):
                self.books.count_written()
                self.absorb()
                return True
            segment = self.segment
            assert segment is not None
            failure = segment.failure
            self._abandon(segment)
            if not self._outlives_failures:
                raise InputOutputError(failure)
            if not (segment.packets and segment.sink.keeps_whole_writes):
                self._slow_down()
        return False

    def absorb(self) -> None:
        """What was written since the last look is the open segment's."""
        taken = self.books.take()
        if taken is None:
            return
        packets, length, first_ns, last_ns, late, late_max_ns = taken
        segment = self.segment
        assert segment is not None
        segment.bytes += length
        segment.sink.written += length
        sources = {label: count for label, count in zip(self._labels, packets, strict=True) if count}
        segment.add_batch(sources, first_ns, last_ns, late, late_max_ns)

    def _slow_down(self) -> None:
        """One failure is answered at once; failures that follow each other must not make a useless file each."""
        now = time.monotonic()
        if now - self._failed_at < REOPEN_S:
            self._retry_at = now + REOPEN_S
        self._failed_at = now

    def _put(self, data: memoryview, done: int = 0) -> bool:
        segment = self.segment
        if segment is None or segment.failure:
            return False
        try:
            segment.sink.write(data, self._beat, done)
        except SinkError as error:
            segment.failure = str(error)
            self._publisher.count_write_error()
            if self._outlives_failures:
                log.error("%s", error)
            return False
        segment.bytes += len(data)
        self._page.add("written_bytes", len(data))
        return True

    def _abandon(self, segment: Segment) -> None:
        """The open segment cannot be written on. What a plain file holds is whole and is published as it is, and a
        segment without a packet is not worth a file."""
        self.failed = True
        if segment.packets:
            self.close(WRITE_ERROR)
            return
        self._merge.hold()
        self.segment = None
        self._page["segment_opened_ns"] = 0
        self._opener.discard(segment)

    def take_back(self) -> None:
        """Packets that were written into files that somebody removed since: the writer has lost them."""
        while not self._publisher.vanished.empty():
            for label, packets in self._publisher.vanished.get().items():
                self.books.take_back(self._labels.index(label), packets)
                self._writer_dropped += packets

    def drop_what_waits(self) -> None:
        """The end has come, and no segment can be had: what is still to come is dropped by the writer, and counted."""
        self._merge.begin_segment(NEVER, NEVER, NEVER)

    def finish(self, reason: str) -> None:
        """Closes the last segment and waits until everything is published."""
        self.close(reason)
        self._opener.discard_spare()
        self._publisher.finish(self._beat)
        self.take_back()
