"""What a meter worker that is killed takes with it, by the counters of its successor."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from meter.flow_packets import START, Memory, Packet, digests

from appliance.counters import CAPTURE_FIELDS, EXPORT_FIELDS, METER_FIELDS, CounterPages
from appliance.meter.metering import Metering
from appliance.meter.settings import ExportSettings, MeterSettings
from appliance.ring.memory import allocate
from appliance.ring.ring import Producer, initialise
from workers.meter import MeterParts, MeterSource, MeterWorker

CAPACITY = 1 << 16
GENERATION = 7


class Pages:
    def __init__(self) -> None:
        self.all = CounterPages([("capture/a", CAPTURE_FIELDS), ("meter", METER_FIELDS), ("export/0", EXPORT_FIELDS)])
        self.meter, self.export = self.all["meter"], self.all["export/0"]

    def check(self) -> None:
        meter, export = self.meter, self.export
        assert meter["observed_packets"] == sum(
            meter[f"{what}_packets"] for what in ("metered", "ignored", "unsampled")
        )
        assert meter["metered_packets"] == sum(
            meter[name] for name in ("exported_packets", "active_flow_packets", "lost_unclean_packets")
        )
        assert meter["exported_packets"] == sum(
            export[f"{what}_packets"] for what in ("before", "sent", "not_sent", "queued", "lost_unclean")
        )


@pytest.fixture
def pages() -> Pages:
    return Pages()


def metering(pages: Pages, uri: str, directory: Path, *, taken: int = 0, **settings: Any) -> Metering:
    export = (ExportSettings(uri, directory=directory),)
    meter = MeterSettings(export=export, **settings)
    return Metering(meter, pages.meter, [pages.export], taken_digests=taken)


def feed(one: Metering, packets: list[Packet]) -> None:
    memory = Memory(digests(packets))
    one.feed(memory.address, memory.length)


def flows(count: int, time_ns: int = START) -> list[Packet]:
    return [Packet(source_port=port, octets=100, time_ns=time_ns) for port in range(1, count + 1)]


def test_flows_in_the_table_of_a_killed_meter_are_lost_with_their_packets_and_octets(
    pages: Pages, tmp_path: Path
) -> None:
    feed(metering(pages, "file:", tmp_path), flows(5) * 3)
    pages.check()
    metering(pages, "file:", tmp_path, taken=15)
    meter = pages.meter
    assert (meter["active_flows"], meter["active_flow_packets"]) == (0, 0)
    assert [meter[f"lost_unclean_{what}"] for what in ("flows", "packets", "octets")] == [5, 15, 1500]
    pages.check()


def test_a_second_death_adds_what_the_second_meter_had(pages: Pages, tmp_path: Path) -> None:
    feed(metering(pages, "file:", tmp_path), flows(5))
    feed(metering(pages, "file:", tmp_path, taken=5), flows(7))
    last = metering(pages, "file:", tmp_path, taken=12)
    assert (pages.meter["lost_unclean_flows"], pages.meter["lost_unclean_packets"]) == (12, 12)
    feed(last, flows(2))
    last.finish()
    pages.check()
    assert (pages.meter["exported_packets"], pages.meter["lost_unclean_packets"]) == (2, 12)


def test_after_an_orderly_end_nothing_is_lost(pages: Pages, tmp_path: Path) -> None:
    first = metering(pages, "file:", tmp_path)
    feed(first, flows(5))
    first.finish()
    metering(pages, "file:", tmp_path, taken=5)
    assert (pages.meter["lost_unclean_packets"], pages.export["lost_unclean_packets"]) == (0, 0)
    pages.check()


def test_records_that_waited_for_a_collector_are_lost_to_it(pages: Pages, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        uri = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        first = metering(pages, uri, tmp_path, idle_timeout_s=1)
        feed(first, flows(5))
        first.advance(START + 3_000_000_000)
        assert (pages.export["queued_packets"], pages.meter["exported_packets"]) == (5, 5)
        pages.check()
        metering(pages, uri, tmp_path, taken=5)
    assert (pages.export["queued_packets"], pages.export["lost_unclean_packets"]) == (0, 5)
    assert pages.meter["lost_unclean_packets"] == 0
    pages.check()


# ---- the worker and its rings ----


@pytest.fixture
def ring() -> Iterator[int]:
    fd = allocate(CAPACITY, "digests")
    initialise(fd, CAPACITY, GENERATION)
    yield fd
    os.close(fd)


def worker(pages: Pages, ring: int, directory: Path) -> MeterWorker:
    export = (ExportSettings("file:", directory=directory),)
    source = MeterSource("a", "capture/a", True, ring, os.eventfd(0, os.EFD_NONBLOCK))
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    parts = MeterParts(
        (source,), GENERATION, wake, MeterSettings(export=export), max_wait_ms=50, export_pages=("export/0",)
    )
    channel, _ = socket.socketpair()
    context: Any = SimpleNamespace(pages=pages.all, page=pages.meter, channel=channel, messages=list)
    return MeterWorker(context, parts)


class Source:
    """A capture worker's end of the ring: as real ones do, it commits how many digests there are with each publish."""

    def __init__(self, ring: int) -> None:
        self.producer = Producer(ring, GENERATION)
        self.published = 0

    def publish(self, count: int) -> None:
        packet = Packet()
        assert self.producer.push(digests(replace(packet, source_port=port) for port in range(count)))
        self.published += count
        self.producer.set_commit_word(0, self.published)
        self.producer.publish(packet.time_ns)


def test_a_successor_meters_what_is_still_in_the_ring_once(pages: Pages, ring: int, tmp_path: Path) -> None:
    source = Source(ring)
    source.publish(10)
    first = worker(pages, ring, tmp_path)
    assert first.turn()
    source.publish(7)
    second = worker(pages, ring, tmp_path)
    assert second.turn()
    second.metering.finish()
    meter = pages.meter
    assert (meter["observed_packets"], meter["lost_unclean_packets"], meter["exported_packets"]) == (17, 10, 7)
    pages.check()


def test_digests_that_a_meter_took_and_never_counted_are_lost_and_not_metered_again(
    pages: Pages, ring: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(ring)
    source.publish(10)
    first = worker(pages, ring, tmp_path)

    def die(address: int, length: int, *, more: bool = False) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(first.metering, "feed", die)
    with pytest.raises(KeyboardInterrupt):
        first.turn()
    assert pages.meter["observed_packets"] == 0
    second = worker(pages, ring, tmp_path)
    second.turn()
    meter = pages.meter
    assert (meter["observed_packets"], meter["metered_packets"], meter["lost_unclean_packets"]) == (10, 10, 10)
    pages.check()


def test_what_was_exported_before_a_collector_came_is_not_lost_for_it(pages: Pages, tmp_path: Path) -> None:
    first = metering(pages, "file:", tmp_path / "old")
    feed(first, [Packet()] * 5)
    first.finish()
    pages.check()
    pages.export.clear()  # as a reload leaves the page of a collector that is new
    second = metering(pages, "file:", tmp_path / "new")
    pages.check()
    feed(second, [Packet()] * 3)
    second.finish()
    assert (pages.export["before_packets"], pages.export["sent_packets"]) == (5, 3)
    pages.check()
    third = metering(pages, "file:", tmp_path / "new")  # it is known from now on
    third.finish()
    assert (pages.export["before_packets"], pages.export["lost_unclean_packets"]) == (5, 0)
