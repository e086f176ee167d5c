"""A new configuration while everything runs: made ready as far as anything of it can fail, then taken up at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from appliance.capture import bpf
from appliance.config import Config, Interface
from appliance.errors import ConfigError, InputOutputError
from appliance.merge.compressor import hook_argv
from appliance.meter_settings import check_flow_directories, check_meter
from appliance.monitor.topology import changes_text, program_version, topology_of
from appliance.monitor.view import Topology
from appliance.plan import Plan, Source, with_exports, with_wakes
from appliance.process import MESSAGE_BYTES, RELOAD
from appliance.reload import Changes, settings_text

if TYPE_CHECKING:
    from appliance.wiring import Wiring


@dataclass(frozen=True)
class Prepared:
    """A new configuration that was made ready, and only needs to be said and done: `words` by worker, `filters`
    (programs of struct sock_filter) by source."""

    plan: Plan
    topology: Topology
    words: Mapping[str, bytes]
    filters: Mapping[str, bytes]


def prepare_reload(wired: Wiring, changes: Changes) -> Prepared:
    """ApplianceError: something of it cannot be had. Nothing is taken up yet. No request may be with the opener."""
    config = changes.config
    plan = planned_anew(wired.plan, config)
    topology = topology_of(plan, config, program_version())
    words = turn_words(wired.plan, plan) | output_words(wired.plan, plan, changes)
    if plan.monitor and topology != wired.topology:
        words["monitor"] = RELOAD + changes_text(topology)
    for worker, message in words.items():
        if len(message) > MESSAGE_BYTES:
            raise ConfigError(f"{worker}: changes of {len(message)} bytes; {MESSAGE_BYTES} can be told at most")
    if changes.meter:
        check_meter(config)
        check_flow_directories(config)
    return Prepared(plan, topology, words, compile_filters(wired, changes.filters))


def planned_anew(old: Plan, config: Config) -> Plan:
    """The plan, with what a reload can change of it."""
    interfaces = {interface.label: interface for interface in config.interfaces}
    anew = with_wakes([with_filter(source, interfaces) for source in old.sources], config)
    sources = {source.label: source for source in anew}
    outputs = tuple(
        replace(
            planned,
            output=config.output(planned.output.name),
            sources=tuple(sources[source.label] for source in planned.sources),
        )
        for planned in old.outputs
    )
    new = replace(old, sources=tuple(sources.values()), outputs=outputs)
    return with_exports(new, config.meter.exports) if new.meter is not None else new


def turn_words(old: Plan, new: Plan) -> dict[str, bytes]:
    """For those whom other max_wait_ms concern, but no merge: capture workers that get another turn, and the meter."""
    words = {
        after.worker: RELOAD + str(after.turn_ms).encode()
        for before, after in zip(old.sources, new.sources, strict=True)
        if after.turn_ms != before.turn_ms
    }
    if new.meter is not None and new.max_wait_ms != old.max_wait_ms:
        words["meter"] = RELOAD + str(new.max_wait_ms).encode()
    return words


def output_words(old: Plan, new: Plan, changes: Changes) -> dict[str, bytes]:
    """For the merges of outputs that have changed themselves, or whose sources got other filters or turns."""
    filters = changes.filters
    words = {}
    for before, planned in zip(old.outputs, new.outputs, strict=True):
        told = [source for source in planned.sources if source.interface.label in filters]
        texts = {source.label: source.interface.filter for source in told}
        if planned.output in changes.outputs or texts or planned.turn_ms != before.turn_ms:
            hook = hook_argv(planned.output)
            words[planned.worker] = RELOAD + settings_text(planned.output, hook, texts, planned.turn_ms)
    return words


def compile_filters(wired: Wiring, filters: Mapping[str, str]) -> dict[str, bytes]:
    """`filters`: by interface. Returns the programs by source."""
    programs = {}
    for source in wired.plan.sources:
        if source.interface.label in filters:
            if wired.opener is None:
                raise InputOutputError(f"interface {source.label}: filter: only the opener process could compile it")
            request = replace(wired.open_request(source.worker), filter=filters[source.interface.label])
            programs[source.label] = wired.opener.compile(request)
    return programs


def take_up(wired: Wiring, config: Config, prepared: Prepared) -> None:
    """From now on every worker and socket that is made gets its parts of this one; those that are there get new
    filters, each between two packets."""
    for name in set(prepared.plan.export_pages) - set(wired.plan.export_pages):
        wired.pages[name].clear()
    wired.config, wired.plan, wired.topology = config, prepared.plan, prepared.topology
    for label, program in prepared.filters.items():
        bpf.attach(wired.opened[label].fd, program)


def with_filter(source: Source, interfaces: Mapping[str, Interface]) -> Source:
    label = source.interface.label
    return replace(source, interface=source.interface.model_copy(update={"filter": interfaces[label].filter}))
