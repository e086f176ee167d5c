"""The whole appliance with the meter on, one interface at the sender's limit, beside programs that only meter."""

from __future__ import annotations

import json
import re
import subprocess
from functools import partial
from pathlib import Path

from bench.context import Bench
from bench.live import (
    ENVIRONMENT,
    Program,
    Traffic,
    Trial,
    appliance_commands,
    appliance_files,
    by_process,
    medians,
    not_above,
    trial,
)
from bench.results import Picture, RowResult, Table, absolute
from bench.scan import count_numbered

NAME = "live-meter"
TITLE = "One live interface, 60 B at the sender's limit, metered"
NEEDS_ROOT = True

FLOWS = (1_000, 100_000)
WITH, WITHOUT = "appliance, meter on", "appliance, meter off"
GROWTH = 1.15
MORE_ROUNDS = 2  # times as many of our own two: their difference is smaller than what one round is off
YAF_NS = {1_000: 100.0, 100_000: 360.0}  # CPU per packet, measured where it could be installed


def status(out: Path) -> str:
    """What the service says of itself."""
    command = [ENVIRONMENT / "appliance", "status", "--socket", out / "control", "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def softflowd_statistics(out: Path) -> str:
    command = ["softflowctl", "-c", out / "control", "statistics"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout


PROGRAMS = (
    Program(WITH, partial(appliance_commands, meter=True), appliance_files, look=status),
    Program(WITHOUT, appliance_commands, appliance_files),
    Program(
        "softflowd",
        lambda interfaces, out: [
            ["softflowd", "-d", "-i", interfaces[0], "-n", "127.0.0.1:9", "-v", "10", "-m", "1000000",
             "-B", str(64 << 20), "-p", f"{out}/pid", "-c", f"{out}/control"],
        ],
        needs=("softflowd", "softflowctl"),
        look=softflowd_statistics,
    ),
    Program(
        "nfpcapd",
        lambda interfaces, out: [["nfpcapd", "-i", interfaces[0], "-w", str(out), "-b", "64"]],
        needs=("nfpcapd",),
    ),
    Program(
        "yaf",
        lambda interfaces, out: [
            ["yaf", "--verbose", "--live", "pcap", "--in", interfaces[0], "--out", f"{out}/flows.ipfix"],
        ],
        needs=("yaf",),
        heeds_late=True,
    ),
)  # fmt: skip


def metered_packets(one: Trial) -> int | None:
    """How many packets the program says it metered; None when it does not say."""
    if one.seen.startswith("{"):
        return int(json.loads(one.seen)["meter"]["metered_packets"])
    found = re.findall(r"(?:Packets processed|Total: Processed|Flows: \d+ Packets): (\d+)", one.seen or one.output)
    return int(found[-1]) if found else None


def run_row(bench: Bench) -> RowResult:
    table = Table(
        NAME,
        f"{TITLE}; the worst round's loss, the median of the rest",
        ("flows", "program", "offered", "kpps", "lost", "not metered", "CPU ns per packet", "by process", "peak MiB"),
        pictures=[Picture("CPU ns per packet", "flows", "program")],
    )
    result = RowResult(NAME, TITLE, [table], conditions=bench.pinning)
    result.missing = sorted({name for program in PROGRAMS for name in program.missing})
    for flows in FLOWS:
        traffic = Traffic(800_000 if bench.quick else 2_400_000, flows=flows)
        trials: dict[str, list[Trial]] = {}
        lost: dict[str, list[int]] = {}
        with bench.recording_directory() as scratch:
            for i in range(bench.rounds * MORE_ROUNDS):
                for program in PROGRAMS:
                    if not program.missing and (i < bench.rounds or program.name in (WITH, WITHOUT)):
                        bench.progress.step(f"{flows:,} flows: round {i + 1}: {program.name}")
                        one = trial(bench, program, 1, traffic, scratch / "out")
                        trials.setdefault(program.name, []).append(one)
                        if one.files:
                            lost.setdefault(program.name, []).append(one.offered - count_packets(one.files))
        for program in PROGRAMS:
            _report(flows, program, trials, lost, table)
        _targets(flows, trials, lost, result)
    return result


def count_packets(files: list[Path]) -> int:
    return count_numbered(path for path in files if ".pcap" in path.name).packets


def _report(
    flows: int, program: Program, trials: dict[str, list[Trial]], lost: dict[str, list[int]], table: Table
) -> None:
    found = trials.get(program.name)
    if found is None:
        table.add(flows, program.name, *[None] * (len(table.columns) - 2))
        return
    told = [(one.offered, metered_packets(one)) for one in found]
    unmetered = [offered - count for offered, count in told if count is not None]
    table.add(
        flows, program.name, int(medians(found, lambda t: t.offered) or 0), medians(found, lambda t: t.rate_pps / 1e3),
        max(lost[program.name]) if program.name in lost else None, max(unmetered, default=None),
        medians(found, Trial.ns_per_packet), by_process(found), medians(found, lambda t: t.peak_bytes / 2**20),
    )  # fmt: skip


def _targets(flows: int, trials: dict[str, list[Trial]], lost: dict[str, list[int]], result: RowResult) -> None:
    job = f"meter on, {flows:,} flows"
    result.targets.append(absolute(job, "lost", max(lost.get(WITH, []), default=None), "<=", 0))
    recorded = "capture and merge, ns per packet"
    result.targets.append(not_above(job, recorded, trials[WITH], "meter off", trials[WITHOUT], GROWTH, of_recording))
    measure = "meter worker, ns per packet"
    if "yaf" in trials:
        result.targets.append(
            not_above(job, measure, trials[WITH], "yaf", trials["yaf"], 1.0, of_meter, Trial.ns_per_packet)
        )
    else:
        remark = "yaf is not on the PATH: the limit is what it took where it was"
        result.targets.append(absolute(job, measure, medians(trials[WITH], of_meter), "<=", YAF_NS[flows], remark))


def of_recording(one: Trial) -> float | None:
    return one.ns_per_packet("capture", "merge")


def of_meter(one: Trial) -> float | None:
    return one.ns_per_packet("meter")
