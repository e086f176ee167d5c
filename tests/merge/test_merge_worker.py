"""The merge worker's loop in a thread of the test, with real files, rings and messages."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from merge.rings import S, Source, packet
from support.judges import capinfos, packets
from support.lab import requires_tool, wait_until

from appliance.config import Config, Interface, Output, Service
from appliance.counters import MERGE_FIELDS, MERGE_SOURCE_FIELDS, SUPERVISOR_FIELDS, CounterPages
from appliance.errors import ApplianceError, CannotCreateError, InputOutputError
from appliance.formats.encode import InterfaceDescription, interface_record
from appliance.merge.compressor import compressor_argv
from appliance.merge.naming import ApplianceNaming, SingleFileNaming, prepare_directories
from appliance.process import DRAIN, ROTATE, WorkerContext
from workers.merge import MergeParts, MergeSource, MergeWorker

T0 = 1_700_000_040 * S


class Running:
    """One merge worker, from its start to its end."""

    def __init__(self, directory: Path, count: int = 1, *, live: bool = True, **changes: Any) -> None:
        parts_changes = {key: changes.pop(key) for key in list(changes) if key in PARTS}
        self.directory = directory
        self.beats = 0
        settings: dict[str, Any] = {"compressor": "none", "rotate_seconds": 0, "rotate_bytes": 0, "min_free_bytes": 0}
        output = Output(directory=str(directory), **(settings | changes))
        naming = parts_changes.pop("naming", None) or ApplianceNaming(directory, "main", ".pcapng")
        if directory.parent.is_dir() and not directory.is_file():
            prepare_directories(naming)
        self.sources = [Source(1 << 20) for _ in range(count)]
        labels = [chr(ord("a") + i) for i in range(count)]
        self.pages = CounterPages(
            [
                ("supervisor", SUPERVISOR_FIELDS),
                ("merge/main", MERGE_FIELDS),
                *((f"merge/main/{label}", MERGE_SOURCE_FIELDS) for label in labels),
            ]
        )
        self.page = self.pages["merge/main"]
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        interfaces = (InterfaceDescription(1),) if live else ()
        parts = MergeParts(
            output=output,
            sources=tuple(
                MergeSource(label, f"merge/main/{label}", live, source.fd, source.wake_fd, interfaces)
                for label, source in zip(labels, self.sources, strict=True)
            ),
            generation=11,
            wake_fd=self.wake_fd,
            naming=naming,
            compressor=compressor_argv(output.compressor),
            is_successor=False,
        )
        self.context = WorkerContext(
            name="merge/main",
            pages=self.pages,
            page=self.page,
            channel=theirs,
            topology=None,
            config=Config(interfaces=(Interface(uri="ring:lo"),), service=Service(drain_timeout_s=10)),
            parts=dataclasses.replace(parts, **parts_changes),
        )
        self.context.beat = self._beat  # type: ignore[method-assign]
        self.status: int | ApplianceError | None = None
        self.thread = threading.Thread(target=self._run)

    def _beat(self) -> None:
        self.beats += 1

    def _run(self) -> None:
        try:
            self.status = MergeWorker(self.context, self.context.parts).run()
        except ApplianceError as error:
            self.status = error

    def start(self) -> Running:
        self.thread.start()
        return self

    def wake(self) -> None:
        os.eventfd_write(self.wake_fd, 1)

    def publish(self, index: int, *records: bytes, watermark: int | None = None) -> None:
        self.sources[index].write(*records, watermark=watermark)
        self.wake()

    def end(self) -> int | ApplianceError | None:
        for source in self.sources:
            source.producer.end()
        self.wake()
        self.thread.join(20)
        return self.status

    def drain(self) -> None:
        self.channel.send(DRAIN)
        self.wake()

    def files(self) -> list[Path]:
        return sorted((self.directory / "ready").iterdir())

    def close(self) -> None:
        if self.thread.is_alive() and self.channel.fileno() >= 0:
            self.drain()
        self.end()
        assert not self.thread.is_alive()
        for source in self.sources:
            source.close()
        self.channel.close()
        self.context.channel.close()
        os.close(self.wake_fd)


PARTS = {field.name for field in dataclasses.fields(MergeParts)}
Make = Callable[..., Running]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Running] = []

    def make_worker(*arguments: Any, **changes: Any) -> Running:
        made.append(Running(tmp_path / "out", *arguments, **changes))
        return made[-1].start()

    yield make_worker
    for running in made:
        running.close()


def stamps(paths: list[Path]) -> list[int]:
    return [found.time_ns for path in paths for found in packets(path)]


def test_what_two_rings_bring_comes_out_in_order_and_the_balance_is_exact(make: Make) -> None:
    worker = make(2)
    now = time.time_ns()
    worker.publish(0, packet(now + 1), packet(now + 4), watermark=now + 4)
    worker.publish(1, packet(now + 2), packet(now + 3), watermark=now + 4)
    assert worker.end() == 0
    assert stamps(worker.files()) == [now + 1, now + 2, now + 3, now + 4]
    for label in "ab":
        page = worker.pages[f"merge/main/{label}"]
        assert (page["consumed_packets"], page["written_packets"], page["closed_packets"]) == (2, 2, 2)
        assert page["held_packets"] == 0


def test_files_of_a_source_that_never_answers_close_on_time(make: Make) -> None:
    """Its worker is dead or stopped: no packet, no watermark, no end."""
    worker = make(rotate_seconds=1, max_wait_ms=10)
    wait_until(lambda: worker.page["segments_published"] >= 3, "three seconds are over", timeout_s=6)
    opened = worker.page["segments_opened"]
    assert worker.end() == 0
    assert opened <= 5, "one file a second"
    begun = [path.name[:21] for path in worker.files()]
    assert len(set(begun)) == len(begun), begun


def test_a_held_packet_goes_soon_after_max_wait(make: Make) -> None:
    worker = make(2, max_wait_ms=100)
    now = time.time_ns()
    started = time.monotonic()
    worker.publish(0, packet(now))
    wait_until(lambda: worker.page["written_packets"] == 1, "it is written")
    assert time.monotonic() - started > 0.1
    assert worker.page["forced_packets"] == 1


def test_a_request_ends_the_file_also_under_load_and_a_reload_counts_for_the_next_one(make: Make) -> None:
    worker = make()
    worker.publish(0, packet(time.time_ns()))
    wait_until(lambda: worker.page["written_packets"] == 1, "it is written")
    worker.channel.send(b'reload {"output": {"rotate_packets": 2}, "hook": [], "filters": {}, "turn_ms": 0}')
    worker.channel.send(ROTATE)
    wait_until(lambda: worker.page["segments_published"] == 1, "the file is published")
    worker.publish(0, *(packet(time.time_ns()) for _ in range(5)))
    assert worker.end() == 0
    assert [capinfos(path).packets for path in worker.files()] == [1, 2, 2, 1]


def test_without_an_end_of_its_ring_a_draining_worker_writes_what_it_holds_and_ends(make: Make) -> None:
    worker = make(2, max_wait_ms=60_000)
    now = time.time_ns()
    worker.publish(0, packet(now))
    wait_until(lambda: worker.page["watermark_ns"] == 0 and worker.beats > 0, "it waits for the other source")
    worker.drain()
    worker.thread.join(5)
    assert worker.status == 0
    assert stamps(worker.files()) == [now]


def test_the_end_of_the_supervisor_is_a_drain_and_no_busy_loop(make: Make) -> None:
    worker = make()
    wait_until(lambda: worker.beats > 0, "it runs")
    worker.channel.close()
    time.sleep(0.4)
    before = worker.beats
    time.sleep(0.3)
    assert worker.beats - before < 20
    worker.thread.join(5)
    assert worker.status == 0


def test_an_idle_worker_sleeps(make: Make) -> None:
    worker = make(2)
    wait_until(lambda: worker.beats > 0, "it runs")
    time.sleep(0.1)
    before = worker.beats
    time.sleep(0.6)
    assert worker.beats - before <= 4


def test_while_the_watch_file_is_missing_nothing_is_opened_nor_lost_and_nobody_spins(
    make: Make, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    worker = make(watch_file=str(gate), rotate_seconds=1, max_wait_ms=10)
    wait_until(lambda: worker.page["segments_opened"] == 1, "the first file is open")
    gate.unlink()
    wait_until(lambda: worker.page["segments_published"] == 1, "its second is over")
    now = time.time_ns()
    worker.publish(0, packet(now))
    before = worker.beats
    time.sleep(0.5)
    assert worker.beats - before < 20
    assert worker.page["segments_opened"] == 1
    worker.sources[0].producer.promise(now + 1)
    gate.touch()
    wait_until(lambda: worker.page["written_packets"] == 1, "the gate is open")
    assert worker.end() == 0
    assert stamps(worker.files()) == [now]


def test_a_recorded_run_without_a_packet_leaves_a_valid_file(make: Make) -> None:
    worker = make(live=False)
    assert worker.end() == 0
    (path,) = worker.files()
    assert capinfos(path).packets == 0


def test_recorded_interfaces_are_taken_from_the_ring_and_damaged_ones_cost_their_own_packets(make: Make) -> None:
    worker = make(live=False)
    damaged = bytearray(interface_record(InterfaceDescription(1, name="broken")))
    damaged[18:20] = b"\xff\xff"  # the first option's length
    worker.publish(0, interface_record(InterfaceDescription(1, name="whole")), packet(T0), bytes(damaged))
    worker.publish(
        0, packet(T0 + 1, interface=1), interface_record(InterfaceDescription(1)), packet(T0 + 2, interface=2)
    )
    assert worker.end() == 0
    assert stamps(worker.files()) == [T0, T0 + 2]
    assert worker.pages["merge/main/a"]["dropped_merge_packets"] == 1


def test_a_recorded_run_that_cannot_write_fails_and_names_the_place(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file where a directory should be")
    worker = make(live=False)
    worker.publish(0, interface_record(InterfaceDescription(1)), packet(T0))
    worker.thread.join(5)
    assert isinstance(worker.status, CannotCreateError | InputOutputError)
    assert str(tmp_path / "out") in str(worker.status)


def test_a_compressor_that_fails_at_the_end_of_a_recorded_run_is_a_status(make: Make) -> None:
    worker = make(live=False, compressor=["sh", "-c", "cat; exit 1"])
    worker.publish(0, interface_record(InterfaceDescription(1)), packet(T0))
    assert worker.end() == os.EX_IOERR


def test_the_output_that_comes_back_goes_on_within_seconds(make: Make) -> None:
    worker = make(rotate_packets=1)
    worker.publish(0, packet(time.time_ns()))
    wait_until(lambda: worker.page["written_packets"] == 1, "it is written")
    moved = worker.directory.with_name("moved")
    worker.directory.rename(moved)
    worker.directory.write_text("in the way")
    worker.publish(0, packet(time.time_ns()), packet(time.time_ns()))
    wait_until(lambda: worker.page["write_errors"] > 0, "the error is counted")
    worker.directory.unlink()
    # What was in the file that went with the directory is lost, and no longer counts as written.
    wait_until(lambda: worker.page["written_packets"] == 2 and len(worker.files()) >= 1, "it goes on", timeout_s=5)
    assert worker.end() == 0
    assert worker.pages["merge/main/a"]["dropped_writer_packets"] == 1
    assert len(stamps(worker.files())) == 2


def test_a_successor_of_a_stream_writer_refuses_to_garble_the_stream(make: Make, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    worker = make(naming=SingleFileNaming(fifo), is_successor=True)
    worker.thread.join(5)
    assert isinstance(worker.status, InputOutputError)
    assert "died" in str(worker.status)


@requires_tool("tcpdump")
def test_a_fifo_gets_everything_once_somebody_reads_it(make: Make, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    worker = make(naming=SingleFileNaming(fifo), live=False, format="pcap")
    worker.publish(0, interface_record(InterfaceDescription(1)), *(packet(T0 + n, bytes(60)) for n in range(500)))
    time.sleep(0.3)
    assert worker.thread.is_alive(), "it waits for a reader"
    with subprocess.Popen(["tcpdump", "-r", fifo, "--count"], stdout=subprocess.PIPE, text=True) as reader:
        assert worker.end() == 0
        assert "500 packets" in reader.communicate(timeout=20)[0]


def test_a_reader_that_goes_away_ends_the_run(make: Make, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    worker = make(naming=SingleFileNaming(fifo), format="pcap")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    wait_until(lambda: worker.page["segments_opened"] == 1, "the stream has begun")
    os.close(reader)
    worker.publish(0, packet(time.time_ns()))
    worker.thread.join(5)
    assert isinstance(worker.status, InputOutputError)
    assert "Broken pipe" in str(worker.status)


def test_retention_runs_beside_the_merge(make: Make) -> None:
    worker = make(rotate_packets=1, retain_bytes=1500)
    for count in range(1, 9):
        worker.publish(0, packet(time.time_ns(), bytes(300)))
        wait_until(lambda expected=count: worker.page["written_packets"] == expected, "it is written")
    assert worker.end() == 0
    assert sum(path.stat().st_size for path in worker.files()) <= 1500
    assert worker.page["expired_files"] > 0
    shutil.rmtree(worker.directory)
