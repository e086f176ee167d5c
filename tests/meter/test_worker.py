"""When the meter worker rests, and when it asks to be woken."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from meter.flow_packets import Packet, digests

from appliance.counters import CAPTURE_FIELDS, METER_FIELDS, CounterPages
from appliance.meter.settings import MeterSettings
from appliance.ring.memory import allocate
from appliance.ring.ring import Producer, initialise
from workers.meter import BATCHES_PER_TURN, MeterParts, MeterSource, MeterWorker

CAPACITY = 1 << 16
GENERATION = 7
DIGEST_BYTES = 128

M = TypeVar("M", bound=MeterWorker)


class Watched(MeterWorker):
    """Notes its pauses in place of taking them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pauses: list[str] = []

    def rest(self) -> None:
        self.pauses.append("rest")

    def sleep(self, timeout_ms: int, now: float) -> None:
        self.pauses.append("sleep")


class Resting(MeterWorker):
    """Where it would wait, it does what it is told."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.meanwhile: Callable[[], None] = lambda: None

    def poller(self) -> Any:
        return SimpleNamespace(register=lambda fd, events: None, poll=lambda timeout_ms: self.meanwhile())


def worker(live: bool, kind: type[M]) -> Iterator[tuple[M, Producer]]:
    ring_fd = allocate(CAPACITY, "digests")
    initialise(ring_fd, CAPACITY, GENERATION)
    wake_fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    ours, theirs = socket.socketpair()
    pages = CounterPages([("capture/a", CAPTURE_FIELDS), ("meter", METER_FIELDS)])
    source = MeterSource("a", "capture/a", live, ring_fd, wake_fds[0])
    parts = MeterParts((source,), GENERATION, wake_fds[1], MeterSettings(), max_wait_ms=50)
    context: Any = SimpleNamespace(pages=pages, page=pages["meter"], channel=ours, messages=list)
    try:
        yield kind(context, parts), Producer(ring_fd, GENERATION, wake_fds[1])
    finally:
        for fd in (ring_fd, *wake_fds):
            os.close(fd)
        ours.close()
        theirs.close()


@pytest.fixture
def live() -> Iterator[tuple[Watched, Producer]]:
    yield from worker(True, Watched)


@pytest.fixture
def resting() -> Iterator[tuple[Resting, Producer]]:
    yield from worker(True, Resting)


@pytest.fixture
def of_a_file() -> Iterator[tuple[Watched, Producer]]:
    yield from worker(False, Watched)


@pytest.fixture
def of_small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watched, Producer]]:
    monkeypatch.setattr("workers.meter.OUT_BYTES", 10 * DIGEST_BYTES)
    yield from worker(True, Watched)


def publish(producer: Producer, count: int) -> None:
    packet = Packet()
    assert producer.push(digests(replace(packet, source_port=port) for port in range(count)))
    producer.publish(packet.time_ns)


def test_under_traffic_it_rests_and_is_not_woken_for_each_batch(live: tuple[Watched, Producer]) -> None:
    meter, producer = live
    for turns in (1, 2):
        publish(producer, 10)
        assert meter.turn()
        assert meter.pauses == ["rest"] * turns
    assert meter.metering.page["metered_packets"] == 20


def test_a_rest_ends_when_a_ring_fills_up(resting: tuple[Resting, Producer]) -> None:
    meter, producer = resting
    wake_fd = meter.parts.wake_fd
    woken: list[bool] = []

    def fill() -> None:
        for count in (10, CAPACITY // DIGEST_BYTES // 4):
            publish(producer, count)
            woken.append(bool(select.select([wake_fd], [], [], 0)[0]))

    publish(producer, 10)
    meter.meanwhile = fill
    meter.turn()
    assert woken == [False, True]
    assert not select.select([wake_fd], [], [], 0)[0]


def test_without_traffic_it_sleeps_until_it_is_woken(live: tuple[Watched, Producer]) -> None:
    meter, producer = live
    publish(producer, 10)
    meter.turn()
    meter.turn()
    assert meter.pauses == ["rest", "sleep"]


def test_a_ring_that_fills_up_allows_no_rest(live: tuple[Watched, Producer]) -> None:
    meter, producer = live
    publish(producer, CAPACITY // DIGEST_BYTES // 4 + 1)
    meter.turn()
    assert meter.pauses == ["sleep"]


def test_a_ring_that_was_filling_up_when_it_was_looked_at_allows_no_rest_when_it_is_empty(
    of_small_batches: tuple[Watched, Producer],
) -> None:
    meter, producer = of_small_batches
    publish(producer, CAPACITY // DIGEST_BYTES // 4 + 1)
    while not meter.pauses:
        meter.turn()
    publish(producer, 10)
    meter.turn()
    assert meter.pauses == ["sleep", "rest"]


def test_a_file_is_never_kept_waiting_by_a_rest(of_a_file: tuple[Watched, Producer]) -> None:
    meter, producer = of_a_file
    publish(producer, 10)
    meter.turn()
    assert meter.pauses == ["sleep"]


def test_a_turn_meters_some_batches_and_tells_what_it_metered(of_small_batches: tuple[Watched, Producer]) -> None:
    meter, producer = of_small_batches
    in_a_turn = 10 * BATCHES_PER_TURN
    publish(producer, in_a_turn + 5)
    meter.turn()
    assert (meter.metering.page["metered_packets"], meter.pauses) == (in_a_turn, [])
    meter.turn()
    assert (meter.metering.page["metered_packets"], meter.pauses) == (in_a_turn + 5, ["rest"])
