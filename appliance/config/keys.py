"""Every section and every key that a configuration file can have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from appliance.config.interface import Interface, RecordingKeep, RecordingTrigger
from appliance.config.meter import Meter, MeterExport
from appliance.config.output import Output
from appliance.config.service import Monitor, Service
from appliance.config.traceflow import Traceflow
from appliance.config.values import Table
from appliance.config.whole import Config

SECTIONS: dict[str, tuple[type[Table], bool]] = {  # section: (its shape, whether it can be there several times)
    "": (Config, False),
    "interface": (Interface, True),
    "interface.trigger": (RecordingTrigger, False),
    "interface.keep": (RecordingKeep, False),
    "output": (Output, True),
    "meter": (Meter, False),
    "meter.export": (MeterExport, True),
    "traceflow": (Traceflow, False),
    "monitor": (Monitor, False),
    "service": (Service, False),
}


@dataclass(frozen=True)
class Key:
    """A key of the file. `default` is as in TOML ("" for no path); None: it must be given."""

    section: str
    name: str
    default: int | bool | str | None
    help: str


def keys() -> tuple[Key, ...]:
    """Every key that a configuration file can have, in the order of the file; tables are not keys."""
    return tuple(
        Key(section, name, _toml_default(field.get_default()), field.description)
        for section, (shape, _) in SECTIONS.items()
        for name, field in shape.model_fields.items()
        if field.description
    )


def _toml_default(value: object) -> int | bool | str | None:
    if isinstance(value, int | str):
        return value
    return str(value) if isinstance(value, Path) else ("" if value is None else None)


def heading(section: str) -> str:
    if not section:
        return "the top of the file"
    return f"[[{section}]]" if SECTIONS[section][1] else f"[{section}]"
