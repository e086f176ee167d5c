"""One trial of a live row: veth pairs, a program that captures from them, a sender, and what became of its frames.

A first part of the traffic is not measured: it pays for what is paid once. The rest goes in bursts, and CPU time is
taken from the rest before each to the rest after it, less what the program spends without traffic in as long a time as
nothing was sent in: so start, end, warming up and idling are left out. A burst that the host slowed is sent again. A
trial's figure is the median of its bursts'; loss and order are those of all frames. CPU time is the scheduler's own
count, in nanoseconds, of every thread of every process.

Memory is made warm for each burst (see `WarmMemory`): a burst is short, so that it still is at its end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.lab import Lab, wait_until
from support.service import toml

from bench.context import Bench
from bench.measure import WarmMemory, find, median, memory_bytes, peak_resident_bytes, tree
from bench.pace import Span
from bench.results import Target

ENVIRONMENT = Path(sys.executable).parent
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 30.0
REST_INTERVAL_S = 0.2
REST_CPU_NS = 5_000_000  # less than this in an interval is rest
LINGER_S = 1.2  # after the last frame: libpcap's programs leave a kernel block open for up to a second
WARM_UP = 0.25  # of the traffic
WARM_BYTES = 1 << 30  # more than a burst takes
IDLE_S = 1.0  # so long the program is watched without traffic before each burst
REST_TIMEOUT_S = 20.0
Pair = tuple[str, str]


@dataclass(frozen=True)
class Program:
    """A program under test. `commands`: from the interfaces and the output directory; `files`: what it wrote there,
    in order. `stops`: the names of the processes that are told to end, without it those that were started.
    `heeds_late`: it looks whether it was told to only when a frame comes."""

    name: str
    commands: Callable[[Sequence[str], Path], list[list[str]]]
    files: Callable[[Path], list[Path]] = lambda out: sorted(out.glob("*.pcap*"))
    stops: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    stop_signal: signal.Signals = signal.SIGTERM
    heeds_late: bool = False
    look: Callable[[Path], str] = lambda out: ""  # what it says of itself while it still runs, at rest

    @property
    def missing(self) -> list[str]:
        return [need for need in self.needs if find(need) is None]


@dataclass(frozen=True)
class Traffic:
    """`packets` of all interfaces together, more if bursts must be sent again; `rate_pps` 0 is the sender's limit. What
    is measured goes in `bursts`."""

    packets: int
    rate_pps: float = 0.0
    sizes: tuple[int, ...] = (60,)
    flows: int | None = None
    bursts: int = 3


@dataclass(frozen=True)
class Burst:
    """Measured traffic: packets that arrived, the seconds that sending them took, and the CPU time in ns of each
    process, by its name."""

    packets: int
    seconds: float
    cpu_ns: dict[str, float]

    def ns_per_packet(self, kinds: Sequence[str] = ()) -> float:
        """Of the processes of these kinds (`capture` of `capture/eth0`); of all without any."""
        spent = (ns for name, ns in self.cpu_ns.items() if not kinds or kind_of(name) in kinds)
        return sum(spent) / self.packets


def kind_of(process: str) -> str:
    return process.partition("/")[0]


@dataclass
class Trial:
    """What one trial found. `offered`: what arrived at the interfaces. `files` are gone when the next trial begins."""

    offered: int = 0
    lost: int = 0  # set by whoever counts the files
    offered_by_id: dict[int, int] = field(default_factory=dict)
    bursts: list[Burst] = field(default_factory=list)
    peak_bytes: int = 0
    files: list[Path] = field(default_factory=list)
    directory: Path = Path()
    output: str = ""
    seen: str = ""

    @property
    def rate_pps(self) -> float:
        return sum(burst.packets for burst in self.bursts) / sum(burst.seconds for burst in self.bursts)

    @property
    def kept(self) -> float:
        """The share of the packets that were kept. CPU time is divided by theirs: what drops early is not cheap."""
        return 1 - self.lost / self.offered if self.offered else 0.0

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind_of(name) for burst in self.bursts for name in burst.cpu_ns))

    def ns_per_packet(self, *kinds: str) -> float | None:
        """CPU time of each packet that was kept, of the processes of these kinds; of all without any."""
        if self.kept <= 0 or not self.bursts:
            return None
        return median(burst.ns_per_packet(kinds) for burst in self.bursts) / self.kept


def appliance_commands(
    interfaces: Sequence[str], out: Path, *, meter: bool = False, compressor: object = "none"
) -> list[list[str]]:
    """`appliance run` that writes one pcapng file, and with `meter` IPFIX files."""
    config = {
        "interface": [{"uri": f"ring:{name}"} for name in interfaces],
        "output": [
            {
                "directory": str(out),
                "rotate_seconds": 0,
                "rotate_bytes": 0,
                "compressor": compressor,
                "min_free_bytes": 0,
            }
        ],
        "meter": {"enabled": meter} | ({"export": [{"uri": "file:"}]} if meter else {}),
        "monitor": {"listen": "", "control_socket": str(out / "control") if meter else ""},
    }
    path = out / "bench.toml"
    path.write_text(toml(config))
    return [[str(ENVIRONMENT / "appliance"), "run", "-c", str(path), "--no-figures"]]


def appliance_files(out: Path) -> list[Path]:
    ready = out / "ready"
    return sorted(ready.iterdir()) if ready.is_dir() else []


def mtracecap_commands(interfaces: Sequence[str], out: Path, *options: str) -> list[list[str]]:
    sources = [f"ring:{name}" for name in interfaces]
    return [[str(ENVIRONMENT / "mtracecap"), *options, f"pcapfile:{out}/out.pcap", *sources]]


def trial(bench: Bench, program: Program, interfaces: int, traffic: Traffic, directory: Path) -> Trial:
    """Runs `program` once on so many interfaces in a laboratory of its own; its output is below `directory`."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    with Lab() as lab, (directory / "said").open("wb") as said:
        pairs = [lab.veth(f"b{i}") for i in range(interfaces)]
        names = [name for name, _ in pairs]
        prefix = [] if bench.tool_cpus is None else ["taskset", "-c", ",".join(map(str, bench.tool_cpus))]
        processes = [
            lab.popen([*prefix, *command], stdout=said, stderr=said, stdin=subprocess.DEVNULL, cwd=directory)
            for command in program.commands(names, directory)
        ]
        _wait_for_capture(processes, interfaces, directory / "said")
        _rest(processes)
        found = _send(bench, lab, pairs, processes, traffic)
        _check_running(processes, directory / "said")
        found.seen = program.look(directory)
        _stop(lab, pairs, processes, program)
    found.directory = directory
    found.output = (directory / "said").read_text(errors="replace")
    found.files = program.files(directory)
    return found


