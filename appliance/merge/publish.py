"""From a closed segment to a published file: off the data path, in a thread of the merge worker.

In this order: the compressor ends with 0, the file is synced, hashed, its sidecar written and synced, the file renamed
to its published name (never over another file), the directory synced. Only then it counts as published. What fails goes
to quarantine with its reason beside it; a sync that failed is never tried again, for the kernel forgets what it lost.
Threads only run system calls and hashing here, which both let the others run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping

from appliance.counters import CounterPage, publish_bucket
from appliance.disk import opened, rename_without_replacing, sync_directory, sync_file
from appliance.errors import InputOutputError
from appliance.merge.compressor import CompressorSink, SinkError
from appliance.merge.events import Announcer
from appliance.merge.ledger import Ledger
from appliance.merge.naming import Naming
from appliance.merge.retention import Retention
from appliance.merge.segment import Segment

log = logging.getLogger(__name__)

HASH_CHUNK_BYTES = 1 << 20
NAME_TRIES = 100
RETENTION_EVERY_S = 3.0


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """What `meta/<file>.json` says about a published file."""

    file: str
    output: str
    sequence: int
    packets: int
    bytes: int  # of the file, as published
    uncompressed_bytes: int
    first_ns: int | None
    last_ns: int | None
    dropped: Mapping[str, int]
    late: int
    late_max_ns: int
    sha256: str
    closed_because: str
    recovered: bool = False
    interfaces: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def sync_and_hash(path: str) -> tuple[str, int]:
    """`sync_file`, then (sha256, bytes)."""
    sync_file(path)
    digest = hashlib.sha256()
    length = 0
    with opened(path, os.O_NOFOLLOW) as fd:
        while chunk := os.read(fd, HASH_CHUNK_BYTES):
            digest.update(chunk)
            length += len(chunk)
    return digest.hexdigest(), length


def write_durably(path: str, text: str, mode: int) -> None:
    """A small file beside its temporary: whole or not there, and its name on the disk too."""
    temporary = f"{path}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(text.encode())
            file.flush()
            os.fsync(fd)
        os.rename(temporary, path)
        sync_directory(os.path.dirname(path))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def free_name(naming: Naming, sequence: int, start_ns: int) -> tuple[int, str]:
    """(sequence, path) for a file to be published. Nobody but us makes files there, so a name that is free stays free;
    the rename makes sure."""
    for _ in range(NAME_TRIES):
        final = naming.final_path(sequence, start_ns)
        if not os.path.lexists(final):
            return sequence, final
        sequence = naming.next_sequence()
    raise InputOutputError(f"{final}: this name and {NAME_TRIES - 1} others are taken")


class Publisher:
    """Publishes closed segments in their order, and between them keeps the retention's limits.

    `before`: a job that its thread does first (the recovery of an earlier life's files). `failed`: something went to
    quarantine, or could not even get there. `vanished`: packets by source of files that somebody removed before they
    were published; whoever counted them as written takes them from there.
    """

    QUEUE_SEGMENTS = 8

    def __init__(
        self,
        naming: Naming,
        output: str,
        page: CounterPage,
        mode: int,
        timeout_s: float,
        ledger: Ledger,
        retention: Retention | None = None,
        before: Callable[[], None] | None = None,
        announcer: Announcer | None = None,
    ) -> None:
        self.failed = False
        self.vanished: queue.SimpleQueue[Mapping[str, int]] = queue.SimpleQueue()
        self._stranded: list[Segment] = []
        self._naming = naming
        self._output = output
        self._page = page
        self._mode = mode
        self._timeout_s = timeout_s
        self._ledger = ledger
        self._retention = retention
        self._before = before
        self._announcer = announcer
        self._counting = threading.Lock()
        self._waiting = 0
        self._queue: queue.Queue[Segment | None] = queue.Queue(self.QUEUE_SEGMENTS)
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def submit(self, segment: Segment, beat: Callable[[], None]) -> None:
        """Hands a closed segment over; waits, with signs of life, while too many are waiting already."""
        self._count_waiting(1)
        self._put(segment, beat)

    def finish(self, beat: Callable[[], None]) -> None:
        """Waits until everything is settled."""
        self._put(None, beat)
        while self._thread.is_alive():
            self._thread.join(0.5)
            beat()
        if self._announcer is not None:
            self._announcer.finish(beat)

    def count_write_error(self) -> None:
        """Both threads of a merge worker count these."""
        with self._counting:
            self._page.add("write_errors")

    def _count_waiting(self, change: int) -> None:
        with self._counting:
            self._waiting += change
            self._page["queued_segments"] = self._waiting

    def _put(self, segment: Segment | None, beat: Callable[[], None]) -> None:
        while True:
            try:
                return self._queue.put(segment, timeout=0.5)
            except queue.Full:
                beat()

    def _run(self) -> None:
        if self._announcer is not None:
            self._guarded("manifest", self._announcer.begin)
        if self._before is not None:
            self._guarded("recovery", self._before)
        while True:
            try:
                segment = self._queue.get(timeout=RETENTION_EVERY_S)
            except queue.Empty:
                self._retain()
                continue
            if segment is None:
                return self._guarded("quarantine", self._set_stranded_aside)
            self._guarded(segment.path, functools.partial(self._settle, segment))
            self._count_waiting(-1)
            self._retain()

    def _retain(self) -> None:
        if self._stranded:
            self._guarded("quarantine", self._set_stranded_aside)
        if self._retention is not None:
            self._guarded("retention", self._retention.enforce)

    def _guarded(self, what: str, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception:
            self.failed = True
            log.exception("%s: failed in a way that nobody thought of", what)

    def _settle(self, segment: Segment) -> None:
        """Published, or in quarantine: whichever, its packets are counted once."""
        self._end_sink(segment)
        if not segment.failure:
            try:
                self.publish(segment)
                return
            except (OSError, InputOutputError) as error:
                self.count_write_error()
                segment.failure = f"{segment.path}: cannot be published: {error}"
        if self._naming.stream is None and not os.path.lexists(segment.path):
            self._count_vanished(segment)
        else:
            self.quarantine(segment)

    def _count_vanished(self, segment: Segment) -> None:
        self.failed = True
        self.vanished.put(segment.source_packets)
        log.error("%s does not exist any longer: its %d packets are lost", segment.path, segment.packets)

    def _end_sink(self, segment: Segment) -> None:
        try:
            if segment.failure:
                segment.sink.abandon()
            else:
                segment.sink.finish(self._timeout_s)
        except SinkError as error:
            segment.failure = str(error)
        if segment.failure and isinstance(segment.sink, CompressorSink):
            self._page.add("compressor_failures")

    def publish(self, segment: Segment) -> str:
        """Returns the published path. OSError, InputOutputError: it is not published, `segment.path` is where it is."""
        if self._naming.stream is not None:
            self._ledger.add(segment.source_packets)
            self._page.add("segments_published")
            self._page.add("published_packets", segment.packets)
            self._count_published(segment, segment.bytes)
            return self._naming.stream
        start_ns = segment.start_ns
        if self._naming.by_first_packet and segment.first_ns is not None:
            start_ns = segment.first_ns
        elif segment.first_ns is not None and not segment.late:
            # What waited in the rings for a successor is older than its first file: names sort as the packets do.
            start_ns = min(start_ns, segment.first_ns)
        if self._naming.sidecar_path(segment.sequence, start_ns) is None:
            sha256, length = "", sync_file(segment.path)  # nowhere to write the hash
        else:
            sha256, length = sync_and_hash(segment.path)
        segment.sequence, final = free_name(self._naming, segment.sequence, start_ns)
        sidecar = self._naming.sidecar_path(segment.sequence, start_ns)
        counted = {"segments_published": 1, "published_packets": segment.packets}
        self._ledger.begin(segment.path, segment.source_packets, **counted)
        told = self._sidecar(segment, final, sha256, length)
        try:
            if sidecar is not None:
                write_durably(sidecar, told.to_json(), self._mode)
            now = time.time()
            os.utime(
                segment.path, (now, now)
            )  # directory readers that go by mtime take what is newer than their last look
            rename_without_replacing(segment.path, final)
            segment.path = final
            sync_directory(os.path.dirname(final))
        except OSError:
            self._ledger.give_up()
            if sidecar is not None:
                with contextlib.suppress(OSError):
                    os.unlink(sidecar)
            raise
        self._ledger.end()
        self._count_published(segment, length)
        if self._announcer is not None:
            self._announcer.published(final, dataclasses.asdict(told))
        if self._retention is not None:
            self._retention.add(final)
        log.info(
            "published %s: %d packets, %d bytes, closed because of %s",
            final,
            segment.packets,
            length,
            segment.closed_because,
        )
        return final

    def _sidecar(self, segment: Segment, final: str, sha256: str, length: int) -> Sidecar:
        return Sidecar(
            file=os.path.basename(final),
            output=self._output,
            sequence=segment.sequence,
            packets=segment.packets,
            bytes=length,
            uncompressed_bytes=segment.bytes,
            first_ns=segment.first_ns,
            last_ns=segment.last_ns,
            dropped=segment.dropped,
            late=segment.late,
            late_max_ns=segment.late_max_ns,
            sha256=sha256,
            closed_because=segment.closed_because,
            interfaces=segment.source_packets,
        )

    def _count_published(self, segment: Segment, length: int) -> None:
        self._page.add("published_bytes", length)
        self._page["last_published_ns"] = time.time_ns()
        duration_ns = time.monotonic_ns() - segment.closed_ns
        self._page.add("publish_ns", duration_ns)
        self._page.add(publish_bucket(duration_ns))

    def quarantine(self, segment: Segment) -> None:
        """Out of the way of every consumer, with the reason beside it; nothing is deleted. A policy without quarantine
        leaves the file under its staging name."""
        self.failed = True
        log.error("%s is not published (%d packets): %s", segment.path, segment.packets, segment.failure)
        if not self._set_aside(segment, segments_quarantined=1, quarantined_packets=segment.packets):
            self._stranded.append(segment)

    def _set_aside(self, segment: Segment, **counted: int) -> bool:
        """Moves the file, then writes the reason. False: one of them cannot be done now. `counted` counts in any case,
        and with the move if there is one: who dies before it leaves the file to the recovery, which counts it anew."""
        target = None if segment.is_aside else self._naming.quarantine_path(segment.sequence)
        if target is None:
            self._page.add_all(counted)
        else:
            try:
                self._ledger.begin(segment.path, segment.source_packets, **counted)
                rename_without_replacing(segment.path, target)
                self._ledger.end()
            except OSError as error:
                self._ledger.give_up()
                self._page.add_all(counted)
                if segment not in self._stranded:
                    log.error("%s: cannot be moved to quarantine, which is tried again: %s", segment.path, error)
                return False
            segment.path, segment.is_aside = target, True
        return not segment.is_aside or write_reason(segment.path, segment.failure, segment.packets, self._mode)

    def _set_stranded_aside(self) -> None:
        """What could not be moved or explained when it failed: the disk was full, a directory gone or not writable."""
        for segment in list(self._stranded):
            if os.path.lexists(segment.path):
                if not self._set_aside(segment):
                    continue
            elif not segment.is_aside:
                self._page["quarantined_packets"] -= segment.packets
                self._count_vanished(segment)
            self._stranded.remove(segment)


def write_reason(path: str, reason: str, packets: int, mode: int) -> bool:
    """Beside a file in quarantine: why it is there. False: it cannot be written now; the log has said so already."""
    text = json.dumps({"reason": reason, "packets": packets}) + "\n"
    try:
        write_durably(f"{path}.json", text, mode)
    except OSError as error:
        log.error("%s.json: cannot be written: %s", path, error)
        return False
    return True
