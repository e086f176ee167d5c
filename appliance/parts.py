"""What each worker is given: its main function, its CPUs, and its part of what the wiring opened.

A worker inherits everything when it is forked, and closes what is not named here (process.close_descriptors).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import workers.capture
import workers.merge
from appliance.formats.encode import InterfaceDescription
from appliance.merge.compressor import compressor_argv, hook_argv
from appliance.meter.settings import InterfaceName
from appliance.meter_settings import meter_settings
from appliance.monitor.ports import PortParts
from appliance.plan import Plan, PlannedOutput, Source, no_port_because
from appliance.process import WorkerContext

if TYPE_CHECKING:
    import workers.meter
    import workers.monitor
    import workers.traceflow
    from appliance.wiring import Wiring

LINKTYPE_ETHERNET = 1


def parts_of(wired: Wiring, name: str, life: int) -> tuple[Callable[[WorkerContext], int], Any]:
    """The worker's main function and what it is given, in its `life`th life (from 1)."""
    role = name.partition("/")[0]
    if role == "capture":
        return workers.capture.main, capture_parts(wired, wired.source_of(name))
    if role == "merge":
        planned = next(planned for planned in wired.plan.outputs if planned.worker == name)
        return workers.merge.main, merge_parts(wired, planned, life > 1)
    if role == "meter":
        return workers.meter.main, meter_parts(wired)
    if role == "traceflow":
        return workers.traceflow.main, traceflow_parts(wired)
    return workers.monitor.main, monitor_parts(wired)


def cpus_of(wired: Wiring, name: str) -> tuple[int, ...]:
    """The CPUs that the configuration gives to a worker; none: any."""
    role = name.partition("/")[0]
    if role == "capture":
        return wired.source_of(name).interface.cpus
    if role == "merge":
        return wired.output_of(name).cpus
    if role == "traceflow":
        return wired.config.traceflow.cpus
    return wired.config.meter.cpus if role == "meter" else ()


def capture_parts(wired: Wiring, source: Source) -> workers.capture.CaptureParts:
    rings = wired.rings[source.label]
    return workers.capture.CaptureParts(
        interface=source.interface,
        label=source.label,
        generation=wired.generation,
        ring_fd=rings.ring_fd,
        digest_fd=rings.digest_fd,
        wake_fd=rings.wake_fd,
        merge_wake_fd=wired.merge_wakes[source.output],
        meter_wake_fd=wired.meter_wake,
        opened=wired.opened.get(source.label),
        socket_serial=wired.serials.get(source.label, 0),
        inner=wired.config.meter.tunnels == "inner",
        applications=wired.config.meter.applications,
        entropy=wired.config.meter.entropy,
        port_fd=wired.ports.get(source.label, -1),
        turn_ms=source.turn_ms,
    )


def merge_parts(wired: Wiring, planned: PlannedOutput, is_successor: bool) -> workers.merge.MergeParts:
    output = wired.config.output(planned.output.name)
    sources = tuple(
        workers.merge.MergeSource(
            label=source.label,
            page=f"{planned.worker}/{source.label}",
            live=source.uri.is_live,
            ring_fd=wired.rings[source.label].ring_fd,
            wake_fd=wired.rings[source.label].wake_fd,
            interfaces=described(wired, source, is_successor),
            traced=is_traced(wired, source),
        )
        for source in planned.sources
    )
    return workers.merge.MergeParts(
        output=output,
        sources=sources,
        generation=wired.generation,
        wake_fd=wired.merge_wakes[output.name],
        naming=wired.namings[output.name],
        compressor=compressor_argv(output.compressor),
        hook=hook_argv(output),
        is_successor=is_successor,
        count_captured_bytes=wired.options.count_captured_bytes,
        watch_file=wired.options.watch_file,
        strict=wired.options.strict,
        resolution_of_inputs=wired.options.resolution_of_inputs,
        tap_fd=wired.taps.get(output.name, -1),
        tap_wake_fd=wired.traceflow_wake,
        turn_ms=planned.turn_ms,
    )


def described(wired: Wiring, source: Source, is_successor: bool) -> tuple[InterfaceDescription, ...]:
    """What is known of a source's interfaces without its ring: a file's own records were consumed by the
    predecessor, so its successor gets what the file says at its beginning."""
    opened = wired.opened.get(source.label)
    if opened is not None:
        return (live_description(source, opened.linktype),)
    if source.uri.is_live:
        return (live_description(source, LINKTYPE_ETHERNET),)
    return tuple(wired.file_interfaces.get(source.label, ())) if is_successor else ()


def meter_parts(wired: Wiring) -> workers.meter.MeterParts:
    sources = tuple(
        workers.meter.MeterSource(
            label=source.label,
            page=source.worker,
            live=source.uri.is_live,
            ring_fd=wired.rings[source.label].digest_fd,
            wake_fd=wired.rings[source.label].wake_fd,
        )
        for source in wired.plan.sources
    )
    return workers.meter.MeterParts(
        sources=sources,
        generation=wired.generation,
        wake_fd=wired.meter_wake,
        settings=replace(meter_settings(wired.config), interfaces=interface_names(wired.plan)),
        max_wait_ms=wired.plan.max_wait_ms,
        export_pages=wired.plan.export_pages,
    )


def is_traced(wired: Wiring, source: Source) -> bool:
    wanted = wired.config.traceflow.interfaces
    return source.output in wired.taps and (not wanted or source.interface.label in wanted)


def traceflow_parts(wired: Wiring) -> workers.traceflow.TraceflowParts:
    return workers.traceflow.TraceflowParts(
        settings=wired.config.traceflow,
        directory=wired.config.traces_directory,
        ring_fds=tuple(wired.taps.values()),
        live=wired.is_live,
        generation=wired.generation,
        wake_fd=wired.traceflow_wake,
    )


def monitor_parts(wired: Wiring) -> workers.monitor.MonitorParts:
    return workers.monitor.MonitorParts(
        listener_fd=wired.listener.fileno() if wired.listener is not None else -1,
        control_fd=wired.control.fileno() if wired.control is not None else -1,
        rings=tuple((label, rings.ring_fd) for label, rings in wired.rings.items()),
        generation=wired.generation,
        ports=tuple(port_parts(wired, source) for source in wired.plan.sources),
    )


def port_parts(wired: Wiring, source: Source) -> PortParts:
    return PortParts(
        label=source.label,
        interface=source.uri.target,
        port_fd=wired.ports.get(source.label, -1),
        wake_fd=wired.rings[source.label].wake_fd,
        filters=source.interface.capture_filters,
        refusal=no_port_because(source),
    )


def live_description(source: Source, linktype: int) -> InterfaceDescription:
    import psutil

    speed = psutil.net_if_stats().get(source.uri.target)
    return InterfaceDescription(
        linktype=linktype,
        name=source.label,
        description=str(source.uri),
        speed_bps=speed.speed * 1_000_000 if speed is not None else 0,
        filter=source.interface.filter,
    )


def interface_names(plan: Plan) -> tuple[InterfaceName, ...]:
    """The meter numbers its sources in this order."""
    return tuple(InterfaceName(i, source.label, str(source.uri)) for i, source in enumerate(plan.sources))
