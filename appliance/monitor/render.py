"""A snapshot in words: the service's live line, systemd's STATUS, and the tables of `appliance status` and `top`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

from appliance.console import Table, duration_text, rate_text, size_text
from appliance.monitor.view import InterfaceView, Snapshot, TraceflowView

_NS = 1e9


def live_line(now: Snapshot, before: Snapshot | None = None) -> str:
    """One line of figures over all interfaces; rates since `before` when there is one."""
    received = sum(row.received_packets for row in now.interfaces)
    written = sum(row.written_packets for row in now.interfaces)
    parts = [_rates(now, before)] if before is not None else []
    parts.append(
        f"received {received:,} = written {written:,} + dropped "
        f"{sum(row.dropped_packets for row in now.interfaces):,} + in flight "
        f"{sum(row.in_flight_packets for row in now.interfaces):,}"
    )
    parts.append(f"lost {_lost(now):,}")
    files = sum(row.files_published + row.files_recovered for row in now.outputs)
    parts.append(f"{files:,} files, {size_text(sum(row.published_bytes for row in now.outputs))}")
    if now.meter is not None:
        parts.append(f"{now.meter.active_flows:,} flows, {now.meter.exported_flows:,} exported")
    if now.problems:
        parts.append("; ".join(now.problems))
    return " | ".join(parts)


def systemd_status(now: Snapshot, before: Snapshot | None = None) -> str:
    """For sd_notify's STATUS=: what `systemctl status` shows in one line."""
    lag_s = max((_lag_s(now, row.watermark_ns) for row in now.outputs if row.is_live), default=0.0)
    parts = [_rates(now, before)] if before is not None else []
    parts += [f"lost {_lost(now):,}", f"lag {lag_s:.2f} s"]
    parts.append(f"{sum(row.files_published for row in now.outputs):,} files published")
    return ", ".join(parts + now.problems)


def identity_line(row: InterfaceView) -> str:
    """The identity of one interface, with the stages and places that are not zero."""
    dropped = f"{row.dropped_packets}{_parts(row.dropped)}"
    in_flight = f"{row.in_flight_packets}{_parts(row.in_flight)}"
    line = f"{row.label}: received {row.received_packets} = written {row.written_packets}"
    line += f" + dropped {dropped} + in flight {in_flight}"
    return line + (f" + unaccounted {row.unaccounted_packets}" if row.unaccounted_packets else "")


def traceflow_line(row: TraceflowView) -> str:
    """Where the packets are that the flow traces were given; what waits at the end of the service is in no file."""
    left_out = row.left_out | {"unclean": row.lost_unclean_packets}
    waiting = {"held": row.held_packets, "queued": row.queued_packets}
    line = (
        f"flow traces: observed {row.observed_packets} = no TCP {row.other_packets} + in files {row.published_packets}"
    )
    line += f" + left out {sum(left_out.values())}{_parts(left_out)} + waiting {sum(waiting.values())}{_parts(waiting)}"
    return f"{line}; missed {row.missed_packets}"


def status_tables(now: Snapshot, before: Snapshot | None = None) -> list[Table]:
    """Everything an operator looks at, empty tables left out. With `before`, interfaces show their rates."""
    tables = [_interfaces(now, before), _outputs(now), _meter(now), _exports(now), _traceflow(now), _workers(now)]
    return [table for table in tables if table.rows]


def _interfaces(now: Snapshot, before: Snapshot | None) -> Table:
    columns = ("interface", "source", "state", "received", "written", "dropped", "in flight", "lost", "late", "ring %")
    rows = []
    marks = {}
    for i, row in enumerate(now.interfaces):
        state = ("up" if row.is_up else "down") if row.is_live else "file"
        used = 100 * row.ring_used_bytes // max(1, row.ring_capacity_bytes)
        late = row.late_packets + row.late_written_packets
        figures = (row.received_packets, row.written_packets, row.dropped_packets, row.in_flight_packets)
        cells = (row.label, row.uri, state, *figures, row.lost_packets, late, used)
        rates = _interface_rates(now, before, row.label) if before is not None else ()
        rows.append(cells + rates)
        if row.lost_packets or (row.is_live and not row.is_up):
            marks[i] = "bad"
    return Table("Interfaces", columns + (("packets", "bits") if before is not None else ()), rows, marks)


def _interface_rates(now: Snapshot, before: Snapshot | None, label: str) -> tuple[str, str]:
    return (
        _rate(now, before, lambda s: sum(r.received_packets for r in s.interfaces if r.label == label), "pkt/s"),
        _rate(now, before, lambda s: 8 * sum(r.read_bytes for r in s.interfaces if r.label == label), "b/s"),
    )


