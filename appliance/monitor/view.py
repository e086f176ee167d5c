"""Counter pages in, one picture of the whole appliance out.

Everything that shows figures (metrics, status page, control socket, `appliance status` and `top`, the service's live
line, systemd's STATUS) shows this picture, so no two of them can disagree. Nothing here asks a worker: a snapshot costs
some reads of shared memory, and is there when the worker is not.

The identity per interface, every term of which some worker counted, none derived from the others:

    received = written + dropped (by stage) + in flight (by place)

It is exact while traffic rests. While it runs, two pages are read a moment apart and a batch is counted in one slot
before the other: `unaccounted_packets` is that difference, and a lasting one is a bug that the snapshot does not hide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from appliance.counters import (
    APPLICATIONS,
    EXPORT_DELAY_BUCKETS_MS,
    IGNORED_REASONS,
    PUBLISH_BUCKETS_MS,
    STATES,
    TRACE_END_REASONS,
    CounterPages,
    page_name,
    restarts_field,
)

Rows = TypeVar("Rows")  # one of the views below

# Where a packet can end without being written, in the order of its journey. The first three are as asked for (other
# interfaces' packets, the user's filter, the recording's triggers and keep rules); the others are losses.
STAGES = ("foreign", "filter", "gate", "kernel", "ring", "merge", "writer", "unclean")
LOSS_STAGES = STAGES[3:]
# Where a packet can be on its way, in the same order.
PLACES = ("kernel", "reorder", "ring", "merge")
FLOW_END_REASONS = ("idle_timeout", "active_timeout", "end_of_flow", "forced_end", "lack_of_resources")  # RFC 5102

_STUCK_INTERVALS = 2  # a file that is open for so many rotation intervals will not be closed by itself
_STUCK_GRACE_S = 10.0
_NS = 1_000_000_000


# What does not change while the service runs --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """One capture worker's source, and the ring between it and its output's merge."""

    label: str
    uri: str
    interface: str  # the host's name for it; "" for files
    output: str
    ring_capacity_bytes: int

    @property
    def is_live(self) -> bool:
        return bool(self.interface)


@dataclass(frozen=True, slots=True)
class OutputInfo:
    name: str
    directory: str
    format: str
    max_wait_ms: int
    rotate_seconds: int


@dataclass(frozen=True, slots=True)
class ExportInfo:
    uri: str
    page: str = "export/0"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A process with a counter page: its role ("capture") and the name of its page ("capture/uplink")."""

    role: str
    name: str


@dataclass(frozen=True, slots=True)
class Topology:
    """What runs, as planned. Pages are found by these names (see counters.page_name)."""

    version: str
    sources: tuple[SourceInfo, ...]
    outputs: tuple[OutputInfo, ...]
    exports: tuple[ExportInfo, ...]
    workers: tuple[WorkerInfo, ...]
    heartbeat_timeout_s: float = 5.0


# What is not on a page ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    cpu_seconds: float
    resident_bytes: int
    open_descriptors: int | None  # None: hidden by the kernel


@dataclass(frozen=True, slots=True)
class StorageFigures:
    free_bytes: int
    size_bytes: int
    oldest_file_s: float | None  # since 1970; None when there is no file


@dataclass(frozen=True, slots=True)
class HostFigures:
    """What psutil and the file systems say, by process id, host interface and output. Empty where nobody asked."""

    processes: Mapping[int, ProcessFigures] = field(default_factory=dict)
    nic_dropped_packets: Mapping[str, int] = field(default_factory=dict)
    storage: Mapping[str, StorageFigures] = field(default_factory=dict)


# The picture ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InterfaceView:
    """One source. `dropped` has all STAGES, `in_flight` all PLACES; sums stand beside them."""

    label: str
    uri: str
    interface: str
    output: str
    is_live: bool
    is_up: bool
    received_packets: int
    written_packets: int
    ever_written_packets: int  # both only grow; written = ever written - taken back
    taken_back_packets: int
    dropped: dict[str, int]
    dropped_packets: int
    lost_packets: int
    in_flight: dict[str, int]
    in_flight_packets: int
    unaccounted_packets: int
    read_packets: int  # taken out of the kernel's ring or the file
    published_packets: int  # put into our ring
    consumed_packets: int  # taken out of our ring by the merge
    read_bytes: int
    written_bytes: int
    ring_used_bytes: int
    ring_capacity_bytes: int
    reordered_packets: int
    late_packets: int
    late_written_packets: int
    truncated_packets: int
    kernel_freezes: int
    clock_steps: int
    reopened: int
    input_errors: int
    digests_published: int
    digests_dropped: int
    ignored: dict[str, int]
    ignored_octets: int
    last_packet_ns: int
    nic_dropped_packets: int | None


