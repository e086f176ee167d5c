"""The command line. Each command is a few lines: the work is done by the module that it imports when it is called.

Errors that a user can act on are one message on standard error and a named exit code (errors.py); a fault of the
program itself is one line too, and its traceback is there for the asking.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from appliance import capture_command, flows_command
from appliance.console import (
    Table,
    joined,
    print_json,
    print_table,
    progress,
    size_text,
)
from appliance.errors import EXIT_USAGE, ApplianceError, MissingPermissionError, UsageError
from appliance.start import EXIT_INTERRUPTED, exit_status, reader_left

if TYPE_CHECKING:
    from rich.console import Group

    from appliance.config import Config
    from appliance.monitor.view import Snapshot
    from appliance.plan import Plan

SYSTEM_CONFIG = Path("/etc/appliance/appliance.toml")
QUICKSTART_SOCKET = Path("var/control.sock")  # config/quickstart.toml, relative to where it was started
EXIT_FINDINGS = 1  # the command did its work, and found something wrong

# click's UsageError. typer had click as a dependency, and brings a copy of its own since 0.29: this name fits both.
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="appliance",
    help="Records every packet of several interfaces into one time-ordered stream of files, meters them into IPFIX, "
    "and counts what it lost.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="The configuration (TOML).")]
OptionalConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="The configuration (TOML).")
]
Socket = Annotated[
    Path | None,
    typer.Option(
        "--socket", metavar="PATH", help="The service's control socket; without it, that of the configuration."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def run_command(arguments: list[str]) -> int:
    """Runs one command line; returns its exit status. Whatever goes wrong is one message."""
    return exit_status(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    try:
        status = app(arguments, prog_name="appliance", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except _UsageError as error:
        message = error.format_message().rstrip(".")
        print(f"appliance: {message}; see {_help_command(error)}", file=sys.stderr)
        return EXIT_USAGE
    except typer.Abort:
        return EXIT_INTERRUPTED
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # click makes this of it when it comes first
            return reader_left()
        raise


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"appliance {_version()}")
        raise typer.Exit


def _help_command(error: Any) -> str:
    return f"`{error.ctx.command_path if error.ctx else 'appliance'} --help`"


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="The version, and nothing else.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before the command."""
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(EXIT_USAGE)


# The service ----------------------------------------------------------------------------------------------------------


@app.command()
def run(
    config: ConfigFile,
    figures: Annotated[
        bool | None,
        typer.Option(
            "--figures/--no-figures", help="A line of figures every few seconds; the default, but not under systemd."
        ),
    ] = None,
    lab: Annotated[
        bool,
        typer.Option(
            "--lab",
            help="In a user and network namespace of its own, on traffic that it makes itself: needs no rights.",
        ),
    ] = False,
) -> int:
    """Run the service, until SIGTERM or Ctrl-C."""
    from appliance.config import load
    from appliance.supervisor import run as supervise
    from appliance.wiring import RunOptions

    if figures is None:
        figures = "NOTIFY_SOCKET" not in os.environ
    announce = _announce if figures else None
    options = RunOptions(config_path=os.path.abspath(config), figures=figures, announce=announce)
    loaded = load(config)
    if lab:
        from appliance.lab import enter, start_traffic

        enter()
        start_traffic()
    try:
        return supervise(loaded, options)
    except MissingPermissionError as error:
        hint = f"; to see it work without any rights: {_program()} run --lab -c {config}"
        raise MissingPermissionError(f"{error}{'' if lab else hint}") from error


def _program() -> str:
    """How this program was called."""
    return "./bootstrap" if os.path.exists("bootstrap") else "appliance"


