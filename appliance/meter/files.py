"""IPFIX files on disk: staged in `work/`, and published in `flows/` whole, synced, and never over another file."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from appliance.disk import rename_without_replacing, sync_directory
from appliance.errors import CannotCreateError, InputOutputError

logger = logging.getLogger(__name__)

SUFFIX = ".ipfix"
PREFIX = "flows-"
FILE_MODE = 0o640
DIRECTORY_MODE = 0o750
MESSAGE_HEADER_BYTES = 16
DATA_SET_ID = 256  # and above


class FlowFiles:
    """One file after the other in DIRECTORY/work and DIRECTORY/flows, or one file at a path of its own.

    Syncing and renaming run on a thread: a slow disk must not hold up the meter.
    """

    def __init__(self, place: Path, rotate_seconds: int, clock: Callable[[], float], *, single: bool = False) -> None:
        """`place`: the directory, or the one file. CannotCreateError: it cannot be written, or the file is there."""
        self.place = place
        self.single = single
        self.clock = clock
        self.rotate_seconds = rotate_seconds
        self.number = 0
        self.name = ""
        self.period = 0
        self.whole_bytes = 0
        self._fd = -1
        self._publisher = ThreadPoolExecutor(1, "flow-files")
        if single:
            self.work = self.ready = place.parent
            if not self.ready.is_dir():
                raise CannotCreateError(f"{place}: the directory {self.ready} does not exist; make it first")
            if os.path.lexists(place):
                raise CannotCreateError(f"{place}: exists already; remove it or name another file")
        else:
            self.work, self.ready = place / "work", place / "flows"
            self._prepare()

    def _prepare(self) -> None:
        try:
            for directory in (self.work, self.ready):
                directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True)
            probe = self.work / f".probe-{os.getpid()}"
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE))
            os.unlink(probe)
        except OSError as error:
            raise CannotCreateError(f"{error.filename}: flow files cannot be written here ({error.strerror})") from None
        salvage(self.work, self.ready)

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def open(self) -> None:
        """Begins a file. OSError as the system says it."""
        now = self.clock()
        self.period = int(now) // self.rotate_seconds if self.rotate_seconds else 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            self.number += 1
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
            self.name = f".{self.place.name}.part" if self.single else f"{PREFIX}{stamp}-{self.number:06d}{SUFFIX}"
            if not self.single and os.path.lexists(self.ready / self.name):
                continue
            try:
                self._fd = os.open(self.work / self.name, flags, FILE_MODE)
            except FileExistsError:
                if self.single:
                    raise
                continue
            break
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells a salvage that somebody is at work
        self.whole_bytes = 0

    def write(self, message: bytearray) -> None:
        """A whole message, or OSError and the file as it was."""
        view = memoryview(message)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError:
            os.ftruncate(self._fd, self.whole_bytes)
            os.lseek(self._fd, self.whole_bytes, os.SEEK_SET)
            raise
        self.whole_bytes += len(message)

    def due(self) -> bool:
        """The clock has left the period in which the open file began."""
        return self.is_open and self.rotate_seconds > 0 and int(self.clock()) // self.rotate_seconds != self.period

    def seconds_to_rotation(self) -> float | None:
        if not self.is_open or not self.rotate_seconds:
            return None
        return max(0.0, (self.period + 1) * self.rotate_seconds - self.clock())

    def publish(self) -> None:
        """Ends the open file; it appears when it is safely on disk."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        target = self.place.name if self.single else self.name
        self._publisher.submit(publish_file, fd, self.work, self.name, self.ready, target)

    def discard(self) -> None:
        if self._fd >= 0:
            os.unlink(self.work / self.name)
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """Publishes what is open and waits for all that is being published. InputOutputError: the one file that was
        asked for is not there; of rotated files the log tells."""
        self.publish()
        self._publisher.shutdown(wait=True)
        if self.single and not self.place.exists():
            raise InputOutputError(
                f"{self.place}: could not be written whole; what there is stays at {self.work / self.name}"
            )


def publish_file(fd: int, work: Path, name: str, ready: Path, target: str) -> None:
    """fsync, rename without replacing, fsync of the directories. What fails stays where it is, and the log says so."""
    try:
        try:
            os.fsync(fd)
            rename_without_replacing(str(work / name), str(ready / target))
            for directory in {work, ready}:
                sync_directory(str(directory))
        finally:
            os.close(fd)
    except OSError as error:
        logger.error("flow file %s: not published (%s); it stays at %s", ready / target, error.strerror, work / name)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """A descriptor of a leftover file that nobody is writing. BlockingIOError: somebody is."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
    finally:
        os.close(fd)


def salvage(work: Path, ready: Path) -> int:
    """Publishes what a killed meter left behind, each file cut to its last whole message. The number of files."""
    count = 0
    for path in sorted(work.glob(f"{PREFIX}*{SUFFIX}")):
        try:
            with locked(path) as fd:
                length, has_data = whole_messages(fd)
                if not has_data:
                    os.unlink(path)
                    continue
                os.ftruncate(fd, length)
                publish_file(os.dup(fd), work, path.name, ready, path.name)
                count += 1
        except BlockingIOError:
            continue
        except OSError as error:
            logger.warning("flow file %s: cannot be salvaged (%s)", path, error.strerror)
    return count


def whole_messages(fd: int) -> tuple[int, bool]:
    """(octets up to the last whole message, whether there is any data set in them)."""
    size = os.fstat(fd).st_size
    offset, has_data = 0, False
    while offset + MESSAGE_HEADER_BYTES <= size:
        header = os.pread(fd, MESSAGE_HEADER_BYTES + 2, offset)
        version, length = int.from_bytes(header[:2], "big"), int.from_bytes(header[2:4], "big")
        if version != 10 or length < MESSAGE_HEADER_BYTES or offset + length > size:
            break
        if length > MESSAGE_HEADER_BYTES + 4 and int.from_bytes(header[16:18], "big") >= DATA_SET_ID:
            has_data = True
        offset += length
    return offset, has_data