@dataclass(frozen=True, slots=True)
class OutputView:
    name: str
    directory: str
    format: str
    is_live: bool
    max_wait_ms: int
    rotate_seconds: int
    merged_packets: int
    written_packets: int
    written_bytes: int
    direct_bytes: int
    open_packets: int
    published_packets: int
    quarantined_packets: int
    recovered_packets: int
    published_bytes: int
    late_packets: int
    late_max_ns: int
    forced_packets: int
    clock_steps: int
    watermark_ns: int
    last_packet_ns: int
    files_opened: int
    files_published: int
    files_quarantined: int
    files_recovered: int
    files_skipped: int
    files_expired: int
    expired_bytes: int
    queued_files: int
    write_errors: int
    compressor_failures: int
    hook_failures: int
    file_opened_ns: int
    last_published_ns: int
    publish_ns: int
    publish_counts: dict[str, int]  # by upper bound in seconds, "+Inf" last; not cumulative
    storage: StorageFigures | None


@dataclass(frozen=True, slots=True)
class MeterView:
    observed_packets: int
    metered_packets: int
    metered_octets: int
    ignored_packets: int
    unsampled_packets: int
    late_packets: int
    active_flows: int
    active_flow_packets: int
    peak_flows: int
    table_bytes: int
    flows_created: int
    flows_ended: dict[str, int]
    exported_flows: int
    exported_packets: int
    exported_octets: int
    lost_unclean_flows: int
    lost_unclean_packets: int
    lost_unclean_octets: int
    stream_time_ns: int
    flows_evicted: dict[str, int]  # for lack of resources, by what they were
    tcp_segments: dict[str, int]  # by what TCP analysis took them for
    applications: dict[str, int]  # flows, by what their payload says
    partial_names: int
    dropped_names: int
    export_delay_ns: int
    export_delay_counts: dict[str, int]  # by upper bound in seconds, "+Inf" last; not cumulative
    fragments_keyed: int
    fragments_unmatched: int
    fragments_overlapping: int
    fragment_evictions: int


@dataclass(frozen=True, slots=True)
class TraceflowView:
    """Flow traces, in packets: tapped = observed at rest, and observed = other + published + left out + lost + held +
    queued. `left_out`: cut (max_flow_bytes), refused (no room), failed (not written)."""

    tapped_packets: int
    missed_packets: int  # their ring was full
    observed_packets: int
    other_packets: int  # no TCP
    published_packets: int
    left_out: dict[str, int]
    lost_unclean_packets: int
    held_packets: int  # of flows that are not over
    queued_packets: int  # of flows that are, and are not published yet
    late_packets: int
    active_flows: int
    flows_created: int
    flows_ended: dict[str, int]
    queued_flows: int
    published_files: int
    published_bytes: int
    stored_files: int
    stored_bytes: int
    staged_bytes: int
    buffered_bytes: int
    expired_files: int
    expired_bytes: int
    leftover_files: int
    write_errors: int
    stream_time_ns: int


@dataclass(frozen=True, slots=True)
class ExportView:
    uri: str
    is_up: bool
    records: int
    flow_records: int
    messages: int
    bytes: int
    sent_packets: int
    send_errors: int
    tls_failures: int
    connects: int
    not_sent_flows: int
    not_sent_packets: int
    not_sent_octets: int
    queued_bytes: int
    queued_packets: int
    lost_unclean_packets: int
    before_packets: int


@dataclass(frozen=True, slots=True)
class WorkerView:
    role: str
    name: str
    pid: int
    state: str
    is_fresh: bool
    heartbeat_age_s: float | None  # None: it has not begun yet
    uptime_s: float | None
    restarts: int
    process: ProcessFigures | None


