"""What `pace` and `standstill` have in common: somebody looks at each CPU all the while, and what was measured while a
CPU was disturbed is measured again."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar

from support.lab import uninterrupted

T = TypeVar("T")


class Watch(ABC):
    """Calls `look` in a thread on each of `cpus`, every `interval_s`, from `__enter__` to `__exit__`."""

    def __init__(self, cpus: Iterable[int], interval_s: float) -> None:
        self._interval_s = interval_s
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(cpu,), daemon=True) for cpu in cpus]

    @abstractmethod
    def look(self, cpu: int) -> None: ...

    def __enter__(self) -> Self:
        with uninterrupted():  # the main thread makes and removes laboratories
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def _run(self, cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})  # of this thread
        while not self._ends.wait(self._interval_s):
            self.look(cpu)


def repeated(measure: Callable[[], tuple[float, T]], limit: float, tries: int) -> list[tuple[float, T]]:
    """How much each try was disturbed, and what it found: up to the first that was by `limit` at most; one at least."""
    found: list[tuple[float, T]] = []
    while not found or (found[-1][0] > limit and len(found) < tries):
        found.append(measure())
    return found


def least_disturbed(found: list[tuple[float, T]]) -> T:
    return min(found, key=lambda one: one[0])[1]
