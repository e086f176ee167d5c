"""Two and four interfaces into one file in order: `mtracecap` and `appliance run` against dumpcap and tcpdumps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bench.context import Bench
from bench.live import (
    Program,
    Traffic,
    Trial,
    appliance_commands,
    appliance_files,
    by_process,
    medians,
    mtracecap_commands,
    not_above,
    trial,
)
from bench.results import Picture, RowResult, Table, absolute
from bench.scan import count_numbered

NAME = "live-many"
TITLE = "Several live interfaces into one ordered file, 60 B"
NEEDS_ROOT = True

INTERFACES = (2, 4)
RATES = {"200 kpps": 200_000.0, "limit": 0.0}
QUEUES = ["-N", "4000000", "-C", "2000000000"]
OURS = ("mtracecap", "appliance run")


def _dumpcap(name: str, options: list[str]) -> Program:
    return Program(
        name,
        lambda interfaces, out: [
            [
                "dumpcap",
                "-q",
                *options,
                *(word for one in interfaces for word in ("-i", one)),
                "-w",
                f"{out}/out.pcapng",
            ]
        ],
        needs=("dumpcap",),
    )


PROGRAMS = (
    Program("mtracecap", mtracecap_commands),
    Program("appliance run", appliance_commands, appliance_files),
    _dumpcap("dumpcap", []),
    _dumpcap("dumpcap -N -C", QUEUES),
    Program(
        "tcpdumps, unmerged",
        lambda interfaces, out: [
            ["tcpdump", "-i", one, "-B", "65536", "-Z", "root", "-w", f"{out}/{one}.pcap"] for one in interfaces
        ],
        needs=("tcpdump",),
    ),
)


@dataclass
class Found:
    """One program in one case, over the rounds."""

    trials: list[Trial] = field(default_factory=list)
    inversions: list[int] = field(default_factory=list)
    worst_ns: int = 0
    wrong: int = 0  # duplicates, foreign packets, numbers out of order


def run_row(bench: Bench) -> RowResult:
    table = Table(
        NAME,
        f"{TITLE}; the worst round's loss and inversions, the median of the rest; CPU of each packet that was kept",
        ("case", "program", "offered", "kpps", "lost", "lost %", "inversions", "ms back", "wrong", "CPU ns per packet",
         "by process", "peak MiB"),
        pictures=[Picture("CPU ns per packet", "case", "program"), Picture("lost %", "case", "program")],
    )  # fmt: skip
    result = RowResult(NAME, TITLE, [table], conditions=bench.pinning)
    result.missing = sorted({name for program in PROGRAMS for name in program.missing})
    seconds = 1.0 if bench.quick else 3.0
    for interfaces in INTERFACES:
        for rate_name, rate in RATES.items():
            case = f"{interfaces} interfaces, {rate_name}"
            # At the lower rate it is loss and order that matter.
            traffic = Traffic(int(seconds * (rate or 900_000)), rate, bursts=1 if rate else 3)
            found = measure(bench, case, interfaces, traffic)
            _report(case, found, table)
            _targets(case, rate, found, table, result)
    return result


def measure(bench: Bench, case: str, interfaces: int, traffic: Traffic) -> dict[str, Found]:
    found: dict[str, Found] = {}
    with bench.recording_directory() as scratch:
        for i in range(bench.rounds):
            for program in PROGRAMS:
                if not program.missing:
                    bench.progress.step(f"{case}: round {i + 1} of {bench.rounds}: {program.name}")
                    one = trial(bench, program, interfaces, traffic, scratch / "out")
                    _judge(found.setdefault(program.name, Found()), one)
    return found


def _judge(found: Found, one: Trial) -> None:
    count = count_numbered(one.files)
    found.trials.append(one)
    one.lost = one.offered - (count.packets - count.foreign - count.duplicates)
    found.inversions.append(count.inversions)
    found.worst_ns = max(found.worst_ns, count.worst_inversion_ns)
    found.wrong = max(found.wrong, count.duplicates + count.foreign + count.disordered)
    for path in one.files:
        Path(path).unlink()


def _report(case: str, found: dict[str, Found], table: Table) -> None:
    for program in PROGRAMS:
        one = found.get(program.name)
        if one is None:
            table.add(case, program.name, *[None] * (len(table.columns) - 2))
            continue
        offered = int(medians(one.trials, lambda t: t.offered) or 0)
        rate = medians(one.trials, lambda t: t.rate_pps / 1e3)
        lost = max(t.lost for t in one.trials)
        share = max(100 * t.lost / max(1, t.offered) for t in one.trials)
        cpu = medians(one.trials, Trial.ns_per_packet)
        memory = medians(one.trials, lambda t: t.peak_bytes / 2**20)
        table.add(
            case, program.name, offered, rate, lost, share, max(one.inversions), one.worst_ns / 1e6, one.wrong,
            cpu, by_process(one.trials), memory,
        )  # fmt: skip


def _targets(case: str, rate: float, found: dict[str, Found], table: Table, result: RowResult) -> None:
    for ours in OURS:
        job = f"{case}, 60 B: {ours}"
        for figure in ("lost", "inversions"):
            value = table.value(figure, case=case, program=ours)
            result.targets.append(absolute(job, figure, value, "<=", 0))  # type: ignore[arg-type]
        if rate:
            continue
        for peer, limit in (("dumpcap -N -C", 1 / 20), ("tcpdumps, unmerged", 1.0)):
            own, theirs = (found[name].trials if name in found else [] for name in (ours, peer))
            result.targets.append(not_above(job, "CPU ns per packet", own, peer, theirs, limit, Trial.ns_per_packet))
