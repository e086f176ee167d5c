"""How files are named from their first byte to their publication: one class per policy, chosen once, at wiring.

A policy gives names and numbers; it never opens, renames or removes a capture file. Who writes a file opens its staging
path with O_EXCL and publishes it with RENAME_NOREPLACE, so that no file is ever written over.

The policies are made before the workers are forked and used in them. A number is taken by the merge worker's loop and
by its publisher's thread alike, hence the locks; what a policy must still know after a worker's death lies in a file or
in memory that the processes share.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol

from appliance.disk import sync_directory
from appliance.errors import CannotCreateError, InputOutputError, MissingPermissionError

log = logging.getLogger(__name__)

MTRACECAP_SEQUENCES = 100_000_000  # eight digits, then from 0 again
NANOSECONDS = 1_000_000_000
STANDARD_OUTPUT = "-"
_SEQUENCE_FILE_BYTES = 32  # of which no sequence file needs more


class Naming(Protocol):
    """What the merge worker, the publisher and the salvage ask of a policy. Times are nanoseconds since 1970.

    `directories` must be there before the first file; they are made with `directory_mode` where `makes_directories`
    says so (`prepare_directories`). `stream`: None, or where the one file goes as it is written, without staging and
    renaming: a device, a FIFO, or `-` (standard output). `by_first_packet`: `start_ns` should be the time of the
    segment's first packet when it has one.
    """

    @property
    def directories(self) -> tuple[str, ...]: ...
    @property
    def directory_mode(self) -> int: ...
    @property
    def makes_directories(self) -> bool: ...
    @property
    def stream(self) -> str | None: ...
    @property
    def by_first_packet(self) -> bool: ...

    def next_sequence(self) -> int:
        """A number that no other file has; remembered before it is used, where the policy remembers numbers."""

    def give_back(self, sequence: int) -> None:
        """`sequence` was not used after all; it is given again if it was the last one."""

    def staging_path(self, sequence: int) -> str:
        """Where the file is written: a path that does not exist yet."""

    def final_path(self, sequence: int, start_ns: int) -> str:
        """Where it is published. Taken already by the time of the rename: ask again, with the next number."""

    def sidecar_path(self, sequence: int, start_ns: int) -> str | None:
        """Where the JSON about the published file goes, if the policy has any."""

    def quarantine_path(self, sequence: int) -> str | None:
        """Where a failed file goes: a path that does not exist yet. None: it stays where it is."""

    def leftovers(self) -> list[str]:
        """Staging files of an earlier life, oldest first. Asked before this life has staging files of its own."""


class ApplianceNaming:
    """`ready/<output>-YYYYMMDDTHHMMSSZ-NNNNNNNN<ending>` below the output's directory, sidecars in `meta/`.

    Names are in UTC and have no colons. Numbers go on over restarts (`meta/sequence`) and are never used twice.
    """

    directory_mode = 0o750
    makes_directories = True
    stream: ClassVar[str | None] = None
    by_first_packet = False

    def __init__(self, directory: str | os.PathLike[str], output: str, ending: str) -> None:
        """`ending`: of the file names, with the compressor's: `.pcapng.lz4`."""
        root = os.path.abspath(directory)
        self._output = output
        self._ending = ending
        self._work, self._ready, self._meta, self._quarantine = (
            os.path.join(root, name) for name in ("work", "ready", "meta", "quarantine")
        )
        self.directories: tuple[str, ...] = (root, self._work, self._ready, self._meta, self._quarantine)
        self._numbers = NumberFile(os.path.join(self._meta, "sequence"), 0o640, lost=self._highest_number_in_use)

    def next_sequence(self) -> int:
        return self._numbers.take()

    def give_back(self, sequence: int) -> None:
        self._numbers.give_back(sequence)

    def staging_path(self, sequence: int) -> str:
        return _free_path(os.path.join(self._work, f"{self._output}-{sequence:08d}{self._ending}"))

    def final_path(self, sequence: int, start_ns: int) -> str:
        return os.path.join(self._ready, self._name(sequence, start_ns))

    def sidecar_path(self, sequence: int, start_ns: int) -> str | None:
        return os.path.join(self._meta, f"{self._name(sequence, start_ns)}.json")

    def quarantine_path(self, sequence: int) -> str | None:
        return _free_path(os.path.join(self._quarantine, f"{self._output}-{sequence:08d}{self._ending}"))

    def leftovers(self) -> list[str]:
        # The meter stages its flow files in the same directory. Format and compressor may have been others then.
        ours = re.compile(rf"{re.escape(self._output)}-\d{{8,18}}[.](pcap|erf).*", re.ASCII)
        return [path for path in _regular_files(self._work) if ours.fullmatch(os.path.basename(path))]

    def _name(self, sequence: int, start_ns: int) -> str:
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(start_ns // NANOSECONDS))
        return f"{self._output}-{moment}-{sequence:08d}{self._ending}"

    def _highest_number_in_use(self) -> int:
        """Published files may be gone already; their sidecars stay as long as the retention lets them."""
        number = re.compile(rf"{re.escape(self._output)}-(?:\d{{8}}T\d{{6}}Z-)?(\d{{8,18}})[.]", re.ASCII)
        names = (name for directory in self.directories[1:] for name in os.listdir(directory))
        return max((int(match[1]) for match in map(number.match, names) if match), default=-1)


class MtracecapNaming:
    """`DIR/YYYYMMDD-HHMMSS-NNNNNNNN<extension>`, `tmp-<pid>-NNNNNNNN` until it is whole; nothing else in DIR.

    The time is that of the first packet, or of the opening; the number begins at 0 or behind the one in the sequence
    file, and wraps after 99999999. A failed file keeps its `tmp-` name, and the next start salvages it.
    """

    directory_mode = 0o755
    makes_directories = False
    stream: ClassVar[str | None] = None
    by_first_packet = True

    def __init__(
        self,
        directory: str | os.PathLike[str],
        extension: str = "",
        utc: bool = False,
        sequence_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self._directory = os.path.abspath(directory)
        self._extension = extension
        self._broken_down = time.gmtime if utc else time.localtime
        self.directories: tuple[str, ...] = (self._directory,)
        self._numbers: NumberFile | SharedNumber = (
            SharedNumber() if sequence_file is None else NumberFile(sequence_file, 0o644, modulus=MTRACECAP_SEQUENCES)
        )

    def next_sequence(self) -> int:
        return self._numbers.take()

    def give_back(self, sequence: int) -> None:
        self._numbers.give_back(sequence)

    def check_numbers(self) -> None:
        """InputOutputError: the sequence file is damaged. CannotCreateError: it may not be written."""
        if isinstance(self._numbers, NumberFile):
            self._numbers.check()

    def staging_path(self, sequence: int) -> str:
        return _free_path(os.path.join(self._directory, f"tmp-{os.getpid()}-{sequence:08d}"))

    def final_path(self, sequence: int, start_ns: int) -> str:
        moment = time.strftime("%Y%m%d-%H%M%S", self._broken_down(start_ns // NANOSECONDS))
        return os.path.join(self._directory, f"{moment}-{sequence:08d}{self._extension}")

    def sidecar_path(self, sequence: int, start_ns: int) -> str | None:
        return None

    def quarantine_path(self, sequence: int) -> str | None:
        return None

    def leftovers(self) -> list[str]:
        return _abandoned(self._directory, re.compile(r"tmp-(\d{1,10})-\d{8}(?:\.\d+)?", re.ASCII))


class SingleFileNaming:
    """One file under a name of the user's; beside it as `tmp-<pid>-<name>` until it is whole.

    An empty file of that name, as mktemp(1) makes it, gives way; no other does. Files of earlier runs that did not end
    are not touched: their packets belong under no name of this run.
    """

    directory_mode = 0o755
    makes_directories = False
    by_first_packet = False

    def __init__(self, target: str | os.PathLike[str]) -> None:
        """`target`: a path, or `-` for standard output. A device or FIFO is written straight into."""
        text = os.fspath(target)
        self._numbers = SharedNumber()
        self.stream: str | None = text if text == STANDARD_OUTPUT or _takes_a_stream(text) else None
        self._directory, self._name = os.path.split(os.path.abspath(text))
        self.directories: tuple[str, ...] = () if self.stream else (self._directory,)

    @property
    def path(self) -> str:
        return os.path.join(self._directory, self._name)

    def is_free(self) -> bool:
        """Whether the file can have its name."""
        return not os.path.lexists(self.path) or _is_empty_file(self.path)

    def next_sequence(self) -> int:
        return self._numbers.take()

    def give_back(self, sequence: int) -> None:
        self._numbers.give_back(sequence)

    def staging_path(self, sequence: int) -> str:
        return self.stream or _free_path(os.path.join(self._directory, f"tmp-{os.getpid()}-{self._name}"))

    def final_path(self, sequence: int, start_ns: int) -> str:
        """The name itself; when something took it during the run, the first free of `name.1`, `name.2`, ..."""
        if self.stream:
            return self.stream
        if _is_empty_file(self.path):
            os.unlink(self.path)
        return _free_path(self.path)

    def sidecar_path(self, sequence: int, start_ns: int) -> str | None:
        return None

    def quarantine_path(self, sequence: int) -> str | None:
        return None

    def leftovers(self) -> list[str]:
        return []

    def unfinished(self) -> list[str]:
        """What earlier runs left under their `tmp-` names: for a warning."""
        if self.stream:
            return []
        return _abandoned(self._directory, re.compile(rf"tmp-(\d{{1,10}})-{re.escape(self._name)}(?:\.\d+)?", re.ASCII))


def prepare_directories(naming: Naming) -> None:
    """Makes the policy's directories, or finds them as they must be.

    CannotCreateError: one cannot be made, is missing, or is no directory. MissingPermissionError: it is not writable.
    """
    for path in naming.directories:
        if naming.makes_directories:
            _make_directory(path, naming.directory_mode)
        if not os.path.isdir(path):
            what = "is not a directory" if os.path.lexists(path) else "does not exist"
            raise CannotCreateError(f"{path}: {what}; files are to be written into it")
        if not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
            raise MissingPermissionError(f"{path}: may not be written by user {os.geteuid()}; check its owner and mode")


def _make_directory(path: str, mode: int) -> None:
    if os.path.lexists(path):
        return  # the caller looks what it is
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mkdir(path, mode)
        os.chmod(path, mode)  # whatever the umask
    except OSError as error:
        raise CannotCreateError(f"{path}: cannot be made: {error.strerror}") from None


# Numbers -------------------------------------------------------------------------------------------------------------


class SharedNumber:
    """A number that counts up from 0 and outlives the worker that counts: memory that this process and its forks share.

    One process takes numbers at a time.
    """

    def __init__(self, modulus: int = MTRACECAP_SEQUENCES) -> None:
        self._modulus = modulus
        self._next = mmap.mmap(-1, mmap.PAGESIZE)
        self._lock = threading.Lock()

    def take(self) -> int:
        with self._lock:
            number = self._load()
            self._store((number + 1) % self._modulus)
            return number

    def give_back(self, number: int) -> None:
        with self._lock:
            if self._load() == (number + 1) % self._modulus:
                self._store(number)

    def _load(self) -> int:
        return int(struct.unpack_from("=Q", self._next)[0])

    def _store(self, number: int) -> None:
        struct.pack_into("=Q", self._next, 0, number)


class NumberFile:
    """The last number used, as text with a line feed, in a file; on disk before the number is used.

    Read anew for every number, so whoever comes next goes on behind it. InputOutputError: it holds no number, or cannot
    be read or written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mode: int,
        modulus: int | None = None,
        lost: Callable[[], int] | None = None,
    ) -> None:
        """`lost` finds the last number used when the file is missing, empty or damaged; without it, a missing or empty
        file begins at 0 and a damaged one is an error."""
        self._path = os.path.realpath(path)
        self._mode = mode
        self._modulus = modulus
        self._lost = lost
        self._lock = threading.Lock()

    def take(self) -> int:
        with self._lock:
            number = self.last_used() + 1
            if self._modulus is not None:
                number %= self._modulus
            self._write(number)
            return number

    def give_back(self, number: int) -> None:
        with self._lock:
            if number > 0 and self.last_used() == number:
                self._write(number - 1)

    def check(self) -> None:
        """InputOutputError: there is no number in the file. CannotCreateError: the file may not be written."""
        self.last_used()
        place = self._path if os.path.lexists(self._path) else os.path.dirname(self._path)
        if not os.access(place, os.W_OK, effective_ids=True):
            raise CannotCreateError(f"{self._path}: the sequence number may not be written by user {os.geteuid()}")

    def last_used(self) -> int:
        """The number in the file; -1 before the first."""
        try:
            with open(self._path, "rb") as file:
                text = file.read(_SEQUENCE_FILE_BYTES)
        except FileNotFoundError:
            return self._lost() if self._lost else -1
        except OSError as error:
            raise InputOutputError(f"{self._path}: the sequence number cannot be read: {error.strerror}") from None
        if re.fullmatch(rb"[0-9]{1,18}\n", text) and (self._modulus is None or int(text) < self._modulus):
            return int(text)
        if self._lost is not None:
            number = self._lost()
            log.warning("%s holds no sequence number; the files there go on behind number %d", self._path, number)
            return number
        if not text:
            log.warning("%s is empty; the sequence begins at 0", self._path)
            return -1
        raise InputOutputError(
            f"{self._path}: holds no sequence number ({text!r}); write the last one used, or remove it"
        )

    def _write(self, number: int) -> None:
        text = f"{number}\n".encode()
        try:
            try:
                _replace(self._path, text, self._mode)
            except PermissionError:
                # The file may be ours in a directory that is not.
                _overwrite(self._path, text)
        except OSError as error:
            raise InputOutputError(f"{self._path}: the sequence number cannot be written: {error.strerror}") from None


def _replace(path: str, text: bytes, mode: int) -> None:
    """The new content under the old name, or the old content: never a part, also after a power failure."""
    temporary = f"{path}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        os.write(fd, text)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    sync_directory(os.path.dirname(path))


def _overwrite(path: str, text: bytes) -> None:
    """In one write; only when the number gets shorter, at the wrap, is there a second step."""
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.pwrite(fd, text, 0)
        os.ftruncate(fd, len(text))
        os.fsync(fd)
    finally:
        os.close(fd)


# Directories ---------------------------------------------------------------------------------------------------------


def _free_path(path: str) -> str:
    """`path`, or the first of `path.1`, `path.2`, ... that does not exist."""
    candidate, number = path, 0
    while os.path.lexists(candidate):
        number += 1
        candidate = f"{path}.{number}"
    return candidate


def _is_empty_file(path: str) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == 0


def _takes_a_stream(path: str) -> bool:
    """Whether there is something at `path` that takes bytes and is neither file nor directory."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _regular_files(directory: str) -> list[str]:
    """Paths of the regular files in a directory, no symbolic links, oldest first; none when it does not exist."""
    try:
        with os.scandir(directory) as entries:
            found = [(entry.stat(follow_symlinks=False), entry.path) for entry in entries]
    except FileNotFoundError:
        return []
    files = [(status.st_mtime_ns, path) for status, path in found if stat.S_ISREG(status.st_mode)]
    return [path for _, path in sorted(files)]


def _abandoned(directory: str, pattern: re.Pattern[str]) -> list[str]:
    """Files whose name fits, with the id of a process (group 1) that is dead, or that is ours: in containers ids come
    again, and before our first file a file of our id is of an earlier life."""
    return list(_of_dead_processes(_regular_files(directory), pattern))


def _of_dead_processes(paths: Iterable[str], pattern: re.Pattern[str]) -> Iterable[str]:
    for path in paths:
        match = pattern.fullmatch(os.path.basename(path))
        if match and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            yield path


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return pid <= 1 << 22  # PID_MAX_LIMIT
    return True
