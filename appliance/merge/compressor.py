"""Where a segment's bytes go: straight into a file, or through a compressor's pipe into it.

A compressor is a child process in a session of its own: a program the user named, or the built-in one
(`workers/compress.py`). It holds only three descriptors: the pipe, the staging file, and a memory file for its
complaints. The staging file is locked (flock) through its standard output, so that whoever finds the file later knows
whether somebody still writes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from appliance.config import Output
from appliance.errors import InputOutputError, MissingInputError

ELF_MAGIC = b"\x7fELF"
BUILT_IN = "workers.compress"
PIPE_BYTES = 1 << 20
COMPRESSOR_PIPE_BYTES = 128 << 10  # more would have left the cache by the time it is taken
COMPLAINT_BYTES = 500
POLL_MS = 500
ENDING_S = 0.5  # how long a compressor that closed its input may take to say how it ended
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

SUFFIXES = {
    "gzip": ".gz",
    "pigz": ".gz",
    "lz4": ".lz4",
    "zstd": ".zst",
    "zstdmt": ".zst",
    "pzstd": ".zst",
    "xz": ".xz",
    "pxz": ".xz",
    "bzip2": ".bz2",
    "pbzip2": ".bz2",
    "lzop": ".lzo",
}


def compressor_argv(compressor: str | Sequence[str]) -> tuple[str, ...] | None:
    """The argv behind a configuration's `compressor`: None for "none". MissingInputError: there is no such program."""
    if compressor == "none":
        return None
    if compressor == "lz4":
        return built_in_argv()
    return program_argv(compressor, "compressor")


def built_in_argv() -> tuple[str, ...]:
    """The built-in compressor as a script, with the directory that has `lz4`: see there. A compressor runs in /, and
    neither the interpreter nor a module need have been found by a whole path."""
    script, lz4 = importlib.util.find_spec(BUILT_IN), importlib.util.find_spec("lz4")
    assert script is not None and script.origin and lz4 is not None and lz4.origin
    libraries = os.path.dirname(os.path.dirname(os.path.abspath(lz4.origin)))
    return (os.path.abspath(sys.executable), "-I", "-S", os.path.abspath(script.origin), libraries)


def is_built_in(argv: Sequence[str]) -> bool:
    return tuple(argv) == built_in_argv()


def program_argv(argv: Sequence[str], what: str) -> tuple[str, ...]:
    """The command with its program's path. MissingInputError: there is no such program; `what` says for what."""
    program = shutil.which(argv[0], path=ENVIRONMENT["PATH"])
    if program is None:
        raise MissingInputError(f"{what} {argv[0]!r}: there is no such program in {ENVIRONMENT['PATH']}")
    return (program, *argv[1:])


def takes_by_reading(argv: Sequence[str]) -> bool:
    """Whether the compressor takes its input by read(2) and its kin alone, as those do that we know. Another one, or a
    script under the name of one, may splice the pages of its pipe on to others."""
    if is_built_in(argv):
        return True
    program = os.path.realpath(argv[0])
    try:
        with open(program, "rb") as file:
            is_script = file.read(len(ELF_MAGIC)) != ELF_MAGIC
    except OSError:
        return False
    return os.path.basename(program) in SUFFIXES and not is_script


def compressor_suffix(compressor: str | Sequence[str]) -> str:
    """What a file name gets behind `.pcapng`: `.lz4`, `.zst`, ...; a program we do not know gives its own name."""
    if compressor == "none":
        return ""
    if compressor == "lz4":
        return ".lz4"
    name = os.path.basename(compressor[0])
    return SUFFIXES.get(name, f".{name}")


class SinkError(InputOutputError):
    """A segment cannot be written on. `accepted`: bytes of the last write that went in before."""

    def __init__(self, message: str, accepted: int = 0) -> None:
        super().__init__(message)
        self.accepted = accepted


