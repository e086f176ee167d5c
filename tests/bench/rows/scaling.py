"""What a packet costs with 1 to 16 interfaces, at one and the same total rate."""

from __future__ import annotations

from bench.context import Bench
from bench.live import Program, Traffic, Trial, by_process, medians, mtracecap_commands, trial
from bench.results import Picture, RowResult, Table, Target
from bench.scan import count_numbered

NAME = "scaling"
TITLE = "Cost of a packet with 1 to 16 interfaces"
NEEDS_ROOT = True

INTERFACES = (1, 2, 4, 8, 16)
RATE_PPS = 400_000.0
GROWTH = 1.5


def run_row(bench: Bench) -> RowResult:
    program = Program("mtracecap", mtracecap_commands)
    traffic = Traffic(int((1 if bench.quick else 3) * RATE_PPS), RATE_PPS)
    table = Table(
        NAME,
        f"{TITLE}: mtracecap, 60 B, {RATE_PPS / 1e3:.0f} kpps in all",
        ("interfaces", "program", "offered", "lost", "inversions", "CPU ns per packet", "by process", "peak MiB"),
        pictures=[Picture("CPU ns per packet", "interfaces", "program", lines=True)],
    )
    trials: dict[int, list[Trial]] = {}
    lost: dict[int, int] = {}
    inversions: dict[int, int] = {}
    with bench.recording_directory() as scratch:
        for i in range(bench.rounds):
            for count in INTERFACES:
                bench.progress.step(f"round {i + 1} of {bench.rounds}: {count} interfaces")
                one = trial(bench, program, count, traffic, scratch / "out")
                found = count_numbered(one.files)
                trials.setdefault(count, []).append(one)
                lost[count] = max(lost.get(count, 0), one.offered - found.packets)
                inversions[count] = max(inversions.get(count, 0), found.inversions)
    for count, rounds in trials.items():
        offered = int(medians(rounds, lambda t: t.offered) or 0)
        cpu, memory = medians(rounds, Trial.ns_per_packet), medians(rounds, lambda t: t.peak_bytes / 2**20)
        table.add(count, program.name, offered, lost[count], inversions[count], cpu, by_process(rounds), memory)
    result = RowResult(NAME, TITLE, [table], conditions=bench.pinning)
    one, many = (medians(trials[count], Trial.ns_per_packet) for count in (1, 16))
    result.targets.append(
        Target("cost per packet, 16 interfaces", "CPU ns per packet", many, "1 interface", one, "<=", GROWTH)
    )
    return result
