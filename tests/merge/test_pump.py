"""The compiled loop of the merge worker: what it writes, what it counts, and when it hands over to Python."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest
from merge.outputs import make_pages
from merge.rings import Source, make_merge

from appliance.counters import CounterPage
from appliance.merge import order
from appliance.merge.books import Books
from appliance.merge.pump import Pump
from appliance.merge.rotation import NEVER

LONG_MS = 60_000


class Bench:
    """A pump over rings in the test's hand, with `fd` to write to."""

    def __init__(self, labels: tuple[str, ...] = ("a", "b")) -> None:
        self.sources = [Source(1 << 20) for _ in labels]
        self.merge = make_merge(self.sources, max_wait_ms=LONG_MS)
        self.merge.begin_segment(NEVER, NEVER, NEVER)
        self.pages = make_pages(labels)
        self.page = self.pages["merge"]
        self.source_pages = [self.pages[label] for label in labels]
        self.books = Books(self.merge, self.page, self.source_pages)
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.channel, self.supervisor = socket.socketpair()
        self.pump = Pump(
            self.merge,
            self.books,
            live=True,
            wake_fd=self.wake_fd,
            channel_fd=self.channel.fileno(),
            max_wait_ms=LONG_MS,
        )

    def close(self) -> None:
        for source in self.sources:
            source.close()
        os.close(self.wake_fd)
        self.channel.close()
        self.supervisor.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def counts(page: CounterPage, *names: str) -> tuple[int, ...]:
    return tuple(page[f"{name}_packets"] for name in names)


def test_what_may_go_is_written_counted_and_told_to_the_segment(bench: Bench) -> None:
    bench.sources[0].packets_at(10, 30, watermark=100)
    bench.sources[1].packets_at(20, watermark=100)
    read_end, write_end = os.pipe()
    assert bench.pump.serve(write_end, 1) == order.IDLE
    data = os.read(read_end, 1 << 16)
    assert len(data) == 3 * 40
    assert [counts(page, "consumed", "written", "held") for page in bench.source_pages] == [(2, 2, 0), (1, 1, 0)]
    assert counts(bench.page, "merged", "written", "open") == (3, 3, 3)
    assert bench.page["written_bytes"] == len(data)
    assert bench.page["heartbeat_ns"] > 0
    assert bench.books.take() == ([2, 1], len(data), 10, 30, 0, 0)
    assert bench.books.take() is None
    os.close(read_end)
    os.close(write_end)


def test_a_descriptor_that_takes_a_part_leaves_the_rest_to_python_and_counts_nothing_as_written(bench: Bench) -> None:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    room = 4096
    os.write(write_end, bytes(65536 - room))
    bench.sources[0].packets_at(*range(1, 500), watermark=1000)
    bench.sources[1].write(watermark=1000)
    bench.pump.serve(write_end, LONG_MS)
    assert bench.merge.out_bytes == 499 * 40
    assert bench.pump.done == room
    assert counts(bench.source_pages[0], "consumed", "written", "held") == (499, 0, 499)
    assert bench.books.take() is None
    bench.books.count_written()
    bench.merge.emptied()
    assert counts(bench.source_pages[0], "consumed", "written", "held") == (499, 499, 0)
    os.close(read_end)
    os.close(write_end)


def test_a_batch_that_no_segment_takes_is_dropped_by_the_writer(bench: Bench) -> None:
    bench.sources[0].packets_at(1, 2, watermark=10)
    bench.sources[1].write(watermark=10)
    bench.pump.fill()
    bench.books.note_batch()
    assert bench.books.count_dropped() == 2
    assert counts(bench.source_pages[0], "consumed", "dropped_writer", "written", "held") == (2, 2, 0, 0)


def test_what_a_predecessor_left_unsettled_counts_as_held(bench: Bench) -> None:
    bench.books.set_unsettled([5, 0])
    bench.sources[0].packets_at(1, watermark=10)
    bench.sources[1].write(watermark=10)
    bench.pump.fill()
    bench.books.note_batch()
    assert counts(bench.source_pages[0], "held") == (6,)
    bench.books.count_written()
    assert counts(bench.source_pages[0], "held") == (5,)


def test_the_end_of_a_segment_is_pythons_matter(bench: Bench) -> None:
    bench.merge.begin_segment(NEVER, 2, NEVER)
    bench.sources[0].packets_at(1, 2, 3, watermark=10)
    bench.sources[1].write(watermark=10)
    read_end, write_end = os.pipe()
    assert bench.pump.serve(write_end, LONG_MS) == order.LIMIT
    assert bench.page["written_packets"] == 2
    os.close(read_end)
    os.close(write_end)


def test_a_word_of_the_supervisor_ends_a_sleep_and_is_left_unread(bench: Bench) -> None:
    bench.supervisor.send(b"drain")
    assert bench.pump.serve(-1, LONG_MS) == order.IDLE
    assert bench.channel.recv(100, socket.MSG_DONTWAIT) == b"drain"


def test_a_wake_is_taken_off(bench: Bench) -> None:
    os.eventfd_write(bench.wake_fd, 1)
    bench.pump.sleep(LONG_MS)
    assert not select.select([bench.wake_fd], [], [], 0)[0]


def test_the_rings_are_given_back_before_the_batch_is_written(bench: Bench) -> None:
    bench.sources[0].packets_at(1, watermark=10)
    bench.sources[1].write(watermark=10)
    bench.pump.serve(-1, LONG_MS)  # nothing can be written there
    assert bench.merge.out_bytes == 40
    assert bench.sources[0].consumer.mapping.used_bytes == 0


def test_a_source_without_a_page_is_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="one page"):
        Books(bench.merge, bench.page, bench.source_pages[:1])


@pytest.mark.parametrize(("sources", "max_wait_ms", "gather_ms"), [(1, 50, 8), (4, 50, 9), (16, 50, 12), (16, 10, 2)])
def test_many_sources_are_gathered_for_longer_within_a_quarter_of_max_wait(
    sources: int, max_wait_ms: int, gather_ms: int
) -> None:
    bench = Bench(tuple(f"source{number}" for number in range(sources)))
    bench.pump.max_wait_ms = max_wait_ms
    found = bench.pump.gather_ms()
    bench.close()
    assert found == gather_ms
