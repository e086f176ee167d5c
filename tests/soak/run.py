"""One run of the soak test: the service, its traffic, the faults, and the balance."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from support.identities import Traffic, balance, quarantined_packets
from support.judges import check_numbered
from support.lab import Lab, Sender, end_process
from support.service import Service, descendants

from appliance.monitor.view import InterfaceView, Snapshot

T = TypeVar("T")
LABELS = ("a", "b", "c", "d")
REST_S = 60.0
LEAST_PAUSE_S = 0.5
FLAT_RESIDENT_BYTES = 48 << 20  # how much all processes together may differ from the first rounds
FLAT_DESCRIPTORS = 12
SINK = Path(__file__).parents[1] / "support" / "ipfix_sink.py"


@dataclass
class Measure:
    """What must stay flat, with everything at rest."""

    processes: int
    descriptors: int
    resident_bytes: int
    staging_files: int
    shared_memory: int

    @classmethod
    def of(cls, service: Service) -> Measure:
        """Zombies count as processes; one that ends while we look counts no further."""
        pids = service.processes()
        descriptors = resident = 0
        for pid in pids:
            with contextlib.suppress(OSError):
                descriptors += len(os.listdir(f"/proc/{pid}/fd"))
                resident += private_bytes(pid)
        staged = len(list((service.directory / "work").iterdir()))
        return cls(len(pids), descriptors, resident, staged, named_shared_memory())


def named_shared_memory() -> int:
    """What Python's shared memory and semaphores would be called; other programs have names there too."""
    return sum(name.startswith(("psm_", "sem.", "ring-", "appliance")) for name in os.listdir("/dev/shm"))


