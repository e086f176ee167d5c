"""How long published files are kept: whichever of the limits bites first, oldest first, and never more than needed.

Files are told by their names (`<output>-<time>-<number><ending>`): whatever else lies in `ready/` is nobody's business
here. The number says which is older, for it never goes back, as a clock may. Existing files are adopted at the start.

A consumer may move or delete files as it likes; one that must keep a file for a while holds an flock(2) on it, shared
or exclusive. A sidecar goes with its file. The sidecar of a file that a consumer took stays for as long as the file
would have stayed by its age, a day without such a limit.

The newest file is only ever removed for its own size or age: when all others are gone and the disk is still full,
somebody else fills it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass

from appliance.config import Output
from appliance.counters import CounterPage
from appliance.disk import opened
from appliance.merge.naming import Naming

log = logging.getLogger(__name__)

NANOSECONDS = 1_000_000_000
TAKEN_SIDECARS_S = 86_400  # without an age limit
SIDECAR_BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class Limits:
    """0: no such limit. `by_packet_time`: its last packet tells a file's age, else (recorded files) its publication."""

    retain_bytes: int = 0
    retain_seconds: int = 0
    min_free_bytes: int = 0
    by_packet_time: bool = True

    @classmethod
    def of(cls, output: Output, live: bool) -> Limits:
        return cls(output.retain_bytes, output.retain_seconds, output.min_free_bytes, live)

    def __bool__(self) -> bool:
        return bool(self.retain_bytes or self.retain_seconds or self.min_free_bytes)


@dataclass
class PublishedFile:
    """One file in `ready/`, or what a consumer left of it (its sidecar; `bytes` is 0 then)."""

    path: str
    sidecar: str
    number: int
    bytes: int
    disk_bytes: int
    newest_ns: int  # what its age counts from


def published_name(output: str) -> re.Pattern[str]:
    """Matches the names of an output's published files; their number is the first group."""
    return re.compile(rf"{re.escape(output)}-\d{{8}}T\d{{6}}Z-(\d{{8,18}})[.][^/]+", re.ASCII)


