"""Four capture files into one, in the order of time: `mtracecap` against mergecap and tracemerge."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.judges import capinfos

from bench.context import Bench
from bench.measure import Run, WarmMemory, find, line, median, run
from bench.pace import Span
from bench.results import Picture, RowResult, Table, Target
from bench.traffic import NAMED_SIZES, Mix, packets_of, write_capture

NAME = "offline-merge"
TITLE = "Merge of 4 files into one, offline"
NEEDS_ROOT = False

FILES = 4
FACTORS = {"60 B": 2.5, "IMIX": 1.3}  # times mergecap's rate
PACKETS = {"60 B": (250_000, 3_000_000), "IMIX": (250_000, 1_000_000)}  # of each file, in the smaller and larger run
QUICK_PACKETS = dict.fromkeys(PACKETS, (100_000, 600_000))
OUTPUT_BYTES = 3 << 30  # more than the largest output
MTRACECAP = str(Path(sys.executable).with_name("mtracecap"))


@dataclass(frozen=True)
class Program:
    name: str
    argv: Callable[[Path, list[Path]], list[str]]  # from the output and the inputs


PROGRAMS = (
    Program("mtracecap", lambda out, files: [MTRACECAP, f"pcapfile:{out}", *(f"pcapfile:{file}" for file in files)]),
    Program("mergecap", lambda out, files: ["mergecap", "-F", "pcap", "-w", str(out), *map(str, files)]),
    Program(
        "tracemerge", lambda out, files: ["tracemerge", f"pcapfile:{out}", *(f"pcapfile:{file}" for file in files)]
    ),
)


def run_row(bench: Bench) -> RowResult:
    table = Table(
        NAME,
        f"{TITLE}: marginal rate between runs of two sizes",
        ("frames", "packets", "program", "Mpps", "CPU s per M", "set-up s", "whole run s", "out of order"),
        pictures=[Picture("Mpps", "frames", "program")],
    )
    result = RowResult(NAME, TITLE, [table], conditions="all CPUs, files and output in memory")
    result.missing = [program.name for program in PROGRAMS if not _installed(program)]
    for frames, sizes in NAMED_SIZES.items():
        mix = Mix(sizes, flows=10_000, skew=1.0)
        with bench.directory() as directory:
            _frames(bench, directory, frames, mix, (QUICK_PACKETS if bench.quick else PACKETS)[frames], table)
        ours = table.value("Mpps", frames=frames, program="mtracecap")
        peer = table.value("Mpps", frames=frames, program="mergecap")
        result.targets.append(
            Target(f"merge 4 files, {frames}", "Mpps, marginal", ours, "mergecap", peer, ">=", FACTORS[frames])
        )
    return result


def _installed(program: Program) -> bool:
    return find(program.argv(Path(), [])[0]) is not None


def _frames(bench: Bench, directory: Path, frames: str, mix: Mix, counts: tuple[int, int], table: Table) -> None:
    """All programs on frames of one kind."""
    bench.progress.step(f"{frames}: writing the inputs")
    inputs = {
        count: [write_capture(directory / f"{count}-{i}.pcap", count, mix, i) for i in range(FILES)] for count in counts
    }
    programs = [program for program in PROGRAMS if _installed(program)]
    runs: dict[tuple[str, int], list[Run]] = {}
    orders: dict[str, str] = {}
    output = directory / "out.pcap"
    for i in range(bench.rounds):
        for program in programs:
            for count in counts:
                bench.progress.step(f"{frames}: round {i + 1} of {bench.rounds}: {program.name}, {FILES} x {count:,}")
                one = bench.pace.steadiest(partial(_run, program.argv(output, inputs[count]), output, bench.quick))
                runs.setdefault((program.name, count), []).append(one)
            if i == 0:
                orders[program.name] = _judged(output, FILES * packets_of(counts[1], mix))
    low, high = (FILES * packets_of(count, mix) for count in counts)
    for program in PROGRAMS:
        if program not in programs:
            table.add(frames, None, program.name, None, None, None, None, "not installed")
            continue
        small, large = runs[program.name, counts[0]], runs[program.name, counts[1]]
        wall = line(low, [one.wall_s for one in small], high, [one.wall_s for one in large])
        cpu = line(low, [one.cpu_s for one in small], high, [one.cpu_s for one in large])
        whole = median(one.wall_s for one in large)
        judged = orders[program.name]
        sizes = " and ".join(f"{FILES} x {count:,}" for count in counts)
        table.add(frames, sizes, program.name, wall.per_second / 1e6, cpu.marginal_s * 1e6, wall.setup_s, whole, judged)


def _run(argv: list[str], output: Path, quick: bool, span: Span) -> Run:
    output.unlink(missing_ok=True)
    with WarmMemory(OUTPUT_BYTES // (2 if quick else 1)):
        pass  # it is released right before the run
    with span:
        return run(argv)


def _judged(output: Path, expected: int) -> str:
    """What Wireshark says of the output: "no", or what is wrong."""
    info = capinfos(output)
    lost = f"{expected - info.packets} missing" if info.packets != expected else ""
    return ", ".join(filter(None, [lost, "" if info.in_order else "yes"])) or "no"
