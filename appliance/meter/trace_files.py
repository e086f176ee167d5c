"""The files of live flow traces: staged in `work/`, published in `ready/` whole, synced, and never over another file.

    FlowFiles.write -> work/LABEL -> (the flow is over) -> Publisher, a thread: fsync, rename into ready/, retention

Beside the flows' files, `ready/` gets indexes, `flows-TIME-NUMBER.jsonl`, with a line for each flow that was published
before them. What a killed worker left in `work/` lacks packets, and is removed and counted: every packet is in the
recording, of which `appliance trace` makes the flows again.

One file is open at a time in either thread, for as long as one write takes. Nothing here raises for a disk's sake: what
cannot be written is counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from appliance.config import Traceflow
from appliance.counters import TRACE_END_REASONS, CounterPage
from appliance.errors import CannotCreateError
from appliance.meter.trace_publisher import FinishedFlow, Publisher, TraceLimits, free_bytes
from appliance.meter.traceflow import description_label, index_entry, new_file, put
from appliance.meter.traceflow_formats import Description, FlowFormat

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # at the free space
QUEUE_MAX = 4096  # flows that are over and not yet published; then the worker waits, and its ring fills
WAIT_S = 0.005


@dataclass
class OpenTrace:
    """A flow's unfinished file. `bytes` and `packets` are in it; `refused` and `failed` packets should have been."""

    label: str
    path: str = ""
    bytes: int = 0
    packets: int = 0
    refused: int = 0
    failed: int = 0


class TraceFiles:
    """`write` and `ended` are those of FlowFiles. `settle` brings the page's gauges up to date; call it once a turn."""

    def __init__(
        self,
        directory: Path,
        settings: Traceflow,
        format: FlowFormat,
        page: CounterPage,
        beat: Callable[[], None],
        *,
        free: Callable[[str], int] = free_bytes,
    ) -> None:
        self.work, self.ready = str(directory / "work"), str(directory / "ready")
        self._settings = settings
        self._format = format
        self._page = page
        self._beat = beat
        self._free = free
        self._open: dict[int, OpenTrace] = {}
        self._staged_bytes = 0
        self._has_room, self._looked_at = True, -LOOK_EVERY_S
        self._said = ""
        limits = TraceLimits(
            settings.retain_bytes, settings.retain_files, settings.retain_seconds, settings.min_free_bytes
        )
        self._publisher = Publisher(self.work, self.ready, limits, page, lambda: self._staged_bytes, free=free)

    # ---- what the table calls ----

    def write(self, slot: int, description: Description | None, entries: bytes, packets: int) -> None:
        trace = self._open.get(slot)
        if trace is None:
            assert description is not None
            trace = self._open[slot] = OpenTrace(description_label(description))
        # A file holds a flow's first packets, and none behind a missing one.
        if trace.failed:
            trace.failed += packets
        elif trace.refused or not self._may_write(len(entries)):
            trace.refused += packets
        else:
            self._append(trace, description, entries, packets)

    def ended(self, slot: int, description: Description, reason: int) -> None:
        self._beat()  # many may end together
        trace = self._open.pop(slot, None) or OpenTrace(description_label(description))
        self._page.add(f"flows_{TRACE_END_REASONS[reason]}")
        self._page.add("cut_packets", description.cut_packets)
        self._page.add("refused_packets", trace.refused)
        self._page.add("failed_packets", trace.failed)
        self._staged_bytes -= trace.bytes
        self._wait_for_the_publisher()
        name = os.path.basename(trace.path)
        line = index_entry(trace.label, name, description, reason) | {"packets_in_file": trace.packets}
        self._publisher.submit(FinishedFlow(trace.path, trace.bytes, trace.packets, line))

    # ---- writing ----

    def _may_write(self, length: int) -> bool:
        """Room for so many bytes: below retain_bytes, of which published files can be given up, and on the disk."""
        now = time.monotonic()
        if now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            limit = self._settings.min_free_bytes
            self._has_room = True
            with contextlib.suppress(OSError):
                self._has_room = not limit or self._free(self.work) >= limit
            if not self._has_room:
                self._tell("the file system has less than min_free_bytes left: flows are cut short")
        return self._has_room and self._staged_bytes + length <= self._settings.retain_bytes

    def _append(self, trace: OpenTrace, description: Description | None, entries: bytes, packets: int) -> None:
        try:
            if not trace.path:
                trace.label, trace.path = new_file(self.work, trace.label, self._format.extension)
            linktype = description.linktype if description is not None else 0
            fd = os.open(trace.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                size = self._put(fd, linktype, entries)
            finally:
                os.close(fd)
        except (OSError, CannotCreateError) as error:
            trace.failed += packets
            self._page.add("write_errors")
            self._tell(f"a flow's file cannot be written: {error}")
            return
        trace.packets += packets
        self._staged_bytes += size - trace.bytes
        trace.bytes = size

    def _put(self, fd: int, linktype: int, entries: bytes) -> int:
        """The file's new size. OSError, and the file is as it was."""
        before = os.fstat(fd).st_size
        try:
            put(fd, self._format, entries, lambda: self._format.header(linktype, True))
        except OSError:
            end = self._format.end
            os.ftruncate(fd, max(0, before - len(end)))
            if before and os.pwrite(fd, end, before - len(end)) != len(end):
                os.ftruncate(fd, 0)
            raise
        return os.fstat(fd).st_size

    def _wait_for_the_publisher(self) -> None:
        while self._publisher.queued_flows >= QUEUE_MAX:
            self._publisher.check()
            self._beat()
            time.sleep(WAIT_S)

    def _tell(self, what: str) -> None:
        """Once, not for every flow."""
        if what != self._said:
            self._said = what
            log.error("flow traces in %s: %s", os.path.dirname(self.work), what)

    # ---- once a turn ----

    def settle(self) -> None:
        self._page["staged_bytes"] = self._staged_bytes
        self._page["queued_flows"], self._page["queued_packets"] = self._publisher.waiting()

    def close(self) -> None:
        """Everything that is over is published, the last index too."""
        while self._publisher.queued_flows:
            self._publisher.check()
            self._beat()
            time.sleep(WAIT_S)
        self._publisher.close()
        self.settle()


def remove_leftovers(work: Path, page: CounterPage) -> None:
    """What a killed predecessor had not finished. Indexes are the publisher's matter."""
    for entry in os.scandir(work):
        if entry.name.endswith(".jsonl") or not entry.is_file(follow_symlinks=False):
            continue
        try:
            os.unlink(entry.path)
            page.add("leftover_files")
        except OSError as error:
            log.error("%s: an unfinished trace of an earlier run cannot be removed: %s", entry.path, error.strerror)
