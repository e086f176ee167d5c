"""From a configuration to a plan: which processes, rings and counter pages there will be. A pure function, printable.

Nothing here opens or looks at anything but the machine's memory, and even that is an argument.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from appliance import counters
from appliance.capture import uri as capture_uri
from appliance.config import ERF_SNAPLEN, Config, Interface, Meter, MeterExport, Output, Traceflow
from appliance.counters import page_name
from appliance.errors import ConfigError
from appliance.ring.memory import ring_capacity

MEMORY_SHARE = 8  # of the machine's memory, one part for all rings together
MEMORY_MAX_BYTES = 1 << 30
BLOCK_TIMEOUT_MS = 8
TURN_MAX_MS = 32
FILE_RING_BYTES = 4 << 20  # a file waits when its ring is full, so a small ring that stays in the cache is faster
DIGEST_PARTS = 4  # one part of a source's share is its digest ring, when flows are metered
RECORD_MAX_BYTES = 1 << 20
TAP_SHARE, TAP_MAX_BYTES = 8, 16 << 20  # of memory_bytes, one part for all rings of the flow traces
MORE_EXPORTS = 16  # that a reload can add
# What the supervisor holds itself and for each worker: socket, rings, eventfd, channel, pidfd, sentinel, log; with some
# room for what is open for a moment only.
BASE_OPEN_FILES = 64
OPEN_FILES_A_WORKER = 10


@dataclass(frozen=True)
class Source:
    """One capture worker: an interface (or one fanout member of it) or a file, with its rings."""

    label: str
    index: int  # over all sources
    interface: Interface
    uri: capture_uri.Uri
    output: str
    ring_bytes: int
    digest_ring_bytes: int  # 0: not metered
    fanout_group: int  # 0: none
    turn_ms: int = 0  # while packets come steadily, its worker looks at multiples of this; 0: when the kernel wakes it

    @property
    def worker(self) -> str:
        return page_name("capture", self.label)


@dataclass(frozen=True)
class PlannedOutput:
    """One merge worker and the sources that it merges."""

    output: Output
    sources: tuple[Source, ...]
    tap_ring_bytes: int = 0  # 0: none of its packets are traced

    @property
    def worker(self) -> str:
        return page_name("merge", self.output.name)

    @property
    def turn_ms(self) -> int:
        """Of all its sources; 0: they do not turn together."""
        return min((source.turn_ms for source in self.sources), default=0)


@dataclass(frozen=True)
class Plan:
    """Everything that will be started. `pages`: (name, fields) of every counter page."""

    sources: tuple[Source, ...]
    outputs: tuple[PlannedOutput, ...]
    meter: Meter | None
    exports: tuple[MeterExport, ...]
    export_pages: tuple[str, ...]  # the counter page of each
    monitor: bool
    memory_bytes: int
    pages: tuple[tuple[str, Sequence[str]], ...]
    traceflow: Traceflow | None = None

    @property
    def live_sources(self) -> tuple[Source, ...]:
        return tuple(source for source in self.sources if source.uri.is_live)

    @property
    def max_wait_ms(self) -> int:
        """The longest of all outputs: so long the meter waits, which reads all sources."""
        return max(planned.output.max_wait_ms for planned in self.outputs)

    @property
    def workers(self) -> tuple[str, ...]:
        return worker_names(self.sources, self.outputs, self.meter, self.monitor, self.traceflow)

    @property
    def open_files(self) -> int:
        return BASE_OPEN_FILES + OPEN_FILES_A_WORKER * len(self.workers)


def make_plan(config: Config, machine_bytes: int | None = None) -> Plan:
    """The plan for a configuration whose `ring:*` is expanded already.

    `machine_bytes`: memory of the machine or its cgroup; None looks it up. ConfigError: the rings do not fit.
    """
    memory_bytes = config.memory_bytes or default_memory_bytes(machine_bytes or available_memory_bytes())
    members = [(interface, member) for interface in config.interfaces for member in range(interface.fanout)]
    traced = [output.name for output in config.outputs if is_traced(config, output)]
    tap_ring_bytes = plan_tap(config.traceflow, memory_bytes, len(traced))
    share = (memory_bytes - len(traced) * tap_ring_bytes) // max(1, len(members))
    metered = config.meter.enabled
    sources = []
    for index, (interface, member) in enumerate(members):
        if config.output_of(interface).format == "erf":  # cut where the cut is counted
            interface = interface.model_copy(update={"snaplen": min(interface.snaplen, ERF_SNAPLEN)})
        label = interface.label if member == 0 else f"{interface.label}.{member}"
        sources.append(plan_source(interface, index, label, share, metered))
    sources = with_wakes(sources, config)
    used = sum(source.ring_bytes + source.digest_ring_bytes for source in sources) + len(traced) * tap_ring_bytes
    if config.memory_bytes and used > config.memory_bytes:
        raise ConfigError(
            f"memory_bytes: the rings need {used} bytes together, memory_bytes allows {config.memory_bytes}; "
            "raise it, or lower interface.ring_bytes (or traceflow.ring_bytes)"
        )
    outputs = tuple(
        PlannedOutput(
            output,
            tuple(source for source in sources if source.output == output.name),
            tap_ring_bytes if output.name in traced else 0,
        )
        for output in config.outputs
    )
    meter = config.meter if metered else None
    exports = config.meter.exports if metered else ()
    traceflow = config.traceflow if traced else None
    monitor = config.monitor.address is not None or config.monitor.control_socket is not None
    pages = tuple(counter_pages(sources, outputs, meter, exports, monitor, traceflow))
    export_pages = tuple(page_name("export", str(i)) for i in range(len(exports)))
    return Plan(tuple(sources), outputs, meter, exports, export_pages, monitor, used, pages, traceflow)


def is_traced(config: Config, output: Output) -> bool:
    """Whether some of an output's packets go into flow traces."""
    wanted = config.traceflow.interfaces
    labels = {interface.label for interface in config.interfaces_of(output)}
    return config.traceflow.enabled and (not wanted or not labels.isdisjoint(wanted))


