"""`appliance capture` and `appliance generate`: port capture and test traffic on the command line.

The service is asked over its control socket; files are written here, with the rights of whoever types the command.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appliance.console import Table, print_json, print_table
from appliance.errors import CannotCreateError, UsageError

if TYPE_CHECKING:
    from appliance.capturer import Port, StatsReply

# An expression that is given on the command line gets a filter of these; the lower ones are the configuration's.
START_FILTER, STOP_FILTER, KEEP_FILTER = 13, 14, 15

app = typer.Typer(
    name="capture",
    help="Port capture of the running service: start and stop triggers, what is kept, the captured packets.",
    rich_markup_mode=None,
)

Label = Annotated[str, typer.Argument(metavar="LABEL", help="The interface's label.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="The configuration (TOML).")]
Socket = Annotated[Path | None, typer.Option("--socket", metavar="PATH", help="The service's control socket.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Criterion = Annotated[str, typer.Option("--start", help="on, filter, fcserr or plderr.")]
StopCriterion = Annotated[str, typer.Option("--stop", help="userstop, full, filter, fcserr or plderr.")]
Kind = Annotated[str, typer.Option("--keep", help="all, filter, tpld, notpld, fcserr or plderr.")]
FILTER_HELP = "A BPF expression, or the number of one of capture_filters."
StartFilter = Annotated[str, typer.Option("--start-filter", metavar="FILTER", help=FILTER_HELP)]
StopFilter = Annotated[str, typer.Option("--stop-filter", metavar="FILTER", help=FILTER_HELP)]
KeepFilter = Annotated[str, typer.Option("--keep-filter", metavar="FILTER", help=FILTER_HELP)]


@app.command()
def start(
    label: Label,
    start: Criterion = "on",
    start_filter: StartFilter = "",
    stop: StopCriterion = "userstop",
    stop_filter: StopFilter = "",
    keep: Kind = "all",
    keep_filter: KeepFilter = "",
    stream: Annotated[int, typer.Option(min=0, help="For --keep tpld: the stream of test payloads.")] = 0,
    byte_count: Annotated[int, typer.Option(min=-1, help="Bytes kept of each packet; -1 = all.")] = -1,
    pretrigger: Annotated[int, typer.Option(min=0, help="Packets kept from before the start criterion's.")] = 0,
    config: ConfigFile = None,
    socket: Socket = None,
) -> None:
    """Set the rules and start a capture; what was captured before is gone."""
    from appliance.capturer import enums

    start_criterion = member(enums.StartTrigger, "--start", start)
    stop_criterion = member(enums.StopTrigger, "--stop", stop)
    kind = member(enums.PacketType, "--keep", keep)

    async def begin(port: Port) -> None:
        first = await filter_index(port, start_filter, START_FILTER)
        last = await filter_index(port, stop_filter, STOP_FILTER)
        kept = await filter_index(port, keep_filter, KEEP_FILTER)
        await port.capturer.trigger.set(start_criterion, first, stop_criterion, last)
        await port.capturer.keep.set(kind, kept if kind == enums.PacketType.FILTER else stream, byte_count)
        await port.capturer.pretrigger.set(pretrigger)
        await port.capturer.state.set_start()

    with_port(label, config, socket, begin)
    print(f"{label}: {'captures' if start_criterion == enums.StartTrigger.ON else 'waits for its start criterion'}")


@app.command()
def stop(label: Label, config: ConfigFile = None, socket: Socket = None) -> None:
    """Stop a capture; its packets stay until the next start."""

    async def end(port: Port) -> StatsReply:
        await port.capturer.state.set_stop()
        return await port.capturer.stats.get()

    print(f"{label}: {sentence(with_port(label, config, socket, end))}")


@app.command()
def status(label: Label, config: ConfigFile = None, socket: Socket = None, as_json: AsJson = False) -> None:
    """Show a port's rules and figures."""
    shown, stats = with_port(label, config, socket, lambda port: gathered(port.shown(), port.capturer.stats.get()))
    if as_json:
        print_json(shown)
        return
    from appliance.capturer import enums

    begin, first, end, last = shown["trigger"]
    kind, index, byte_count = shown["keep"]
    print(f"{label}: {sentence(stats)}")
    print(f"start {enums.StartTrigger(begin).name} {first}, stop {enums.StopTrigger(end).name} {last}")
    print(f"keep {enums.PacketType(kind).name} {index}, {'all' if byte_count < 1 else byte_count} bytes of each")
    print(f"packets kept from before the start criterion's: {shown['pretrigger_packets']}")
    for number, expression in shown["filters"].items():
        print(f"filter {number}: {expression}")


