"""How fast the CPUs go while something is measured.

A virtual CPU may share its core with a neighbour on the host (two hardware threads of one core). While the neighbour is
busy everything here takes up to twice as long, and the scheduler counts it as ours: nothing that the guest can read
tells. So a small piece of work, always the same, is timed on every CPU, over and over. What was measured while it took
longer is measured again. That looks at the machine alone, never at the figure, and is done alike for every program.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

from bench.disturbance import Watch, least_disturbed, repeated

INTERVAL_S = 0.02
TURNS = 24_000  # of the piece of work: some 0.2 ms, a hundredth of a CPU
WINDOW = 10  # samples: so many, on average, say how fast a CPU can go
SLOWED = 1.4  # times what it took in the fastest window; a program that uses the caches makes it a tenth slower
HINDERED = 0.1  # share of the samples
TRIES = 4
SETTLE_S = 2.0  # so long the machine is watched before the first measurement

T = TypeVar("T")


class Span:
    """The part of a measurement that matters: `with span: ...`. Without that, all of it."""

    def __init__(self, samples: Mapping[int, Sequence[int]]) -> None:
        self._samples = samples
        self._begin = self._now()
        self._end: dict[int, int] | None = None

    def __enter__(self) -> None:
        self._begin = self._now()

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._end = self._now()

    def samples(self, cpu: int) -> Sequence[int]:
        return self._samples[cpu][self._begin[cpu] : None if self._end is None else self._end[cpu]]

    def _now(self) -> dict[int, int]:
        return {cpu: len(samples) for cpu, samples in self._samples.items()}


class Pace(Watch):
    """Watches `cpus` from `__enter__` to `__exit__`, by the CPU time in ns that `work_ns` says it took.

    `measured`: measurements so far; `repeated`: those that were thrown away, of all together not many more than one for
    two that were kept: a host that is always busy makes a benchmark half as long again, not endless, and to measure
    there once more helps little. `hindered`: those that were kept although every try was slowed.
    """

    def __init__(
        self, cpus: Iterable[int], work_ns: Callable[[], int] | None = None, settle_s: float = SETTLE_S
    ) -> None:
        self._work_ns = work_ns or _piece_of_work
        self._settle_s = settle_s
        self._samples: dict[int, list[int]] = {cpu: [] for cpu in cpus}
        self._fastest_ns: dict[int, float] = {}
        super().__init__(self._samples, INTERVAL_S)
        self.measured = self.repeated = self.hindered = 0

    def __enter__(self) -> Self:
        super().__enter__()
        time.sleep(self._settle_s)
        return self

    def steadiest(self, measure: Callable[[Span], T], cpus: Iterable[int] | None = None) -> T:
        """What `measure` found while these CPUs (all of them) went at their pace; after TRIES without that, or fewer if
        too much was thrown away before, what it found when they were slowed least. The part that matters is to run
        inside of the span that it is given."""
        watched = list(self._samples if cpus is None else cpus)

        def paced() -> tuple[float, T]:
            span = Span(self._samples)
            value = measure(span)
            return max((self.slowness(cpu, span) for cpu in watched), default=0.0), value

        found = repeated(paced, HINDERED, min(TRIES, TRIES + self.measured // 2 - self.repeated))
        self.measured += 1
        self.repeated += len(found) - 1
        self.hindered += found[-1][0] > HINDERED
        return least_disturbed(found)

    def slowness(self, cpu: int, span: Span) -> float:
        """The share of the span in which the CPU was slowed, 0 to 1."""
        meanwhile = span.samples(cpu)
        if not meanwhile or cpu not in self._fastest_ns:
            return 0.0
        limit_ns = SLOWED * self._fastest_ns[cpu]
        return sum(sample > limit_ns for sample in meanwhile) / len(meanwhile)

    @property
    def text(self) -> str:
        """For people; empty when nothing was measured that way."""
        if not self.measured:
            return ""
        return (
            f"{self.measured} measurements; {self.repeated} more were thrown away because the host slowed a CPU "
            f"meanwhile, {self.hindered} were kept although it did so each time"
        )

    def look(self, cpu: int) -> None:
        samples = self._samples[cpu]
        samples.append(self._work_ns())
        if len(samples) >= WINDOW:
            window_ns = _mean(samples[-WINDOW:])
            self._fastest_ns[cpu] = min(self._fastest_ns.get(cpu, window_ns), window_ns)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def _piece_of_work() -> int:
    """The CPU time that it took, in ns: what others ran in between is not in it."""
    before = time.thread_time_ns()
    for _ in range(TURNS):
        pass
    return time.thread_time_ns() - before