@dataclass(frozen=True, slots=True)
class ServiceView:
    version: str
    uptime_s: float
    restarts: int
    planned_restarts: int
    reloads: int
    reload_failures: int
    last_reload_ok: bool
    scrapes: int
    control_requests: int
    rejected_connections: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All figures of one moment. `problems` is empty when all is well; each is a sentence that names its object."""

    taken_ns: int  # CLOCK_REALTIME
    service: ServiceView
    interfaces: list[InterfaceView]
    outputs: list[OutputView]
    meter: MeterView | None
    exports: list[ExportView]
    workers: list[WorkerView]
    problems: list[str]
    traceflow: TraceflowView | None = None

    def as_json(self) -> dict[str, Any]:
        """For json.dumps; `from_json` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(value: object) -> Snapshot:
        """A snapshot that another process made with `as_json`. ValueError: it is not one."""
        from pydantic import TypeAdapter

        return TypeAdapter(Snapshot).validate_python(value)


class View:
    """Takes snapshots of one service's pages. `ring_usage` gives the bytes used of each source's ring, by label."""

    def __init__(
        self,
        pages: CounterPages,
        topology: Topology,
        *,
        ring_usage: Callable[[], Mapping[str, int]] = dict,
        host: Callable[[], HostFigures] = HostFigures,
    ) -> None:
        self._pages = pages
        self.topology = topology
        self._ring_usage = ring_usage
        self._host = host

    def snapshot(self) -> Snapshot:
        return take_snapshot(
            self._pages,
            self.topology,
            ring_used_bytes=self._ring_usage(),
            host=self._host(),
            monotonic_ns=time.monotonic_ns(),
            realtime_ns=time.time_ns(),
        )


def take_snapshot(
    pages: CounterPages,
    topology: Topology,
    *,
    ring_used_bytes: Mapping[str, int],
    host: HostFigures,
    monotonic_ns: int,
    realtime_ns: int,
) -> Snapshot:
    """The picture of this moment; a function of its arguments alone."""
    interfaces = [_interface(pages, source, ring_used_bytes, host) for source in topology.sources]
    outputs = [_output(pages, output, topology.sources, host) for output in topology.outputs]
    workers = [_worker(pages, worker, topology, host, monotonic_ns) for worker in topology.workers]
    return Snapshot(
        taken_ns=realtime_ns,
        service=_service(pages, topology, monotonic_ns),
        interfaces=interfaces,
        outputs=outputs,
        meter=_meter(pages),
        exports=[_export(pages, export) for export in topology.exports],
        workers=workers,
        problems=_problems(workers, outputs, topology, realtime_ns),
        traceflow=_traceflow(pages, topology),
    )


def _read(pages: CounterPages, name: str) -> dict[str, int]:
    """A page's fields; a page that does not exist (a role that is switched off) has none."""
    return pages[name].snapshot() if name in pages else {}