@app.command()
def streams(label: Label, config: ConfigFile = None, socket: Socket = None, as_json: AsJson = False) -> None:
    """Show loss, disorder, errors and latency of each stream of test payloads since the start."""
    found = [dataclasses.asdict(one) for one in with_port(label, config, socket, lambda p: p.capturer.streams.get())]
    if as_json:
        print_json(found)
        return
    columns = ("stream", "packets", "bytes", "lost", "misordered", "payload_errors")
    latencies = ("latency_min_ns", "latency_mean_ns", "latency_max_ns")
    rows = [tuple(one[column] for column in (*columns, *latencies)) for one in found]
    print_table(Table("", tuple(column.replace("_", " ") for column in (*columns, *latencies)), rows))


@app.command()
def save(
    label: Label,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to make; it must be new.")],
    file_format: Annotated[str, typer.Option("--format", help="pcapng or pcap (nanoseconds).")] = "pcapng",
    config: ConfigFile = None,
    socket: Socket = None,
) -> None:
    """Write what was captured into a file."""
    if file_format not in ("pcapng", "pcap"):
        raise UsageError(f"--format is pcapng or pcap, not {file_format}")
    try:
        count = with_port(label, config, socket, lambda port: port.capturer.save(output, file_format))
    except OSError as error:
        raise CannotCreateError(f"{output}: cannot be written: {error.strerror}") from None
    print(f"{output}: {count} packets")


def generate(
    interface: Annotated[str, typer.Argument(metavar="INTERFACE", help="Where the frames are sent.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Frames.")] = 1000,
    rate: Annotated[float, typer.Option(min=0.001, help="Frames a second.")] = 1000.0,
    stream: Annotated[int, typer.Option(min=0, help="The stream's number.")] = 0,
    frame_bytes: Annotated[int, typer.Option(help="Length without check sequence.")] = 128,
    first_sequence: Annotated[int, typer.Option(min=0, help="The first frame's number.")] = 0,
    damage_every: Annotated[int, typer.Option(min=0, help="Damage every so many-th payload; 0 = none.")] = 0,
    destination_mac: Annotated[str, typer.Option(metavar="MAC")] = "02:00:00:00:00:02",
    source_mac: Annotated[str, typer.Option(metavar="MAC")] = "02:00:00:00:00:01",
    destination: Annotated[str, typer.Option(metavar="IPV4")] = "192.0.2.2",
    source: Annotated[str, typer.Option(metavar="IPV4")] = "192.0.2.1",
) -> None:
    """Send test frames that port capture measures.

    UDP datagrams to the discard port, each with its stream, number, time and checksums in a trailer. At most 10 million
    frames, 100,000 a second; nothing is sent anywhere but on the interface that is named.
    """
    from appliance.generator import StreamShape, generate as send_stream

    shape = StreamShape(stream, frame_bytes, destination_mac, source_mac, source, destination)
    sent = send_stream(
        interface, shape, count=count, rate_pps=rate, first_sequence=first_sequence, damage_every=damage_every
    )
    print(f"{interface}: {sent} frames of stream {stream}")


# What the commands share ----------------------------------------------------------------------------------------------


def with_port(label: str, config: Path | None, socket: Path | None, act: Callable[[Port], Awaitable[Any]]) -> Any:
    from appliance.capturer import connect
    from appliance.cli import control_socket

    async def connected() -> Any:
        return await act(await connect(label, control_socket(config, socket)))

    return asyncio.run(connected())


async def gathered(*awaitables: Awaitable[Any]) -> list[Any]:
    return [await one for one in awaitables]


async def filter_index(port: Port, text: str, own: int) -> int:
    """The index that `text` names, or that an expression gets."""
    if not text or (text.isascii() and text.isdigit()):
        return int(text or 0)
    await port.filters.set(own, text)
    return own


def member(kinds: Any, option: str, name: str) -> Any:
    try:
        return kinds[name.upper()]
    except KeyError:
        raise UsageError(f"{option} is one of {', '.join(kind.name.lower() for kind in kinds)}, not {name!r}") from None


def sentence(stats: StatsReply) -> str:
    why = {"full": "its buffer was full", "user": "asked to", "trigger": "its stop criterion was met"}
    because = f" because {why[stats.stopped_because]}" if stats.stopped_because in why else ""
    return (
        f"{stats.state}{because}; {stats.packets} packets kept of {stats.seen_packets} seen, "
        f"{stats.overwritten_packets} overwritten"
    )
