"""The merged stream into segments: opens, writes, rotates, closes, and counts every packet on its way.

The merge worker's loop (workers/merge.py) calls this between the compiled calls: per batch, never per packet.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from appliance.counters import CounterPage
from appliance.errors import CannotCreateError, ConfigError
from appliance.formats.encode import InterfaceDescription
from appliance.merge.compressor import SinkError
from appliance.merge.order import Merge
from appliance.merge.publish import Publisher
from appliance.merge.rotation import NEVER, WRITE_ERROR, RotationPolicy
from appliance.merge.segment import (
    FileFormat,
    OutputInterface,
    Segment,
    SegmentOpener,
    SourceCounts,
    statistics_blocks,
)

log = logging.getLogger(__name__)

REOPEN_S = 1.0  # after a failure to open a segment, packets are dropped (and counted) for this long before the next try


@dataclass(frozen=True)
class StreamSettings:
    """What the configuration says about the files of one output."""

    format: FileFormat
    rotation: RotationPolicy
    live: bool
    skip_empty: bool = False
    count_captured_bytes: bool = False  # rotate_bytes counts packet bytes alone


class OutputStream:
    """One output's files. `labels`: the sources' names; `source_pages`: their pages of MERGE_SOURCE_FIELDS."""

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
    ) -> None:
        self.has_opened = False
        self.segment: Segment | None = None
        self.failed = False
        self._merge = merge
        self._settings = settings
        self._opener = opener
        self._publisher = publisher
        self._page = page
        self._labels = labels
        self._source_pages = source_pages
        self._beat = beat
        self._may_open = may_open
        self._interfaces: list[OutputInterface] = []
        self._dropped_at_start = [0] * len(labels)
        self._writer_dropped: dict[int, int] = {}
        self._retry_at = 0.0
        merge.count_captured_bytes = settings.count_captured_bytes

    # ---- interfaces ----

    def add_interface(self, source: int, description: InterfaceDescription) -> None:
        """A source announces an interface: it gets a number in the files. ConfigError: this format cannot hold it."""
        local = sum(1 for interface in self._interfaces if interface.source == source)
        if not description.name:
            name = self._labels[source] if local == 0 else f"{self._labels[source]}.{local}"
            description = replace(description, name=name)
        interface = OutputInterface(description, source, local)
        if self._settings.format.is_pcapng:
            number = len(self._interfaces)
        else:
            self._check_linktype(interface)
            number = 0
        self._merge.map_interface(source, local, number)
        self._interfaces.append(interface)
        if self.segment is not None and self._settings.format.is_pcapng:
            self._put(memoryview(self._settings.format.interface_block(interface)))

    def _check_linktype(self, interface: OutputInterface) -> None:
        if self._interfaces and self._interfaces[0].description.linktype != interface.description.linktype:
            first = self._interfaces[0]
            raise ConfigError(
                f"{self._labels[first.source]} has link type {first.description.linktype}, "
                f"{self._labels[interface.source]} has {interface.description.linktype}: one pcap file cannot hold both; "
                'use pcapng, or linktype = "sll2" on live interfaces'
            )

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
        try:
            segment = self._opener.open(start_ns)
        except (CannotCreateError, SinkError) as error:
            self._retry_at = time.monotonic() + REOPEN_S
            self._page.add("write_errors")
            log.error("no segment can be opened: %s; the next try is in %g s", error, REOPEN_S)
            self.failed = True
            return False
        self.segment = segment
        self.has_opened = True
        self._page.add("segments_opened")
        self._page["segment_opened_ns"] = segment.opened_ns
        segment.counts_at_start = [self._counts(i) for i in range(len(self._labels))]
        self._dropped_at_start = [self._merge.source_totals(i)[1] for i in range(len(self._labels))]
        self._writer_dropped = {}
        self._put(memoryview(self._settings.format.header(self._interfaces)))
        self._begin(start_ns)
        self._opener.prepare()
        return True

    def _begin(self, start_ns: int) -> None:
        policy = self._settings.rotation
        room = policy.max_bytes
        if room != NEVER and self.segment is not None and not self._settings.count_captured_bytes:
            room = max(0, room - self.segment.bytes)
        self._merge.begin_segment(policy.boundary_after(start_ns), policy.max_packets, room)

    def rotate(self, reason: str) -> None:
        """Closes the open segment and opens the next one, for the records that wait now."""
        position = self._merge.next_ns or time.time_ns()
        if self.segment is not None and self._settings.skip_empty and self._merge.segment_packets == 0:
            self._page.add("segments_skipped")
            self.segment.start_ns = position
            self._begin(position)
            return
        self.close(reason)
        if self._may_open():
            self.open(position)

    def close(self, reason: str) -> None:
        """Closes the open segment, if there is one, and hands it to the publisher."""
        segment = self.segment
        if segment is None:
            return
        self._describe(segment, reason)
        if self._settings.format.is_pcapng and not segment.failure:
            now = time.time_ns() if self._settings.live else (segment.last_ns or 0)
            start = segment.start_ns if self._settings.live else (segment.first_ns or 0)
            deltas = [self._counts(i).since(segment.counts_at_start[i]) for i in range(len(self._labels))]
            delivered = [self._merge.source_totals(i)[3] for i in range(len(self._labels))]
            self._put(memoryview(statistics_blocks(self._interfaces, deltas, delivered, start, now)))
        segment.sink.close_input()
        segment.closed_ns = time.monotonic_ns()
        self.segment = None
        self._page["open_packets"] = 0
        self._page["segment_opened_ns"] = 0
        self._publisher.submit(segment, self._beat)

    def _describe(self, segment: Segment, reason: str) -> None:
        segment.closed_because = segment.closed_because or reason
        if segment.packets:
            segment.first_ns = self._merge.segment_first_ns
            segment.last_ns = self._merge.segment_last_ns
        segment.late = self._merge.segment_late
        segment.late_max_ns = self._merge.segment_late_max_ns
        stages = {"kernel": 0, "filter": 0, "ring": 0, "merge": 0, "writer": sum(self._writer_dropped.values())}
        for i in range(len(self._labels)):
            delta = self._counts(i).since(segment.counts_at_start[i])
            stages["kernel"] += delta.dropped_kernel
            stages["filter"] += delta.dropped_filter
            stages["ring"] += delta.dropped_ring
            stages["merge"] += self._merge.source_totals(i)[1] - self._dropped_at_start[i]
        segment.dropped = stages

    def _counts(self, source: int) -> SourceCounts:
        return SourceCounts(*self._merge.source_counters(source))

    # ---- packets ----

    def write(self) -> None:
        """Writes what the merge has put out. Whatever happens to it, every packet is counted once."""
        pending = [self._merge.take_pending(i) for i in range(len(self._labels))]
        self._note_consumed(pending)
        data = self._merge.output()
        for _ in range(2):
            if not self.open(self._merge.segment_first_ns or time.time_ns()):
                break
            if self._put(data):
                self._count_written(pending)
                self._merge.emptied()
                return
            # A compressor that died may have taken half of the batch into its file, which goes to quarantine: the whole
            # batch is written again into the next one.
            self._abandon()
        self._count_dropped(pending)
        self._merge.emptied()

    def _note_consumed(self, pending: Sequence[tuple[int, int]]) -> None:
        for i, page in enumerate(self._source_pages):
            consumed, dropped, late, _ = self._merge.source_totals(i)
            page["consumed_packets"] = consumed
            page["dropped_merge_packets"] = dropped
            page["late_packets"] = late
            page["held_packets"] = pending[i][0]
        self._page["late_packets"] = self._merge.late
        self._page["late_max_ns"] = self._merge.late_max_ns
        self._page["forced_packets"] = self._merge.forced
        self._page["last_packet_ns"] = self._merge.segment_last_ns

    def _put(self, data: memoryview) -> bool:
        segment = self.segment
        if segment is None or segment.failure:
            return False
        try:
            segment.sink.write(data, self._beat)
        except SinkError as error:
            segment.failure = str(error)
            self._page.add("write_errors")
            log.error("%s", error)
            return False
        segment.bytes += len(data)
        self._page.add("written_bytes", len(data))
        return True

    def _abandon(self) -> None:
        """The open segment cannot be written on. What a plain file holds is whole and is published as it is."""
        segment = self.segment
        if segment is None:
            return
        self.failed = True
        if segment.sink.keeps_whole_writes and segment.packets:
            segment.failure = ""
        self.close(WRITE_ERROR)

    def _count_written(self, pending: Sequence[tuple[int, int]]) -> None:
        segment = self.segment
        assert segment is not None
        total = 0
        for i, (packets, captured) in enumerate(pending):
            if packets:
                page = self._source_pages[i]
                page["held_packets"] = 0
                page.add("written_packets", packets)
                page.add("written_bytes", captured)
                label = self._labels[i]
                segment.source_packets[label] = segment.source_packets.get(label, 0) + packets
                total += packets
        segment.packets += total
        self._page.add("written_packets", total)
        self._page.add("merged_packets", total)
        self._page["open_packets"] = segment.packets

    def _count_dropped(self, pending: Sequence[tuple[int, int]]) -> None:
        for i, (packets, _) in enumerate(pending):
            if packets:
                self._source_pages[i]["held_packets"] = 0
                self._source_pages[i].add("dropped_writer_packets", packets)
                self._writer_dropped[i] = self._writer_dropped.get(i, 0) + packets
                self._page.add("merged_packets", packets)

    def finish(self, reason: str) -> None:
        """Closes the last segment and waits until everything is published."""
        self.close(reason)
        self._opener.discard_spare()
        self._publisher.finish(self._beat)


class SettledCounts:
    """Packets per source in published or quarantined files: what a successor subtracts to find what is lost."""

    def __init__(self, labels: Sequence[str], source_pages: Sequence[CounterPage]) -> None:
        self._pages = dict(zip(labels, source_pages, strict=True))
        self._lock = threading.Lock()

    def __call__(self, segment: Segment) -> None:
        with self._lock:
            for label, packets in segment.source_packets.items():
                self._pages[label].add("closed_packets", packets)
