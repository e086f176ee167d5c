"""The compiled loop of the merge worker: what it writes, what it counts, and when it hands over to Python."""

from __future__ import annotations

import fcntl
import os
import resource
import select
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from merge.outputs import make_pages
from merge.rings import GENERATION, Source, make_merge, packet
from support.lab import wait_until

from appliance.counters import CounterPage
from appliance.merge import order
from appliance.merge.books import Books
from appliance.merge.pump import Pump
from appliance.merge.rotation import NEVER
from appliance.ring.ring import Producer

LONG_MS = 60_000
CONSUMER_SLEEPING_OFFSET = 780  # ring_header.consumer_sleeping, and values of it (layout.h)
RING_AWAKE, RING_SLEEPS, RING_RESTS = 0, 1, 3


class Bench:
    """A pump over rings in the test's hand, with `fd` to write to."""

    def __init__(
        self,
        labels: tuple[str, ...] = ("a", "b"),
        ring_bytes: int = 1 << 20,
        *,
        lends: bool = False,
        turn_ms: int = 0,
    ) -> None:
        self.sources = [Source(ring_bytes) for _ in labels]
        self.merge = make_merge(self.sources, max_wait_ms=LONG_MS, lends=lends)
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
            turn_ms=turn_ms,
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


@pytest.fixture
def roomy() -> Iterator[Bench]:
    """One source, whose ring is far from crowded by a batch of half a MiB."""
    made = Bench(("a",), ring_bytes=8 << 20)
    yield made
    made.close()


@pytest.fixture
def lender() -> Iterator[Bench]:
    """One source, and a merge that lends its pages."""
    made = Bench(("a",), ring_bytes=8 << 20, lends=True)
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """As a compressor's, its reading end and its writing end; with room for all that a test puts into it."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 1 << 20)
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


@pytest.fixture
def file_fd(tmp_path: Path) -> Iterator[int]:
    """An empty file."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


