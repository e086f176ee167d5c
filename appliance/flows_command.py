"""The command `appliance flows`, with its command line: the only reader of these options.

It is read by argparse: what the other commands are read with takes longer to import than a million packets take to
meter. An option has the name, the meaning, the default and the bounds of its key of `[meter]` or `[[meter.export]]`;
a test compares them. Offline a time-out may be a fraction of a second.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from appliance.errors import UsageError

if TYPE_CHECKING:
    from appliance.meter.settings import ExportSettings, MeterSettings

SHORTEST_TIMEOUT_S = 0.001
LONGEST_TIMEOUT_S = 86_400.0
FEWEST_FLOWS = 64
MOST_FLOWS = 100_000_000
MOST_SAMPLED = 1_000_000
MOST_NOTED = 20
MOST_FRAGMENTED = 1 << 24
FILE_FORMATS = ("ipfix", "json", "csv", "parquet")
FORMAT_ENDINGS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

SUMMARY = "Meter capture files into an IPFIX, JSON, CSV or Parquet file."
DESCRIPTION = f"{SUMMARY} Several files are metered together, in the order of time."


def run(arguments: Sequence[str]) -> int:
    """Runs the command with what stands behind its name; returns its exit status. UsageError: the command line."""
    if {"-h", "--help"} & set(arguments):
        parser().print_help()
        return 0
    options = parser().parse_intermixed_args(arguments)
    from appliance.console import joined, print_json, progress
    from appliance.offline import meter_files

    if not gc.isenabled():  # start.py holds it off until all is imported
        gc.freeze()
        gc.enable()
    settings, export = settings_of(options)
    with progress("metering", "packets") as advance:
        counts = meter_files(options.files, options.output, settings, lambda packets: advance(packets, 0), export)
    if options.json:
        from dataclasses import asdict

        print_json(asdict(counts))
    else:
        ignored = joined([f"{count} {reason}" for reason, count in counts.ignored.items() if count])
        print(
            f"{options.output}: {counts.flows} flow records of {counts.metered_packets} packets and "
            f"{counts.metered_octets} IP octets; {counts.packets} packets read, not metered: {ignored}"
        )
    return tell_damage(counts.damage)


def tell_damage(damage: list[str]) -> int:
    """Names the damaged files; returns the exit status that they mean."""
    from appliance.errors import FormatError

    for text in damage:
        print(f"appliance: {text}", file=sys.stderr)
    return FormatError.exit_code if damage else 0


def settings_of(options: argparse.Namespace) -> tuple[MeterSettings, ExportSettings]:
    """What the options say, for the meter and for its one file."""
    from dataclasses import fields

    from appliance.meter.settings import ExportSettings, MeterSettings

    given = vars(options)
    meter = {f.name: given[f.name] for f in fields(MeterSettings) if f.name in given}
    meter["elements"] = tuple(given["elements"])
    export = {name: given[name] for name in ("domain", "biflow", "nanoseconds")}
    ending = os.path.splitext(options.output)[1].lower()
    file_format = options.format or FORMAT_ENDINGS.get(ending, "ipfix")
    return MeterSettings(**meter), ExportSettings("file:", file_format=file_format, **export)


# The command line -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def format_help(self) -> str:
        return super().format_help().replace("usage:", "Usage:", 1)


def within(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """A number of `kind` from `low` to `high`."""

    def check(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be between {low} and {high}, is {text}")
        return value

    check.__name__ = "number"  # argparse names it when `kind` refuses the text
    return check


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def parser() -> argparse.ArgumentParser:
    made = _Parser(prog="appliance flows", description=DESCRIPTION, allow_abbrev=False)
    add = made.add_argument
    add("files", nargs="+", type=_name, metavar="FILE", help="Capture files, compressed or not; - is standard input.")
    add("--output", "-o", required=True, type=_name, metavar="FILE", help="The file to make.")
    add(
        "--format",
        choices=FILE_FORMATS,
        help=f"Without it by the ending of --output ({', '.join(FORMAT_ENDINGS)}; IPFIX otherwise).",
    )
    add("--json", action="store_true", help="Machine-readable output.")
    _add_numbers(made)
    _add_choices(made)
    return made


def _add_numbers(made: argparse.ArgumentParser) -> None:
    def number(name: str, default: float, low: float, high: float, text: str) -> None:
        kind = type(default)
        metavar = "SECONDS" if name.endswith("_s") else "N"
        made.add_argument(
            "--" + name.replace("_", "-"),
            type=within(kind, low, high),
            default=default,
            metavar=metavar,
            help=f"{text} (default: {default:g})" if kind is float else f"{text} (default: {default})",
        )

    timeout = (SHORTEST_TIMEOUT_S, LONGEST_TIMEOUT_S)
    number("idle_timeout_s", 30.0, *timeout, "A flow ends after this long without a packet.")
    number("active_timeout_s", 300.0, *timeout, "A flow that goes on is reported this often.")
    number("max_flows", 1_000_000, FEWEST_FLOWS, MOST_FLOWS, "Flows in the table at once.")
    number("packet_sampling", 1, 1, MOST_SAMPLED, "One packet of so many is metered, and TCP analysis is off; 1: all.")
    number("flow_sampling", 1, 1, MOST_SAMPLED, "One flow of so many is metered; 1: all.")
    number(
        "packet_sequence",
        0,
        0,
        MOST_NOTED,
        "Of so many first packets of a flow: times, lengths, directions, TCP flags, in a record beside (IPFIX alone).",
    )
    number(
        "max_fragmented",
        65_536,
        0,
        MOST_FRAGMENTED,
        "Datagrams in fragments at once, whose later fragments get the ports of the first; 0: they have none.",
    )
    number("fragment_timeout_s", 30.0, *timeout, "They are forgotten this long after the last of their fragments.")
    number("name_bytes", 64 << 20, 1 << 16, 4 << 30, "With applications: memory for names.")
    number("domain", 1, 0, (1 << 32) - 1, "Observation domain ID.")


def _add_choices(made: argparse.ArgumentParser) -> None:
    def switch(name: str, default: bool, text: str) -> None:
        made.add_argument(
            "--" + name.replace("_", "-"),
            action=argparse.BooleanOptionalAction,
            default=default,
            help=f"{text} (default: {'yes' if default else 'no'})",
        )

    switch("vlan_in_key", True, "Packets of different VLANs are different flows.")
    switch("interface_in_key", False, "Packets of different files are different flows.")
    switch("tcp_analysis", True, "Count repeats, disorder, losses, stalls and round trips of TCP.")
    switch(
        "applications", False, "Look into payloads for each flow's application and names (TLS, QUIC, DNS, HTTP, SSH)."
    )
    switch("entropy", False, "Measure the entropy of each direction's first payload.")
    switch("biflow", True, "Both directions in one record (RFC 5103); else one record for each.")
    switch("nanoseconds", True, "Times in nanoseconds beside those in milliseconds.")
    made.add_argument(
        "--tunnels",
        choices=("outer", "inner"),
        default="outer",
        help="The flow of a packet in a tunnel: that of the tunnel, or that of the packet inside. (default: outer)",
    )
    made.add_argument(
        "--zero-length",
        choices=("field", "frame"),
        default="field",
        help="IP octets of a packet whose length field is 0: 0 (IPv6: 40), or what its frame held. (default: field)",
    )
    made.add_argument(
        "--elements",
        action="append",
        default=[],
        metavar="DEFINITION",
        help="An element of your own in every flow record, NAME(ENTERPRISE/NUMBER)<TYPE> = a field of the flow table "
        "or a constant; may be given several times.",
    )
