"""What every row is given: how much to do, where to put it, on which CPUs, and how to say what goes on."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.pace import Pace

SHARED_MEMORY = Path("/dev/shm")
DISK = Path("/var/tmp")


class Progress:
    """One line on a terminal that says what runs; in a pipe one line a row of the benchmark."""

    def __init__(self) -> None:
        self._row = ""
        self._started = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def row(self, name: str) -> None:
        self._row = name
        self._started = time.monotonic()
        if not self._terminal:
            print(f"bench: {name}", file=sys.stderr, flush=True)

    def step(self, what: str) -> None:
        if self._terminal:
            elapsed = time.monotonic() - self._started
            columns = shutil.get_terminal_size().columns
            print(
                f"\r\033[K{f'{self._row} ({elapsed:.0f} s): {what}'[: columns - 1]}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def clear(self) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@dataclass
class Bench:
    """The run of the benchmark. `scratch`: in memory. `recordings`: where live rows record, on a disk as others do
    too; None: in `scratch`. `pace` tells which measurements the host slowed. `sender_cpu` and `tool_cpus` are None
    when nothing is pinned."""

    scratch: Path
    rounds: int = 3
    quick: bool = False
    sender_cpu: int | None = None
    tool_cpus: tuple[int, ...] | None = None
    recordings: Path | None = None
    pace: Pace = field(default_factory=lambda: Pace(()))  # without CPUs: nothing is measured twice
    progress: Progress = field(default_factory=Progress)

    @property
    def pinning(self) -> str:
        """The conditions of live rows, in words."""
        files = f"files on {file_system(self.recordings or self.scratch)}"
        if self.tool_cpus is None:
            return f"sender and programs run where the kernel puts them; {files}"
        return f"sender and receive softirq on CPU {self.sender_cpu}, each program on CPU {self.tool_cpus[0]}; {files}"

    @contextlib.contextmanager
    def directory(self) -> Iterator[Path]:
        """An empty directory in memory, gone at the end of the block."""
        with _directory(self.scratch) as path:
            yield path

    @contextlib.contextmanager
    def recording_directory(self) -> Iterator[Path]:
        """An empty directory for recordings, gone at the end of the block."""
        with _directory(self.recordings or self.scratch) as path:
            yield path


@contextlib.contextmanager
def _directory(parent: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def file_system(path: Path) -> str:
    """The kind of the file system that `path` is on: ext4, tmpfs, ..."""
    places = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    resolved = path.resolve()
    return next((places[str(parent)] for parent in (resolved, *resolved.parents) if str(parent) in places), "unknown")


@contextlib.contextmanager
def scratch_directory(parent: Path | None = None) -> Iterator[Path]:
    """A directory in shared memory (else where temporary files go) that goes with all its content."""
    if parent is None and SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK):
        parent = SHARED_MEMORY
    path = Path(tempfile.mkdtemp(prefix="appliance-bench-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def machine() -> dict[str, str]:
    """The machine beside the figures."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{_processor()}, {os.cpu_count()} CPUs, {memory / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for row in Path("/proc/cpuinfo").read_text().splitlines():
            if row.startswith("model name"):
                return row.partition(":")[2].strip()
    return platform.machine()