def _interface(
    pages: CounterPages, source: SourceInfo, ring_used_bytes: Mapping[str, int], host: HostFigures
) -> InterfaceView:
    # Against the stream: whatever arrives between the two reads makes `unaccounted` positive, never the ring negative.
    merge = pages[page_name("merge", source.output, source.label)].snapshot()
    capture = pages[page_name("capture", source.label)].snapshot()
    dropped = {
        "foreign": capture["foreign_packets"],
        "filter": capture["dropped_filter_packets"],
        "gate": capture["gated_packets"],
        "kernel": capture["dropped_kernel_packets"],
        "ring": capture["dropped_ring_packets"],
        "merge": merge["dropped_merge_packets"],
        "writer": merge["dropped_writer_packets"],
        "unclean": merge["lost_unclean_packets"],
    }
    in_flight = {
        "kernel": capture["kernel_queued_packets"],
        "reorder": capture["unpublished_packets"],
        "ring": max(0, capture["published_packets"] - merge["consumed_packets"]),
        "merge": merge["held_packets"],
    }
    received, written = capture["received_packets"], merge["written_packets"]
    return InterfaceView(
        label=source.label,
        uri=source.uri,
        interface=source.interface,
        output=source.output,
        is_live=source.is_live,
        is_up=bool(capture["interface_up"]),
        received_packets=received,
        written_packets=written,
        ever_written_packets=merge["ever_written_packets"],
        taken_back_packets=merge["taken_back_packets"],
        dropped=dropped,
        dropped_packets=sum(dropped.values()),
        lost_packets=sum(dropped[stage] for stage in LOSS_STAGES),
        in_flight=in_flight,
        in_flight_packets=sum(in_flight.values()),
        unaccounted_packets=received - written - sum(dropped.values()) - sum(in_flight.values()),
        read_packets=capture["read_packets"],
        published_packets=capture["published_packets"],
        consumed_packets=merge["consumed_packets"],
        read_bytes=capture["read_bytes"],
        written_bytes=merge["written_bytes"],
        ring_used_bytes=ring_used_bytes.get(source.label, 0),
        ring_capacity_bytes=source.ring_capacity_bytes,
        reordered_packets=capture["reordered_packets"],
        late_packets=capture["late_packets"],
        late_written_packets=merge["late_packets"],
        truncated_packets=capture["truncated_packets"],
        kernel_freezes=capture["kernel_freezes"],
        clock_steps=capture["clock_steps"],
        reopened=capture["reopened"],
        input_errors=capture["input_errors"],
        digests_published=capture["digests_published"],
        digests_dropped=capture["digests_dropped"],
        ignored={reason: capture[f"ignored_{reason}_packets"] for reason in IGNORED_REASONS},
        ignored_octets=capture["ignored_octets"],
        last_packet_ns=capture["last_packet_ns"],
        nic_dropped_packets=host.nic_dropped_packets.get(source.interface) if source.is_live else None,
    )


def _of_page(kind: type[Rows], page: Mapping[str, int], **others: object) -> Rows:
    """A view whose fields are those of the page that have its names, and `others`. TypeError: one is missing."""
    wanted = {field.name for field in fields(kind)} - others.keys()  # type: ignore[arg-type]
    return kind(**{name: page[name] for name in wanted & page.keys()}, **others)


def _output(pages: CounterPages, output: OutputInfo, sources: tuple[SourceInfo, ...], host: HostFigures) -> OutputView:
    page = pages[page_name("merge", output.name)].snapshot()
    publish_counts = {str(bound_ms / 1000): page[f"publish_{bound_ms}_ms"] for bound_ms in PUBLISH_BUCKETS_MS}
    return _of_page(
        OutputView,
        page,
        name=output.name,
        directory=output.directory,
        format=output.format,
        is_live=any(source.is_live for source in sources if source.output == output.name),
        max_wait_ms=output.max_wait_ms,
        rotate_seconds=output.rotate_seconds,
        files_opened=page["segments_opened"],
        files_published=page["segments_published"],
        files_quarantined=page["segments_quarantined"],
        files_recovered=page["segments_recovered"],
        files_skipped=page["segments_skipped"],
        files_expired=page["expired_files"],
        queued_files=page["queued_segments"],
        file_opened_ns=page["segment_opened_ns"],
        publish_counts=publish_counts | {"+Inf": page["publish_slower"]},
        storage=host.storage.get(output.name),
    )


def _meter(pages: CounterPages) -> MeterView | None:
    page = _read(pages, page_name("meter"))
    if not page:
        return None
    return _of_page(
        MeterView,
        page,
        flows_ended={reason: page[f"flows_{reason}"] for reason in FLOW_END_REASONS},
        flows_evicted={kind: page[f"evicted_{kind}_flows"] for kind in ("single_packet", "half_open", "other")},
        tcp_segments={
            "retransmission": page["tcp_retransmitted_packets"],
            "out_of_order": page["tcp_out_of_order_packets"],
            "lost_segment": page["tcp_lost_segments"],
            "duplicate_ack": page["tcp_duplicate_acks"],
            "zero_window": page["tcp_zero_windows"],
        },
        applications={name: page[f"flows_{name}"] for name in APPLICATIONS},
        export_delay_counts={
            str(bound_ms / 1000): page[f"export_delay_{bound_ms}_ms"] for bound_ms in EXPORT_DELAY_BUCKETS_MS
        }
        | {"+Inf": page["export_delay_longer"]},
    )


