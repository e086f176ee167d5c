"""What of a new configuration is taken up while the service runs, and what waits for a restart. Pure decisions: the
supervisor and the wiring carry them out.

A key that cannot change keeps its old value and is named; the others change all the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from appliance.config import Config, Interface, Output, expand_interfaces

# The merge takes these up, from the next file on.
OUTPUT_KEYS = (
    "rotate_seconds", "rotate_bytes", "rotate_packets", "empty_segments", "max_wait_ms",
    "retain_bytes", "retain_seconds", "min_free_bytes",
    "hook", "hook_timeout_s", "close_write",
)  # fmt: skip
# Of a `ring:` source: the kernel takes a new filter on the open socket, between two packets.
INTERFACE_KEYS = ("filter",)
# The meter worker is ended and started again for these; what needs other memory, another directory or the capture
# workers is not among them.
METER_KEYS = (
    "idle_timeout_s", "active_timeout_s", "fragment_timeout_s", "vlan_in_key", "interface_in_key",
    "packet_sampling", "flow_sampling", "zero_length", "elements", "exports",
)  # fmt: skip
# The supervisor asks for these each time.
SERVICE_KEYS = ("log_level", "restart_limit", "restart_window_s")


@dataclass(frozen=True)
class Changes:
    """`config` is what is in force from now on; `interfaces` and `outputs` those of it with new values; `refused` the
    keys that keep their old ones."""

    config: Config
    interfaces: tuple[Interface, ...]
    outputs: tuple[Output, ...]
    meter: bool
    service: bool
    refused: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.interfaces or self.outputs or self.meter or self.service)


@dataclass(frozen=True)
class PresentInterface:
    """An interface that `ring:*` stood for at the start (config.HostInterface)."""

    name: str
    left_out_because: str = ""


def changes_between(old: Config, new: Config) -> Changes:
    """`old`: in force, expanded. `new`: as in its file; its `ring:*` stands for what it stood for at the start."""
    new = expand_interfaces(new, [PresentInterface(i.source.target) for i in old.interfaces if i.source.is_live])
    refused: list[str] = []
    outputs = tuple(_outputs(old, new, refused))
    interfaces = tuple(_interfaces(old, new, refused))
    keys = METER_KEYS if old.meter.enabled else ()
    meter = old.meter.model_copy(update={key: getattr(new.meter, key) for key in keys})
    refused += [f"meter.{key}" for key in differing(meter, new.meter)]
    refused += [f"monitor.{key}" for key in differing(old.monitor, new.monitor)]
    service = old.service.model_copy(update={key: getattr(new.service, key) for key in SERVICE_KEYS})
    refused += [f"service.{key}" for key in differing(service, new.service)]
    refused += ["memory_bytes"] if old.memory_bytes != new.memory_bytes else []
    return Changes(
        old.model_copy(update={"interfaces": interfaces, "outputs": outputs, "meter": meter, "service": service}),
        tuple(interface for interface in interfaces if interface not in old.interfaces),
        tuple(output for output in outputs if output not in old.outputs),
        meter != old.meter,
        service != old.service,
        tuple(refused),
    )


def _outputs(old: Config, new: Config, refused: list[str]) -> Iterator[Output]:
    """The old ones with what can change of the new ones, in the old order."""
    theirs = {output.name: output for output in new.outputs}
    for output in old.outputs:
        other = theirs.pop(output.name, None)
        if other is None:
            refused.append(f"output {output.name}, which is gone,")
            yield output
            continue
        merged = output.model_copy(update={key: getattr(other, key) for key in OUTPUT_KEYS})
        refused += [f"output {output.name}: {key}" for key in differing(merged, other)]
        yield merged
    refused += [f"output {name}, which is new," for name in theirs]


def _interfaces(old: Config, new: Config, refused: list[str]) -> Iterator[Interface]:
    theirs = {interface.label: interface for interface in new.interfaces}
    for interface in old.interfaces:
        other = theirs.pop(interface.label, None)
        if other is None:
            refused.append(f"interface {interface.label}, which is gone,")
            yield interface
            continue
        keys = INTERFACE_KEYS if interface.source.scheme == "ring" else ()
        merged = interface.model_copy(update={key: getattr(other, key) for key in keys})
        refused += [f"interface {interface.label}: {key}" for key in differing(merged, other)]
        yield merged
    refused += [f"interface {label}, which is new," for label in theirs]


def differing(one: Any, other: Any) -> list[str]:
    """The keys, as in the file, that two tables of one kind have different values for."""
    fields = type(one).model_fields.items()
    return [field.validation_alias or key for key, field in fields if getattr(one, key) != getattr(other, key)]


def settings_text(output: Output, hook: Iterable[str], filters: Mapping[str, str]) -> bytes:
    """For the merge: what it takes up. `hook`: the argv with its program's path; `filters`: new ones, by source."""
    settings = {key: getattr(output, key) for key in OUTPUT_KEYS if key != "hook"}
    return json.dumps({"output": settings, "hook": list(hook), "filters": dict(filters)}).encode()
