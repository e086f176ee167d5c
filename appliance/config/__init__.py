"""The configuration: its shape, its defaults, and the one place where it is checked.

The models are plain frozen values: `load` reads them from a TOML file, other programs of the package build them
directly. Whatever is wrong is reported at once, every fault with its key; nothing here looks at the machine (which
interfaces, programs and directories exist is the plan's and the doctor's matter), so a configuration can be checked
anywhere.
"""

from __future__ import annotations

import copy
import os
import tomllib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from appliance.config.addresses import Destination, parse_address, parse_destination
from appliance.config.cross_checks import Fault
from appliance.config.every_interface import HostInterface, expand_interfaces
from appliance.config.faults import cross_faults_of, faults_of
from appliance.config.interface import (
    MAX_CAPTURE_FILTER_BYTES,
    MAX_CAPTURE_FILTERS,
    MAX_SNAPLEN,
    MIN_RING_BYTES,
    Interface,
    RecordingKeep,
    RecordingTrigger,
)
from appliance.config.keys import Key, keys
from appliance.config.meter import Meter, MeterExport
from appliance.config.output import ERF_SNAPLEN, Output
from appliance.config.service import Monitor, Service
from appliance.config.traceflow import Traceflow
from appliance.config.values import GIB, KIB, MAX_LABEL_CHARACTERS, MIB, TIB
from appliance.config.whole import Config
from appliance.errors import ConfigError, MissingInputError, MissingPermissionError

__all__ = [
    "ERF_SNAPLEN",
    "GIB",
    "KIB",
    "MAX_CAPTURE_FILTERS",
    "MAX_CAPTURE_FILTER_BYTES",
    "MAX_LABEL_CHARACTERS",
    "MAX_SNAPLEN",
    "MIB",
    "MIN_RING_BYTES",
    "TIB",
    "Config",
    "Destination",
    "Fault",
    "HostInterface",
    "Interface",
    "Key",
    "Meter",
    "MeterExport",
    "Monitor",
    "Output",
    "RecordingKeep",
    "RecordingTrigger",
    "Service",
    "Traceflow",
    "expand_interfaces",
    "keys",
    "load",
    "parse",
    "parse_address",
    "parse_destination",
]


def load(path: str | os.PathLike[str]) -> Config:
    """The configuration in a TOML file.

    MissingInputError: there is no such file. MissingPermissionError: it may not be read. ConfigError: it is wrong;
    the message lists every fault on a line of its own.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            tables = tomllib.load(file)
    except FileNotFoundError:
        raise MissingInputError(f"{name}: there is no such configuration file") from None
    except PermissionError:
        raise MissingPermissionError(f"{name}: may not be read by user {os.geteuid()}; check its mode") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: is not TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text: byte {error.start}: {error.reason}") from None
    return parse(tables, name)


def parse(tables: Mapping[str, Any], origin: str = "configuration") -> Config:
    """The configuration in tables as `tomllib` reads them. ConfigError lists every fault with its key."""
    try:
        return Config.model_validate(dict(tables), by_name=False, by_alias=True)
    except ValidationError as error:
        faults = list(faults_of(error))
        faults += _cross_faults_of_the_rest(tables, error)
    lines = "\n".join(f"  {key}: {text}" if key else f"  {text}" for key, text in faults)
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise ConfigError(f"{origin}: {count}\n{lines}")


def _cross_faults_of_the_rest(tables: Mapping[str, Any], error: ValidationError) -> list[Fault]:
    """Pydantic stops before the cross checks when a single key is wrong: look again without the wrong ones."""
    rest = copy.deepcopy(dict(tables))
    faulty = set()
    for detail in error.errors():
        if not detail["loc"]:
            return []  # the cross checks have spoken already
        _take_out(rest, detail["loc"])
        faulty.add(".".join(part for part in detail["loc"] if isinstance(part, str)))
    try:
        Config.model_validate(rest, by_name=False, by_alias=True, context={"faulty": frozenset(faulty)})
    except ValidationError as second:
        return [fault for detail in second.errors() for fault in cross_faults_of(detail)]
    return []


def _take_out(tables: dict[str, Any], location: tuple[int | str, ...]) -> None:
    *parents, last = location
    table: Any = tables
    try:
        for part in parents:
            table = table[part]
        if isinstance(last, int):
            table[last] = {"uri": "ring:*"}  # keeps the numbers of the others; checks of "uri" are off then
        elif last == "uri":
            table[last] = "file:" if "export" in parents else "ring:*"
        else:
            table.pop(last, None)
    except (KeyError, IndexError, TypeError, AttributeError):
        return  # its parent went before
