"""The whole service on the quickstart's configuration, with no traffic: the CPU it takes for nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from support.lab import Lab, wait_until

from bench.context import Bench
from bench.measure import CpuTime, cpu_times, median, memory_bytes, tree
from bench.results import Picture, RowResult, Table, absolute

NAME = "idle"
TITLE = "The whole service without traffic"
NEEDS_ROOT = True

APPLIANCE = str(Path(sys.executable).with_name("appliance"))
PROJECT = Path(__file__).parents[3]
SETTLE_S = 3.0
LIMIT_PERCENT = 1.0


def run_row(bench: Bench) -> RowResult:
    seconds = 10.0 if bench.quick else 20.0
    table = Table(
        NAME,
        f"{TITLE}: config/quickstart.toml on 2 quiet interfaces and lo, {seconds:.0f} s",
        ("process", "CPU % of a core", "memory MiB"),
        pictures=[Picture("CPU % of a core", "process", "process")],
    )
    result = RowResult(NAME, TITLE, [table], conditions="not pinned")
    shares: list[dict[str, float]] = []
    memory: list[dict[str, float]] = []
    for i in range(1 if bench.quick else bench.rounds):
        bench.progress.step(f"round {i + 1}: {seconds:.0f} s of nothing")
        share, used = _round(bench, seconds)
        shares.append(share)
        memory.append(used)
    names = list(shares[0])
    for name in names:
        table.add(name, median(one.get(name, 0.0) for one in shares), median(one.get(name, 0.0) for one in memory))
    whole = median(sum(one.values()) for one in shares)
    table.add("all", whole, median(sum(one.values()) for one in memory))
    result.targets.append(absolute("whole service, no traffic", "CPU % of a core", whole, "<=", LIMIT_PERCENT))
    return result


def _round(bench: Bench, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """CPU share in per cent and memory in MiB, by process."""
    with bench.directory() as directory, Lab() as lab:
        lab.veth("a")
        config = directory / "quickstart.toml"
        config.write_text((PROJECT / "config" / "quickstart.toml").read_text())
        with (directory / "log").open("wb") as log:
            command = [APPLIANCE, "run", "-c", config, "--no-figures"]
            service = lab.popen(command, cwd=directory, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        socket = directory / "var" / "control.sock"
        wait_until(lambda: socket.exists() or service.poll() is not None, "the service", 20.0)
        time.sleep(SETTLE_S)
        before, started = cpu_times(tree(service.pid)), time.monotonic()
        time.sleep(seconds)
        after, ended = cpu_times(tree(service.pid)), time.monotonic()
        if service.poll() is not None:
            raise RuntimeError(f"the service ended: {(directory / 'log').read_text()}")
        used = {}
        for pid, times in after.items():
            used[times.name] = used.get(times.name, 0.0) + memory_bytes([pid]) / 2**20
        service.terminate()
        service.wait(20)
    return {name: 100 * spent / (ended - started) for name, spent in spent_by_name(before, after).items()}, used


def spent_by_name(before: dict[int, CpuTime], after: dict[int, CpuTime]) -> dict[str, float]:
    """CPU seconds between two looks, by process name. What short-lived children cost is their parent's."""
    spent: dict[str, float] = {}
    for pid, now in after.items():
        then = before.get(pid, CpuTime(now.name, 0.0, 0.0))
        spent[now.name] = spent.get(now.name, 0.0) + now.own_s - then.own_s + now.reaped_s - then.reaped_s
    return spent
