"""What a merge puts into its tap: the output's packets in the output's order, and a count of those without room."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from merge.outputs import make_pages
from merge.rings import CAPACITY, GENERATION, Source, blocks, epoch, make_merge, packet

from appliance.counters import CounterPage
from appliance.merge import order
from appliance.merge.tap import Tap

HOUR = 3_600_000_000_000


class Bench:
    """A merge of two sources, of which `a` is tapped as Ethernet and `b` as raw IP, and the tap's ring."""

    def __init__(self, sink: int = order.SINK_PCAP_NS) -> None:
        self.sources = [Source(), Source()]
        self.ring = Source()
        self.page = make_pages(("a", "b"))["merge"]
        self.merge = make_merge(self.sources, sink=sink)
        self.tap = self.make_tap()
        self.merge.use_tap(self.tap)
        self.merge.tap_interface(0, 0, 1)
        self.merge.tap_interface(1, 0, 101)

    def make_tap(self) -> Tap:
        return Tap(self.ring.fd, GENERATION, self.ring.wake_fd, self.page)

    def run(self) -> int:
        """Everything that may go, into the output and the tap; the status."""
        status, _ = drain_plain(self.merge)
        self.tap.end()
        return status

    def tapped(self) -> list[tuple[int, int]]:
        """(link type, time) of the records in the ring; they are given back."""
        found = []
        consumer = self.ring.consumer
        while (entry := consumer.pop()) is not None:
            ((kind, _, linktype, high, low, *_),) = blocks(entry)
            found.append((linktype, high << 32 | low) if kind == 6 else (-1, 0))
        consumer.release()
        return found

    def close(self) -> None:
        for source in (*self.sources, self.ring):
            source.close()


def drain_plain(merge: order.Merge) -> tuple[int, int]:
    """As rings.drain, for outputs that are no blocks: (status, bytes)."""
    total = 0
    while True:
        status = merge.fill()
        total += merge.out_bytes
        merge.release()
        merge.emptied()
        if status != order.FULL:
            return status, total


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def counts(page: CounterPage) -> tuple[int, int]:
    return page["tapped_packets"], page["tap_dropped_packets"]


@pytest.mark.parametrize("sink", [order.SINK_PCAPNG, order.SINK_PCAP_NS, order.SINK_PCAP_US, order.SINK_ERF])
def test_packets_come_in_the_outputs_order_with_their_link_types_whatever_the_output_is(sink: int) -> None:
    bench = Bench(sink)
    bench.merge.map_interface(0, 0, 1 << 8)
    bench.merge.map_interface(1, 0, 1 << 8)
    bench.sources[0].packets_at(1, 4, 6, watermark=10)
    bench.sources[1].packets_at(2, 3, 5, watermark=10)
    bench.run()
    assert bench.tapped() == [(1, 1), (101, 2), (101, 3), (1, 4), (101, 5), (1, 6)]
    assert counts(bench.page) == (6, 0)
    assert bench.ring.consumer.mapping.occupancy() == (6, 0)
    bench.close()


def test_a_source_that_is_not_tapped_costs_nothing_there(bench: Bench) -> None:
    other = make_merge(bench.sources, sink=order.SINK_PCAP_NS)
    other.use_tap(bench.tap)
    other.tap_interface(1, 0, 101)
    bench.sources[0].packets_at(1, 3, watermark=10)
    bench.sources[1].packets_at(2, watermark=10)
    assert drain_plain(other)[1] > 0
    bench.tap.end()
    assert bench.tapped() == [(101, 2)]


def test_a_full_ring_drops_and_counts_the_newest_and_goes_on_when_there_is_room(bench: Bench) -> None:
    size = len(packet(0, bytes(1000)))
    room = CAPACITY // size
    bench.sources[1].producer.end()
    for i in range(room + 7):
        bench.sources[0].write(packet(i, bytes(1000)), watermark=i)
        assert drain_plain(bench.merge)[1] > 0, "the output gets every packet"
    bench.tap.end()
    assert counts(bench.page) == (room, 7)
    assert [time for _, time in bench.tapped()] == list(range(room))
    bench.sources[0].write(packet(999, bytes(1000)), watermark=999)
    drain_plain(bench.merge)
    bench.tap.end()
    assert counts(bench.page) == (room + 1, 7)
    assert bench.tapped() == [(1, 999)]


def test_a_successors_counts_go_on_where_the_ring_says_that_they_were(bench: Bench) -> None:
    bench.sources[0].packets_at(1, 2, watermark=10)
    bench.sources[1].packets_at(watermark=10)
    bench.run()
    bench.page["tapped_packets"] = 1  # it died between the ring and its page
    successor = bench.make_tap()
    successor.end()
    assert counts(bench.page) == (2, 0)


def test_a_step_of_the_clock_stands_before_the_packets_of_the_new_time(bench: Bench) -> None:
    for source, shift in ((bench.sources[0], 0), (bench.sources[1], 1)):
        source.write(packet(50 + shift), epoch(-HOUR), packet(10 + shift))
        source.producer.end()
    assert drain_plain(bench.merge)[0] == order.EPOCH
    bench.merge.next_epoch()
    assert drain_plain(bench.merge)[0] == order.ENDED
    bench.tap.end()
    assert bench.tapped() == [(1, 50), (101, 51), (-1, 0), (1, 10), (101, 11)]


def test_a_packet_that_claims_more_than_it_has_is_in_neither(bench: Bench) -> None:
    bench.sources[1].producer.end()
    bench.sources[0].write(packet(1, b"abcd", captured=4000), packet(2, b"abcd"), watermark=10)
    bench.run()
    assert bench.tapped() == [(1, 2)]


def test_a_merge_of_taps_gives_the_records_as_they_are() -> None:
    sources = [Source(), Source()]
    merge = order.Merge(
        [source.consumer for source in sources],
        [True, True],
        sink=order.SINK_RECORDS,
        max_wait_ms=1000,
        out_bytes=1 << 20,
    )
    sources[0].write(packet(1, b"abcd", interface=1), packet(3, interface=65535), watermark=10)
    sources[1].write(packet(2, interface=228), packet(4, b"x", captured=99), watermark=10)
    merge.fill()
    content = bytes(merge.output())
    assert [(b[2], b[4]) for b in blocks(content)] == [(1, 1), (228, 2), (65535, 3)]
    assert struct.unpack_from("=I", content, 20) == (4,)
    merge.release()
    merge.emptied()
    assert merge.source_totals(1)[:2] == (2, 1)
    for source in sources:
        source.close()


def test_the_consumer_is_woken_by_packets_once_it_sleeps(bench: Bench) -> None:
    bench.ring.consumer.sleeps(True)
    bench.sources[1].producer.end()
    bench.sources[0].packets_at(1, watermark=10)
    bench.run()
    assert os.eventfd_read(bench.ring.wake_fd) == 1