@pytest.fixture
def direct_fd(file_fd: int) -> int:
    """An empty file that can be written past the page cache."""
    try:
        fcntl.fcntl(file_fd, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        pytest.skip("the file system of the tests' directory has no direct I/O")
    fcntl.fcntl(file_fd, fcntl.F_SETFL, 0)
    return file_fd


def publish(source: Source, first: int, count: int, octets: int) -> bytes:
    """So many packets from this time on; their records."""
    records = [packet(at, (b"%d " % at).ljust(octets, b".")) for at in range(first, first + count)]
    source.write(*records, watermark=first + count)
    return b"".join(records)


def content(fd: int) -> bytes:
    return os.pread(fd, 1 << 24, 0)


def blocking_read(fd: int, octets: int) -> bytes:
    data = b""
    while len(data) < octets:
        select.select([fd], [], [])
        data += os.read(fd, 4096)
    return data


def take(fd: int, octets: int) -> bytes:
    data = b""
    while len(data) < octets:
        data += os.read(fd, octets - len(data))
    return data


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


def test_a_reader_that_is_only_slow_is_waited_for(bench: Bench) -> None:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    expected = publish(bench.sources[0], 1, 300, 1000)
    bench.sources[1].write(watermark=1000)
    reader = ThreadPoolExecutor(1)
    taken = reader.submit(blocking_read, read_end, len(expected))
    assert bench.pump.serve(write_end, 1) == order.IDLE
    assert bench.merge.out_bytes == 0
    assert taken.result() == expected
    reader.shutdown()
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


def test_large_batches_go_past_the_page_cache_but_for_what_does_not_fill_its_pages(
    roomy: Bench, direct_fd: int
) -> None:
    header = b"a file's header"
    os.write(direct_fd, header)
    expected, direct = header, 0
    for first, count, octets in ((1, 300, 901), (1000, 400, 1017), (2000, 250, 1514)):
        offset = len(expected)
        expected += publish(roomy.sources[0], first, count, octets)
        assert roomy.pump.serve(direct_fd, 1, direct=True) == order.IDLE
        direct += len(expected) // 4096 * 4096 - -(-offset // 4096) * 4096
        assert roomy.page["direct_bytes"] == direct
    assert content(direct_fd) == expected
    assert roomy.page["written_bytes"] == len(expected) - len(header)
    assert counts(roomy.source_pages[0], "consumed", "written", "held") == (950, 950, 0)
    assert not fcntl.fcntl(direct_fd, fcntl.F_GETFL) & os.O_DIRECT


def test_small_batches_go_through_the_page_cache(roomy: Bench, direct_fd: int) -> None:
    expected = publish(roomy.sources[0], 1, 100, 1000)
    roomy.pump.serve(direct_fd, 1, direct=True)
    assert content(direct_fd) == expected
    assert roomy.page["direct_bytes"] == 0


def test_a_crowded_ring_does_not_wait_for_a_disk(bench: Bench, direct_fd: int) -> None:
    expected = publish(bench.sources[0], 1, 400, 1000)
    bench.sources[1].write(watermark=LONG_MS)
    bench.pump.serve(direct_fd, 1, direct=True)
    assert content(direct_fd) == expected
    assert bench.page["direct_bytes"] == 0


def test_what_python_writes_in_between_does_not_keep_the_next_batch_from_going_directly(
    roomy: Bench, direct_fd: int
) -> None:
    expected = publish(roomy.sources[0], 1, 300, 1000)
    roomy.pump.serve(direct_fd, 1, direct=True)
    before = roomy.page["direct_bytes"]
    expected += b"another interface" + publish(roomy.sources[0], 1000, 300, 1000)
    os.write(direct_fd, b"another interface")
    roomy.pump.serve(direct_fd, 1, direct=True)
    assert content(direct_fd) == expected
    assert roomy.page["direct_bytes"] > before > 0


def test_a_file_that_has_no_direct_writing_takes_the_batch_nevertheless(roomy: Bench) -> None:
    fd = os.open("/dev/null", os.O_WRONLY)
    for first in (1, 1000):
        publish(roomy.sources[0], first, 300, 1000)
        assert roomy.pump.serve(fd, 1, direct=True) == order.IDLE
        assert roomy.pump.direct_refused
    assert counts(roomy.source_pages[0], "consumed", "written", "held") == (600, 600, 0)
    assert roomy.page["direct_bytes"] == 0
    os.close(fd)


def test_a_file_that_takes_only_a_part_directly_leaves_the_rest_to_python(roomy: Bench, direct_fd: int) -> None:
    room = 64 << 12
    expected = publish(roomy.sources[0], 1, 400, 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        roomy.pump.serve(direct_fd, LONG_MS, direct=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(direct_fd) == expected[:room]
    assert roomy.pump.done == roomy.page["direct_bytes"] == room
    assert bytes(roomy.merge.output()) == expected
    assert counts(roomy.source_pages[0], "consumed", "written", "held") == (400, 0, 400)


def test_pages_that_a_pipe_has_are_not_written_on_before_they_are_read(lender: Bench, pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    expected = b""
    for first in range(1, 8000, 1000):
        expected += publish(lender.sources[0], first, 100, 1000)
        assert lender.pump.serve(write_end, 1) == order.IDLE
    assert take(read_end, len(expected)) == expected
    assert counts(lender.source_pages[0], "consumed", "written", "held") == (800, 800, 0)


def test_regions_take_turns_and_what_was_read_is_used_again(lender: Bench, pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    regions = []
    for first in range(1, 8000, 1000):
        expected = publish(lender.sources[0], first, 100, 1000)
        regions.append(lender.merge.output_address)
        lender.pump.serve(write_end, 1)
        assert take(read_end, len(expected)) == expected
    assert len(set(regions)) == 3
    assert regions[3:6] == regions[:3]


def test_the_pages_of_a_finished_pipe_are_not_written_on_either(lender: Bench, pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    of_the_first = publish(lender.sources[0], 1, 200, 1000)
    lender.pump.serve(write_end, 1)
    next_read_end, next_write_end = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(next_write_end, fcntl.F_SETPIPE_SZ, 1 << 20)
    lender.merge.begin_segment(NEVER, NEVER, NEVER)
    for first in range(1000, 8000, 1000):
        expected = publish(lender.sources[0], first, 100, 1000)
        lender.pump.serve(next_write_end, 1)
        assert take(next_read_end, len(expected)) == expected
    assert take(read_end, len(of_the_first)) == of_the_first
    os.close(next_read_end)
    os.close(next_write_end)


def test_a_batch_that_was_lent_in_part_is_not_written_on_when_python_does_the_rest(lender: Bench) -> None:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    expected = publish(lender.sources[0], 1, 100, 1000)
    lender.pump.serve(write_end, LONG_MS)
    done = lender.pump.done
    assert 0 < done < len(expected)
    rest = bytes(lender.merge.output())[done:]
    lender.books.count_written()
    lender.merge.emptied()
    publish(lender.sources[0], 1000, 100, 1000)
    lender.pump.fill()
    assert take(read_end, done) + rest == expected
    os.close(read_end)
    os.close(write_end)


def test_small_batches_are_copied(lender: Bench, pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    region = lender.merge.output_address
    for first in (1, 1000):
        expected = publish(lender.sources[0], first, 60, 1000)
        lender.pump.serve(write_end, 1)
        assert lender.merge.output_address == region
        assert take(read_end, len(expected)) == expected


def test_what_cannot_borrow_pages_gets_copies(lender: Bench, file_fd: int) -> None:
    expected = publish(lender.sources[0], 1, 100, 1000)
    assert lender.pump.serve(file_fd, 1) == order.IDLE
    assert content(file_fd) == expected


def test_a_merge_that_was_made_without_lending_copies(roomy: Bench, pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    region = roomy.merge.output_address
    expected = publish(roomy.sources[0], 1, 100, 1000)
    roomy.pump.serve(write_end, 1)
    assert roomy.merge.output_address == region
    assert take(read_end, len(expected)) == expected


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


@pytest.mark.parametrize(("max_wait_ms", "gather_ms"), [(10, 2), (50, 12), (1000, 12)])
def test_a_rest_is_a_quarter_of_max_wait_or_shorter(bench: Bench, max_wait_ms: int, gather_ms: int) -> None:
    bench.pump.max_wait_ms = max_wait_ms
    assert bench.pump.gather_ns(time.monotonic_ns()) == gather_ms * 1_000_000


@pytest.mark.parametrize(("max_wait_ms", "gather_ms"), [(1, 1), (10, 4), (50, 20), (1000, 20)])
def test_a_file_is_written_after_longer_rests(roomy: Bench, direct_fd: int, max_wait_ms: int, gather_ms: int) -> None:
    roomy.pump.serve(direct_fd, 0, direct=True)
    roomy.pump.max_wait_ms = max_wait_ms
    assert roomy.pump.gather_ns(time.monotonic_ns()) == gather_ms * 1_000_000


def sleeps(source: Source) -> int:
    """How its consumer sleeps, if it does."""
    how: int = struct.unpack("=I", os.pread(source.fd, 4, CONSUMER_SLEEPING_OFFSET))[0]
    return how


def test_a_rest_ends_when_a_ring_fills_up() -> None:
    bench = Bench(("a",), turn_ms=10**9)
    source = bench.sources[0]
    producer = Producer(source.fd, GENERATION, bench.wake_fd)

    def rests() -> bool:  # whoever wakes it takes that down
        return sleeps(source) == RING_RESTS

    def fill() -> list[bool]:
        wait_until(rests, "the rest")
        seen = []
        for count in (10, 5000):
            assert producer.push(packet(1, b"x" * 60) * count)
            producer.publish(1)
            seen.append(rests())
        return seen

    with ThreadPoolExecutor(1) as threads:
        seen = threads.submit(fill)
        bench.pump.gather()  # would be over in days
        assert seen.result() == [True, False]
    bench.close()


@pytest.mark.parametrize(("at_ms", "rest_ms"), [(0, 2), (1, 1), (2, 24), (3, 23), (25, 1), (49, 1)])
def test_a_rest_ends_when_the_capture_workers_have_had_their_turn(at_ms: int, rest_ms: int) -> None:
    bench = Bench(turn_ms=24)
    assert bench.pump.gather_ns((24 * 1000 + at_ms) * 1_000_000) == rest_ms * 1_000_000
    bench.close()


def test_a_rest_follows_the_workers_to_another_turn() -> None:
    bench, without = Bench(turn_ms=24), Bench()
    bench.pump.turn_ms = 10
    assert bench.pump.turn_ms == 10
    assert bench.pump.gather_ns(20_002_000_000) == 10_000_000
    bench.pump.turn_ms = 0
    assert bench.pump.gather_ns(20_002_000_000) == without.pump.gather_ns(20_002_000_000)
    bench.close()
    without.close()


def test_when_it_has_written_in_the_workers_turn_it_rests_until_the_next_one(file_fd: int) -> None:
    bench = Bench(("a",), turn_ms=10**9)
    source = bench.sources[0]

    def serve_and_look() -> int:
        """How the pump waits for what comes next."""
        with ThreadPoolExecutor(1) as threads:
            served = threads.submit(bench.pump.serve, file_fd, LONG_MS)
            wait_until(lambda: sleeps(source) != RING_AWAKE, "the wait")
            how = sleeps(source)
            bench.supervisor.send(b"word")
            served.result()
            bench.channel.recv(4)
        return how

    assert serve_and_look() == RING_SLEEPS  # for anything that comes
    source.write(packet(1), watermark=1)
    assert serve_and_look() == RING_RESTS
    assert content(file_fd)
    assert serve_and_look() == RING_RESTS
    bench.close()


def test_while_the_capture_workers_have_their_turn_none_of_them_wakes_it(file_fd: int) -> None:
    bench = Bench(("a",), turn_ms=1)  # they have it all the time
    source, event = bench.sources[0], os.eventfd(0, os.EFD_NONBLOCK)
    producer = Producer(source.fd, GENERATION, event)

    def turns() -> None:
        try:
            for i in range(1, 21):
                producer.push(packet(i, b"x" * 60))
                producer.publish(i)
                wait_until(lambda: producer.mapping.used_bytes == 0, "the packet in the file")
        finally:
            bench.supervisor.send(b"end")

    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(turns)
        bench.pump.serve(file_fd, LONG_MS)
        ended.result()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(event)
    assert len(content(file_fd)) == 20 * len(packet(1, b"x" * 60))
    os.close(event)
    bench.close()
