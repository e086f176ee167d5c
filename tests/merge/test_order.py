"""The merge against a model that looks at one record at a time, and against rings that lie."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

import pytest
from capture.crafted import SEEDS
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from merge.rings import (
    CAPACITY,
    COMMIT_OFFSET,
    COUNTERS,
    DATA_OFFSET,
    DIGEST,
    HEAD_OFFSET,
    PACKET,
    PLAIN_BODY_BYTES,
    WATERMARK_OFFSET,
    S,
    Source,
    blocks,
    counters,
    drain,
    epoch,
    make_merge,
    packet,
    record,
    take,
)

from appliance.capture import headers
from appliance.formats.encode import InterfaceDescription, interface_record
from appliance.merge import order
from appliance.ring.ring import Consumer, Producer

MAX_WAIT_MS = 3_600_000  # an hour: how long a test takes makes no difference
STANDSTILL_MS = 100
STEP_NS = MAX_WAIT_MS * 1_000_000 // 8
NEVER = (1 << 64) - 1
Make = Callable[[int], list[Source]]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes so many rings."""
    with contextlib.ExitStack() as stack:

        def make_sources(count: int) -> list[Source]:
            sources = [Source() for _ in range(count)]
            for source in sources:
                stack.callback(source.close)
            return sources

        yield make_sources


# ---- the model ----


class Waiting:
    """One source as the model sees it: (time, serial, bytes) of what waits, and when that arrived."""

    def __init__(self, live: bool) -> None:
        self.live = live
        self.published: deque[tuple[int, int, int]] = deque()
        self.seen: deque[tuple[int, int, int, int]] = deque()
        self.watermark = 0
        self.ended = False

    @property
    def is_silent(self) -> bool:
        return not self.seen and not self.ended

    @property
    def is_half_full(self) -> bool:
        return sum(entry[2] for entry in self.seen) > CAPACITY // 2


class MergeAgainstModel(RuleBasedStateMachine):
    """What is released, in which order, when, how late and how forced: all as by the rule of one record at a time."""

    @initialize(live=st.lists(st.booleans(), min_size=1, max_size=4), out_bytes=st.sampled_from([1, 300, 1 << 20]))
    def begin(self, live: list[bool], out_bytes: int) -> None:
        self.sources = [Source() for _ in live]
        self.model = [Waiting(flag) for flag in live]
        self.merge = make_merge(self.sources, live, max_wait_ms=MAX_WAIT_MS, out_bytes=out_bytes)
        self.steps = self.serial = self.late = self.forced = self.newest = 0
        self.pushed: Counter[tuple[int, int]] = Counter()
        self.came: Counter[tuple[int, int]] = Counter()

    @rule(
        index=st.integers(0, 3),
        times=st.lists(st.integers(0, 50), min_size=1, max_size=6),
        size=st.sampled_from([0, 7, 9000]),
        watermark=st.none() | st.integers(0, 60),
    )
    def publish(self, index: int, times: list[int], size: int, watermark: int | None) -> None:
        source, model = self.sources[index % len(self.sources)], self.model[index % len(self.sources)]
        if model.ended:
            return
        for at in times:
            entry = packet(at, bytes(size))
            if source.producer.push(entry):
                model.published.append((at, self.serial, len(entry)))
                self.serial += 1
                self.pushed[index % len(self.sources), at] += 1
        model.watermark = model.watermark if watermark is None else watermark
        source.producer.publish(model.watermark)

    @rule(index=st.integers(0, 3), watermark=st.integers(0, 60))
    def promise(self, index: int, watermark: int) -> None:
        source, model = self.sources[index % len(self.sources)], self.model[index % len(self.sources)]
        model.watermark = watermark
        source.producer.promise(watermark)

    @rule(index=st.integers(0, 3))
    def end(self, index: int) -> None:
        self.model[index % len(self.sources)].ended = True
        self.sources[index % len(self.sources)].producer.end()

    @rule(steps=st.integers(1, 9))
    def time_passes(self, steps: int) -> None:
        self.steps += steps
        self.merge.clock_offset_ns = self.steps * STEP_NS

    @rule()
    def fill(self) -> None:
        for model in self.model:
            model.seen.extend((*entry, self.steps) for entry in model.published)
            model.published.clear()
        expected = self.expected()
        status, found = drain(self.merge)
        assert found == expected
        self.came.update(found)
        assert self.merge.late == self.late
        assert self.merge.forced == self.forced
        over = all(model.ended and not model.seen for model in self.model)
        assert status == (order.ENDED if over else order.IDLE)
        assert not self.merge.has_news

    def expected(self) -> list[tuple[int, int]]:
        released = []
        while True:
            waiting = [(model.seen[0][0], i) for i, model in enumerate(self.model) if model.seen]
            if not waiting:
                return released
            at, best = min(waiting)
            promises = [m.watermark if m.live else 0 for m in self.model if m.is_silent]
            if any(at > promise for promise in promises):
                if not self.must_go():
                    return released
                self.forced += 1
            self.model[best].seen.popleft()
            self.late += at < self.newest
            self.newest = max(self.newest, at)
            released.append((best, at))

    def must_go(self) -> bool:
        if any(model.is_silent and not model.live for model in self.model):
            return False
        overdue = any(model.seen and self.steps - model.seen[0][3] >= 8 for model in self.model)
        return overdue or any(model.is_half_full for model in self.model)

    def teardown(self) -> None:
        if not hasattr(self, "merge"):
            return
        for model, source in zip(self.model, self.sources, strict=True):
            model.ended = True
            source.producer.end()
        self.fill()
        assert self.came == self.pushed
        assert [self.merge.source_totals(i)[0] for i in range(len(self.sources))] == [
            sum(count for (index, _), count in self.pushed.items() if index == i) for i in range(len(self.sources))
        ]
        for source in self.sources:
            source.close()


