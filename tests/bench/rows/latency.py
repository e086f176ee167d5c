"""From a packet's time stamp to the reader of the merge's output, at a low rate, beside a silent interface."""

from __future__ import annotations

import os
import select
import struct
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.lab import Lab, wait_until

from bench.context import Bench
from bench.live import mtracecap_commands
from bench.measure import median, percentile
from bench.results import Picture, RowResult, Table, absolute
from bench.standstill import Sleeper, undisturbed

NAME = "latency"
TITLE = "From a packet to the merge's output, at a low rate"
NEEDS_ROOT = True

RATE_PPS = 100
ALLOWANCE_MS = 5.0
PCAP_NANOSECONDS = 0xA1B23C4D


@dataclass(frozen=True)
class Case:
    name: str
    interfaces: int
    max_wait_ms: int


CASES = (
    Case("1 interface", 1, 50),
    Case("a second one is silent", 2, 50),
    Case("a second one is silent, 10 ms", 2, 10),
)


@dataclass(frozen=True)
class Round:
    sent: int
    latencies_ms: list[float]  # of each packet that came
    sleeper_ms: float  # what the machine alone makes late: see standstill.py


class PcapReader:
    """Time stamps out of a pcap stream that comes in pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._unit_ns = 0

    def feed(self, data: bytes) -> list[int]:
        """Times in nanoseconds of the packets that are whole by now."""
        self._rest += data
        position = 0
        if self._unit_ns == 0 and len(self._rest) >= 24:
            self._unit_ns = 1 if struct.unpack_from("<I", self._rest)[0] == PCAP_NANOSECONDS else 1000
            position = 24
        times = []
        while self._unit_ns and position + 16 <= len(self._rest):
            seconds, fraction, captured, _ = struct.unpack_from("<IIII", self._rest, position)
            if position + 16 + captured > len(self._rest):
                break
            times.append(seconds * 1_000_000_000 + fraction * self._unit_ns)
            position += 16 + captured
        self._rest = self._rest[position:]
        return times


def run_row(bench: Bench) -> RowResult:
    seconds = 5 if bench.quick else 10
    table = Table(
        NAME,
        f"{TITLE}: mtracecap to a pipe, {RATE_PPS} packets a second, rounds of {seconds} s: medians, and the longest",
        ("case", "max_wait ms", "packets", "sent", "p50 ms", "p99 ms", "max ms", "a sleeper's p99 ms"),
        pictures=[Picture("p99 ms", "case", "max_wait ms")],
    )
    result = RowResult(NAME, TITLE, [table], conditions=bench.pinning)
    rounds: dict[str, list[Round]] = {case.name: [] for case in CASES}
    for i in range(bench.rounds):
        for case in CASES:
            bench.progress.step(f"{case.name}, max_wait {case.max_wait_ms} ms: round {i + 1}")
            rounds[case.name].append(undisturbed(partial(_measure, bench, case, seconds)))
    for case in CASES:
        found = rounds[case.name]
        p50, p99 = (median(percentile(one.latencies_ms, fraction) for one in found) for fraction in (0.5, 0.99))
        packets, sent = sum(len(one.latencies_ms) for one in found), sum(one.sent for one in found)
        longest, sleeper = max(max(one.latencies_ms) for one in found), median(one.sleeper_ms for one in found)
        table.add(case.name, case.max_wait_ms, packets, sent, p50, p99, longest, sleeper)
        limit = case.max_wait_ms + ALLOWANCE_MS
        result.targets.append(absolute(f"latency, {case.name}", "p99 ms", p99, "<=", limit))
    return result


def _measure(bench: Bench, case: Case, seconds: int) -> Round:
    with bench.directory() as directory, Lab() as lab, (directory / "said").open("wb") as said:
        pairs = [lab.veth(f"b{i}") for i in range(case.interfaces)]
        (command,) = mtracecap_commands([name for name, _ in pairs], directory, "-w", str(case.max_wait_ms))
        command = ["pcapfile:-" if word.endswith("/out.pcap") else word for word in command]
        prefix = [] if bench.tool_cpus is None else ["taskset", "-c", ",".join(map(str, bench.tool_cpus))]
        program = lab.popen([*prefix, *command], stdout=subprocess.PIPE, stderr=said, stdin=subprocess.DEVNULL)
        assert program.stdout is not None
        rows = Path(f"/proc/{program.pid}/net/packet")
        wait_until(
            lambda: len(rows.read_text().splitlines()) > case.interfaces or program.poll() is not None, "capture", 20.0
        )
        time.sleep(1.0)
        frames = RATE_PPS * seconds
        with Sleeper(os.sched_getaffinity(0)) as sleeper:
            sender = lab.start_sender([pairs[0][1]], frames=frames, rate=RATE_PPS)
            found = _read(program.stdout.fileno(), frames, time.monotonic() + seconds + 10)
        sent = sender.report().total
        program.terminate()
        program.wait(20)
    return Round(sent, found, sleeper.late_ms(0.99))


def _read(fd: int, packets: int, deadline: float) -> list[float]:
    reader = PcapReader()
    found: list[float] = []
    os.set_blocking(fd, False)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while len(found) < packets and time.monotonic() < deadline:
        poll.poll(500)
        try:
            data = os.read(fd, 1 << 20)
        except BlockingIOError:
            continue
        now_ns = time.time_ns()
        if not data:
            break
        found += ((now_ns - stamped) / 1e6 for stamped in reader.feed(data))
    return found