def _traceflow(pages: CounterPages, topology: Topology) -> TraceflowView | None:
    page = _read(pages, page_name("traceflow"))
    if not page:
        return None
    merges = [pages[page_name("merge", output.name)].snapshot() for output in topology.outputs]
    fields = TraceflowView.__dataclass_fields__
    return TraceflowView(
        tapped_packets=sum(merge["tapped_packets"] for merge in merges),
        missed_packets=sum(merge["tap_dropped_packets"] for merge in merges),
        left_out={
            "cut": page["cut_packets"],
            "refused": page["refused_packets"],
            "failed": page["failed_packets"] + page["unpublished_packets"],
        },
        flows_ended={reason: page[f"flows_{reason}"] for reason in TRACE_END_REASONS},
        **{name: value for name, value in page.items() if name in fields},
    )


def _export(pages: CounterPages, export: ExportInfo) -> ExportView:
    page = pages[export.page].snapshot()
    return _of_page(
        ExportView,
        page,
        uri=export.uri,
        is_up=bool(page["up"]),
    )


def _worker(
    pages: CounterPages, worker: WorkerInfo, topology: Topology, host: HostFigures, monotonic_ns: int
) -> WorkerView:
    page = pages[worker.name].snapshot()
    supervisor = _read(pages, page_name("supervisor"))
    age_s = _age_s(page["heartbeat_ns"], monotonic_ns)
    return WorkerView(
        role=worker.role,
        name=worker.name,
        pid=page["pid"],
        state=STATES[page["state"]] if page["state"] < len(STATES) else "unknown",
        is_fresh=age_s is not None and age_s <= topology.heartbeat_timeout_s,
        heartbeat_age_s=age_s,
        uptime_s=_age_s(page["started_ns"], monotonic_ns),
        restarts=supervisor.get(restarts_field(worker.name), 0),
        process=host.processes.get(page["pid"]),
    )


def _service(pages: CounterPages, topology: Topology, monotonic_ns: int) -> ServiceView:
    supervisor = _read(pages, page_name("supervisor"))
    monitor = _read(pages, page_name("monitor"))
    return ServiceView(
        version=topology.version,
        uptime_s=_age_s(supervisor.get("started_ns", 0), monotonic_ns) or 0.0,
        restarts=supervisor.get("restarts", 0),
        planned_restarts=supervisor.get("planned_restarts", 0),
        reloads=supervisor.get("reloads", 0),
        reload_failures=supervisor.get("reload_failures", 0),
        # Before the first reload it is the start that counts, and that succeeded.
        last_reload_ok=bool(supervisor.get("last_reload_ok", 0))
        or not (supervisor.get("reloads", 0) or supervisor.get("reload_failures", 0)),
        scrapes=monitor.get("scrapes", 0),
        control_requests=monitor.get("control_requests", 0),
        rejected_connections=monitor.get("rejected_connections", 0),
    )


def _age_s(then_ns: int, now_ns: int) -> float | None:
    """None when it never was. The writer may be a moment ahead of the reader."""
    return max(0, now_ns - then_ns) / _NS if then_ns else None


def _problems(workers: list[WorkerView], outputs: list[OutputView], topology: Topology, realtime_ns: int) -> list[str]:
    problems = []
    for worker in workers:
        # A worker that has read its file to the end is done, not dead.
        if worker.state != "ended" and not worker.is_fresh:
            problems.append(
                f"worker {worker.name} has not started yet"
                if worker.heartbeat_age_s is None
                else f"worker {worker.name} gave its last sign of life {worker.heartbeat_age_s:.0f} s ago, "
                f"{topology.heartbeat_timeout_s:g} s are allowed"
            )
    for output in outputs:
        limit_s = _STUCK_INTERVALS * output.rotate_seconds + output.max_wait_ms / 1000 + _STUCK_GRACE_S
        open_s = _age_s(output.file_opened_ns, realtime_ns) or 0.0
        if output.rotate_seconds and open_s > limit_s:
            problems.append(
                f"output {output.name}: its file is open for {open_s:.0f} s, and should be closed every "
                f"{output.rotate_seconds} s"
            )
        waited_s = _age_s(output.last_published_ns, realtime_ns) or 0.0
        if output.rotate_seconds and output.queued_files and waited_s > limit_s:
            problems.append(
                f"output {output.name}: {output.queued_files} closed files wait, and the last one was published "
                f"{waited_s:.0f} s ago"
            )
    return problems