class FileSink:
    """Writes straight into the staging file. `written`: bytes so far. `keeps_whole_writes`: after a failed write the
    file ends with the last whole one. `plain_fd`: where write(2) alone is enough as long as it takes all; -1: nowhere.
    Whoever writes there adds to `written`."""

    is_alive = True

    def __init__(self, path: str, fd: int) -> None:
        """Takes over `fd`."""
        self.path = path
        self.written = 0
        self.keeps_whole_writes = True
        self._fd = fd
        lock(fd)

    @property
    def plain_fd(self) -> int:
        return self._fd

    def write(self, data: memoryview, beat: Callable[[], None], done: int = 0) -> None:
        """All of `data`, whose first `done` bytes are there already. SinkError (disk full, I/O): the file is cut back
        to what it held before all of it."""
        try:
            while done < len(data):
                done += os.write(self._fd, data[done:])
        except OSError as error:
            self._cut_back()
            raise SinkError(f"{self.path}: {error.strerror}", done) from error
        self.written += len(data)

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._fd, self.written)
            os.lseek(self._fd, self.written, os.SEEK_SET)
        except OSError:
            self.keeps_whole_writes = False

    def close_input(self) -> None:
        """Nothing more will be written."""

    def finish(self, timeout_s: float) -> None:
        """Waits until all bytes are in the file. Here they are. SinkError: the file system lost some of them."""
        fd, self._fd = self._fd, -1
        try:
            os.close(fd)
        except OSError as error:
            raise SinkError(f"{self.path}: {error.strerror}") from error

    def abandon(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


class StreamSink:
    """Writes into a pipe, a device or standard output, as fast as its reader takes it."""

    plain_fd = -1  # it has to be asked for room before each write
    is_alive = True
    keeps_whole_writes = False

    def __init__(self, path: str, fd: int) -> None:
        """Takes over `fd`. A pipe in blocking mode gets small pieces, for which it has room when poll(2) calls it
        writable: other processes may share its mode, so we do not change it."""
        self.path = path
        self.written = 0
        self._fd = fd
        may_block = os.get_blocking(fd) and not stat.S_ISREG(os.fstat(fd).st_mode)
        self._piece_bytes = select.PIPE_BUF if may_block else PIPE_BYTES
        self._poller = select.poll()
        self._poller.register(fd, select.POLLOUT)

    def write(self, data: memoryview, beat: Callable[[], None], done: int = 0) -> None:
        """All of `data` behind its first `done` bytes, however long its reader takes. SinkError: there is no reader any
        longer, or an I/O error."""
        while done < len(data):
            try:
                if self._poller.poll(POLL_MS):
                    done += os.write(self._fd, data[done : done + self._piece_bytes])
                else:
                    beat()
            except BlockingIOError:
                beat()
            except OSError as error:
                raise SinkError(f"{self.path}: {error.strerror}", done) from error
        self.written += len(data)

    def close_input(self) -> None:
        """Nothing more will be written."""

    def finish(self, timeout_s: float) -> None:
        self.abandon()

    def abandon(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


class CompressorSink:
    """Writes into the pipe of a compressor that writes the staging file."""

    keeps_whole_writes = False

    def __init__(self, path: str, fd: int, argv: Sequence[str], timeout_s: float, locked: bool = True) -> None:
        """Takes over `fd`, the staging file, which then belongs to the child alone. SinkError: it cannot be started."""
        self.path = path
        self.written = 0
        self._timeout_s = timeout_s
        self._argv = tuple(argv)
        self._complaints = os.memfd_create("complaints", os.MFD_CLOEXEC)
        read_end, self._pipe = os.pipe2(os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # an unprivileged user's pipes may be limited
                fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, COMPRESSOR_PIPE_BYTES)
            os.set_blocking(self._pipe, False)
            if locked:
                lock(fd)
            self._child = subprocess.Popen(
                self._argv,
                stdin=read_end,
                stdout=fd,
                stderr=self._complaints,
                env=ENVIRONMENT,
                close_fds=True,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            os.close(self._pipe)
            os.close(self._complaints)
            raise SinkError(f"compressor {self.name} cannot be started: {error.strerror or error}") from error
        finally:
            os.close(read_end)
            os.close(fd)

    @property
    def plain_fd(self) -> int:
        return self._pipe

    @property
    def name(self) -> str:
        return "lz4 (built in)" if is_built_in(self._argv) else self._argv[0]

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def is_alive(self) -> bool:
        """False: the compressor has ended already, before any byte was written to it or in the middle."""
        return self._child.poll() is None

    def write(self, data: memoryview, beat: Callable[[], None], done: int = 0) -> None:
        """All of `data` behind its first `done` bytes, waiting for the compressor up to its time-out. SinkError: it
        died, or takes nothing."""
        deadline = time.monotonic() + self._timeout_s
        while done < len(data):
            try:
                done += os.write(self._pipe, data[done:])
                deadline = time.monotonic() + self._timeout_s
            except BlockingIOError:
                self._wait_for_room(deadline, done, beat)
            except BrokenPipeError:
                raise SinkError(f"{self.path}: compressor {self.name} {self._ending()}", done) from None
            except OSError as error:
                raise SinkError(f"{self.path}: {error.strerror}", done) from error
        self.written += len(data)

    def _wait_for_room(self, deadline: float, done: int, beat: Callable[[], None]) -> None:
        beat()
        if time.monotonic() >= deadline:
            raise SinkError(f"{self.path}: compressor {self.name} took no byte for {self._timeout_s:g} s", done)
        poller = select.poll()
        poller.register(self._pipe, select.POLLOUT)
        poller.poll(min(POLL_MS, max(0.0, deadline - time.monotonic()) * 1000))

    def close_input(self) -> None:
        """End of file for the compressor, which then writes its last bytes and ends."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def finish(self, timeout_s: float) -> None:
        """Waits for the compressor's end. SinkError: it did not end with 0, or not within `timeout_s`."""
        self.close_input()
        try:
            status = self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.abandon()
            raise SinkError(f"{self.path}: compressor {self.name} did not end within {timeout_s:g} s") from None
        if status != 0:
            error = SinkError(f"{self.path}: compressor {self.name} {self._ending()}")
            self.abandon()
            raise error
        self._close_complaints()

    def abandon(self) -> None:
        """Ends the child, whatever it does."""
        self.close_input()
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        self._close_complaints()

    def _close_complaints(self) -> None:
        if self._complaints >= 0:
            os.close(self._complaints)
            self._complaints = -1

    def _ending(self) -> str:
        try:
            status = self._child.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            return "closed its standard input"
        complaint = os.pread(self._complaints, COMPLAINT_BYTES, 0).decode("utf-8", "replace").strip()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{how}: {complaint}" if complaint else how


def lock(fd: int) -> None:
    """Marks a staging file as being written, for as long as any process holds this open file."""
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def hook_argv(output: Output) -> tuple[str, ...]:
    return program_argv(output.hook, "hook") if output.hook else ()
