"""Metering of a capture file: `appliance flows` against nfpcapd, softflowd and, where it is on the PATH, YAF."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.context import Bench
from bench.measure import Run, find, line, median, run
from bench.pace import Span
from bench.results import Picture, RowResult, Table, Target
from bench.traffic import NAMED_SIZES, Mix, packets_of, write_capture

NAME = "offline-flows"
TITLE = "Flow metering of a file, offline"
NEEDS_ROOT = False

APPLIANCE = str(Path(sys.executable).with_name("appliance"))
FLOWS = (1_000, 10_000, 100_000, 500_000)
JUDGED = (10_000, 500_000)
FACTORS = {
    "yaf": {10_000: 1.2, 500_000: 2.0},
    "nfpcapd": dict.fromkeys(JUDGED, 2.5),
    "softflowd": dict.fromkeys(JUDGED, 2.5),
}
MAX_FLOWS = 1_000_000


@dataclass(frozen=True)
class Program:
    """`argv`: from the input, an empty directory for output, and a UDP port that takes everything.
    `records`: how many flow records the run exported, None when the program does not tell."""

    name: str
    argv: Callable[[Path, Path, int], list[str]]
    records: Callable[[Run, Path], int | None]


def ipfix_records(path: Path) -> int:
    """Flow records in an IPFIX file: the last sequence number (RFC 7011, section 3.1), and the Data Records of the last
    message at most, which are few; options data counts too."""
    sequence, position, content = 0, 0, path.read_bytes()
    while position + 16 <= len(content):
        length, _, sequence = struct.unpack_from(">xxHII", content, position)
        if length < 16:
            break
        position += length
    return sequence


def _told(pattern: str) -> Callable[[Run, Path], int | None]:
    def told(done: Run, _directory: Path) -> int | None:
        found = re.findall(pattern, done.output)
        return sum(map(int, found)) if found else None

    return told


PROGRAMS = (
    Program(
        "appliance",
        lambda file, out, port: [APPLIANCE, "flows", str(file), "-o", f"{out}/flows.ipfix"],
        _told(r": (\d+) flow records"),
    ),
    Program("yaf", lambda file, out, port: ["yaf", "--in", str(file), "--out", f"{out}/flows.ipfix"],
            lambda done, out: ipfix_records(out / "flows.ipfix")),
    Program("nfpcapd", lambda file, out, port: ["nfpcapd", "-r", str(file), "-w", str(out)],
            _told(r"Flows: (\d+)")),
    Program(
        "softflowd",
        lambda file, out, port: ["softflowd", "-r", str(file), "-n", f"127.0.0.1:{port}", "-v", "10",
                                 "-m", str(MAX_FLOWS), "-p", f"{out}/pid", "-c", "none"],
        _told(r"Flows exported: (\d+)"),
    ),
)  # fmt: skip


def run_row(bench: Bench) -> RowResult:
    small, large = (250_000, 1_000_000) if bench.quick else (500_000, 2_000_000)
    flows = JUDGED if bench.quick else FLOWS
    table = Table(
        NAME,
        f"{TITLE}: IMIX, {large:,} packets, start-up included; marginal against {small:,} packets",
        ("flows", "program", "Mpps", "marginal Mpps", "CPU s per M", "records", "records per s"),
        pictures=[Picture("Mpps", "flows", "program"), Picture("records per s", "flows", "program")],
    )
    result = RowResult(NAME, TITLE, [table], conditions="all CPUs, files in memory")
    result.missing = [program.name for program in PROGRAMS if not _installed(program)]
    for count in flows:
        with bench.directory() as directory:
            _flows(bench, directory, count, (small, large), table)
        ours = table.value("Mpps", flows=count, program="appliance")
        for peer, factors in FACTORS.items():
            figure = table.value("Mpps", flows=count, program=peer)
            if count in factors:
                remark = "" if figure is not None else f"{peer} is not on the PATH"
                job = f"flow metering offline, {count:,} flows"
                result.targets.append(Target(job, "Mpps", ours, peer, figure, ">=", factors[count], remark))
    return result


def _installed(program: Program) -> bool:
    return find(program.argv(Path(), Path(), 0)[0]) is not None


def _flows(bench: Bench, directory: Path, flows: int, counts: tuple[int, int], table: Table) -> None:
    """All programs on packets of so many flows."""
    bench.progress.step(f"{flows:,} flows: writing the inputs")
    mix = Mix(NAMED_SIZES["IMIX"], flows=flows)
    inputs = {count: write_capture(directory / f"{count}.pcap", count, mix) for count in counts}
    programs = [program for program in PROGRAMS if _installed(program)]
    runs: dict[tuple[str, int], list[Run]] = {}
    records: dict[str, int | None] = {}
    output = directory / "out"
    with discard_port() as port:
        for i in range(bench.rounds):
            for program in programs:
                for count in counts:
                    bench.progress.step(f"{flows:,} flows: round {i + 1} of {bench.rounds}: {program.name}, {count:,}")
                    done = bench.pace.steadiest(partial(_run, program.argv(inputs[count], output, port), output))
                    runs.setdefault((program.name, count), []).append(done)
                records[program.name] = program.records(done, output)
    low, high = (packets_of(count, mix) for count in counts)
    for program in PROGRAMS:
        if program not in programs:
            table.add(flows, program.name, None, None, None, None, None)
            continue
        small, large = ([one.wall_s for one in runs[program.name, count]] for count in counts)
        whole = median(large)
        cpu = median(one.cpu_s for one in runs[program.name, counts[1]])
        made = records[program.name]
        rate = made / whole if made else None
        marginal = line(low, small, high, large).per_second / 1e6
        table.add(flows, program.name, high / whole / 1e6, marginal, cpu / high * 1e6, made, rate)


def _run(argv: list[str], output: Path, span: Span) -> Run:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    with span:
        return run(argv)


@contextlib.contextmanager
def discard_port() -> Iterator[int]:
    """A UDP port of this host that takes what comes; nobody reads it, so what does not fit is dropped."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taker:
        taker.bind(("127.0.0.1", 0))
        yield taker.getsockname()[1]