TestMergeAgainstModel = MergeAgainstModel.TestCase
TestMergeAgainstModel.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), min_size=1, max_size=9), st.data())
@settings(deadline=None, max_examples=100)
def test_sources_that_keep_their_promise_make_a_sorted_stream_ties_by_source(
    times: list[list[int]], data: st.DataObject
) -> None:
    sources = [Source() for _ in times]
    queues = [deque(sorted(entry)) for entry in times]
    merge = make_merge(sources)
    found = []
    while any(queues):
        i = data.draw(st.sampled_from([i for i, queue in enumerate(queues) if queue]))
        at = queues[i].popleft()
        sources[i].packets_at(at, watermark=at)
        found += drain(merge)[1]
    for source in sources:
        source.producer.end()
    status, rest = drain(merge)
    found += rest
    assert status == order.ENDED
    # Equal times may come in any order of sources while the stream runs: a watermark allows its own time to follow.
    assert [at for _, at in found] == sorted(at for queue in times for at in queue)
    assert Counter(found) == Counter((i, at) for i, queue in enumerate(times) for at in queue)
    assert merge.late == merge.forced == 0
    for source in sources:
        source.close()


def test_of_equal_times_the_first_source_goes_first_and_within_it_the_first_arrival(make: Make) -> None:
    sources = make(3)
    for i in (2, 0, 1):
        sources[i].write(packet(5, bytes([i, 1])), packet(5, bytes([i, 2])))
        sources[i].producer.end()
    merge = make_merge(sources)
    assert merge.fill() == order.ENDED
    assert [block[7][:2] for block in blocks(bytes(merge.output()))] == [
        bytes([i, n]) for i in range(3) for n in (1, 2)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 17])
