"""What a packet costs with 1 to 16 interfaces, at the sender's limit and at one and the same lower rate."""

from __future__ import annotations

from bench.context import Bench
from bench.live import Program, Traffic, Trial, by_process, medians, mtracecap_commands, not_above, trial
from bench.results import Picture, RowResult, Table
from bench.scan import count_numbered

NAME = "scaling"
TITLE = "Cost of a packet with 1 to 16 interfaces"
NEEDS_ROOT = True

INTERFACES = (1, 2, 4, 8, 16)
# At the lower rate a burst lasts long enough for what is spent on idling between bursts to be small beside it.
TRAFFIC = {"limit": Traffic(3_200_000, bursts=5), "400 kpps": Traffic(3_200_000, 400_000.0, bursts=3)}
QUICK_TRAFFIC = {"limit": Traffic(800_000), "400 kpps": Traffic(800_000, 400_000.0, bursts=1)}
GROWTH = 1.5


def run_row(bench: Bench) -> RowResult:
    table = Table(
        NAME,
        f"{TITLE}: mtracecap, 60 B, one and the same rate of all interfaces together",
        ("rate", "interfaces", "program", "offered", "kpps", "lost", "inversions", "CPU ns per packet", "by process",
         "peak MiB"),
        pictures=[Picture("CPU ns per packet", "interfaces", "rate", lines=True)],
    )  # fmt: skip
    result = RowResult(NAME, TITLE, [table], conditions=bench.pinning)
    for rate_name, traffic in (QUICK_TRAFFIC if bench.quick else TRAFFIC).items():
        _measure(bench, rate_name, traffic, table, result)
    return result


def _measure(bench: Bench, rate_name: str, traffic: Traffic, table: Table, result: RowResult) -> None:
    program = Program("mtracecap", mtracecap_commands)
    trials: dict[int, list[Trial]] = {}
    lost: dict[int, int] = {}
    inversions: dict[int, int] = {}
    with bench.recording_directory() as scratch:
        for i in range(bench.rounds):
            for count in INTERFACES:
                bench.progress.step(f"{rate_name}: round {i + 1} of {bench.rounds}: {count} interfaces")
                one = trial(bench, program, count, traffic, scratch / "out")
                found = count_numbered(one.files)
                trials.setdefault(count, []).append(one)
                lost[count] = max(lost.get(count, 0), one.offered - found.packets)
                inversions[count] = max(inversions.get(count, 0), found.inversions)
    for count, rounds in trials.items():
        offered = int(medians(rounds, lambda t: t.offered) or 0)
        cpu, memory = medians(rounds, Trial.ns_per_packet), medians(rounds, lambda t: t.peak_bytes / 2**20)
        kpps = medians(rounds, lambda t: t.rate_pps / 1e3)
        table.add(
            rate_name,
            count,
            program.name,
            offered,
            kpps,
            lost[count],
            inversions[count],
            cpu,
            by_process(rounds),
            memory,
        )
    job = f"16 interfaces, {rate_name}"
    result.targets.append(
        not_above(job, "CPU ns per packet", trials[16], "1 interface", trials[1], GROWTH, Trial.ns_per_packet)
    )