def private_bytes(pid: int) -> int:
    """Memory that the process shares with nobody."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_"):
            total += int(line.split()[1]) << 10
    return total


class Soak:
    """See the module's text. Faults are methods that begin with `fault_`; each ends what it began."""

    def __init__(self, lab: Lab, directory: Path, disk: Path, chance: random.Random, rate: int) -> None:
        self.lab = lab
        self.disk = disk
        self.chance = chance
        self.rate = rate
        self.sink_file = directory / "flows-received"
        self.collector = self.start_collector()
        self.traffic = Traffic(lab, {label: lab.veth(label)[1] for label in LABELS})
        self.service = Service(
            lab,
            directory,
            [{"uri": f"ring:{label}", "kernel_ring_bytes": 64 << 20} for label in LABELS],
            output={
                "directory": str(disk / "out"),
                "rotate_seconds": 5,
                "compressor_timeout_s": 5,
                "min_free_bytes": 0,
            },
            meter={"enabled": True, "idle_timeout_s": 5, "export": [{"uri": "tcp://127.0.0.1:4739"}]},
            service={"restart_limit": 1000, "restart_window_s": 1, "heartbeat_timeout_s": 3},
        )
        self.service.directory = disk / "out"
        self.started = time.monotonic()
        self.rounds = 0
        self.done: Counter[str] = Counter()
        self.measures: list[Measure] = []
        self.held = dict.fromkeys(LABELS, 0)  # frames found in files, of those that were taken away
        self.highest = dict.fromkeys(LABELS, -1)
        self.in_files = 0
        self.last: Snapshot | None = None
        self.faults: list[Callable[[], None]] = [
            getattr(self, name) for name in sorted(dir(self)) if name.startswith("fault_")
        ]

    # ---- a round ----

    def round(self, seconds: float, faults: int) -> None:
        self.sender = self.start_traffic()
        end = time.monotonic() + seconds
        for number in range(faults):
            time.sleep(max(LEAST_PAUSE_S, (end - time.monotonic()) / (faults - number) * self.chance.uniform(0.3, 1)))
            if time.monotonic() >= end:
                break
            fault = self.chance.choice(self.faults)
            self.done[fault.__name__.removeprefix("fault_")] += 1
            fault()
        time.sleep(max(0.0, end - time.monotonic()))
        self.traffic.stop(self.sender)
        self.settle()
        self.rounds += 1
        self.tell()

    def settle(self) -> None:
        """Everything rests: identities, files, and what must stay flat."""
        self.service.heard("")  # its manager listens
        # A file that could not be moved when its disk was full is moved within some seconds.
        self.last = balance(self.service, self.traffic.sent, timeout_s=REST_S)
        files = self.last.outputs[0].files_published
        self.patiently(lambda: self.service.ask("rotate"))
        self.service.wait_until(
            lambda: self.patiently(self.service.snapshot).outputs[0].files_published > files,
            "the open file is published",
            REST_S,
        )
        self.last = balance(self.service, self.traffic.sent, timeout_s=REST_S)
        self.take_files()
        time.sleep(LEAST_PAUSE_S)
        self.measures.append(Measure.of(self.service))

    def take_files(self) -> None:
        """Reads every published file but the newest, and deletes it, as a consumer does; counts go on over rounds."""
        assert self.last is not None
        paths = self.service.ready()
        report = check_numbered(paths)
        for number, label in enumerate(LABELS):
            found = report[number]
            assert (found.duplicates, found.corrupt) == (0, 0), (label, found.duplicates, found.corrupt)
            assert not found.unexpected(self.traffic.each), label
            assert not found.sequences or min(found.sequences) > self.highest[label], f"{label}: a frame came twice"
            self.held[label] += found.received
            self.highest[label] = max(found.sequences, default=self.highest[label])
        assert (report.foreign, report.unreadable) == (0, 0)
        self.in_files += report.packets
        for path in paths:
            path.unlink()
        written = sum(view.written_packets for view in self.last.interfaces)
        aside = quarantined_packets(self.disk / "out")
        assert self.in_files + aside == written, f"{self.in_files} in files + {aside} set aside != {written} written"
        missing = sum(self.traffic.each - self.held[label] for label in LABELS)
        lost = sum(view.lost_packets for view in self.last.interfaces)
        assert missing == lost + aside, f"{missing} frames are missing, {lost} are counted as lost, {aside} set aside"

    def tell(self) -> None:
        assert self.last is not None
        lost = sum(view.lost_packets for view in self.last.interfaces)
        measure = self.measures[-1]
        print(
            f"{time.monotonic() - self.started:6.0f} s  round {self.rounds}: received "
            f"{4 * self.traffic.each:,} = in files {self.in_files:,} + set aside "
            f"{self.last.outputs[0].quarantined_packets:,} + lost {lost:,} | {sum(self.done.values())} faults | "
            f"{measure.processes} processes, {measure.descriptors} descriptors, {measure.resident_bytes >> 20} MiB, "
            f"{measure.staging_files} staged | exact",
            flush=True,
        )

    def finish(self) -> None:
        """The stop, and the judgement over all rounds."""
        assert self.service.stop(60) == 0, self.service.log
        end_process(self.collector)
        assert "Traceback" not in self.service.log
        left = self.service.leftover_processes()
        assert left == [], left
        self.assert_flat()
        print("soak: faults: " + ", ".join(f"{name} {count}" for name, count in sorted(self.done.items())))
        print(f"soak: passed: {self.rounds} rounds, {4 * self.traffic.each:,} frames, every identity exact", flush=True)

    def assert_flat(self) -> None:
        """The last third of the rounds beside the first: medians, for a compressor may be there or not."""
        if len(self.measures) < 3:
            return
        third = max(1, len(self.measures) // 3)
        first, last = self.measures[:third], self.measures[-third:]
        for name, allowed in (
            ("processes", 2),
            ("descriptors", FLAT_DESCRIPTORS),
            ("resident_bytes", FLAT_RESIDENT_BYTES),
            ("staging_files", 2),
            ("shared_memory", 0),
        ):
            before = sorted(getattr(measure, name) for measure in first)[third // 2]
            after = sorted(getattr(measure, name) for measure in last)[third // 2]
            print(f"soak: {name}: {before:,} at first, {after:,} at last")
            assert after - before <= allowed, f"{name} grows: {before} -> {after}"

    # ---- faults ----

    def pid(self, worker: str) -> int:
        return self.patiently(self.service.pids)[worker]

    def patiently(self, ask: Callable[[], T]) -> T:
        """What the control socket answers; the monitor may be between two lives."""
        deadline = time.monotonic() + REST_S
        while True:
            try:
                return ask()
            except OSError:
                assert time.monotonic() < deadline, "the control socket does not answer"
                time.sleep(0.05)

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    def fault_kill_capture(self) -> None:
        self.kill(self.pid(f"capture/{self.chance.choice(LABELS)}"))

    def fault_kill_merge(self) -> None:
        self.kill(self.pid("merge/main"))

    def fault_kill_meter(self) -> None:
        self.kill(self.pid("meter"))

    def fault_kill_monitor(self) -> None:
        self.kill(self.pid("monitor"))

    def fault_kill_compressor(self) -> None:
        for pid in descendants(self.pid("merge/main"))[:1]:
            self.kill(pid)

    def fault_stop_worker(self) -> None:
        """For a moment, or for so long that it is ended."""
        pid = self.pid(self.chance.choice(["capture/a", "merge/main", "meter"]))
        self.kill(pid, signal.SIGSTOP)
        time.sleep(self.chance.choice([0.3, 1.5, 4]))
        self.kill(pid, signal.SIGCONT)

    def fault_stop_compressor(self) -> None:
        for pid in descendants(self.pid("merge/main"))[:1]:
            self.kill(pid, signal.SIGSTOP)

    def fault_full_disk(self) -> None:
        status = os.statvfs(self.disk)
        filler = self.disk / "filler"
        try:
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - (64 << 10)))
            time.sleep(self.chance.uniform(1, 4))
        except OSError:
            pass  # it was as good as full already
        finally:
            filler.unlink(missing_ok=True)

    def fault_interface_flap(self) -> None:
        """Down and up, or deleted and made again. Nothing is sent meanwhile: nobody would see it."""
        self.traffic.stop(self.sender)
        label = self.chance.choice(LABELS)
        if self.chance.random() < 0.5:
            self.lab.down(label)
            time.sleep(self.chance.uniform(0.1, 2))
            self.lab.up(label)
            self.service.wait_until(lambda: self.lab.carrier(self.traffic.wires[label]), "the carrier")
        else:
            reopened = self.interface(label).reopened
            self.lab.recreate(label)
            self.service.wait_until(lambda: self.interface(label).reopened > reopened, f"{label} is open again", REST_S)
        self.sender = self.start_traffic()

    def interface(self, label: str) -> InterfaceView:
        return self.patiently(lambda: self.service.interface(label))

    def start_traffic(self) -> Sender:
        return self.traffic.start(self.rate, flows=2000, sizes=(80, 600, 1514))

    def fault_collector_restart(self) -> None:
        end_process(self.collector)
        time.sleep(self.chance.uniform(0, 2))
        self.collector = self.start_collector()

    def fault_collector_stall(self) -> None:
        self.kill(self.collector.pid, signal.SIGSTOP)
        time.sleep(self.chance.uniform(0.5, 3))
        self.kill(self.collector.pid, signal.SIGCONT)

    def fault_reload_and_rotate(self) -> None:
        self.service.signal(signal.SIGHUP)
        self.service.signal(signal.SIGUSR1)

    def fault_silent_clients(self) -> None:
        """Of the control socket: they say nothing, and go."""
        clients = [socket.socket(socket.AF_UNIX) for _ in range(20)]
        for client in clients:
            try:
                client.connect(self.service.config["monitor"]["control_socket"])
            except OSError:
                break
        time.sleep(0.5)
        for client in clients:
            client.close()

    def start_collector(self) -> subprocess.Popen[Any]:
        return self.lab.popen([sys.executable, str(SINK), "tcp", "4739", str(self.sink_file)])