def _announce(config: Config) -> None:
    """Where everything is, for whoever started it by hand."""
    for output in config.outputs:
        labels = joined([interface.label for interface in config.interfaces_of(output)])
        print(f"{labels}: captures appear in {output.directory / 'ready'}")
    for export in config.meter.exports if config.meter.enabled else ():
        where = export.destination
        directory = where.path / "flows" if where.path else config.flows_directory
        print(f"flows go to {directory if where.scheme == 'file' else export.uri}")
    if config.monitor.listen:
        print(f"status page http://{config.monitor.listen}/, metrics http://{config.monitor.listen}/metrics")
    if config.monitor.control_socket:
        print(f"control socket {config.monitor.control_socket} (appliance status, rotate, top)")
    print("Ctrl-C ends it: what was captured is written and published first", flush=True)


@app.command("check-config")
def check_config(config: ConfigFile, as_json: AsJson = False) -> None:
    """Check a configuration and show its plan.

    Interfaces, CPUs, files, programs, certificates and the user must be there, and filters must compile. Nothing is
    opened for capture, nothing is made; rights, memory, directories, addresses and collectors are for `doctor -c FILE`.
    """
    from appliance.capture.interfaces import host_interfaces
    from appliance.config import expand_interfaces, load
    from appliance.meter_settings import check_meter
    from appliance.plan import make_plan
    from appliance.prepare import check_statically

    loaded = expand_interfaces(load(config), host_interfaces())
    plan = make_plan(loaded)
    check_statically(loaded, plan)
    check_meter(loaded)
    tables = _plan_tables(plan)
    if as_json:
        print_json(
            {
                table.title.lower(): [dict(zip(table.columns, row, strict=True)) for row in table.rows]
                for table in tables
            }
        )
        return
    for table in tables:
        print_table(table)
    print(f"{config}: good; {len(plan.workers)} processes, {size_text(plan.memory_bytes)} of rings")
    print(f"rights, memory, directories, addresses and collectors were not looked at: appliance doctor -c {config}")


def _plan_tables(plan: Plan) -> list[Table]:
    sources = [
        (
            source.label,
            str(source.uri),
            source.output,
            source.interface.filter,
            source.interface.snaplen,
            source.ring_bytes,
            source.digest_ring_bytes,
            source.interface.kernel_ring_bytes if source.uri.scheme == "ring" else None,
        )
        for source in plan.sources
    ]
    outputs = [
        (
            planned.output.name,
            str(planned.output.directory),
            planned.output.format,
            planned.output.compressor
            if isinstance(planned.output.compressor, str)
            else " ".join(planned.output.compressor),
            planned.output.rotate_seconds,
            planned.output.rotate_bytes,
            planned.output.max_wait_ms,
            planned.tap_ring_bytes or None,
        )
        for planned in plan.outputs
    ]
    return [
        Table(
            "Sources",
            ("label", "uri", "output", "filter", "snaplen", "ring_bytes", "digest_ring_bytes", "kernel_ring_bytes"),
            sources,
        ),
        Table(
            "Outputs",
            (
                "name",
                "directory",
                "format",
                "compressor",
                "rotate_seconds",
                "rotate_bytes",
                "max_wait_ms",
                "tap_ring_bytes",
            ),
            outputs,
        ),
        Table("Exports", ("uri",), [(export.uri,) for export in plan.exports]),
        Table("Processes", ("name",), [(worker,) for worker in plan.workers]),
    ]


# Asking a service -----------------------------------------------------------------------------------------------------


@app.command()
def status(config: OptionalConfigFile = None, socket: Socket = None, as_json: AsJson = False) -> None:
    """Show the figures of the running service.

    They are those of its metrics, with the balance of every interface: received = written + dropped + in flight.
    """
    from appliance.monitor.render import identity_line, status_tables

    answer = _ask("status", config, socket)
    if as_json:
        print_json(answer)
        return
    snapshot = _snapshot(answer)
    for table in status_tables(snapshot):
        print_table(table)
    for interface in snapshot.interfaces:
        print(identity_line(interface))
    for problem in snapshot.problems:
        print(f"problem: {problem}")