def plan_tap(traceflow: Traceflow, memory_bytes: int, rings: int) -> int:
    """Bytes of each ring between a merge and the flow traces."""
    share = min(TAP_MAX_BYTES, memory_bytes // TAP_SHARE) // max(1, rings)
    return max(ring_capacity(traceflow.ring_bytes or share), 2 * RECORD_MAX_BYTES)


def with_exports(plan: Plan, exports: Sequence[MeterExport]) -> Plan:
    """The same with other exports. One to the same collector keeps its page, and so its counters; a new one gets a page
    that nobody has. ConfigError: there are not enough."""
    own: list[str] = []
    before = list(zip(plan.exports, plan.export_pages, strict=True))
    for export in exports:
        kept = next((pair for pair in before if pair[0].uri == export.uri), None)
        if kept is not None:
            before.remove(kept)
        own.append(kept[1] if kept is not None else "")
    pages = [name for name, _ in plan.pages if name.startswith(page_name("export", ""))]
    free = [name for name in pages if name not in plan.export_pages]  # the meter that ends may write to the others yet
    if own.count("") > len(free):
        raise ConfigError(f"meter.export: {own.count('')} collectors are new; a reload can add {len(free)}")
    return replace(plan, exports=tuple(exports), export_pages=tuple(name or free.pop(0) for name in own))


def with_wakes(sources: Sequence[Source], config: Config) -> list[Source]:
    """The sources with what wakes their workers decided, by the interfaces and outputs of `config`: at the start, and
    again for a reload, which changes nothing but the turns. A wake costs more than what a worker does in it at most
    rates: while packets come steadily, workers wake together and more rarely. One that is alone has nobody's packets to
    wait for, and hands on its own at once."""
    block_timeouts_ms = {interface.label: interface.block_timeout_ms for interface in config.interfaces}
    are_several = sum(source.uri.scheme == "ring" for source in sources) > 1
    turn_ms = longest_turn_ms(config.outputs) if are_several else 0
    woken = []
    for source in sources:
        own_ms = block_timeouts_ms[source.interface.label]
        interface = source.interface.model_copy(update={"block_timeout_ms": own_ms or BLOCK_TIMEOUT_MS})
        turns = source.uri.scheme == "ring" and not own_ms
        woken.append(replace(source, interface=interface, turn_ms=turn_ms if turns else 0))
    return woken


def longest_turn_ms(outputs: Sequence[Output]) -> int:
    """So that no packet waits four fifths of max_wait_ms for a turn; 0: the kernel's blocks are as rare as that."""
    longest_ms = min((4 * output.max_wait_ms // 5 for output in outputs), default=0)
    turn_ms = min(TURN_MAX_MS, longest_ms - BLOCK_TIMEOUT_MS)
    return turn_ms if turn_ms > BLOCK_TIMEOUT_MS else 0


def worker_names(
    sources: Sequence[Source],
    outputs: Sequence[PlannedOutput],
    meter: Meter | None,
    monitor: bool,
    traceflow: Traceflow | None = None,
) -> tuple[str, ...]:
    """Names of the worker processes, which are those of their pages, in the order of the data."""
    names = [source.worker for source in sources] + [output.worker for output in outputs]
    names += [name for name, runs in (("meter", meter), ("traceflow", traceflow), ("monitor", monitor)) if runs]
    return tuple(names)


def plan_source(interface: Interface, index: int, label: str, share: int, metered: bool) -> Source:
    uri = interface.source
    if interface.ring_bytes:
        ring = ring_capacity(interface.ring_bytes)
    else:
        wanted = share - share // DIGEST_PARTS if metered else share
        ring = ring_capacity(wanted if uri.is_live else min(wanted, FILE_RING_BYTES))
        ring = max(ring, 2 * RECORD_MAX_BYTES)
    digest_wanted = share // DIGEST_PARTS if uri.is_live else min(share // DIGEST_PARTS, FILE_RING_BYTES)
    digest_ring = max(ring_capacity(digest_wanted), RECORD_MAX_BYTES) if metered else 0
    # Members of one interface share a group; its number must differ between the interfaces and runs of a machine.
    fanout_group = zlib.crc32(f"{os.getpid()}/{interface.label}".encode()) % 65535 + 1 if interface.fanout > 1 else 0
    return Source(label, index, interface, uri, interface.output, ring, digest_ring, fanout_group)


def counter_pages(
    sources: Sequence[Source],
    outputs: Sequence[PlannedOutput],
    meter: Meter | None,
    exports: Sequence[MeterExport],
    monitor: bool,
    traceflow: Traceflow | None = None,
) -> list[tuple[str, Sequence[str]]]:
    workers = worker_names(sources, outputs, meter, monitor, traceflow)
    pages: list[tuple[str, Sequence[str]]] = [
        ("supervisor", counters.supervisor_fields(workers)),
        ("opener", counters.OPENER_FIELDS),
    ]
    pages += [(source.worker, counters.CAPTURE_FIELDS) for source in sources]
    for output in outputs:
        pages.append((output.worker, counters.MERGE_FIELDS))
        pages += [
            (page_name("merge", output.output.name, source.label), counters.MERGE_SOURCE_FIELDS)
            for source in output.sources
        ]
    if meter:
        pages.append(("meter", counters.METER_FIELDS))
        pages += [(page_name("export", str(i)), counters.EXPORT_FIELDS) for i in range(len(exports) + MORE_EXPORTS)]
    if traceflow:
        pages.append(("traceflow", counters.TRACEFLOW_FIELDS))
    if monitor:
        pages.append(("monitor", counters.MONITOR_FIELDS))
    return pages


def default_memory_bytes(machine_bytes: int) -> int:
    return min(machine_bytes // MEMORY_SHARE, MEMORY_MAX_BYTES)


def available_memory_bytes(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """The machine's memory, or the limit of the cgroup (version 2) that this process is in, if that is lower."""
    import psutil

    limit: int = psutil.virtual_memory().total
    try:
        membership = Path("/proc/self/cgroup").read_text()
    except OSError:
        return limit
    for line in membership.splitlines():
        if not line.startswith("0::"):
            continue
        group = cgroup_root / line[3:].lstrip("/")
        for directory in (group, *group.parents):
            try:
                limit = min(limit, int((directory / "memory.max").read_text()))
            except (OSError, ValueError):
                continue
    return limit


def no_port_because(source: Source) -> str:
    """Why a source has no port capture; empty when it has."""
    if source.uri.scheme != "ring":
        return f"{source.label}: port capture needs a ring: source, {source.uri} is none"
    if source.interface.fanout > 1:
        return f"{source.label}: port capture needs all packets in one worker, and fanout is {source.interface.fanout}"
    if not source.interface.capture_buffer_bytes:
        return f"{source.label}: port capture is switched off (capture_buffer_bytes = 0)"
    return ""
