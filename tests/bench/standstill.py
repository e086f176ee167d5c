"""How long the machine stands still while something is measured.

A host takes a virtual CPU away for milliseconds, sometimes for a hundred, and whoever has to run then is late by as
much. A latency cannot be told from that. So somebody who only sleeps for a millisecond, over and over, is beside it on
each CPU: what was measured while that sleeper was late is measured again. That looks at the machine alone, never at the
figure, as `pace` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from bench.disturbance import Watch, least_disturbed, repeated
from bench.measure import percentile

SLEEP_S = 0.001
STILL_MS = 2.0  # a sleeper that is hardly ever later has seen a machine that runs
TRIES = 4


class Beside(Protocol):
    """What was measured beside a sleeper. `sleeper_ms`: its lateness, the 99th percentile."""

    @property
    def sleeper_ms(self) -> float: ...


T = TypeVar("T", bound=Beside)


class Sleeper(Watch):
    """Sleeps on `cpus` from `__enter__` to `__exit__`."""

    def __init__(self, cpus: Iterable[int]) -> None:
        self._late_ms: dict[int, list[float]] = {cpu: [] for cpu in cpus}
        super().__init__(self._late_ms, interval_s=0)

    def late_ms(self, fraction: float) -> float:
        """Of its sleeps, so many were late by this at most, on the CPU where they were latest."""
        return max((percentile(late, fraction) for late in self._late_ms.values() if late), default=0.0)

    def look(self, cpu: int) -> None:
        before = time.monotonic()
        time.sleep(SLEEP_S)
        self._late_ms[cpu].append((time.monotonic() - before - SLEEP_S) * 1000)


def undisturbed(measure: Callable[[], T]) -> T:
    """The first of TRIES beside which the sleeper was in time; else that beside which it was least late."""

    def beside() -> tuple[float, T]:
        found = measure()
        return found.sleeper_ms, found

    return least_disturbed(repeated(beside, STILL_MS, TRIES))