def _send(
    bench: Bench, lab: Lab, pairs: Sequence[Pair], processes: Sequence[subprocess.Popen[bytes]], traffic: Traffic
) -> Trial:
    """The traffic, and what the program's processes spent on it."""
    found = Trial()
    offered = _arrived(lab, pairs)
    each = traffic.packets // len(pairs)
    warm_up = int(traffic.packets * WARM_UP) // len(pairs)
    _run_sender(bench, lab, pairs, traffic, (0, warm_up))
    frames = (each - warm_up) // traffic.bursts
    numbers = ((first, first + frames) for first in itertools.count(warm_up, frames))
    with WarmMemory(WARM_BYTES) as memory:
        for _ in range(traffic.bursts):
            found.bursts.append(
                bench.pace.steadiest(
                    lambda span: _burst(bench, lab, pairs, processes, traffic, next(numbers), memory, span),
                    bench.tool_cpus,
                )
            )
    found.peak_bytes = _memory(processes)
    arrived = _arrived(lab, pairs)
    found.offered_by_id = {i: now - then for i, (now, then) in enumerate(zip(arrived, offered, strict=True))}
    found.offered = sum(arrived) - sum(offered)
    return found


def _burst(
    bench: Bench,
    lab: Lab,
    pairs: Sequence[Pair],
    processes: Sequence[subprocess.Popen[bytes]],
    traffic: Traffic,
    numbers: tuple[int, int],
    memory: WarmMemory,
    span: Span,
) -> Burst:
    """Sends the frames of these numbers (from, before) on each interface, between two rests."""
    resting, resting_s = _rest(processes), time.monotonic()
    time.sleep(IDLE_S)
    arrived = sum(_arrived(lab, pairs))
    before, before_s = _cpu(processes), time.monotonic()
    memory.release()
    with span:
        seconds = _run_sender(bench, lab, pairs, traffic, numbers)
    sent_s = time.monotonic()
    memory.hold()
    time.sleep(max(0.0, sent_s + LINGER_S - time.monotonic()))
    after = _rest(processes)
    waited = (time.monotonic() - before_s - seconds) / (before_s - resting_s)  # in times without traffic of that length
    spent: dict[str, float] = {}
    for pid, (name, ns) in after.items():
        at_begin = before.get(pid, (name, 0))[1]
        idling = at_begin - resting.get(pid, (name, at_begin))[1]
        spent[name] = spent.get(name, 0.0) + ns - at_begin - idling * waited
    packets = sum(_arrived(lab, pairs)) - arrived
    if packets == 0:
        raise RuntimeError("no frame of a burst arrived")
    return Burst(packets, seconds, spent)


def _arrived(lab: Lab, pairs: Sequence[Pair]) -> list[int]:
    return [lab.statistics(name)["rx_packets"] for name, _ in pairs]


def _run_sender(bench: Bench, lab: Lab, pairs: Sequence[Pair], traffic: Traffic, numbers: tuple[int, int]) -> float:
    """Sends the frames of these numbers (from, before) on each interface; the seconds it took."""
    sender = lab.start_fast_sender(
        pairs,
        frames=numbers[1] - numbers[0],
        first_sequence=numbers[0],
        rate=traffic.rate_pps,
        sizes=traffic.sizes,
        flows=traffic.flows,
        cpu=bench.sender_cpu,
    )
    return sender.report().seconds


