"""The console script `appliance`. Metering files begins at once; everything else goes to the command line (cli.py).

The packages of the command line take longer to import than a million packets take to meter. So a command line that is
plainly `flows` is read here, and whatever is not plain, help and mistakes first of all, is left to cli.py, which has
the same options and alone explains them.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from typing import Any

from appliance.errors import ApplianceError

DEBUG_VARIABLE = "APPLIANCE_DEBUG"
EXIT_FAULT = os.EX_SOFTWARE  # 70: a fault of the program itself
EXIT_INTERRUPTED = 130

IDLE_TIMEOUT_S = 30.0
ACTIVE_TIMEOUT_S = 300.0
SHORTEST_TIMEOUT_S = 0.001
MAX_FLOWS = 1_000_000
FEWEST_FLOWS = 64
TUNNELS = ("outer", "inner")
ZERO_LENGTH = ("field", "frame")
MAX_FRAGMENTED = 65_536
MOST_FRAGMENTED = 1 << 24
FILE_FORMATS = ("ipfix", "json", "csv", "parquet")
FORMAT_ENDINGS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    job = plain_flows(arguments[1:]) if arguments[:1] == ["flows"] else None
    if job is None:
        from appliance.cli import run_command

        sys.exit(run_command(arguments))
    gc.disable()  # until all is imported: that is here to stay, and a look for garbage in it takes a tenth of the start
    status = exit_status(lambda: flows(**job))
    gc.freeze()  # nor at the end
    sys.exit(status)


def exit_status(command: Callable[[], int]) -> int:
    """Runs a command; whatever goes wrong is one message."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except ApplianceError as error:
        print(f"appliance: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return reader_left()
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(
            f"appliance: a fault of the program itself: {type(error).__name__}: {error}; "
            f"{DEBUG_VARIABLE}=1 shows where",
            file=sys.stderr,
        )
        return EXIT_FAULT


def reader_left() -> int:
    """The reader of our output (head, less) has seen enough. Python must not try to flush it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def plain_flows(arguments: list[str]) -> dict[str, Any] | None:
    """What `flows` is called with, or None when anything about `arguments` (behind the command) is not plain."""
    names = {"-o": "output", "--output": "output", "--idle-timeout-s": "idle_timeout_s"}
    names |= {"--active-timeout-s": "active_timeout_s", "--max-flows": "max_flows"}
    names |= {"--tunnels": "tunnels", "--max-fragmented": "max_fragmented", "--zero-length": "zero_length"}
    names["--format"] = "file_format"
    switches = {"--json": "as_json", "--applications": "applications", "--entropy": "entropy"}
    kinds: dict[str, Callable[[str], Any]] = {"output": str, "max_flows": int, "max_fragmented": int}
    kinds |= {"tunnels": str, "zero_length": str, "file_format": str}
    found: dict[str, Any] = {"files": [], "as_json": False}
    words = iter(arguments)
    try:
        for word in words:
            if word in switches:
                found[switches[word]] = True
            elif word in names:
                found[names[word]] = kinds.get(names[word], float)(next(words))
            elif word and (word == "-" or not word.startswith("-")):
                found["files"].append(word)
            else:
                return None
    except (ValueError, StopIteration):
        return None
    timeouts = (found.get("idle_timeout_s", IDLE_TIMEOUT_S), found.get("active_timeout_s", ACTIVE_TIMEOUT_S))
    if not all(SHORTEST_TIMEOUT_S <= timeout_s < float("inf") for timeout_s in timeouts):
        return None
    fragmented = found.get("max_fragmented", MAX_FRAGMENTED)
    if not 0 <= fragmented <= MOST_FRAGMENTED:
        return None
    if found.get("tunnels", TUNNELS[0]) not in TUNNELS or found.get("zero_length", ZERO_LENGTH[0]) not in ZERO_LENGTH:
        return None
    plain = found["files"] and found.get("output") and found.get("max_flows", MAX_FLOWS) >= FEWEST_FLOWS
    return found if plain and found.get("file_format", "ipfix") in FILE_FORMATS else None


def flows(
    files: list[str],
    output: str,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
    active_timeout_s: float = ACTIVE_TIMEOUT_S,
    max_flows: int = MAX_FLOWS,
    tunnels: str = TUNNELS[0],
    max_fragmented: int = MAX_FRAGMENTED,
    zero_length: str = ZERO_LENGTH[0],
    as_json: bool = False,
    file_format: str | None = None,
    applications: bool = False,
    entropy: bool = False,
) -> int:
    """The command `flows`; returns its exit status. `file_format`: one of FILE_FORMATS; None: by the output's name."""
    from appliance.console import joined, print_json, progress
    from appliance.meter.settings import MeterSettings
    from appliance.offline import meter_files

    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    settings = MeterSettings(
        idle_timeout_s=idle_timeout_s,
        active_timeout_s=active_timeout_s,
        max_flows=max_flows,
        tunnels=tunnels,
        max_fragmented=max_fragmented,
        zero_length=zero_length,
        applications=applications,
        entropy=entropy,
    )
    file_format = file_format or FORMAT_ENDINGS.get(os.path.splitext(output)[1].lower(), "ipfix")
    with progress("metering", "packets") as advance:
        counts = meter_files(files, output, settings, lambda packets: advance(packets, 0), file_format)
    if as_json:
        from dataclasses import asdict

        print_json(asdict(counts))
    else:
        ignored = joined([f"{count} {reason}" for reason, count in counts.ignored.items() if count])
        print(
            f"{output}: {counts.flows} flow records of {counts.metered_packets} packets and {counts.metered_octets} IP "
            f"octets; {counts.packets} packets read, not metered: {ignored}"
        )
    return tell_damage(counts.damage)


def tell_damage(damage: list[str]) -> int:
    """Names the damaged files; returns the exit status that they mean."""
    from appliance.errors import FormatError

    for text in damage:
        print(f"appliance: {text}", file=sys.stderr)
    return FormatError.exit_code if damage else 0