@pytest.mark.parametrize("spread", [1, 5])
def test_any_number_of_sources_takes_turns_by_time_and_then_by_source(make: Make, count: int, spread: int) -> None:
    sources = make(count)
    expected = []
    for i, source in enumerate(sources):
        times = [(7 * i + 11 * n) // spread for n in range(30)]
        source.write(*(packet(at, bytes([i, n])) for n, at in enumerate(times)))
        source.producer.end()
        expected += [(at, i, n) for n, at in enumerate(times)]
    merge = make_merge(sources)
    assert merge.fill() == order.ENDED
    assert [block[7][:2] for block in blocks(bytes(merge.output()))] == [bytes([i, n]) for _, i, n in sorted(expected)]


def test_when_a_source_runs_out_the_others_go_on_as_far_as_it_has_promised(make: Make) -> None:
    sources = make(3)
    sources[0].packets_at(1, 4, watermark=6)
    sources[1].packets_at(2, 6, 7, 8, watermark=9)
    sources[2].packets_at(3, 5, 9, watermark=9)
    merge = make_merge(sources)
    assert drain(merge) == (order.IDLE, [(0, 1), (1, 2), (2, 3), (0, 4), (2, 5), (1, 6)])
    sources[0].packets_at(7, watermark=8)
    assert drain(merge) == (order.IDLE, [(0, 7), (1, 7), (1, 8)])
    assert merge.late == merge.forced == 0


# ---- holding times ----


def held_up_by_an_idle_source(make: Make, max_wait_ms: int) -> order.Merge:
    """A record at 100 waits in source 0; source 1 has promised nothing beyond 99."""
    busy, idle = sources = make(2)
    merge = make_merge(sources, max_wait_ms=max_wait_ms)
    busy.packets_at(100, watermark=100)
    idle.producer.promise(99)
    assert drain(merge) == (order.IDLE, [])
    return merge


def test_an_idle_source_holds_a_record_up_for_max_wait_and_no_longer(make: Make) -> None:
    merge = held_up_by_an_idle_source(make, MAX_WAIT_MS)
    assert merge.hold_ms is not None and MAX_WAIT_MS - 10_000 < merge.hold_ms <= MAX_WAIT_MS
    merge.clock_offset_ns = 7 * STEP_NS
    assert drain(merge) == (order.IDLE, [])
    merge.clock_offset_ns = 8 * STEP_NS
    assert drain(merge) == (order.IDLE, [(0, 100)])
    assert merge.forced == 1
    assert merge.hold_ms is None


def test_a_time_in_which_the_merge_did_not_run_counts_as_a_quarter_of_max_wait_at_most(make: Make) -> None:
    """A machine that stood still is no silent source: its worker is asked once more, and has the time to answer."""
    merge = held_up_by_an_idle_source(make, STANDSTILL_MS)
    for _ in range(3):
        time.sleep(STANDSTILL_MS / 1000)
        assert drain(merge) == (order.IDLE, [])
    time.sleep(STANDSTILL_MS / 1000)
    assert drain(merge) == (order.IDLE, [(0, 100)])
    assert merge.forced == 1


def test_it_does_not_matter_which_look_at_the_clock_finds_that_the_machine_stood_still(make: Make) -> None:
    """A CPU is taken away in the middle of something as well, not only while the merge sleeps."""
    merge = held_up_by_an_idle_source(make, STANDSTILL_MS)
    time.sleep(STANDSTILL_MS / 1000)
    assert merge.hold_ms is not None and merge.hold_ms > STANDSTILL_MS // 2
    merge.want_watermarks()
    assert drain(merge) == (order.IDLE, [])
    assert merge.forced == 0


def test_a_record_behind_a_source_that_lags_is_not_held_for_longer_than_max_wait(make: Make) -> None:
    """Each record of the lagging source is older than the waiting one, and has just arrived."""
    ahead, lagging, _silent = sources = make(3)
    merge = make_merge(sources, max_wait_ms=MAX_WAIT_MS)
    ahead.packets_at(1000)
    assert drain(merge) == (order.IDLE, [])
    for step in range(1, 8):
        merge.clock_offset_ns = step * STEP_NS
        lagging.packets_at(step)
        assert drain(merge) == (order.IDLE, [])
    merge.clock_offset_ns = 8 * STEP_NS
    lagging.packets_at(8)
    assert drain(merge) == (order.IDLE, [(1, step) for step in range(1, 9)] + [(0, 1000)])


def test_a_long_unhindered_run_does_not_make_later_records_look_overdue(make: Make) -> None:
    """Arrivals are noted in a small number of marks, which belong to records that may be gone."""
    one, other = sources = make(2)
    merge = make_merge(sources, max_wait_ms=MAX_WAIT_MS)
    for step in range(200):
        merge.clock_offset_ns = step * STEP_NS // 4
        one.packets_at(step, watermark=step)
        other.producer.promise(step)
        assert drain(merge) == (order.IDLE, [(0, step)])
    one.packets_at(1000)
    assert drain(merge) == (order.IDLE, [])
    assert merge.forced == 0


def test_files_wait_for_each_other_for_ever(make: Make) -> None:
    one, other = sources = make(2)
    merge = make_merge(sources, live=False, max_wait_ms=1)
    one.packets_at(5, watermark=5)
    other.producer.promise(1000)  # a file's promise is not worth anything: it is only waited for
    merge.clock_offset_ns = 10**15
    assert drain(merge) == (order.IDLE, [])
    assert merge.hold_ms is None
    other.packets_at(3)
    assert drain(merge) == (order.IDLE, [(1, 3)])
    other.producer.end()
    assert drain(merge) == (order.IDLE, [(0, 5)])
    one.producer.end()
    assert drain(merge) == (order.ENDED, [])


def test_a_ring_more_than_half_full_forces_records_until_it_is_not(make: Make) -> None:
    busy, _silent = sources = make(2)
    merge = make_merge(sources, max_wait_ms=MAX_WAIT_MS)
    size = len(packet(0, bytes(4000)))
    fits = CAPACITY // 2 // size
    for at in range(1, fits + 1):
        busy.write(packet(at, bytes(4000)))
    assert drain(merge) == (order.IDLE, [])
    for at in range(fits + 1, fits + 4):
        busy.write(packet(at, bytes(4000)))
    assert drain(merge) == (order.IDLE, [(0, 1), (0, 2), (0, 3)])
    assert merge.forced == 3


def test_what_is_read_but_not_released_yet_is_no_reason_to_force(make: Make) -> None:
    busy, other = sources = make(2)
    merge = make_merge(sources, max_wait_ms=MAX_WAIT_MS)
    for at in range(12):
        busy.write(packet(at, bytes(4000)))
    other.producer.promise(9)
    assert merge.fill() == order.IDLE
    assert [(block[2], block[4]) for block in blocks(bytes(merge.output()))] == [(0, at) for at in range(10)]


def test_after_finish_nobody_is_waited_for_and_the_order_stays(make: Make) -> None:
    one, other, _file = sources = make(3)
    merge = make_merge(sources, live=[True, True, False])
    one.packets_at(1, 4)
    other.packets_at(2, 3)
    assert drain(merge) == (order.IDLE, [])
    merge.finish()
    assert drain(merge) == (order.ENDED, [(0, 1), (1, 2), (1, 3), (0, 4)])


# ---- lateness ----


def test_late_packets_are_written_and_counted_exactly_with_the_worst_lateness(make: Make) -> None:
    one, other = sources = make(2)
    merge = make_merge(sources)
    one.packets_at(100, 200, watermark=200)
    other.producer.promise(200)
    assert merge.fill() == order.IDLE
    assert (merge.batch_first_ns, merge.batch_last_ns, merge.batch_late) == (100, 200, 0)
    take(merge)
    other.packets_at(50, 150, 300, watermark=300)
    one.producer.promise(300)
    assert merge.fill() == order.IDLE
    assert (merge.batch_first_ns, merge.batch_last_ns, merge.batch_late, merge.batch_late_max_ns) == (50, 300, 2, 150)
    assert take(merge) == [(1, 50), (1, 150), (1, 300)]
    assert (merge.late, merge.late_max_ns) == (2, 150)
    assert [merge.source_totals(i)[2] for i in range(2)] == [0, 2]
    assert (merge.batch_first_ns, merge.batch_last_ns, merge.batch_late) == (0, 0, 0)


def test_a_first_packet_of_the_year_1970_is_a_time_like_any_other(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources)
    source.packets_at(0, 7)
    merge.fill()
    assert (merge.batch_first_ns, merge.batch_last_ns) == (0, 7)


def test_times_of_the_far_future_stop_nobody(make: Make) -> None:
    one, other = sources = make(2)
    merge = make_merge(sources)
    one.packets_at((1 << 64) - 1, (1 << 63) + 5)
    other.packets_at(4 * 10**18)
    for source in sources:
        source.producer.end()
    assert drain(merge)[1] == [(1, 4 * 10**18), (0, (1 << 64) - 1), (0, (1 << 63) + 5)]


def test_the_last_time_of_all_goes_after_all_others_from_any_source(make: Make) -> None:
    first, last = 10**18, (1 << 64) - 1
    for position in range(4):
        sources = make(4)
        for i, source in enumerate(sources):
            source.packets_at(first + i, last if i == position else first + 10 + i)
            source.producer.end()
        emitted = drain(make_merge(sources))[1]
        others = [(i, first + 10 + i) for i in range(4) if i != position]
        assert emitted == [(i, first + i) for i in range(4)] + others + [(position, last)]


def test_a_time_beyond_the_horizon_ends_no_segment_and_makes_nobody_late(make: Make) -> None:
    one, other = sources = make(2)
    merge = make_merge(sources)
    merge.horizon_ns = 1000
    merge.begin_segment(500, NEVER, NEVER)
    one.packets_at(400, 1 << 62, watermark=1 << 62)
    other.packets_at(410, 420, watermark=420)
    assert drain(merge) == (order.IDLE, [(0, 400), (1, 410), (1, 420)])
    other.producer.promise(450)
    merge.finish()
    assert drain(merge) == (order.ENDED, [(0, 1 << 62)])
    assert merge.late == 0
    merge = make_merge(sources)
    merge.horizon_ns = 1000
    merge.begin_segment(500, NEVER, NEVER)
    one.packets_at(2000)
    other.packets_at(430, 440)
    one.producer.end()
    other.producer.promise(2000)
    assert drain(merge) == (order.BOUNDARY, [(1, 430), (1, 440)])
    assert merge.watermark == 1000, "a promise is worth no more than the horizon"


def test_a_negative_watermark_promises_nothing(make: Make) -> None:
    one, other = sources = make(2)
    merge = make_merge(sources)
    one.packets_at(5)
    other.producer.promise(-1)
    assert drain(merge) == (order.IDLE, [])
    assert not merge.has_news


# ---- segments ----


def test_the_boundary_stops_before_the_first_record_behind_it(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources)
    merge.begin_segment(10, NEVER, NEVER)
    source.packets_at(8, 9, 10, 11, watermark=11)
    assert drain(merge) == (order.BOUNDARY, [(0, 8), (0, 9)])
    assert merge.next_ns == 10
    merge.begin_segment(20, NEVER, NEVER)
    assert drain(merge) == (order.IDLE, [(0, 10), (0, 11)])


def test_the_boundary_is_passed_by_watermarks_alone_and_only_when_all_have_passed(make: Make) -> None:
    one, other = sources = make(2)
    merge = make_merge(sources)
    merge.begin_segment(10, NEVER, NEVER)
    one.producer.promise(10)
    other.producer.promise(9)
    assert drain(merge)[0] == order.IDLE
    other.producer.promise(12)
    assert drain(merge)[0] == order.BOUNDARY
    assert merge.next_ns == 10


def test_a_held_record_behind_the_boundary_does_not_pass_it_for_a_silent_source(make: Make) -> None:
    one, _silent = sources = make(2)
    merge = make_merge(sources)
    merge.begin_segment(10, NEVER, NEVER)
    one.packets_at(11, watermark=11)
    assert drain(merge) == (order.IDLE, [])
    merge.force()
    assert drain(merge) == (order.BOUNDARY, [])
    merge.begin_segment(20, NEVER, NEVER)
    assert drain(merge) == (order.IDLE, []), "force counts for one segment"


def test_the_packet_limit_is_exact_and_never_makes_an_empty_segment(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources)
    source.packets_at(*range(5), watermark=5)
    merge.begin_segment(NEVER, 2, NEVER)
    assert drain(merge) == (order.LIMIT, [(0, 0), (0, 1)])
    assert merge.packets_left == 0
    merge.begin_segment(NEVER, 0, NEVER)
    assert drain(merge) == (order.LIMIT, [(0, 2)])


@pytest.mark.parametrize(
    ("sink", "captured_only", "cost"),
    [
        (order.SINK_PCAPNG, False, 32 + 12),
        (order.SINK_PCAP_NS, False, 16 + 10),
        (order.SINK_PCAP_US, False, 16 + 10),
        (order.SINK_PCAPNG, True, 10),
    ],
)
def test_the_byte_limit_counts_what_the_format_takes(make: Make, sink: int, captured_only: bool, cost: int) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources, sink=sink)
    merge.count_captured_bytes = captured_only
    source.write(*(packet(at, bytes(10)) for at in range(5)))
    merge.begin_segment(NEVER, NEVER, 3 * cost + cost - 1)
    assert merge.fill() == order.LIMIT
    assert merge.out_packets == 3
    assert captured_only or merge.out_bytes == 3 * cost


