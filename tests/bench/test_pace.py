"""What the host slowed is measured again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from support.lab import wait_until

from bench.pace import TRIES, WINDOW, Pace, Span

FAST_NS, SLOW_NS = 100, 200
SAMPLES = 20
CPU = min(os.sched_getaffinity(0))


class Machine:
    """A CPU whose speed the test sets: the piece of work takes what stands in `next_ns`, without that FAST_NS."""

    def __init__(self) -> None:
        self.next_ns: list[int] = []
        self.pieces = 0

    def work_ns(self) -> int:
        self.pieces += 1
        return self.next_ns.pop(0) if self.next_ns else FAST_NS

    def pass_time(self, samples: int) -> None:
        end = self.pieces + samples + 1  # one may be on its way
        wait_until(lambda: self.pieces > end, "pieces of work", 20.0)

    @contextmanager
    def watched(self) -> Iterator[Pace]:
        with Pace([CPU], self.work_ns, settle_s=0.0) as pace:
            self.pass_time(WINDOW)
            yield pace

    def measure(self, span: Span, slow: int) -> int:
        """So many of the samples are slow."""
        with span:
            self.next_ns = [SLOW_NS] * slow
            self.pass_time(SAMPLES)
        return slow


def measured(pace: Pace, machine: Machine, slow: Sequence[int]) -> int:
    turns = iter(slow)
    return pace.steadiest(lambda span: machine.measure(span, next(turns)))


def test_what_was_slowed_is_measured_again() -> None:
    machine = Machine()
    with machine.watched() as pace:
        assert measured(pace, machine, [20, 10, 0]) == 0
    assert (pace.measured, pace.repeated, pace.hindered) == (1, 2, 0)


def test_a_moment_of_slowness_does_not_matter() -> None:
    machine = Machine()
    with machine.watched() as pace:
        assert measured(pace, machine, [1]) == 1
    assert (pace.measured, pace.repeated, pace.hindered) == (1, 0, 0)


def test_of_nothing_but_slowed_ones_the_least_slowed_is_kept_and_said() -> None:
    machine = Machine()
    with machine.watched() as pace:
        assert measured(pace, machine, [20, 15, 8, 18]) == 8
    assert (pace.measured, pace.repeated, pace.hindered) == (1, TRIES - 1, 1)
    assert "1 were kept" in pace.text


def test_on_a_host_that_is_always_busy_half_as_many_as_are_kept_are_thrown_away() -> None:
    machine = Machine()
    with machine.watched() as pace:
        for _ in range(12):
            measured(pace, machine, [20] * TRIES)
    assert (pace.measured, pace.hindered) == (12, 12)
    assert pace.measured // 2 <= pace.repeated <= TRIES - 1 + pace.measured // 2


def test_slowness_outside_of_the_span_does_not_matter() -> None:
    machine = Machine()

    def measure(span: Span) -> str:
        machine.next_ns = [SLOW_NS] * SAMPLES
        machine.pass_time(SAMPLES)
        machine.measure(span, 0)
        return "found"

    with machine.watched() as pace:
        assert pace.steadiest(measure) == "found"
    assert pace.repeated == 0


def test_a_machine_that_nobody_watches_measures_once() -> None:
    calls: list[Span] = []
    assert Pace(()).steadiest(calls.append) is None
    assert len(calls) == 1
