"""Faults to inject into a running service: system calls that fail, small disks, memory that runs out."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from support.lab import Lab, wait_until


@contextlib.contextmanager
def failing_calls(pid: int, inject: str, trace: Path) -> Iterator[None]:
    """While the block runs, strace makes system calls of the process and its later children fail; `inject` as for
    `strace -e inject=`. What was called is in the file `trace`, with the paths of descriptors."""
    calls = inject.partition(":")[0]
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(trace), "-e", f"trace={calls}"]
    tracer = subprocess.Popen([*command, "-e", f"inject={inject}", "-p", str(pid)], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    try:
        said = tracer.stderr.readline()
        assert "attached" in said, said
        yield
    finally:
        tracer.send_signal(signal.SIGINT)  # detaches; what it traced goes on
        tracer.wait(10)
        tracer.stderr.close()


@contextlib.contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of that size at `path`, in a directory that is made for it."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@contextlib.contextmanager
def memory_group(name: str, limit_bytes: int) -> Iterator[Path]:
    """A control group (version 1) for processes that may have so much memory together; the kernel kills beyond it."""
    group = Path("/sys/fs/cgroup/memory") / f"{name}-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text().strip(), "an empty control group")
        group.rmdir()


def compile_preload(directory: Path, source: str) -> Path:
    """A shared object for LD_PRELOAD: what a process asks of the C library is answered by `source`."""
    code, library = directory / "preload.c", directory / "preload.so"
    code.write_text(source)
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(code), "-ldl"], check=True)
    return library


def lab_with_wires(lab: Lab, *names: str) -> dict[str, str]:
    """veth pairs; per name, the sender's end."""
    return {name: lab.veth(name)[1] for name in names}
