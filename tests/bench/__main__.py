"""`python -m bench [--quick] [--rows NAME,...]`: measures, prints tables, writes JSON and pictures."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from bench import pictures, report
from bench.context import DISK, Bench, Progress, machine, scratch_directory
from bench.pace import Pace
from bench.results import RowResult

PROJECT = Path(__file__).parents[2]
OUTPUT = PROJECT / "build" / "bench"
ROWS = (
    "offline-merge",
    "offline-flows",
    "ipfix-pack",
    "live-many",
    "live-one",
    "live-meter",
    "idle",
    "latency",
    "scaling",
    "stages",
    "meter-extras",
)
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    signal.signal(signal.SIGINT, _interrupt)  # also where a shell had it ignored
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    about = machine()
    heading = report.heading(about, arguments.rounds, arguments.quick)
    print(heading, flush=True)
    results: list[RowResult] = []
    interrupted = False
    with scratch_directory(arguments.scratch) as scratch, scratch_directory(arguments.recordings) as recordings:
        bench = _bench(arguments, scratch, recordings)
        try:
            with bench.pace:
                for name in arguments.rows:
                    results.append(measure(name, bench))
                    print(f"\n{report.row_text(results[-1])}", flush=True)
        except KeyboardInterrupt:
            interrupted = True
            print("\nbench: interrupted; what follows is of the rows that were finished", file=sys.stderr)
        finally:
            bench.progress.clear()
    print(f"\n{report.targets_text(results)}")
    if bench.pace.text:
        print(f"\n{bench.pace.text}")
    save(arguments, about, results, heading)
    return EXIT_INTERRUPTED if interrupted else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench",
        description="Measures the appliance and its peers in turn, on traffic of its own, in namespaces of its own.",
    )
    parser.add_argument("--quick", action="store_true", help="short runs: rough figures in a few minutes")
    parser.add_argument("--rows", type=_rows, default=list(ROWS), metavar="NAME,...", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="medians of so many rounds (3; with --quick 1)")
    parser.add_argument("--unpinned", action="store_true", help="live rows: leave the choice of CPUs to the kernel")
    parser.add_argument("--json", type=Path, default=OUTPUT / "bench.json", metavar="FILE")
    parser.add_argument("--pictures", type=Path, default=OUTPUT, metavar="DIR", help="one PNG of each table")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="captures of a few GiB go there (/dev/shm)")
    parser.add_argument(
        "--recordings", type=Path, metavar="DIR", default=DISK, help=f"what live rows record goes there ({DISK})"
    )
    arguments = parser.parse_args(argv)
    if arguments.rounds is None:
        arguments.rounds = 1 if arguments.quick else 3
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    return arguments


def _rows(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    return names


def _bench(arguments: argparse.Namespace, scratch: Path, recordings: Path) -> Bench:
    cpus = sorted(os.sched_getaffinity(0))
    pinned = len(cpus) > 1 and not arguments.unpinned
    return Bench(
        scratch,
        arguments.rounds,
        arguments.quick,
        sender_cpu=cpus[0] if pinned else None,
        tool_cpus=(cpus[1],) if pinned else None,
        recordings=recordings,
        pace=Pace(cpus),
        progress=Progress(),
    )


def _module(name: str) -> ModuleType:
    return import_module(f"bench.rows.{name.replace('-', '_')}")


def measure(name: str, bench: Bench) -> RowResult:
    """One row. What goes wrong with it is in the result: the other rows are measured all the same."""
    module = _module(name)
    bench.progress.row(name)
    if module.NEEDS_ROOT and os.geteuid() != 0:
        return RowResult(name, module.TITLE, error="needs root: it makes network namespaces and captures live")
    try:
        result: RowResult = module.run_row(bench)
    except Exception as error:
        result = RowResult(name, module.TITLE, error=f"{type(error).__name__}: {error}")
    bench.progress.clear()
    return result


def save(arguments: argparse.Namespace, about: dict[str, str], results: Sequence[RowResult], heading: str) -> None:
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": about,
        "rounds": arguments.rounds,
        "quick": arguments.quick,
        "rows": [result.as_json() for result in results],
    }
    arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nfigures: {arguments.json}")
    try:
        drawn = pictures.draw(results, arguments.pictures, heading)
    except ModuleNotFoundError as missing:
        print(f"no pictures: {missing.name} is not installed (./bootstrap bench brings it)")
    else:
        print(f"{len(drawn)} pictures in {arguments.pictures}")


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
