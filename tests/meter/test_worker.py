"""When the meter worker rests, and when it asks to be woken."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from meter.flow_packets import Packet, digests
from support.lab import wait_until

from appliance.counters import CAPTURE_FIELDS, METER_FIELDS, CounterPages
from appliance.meter.settings import MeterSettings
from appliance.process import RELOAD
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
    for meter, (producer,) in worker_of("a", live=live, kind=kind):
        yield meter, producer


def worker_of(labels: str, live: bool, kind: type[M], max_wait_ms: int = 50) -> Iterator[tuple[M, list[Producer]]]:
    """Of a source for each letter."""
    ring_fds = [allocate(CAPACITY, "digests") for _ in labels]
    for fd in ring_fds:
        initialise(fd, CAPACITY, GENERATION)
    wake_fd, *wake_fds = (os.eventfd(0, os.EFD_NONBLOCK) for _ in (None, *labels))
    ours, theirs = socket.socketpair()
    pages = CounterPages([*((f"capture/{label}", CAPTURE_FIELDS) for label in labels), ("meter", METER_FIELDS)])
    rings = zip(labels, ring_fds, wake_fds, strict=True)
    sources = tuple(MeterSource(label, f"capture/{label}", live, ring, wake) for label, ring, wake in rings)
    parts = MeterParts(sources, GENERATION, wake_fd, MeterSettings(), max_wait_ms)
    context: Any = SimpleNamespace(pages=pages, page=pages["meter"], channel=ours, messages=list)
    try:
        yield kind(context, parts), [Producer(fd, GENERATION, wake_fd) for fd in ring_fds]
    finally:
        for fd in (*ring_fds, wake_fd, *wake_fds):
            os.close(fd)
        ours.close()
        theirs.close()


@pytest.fixture
def live() -> Iterator[tuple[Watched, Producer]]:
    yield from worker(True, Watched)


@pytest.fixture
def patient() -> Iterator[tuple[Watched, list[Producer]]]:
    yield from worker_of("ab", live=True, kind=Watched, max_wait_ms=60_000)


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


def test_another_max_wait_is_taken_up_while_it_waits(patient: tuple[Watched, list[Producer]]) -> None:
    meter, (talkative, silent) = patient
    packet = Packet(time_ns=time.time_ns())
    silent.publish(packet.time_ns - 1)
    assert talkative.push(digests([packet]))
    talkative.publish(packet.time_ns)
    meter.turn()
    meter.turn()
    assert meter.metering.page["metered_packets"] == 0
    meter.context.messages = lambda: [RELOAD + b"1"]  # type: ignore[method-assign]
    wait_until(lambda: meter.turn() and meter.metering.page["metered_packets"] == 1, "it waits no longer")


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
