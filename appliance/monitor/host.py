"""Figures that are on no counter page: processes, network cards, file systems; looked up by a thread of their own.

A file system can hang (a network mount, a dying disk), and a directory can hold a hundred thousand files. Neither may
delay a scrape, so the snapshot takes what was found last, and never waits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable

import psutil

from appliance.counters import CounterPages
from appliance.monitor.view import HostFigures, ProcessFigures, StorageFigures, Topology

REFRESH_S = 5.0


class HostSampler:
    """Refreshes `figures` every few seconds, in a daemon thread that `stop` or the end of the process ends."""

    def __init__(self, pages: CounterPages, topology: Topology, refresh_s: float = REFRESH_S) -> None:
        self._pages = pages
        self._topology = topology
        self._refresh_s = refresh_s
        self._figures = HostFigures()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="host-sampler", daemon=True)

    def figures(self) -> HostFigures:
        return self._figures

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while True:
            # One assignment of a frozen value: a reader sees the old figures or the new ones, never a mixture.
            self._figures = sample(self._pages, self._topology)
            if self._stopped.wait(self._refresh_s):
                return


def sample(pages: CounterPages, topology: Topology) -> HostFigures:
    """Asks the host now. What cannot be found out (a process that ended, a directory that is gone) is left out."""
    pids = {pages[worker.name]["pid"] for worker in topology.workers} - {0}
    names = {source.interface for source in topology.sources if source.is_live}
    processes = {pid: process_figures(pid) for pid in pids}
    storage = {output.name: storage_figures(output.directory) for output in topology.outputs}
    return HostFigures(
        processes={pid: figures for pid, figures in processes.items() if figures},
        nic_dropped_packets=nic_dropped_packets(names),
        storage={name: figures for name, figures in storage.items() if figures},
    )


def process_figures(pid: int) -> ProcessFigures | None:
    """None: there is no such process (any more)."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            return ProcessFigures(times.user + times.system, process.memory_info().rss, _open_descriptors(process))
    except (psutil.Error, OSError):
        return None


def _open_descriptors(process: psutil.Process) -> int | None:
    """None: the kernel hides them, as it does those of a process that has dropped privileges."""
    try:
        return process.num_fds()
    except psutil.AccessDenied:
        return None


def nic_dropped_packets(names: Iterable[str]) -> dict[str, int]:
    """What the cards and drivers dropped before the kernel's capture point saw it, by interface."""
    counters = psutil.net_io_counters(pernic=True, nowrap=True)
    return {name: counters[name].dropin for name in names if name in counters}


def storage_figures(directory: str) -> StorageFigures | None:
    """None: the directory is gone."""
    try:
        usage = psutil.disk_usage(directory)
        return StorageFigures(usage.free, usage.total, _oldest_file_s(os.path.join(directory, "ready")))
    except OSError:
        return None


def _oldest_file_s(directory: str) -> float | None:
    # The names begin with their file's start in UTC, so the smallest name is the oldest file: one stat, not thousands.
    try:
        with os.scandir(directory) as entries:
            first = min((entry.name for entry in entries), default=None)
        return os.stat(os.path.join(directory, first)).st_mtime if first is not None else None
    except FileNotFoundError:  # no file yet, or a consumer took it between the two looks
        return None