def free_bytes(directory: str) -> int:
    """What an unprivileged process may still write there."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


class Retention:
    """The published files of one output. Used by one thread, but for `use`; `enforce` after each publication and every
    few seconds."""

    def __init__(
        self,
        limits: Limits,
        naming: Naming,
        output: str,
        page: CounterPage,
        *,
        free: Callable[[str], int] = free_bytes,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """ValueError: the policy has no sidecars, so its files are nothing that a retention could tell apart."""
        sidecar = naming.sidecar_path(0, 0)
        if sidecar is None:
            raise ValueError("files without sidecars have no retention")
        self._limits = self._wanted = limits
        self._page = page
        self._free = free
        self._now_ns = now_ns
        self._ready = os.path.dirname(naming.final_path(0, 0))
        self._meta = os.path.dirname(sidecar)
        self._name = published_name(output)
        self._files: dict[str, PublishedFile] = {}
        self._newest = -1
        self._adopted = False

    def add(self, path: str) -> None:
        """A file was published."""
        name = os.path.basename(path)
        if self._adopted and (match := self._name.fullmatch(name)):
            self._take(name, int(match[1]))

    def use(self, limits: Limits) -> None:
        """Other limits from the next `enforce` on; from any thread."""
        self._wanted = limits

    def enforce(self) -> None:
        """Removes what is beyond a limit. Errors are logged; what cannot be removed is tried again the next time."""
        self._limits = self._wanted
        if not self._limits:
            if self._adopted:
                self._files.clear()  # nobody would take them off again
                self._adopted = False
            return
        try:
            if not self._adopted:
                self._look_around()
            self._enforce_age()
            self._enforce_bytes()
            self._enforce_free()
        except OSError as error:
            log.error("retention in %s: %s", self._ready, error)

    # ---- the limits ----

    def _enforce_age(self) -> None:
        now_ns = self._now_ns()
        taken_ns = (self._limits.retain_seconds or TAKEN_SIDECARS_S) * NANOSECONDS
        for file in self._oldest_first():
            age_ns = now_ns - file.newest_ns
            if self._limits.retain_seconds and age_ns > self._limits.retain_seconds * NANOSECONDS:
                self._remove(file, "is older than retain_seconds")
            elif file.bytes == 0 and age_ns > taken_ns:
                self._refresh(file)
                if not os.path.lexists(file.path):
                    self._forget(file)

    def _enforce_bytes(self) -> None:
        limit = self._limits.retain_bytes
        if not limit or self._total() <= limit:
            return
        self._look_around()  # consumers may have taken files: they need no room any longer
        for file in self._oldest_first():
            if self._total() <= limit:
                return
            if file.bytes:
                self._remove(file, "is beyond retain_bytes")

    def _enforce_free(self) -> None:
        """The room that a removal makes is reckoned, not measured: it may come late, or when a reader closes it."""
        limit = self._limits.min_free_bytes
        if not limit or (free := self._free(self._ready)) >= limit:
            return
        self._look_around()
        for file in self._oldest_first():
            if free >= limit or file.number == self._newest:
                return
            disk_bytes = file.disk_bytes
            if file.bytes and self._remove(file, "makes room: the file system has less than min_free_bytes left"):
                free += disk_bytes

    def _total(self) -> int:
        return sum(file.bytes for file in self._files.values())

    def _oldest_first(self) -> list[PublishedFile]:
        return sorted(self._files.values(), key=lambda file: file.number)

    # ---- files ----

    def _look_around(self) -> None:
        """What is in `ready/` and `meta/` now."""
        names = {name: int(match[1]) for name in os.listdir(self._ready) if (match := self._name.fullmatch(name))}
        for sidecar in os.listdir(self._meta):
            name = sidecar.removesuffix(".json")
            if name != sidecar and name not in names and (match := self._name.fullmatch(name)):
                names[name] = int(match[1])
        for name in self._files.keys() - names.keys():
            del self._files[name]
        for name, number in names.items():
            if name in self._files:
                self._refresh(self._files[name])
            else:
                self._take(name, number)
        self._adopted = True

    def _take(self, name: str, number: int) -> None:
        sidecar = os.path.join(self._meta, f"{name}.json")
        file = PublishedFile(os.path.join(self._ready, name), sidecar, number, 0, 0, 0)
        self._refresh(file)
        file.newest_ns = self._newest_ns(file)
        self._files[name] = file
        self._newest = max(self._newest, number)

    def _refresh(self, file: PublishedFile) -> None:
        file.bytes = file.disk_bytes = 0
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(file.path)
            if stat.S_ISREG(status.st_mode):
                file.bytes = status.st_size
                file.disk_bytes = status.st_blocks * 512

    def _newest_ns(self, file: PublishedFile) -> int:
        """Of its last packet, but never later than its publication: a packet's time may be anything."""
        published_ns = self._now_ns()
        for path in (file.path, file.sidecar):
            with contextlib.suppress(OSError):
                published_ns = os.lstat(path).st_mtime_ns
                break
        last_ns = last_packet_ns(file.sidecar) if self._limits.by_packet_time else None
        return published_ns if last_ns is None else min(last_ns, published_ns)

    def _remove(self, file: PublishedFile, why: str) -> bool:
        """False: somebody holds it, or it cannot be removed."""
        self._refresh(file)
        removed_bytes = file.bytes
        if removed_bytes:
            try:
                if not unlink_unless_held(file.path):
                    log.info("%s %s, but is held by a reader", file.path, why)
                    return False
            except OSError as error:
                log.error("%s %s, but cannot be removed: %s", file.path, why, error.strerror)
                return False
            self._page.add("expired_files")
            self._page.add("expired_bytes", removed_bytes)
            log.info("removed %s: it %s", file.path, why)
        self._forget(file)
        return True

    def _forget(self, file: PublishedFile) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.sidecar)
        del self._files[os.path.basename(file.path)]


def unlink_unless_held(path: str) -> bool:
    """False: a process holds an flock(2) on the file. A file that is gone already is as good as unlinked."""
    try:
        with opened(path, os.O_NOFOLLOW | os.O_NONBLOCK) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def last_packet_ns(sidecar: str) -> int | None:
    """None: there is no sidecar that says so, or the file holds no packet."""
    try:
        with open(sidecar, "rb") as file:
            last_ns = json.loads(file.read(SIDECAR_BYTES_MAX)).get("last_ns")
    except (OSError, ValueError, AttributeError):
        return None
    return last_ns if isinstance(last_ns, int) else None