def test_a_dropped_packet_takes_nothing_of_the_limits(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources)
    source.write(packet(1, interface=9), packet(2), packet(3), packet(4))
    merge.begin_segment(NEVER, 2, NEVER)
    assert drain(merge) == (order.LIMIT, [(0, 2), (0, 3)])
    assert merge.source_totals(0) == (3, 1, 0)


def test_what_is_in_the_buffer_already_counts_for_the_segment_that_begins(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources)
    source.packets_at(1, 2)
    merge.fill()
    merge.begin_segment(NEVER, 3, NEVER)
    assert (merge.segment_packets, merge.packets_left) == (2, 1)
    source.packets_at(3, 4)
    assert merge.fill() == order.LIMIT
    assert merge.out_packets == 3


def test_while_held_nothing_goes_and_nothing_is_over(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources)
    merge.begin_segment(10, NEVER, NEVER)
    merge.hold()
    source.producer.promise(20)
    merge.force()
    assert drain(merge) == (order.IDLE, [])
    source.packets_at(21)
    assert drain(merge) == (order.BOUNDARY, [])
    assert merge.next_ns == 21
    merge.begin_segment(30, NEVER, NEVER)
    assert drain(merge) == (order.IDLE, [(0, 21)])


# ---- clock steps ----

