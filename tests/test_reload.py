"""What a new configuration changes while the service runs, and what waits for a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.config import Config, Interface, Meter, MeterExport, Monitor, Output, Service, expand_interfaces
from appliance.errors import ConfigError
from appliance.plan import make_plan, with_exports
from appliance.process import RELOAD
from appliance.reload import OUTPUT_KEYS, PresentInterface, changes_between, settings_text
from appliance.takeup import output_words, planned_anew, turn_words


def config(**output: Any) -> Config:
    return Config(interfaces=(Interface(uri="ring:a"),), outputs=(Output(**output),))


def with_parts(**parts: Any) -> Config:
    return Config(**{"interfaces": (Interface(uri="ring:a"),), **parts})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotate_seconds", 5),
        ("rotate_bytes", 8192),
        ("rotate_packets", 9),
        ("empty_segments", "skip"),
        ("max_wait_ms", 9),
        ("retain_bytes", 1 << 20),
        ("retain_seconds", 60),
        ("min_free_bytes", 0),
        ("hook", ("/bin/true", "-x")),
        ("hook_timeout_s", 1),
        ("close_write", True),
    ],
)
def test_what_concerns_files_to_come_changes_while_it_runs(key: str, value: object) -> None:
    changes = changes_between(config(), config(**{key: value}))
    assert changes
    assert [getattr(output, key) for output in changes.outputs] == [value]
    assert changes.config.outputs == changes.outputs
    assert changes.refused == ()
    told = json.loads(settings_text(changes.outputs[0], changes.outputs[0].hook, {}, 8))
    assert {*told["output"], "hook"} == set(OUTPUT_KEYS)
    assert (told["output"] | {"hook": tuple(told["hook"])})[key] == value
    assert told["turn_ms"] == 8


def test_the_same_configuration_changes_nothing() -> None:
    changes = changes_between(config(), config())
    assert not changes
    assert (changes.config, changes.refused) == (config(), ())


@pytest.mark.parametrize(("key", "value"), [("compressor", "none"), ("directory", Path("/x")), ("format", "pcap")])
def test_what_needs_a_restart_is_named_and_stays_while_the_rest_changes(key: str, value: object) -> None:
    old = config()
    changes = changes_between(old, config(**{key: value}, rotate_seconds=7))
    assert changes.refused == (f"output main: {key}",)
    assert getattr(changes.config.outputs[0], key) == getattr(old.outputs[0], key)
    assert changes.config.outputs[0].rotate_seconds == 7


@pytest.mark.parametrize(
    ("parts", "refused"),
    [
        ({"memory_bytes": 64 << 20}, "memory_bytes"),
        ({"meter": Meter(max_flows=64)}, "meter.max_flows"),
        ({"meter": Meter(tunnels="inner")}, "meter.tunnels"),
        ({"meter": Meter(enabled=False)}, "meter.enabled"),
        ({"monitor": Monitor(listen="127.0.0.1:1")}, "monitor.listen"),
        ({"service": Service(user="x")}, "service.user"),
        ({"interfaces": (Interface(uri="ring:a", snaplen=64),)}, "interface a: snaplen"),
        ({"interfaces": (Interface(uri="ring:a"), Interface(uri="ring:b"))}, "interface b, which is new,"),
    ],
)
def test_each_key_that_needs_a_restart_is_named(parts: dict[str, Any], refused: str) -> None:
    changes = changes_between(with_parts(), with_parts(**parts))
    assert changes.refused == (refused,)
    assert not changes
    assert changes.config == with_parts()


def test_tables_that_are_gone_stay_and_are_named() -> None:
    two = with_parts(
        interfaces=(Interface(uri="ring:a"), Interface(uri="ring:b", output="x")),
        outputs=(Output(), Output(name="x", directory=Path("/x"))),
    )
    changes = changes_between(two, with_parts())
    assert changes.refused == ("output x, which is gone,", "interface b, which is gone,")
    assert changes.config == two


def test_the_filter_of_a_ring_source_changes_and_that_of_another_source_does_not() -> None:
    filtered = (Interface(uri="ring:a", filter="udp"),)
    changes = changes_between(with_parts(), with_parts(interfaces=filtered))
    assert changes and changes.interfaces == changes.config.interfaces
    assert changes.interfaces[0].filter == "udp"
    old, new = (with_parts(interfaces=(Interface(uri="pcap:a", filter=text),)) for text in ("", "udp"))
    changes = changes_between(old, new)
    assert (bool(changes), changes.refused) == (False, ("interface a: filter",))


@pytest.mark.parametrize(
    "keys", [{"idle_timeout_s": 1}, {"active_timeout_s": 9}, {"exports": (MeterExport(uri="udp://h:1"),)}]
)
def test_the_meter_takes_up_time_outs_and_collectors_and_only_if_there_is_one(keys: dict[str, Any]) -> None:
    changes = changes_between(with_parts(), with_parts(meter=Meter(**keys)))
    assert changes.meter and changes.refused == () and changes.config.meter == Meter(**keys)
    off = with_parts(meter=Meter(enabled=False))
    assert not changes_between(off, with_parts(meter=Meter(enabled=False, **keys)))


def test_a_collector_that_stays_keeps_its_page_and_a_new_one_gets_one_that_nobody_has() -> None:
    a, b, c = (MeterExport(uri=f"udp://{name}:1") for name in "abc")
    plan = make_plan(with_parts(meter=Meter(exports=(a, b))), machine_bytes=1 << 30)
    assert plan.export_pages == ("export/0", "export/1")
    plan = with_exports(plan, (c, b.model_copy(update={"domain": 7})))
    assert plan.export_pages == ("export/2", "export/1")
    plan = with_exports(plan, (b, a, b))
    assert plan.export_pages == ("export/1", "export/0", "export/3")
    with pytest.raises(ConfigError, match="17 collectors are new; a reload can add 15"):
        with_exports(plan, [MeterExport(uri=f"udp://h:{port}") for port in range(1, 18)])


def test_the_log_level_and_the_limits_of_restarts_change() -> None:
    service = Service(log_level="debug", restart_limit=1, restart_window_s=2)
    changes = changes_between(with_parts(), with_parts(service=service))
    assert changes and changes.config.service == service


def test_who_waits_and_turns_by_max_wait_is_told_of_another_one() -> None:
    """The turn is that of all interfaces, and follows the least max_wait_ms of all outputs."""

    def waiting(x: int, y: int, rotate_seconds: int = 60) -> Config:
        outputs = (
            Output(name="x", directory=Path("/x"), max_wait_ms=x, rotate_seconds=rotate_seconds),
            Output(name="y", directory=Path("/y"), max_wait_ms=y),
        )
        interfaces = (
            Interface(uri="ring:a", output="x"),
            Interface(uri="ring:b", output="y"),
            Interface(uri="ring:c", output="y", block_timeout_ms=4),
        )
        return with_parts(interfaces=interfaces, outputs=outputs)

    def told(old: Config, new: Config) -> dict[str, Any]:
        before = make_plan(old, machine_bytes=1 << 30)
        after = planned_anew(before, new)
        words = turn_words(before, after) | output_words(before, after, changes_between(old, new))
        return {name: json.loads(word.removeprefix(RELOAD)) for name, word in words.items()}

    words = told(waiting(50, 100), waiting(24, 100))
    assert words.keys() == {"capture/a", "capture/b", "merge/x"}  # the kernel alone wakes c: y's merge has no turn
    assert (words["capture/a"], words["capture/b"]) == (11, 11)
    assert (words["merge/x"]["turn_ms"], words["merge/x"]["output"]["max_wait_ms"]) == (11, 24)
    assert told(waiting(24, 100), waiting(50, 200))["capture/a"] == 32
    assert told(waiting(24, 100), waiting(24, 200)).keys() == {"merge/y", "meter"}
    assert told(waiting(24, 100), waiting(24, 200))["meter"] == 200
    assert told(waiting(50, 100), waiting(20, 100))["capture/b"] == 0
    assert told(waiting(50, 50), waiting(50, 50, rotate_seconds=5)).keys() == {"merge/x"}
    assert told(waiting(50, 50), waiting(50, 50)) == {}


def test_every_interface_stands_for_what_it_stood_for_at_the_start() -> None:
    written = with_parts(interfaces=(Interface(uri="ring:*"), Interface(uri="ring:c")))
    running = expand_interfaces(written, [PresentInterface("a"), PresentInterface("b"), PresentInterface("c")])
    changes = changes_between(running, written)
    assert (bool(changes), changes.refused, changes.config) == (False, (), running)
