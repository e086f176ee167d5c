"""Port capture's requests: what is answered, and what a hostile client is told."""

from __future__ import annotations

import asyncio
import base64
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from appliance.capture.trigger import PortTap
from appliance.errors import ApplianceError, ConfigError, InputOutputError, UsageError
from appliance.monitor import ports
from appliance.monitor.ports import PortParts, Ports
from appliance.ring.port import allocate

GENERATION = 3
TAIL_OFFSET = 320  # of port_header.tail, ring/port.h


class Desk:
    """A port with a worker that looks for commands whenever it is woken."""

    def __init__(self, filters: tuple[str, ...] = ()) -> None:
        self.port_fd = allocate(1 << 16, GENERATION, "uplink")
        self.wake_fd = os.eventfd(0)
        self.tap = PortTap(self.port_fd, GENERATION)
        self.tap.attach(1, 1)
        parts = PortParts("uplink", "lo", self.port_fd, self.wake_fd, filters)
        self.ports = Ports(
            [parts, PortParts("slow", "", refusal="slow: port capture needs a ring: source")], GENERATION
        )
        self.ended = False
        self.worker = threading.Thread(target=self.work)
        self.worker.start()

    def work(self) -> None:
        while not self.ended:
            os.eventfd_read(self.wake_fd)
            self.tap.rest(1000)

    def ask(self, do: object, **values: object) -> Any:
        return asyncio.run(self.ports.answer({"request": "capture", "port": "uplink", "do": do, **values}))

    def end(self) -> None:
        self.ended = True
        os.eventfd_write(self.wake_fd, 1)
        self.worker.join()
        os.close(self.port_fd)
        os.close(self.wake_fd)


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk(("tcp port 80", "udp"))
    yield made
    made.end()


def test_filters_of_the_configuration_are_there_from_the_start(desk: Desk) -> None:
    assert desk.ask("get")["filters"] == {0: "tcp port 80", 1: "udp"}
    desk.ask("set", trigger=[2, 0, 2, 1])
    desk.ask("start")
    assert desk.ask("get")["state"] == "waiting"


def test_what_is_set_is_what_is_got(desk: Desk) -> None:
    desk.ask("set", trigger=[1, 2, 3, 4], keep=[3, 77, -1], pretrigger_packets=9)
    found = desk.ask("get")
    assert (found["trigger"], found["keep"], found["pretrigger_packets"]) == ([1, 2, 3, 4], [3, 77, -1], 9)
    desk.ask("set", keep=[0, 0, 0])
    assert desk.ask("get")["keep"] == [0, 0, 0]
    assert desk.ask("get")["trigger"] == [1, 2, 3, 4]


def test_captured_bytes_are_handed_over_as_they_lie_there(desk: Desk) -> None:
    desk.ask("set", trigger=[0, 0, 4, 0])
    desk.ask("start")
    desk.tap.show(b"packet", 2000)
    answer = desk.ask("read", position=0)
    assert b"packet" in base64.b64decode(answer["data"])
    assert desk.ask("read", position=answer["head"])["data"] == ""
    desk.ask("stop")
    assert desk.ask("get")["stopped_because"] == "user"


def test_a_port_that_cannot_capture_says_why(desk: Desk) -> None:
    with pytest.raises(UsageError, match="needs a ring: source"):
        asyncio.run(desk.ports.answer({"port": "slow", "do": "get"}))
    assert asyncio.run(desk.ports.answer({})) == ["uplink"]


@pytest.mark.parametrize(
    ("do", "values", "said"),
    [
        ("explode", {}, "must be one of"),
        (None, {}, "must be one of"),
        (["get"], {}, "must be one of"),
        ("set", {"trigger": [4, 0, 0, 0]}, "a trigger starts with 0 to 3"),
        ("set", {"trigger": [0, 0, 5, 0]}, "stops with 0 to 4"),
        ("set", {"trigger": [0, 16, 0, 0]}, "filters have the numbers 0 to 15"),
        ("set", {"trigger": [0, 0, 0]}, "a list of 4"),
        ("set", {"trigger": "ON"}, "a list of 4"),
        ("set", {"trigger": [True, 0, 0, 0]}, "whole number"),
        ("set", {"trigger": [0.0, 0, 0, 0]}, "whole number"),
        ("set", {"trigger": [-1, 0, 0, 0]}, "a trigger starts with"),
        ("set", {"keep": [6, 0, 0]}, "what is kept is 0 to 5"),
        ("set", {"keep": [4, 16, 0]}, "the index is"),
        ("set", {"keep": [3, -1, 0]}, "the index is"),
        ("set", {"keep": [0, 0, 262145]}, "byte_count is -1"),
        ("set", {"keep": [0, 0, -2]}, "whole number"),
        ("set", {"keep": [0, 1 << 32, 0]}, "whole number"),
        ("set", {"pretrigger_packets": 1 << 40}, "pretrigger_packets"),
        ("filter", {"index": 16, "expression": "tcp"}, "index"),
        ("filter", {"index": 0, "expression": 5}, "expression"),
        ("filter", {"index": 0, "expression": "t" * 1025}, "at most 1024 bytes"),
        ("read", {"position": -1}, "position"),
        ("read", {}, "position"),
    ],
)
def test_a_request_out_of_range_is_refused_and_changes_nothing(
    desk: Desk, do: object, values: dict[str, object], said: str
) -> None:
    before = desk.ask("get")
    with pytest.raises(UsageError, match=said):
        desk.ask(do, **values)
    assert desk.ask("get") == before


def test_an_expression_that_is_none_is_refused_before_it_gets_near_a_packet(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="tcp prot 80"):
        desk.ask("filter", index=0, expression="tcp prot 80")
    long = " or ".join(f"host ::{n:x}" for n in range(75))
    with pytest.raises(UsageError, match="at most 512 fit"):
        desk.ask("filter", index=0, expression=long)
    assert desk.ask("get")["filters"] == {0: "tcp port 80", 1: "udp"}
    desk.ask("filter", index=0, expression="")
    assert desk.ask("get")["filters"] == {1: "udp"}


def test_a_worker_that_does_not_answer_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "ANSWER_TIMEOUT_S", 0.05)
    desk.ended = True
    os.eventfd_write(desk.wake_fd, 1)
    desk.worker.join()
    with pytest.raises(InputOutputError, match="uplink: its capture worker does not answer"):
        desk.ask("start")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
names = st.sampled_from(["port", "do", "trigger", "keep", "index", "expression", "position", "pretrigger_packets"])


@given(
    message=st.dictionaries(names, values, max_size=8), do=st.sampled_from(["get", "set", "filter", "read", "streams"])
)
@settings(max_examples=200, deadline=None)
def test_nothing_that_a_client_says_is_more_than_refused(message: dict[str, Any], do: str) -> None:
    desk = SHARED.get("desk") or SHARED.setdefault("desk", Desk())
    for asked in (message, {**message, "port": "uplink", "do": do}):
        try:
            asyncio.run(desk.ports.answer(asked))
        except ApplianceError as error:
            assert str(error)


SHARED: dict[str, Desk] = {}


def teardown_module() -> None:
    for desk in SHARED.values():
        desk.end()


def test_positions_that_make_no_sense_are_an_answer_and_no_crash(desk: Desk) -> None:
    os.pwrite(desk.port_fd, (1 << 40).to_bytes(8, "little"), TAIL_OFFSET)
    with pytest.raises(InputOutputError, match="uplink: a port's positions are damaged; start the capture anew"):
        desk.ask("read", position=0)