HOUR = 3600 * S


def test_all_of_the_old_time_goes_before_anything_of_the_new_one(make: Make) -> None:
    one, other = sources = make(2)
    merge = make_merge(sources)
    one.write(packet(100), epoch(-HOUR), packet(10), watermark=10)
    assert drain(merge) == (order.IDLE, []), "the other source may still bring something of the old time"
    assert merge.want_watermarks() == 1
    other.write(packet(90), packet(110), epoch(-HOUR + 1), packet(5), watermark=5)
    assert drain(merge) == (order.EPOCH, [(1, 90), (0, 100), (1, 110)])
    merge.next_epoch()
    assert drain(merge) == (order.IDLE, [(1, 5)])
    other.producer.promise(10)
    assert drain(merge) == (order.IDLE, [(0, 10)])
    assert merge.late == 0, "what is older only by its epoch is not late"


def test_a_source_that_never_reports_the_step_is_waited_for_for_max_wait(make: Make) -> None:
    one, silent = sources = make(2)
    merge = make_merge(sources, max_wait_ms=MAX_WAIT_MS)
    one.write(epoch(-HOUR), packet(10))
    assert drain(merge)[0] == order.IDLE
    merge.clock_offset_ns = 8 * STEP_NS
    assert drain(merge)[0] == order.EPOCH
    merge.next_epoch()
    silent.write(epoch(-HOUR), packet(11), watermark=11)
    one.producer.promise(11)
    assert drain(merge) == (order.IDLE, [(0, 10), (1, 11)]), "its report comes late, and changes nothing"


def test_a_busy_source_that_never_reports_the_step_does_not_shut_out_the_others(make: Make) -> None:
    one, busy = sources = make(2)
    merge = make_merge(sources, max_wait_ms=MAX_WAIT_MS, out_bytes=1)
    one.write(epoch(-HOUR), packet(10))
    busy.packets_at(100, 101)
    assert merge.fill() == order.FULL
    assert take(merge) == [(1, 100)]
    merge.clock_offset_ns = 7 * STEP_NS
    busy.packets_at(102)
    assert merge.fill() == order.FULL
    merge.clock_offset_ns = 9 * STEP_NS
    busy.packets_at(103)
    assert take(merge) == [(1, 101)]
    assert merge.fill() == order.FULL
    assert take(merge) == [(1, 102)], "it came while the report could still have followed it"
    assert (merge.fill(), take(merge)) == (order.EPOCH, []), "the next one came later"


def test_a_parked_ring_that_is_half_full_ends_the_wait(make: Make) -> None:
    one, _silent = sources = make(2)
    merge = make_merge(sources, max_wait_ms=MAX_WAIT_MS)
    one.write(epoch(-HOUR), *(packet(at, bytes(4000)) for at in range(9)))
    assert drain(merge)[0] == order.EPOCH


def test_two_steps_in_a_row_are_two_epochs(make: Make) -> None:
    one, other = sources = make(2)
    merge = make_merge(sources)
    for source, shift in ((one, 0), (other, 1)):
        source.write(epoch(-HOUR), packet(50 + shift), epoch(HOUR), packet(10 + shift))
        source.producer.end()
    assert drain(merge) == (order.EPOCH, [])
    merge.next_epoch()
    assert drain(merge) == (order.EPOCH, [(0, 50), (1, 51)])
    merge.next_epoch()
    assert drain(merge) == (order.ENDED, [(0, 10), (1, 11)])


# ---- records that are not packets ----


