"""Measuring: a program's wall and CPU time and memory, and the arithmetic on repeated runs."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from support.lab import end_process

from appliance.ring.memory import MADV_POPULATE_WRITE

TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.001
HOLDERS = 2  # threads

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class MeasureError(Exception):
    """A program that is measured failed; the message has its command and what it said."""


# Arithmetic


@dataclass(frozen=True)
class Line:
    """seconds = setup + units * marginal: what is paid once, and what each further unit costs."""

    setup_s: float
    marginal_s: float

    @property
    def per_second(self) -> float:
        """Units a second, set-up left aside; NaN when the longer run was not longer."""
        return 1 / self.marginal_s if self.marginal_s > 0 else math.nan


def line(small_units: int, small_s: Iterable[float], large_units: int, large_s: Iterable[float]) -> Line:
    """The line through the medians of runs of two sizes."""
    low, high = median(small_s), median(large_s)
    marginal = (high - low) / (large_units - small_units)
    return Line(low - marginal * small_units, marginal)


def percentile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that at least `fraction` of all values do not exceed (nearest rank). ValueError: no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]


# Programs


@dataclass(frozen=True)
class Run:
    """What one run cost. CPU is user + system of the program and all of its children that it waited for."""

    wall_s: float
    cpu_s: float
    output: str


def run(
    command: Sequence[str | os.PathLike[str]],
    *,
    cpus: Iterable[int] | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    statuses: Sequence[int] = (0,),
) -> Run:
    """Runs a program to its end, on `cpus` if given. MeasureError: its exit status is none of `statuses`.

    A program that outlives an exception here, an interrupt too, is ended and reaped.
    """
    words = [*(["taskset", "-c", ",".join(map(str, cpus))] if cpus is not None else []), *map(os.fspath, command)]
    started = time.perf_counter()
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd, env=env
    )
    assert process.stdout is not None
    try:
        output, usage = _follow(process)
        wall = time.perf_counter() - started
    except BaseException:
        end_process(process)
        raise
    finally:
        process.stdout.close()
    if process.returncode not in statuses:
        raise MeasureError(f"{' '.join(words)}: exit status {process.returncode}: {output.strip()[-2000:]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, output)


def _follow(process: subprocess.Popen[bytes]) -> tuple[str, Any]:
    """Reads the output to its end, then reaps: output, resource usage."""
    assert process.stdout is not None
    fd = process.stdout.fileno()
    os.set_blocking(fd, False)
    chunks: list[bytes] = []
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(fd, 65536):
                chunks.append(chunk)
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(BlockingIOError):
                while chunk := os.read(fd, 65536):
                    chunks.append(chunk)
            return b"".join(chunks).decode(errors="replace"), usage
        if time.monotonic() > deadline:
            raise MeasureError(f"{' '.join(map(str, process.args))}: still running after {TIMEOUT_S:.0f} s")
        time.sleep(POLL_INTERVAL_S)


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class WarmMemory:
    """Free memory that the machine really has.

    A virtual machine may hand its free memory to the host (free page reporting), some two seconds after it became free.
    Whoever uses such a page first pays for getting it back, ten times what a write into it costs, whatever program that
    is. So memory is held while nothing is measured, and `release`d right before something is: then it is nobody's
    account.
    """

    def __init__(self, length_bytes: int) -> None:
        self._length = length_bytes
        self._memory: mmap.mmap | None = None

    def __enter__(self) -> Self:
        self.hold()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.release()

    def hold(self) -> None:
        self.release()
        self._memory = mmap.mmap(-1, self._length)
        start, part = address_of(self._memory), self._length // HOLDERS
        with ThreadPoolExecutor(HOLDERS) as pool:  # EINVAL: a kernel that cannot
            list(pool.map(lambda i: _libc.madvise(start + i * part, part, MADV_POPULATE_WRITE), range(HOLDERS)))

    def release(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def find(program: str) -> str | None:
    """Where a program is; the places that only root's PATH has are looked into as well."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


# Processes that run


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += tree(int(child))
    return found


def memory_bytes(pids: Iterable[int]) -> int:
    """The sum of the proportional set sizes: memory that processes share counts once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if row.startswith("Pss:"):
                    total += int(row.split()[1]) * 1024
    return total


def peak_resident_bytes(pid: int) -> int:
    """The most that a process ever had in memory (VmHWM of proc(5)), shared memory included; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for row in Path(f"/proc/{pid}/status").read_text().splitlines():
            if row.startswith("VmHWM:"):
                return int(row.split()[1]) * 1024
    return 0


@dataclass(frozen=True)
class CpuTime:
    """CPU seconds of one process so far, with those of its children that it waited for apart."""

    name: str
    own_s: float
    reaped_s: float


def cpu_times(pids: Iterable[int]) -> dict[int, CpuTime]:
    """By process id; a process that is gone is left out. Resolution: one clock tick, 10 ms as a rule."""
    tick = os.sysconf("SC_CLK_TCK")
    times: dict[int, CpuTime] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/stat").read_text()
            name = text[text.index("(") + 1 : text.rindex(")")]
            words = text[text.rindex(")") + 2 :].split()
            user, system, reaped_user, reaped_system = (int(word) for word in words[11:15])
            times[pid] = CpuTime(name, (user + system) / tick, (reaped_user + reaped_system) / tick)
    return times