def _wait_for_capture(processes: Sequence[subprocess.Popen[bytes]], interfaces: int, said: Path) -> None:
    """Until there is a bound packet socket for every interface. RuntimeError: the program ended before that."""

    def captures() -> bool:
        _check_running(processes, said)
        rows = Path(f"/proc/{processes[0].pid}/net/packet").read_text().splitlines()[1:]
        bound = {row.split()[4] for row in rows if row.split()[4] != "0" and row.split()[5] == "1"}
        return len(bound) >= interfaces

    wait_until(captures, "a packet socket for every interface", START_TIMEOUT_S)


def _check_running(processes: Sequence[subprocess.Popen[bytes]], said: Path) -> None:
    """RuntimeError: the program ended; what it spent until then is no figure."""
    for process in processes:
        if process.poll() is not None:
            text = said.read_text(errors="replace")[-1000:]
            raise RuntimeError(f"{process.args}: ended with {process.returncode}: {text}")


def _rest(processes: Sequence[subprocess.Popen[bytes]]) -> dict[int, tuple[str, int]]:
    """Waits until the program has nothing left to do; its CPU times then."""
    deadline = time.monotonic() + REST_TIMEOUT_S
    now = _cpu(processes)
    while time.monotonic() < deadline:
        before, _ = now, time.sleep(REST_INTERVAL_S)
        now = _cpu(processes)
        if sum(spent for _, spent in now.values()) - sum(spent for _, spent in before.values()) < REST_CPU_NS:
            break
    return now


def _cpu(processes: Sequence[subprocess.Popen[bytes]]) -> dict[int, tuple[str, int]]:
    """Name and CPU time in ns of every process of the program (proc_pid_schedstat(5): time on the CPU)."""
    times: dict[int, tuple[str, int]] = {}
    for pid in (pid for process in processes for pid in tree(process.pid)):
        with contextlib.suppress(OSError):
            spent = 0
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    spent += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
            times[pid] = (Path(f"/proc/{pid}/comm").read_text().strip(), spent)
    return times


def _memory(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """What all processes hold at rest, memory that they share counted once; of a single process its peak.

    Not sampled while traffic runs: the look at the pages would take a tenth of a CPU away. Rings stay where they are.
    """
    pids = [pid for process in processes for pid in tree(process.pid)]
    return peak_resident_bytes(pids[0]) if len(pids) == 1 else memory_bytes(pids)


def _stop(lab: Lab, pairs: Sequence[Pair], processes: Sequence[subprocess.Popen[bytes]], program: Program) -> None:
    """Tells the program to end in good order, and waits for that."""
    for process in processes:
        for pid in tree(process.pid) if program.stops else [process.pid]:
            with contextlib.suppress(OSError):
                if not program.stops or Path(f"/proc/{pid}/comm").read_text().strip() in program.stops:
                    os.kill(pid, program.stop_signal)
    if program.heeds_late:
        lab.send([peer for _, peer in pairs], frames=1)  # of no protocol that a meter counts
    for process in processes:
        process.wait(STOP_TIMEOUT_S)


def medians(trials: Sequence[Trial], of: Callable[[Trial], float | None]) -> float | None:
    """The median of a figure over the rounds; None when a round does not have it."""
    values = [value for one in trials if (value := of(one)) is not None]
    return median(values) if len(values) == len(trials) and values else None


def not_above(
    job: str,
    measure: str,
    ours: Sequence[Trial],
    peer_name: str,
    theirs: Sequence[Trial],
    limit: float,
    of_ours: Callable[[Trial], float | None],
    of_theirs: Callable[[Trial], float | None] | None = None,
) -> Target:
    """A figure of ours against the peer's, round by round: a host's pace changes from round to round, and less between
    two trials of the same one."""
    of_theirs = of_theirs or of_ours
    pairs = [(of_ours(one), of_theirs(other)) for one, other in zip(ours, theirs, strict=False)]
    ratios = [one / other for one, other in pairs if one is not None and other]
    return Target(
        job,
        measure,
        medians(ours, of_ours),
        peer_name,
        medians(theirs, of_theirs),
        "<=",
        limit,
        rounds_ratio=median(ratios) if ratios else None,
    )


def by_process(trials: Sequence[Trial]) -> str:
    """CPU ns per packet of each kind of process: `capture 40, merge 21`. Sources of one kind count together."""
    kinds: dict[str, list[float]] = {}
    for one in trials:
        for kind in one.kinds:
            kinds.setdefault(kind, []).append(one.ns_per_packet(kind) or 0.0)
    shown = [(kind, median(values)) for kind, values in kinds.items()]
    return ", ".join(f"{kind} {value:.0f}" for kind, value in shown if value >= 0.5)