def test_an_interface_is_announced_before_its_packets_and_in_the_order_of_its_own_ring(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources, live=False, mapped=False)
    announcement = interface_record(InterfaceDescription(1, name="left"))
    source.write(announcement, packet(5), interface_record(InterfaceDescription(1)), packet(6, interface=1))
    assert drain(merge) == (order.CONTROL, [])
    assert (merge.control_source, merge.control_record()) == (0, announcement)
    merge.control_done()
    merge.map_interface(0, 0, 7)
    assert drain(merge) == (order.CONTROL, [(7, 5)])
    merge.control_done()
    assert drain(merge) == (order.IDLE, [])
    assert merge.source_totals(0) == (2, 1, 0), "what has no number in the output is dropped, and counted"


def test_counters_are_those_of_the_last_record_that_was_passed(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources)
    source.write(counters(10, 1, 2, 3, 4), packet(5), counters(20, 2, 4, 6, 8))
    assert merge.source_counters(0) == (0, 0, 0, 0, 0)
    drain(merge)
    assert merge.source_counters(0) == (20, 2, 4, 6, 8)


def test_counters_between_packets_are_noted_and_disturb_no_order(make: Make) -> None:
    a, b = sources = make(2)
    merge = make_merge(sources)
    a.write(packet(1), counters(1, 0, 0, 0, 1), counters(2, 0, 0, 0, 1), packet(3), watermark=9)
    b.write(counters(7, 0, 0, 0, 0), packet(2), counters(8, 0, 0, 0, 1), packet(4), watermark=9)
    assert drain(merge) == (order.IDLE, [(0, 1), (1, 2), (0, 3), (1, 4)])
    assert [merge.source_counters(i)[0] for i in range(2)] == [2, 8]


@pytest.mark.parametrize("sink", [order.SINK_PCAPNG, order.SINK_DIGESTS])
def test_records_of_an_unknown_kind_are_stepped_over(make: Make, sink: int) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources, sink=sink)
    other_kind = DIGEST if sink == order.SINK_PCAPNG else PACKET
    kind = PACKET if sink == order.SINK_PCAPNG else DIGEST
    source.write(record(0x80000FFF, b"?" * 8), record(other_kind, bytes(104), 3), record(COUNTERS, b"short"))
    source.write(record(kind, bytes(104), 4))
    assert drain(merge) == (order.IDLE, [(0, 4)])


# ---- sinks ----


def test_pcapng_packets_keep_everything_but_their_interface_number(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources, mapped=False)
    merge.map_interface(0, 2, 5)
    entry = packet(3, b"data" + struct.pack("=HHI", 2, 4, 2) + bytes(4), interface=2, captured=4)
    source.write(entry)
    merge.fill()
    assert bytes(merge.output()) == entry[:8] + struct.pack("=I", 5) + entry[12:]


def test_pcapng_packets_of_any_length_go_out_octet_for_octet(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources)
    entries = [packet(n, bytes(range(1, n + 1))) for n in range(200)]
    source.write(*entries)
    merge.fill()
    assert bytes(merge.output()) == b"".join(entries)


@pytest.mark.parametrize(("sink", "unit_ns"), [(order.SINK_PCAP_NS, 1), (order.SINK_PCAP_US, 1000)])
def test_pcap_packets_of_any_length_go_out_octet_for_octet(make: Make, sink: int, unit_ns: int) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources, sink=sink)
    times = [n * 1_234_567_891 for n in range(200)]
    source.write(*(packet(times[n], bytes(range(1, n + 1))) for n in range(200)))
    merge.fill()
    assert bytes(merge.output()) == b"".join(
        struct.pack("<4I", times[n] // 10**9, times[n] % 10**9 // unit_ns, n, n) + bytes(range(1, n + 1))
        for n in range(200)
    )


def test_digests_go_out_with_the_number_of_their_source(make: Make) -> None:
    one, other = sources = make(2)
    merge = make_merge(sources, sink=order.SINK_DIGESTS, mapped=False)
    one.write(record(DIGEST, bytes(104), 2, interface=9))
    other.write(record(DIGEST, bytes(104), 1, interface=9))
    for source in sources:
        source.producer.end()
    assert drain(merge) == (order.ENDED, [(1, 1), (0, 2)])


def plain_digest(frame: bytes, timestamp_ns: int) -> bytes:
    """As a live source leaves it (struct plain_digest of digest.h)."""
    lengths = struct.pack("=BxHII", 1, 0, len(frame), len(frame))
    return record(DIGEST, lengths + frame[:54].ljust(56, b"\0"), timestamp_ns)


def test_a_digest_that_its_source_left_plain_goes_out_whole(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources, sink=order.SINK_DIGESTS, mapped=False)
    _, frame = SEEDS["tcp over ipv4"]
    source.write(plain_digest(frame, 1_700_000_000_123_456_789))
    merge.fill()
    whole, _ = headers.digests(packet(1_700_000_000_123_456_789, frame), [1])
    assert bytes(merge.output()) == whole


# ---- hostile memory ----


def test_a_packet_too_short_to_be_one_is_dropped_wherever_it_stands_in_a_run(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources)
    short = record(PACKET, b"abcd", 5)
    source.write(short, packet(6), short, packet(7))
    assert drain(merge) == (order.IDLE, [(0, 6), (0, 7)])
    assert merge.source_totals(0) == (4, 2, 0)


@pytest.mark.parametrize("sink", [order.SINK_PCAPNG, order.SINK_PCAP_NS])
@pytest.mark.parametrize("captured", [9, 1 << 20, 0xFFFFFFFF, 0xFFFFFFE0])
def test_a_captured_length_beyond_its_record_is_dropped(make: Make, sink: int, captured: int) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources, sink=sink)
    source.write(packet(1, bytes(8), captured=captured), packet(2, bytes(8)))
    assert merge.fill() == order.IDLE
    assert merge.out_packets == 1
    assert merge.source_totals(0) == (2, 1, 0)


