"""What of a new configuration is taken up while the service runs, and what waits for a restart. Pure decisions: the
supervisor and the wiring carry them out.

A key that cannot change keeps its old value and is named; the others change all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from appliance.config import Config, Interface, Output, expand_interfaces

TableT = TypeVar("TableT", Interface, Output)

# The merge takes these up; those that say how a file is, from the next one on.
OUTPUT_KEYS = (
    "rotate_seconds", "rotate_bytes", "rotate_packets", "empty_segments", "max_wait_ms",
    "retain_bytes", "retain_seconds", "min_free_bytes",
    "hook", "hook_timeout_s", "close_write", "direct_io",
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

    @property
    def filters(self) -> dict[str, str]:
        """The filters of the interfaces with new values, by label."""
        return {interface.label: interface.filter for interface in self.interfaces}

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
    olds, news = ({output.name: output for output in config.outputs} for config in (old, new))
    outputs = _merged("output", olds, news, lambda _: OUTPUT_KEYS, refused)
    labelled, relabelled = ({interface.label: interface for interface in config.interfaces} for config in (old, new))
    interfaces = _merged("interface", labelled, relabelled, _interface_keys, refused)
    keys = METER_KEYS if old.meter.enabled else ()
    meter = old.meter.model_copy(update={key: getattr(new.meter, key) for key in keys})
    refused += [f"meter.{key}" for key in differing(meter, new.meter)]
    refused += [f"traceflow.{key}" for key in differing(old.traceflow, new.traceflow)]
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


def _merged(
    kind: str,
    old: Mapping[str, TableT],
    new: Mapping[str, TableT],
    keys_of: Callable[[TableT], Sequence[str]],
    refused: list[str],
) -> tuple[TableT, ...]:
    """The old tables, in their order, with what can change of the new ones of the same name."""
    merged = []
    for name, table in old.items():
        other = new.get(name)
        if other is None:
            refused.append(f"{kind} {name}, which is gone,")
        else:
            table = table.model_copy(update={key: getattr(other, key) for key in keys_of(table)})
            refused += [f"{kind} {name}: {key}" for key in differing(table, other)]
        merged.append(table)
    refused += [f"{kind} {name}, which is new," for name in new if name not in old]
    return tuple(merged)


def _interface_keys(interface: Interface) -> Sequence[str]:
    return INTERFACE_KEYS if interface.source.scheme == "ring" else ()


def differing(one: Any, other: Any) -> list[str]:
    """The keys, as in the file, that two tables of one kind have different values for."""
    fields = type(one).model_fields.items()
    return [field.validation_alias or key for key, field in fields if getattr(one, key) != getattr(other, key)]


def settings_text(output: Output, hook: Iterable[str], filters: Mapping[str, str], turn_ms: int) -> bytes:
    """For the merge: what it takes up. `hook`: the argv with its program's path; `filters`: new ones, by source;
    `turn_ms`: its capture workers' turn (Pump)."""
    settings = {key: getattr(output, key) for key in OUTPUT_KEYS if key != "hook"}
    told = {"output": settings, "hook": list(hook), "filters": dict(filters), "turn_ms": turn_ms}
    return json.dumps(told).encode()
