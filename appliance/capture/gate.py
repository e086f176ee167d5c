"""The gate of a recording, from its configuration; and whether an interface's rules can be carried out."""

from __future__ import annotations

from appliance.capture import bpf
from appliance.capture.features import hands_up_fcs
from appliance.capture.trigger import Gate
from appliance.config import Interface
from appliance.errors import ConfigError
from appliance.ring.port import FILTER_INSTRUCTIONS

INSTRUCTION_BYTES = 8
# The numbers of the enums in appliance/ring/port.h.
START = {"on": 0, "fcserr": 1, "filter": 2, "plderr": 3}
STOP = {"fcserr": 1, "filter": 2, "plderr": 3, "userstop": 4}
KEEP = {"all": 0, "fcserr": 1, "notpld": 2, "tpld": 3, "filter": 4, "plderr": 5}


def make_gate(interface: Interface, linktype: int) -> Gate | None:
    """None: everything is recorded. ConfigError: a filter is none, or the interface cannot do what is asked."""
    if not interface.gates_recording:
        return None
    trigger, keep = interface.trigger, interface.keep
    name = interface.source.target
    fcs = hands_up_fcs(name)
    if "fcserr" in (trigger.start, trigger.stop, keep.kind) and not fcs:
        raise ConfigError(
            f"interface {interface.label}: fcserr needs the frames' check sequence, which {name} does not hand up; "
            f"a card that can does so after: ethtool -K {name} rx-fcs on rx-all on"
        )
    programs = [compiled(linktype, text) for text in (trigger.start_filter, trigger.stop_filter, keep.filter)]
    try:
        return Gate(
            linktype,
            START[trigger.start],
            programs[0],
            STOP[trigger.stop],
            programs[1],
            KEEP[keep.kind],
            programs[2],
            stream=keep.stream,
            fcs=fcs,
            repeats=trigger.repeat,
        )
    except ValueError as error:
        raise ConfigError(f"interface {interface.label}: {error}") from None


def check_rules(interface: Interface, linktype: int) -> None:
    """ConfigError: the recording's rules or a filter of port capture cannot be carried out."""
    make_gate(interface, linktype)
    for index, text in enumerate(interface.capture_filters):
        if len(compiled(linktype, text)) > FILTER_INSTRUCTIONS * INSTRUCTION_BYTES:
            raise ConfigError(
                f"interface {interface.label}: capture_filters[{index}] compiles to more than {FILTER_INSTRUCTIONS} "
                "instructions"
            )


def compiled(linktype: int, text: str) -> bytes:
    return bpf.compile_offline(linktype, text).instructions if text else b""