@app.command()
def rotate(config: OptionalConfigFile = None, socket: Socket = None) -> None:
    """Close and publish open files now."""
    print(_ask("rotate", config, socket))


@app.command()
def top(
    config: OptionalConfigFile = None,
    socket: Socket = None,
    interval: Annotated[float, typer.Option("--interval", "-d", min=0.2, max=3600, help="Seconds.")] = 2.0,
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="End after so many looks; 0 = never.")] = 0,
) -> None:
    """Watch the running service.

    Tables on a terminal, else a line every interval.
    """
    from appliance.monitor.render import live_line

    path = control_socket(config, socket)
    snapshots = _snapshots(path, interval, count)
    if not sys.stdout.isatty():
        for now, before in snapshots:
            print(live_line(now, before), flush=True)
        return
    from rich.live import Live

    with Live(screen=True, auto_refresh=False) as live:
        for now, before in snapshots:
            live.update(_top_view(now, before), refresh=True)


def _top_view(now: Snapshot, before: Snapshot | None) -> Group:
    from rich.console import Group
    from rich.text import Text

    from appliance.console import drawn
    from appliance.monitor.render import live_line, status_tables

    tables = [drawn(table) for table in status_tables(now, before)]
    return Group(Text(live_line(now, before), style="red" if now.problems else ""), *tables)


def _snapshots(path: Path, interval_s: float, count: int) -> Iterator[tuple[Snapshot, Snapshot | None]]:
    """A snapshot every interval, with the one before it."""
    from appliance.monitor.control import ControlClient

    client = ControlClient(path)
    before: Snapshot | None = None
    seen = 0
    while True:
        now = _snapshot(client.ask("status"))
        yield now, before
        before = now
        seen += 1
        if seen == count:
            return
        time.sleep(interval_s)


def _ask(request: str, config: Path | None, socket: Path | None) -> object:
    from appliance.monitor.control import ControlClient

    return ControlClient(control_socket(config, socket)).ask(request)


def _snapshot(answer: object) -> Snapshot:
    from appliance.errors import InputOutputError
    from appliance.monitor.view import Snapshot

    try:
        return Snapshot.from_json(answer)
    except ValueError:
        raise InputOutputError(
            "the service's answer is not understood: its version is another than that of this command; "
            "`appliance version` tells both"
        ) from None


def control_socket(config: Path | None, socket: Path | None) -> Path:
    """--socket, else what the configuration says, else where a service would be found without either."""
    from appliance.config import Monitor, load

    if socket is not None:
        return socket
    if config is not None:
        configured = load(config).monitor.control_socket
        if configured is None:
            raise UsageError(f'{config}: monitor.control_socket is "": that service has no control socket')
        return configured
    default = Monitor().control_socket
    assert default is not None
    return QUICKSTART_SOCKET if not default.exists() and QUICKSTART_SOCKET.exists() else default


app.add_typer(capture_command.app)
app.command("generate")(capture_command.generate)


# This host ------------------------------------------------------------------------------------------------------------


@app.command()
def interfaces(as_json: AsJson = False) -> None:
    """List this host's interfaces.

    And say which of them `ring:*` records, and why not the others.
    """
    import psutil

    from appliance.capture.interfaces import host_interfaces

    drops = psutil.net_io_counters(pernic=True)
    columns = ("name", "state", "kind", "speed_mbps", "mtu", "recorded by ring:*", "dropped by the card")
    rows = []
    for interface in host_interfaces():
        state = "up" if interface.is_up and interface.has_carrier else "no carrier" if interface.is_up else "down"
        recorded = f"no, {interface.left_out_because}" if interface.left_out_because else "yes"
        dropped = drops[interface.name].dropin if interface.name in drops else None
        rows.append(
            (interface.name, state, interface.kind, interface.speed_mbps or None, interface.mtu, recorded, dropped)
        )
    if as_json:
        keys = ("name", "state", "kind", "speed_mbps", "mtu", "recorded", "nic_dropped_packets")
        print_json([dict(zip(keys, row, strict=True)) for row in rows])
        return
    print_table(Table("", columns, rows))


