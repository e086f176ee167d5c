"""What a machine that stands still has spoilt is measured again."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
from support.lab import wait_until

from bench.standstill import STILL_MS, TRIES, Sleeper, undisturbed


@dataclass(frozen=True)
class Round:
    sleeper_ms: float


@pytest.mark.parametrize(
    ("late_ms", "rounds", "kept_ms"),
    [
        ([0.1], 1, 0.1),
        ([STILL_MS], 1, STILL_MS),
        ([50.0, 3.0, 0.2], 3, 0.2),
        ([50.0, 3.0, 9.0, 7.0], TRIES, 3.0),
    ],
)
def test_the_first_round_with_a_sleeper_in_time_counts_or_the_one_with_the_least_late(
    late_ms: list[float], rounds: int, kept_ms: float
) -> None:
    measured: list[Round] = []

    def measure() -> Round:
        measured.append(Round(late_ms[len(measured)]))
        return measured[-1]

    assert undisturbed(measure).sleeper_ms == kept_ms
    assert len(measured) == rounds


def test_a_sleeper_tells_how_late_it_was_on_the_worst_cpu() -> None:
    sleeper = Sleeper(sorted(os.sched_getaffinity(0)))
    with sleeper:
        wait_until(lambda: sleeper.late_ms(0.0) > 0, "sleeps", 20.0)
    assert 0 < sleeper.late_ms(0.0) <= sleeper.late_ms(0.5) <= sleeper.late_ms(1.0)


def test_where_nobody_sleeps_nobody_is_late() -> None:
    with Sleeper(()) as sleeper:
        assert sleeper.late_ms(0.99) == 0
