"""The thread that publishes finished flow traces, and keeps as many as the limits allow, newest first.

It alone writes the published, unpublished, stored, expired and settling fields of the page. A file's rename and its
count cannot be parted by a death: before the rename the page names the file's inode, and what its counters become
(`settle_with_the_dead`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TextIO

from appliance.counters import TRACE_SETTLED_FIELDS, CounterPage
from appliance.disk import rename_without_replacing, sync_directory, sync_file, sync_file_system

log = logging.getLogger(__name__)

BATCH_FLOWS = 512
SYNC_ONE_BY_ONE = 8  # more files than that are synced together: one syncfs(2) costs less than hundreds of fsync(2)
INDEX_SECONDS = 60
LOOK_EVERY_S = 0.5
MAX_NAMES = 1_000_000
FILE_MODE = 0o640
NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class TraceLimits:
    """0: no such limit."""

    retain_bytes: int
    retain_files: int
    retain_seconds: int
    min_free_bytes: int


@dataclass(frozen=True)
class FinishedFlow:
    """A flow that is over. `path`: its file in `work/`, "" when it has none; `line`: what the index has about it."""

    path: str
    bytes: int
    packets: int
    line: dict[str, Any]


@dataclass
class StoredFile:
    name: str
    bytes: int
    published_ns: int


def free_bytes(directory: str) -> int:
    """What an unprivileged process may still write there."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