def corrupt_length(source: Source) -> None:
    source.poke(DATA_OFFSET + 2 * len(packet(0)) + 4, struct.pack("=I", 36))


def corrupt_head(source: Source) -> None:
    source.poke(HEAD_OFFSET, struct.pack("=Q", 1 << 40))
    source.poke(COMMIT_OFFSET + 256, struct.pack("=Q", 1 << 40))  # its commit slot too


@pytest.mark.parametrize("corrupt", [corrupt_length, corrupt_head])
def test_a_damaged_ring_is_given_up_and_its_loss_is_exact(make: Make, corrupt: Callable[[Source], None]) -> None:
    damaged, other = sources = make(2)
    merge = make_merge(sources)
    damaged.write(packet(1), watermark=1)
    other.packets_at(1, watermark=1)
    assert drain(merge)[1] == [(0, 1), (1, 1)]
    damaged.write(packet(2), packet(3), packet(4), packet(5), watermark=5)
    corrupt(damaged)
    other.packets_at(6, watermark=6)
    damaged.producer.promise(6)
    found = drain(merge)[1]
    consumed, dropped, _ = merge.source_totals(0)
    assert (1, 6) in found, "the other source goes on"
    assert consumed == 5
    assert dropped == 4 - sum(1 for source, at in found if source == 0)
    assert not merge.has_news


def test_after_a_damaged_record_the_same_ring_goes_on(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources)
    source.write(packet(1), packet(2), packet(3))
    corrupt_length(source)
    assert drain(merge) == (order.IDLE, [(0, 1), (0, 2)])
    source.packets_at(4)
    assert drain(merge) == (order.IDLE, [(0, 4)])
    assert merge.source_totals(0) == (4, 1, 0)


def test_a_head_that_goes_back_is_given_up(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources)
    source.packets_at(1, 2)
    assert drain(merge)[1] == [(0, 1), (0, 2)]
    source.poke(HEAD_OFFSET, struct.pack("=Q", 8))
    assert drain(merge) == (order.IDLE, [])
    assert not merge.has_news


@settings(deadline=None, max_examples=200)
@given(
    noise=st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=8)), max_size=8),
    header=st.lists(st.tuples(st.integers(128, 152), st.binary(min_size=1, max_size=8)), max_size=2),
    sink=st.sampled_from([order.SINK_PCAPNG, order.SINK_PCAP_NS, order.SINK_DIGESTS]),
)
def test_whatever_stands_in_a_ring_whole_blocks_come_out(
    noise: list[tuple[int, bytes]], header: list[tuple[int, bytes]], sink: int
) -> None:
    source = Source()
    kind = DIGEST if sink == order.SINK_DIGESTS else PACKET
    body = PLAIN_BODY_BYTES if kind == DIGEST else 20
    source.write(*(record(kind, struct.pack("=II", 20, 20) + bytes(body + n % 2), n) for n in range(8)))
    for offset, value in noise:
        source.poke(DATA_OFFSET + offset, value)
    for offset, value in header:
        source.poke(offset, value)
    merge = make_merge([source], sink=sink, out_bytes=100)
    for _ in range(200):
        status = merge.fill()
        data = bytes(merge.output())
        if sink != order.SINK_PCAP_NS:
            for block in blocks(data):
                assert block[0] == kind
                assert sink == order.SINK_DIGESTS or block[5] <= len(block[7])
        merge.release()
        merge.emptied()
        if status == order.CONTROL:
            merge.control_done()
        elif status == order.EPOCH:
            merge.next_epoch()
        elif status in (order.IDLE, order.ENDED):
            break
    else:
        raise AssertionError("it never comes to rest")
    source.close()


def test_batches_can_be_made_shorter_and_not_longer_again(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources, out_bytes=1 << 20)
    source.packets_at(*range(1, 10), watermark=10)
    merge.shorten_batches(100)
    merge.shorten_batches(1 << 20)
    assert merge.fill() == order.FULL
    assert take(merge) == [(0, 1), (0, 2), (0, 3)]


