"""From a closed segment to a published file: off the data path, in a thread of the merge worker.

In this order: the compressor ends with 0, the file is synced, hashed, its sidecar written, the file renamed to its
published name (never over another file), the directory synced. Only then it counts as published. What fails goes to
quarantine with its reason beside it. Threads only run system calls and hashing here, which both let the others run.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import hashlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from appliance.counters import CounterPage, publish_bucket
from appliance.errors import InputOutputError
from appliance.merge.compressor import SinkError
from appliance.merge.naming import Naming
from appliance.merge.segment import Segment
from appliance.process import libc

log = logging.getLogger(__name__)

AT_FDCWD = -100
RENAME_NOREPLACE = 1
HASH_CHUNK_BYTES = 1 << 20
NAME_TRIES = 100


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """What `meta/<file>.json` says about a published file."""

    file: str
    output: str
    sequence: int
    packets: int
    bytes: int  # of the file, as published
    uncompressed_bytes: int | None
    first_ns: int | None
    last_ns: int | None
    dropped: Mapping[str, int]
    late: int
    late_max_ns: int
    sha256: str
    closed_because: str
    recovered: bool = False
    interfaces: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()


def rename_without_replacing(source: str, target: str) -> None:
    """renameat2(RENAME_NOREPLACE). FileExistsError: the name is taken."""
    result = libc().renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE)
    if result == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), target)
    # A file system without that flag: a second name that must not exist yet, then away with the first.
    os.link(source, target, follow_symlinks=False)
    os.unlink(source)


def sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_and_hash(path: str) -> tuple[str, int]:
    """fsync, then (sha256, bytes). The sync is never tried twice: after a failed one the pages may be gone."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        digest = hashlib.sha256()
        length = 0
        while chunk := os.read(fd, HASH_CHUNK_BYTES):
            digest.update(chunk)
            length += len(chunk)
        return digest.hexdigest(), length
    finally:
        os.close(fd)


def write_durably(path: str, data: bytes, mode: int) -> None:
    """A small file beside its temporary: whole or not there."""
    temporary = f"{path}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)


class Publisher:
    """Publishes closed segments in their order. `on_settled(segment)` is called when one is published or quarantined."""

    QUEUE_SEGMENTS = 8

    def __init__(
        self,
        naming: Naming,
        output: str,
        page: CounterPage,
        mode: int,
        timeout_s: float,
        on_settled: Callable[[Segment], None],
    ) -> None:
        self._naming = naming
        self._output = output
        self._page = page
        self._mode = mode
        self._timeout_s = timeout_s
        self._on_settled = on_settled
        self._queue: queue.Queue[Segment | None] = queue.Queue(self.QUEUE_SEGMENTS)
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def submit(self, segment: Segment, beat: Callable[[], None]) -> None:
        """Hands a closed segment over; waits, with signs of life, while too many are waiting already."""
        while True:
            try:
                self._queue.put(segment, timeout=0.5)
                self._page["queued_segments"] = self._queue.qsize()
                return
            except queue.Full:
                beat()

    def finish(self, beat: Callable[[], None]) -> None:
        """Waits until everything is settled."""
        self._queue.put(None)
        while self._thread.is_alive():
            self._thread.join(0.5)
            beat()

    def _run(self) -> None:
        while (segment := self._queue.get()) is not None:
            try:
                self._settle(segment)
            except Exception:
                log.exception("%s: publishing failed in a way that nobody thought of", segment.path)
            self._page["queued_segments"] = self._queue.qsize()

    def _settle(self, segment: Segment) -> None:
        try:
            segment.sink.finish(self._timeout_s)
        except SinkError as error:
            self._page.add("compressor_failures")
            segment.failure = segment.failure or str(error)
        if segment.failure:
            self.quarantine(segment)
        else:
            try:
                self.publish(segment)
            except (OSError, InputOutputError) as error:
                self._page.add("write_errors")
                segment.failure = f"{segment.path}: cannot be published: {error}"
                self.quarantine(segment)
        self._on_settled(segment)

    def publish(self, segment: Segment) -> str:
        """Returns the published path."""
        if self._naming.stream is not None:
            self._count_published(segment, segment.bytes)
            return self._naming.stream
        start_ns = segment.start_ns
        if self._naming.by_first_packet and segment.first_ns is not None:
            start_ns = segment.first_ns
        sha256, length = sync_and_hash(segment.path)
        for _ in range(NAME_TRIES):
            final = self._naming.final_path(segment.sequence, start_ns)
            sidecar = self._naming.sidecar_path(segment.sequence, start_ns)
            if sidecar is not None:
                write_durably(sidecar, self._sidecar(segment, final, sha256, length).to_json(), self._mode)
            now = time.time()
            os.utime(segment.path, (now, now))  # directory readers that go by mtime take what is newer than their last look
            try:
                rename_without_replacing(segment.path, final)
            except FileExistsError:
                if sidecar is not None:
                    os.unlink(sidecar)
                segment.sequence = self._naming.next_sequence()
                continue
            sync_directory(os.path.dirname(final))
            self._count_published(segment, length)
            log.info("published %s: %d packets, %d bytes, closed because of %s", final, segment.packets, length,
                     segment.closed_because)
            return final
        raise InputOutputError(f"{final}: this name and {NAME_TRIES - 1} others are taken")

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
        self._page.add("segments_published")
        self._page.add("published_packets", segment.packets)
        self._page.add("published_bytes", length)
        self._page["last_published_ns"] = time.time_ns()
        duration_ns = time.monotonic_ns() - segment.closed_ns
        self._page.add("publish_ns", duration_ns)
        self._page.add(publish_bucket(duration_ns))

    def quarantine(self, segment: Segment) -> None:
        """Out of the way of every consumer, with the reason beside it; nothing is deleted."""
        self._page.add("segments_quarantined")
        self._page.add("quarantined_packets", segment.packets)
        target = self._naming.quarantine_path(segment.sequence)
        try:
            if target is not None:
                rename_without_replacing(segment.path, target)
                reason: dict[str, Any] = {"reason": segment.failure, "packets": segment.packets}
                write_durably(f"{target}.json", json.dumps(reason).encode() + b"\n", self._mode)
        except OSError as error:
            log.error("%s: cannot be moved to quarantine: %s", segment.path, error)
        log.error("quarantined %s: %s", target or segment.path, segment.failure)
