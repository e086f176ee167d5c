"""The whole file: the sections together, labels for interfaces that have none, and the cross checks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator, model_validator

from appliance.capture import uri as capture_uri
from appliance.config.cross_checks import CROSS_CHECKS, CrossFaultsError
from appliance.config.interface import Interface
from appliance.config.meter import Meter
from appliance.config.output import Output
from appliance.config.service import Monitor, Service
from appliance.config.values import MAX_LABEL_CHARACTERS, MIB, TIB, Table, at_least_one, zero_or_between

_FILE_ENDINGS = re.compile(r"(\.(gz|lz4|zst|xz|bz2|pcap|pcapng|cap|ntar|dmp|erf))+$", re.IGNORECASE)


class Config(Table):
    """The whole configuration. Inside it every interface but ring:* has a label, and the cross checks below hold."""

    memory_bytes: Annotated[int, zero_or_between(8 * MIB, TIB)] = Field(
        default=0, description="all rings together; 0 = an eighth of the machine or cgroup, at most 1 GiB"
    )
    interfaces: Annotated[tuple[Interface, ...], at_least_one("[[interface]]")] = Field(
        validation_alias="interface", strict=False
    )
    outputs: Annotated[tuple[Output, ...], at_least_one("[[output]]")] = Field(
        default=(Output(),), validation_alias="output", strict=False
    )
    meter: Meter = Meter()
    monitor: Monitor = Monitor()
    service: Service = Service()

    @field_validator("interfaces")
    @classmethod
    def _label_interfaces(cls, interfaces: tuple[Interface, ...]) -> tuple[Interface, ...]:
        """Labels that were not given are made from the URIs, and differ from all others; ring:* has none."""
        taken = {interface.label for interface in interfaces if interface.label}
        labelled = []
        for interface in interfaces:
            if not interface.label and not interface.source.is_every_interface:
                label = _free_label(_derived_label(interface.source), taken)
                taken.add(label)
                interface = interface.model_copy(update={"label": label})
            labelled.append(interface)
        return tuple(labelled)

    @model_validator(mode="after")
    def _cross_check(self, info: ValidationInfo) -> Config:
        already_faulty: frozenset[str] = (info.context or {}).get("faulty", frozenset())
        faults = [
            fault
            for fields, check in CROSS_CHECKS
            if not any(field == bad or field.startswith(f"{bad}.") for field in fields for bad in already_faulty)
            for fault in check(self)
        ]
        if faults:
            raise CrossFaultsError(faults)
        return self

    def output(self, name: str) -> Output:
        return next(output for output in self.outputs if output.name == name)

    def output_of(self, interface: Interface) -> Output:
        return self.output(interface.output)

    def interfaces_of(self, output: Output) -> tuple[Interface, ...]:
        return tuple(interface for interface in self.interfaces if interface.output == output.name)

    @property
    def flows_directory(self) -> Path:
        """Where `file:` without a directory puts its flow files."""
        return (self.meter.directory or self.outputs[0].directory) / "flows"


def _derived_label(source: capture_uri.Uri) -> str:
    if source.target == "-":
        return "stdin"
    text = source.target if source.is_live else _FILE_ENDINGS.sub("", os.path.basename(source.target))
    text = re.sub(r"[^A-Za-z0-9_.\-]", "_", text)[:MAX_LABEL_CHARACTERS].lstrip(".-")
    return text or "file"


def _free_label(label: str, taken: set[str]) -> str:
    candidate, number = label, 2
    while candidate in taken:
        suffix = f"-{number}"
        candidate, number = label[: MAX_LABEL_CHARACTERS - len(suffix)] + suffix, number + 1
    return candidate