@app.command()
def doctor(config: OptionalConfigFile = None, as_json: AsJson = False) -> int:
    """Examine this host, and say what to do.

    Rights, kernel, clock, packages, offloads; with a configuration also whether the service would start with it:
    memory, CPUs, directories and programs as its user sees them, addresses, collectors. Exit status 1 when a check
    fails.
    """
    import dataclasses

    from appliance.capture.interfaces import host_interfaces
    from appliance.config import expand_interfaces, load
    from appliance.doctor import examine

    path = config or (SYSTEM_CONFIG if SYSTEM_CONFIG.exists() else None)
    checks = examine(expand_interfaces(load(path), host_interfaces()) if path is not None else None)
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        marks = {i: {"ok": "good", "warn": "warn", "fail": "bad"}[check.outcome] for i, check in enumerate(checks)}
        rows = [(check.check, check.outcome, check.finding, check.advice) for check in checks]
        print_table(Table("", ("check", "outcome", "finding", "what to do"), rows, marks))
    return EXIT_FINDINGS if any(check.outcome == "fail" for check in checks) else 0


# Files ----------------------------------------------------------------------------------------------------------------


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help=flows_command.DESCRIPTION,
    short_help=flows_command.SUMMARY,
)
def flows(context: typer.Context) -> int:
    """It reads its options itself; this is its place in the list of commands."""
    return flows_command.run(context.args)


@app.command()
def trace(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Capture files, compressed or not, oldest first.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the flows' files are made.")],
    format: Annotated[str, typer.Option(help="pcap, json, plist or tree.")] = "pcap",
    bidirectional: Annotated[
        bool, typer.Option("--bidirectional", help="Both directions of a connection are one flow.")
    ] = False,
    idle_timeout_s: Annotated[
        float, typer.Option(min=0, help="A flow ends after this long without a packet; 0 = never.")
    ] = 300.0,
    linger_s: Annotated[
        float, typer.Option(min=0, help="What comes this long behind FIN or RST is still the flow's; 0 = for ever.")
    ] = 60.0,
    max_flows: Annotated[int, typer.Option(min=1, help="Flows in memory at once.")] = 1_000_000,
    buffer_bytes: Annotated[
        int, typer.Option(min=65536, help="Of packets that wait to be written, all flows together.")
    ] = 64 << 20,
    tunnels: Annotated[
        Literal["outer", "inner"],
        typer.Option(help="TCP in a tunnel: not looked for, or of the innermost IP packet."),
    ] = "outer",
    microseconds: Annotated[
        bool, typer.Option("--microseconds", help="Times of pcap files in microseconds, for old programs.")
    ] = False,
    frames: Annotated[bool, typer.Option("--frames", help="The index lists each flow's frame numbers too.")] = False,
    as_json: AsJson = False,
) -> int:
    """Write each TCP flow into a file of its own.

    An index, flows.jsonl, has a line for each flow: its file, packets, times, and how it ended.
    """
    import dataclasses

    from appliance.flows_command import tell_damage
    from appliance.traces import TraceSettings, trace_files

    settings = TraceSettings(
        format=format,
        bidirectional=bidirectional,
        idle_timeout_s=idle_timeout_s,
        linger_s=linger_s,
        max_flows=max_flows,
        buffer_bytes=buffer_bytes,
        nanoseconds=not microseconds,
        frames=frames,
        inner=tunnels == "inner",
    )
    with progress("tracing", "packets") as advance:
        counts = trace_files(files, str(output), settings, lambda packets: advance(packets, 0))
    if as_json:
        print_json(dataclasses.asdict(counts))
    else:
        evicted = f", {counts.evicted_flows} of them cut short by --max-flows" if counts.evicted_flows else ""
        print(
            f"{output}: {counts.flows} flows{evicted} of {counts.tcp_packets} TCP packets; "
            f"{counts.other_packets} other packets read"
        )
    return tell_damage(counts.damage)


