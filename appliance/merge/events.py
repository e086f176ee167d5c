"""What the world is told of a published file: a line in `meta/manifest.jsonl`, a close after writing, a hook command.

Both stand behind the rename into `ready/`, the hook last. Whoever reads the manifest gets every file once: a line that
a crash cost is added at the next start, and half a line is cut away. The hook may be slow, fail or hang: it runs in a
thread of its own, one at a time, with a bounded queue and a time-out, and costs no publication.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from appliance.merge.compressor import ENVIRONMENT

log = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"
MANIFEST_MAX_BYTES = 64 << 20  # then it becomes manifest.jsonl.1, and that one goes
TAIL_BYTES = 1 << 20  # how much of it is compared with what is there, at a start
SIDECAR_MAX_BYTES = 1 << 20
HOOKS_WAITING = 1000
HOOKS_AT_THE_END_S = 5.0  # how long the end of the service waits for them


class Manifest:
    """One JSON object a line, as in the sidecars. Used by one thread at a time; its errors are the caller's OSError."""

    def __init__(self, directory: str, mode: int) -> None:
        """`directory`: where the sidecars lie."""
        self._path = os.path.join(directory, MANIFEST)
        self._mode = mode

    def add(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self._path, follow_symlinks=False).st_size + len(line) > MANIFEST_MAX_BYTES:
                os.replace(self._path, f"{self._path}.1")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._path, flags, self._mode)
        try:
            os.fchmod(fd, self._mode)
            whole = os.fstat(fd).st_size
            if os.write(fd, line) != len(line):
                os.ftruncate(fd, whole)
                raise OSError(f"{self._path}: only a part of a line could be written")
        finally:
            os.close(fd)

    def complete(self, ready: str, name: re.Pattern[str]) -> None:
        """At a start: cuts half a line away, and adds what is published in `ready` and was not told. `name` matches our
        files, with their number as its first group."""
        listed, is_all = self._mend()
        first = min((number_of(file, name) for file in listed), default=-1)
        sidecars = os.path.dirname(self._path)
        for number, file in sorted((number_of(file, name), file) for file in os.listdir(ready)):
            if number >= 0 and file not in listed and (is_all or number > first):
                with contextlib.suppress(OSError, ValueError):
                    self.add(read_sidecar(os.path.join(sidecars, f"{file}.json")))

    def _mend(self) -> tuple[set[str], bool]:
        """The names in the last lines, and whether those are all lines."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return set(), True
        try:
            size = os.fstat(fd).st_size
            start = max(0, size - TAIL_BYTES)
            tail = os.pread(fd, TAIL_BYTES, start)
            whole = tail.rfind(b"\n") + 1
            if whole < len(tail):
                os.ftruncate(fd, start + whole)
        finally:
            os.close(fd)
        lines = tail[:whole].splitlines()[1 if start else 0 :]
        return set(names_in(lines)), start == 0


def read_sidecar(path: str) -> Mapping[str, Any]:
    """ValueError: it is none."""
    with open(path, "rb") as file:
        entry = json.loads(file.read(SIDECAR_MAX_BYTES))
    if not isinstance(entry, dict):
        raise ValueError(f"{path} holds no sidecar")
    return entry


def names_in(lines: Sequence[bytes]) -> Iterator[str]:
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            yield str(json.loads(line)["file"])


def number_of(file: str, name: re.Pattern[str]) -> int:
    match = name.fullmatch(file)
    return int(match[1]) if match else -1


def close_after_writing(path: str) -> None:
    """For readers that wait for IN_CLOSE_WRITE (inotify(7)) and overlook renames. A consumer may have taken it."""
    with contextlib.suppress(FileNotFoundError):
        os.close(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC))


class Hook:
    """Runs `argv` with a published file's path behind it, one after the other. `failed` is called for each that was not
    run, or did not end with 0."""

    def __init__(self, argv: Sequence[str], timeout_s: float, failed: Callable[[], None]) -> None:
        """An empty `argv`: nothing is run, until `use` names a command."""
        self.use(argv, timeout_s)
        self._failed = failed
        self._queue: queue.Queue[str | None] = queue.Queue(HOOKS_WAITING)
        self._deadline: float | None = None
        self._thread: threading.Thread | None = None

    def use(self, argv: Sequence[str], timeout_s: float) -> None:
        """Another command, for files that wait already too; from any thread."""
        self._command = (tuple(argv), timeout_s)

    def published(self, path: str) -> None:
        """By one thread."""
        if not self._command[0]:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hook", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(path)
        except queue.Full:
            self._report(self._command[0] or ("",), path, f"{HOOKS_WAITING} files wait for it already")

    def finish(self, beat: Callable[[], None]) -> None:
        """Waits for what is under way, not for long."""
        if self._thread is None:
            return
        self._deadline = time.monotonic() + HOOKS_AT_THE_END_S
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        while self._thread.is_alive() and time.monotonic() < self._deadline + 1:
            self._thread.join(0.2)
            beat()

    def _run(self) -> None:
        while (path := self._queue.get()) is not None:
            argv, limit_s = self._command
            if not argv:
                continue  # there is none any longer
            if self._deadline is not None:
                limit_s = min(limit_s, self._deadline - time.monotonic())
            if limit_s <= 0:
                self._report(argv, path, "the service ends")
            elif complaint := run_command([*argv, path], limit_s):
                self._report(argv, path, complaint)

    def _report(self, argv: Sequence[str], path: str, complaint: str) -> None:
        self._failed()
        log.error("hook %s %s: %s", argv[0], path, complaint)


def run_command(argv: Sequence[str], timeout_s: float) -> str:
    """What went wrong, or "". No shell, no descriptor of ours, no rights: this process has none to hand on."""
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            close_fds=True,
            start_new_session=True,
            cwd="/",
        )
    except OSError as error:
        return f"cannot be started: {error.strerror or error}"
    try:
        status = child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return f"did not end within {timeout_s:.0f} s, and was ended"
    return "" if status == 0 else f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


class Announcer:
    """All three for one output; see the module's text. `published` never raises: the file is there, told or not."""

    def __init__(
        self,
        manifest: Manifest | None,
        hook: Hook | None,
        *,
        close_write: bool = False,
        mend: Callable[[Manifest], None] | None = None,
    ) -> None:
        """`mend`: what completes the manifest, called before the first line."""
        self._manifest = manifest
        self._hook = hook
        self.close_write = close_write
        self._mend = mend

    def begin(self) -> None:
        """At the start, off the data path: lines that an earlier life could not write."""
        if self._manifest is not None and self._mend is not None:
            try:
                self._mend(self._manifest)
            except OSError as error:
                log.error("the manifest cannot be completed: %s", error)

    def published(self, path: str, entry: Mapping[str, Any]) -> None:
        try:
            if self.close_write:
                close_after_writing(path)
            if self._manifest is not None:
                self._manifest.add(entry)
        except OSError as error:
            log.error("%s is published, but cannot be told of: %s", path, error)
        if self._hook is not None:
            self._hook.published(path)

    def finish(self, beat: Callable[[], None]) -> None:
        if self._hook is not None:
            self._hook.finish(beat)
