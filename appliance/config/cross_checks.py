"""What several keys must hold together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from appliance.config.interface import Interface, RecordingTrigger

if TYPE_CHECKING:
    from appliance.config.whole import Config


Fault = tuple[str, str]  # (key, what is wrong with it)


class CrossFaultsError(ValueError):
    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(f"{key}: {text}" for key, text in faults))
        self.faults = faults


def _repeated(values: Iterable[object]) -> Iterator[tuple[int, int]]:
    """(index, index of the first equal value) for every value that was there before."""
    first: dict[object, int] = {}
    for i, value in enumerate(values):
        if value in first:
            yield i, first[value]
        else:
            first[value] = i


def _outputs_have_their_own_name(config: Config) -> Iterator[Fault]:
    for i, j in _repeated(output.name for output in config.outputs):
        yield f"output[{i}].name", f"output[{j}] is called {config.outputs[i].name!r} too"


def _outputs_have_their_own_directory(config: Config) -> Iterator[Fault]:
    # Salvage at the start and retention take all that lies in a directory for their own.
    for i, j in _repeated(os.path.abspath(output.directory) for output in config.outputs):
        yield f"output[{i}].directory", f"output[{j}] has {str(config.outputs[i].directory)!r} too; each needs its own"


def _interfaces_have_their_own_label(config: Config) -> Iterator[Fault]:
    for i, j in _repeated(interface.label or id(interface) for interface in config.interfaces):
        yield f"interface[{i}].label", f"interface[{j}] is called {config.interfaces[i].label!r} too"


def _every_output_exists_and_is_used(config: Config) -> Iterator[Fault]:
    names = [output.name for output in config.outputs]
    for i, interface in enumerate(config.interfaces):
        if interface.output not in names:
            known = ", ".join(names)
            yield f"interface[{i}].output", f"there is no [[output]] called {interface.output!r}, only {known}"
    used = {interface.output for interface in config.interfaces}
    if not used <= set(names):
        return  # the name that is unused is likely the one that was meant
    for i, name in enumerate(names):
        if name not in used:
            yield f"output[{i}].name", f'no interface has output = "{name}"'


def _an_output_has_one_clock(config: Config) -> Iterator[Fault]:
    first: dict[str, Interface] = {}
    for i, interface in enumerate(config.interfaces):
        other = first.setdefault(interface.output, interface)
        if other.source.is_live != interface.source.is_live:
            pair = f"{interface.uri} and {other.uri}"
            yield f"interface[{i}].uri", f"{pair} need different outputs: a file's clock is not the host's"


def _a_meter_has_one_clock(config: Config) -> Iterator[Fault]:
    domains = {interface.source.is_live for interface in config.interfaces}
    if config.meter.enabled and len(domains) > 1:
        yield "meter.enabled", "files and live interfaces cannot be metered together: a file's clock is not the host's"


def _traces_have_one_clock_and_their_interfaces(config: Config) -> Iterator[Fault]:
    if not config.traceflow.enabled:
        return
    labels = [interface.label for interface in config.interfaces]
    for i, label in enumerate(config.traceflow.interfaces):
        if label not in labels and all(labels):
            yield f"traceflow.interfaces[{i}]", f"no interface is called {label!r}, only {', '.join(labels)}"
    if len({interface.source.is_live for interface in config.interfaces}) > 1:
        yield (
            "traceflow.enabled",
            "files and live interfaces cannot be traced together: a file's clock is not the host's",
        )


def _keys_fit_the_kind_of_source(config: Config) -> Iterator[Fault]:
    for i, interface in enumerate(config.interfaces):
        if interface.fanout > 1 and interface.source.scheme != "ring":
            yield f"interface[{i}].fanout", f"only ring: can have several workers, not {interface.uri}"
        if interface.speed != "full" and interface.source.is_live:
            yield f"interface[{i}].speed", f"only a file can be replayed, not {interface.uri}"
        if interface.gates_recording and interface.source.scheme != "ring":
            yield f"interface[{i}].trigger", f"only a ring: source is recorded by triggers, not {interface.uri}"
        if interface.trigger != RecordingTrigger() and interface.fanout > 1:
            yield f"interface[{i}].trigger", "a trigger needs all packets in one worker: fanout must be 1"
        if interface.source.is_every_interface and interface.label:
            yield f"interface[{i}].label", f"{interface.uri} stands for several; each is called by its own name"


def _criteria_have_their_filters(config: Config) -> Iterator[Fault]:
    for i, interface in enumerate(config.interfaces):
        for table, criterion, key in (
            ("trigger", interface.trigger.start, "start_filter"),
            ("trigger", interface.trigger.stop, "stop_filter"),
            ("keep", interface.keep.kind, "filter"),
        ):
            expression = getattr(getattr(interface, table), key)
            if (criterion == "filter") != bool(expression):
                missing = "is missing" if criterion == "filter" else f'is given, and the criterion is "{criterion}"'
                yield f"interface[{i}].{table}.{key}", missing


def _sources_can_be_taken_once(config: Config) -> Iterator[Fault]:
    sources = [interface.source for interface in config.interfaces]
    for what, matches in (
        ("every interface", [i for i, source in enumerate(sources) if source.is_every_interface]),
        ("standard input", [i for i, source in enumerate(sources) if not source.is_live and source.target == "-"]),
    ):
        for i in matches[1:]:
            yield f"interface[{i}].uri", f"interface[{matches[0]}] takes {what} already"


# The fields that a check reads come with it: while one of those is itself at fault, the check would only add noise.
CROSS_CHECKS: tuple[tuple[tuple[str, ...], Callable[[Config], Iterator[Fault]]], ...] = (
    (("output.name",), _outputs_have_their_own_name),
    (("output.directory",), _outputs_have_their_own_directory),
    (("interface.label",), _interfaces_have_their_own_label),
    (("interface.output", "output.name"), _every_output_exists_and_is_used),
    (("interface.uri", "interface.output"), _an_output_has_one_clock),
    (("interface.uri", "meter.enabled"), _a_meter_has_one_clock),
    (("interface.uri", "interface.label", "traceflow"), _traces_have_one_clock_and_their_interfaces),
    (("interface.uri", "interface.fanout", "interface.speed", "interface.label"), _keys_fit_the_kind_of_source),
    (("interface.trigger", "interface.keep"), _criteria_have_their_filters),
    (("interface.uri",), _sources_can_be_taken_once),
)
