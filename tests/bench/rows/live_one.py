"""One interface, IMIX at the sender's limit, plain and through a compressor: against tcpdump and netsniff-ng."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from support.judges import capinfos

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
from bench.traffic import NAMED_SIZES

NAME = "live-one"
TITLE = "One live interface, IMIX at the sender's limit"
NEEDS_ROOT = True

TCPDUMP = "tcpdump -i {0} -B 65536 -Z root -w {1}"
COMPRESSORS = {"lz4": ["lz4", "-q", "-c"], "zstd -1": ["zstd", "-q", "-1", "-c"]}
SUFFIXES = {"lz4": "lz4", "zstd -1": "zst"}


def _compressed(out: Path, suffix: str) -> list[Path]:
    return sorted(out.glob(f"*.{suffix}")) + appliance_files(out)


def _piped_mtracecap(argv: list[str], suffix: str, interfaces: Sequence[str], out: Path) -> list[list[str]]:
    (words,) = mtracecap_commands(interfaces, out, f"--pipeout={' '.join(argv)}")
    return [[word.replace("out.pcap", f"out.pcap.{suffix}") for word in words]]


def _piped_tcpdump(argv: list[str], suffix: str, interfaces: Sequence[str], out: Path) -> list[list[str]]:
    capture = TCPDUMP.format(interfaces[0], "-")
    return [["sh", "-c", f"{capture} | {' '.join(argv)} >{out}/out.pcap.{suffix}"]]


PLAIN = (
    Program("mtracecap", mtracecap_commands),
    Program("appliance run", appliance_commands, appliance_files),
    Program(
        "tcpdump -B 65536",
        lambda interfaces, out: [TCPDUMP.format(interfaces[0], out / "out.pcap").split()],
        needs=("tcpdump",),
    ),
    Program(
        "netsniff-ng",
        lambda interfaces, out: [
            ["netsniff-ng", "-i", interfaces[0], "-o", str(out / "out.pcap"), "-s", "-S", "64MiB"],
        ],
        needs=("netsniff-ng",),
    ),
)


def _through(name: str) -> tuple[Program, ...]:
    argv, suffix = COMPRESSORS[name], SUFFIXES[name]
    files = partial(_compressed, suffix=suffix)
    needs = (argv[0],)
    return (
        Program("mtracecap", partial(_piped_mtracecap, argv, suffix), files, needs=needs),
        Program("appliance run", partial(appliance_commands, compressor=argv), files, needs=needs),
        Program(
            "tcpdump -B 65536",
            partial(_piped_tcpdump, argv, suffix),
            files,
            stops=("tcpdump",),
            needs=("tcpdump", *needs),
        ),
    )


CASES = {"plain": PLAIN} | {name: _through(name) for name in COMPRESSORS}
OURS = ("mtracecap", "appliance run")


def run_row(bench: Bench) -> RowResult:
    traffic = Traffic(800_000 if bench.quick else 2_400_000, sizes=NAMED_SIZES["IMIX"])
    table = Table(
        NAME,
        f"{TITLE}; the worst round's loss, the median of the rest; CPU of each packet that was kept",
        ("case", "program", "offered", "kpps", "lost", "lost %", "in order", "CPU ns per packet", "by process",
         "peak MiB"),
        pictures=[Picture("CPU ns per packet", "case", "program"), Picture("lost %", "case", "program")],
    )  # fmt: skip
    result = RowResult(NAME, TITLE, [table], conditions=bench.pinning)
    result.missing = sorted({name for programs in CASES.values() for one in programs for name in one.missing})
    for case, programs in CASES.items():
        trials, order = _measure(bench, case, programs, traffic)
        for program in programs:
            if program.name not in trials:
                table.add(case, program.name, *[None] * (len(table.columns) - 2))
                continue
            found = trials[program.name]
            lost = max(one.lost for one in found)
            share = max(100 * one.lost / max(1, one.offered) for one in found)
            table.add(
                case, program.name, int(medians(found, lambda t: t.offered) or 0),
                medians(found, lambda t: t.rate_pps / 1e3), lost, share, all(order[program.name]),
                medians(found, Trial.ns_per_packet), by_process(found), medians(found, lambda t: t.peak_bytes / 2**20),
            )  # fmt: skip
        _targets(case, trials, table, result)
    return result


def _measure(
    bench: Bench, case: str, programs: Sequence[Program], traffic: Traffic
) -> tuple[dict[str, list[Trial]], dict[str, list[bool]]]:
    """By program: the trials, and whether the output was in order."""
    trials: dict[str, list[Trial]] = {}
    order: dict[str, list[bool]] = {}
    with bench.recording_directory() as scratch:
        for i in range(bench.rounds):
            for program in programs:
                if program.missing:
                    continue
                bench.progress.step(f"{case}: round {i + 1} of {bench.rounds}: {program.name}")
                one = trial(bench, program, 1, traffic, scratch / "out")
                infos = [capinfos(_plain(path, scratch / "plain")) for path in one.files]
                trials.setdefault(program.name, []).append(one)
                one.lost = one.offered - sum(info.packets for info in infos)
                order.setdefault(program.name, []).append(all(info.in_order is not False for info in infos))
    return trials, order


def _plain(path: Path, copy: Path) -> Path:
    """The file, or its unpacked copy; what a program cut off when it was stopped is missing there, too."""
    program = {".lz4": "lz4", ".zst": "zstd"}.get(path.suffix)
    if program is None:
        return path
    with copy.open("wb") as target:
        subprocess.run([program, "-dcq", str(path)], stdout=target, stderr=subprocess.DEVNULL, check=False)
    return copy


def _targets(case: str, trials: dict[str, list[Trial]], table: Table, result: RowResult) -> None:
    limit = 0.7 if case == "plain" else 1.05
    theirs = trials.get("tcpdump -B 65536", [])
    for ours in OURS:
        job = f"1 interface, IMIX at the limit, {case}: {ours}"
        lost = table.value("lost", case=case, program=ours)
        result.targets.append(absolute(job, "lost", lost, "<=", 0))  # type: ignore[arg-type]
        result.targets.append(
            not_above(job, "CPU ns per packet", trials.get(ours, []), "tcpdump", theirs, limit, Trial.ns_per_packet)
        )