def test_a_record_that_changes_while_it_is_copied_comes_out_whole(make: Make) -> None:
    """Its lengths flip as fast as a thread can flip them; what was checked must be what is written."""
    (source,) = make(1)
    entry = packet(1, bytes(3000))
    source.write(*[entry] * 20)
    memory = mmap.mmap(source.fd, DATA_OFFSET + CAPACITY)
    words = (ctypes.c_uint32 * ((DATA_OFFSET + CAPACITY) // 4)).from_buffer(memory)
    stop = threading.Event()
    places = [(DATA_OFFSET + n * len(entry)) // 4 for n in range(20)]

    def flip(lengths: ctypes.Array[ctypes.c_uint32]) -> None:
        while not stop.is_set():
            for at in places:
                lengths[at + 1], lengths[at + 5] = 0xFFFFFFF0, 0xFFFFFFF0
                lengths[at + 1], lengths[at + 5] = len(entry), 3000

    flipper = threading.Thread(target=flip, args=(words,))
    flipper.start()
    try:
        for sink in (order.SINK_PCAPNG, order.SINK_PCAP_NS) * 50:
            consumer = Consumer(source.fd, 11)
            merge = order.Merge([consumer], [True], sink=sink, max_wait_ms=1, out_bytes=1 << 20)
            merge.map_interface(0, 0, 0)
            merge.fill()
            if sink == order.SINK_PCAPNG:
                assert all(block[1] == len(entry) and block[5] <= 3000 for block in blocks(bytes(merge.output())))
            else:
                assert merge.out_bytes == merge.out_packets * (16 + 3000)
            assert merge.out_bytes <= 20 * len(entry)
    finally:
        stop.set()
        flipper.join()


# ---- sleeping and asking ----


def test_news_are_seen_when_they_come_before_the_sleep_and_wake_when_they_come_in_it(make: Make) -> None:
    (source,) = sources = make(1)
    merge = make_merge(sources)
    producer = Producer(source.fd, 11, wake := source.wake_fd)
    drain(merge)
    merge.sleeps(True)
    assert not merge.has_news
    producer.push(packet(1))
    producer.publish(1)
    assert merge.has_news
    with open(wake, "rb", closefd=False, buffering=0) as eventfd:
        assert struct.unpack("=Q", eventfd.read(8)) == (1,)
        merge.sleeps(False)
        assert drain(merge)[1] == [(0, 1)]
        producer.promise(5)
        assert eventfd.read(8) is None, "nobody slept, so nobody is woken"
    assert merge.has_news
    drain(merge)
    assert not merge.has_news
    producer.end()
    assert merge.has_news
    assert drain(merge)[0] == order.ENDED
    assert not merge.has_news


def test_only_sources_that_hold_records_up_are_asked_and_not_too_often(make: Make) -> None:
    busy, behind, ahead = sources = make(3)
    merge = make_merge(sources, max_wait_ms=MAX_WAIT_MS)
    drain(merge)
    assert merge.want_watermarks() == 0
    assert not behind.producer.watermark_wanted()
    busy.packets_at(10)
    behind.producer.promise(9)
    ahead.producer.promise(10)
    drain(merge)
    merge.clock_offset_ns = 8 * STEP_NS  # the first request is due at once, whatever the clock says
    assert merge.want_watermarks() == 1
    assert [source.producer.watermark_wanted() for source in sources] == [False, True, False]
    assert merge.want_watermarks() == 1, "it still holds records up"
    assert not behind.producer.watermark_wanted(), "but was asked just now"
    merge.clock_offset_ns += MAX_WAIT_MS * 500_000
    assert merge.want_watermarks() == 1
    assert behind.producer.watermark_wanted()


def test_all_empty_live_sources_are_asked_when_the_stream_must_move(make: Make) -> None:
    sources = make(2)
    merge = make_merge(sources, live=[True, False], max_wait_ms=1)
    drain(merge)
    merge.want_all_watermarks()
    assert [source.producer.watermark_wanted() for source in sources] == [True, False]


def test_a_successor_goes_on_with_its_predecessors_counts(make: Make) -> None:
    (source,) = make(1)
    source.packets_at(1, 2, 3)
    first = make_merge([source])
    drain(first)
    source.packets_at(4)
    successor = order.Merge([Consumer(source.fd, 11)], [True], sink=order.SINK_PCAPNG, max_wait_ms=1, out_bytes=100)
    successor.map_interface(0, 0, 0)
    successor.resume(0, 3, 0, 1)
    assert drain(successor)[1] == [(0, 4)]
    assert successor.source_totals(0) == (4, 0, 1)


def test_the_watermark_offset_is_where_the_layout_says(make: Make) -> None:
    """The offsets that these tests poke at belong to the fields they mean."""
    (source,) = make(1)
    source.packets_at(1, watermark=77)
    assert source.consumer.mapping.watermark_ns == 77
    source.poke(WATERMARK_OFFSET, struct.pack("=q", 78))
    assert source.consumer.mapping.watermark_ns == 78
    assert source.consumer.mapping.head == len(packet(1, bytes(8)))


def test_a_ring_is_crowded_when_more_than_a_quarter_of_it_waits(make: Make) -> None:
    one, other = sources = make(2)
    merge = make_merge(sources)
    other.producer.promise(100)
    one.write(*[packet(10 + i) for i in range(5)])
    drain(merge)
    assert not merge.crowded
    while one.producer.unpublished_bytes <= CAPACITY // 4:
        assert one.producer.push(packet(50))
    one.producer.publish(50)
    drain(merge)
    assert merge.crowded
    merge.release()
    drain(merge)
    assert not merge.crowded