@app.command()
def verify(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The directory of an output (with ready/ below it).")
    ],
    as_json: AsJson = False,
) -> int:
    """Recount published files.

    Packets, sizes, times and digests are compared with the sidecars. Exit status 1 when something does not agree.
    """
    import dataclasses

    from appliance.formats.verify import verify_directory

    with progress("verifying", "bytes") as advance:
        verified = verify_directory(directory, advance)
    problems = sum(1 for one in verified if not one.ok)
    if as_json:
        print_json([dataclasses.asdict(one) | {"ok": one.ok} for one in verified])
    else:
        columns = ("file", "packets", "bytes", "late", "dropped", "closed because", "verdict")
        rows = [
            (
                one.file,
                one.packets,
                one.bytes,
                one.late_packets,
                one.dropped_packets,
                one.closed_because,
                "; ".join(one.problems) or "good",
            )
            for one in verified
        ]
        print_table(Table("", columns, rows, {i: "bad" for i, one in enumerate(verified) if not one.ok}))
        packets = sum(one.packets for one in verified)
        print(f"{len(verified)} files, {packets} packets, {problems} with problems")
    return EXIT_FINDINGS if problems else 0


# IPFIX ----------------------------------------------------------------------------------------------------------------

ipfix_app = typer.Typer(
    help="Decode the IPFIX of any exporter: from files, or over the network.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(ipfix_app, name="ipfix")

IpfixFormat = Annotated[str, typer.Option("--format", help="json (a record a line) or table.")]
Count = Annotated[int, typer.Option("--count", "-n", min=0, help="End after so many records; 0 = never.")]


@ipfix_app.command("read")
def ipfix_read(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="An IPFIX file (RFC 5655), or - for standard input.")],
    output_format: IpfixFormat = "json",
) -> None:
    """Decode an IPFIX file.

    Records go to standard output; what is odd, and a summary, to standard error.
    """
    from appliance.meter.collect import read_file

    read_file(file, output_format, sys.stdout, _tell)


@ipfix_app.command("listen")
def ipfix_listen(
    uris: Annotated[list[str], typer.Argument(metavar="URI...", help="udp://ADDRESS:PORT tcp://... tls://...")],
    output_format: IpfixFormat = "json",
    count: Count = 0,
    certificate: Annotated[Path | None, typer.Option(help="tls:// only: our certificate (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="tls:// only: its key (PEM).")] = None,
    ca: Annotated[
        Path | None, typer.Option(help="tls:// only: exporters need a certificate of one of these authorities (PEM).")
    ] = None,
) -> None:
    """Collect from exporters, until Ctrl-C.

    Records go to standard output; what is odd, and a summary, to standard error.
    """
    from appliance.meter.collect import listen

    listen(uris, output_format, sys.stdout, _tell, count=count, certificate=certificate, key=key, ca=ca)


def _tell(text: str) -> None:
    print(f"appliance: {text}", file=sys.stderr, flush=True)


# Version --------------------------------------------------------------------------------------------------------------


@app.command()
def version(config: OptionalConfigFile = None, socket: Socket = None, as_json: AsJson = False) -> None:
    """Show the versions.

    That of this command, and that of the service if one runs.
    """
    service: object = None
    try:
        service = _ask("version", config, socket)
    except ApplianceError:
        if socket is not None or config is not None:
            raise
    if as_json:
        print_json({"command": _version(), "service": service})
        return
    print(f"appliance {_version()}" + (f", service {service}" if service is not None else ""))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version as installed_version

    try:
        return installed_version("capture-appliance")
    except PackageNotFoundError:  # run from a source tree
        return "0"
