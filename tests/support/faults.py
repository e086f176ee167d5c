"""Faults to inject into a running service: system calls that fail, small disks, memory that runs out."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@contextlib.contextmanager
def memory_group(name: str, limit_bytes: int) -> Iterator[Path]:
    """A control group for processes that may have so much memory together; the kernel kills beyond it."""
    root = Path("/sys/fs/cgroup")
    is_first_version = (root / "memory").is_dir()
    group = (root / "memory" if is_first_version else root) / f"{name}-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    limit = group / ("memory.limit_in_bytes" if is_first_version else "memory.max")
    try:
        if not limit.exists():
            pytest.skip(f"control groups have no memory limit here: {limit}")
        limit.write_text(str(limit_bytes))
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
