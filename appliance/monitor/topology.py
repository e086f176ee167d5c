"""From the plan to what the monitor shows."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from appliance.monitor.view import ExportInfo, OutputInfo, SourceInfo, Topology, WorkerInfo

if TYPE_CHECKING:
    from appliance.config import Config
    from appliance.plan import Plan


def changes_text(topology: Topology) -> bytes:
    """For the monitor: the parts that a reload can change."""
    parts = {
        "outputs": [asdict(output) for output in topology.outputs],
        "exports": [asdict(export) for export in topology.exports],
    }
    return json.dumps(parts).encode()


def changed(topology: Topology, text: bytes) -> Topology:
    """With what `changes_text` said of a newer one."""
    parts = json.loads(text)
    return replace(
        topology,
        outputs=tuple(OutputInfo(**part) for part in parts["outputs"]),
        exports=tuple(ExportInfo(**part) for part in parts["exports"]),
    )


def topology_of(plan: Plan, config: Config, version: str) -> Topology:
    """The static half of every snapshot."""
    sources = tuple(
        SourceInfo(
            label=source.label,
            uri=str(source.uri),
            interface=source.uri.target if source.uri.is_live else "",
            output=source.output,
            ring_capacity_bytes=source.ring_bytes,
        )
        for source in plan.sources
    )
    outputs = tuple(
        OutputInfo(
            name=planned.output.name,
            directory=str(planned.output.directory),
            format=planned.output.format,
            max_wait_ms=planned.output.max_wait_ms,
            rotate_seconds=planned.output.rotate_seconds,
        )
        for planned in plan.outputs
    )
    return Topology(
        version=version,
        sources=sources,
        outputs=outputs,
        exports=tuple(
            ExportInfo(export.uri, page) for export, page in zip(plan.exports, plan.export_pages, strict=True)
        ),
        workers=tuple(WorkerInfo(name.partition("/")[0], name) for name in plan.workers),
        heartbeat_timeout_s=config.service.heartbeat_timeout_s,
    )


def program_version() -> str:
    try:
        return version("capture-appliance")
    except PackageNotFoundError:  # run from a source tree
        return "0"
