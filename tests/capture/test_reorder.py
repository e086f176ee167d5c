"""The tail of a live source against a list, and its promises."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from appliance.capture.reorder import ReorderTail
from appliance.ring import memory
from appliance.ring.ring import Consumer, Producer, initialise

CAPACITY = 1 << 16
EVERYTHING = (1 << 64) - 1


class Ring:
    """Both ends of one ring."""

    def __init__(self) -> None:
        self.fd = memory.allocate(CAPACITY, "test")
        initialise(self.fd, CAPACITY, 1)
        self.producer = Producer(self.fd, 1)
        self.consumer = Consumer(self.fd, 1)

    def read(self) -> list[tuple[int, int]]:
        """(time, serial number) of what was published since the last look."""
        found = []
        while (record := self.consumer.pop()) is not None:
            found.append((struct.unpack_from("=Q", record, 12)[0], struct.unpack_from("=I", record, 20)[0]))
        self.consumer.release()
        return found

    def close(self) -> None:
        os.close(self.fd)


def record(timestamp_ns: int, serial: int, size: int) -> bytes:
    length = 28 + size * 4
    return struct.pack("=IIIQI", 6, length, 0, timestamp_ns, serial) + bytes(size * 4) + struct.pack("=I", length)


class TailAgainstList(RuleBasedStateMachine):
    """`arrived` is the tail in the order of arrival; everything else follows from it."""

    @initialize(with_digests=st.booleans(), capacity=st.sampled_from([3, 1000]))
    def begin(self, with_digests: bool, capacity: int) -> None:
        self.records, self.digests = Ring(), Ring()
        self.digest_producer = self.digests.producer if with_digests else None
        self.tail = ReorderTail(capacity)
        self.capacity = capacity
        self.arrived: list[tuple[int, int, bool]] = []
        self.late: set[int] = set()
        self.newest_published = self.serial = self.reordered = 0

    @rule(timestamp_ns=st.integers(0, 30), size=st.integers(0, 5), has_digest=st.booleans())
    def push(self, timestamp_ns: int, size: int, has_digest: bool) -> None:
        digest = record(timestamp_ns, self.serial, 5 - size) if has_digest else b""
        entry = record(timestamp_ns, self.serial, size)
        accepted = self.tail.push(self.records.producer, self.digest_producer, entry, digest, timestamp_ns)
        assert accepted == (len(self.arrived) < self.capacity)
        if accepted:
            self.arrived.append((timestamp_ns, self.serial, has_digest))
            if timestamp_ns < self.newest_published:
                self.late.add(self.serial)
            self.serial += 1

    @rule(boundary_ns=st.integers(0, 40) | st.just(EVERYTHING))
    def publish(self, boundary_ns: int) -> None:
        count = max(
            (
                n
                for n in range(len(self.arrived) + 1)
                if all(at <= boundary_ns for at, *_ in self.arrived[:n])
                and all(a[0] <= b[0] for a in self.arrived[:n] for b in self.arrived[n:])
            ),
        )
        taken, self.arrived = self.arrived[:count], self.arrived[count:]
        self.reordered += sum(b[0] < a[0] for a, b in itertools.pairwise(taken))
        published, watermark, late = self.tail.publish(self.records.producer, self.digest_producer, boundary_ns)
        assert published == count
        assert late == sum(serial in self.late for _, serial, _ in taken)
        taken.sort()
        assert self.records.read() == [(at, serial) for at, serial, _ in taken]
        digests = [(at, serial) for at, serial, has_digest in taken if has_digest]
        assert self.digests.read() == (digests if self.digest_producer else [])
        assert all(at >= watermark for at, *_ in self.arrived if at < boundary_ns)
        oldest_left = min((at for at, *_ in self.arrived), default=EVERYTHING)
        assert watermark == min(boundary_ns, oldest_left, EVERYTHING >> 1)
        assert self.records.consumer.watermark_ns == watermark
        self.newest_published = max([self.newest_published, *(at for at, *_ in taken)])
        assert self.tail.reordered == self.reordered

    @rule()
    def step_the_clock(self) -> None:
        self.publish(EVERYTHING)
        self.tail.new_epoch()
        self.newest_published = 0

    @invariant()
    def the_tail_holds_what_is_not_published(self) -> None:
        if hasattr(self, "tail"):
            assert self.tail.waiting == len(self.arrived)

    def teardown(self) -> None:
        if hasattr(self, "tail"):
            self.publish(EVERYTHING)
            assert self.arrived == []
            self.records.close()
            self.digests.close()


TestTailAgainstList = TailAgainstList.TestCase
TestTailAgainstList.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring()
    yield made
    made.close()


def put(tail: ReorderTail, ring: Ring, *times: int) -> None:
    for serial, at in enumerate(times):
        assert tail.push(ring.producer, None, record(at, serial, 0), b"", at)


def test_disorder_within_the_held_tail_is_put_right(ring: Ring) -> None:
    tail = ReorderTail()
    put(tail, ring, 10, 12, 11, 13)
    assert tail.publish(ring.producer, None, 12) == (3, 12, 0)
    assert [at for at, _ in ring.read()] == [10, 11, 12]
    assert (tail.reordered, tail.waiting) == (1, 1)


def test_what_an_older_one_may_still_follow_is_not_cut_off(ring: Ring) -> None:
    """12 is within the boundary, but 11 came behind 20: publishing 12 and not 20 would leave a hole in the arrivals."""
    tail = ReorderTail()
    put(tail, ring, 10, 12, 20, 11)
    assert tail.publish(ring.producer, None, 15) == (1, 11, 0)
    assert [at for at, _ in ring.read()] == [10]
    assert tail.publish(ring.producer, None, 20) == (3, 20, 0)
    assert [at for at, _ in ring.read()] == [11, 12, 20]


def test_what_comes_later_than_the_tail_was_held_is_late_and_still_published(ring: Ring) -> None:
    tail = ReorderTail()
    put(tail, ring, 10)
    tail.publish(ring.producer, None, 10)
    put(tail, ring, 9, 8)
    assert tail.publish(ring.producer, None, 10) == (2, 10, 2)
    assert [at for at, _ in ring.read()] == [10, 8, 9]


def test_after_a_clock_step_earlier_times_are_not_late(ring: Ring) -> None:
    tail = ReorderTail()
    put(tail, ring, 1000)
    tail.publish(ring.producer, None, EVERYTHING)
    tail.new_epoch()
    put(tail, ring, 5)
    assert tail.publish(ring.producer, None, 5) == (1, 5, 0)


def test_a_full_tail_takes_nothing(ring: Ring) -> None:
    tail = ReorderTail(2)
    put(tail, ring, 1, 2)
    before = ring.producer.unpublished_bytes
    assert not tail.push(ring.producer, None, record(3, 3, 0), b"", 3)
    assert ring.producer.unpublished_bytes == before