def _outputs(now: Snapshot) -> Table:
    columns = ("output", "directory", "written", "files", "bytes", "waiting", "quarantined", "errors", "open s", "free")
    rows = []
    marks = {}
    for i, row in enumerate(now.outputs):
        errors = row.write_errors + row.compressor_failures
        open_s = (now.taken_ns - row.file_opened_ns) / _NS if row.file_opened_ns else None
        files = row.files_published + row.files_recovered
        free = size_text(row.storage.free_bytes if row.storage else None)
        figures = (row.written_packets, files, row.published_bytes, row.queued_files, row.files_quarantined, errors)
        rows.append((row.name, row.directory, *figures, open_s, free))
        if errors or row.files_quarantined:
            marks[i] = "bad"
    return Table("Outputs", columns, rows, marks)


def _meter(now: Snapshot) -> Table:
    columns = ("observed", "metered", "ignored", "flows", "created", "exported", "evicted", "missed", "lost")
    if now.meter is None:
        return Table("Meter", columns, [])
    meter = now.meter
    missed = sum(row.digests_dropped for row in now.interfaces)
    evicted = meter.flows_ended["lack_of_resources"]
    figures = (meter.observed_packets, meter.metered_packets, meter.ignored_packets, meter.active_flows)
    lost = meter.lost_unclean_packets
    row = (*figures, meter.flows_created, meter.exported_flows, evicted, missed, lost)
    return Table("Meter", columns, [row], {0: "warn"} if evicted or missed or lost else {})


def _exports(now: Snapshot) -> Table:
    columns = ("collector", "state", "records", "messages", "bytes", "errors", "flows not sent")
    rows = [
        (
            row.uri,
            "up" if row.is_up else "down",
            row.records,
            row.messages,
            row.bytes,
            row.send_errors,
            row.not_sent_flows,
        )
        for row in now.exports
    ]
    marks = {i: "bad" for i, row in enumerate(now.exports) if not row.is_up or row.not_sent_flows}
    return Table("Flow collectors", columns, rows, marks)


def _traceflow(now: Snapshot) -> Table:
    columns = (
        "observed",
        "other",
        "in files",
        "held",
        "missed",
        "left out",
        "lost",
        "flows",
        "active",
        "files",
        "bytes",
    )
    row = now.traceflow
    if row is None:
        return Table("Flow traces", columns, [])
    left_out = sum(row.left_out.values())
    held = row.held_packets + row.queued_packets
    figures = (row.observed_packets, row.other_packets, row.published_packets, held, row.missed_packets, left_out)
    cells = (
        *figures,
        row.lost_unclean_packets,
        row.flows_created,
        row.active_flows,
        row.stored_files,
        row.stored_bytes,
    )
    return Table("Flow traces", columns, [cells], {0: "warn"} if row.missed_packets or left_out else {})


def _workers(now: Snapshot) -> Table:
    columns = ("process", "pid", "state", "last sign of life", "up for", "restarts", "CPU s", "memory")
    rows = []
    marks = {}
    for i, row in enumerate(now.workers):
        cpu_seconds = row.process.cpu_seconds if row.process else None
        memory = size_text(row.process.resident_bytes if row.process else None)
        seen = duration_text(row.heartbeat_age_s)
        rows.append(
            (row.name, str(row.pid), row.state, seen, duration_text(row.uptime_s), row.restarts, cpu_seconds, memory)
        )
        if not row.is_fresh and row.state != "ended":
            marks[i] = "bad"
    return Table("Processes", columns, rows, marks)


def _parts(counts: Mapping[str, int]) -> str:
    named = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    return f" ({named})" if named else ""


def _lost(now: Snapshot) -> int:
    return sum(row.lost_packets for row in now.interfaces)


def _lag_s(now: Snapshot, watermark_ns: int) -> float:
    return max(0.0, (now.taken_ns - watermark_ns) / _NS) if watermark_ns else 0.0


def _rates(now: Snapshot, before: Snapshot | None) -> str:
    packets = _rate(now, before, lambda s: sum(row.received_packets for row in s.interfaces), "pkt/s")
    return f"{packets}, {_rate(now, before, lambda s: 8 * sum(row.read_bytes for row in s.interfaces), 'b/s')}"


def _rate(now: Snapshot, before: Snapshot | None, get: Callable[[Snapshot], int], unit: str) -> str:
    elapsed_s = (now.taken_ns - before.taken_ns) / _NS if before is not None else 0.0
    if before is None or elapsed_s <= 0:  # the clock was set back
        return f"- {unit}"
    return rate_text(max(0, get(now) - get(before)) / elapsed_s, unit)


def state_lines(snapshot: Snapshot) -> Sequence[str]:
    """For USR2: everything, a line an object."""
    lines = [live_line(snapshot), *snapshot.problems]
    for group in (snapshot.interfaces, snapshot.outputs, snapshot.exports, snapshot.workers):
        lines += [json.dumps(dataclasses.asdict(entry)) for entry in group]
    return lines
