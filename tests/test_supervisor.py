"""Decisions of the supervisor that need no process: pauses, and what a reload may change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from appliance.config import Config, Interface, Output, Service
from appliance.supervisor import BACKOFF_MAX_S, backoff_s
from appliance.wiring import RELOADABLE_OUTPUT_KEYS, reload_message, reloadable_changes
from workers.merge import RELOAD


def test_the_first_new_life_begins_at_once_and_the_pauses_double_up_to_a_limit() -> None:
    assert [backoff_s(deaths) for deaths in range(1, 6)] == [0, 0.1, 0.2, 0.4, 0.8]
    assert backoff_s(100) == BACKOFF_MAX_S


def config(**output: object) -> Config:
    return Config(interfaces=(Interface(uri="ring:a"),), outputs=(Output(**output),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotate_seconds", 5),
        ("rotate_bytes", 8192),
        ("rotate_packets", 9),
        ("empty_segments", "skip"),
        ("max_wait_ms", 9),
    ],
)
def test_what_concerns_the_next_file_changes_while_it_runs(key: str, value: object) -> None:
    changes = reloadable_changes(config(), config(**{key: value}))
    assert len(changes.outputs) == 1
    assert getattr(changes.outputs[0], key) == value
    assert changes.config.outputs == changes.outputs
    assert changes.ignored == ()
    message = reload_message(changes.outputs[0])
    assert message.startswith(RELOAD)
    told = json.loads(message.removeprefix(RELOAD))
    assert set(told) == set(RELOADABLE_OUTPUT_KEYS)
    assert told[key] == value


@pytest.mark.parametrize(("key", "value"), [("compressor", "none"), ("directory", Path("/x")), ("format", "pcap")])
def test_what_needs_a_restart_is_named_and_stays_as_it_is(key: str, value: object) -> None:
    old = config()
    changes = reloadable_changes(old, config(**{key: value}, rotate_seconds=7))
    assert changes.ignored == (f"output main: {key}",)
    assert getattr(changes.config.outputs[0], key) == getattr(old.outputs[0], key)
    assert changes.config.outputs[0].rotate_seconds == 7


def test_interfaces_and_other_parts_need_a_restart() -> None:
    old = config()
    new = Config(
        interfaces=(Interface(uri="ring:a"), Interface(uri="ring:b")),
        outputs=old.outputs,
        memory_bytes=64 << 20,
        service=Service(log_level="debug"),
    )
    changes = reloadable_changes(old, new)
    assert set(changes.ignored) == {"memory_bytes", "interfaces"}
    assert changes.config.interfaces == old.interfaces
    assert changes.config.service.log_level == "debug"
    assert changes.outputs == ()