class Publisher:
    """See the module's text. `staged_bytes`: what unfinished files take, which counts against `retain_bytes` too."""

    def __init__(
        self,
        work: str,
        ready: str,
        limits: TraceLimits,
        page: CounterPage,
        staged_bytes: Callable[[], int],
        *,
        free: Callable[[str], int] = free_bytes,
    ) -> None:
        self._work, self._ready = work, ready
        self._limits = limits
        self._page = page
        self._staged_bytes = staged_bytes
        self._free = free
        self._queue: SimpleQueue[FinishedFlow | None] = SimpleQueue()
        self._submitted = self._submitted_packets = 0  # by the worker
        self._done = self._done_packets = 0  # by the thread
        self._stored: deque[StoredFile] = deque()
        self._stored_bytes = 0
        self._index: TextIO | None = None
        self._index_period = 0
        self._index_number = 0
        self._adopt()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    # ---- the worker's side ----

    @property
    def queued_flows(self) -> int:
        return self._submitted - self._done

    def waiting(self) -> tuple[int, int]:
        """(flows, packets) that are not published yet."""
        return self._submitted - self._done, self._submitted_packets - self._done_packets

    def submit(self, flow: FinishedFlow) -> None:
        self._submitted += 1
        self._submitted_packets += flow.packets
        self._queue.put(flow)

    def check(self) -> None:
        """RuntimeError: nobody publishes any longer, and waiting for it would have no end."""
        if not self._thread.is_alive():
            raise RuntimeError("the thread that publishes flow traces has ended")

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    # ---- the thread's side ----

    def _run(self) -> None:
        more = True
        while more:
            batch, more = self._next_batch()
            try:
                self._publish(batch)
                self._rotate_index(last=not more)
                self._retain()
            except OSError as error:
                log.error("flow traces in %s: %s", self._ready, error)

    def _next_batch(self) -> tuple[list[FinishedFlow], bool]:
        batch: list[FinishedFlow] = []
        with contextlib.suppress(Empty):
            while len(batch) < BATCH_FLOWS:
                flow = self._queue.get(timeout=LOOK_EVERY_S) if not batch else self._queue.get_nowait()
                if flow is None:
                    return batch, False
                batch.append(flow)
        return batch, True

    def _publish(self, batch: list[FinishedFlow]) -> None:
        faults = self._sync([flow.path for flow in batch if flow.path])
        for flow in batch:
            name = self._move(flow, faults.get(flow.path)) if flow.path else ""
            try:
                self._note(flow, name)
            except OSError as error:
                log.error("flow traces in %s: the index lacks a flow: %s", self._ready, error)
            self._done_packets += flow.packets
            self._done += 1
        if batch:
            sync_directory(self._ready)

    def _sync(self, paths: list[str]) -> dict[str, OSError]:
        """The files' bytes are on the disk, but for those in the answer."""
        if len(paths) > SYNC_ONE_BY_ONE and sync_file_system(self._work):
            return {}
        faults = {}
        for path in paths:
            try:
                sync_file(path)
            except OSError as error:
                faults[path] = error
        return faults

    def _move(self, flow: FinishedFlow, fault: OSError | None) -> str:
        """The file's name in `ready/`; "" when it did not get there, which is counted."""
        try:
            if fault is not None:
                raise fault
            for field, count in zip(TRACE_SETTLED_FIELDS, (1, flow.packets, flow.bytes), strict=True):
                self._page[f"settling_{field}"] = self._page[field] + count
            self._page["settling_inode"] = os.stat(flow.path, follow_symlinks=False).st_ino
            name = move_new(flow.path, self._ready)
        except OSError as error:
            self._page["settling_inode"] = 0
            self._page.add("unpublished_packets", flow.packets)
            log.error("%s: a flow's trace is not published: %s", flow.path, error.strerror)
            with contextlib.suppress(OSError):
                os.unlink(flow.path)
            return ""
        settle(self._page)
        self._store(StoredFile(name, flow.bytes, time.time_ns()))
        return name

    # ---- the index ----

    def _note(self, flow: FinishedFlow, name: str) -> None:
        if self._index is None:
            self._begin_index()
        assert self._index is not None
        named = {"label": os.path.splitext(name)[0], "file": name} if name else {"file": None}
        self._index.write(json.dumps(flow.line | named) + "\n")

    def _begin_index(self) -> None:
        now = time.time()
        self._index_period = int(now) // INDEX_SECONDS
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        while True:
            self._index_number += 1
            name = f"flows-{stamp}-{self._index_number:06d}.jsonl"
            if not os.path.lexists(os.path.join(self._ready, name)):
                path = os.path.join(self._work, name)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
                self._index = open(fd, "w", encoding="ascii")
                self._index_path = path
                return

    def _rotate_index(self, *, last: bool) -> None:
        if self._index is None:
            return
        self._index.flush()
        if last or int(time.time()) // INDEX_SECONDS != self._index_period:
            index, self._index = self._index, None
            self._publish_index(index, self._index_path)

    def _publish_index(self, index: TextIO, path: str) -> None:
        with index:
            os.fsync(index.fileno())
            length = os.fstat(index.fileno()).st_size
        name = move_new(path, self._ready)
        sync_directory(self._ready)
        self._store(StoredFile(name, length, time.time_ns()))

    # ---- how long they are kept ----

    def _adopt(self) -> None:
        """What earlier runs published; and the index that a killed one was writing, cut to its last whole line."""
        for entry in sorted(os.scandir(self._work), key=lambda entry: entry.name):
            if entry.name.endswith(".jsonl") and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    self._salvage_index(entry.path)
        files = []
        for entry in os.scandir(self._ready):
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    files.append(StoredFile(entry.name, status.st_size, status.st_mtime_ns))
        for file in sorted(files, key=lambda file: (file.published_ns, file.name)):
            self._store(file)

    def _salvage_index(self, path: str) -> None:
        with open(path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
            os.fsync(file.fileno())
            is_empty = os.fstat(file.fileno()).st_size == 0
        if is_empty:
            os.unlink(path)
        else:
            move_new(path, self._ready)

    def _store(self, file: StoredFile) -> None:
        self._stored.append(file)
        self._stored_bytes += file.bytes
        self._tell_stored()

    def _tell_stored(self) -> None:
        self._page["stored_files"], self._page["stored_bytes"] = len(self._stored), self._stored_bytes

    def _retain(self) -> None:
        """Oldest first, and never more than needed. What a consumer took away is only forgotten."""
        limits = self._limits
        old_ns = time.time_ns() - limits.retain_seconds * NANOSECONDS if limits.retain_seconds else 0
        lacking = max(0, limits.min_free_bytes - self._free(self._ready)) if limits.min_free_bytes else 0
        while self._stored and (
            len(self._stored) > limits.retain_files
            or self._stored_bytes + self._staged_bytes() > limits.retain_bytes
            or self._stored[0].published_ns < old_ns
            or lacking > 0
        ):
            lacking -= self._expire(self._stored.popleft())
        self._tell_stored()

    def _expire(self, file: StoredFile) -> int:
        """Returns the bytes that were freed."""
        self._stored_bytes -= file.bytes
        try:
            os.unlink(os.path.join(self._ready, file.name))
        except FileNotFoundError:
            return 0
        except OSError as error:
            log.error("%s cannot be removed: %s", os.path.join(self._ready, file.name), error.strerror)
            return 0
        self._page.add("expired_files")
        self._page.add("expired_bytes", file.bytes)
        return file.bytes


def move_new(path: str, directory: str) -> str:
    """Renames a file into a directory without ever replacing one; its name there. Where it is taken, `-2` and so on
    follow it."""
    base, extension = os.path.splitext(os.path.basename(path))
    for number in range(1, MAX_NAMES):
        name = f"{base}{extension}" if number == 1 else f"{base}-{number}{extension}"
        target = os.path.join(directory, name)
        try:
            rename_without_replacing(path, target)
        except FileExistsError:
            continue
        return name
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


def settle(page: CounterPage) -> None:
    """The file of the page's inode was published. To do it twice changes nothing."""
    for field in TRACE_SETTLED_FIELDS:
        page[field] = page[f"settling_{field}"]
    page["settling_inode"] = 0


def settle_with_the_dead(page: CounterPage, work: str) -> None:
    """Counts the file that a predecessor died publishing, if it got there: then it is no longer in `work`. In `ready` a
    consumer may have taken it already."""
    inode = page["settling_inode"]
    if inode and all(entry.inode() != inode for entry in os.scandir(work)):
        settle(page)
    page["settling_inode"] = 0
