"""Programs that take the published files, and how long files are kept for them."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.faults import lab_with_wires, small_disk
from support.identities import Traffic, balance
from support.judges import check_numbered, packet_count, packets
from support.lab import Lab, requires_root, requires_tool, wait_until
from support.service import Service

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]

IN_CLOSE_WRITE, IN_MOVED_TO = 0x8, 0x80


class Watch:
    """inotify(7) on a directory: the names of files for which one of the events came."""

    def __init__(self, directory: Path, mask: int) -> None:
        self._fd = ctypes.CDLL(None).inotify_init1(os.O_NONBLOCK)
        assert ctypes.CDLL(None).inotify_add_watch(self._fd, os.fsencode(directory), mask) >= 0

    def names(self) -> list[str]:
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return []
        found, at = [], 0
        while at < len(data):
            (length,) = struct.unpack_from("I", data, at + 12)
            found.append(data[at + 16 : at + 16 + length].rstrip(b"\0").decode())
            at += 16 + length
        return found

    def close(self) -> None:
        os.close(self._fd)


class Consumer(threading.Thread):
    """Takes each file the moment it appears: reads all of it, then moves it away or deletes it, in turn."""

    def __init__(self, ready: Path, taken: Path, mask: int = IN_MOVED_TO) -> None:
        super().__init__()
        self.ready, self.taken = ready, taken
        self.names: list[str] = []
        self.sequences: list[int] = []
        self.failed = ""
        self.may_end = threading.Event()
        self.watch = Watch(ready, mask)

    def run(self) -> None:
        try:
            while not self.may_end.is_set():
                for name in self.watch.names():
                    self.take(name)
                time.sleep(0.01)
            for name in self.watch.names():
                self.take(name)
        except BaseException as error:
            self.failed = repr(error)
        finally:
            self.watch.close()

    def take(self, name: str) -> None:
        path = self.ready / name
        report = check_numbered([path])  # JudgeError unless it is whole
        self.names.append(name)
        self.sequences += sorted(report[0].sequences)
        if len(self.names) % 2:
            path.rename(self.taken / name)
        else:
            path.unlink()

    def end(self) -> None:
        self.may_end.set()
        self.join()
        assert not self.failed, self.failed


def manifest(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "meta" / "manifest.jsonl").read_text().splitlines()]


def start(lab: Lab, place: Path, **output: object) -> tuple[Service, Traffic]:
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    return Service(lab, place, [{"uri": "ring:a"}], output=output), traffic


# ---- events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [IN_MOVED_TO, IN_CLOSE_WRITE], ids=["MOVED_TO", "CLOSE_WRITE"])
def test_a_consumer_that_takes_every_file_as_it_appears_ends_with_exactly_the_right_set(
    lab: Lab, directory: Path, mask: int
) -> None:
    for name in ("ready", "taken"):
        (directory / name).mkdir()
    consumer = Consumer(directory / "ready", directory / "taken", mask)
    consumer.start()
    service, traffic = start(lab, directory, rotate_packets=500, close_write=mask == IN_CLOSE_WRITE)
    for sent in range(1000, 21_000, 1000):  # in bursts, so that a machine that stalls for a second loses nothing
        traffic.send(1000, rate=10_000)
        service.wait_until(lambda: service.interface("a").received_packets == sent, "they are received")  # noqa: B023
    last = balance(service, traffic.sent)
    assert service.stop() == 0
    consumer.end()
    assert consumer.sequences == list(range(20_000))
    told = manifest(directory)
    assert [entry["file"] for entry in told] == consumer.names
    assert len(set(consumer.names)) == len(consumer.names) >= 40
    assert sum(entry["packets"] for entry in told) == last.interfaces[0].written_packets == 20_000
    assert list((directory / "ready").iterdir()) == []
    assert last.outputs[0].files_quarantined == 0


def test_without_the_option_nothing_is_closed_after_writing_in_ready(lab: Lab, directory: Path) -> None:
    (directory / "ready").mkdir()
    watch = Watch(directory / "ready", IN_CLOSE_WRITE)
    service, traffic = start(lab, directory)
    traffic.send(1000)
    balance(service, traffic.sent)
    assert service.stop() == 0
    assert service.ready()
    assert watch.names() == []
    watch.close()


def test_the_manifest_is_whole_again_after_a_kill_in_the_middle_of_a_line(lab: Lab, directory: Path) -> None:
    service, traffic = start(lab, directory, rotate_packets=100)
    traffic.send(1000)
    balance(service, traffic.sent)
    service.wait_until(lambda: len(service.ready()) >= 9, "some files")
    for pid in service.processes():
        os.kill(pid, signal.SIGKILL)
    service.wait()
    path = directory / "meta" / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-2][:20])  # a line and a half are gone
    again = Service(lab, directory, [{"uri": "ring:a"}], output={"rotate_packets": 100})
    traffic.send(300)
    again.wait_until(lambda: again.interface("a").written_packets == 300, "more frames")
    assert again.stop() == 0
    told = [entry["file"] for entry in manifest(directory)]
    assert sorted(told) == [path.name for path in again.ready()]
    assert len(set(told)) == len(told)
    assert {entry["file"]: entry["packets"] for entry in manifest(directory)} == {
        path.name: packet_count([path]) for path in again.ready()
    }


def script(directory: Path, text: str) -> list[str]:
    path = directory / "hook"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return [str(path), "--file"]


def test_a_hook_is_run_for_each_file_without_rights_and_without_our_descriptors(lab: Lab, directory: Path) -> None:
    told = directory / "told"
    text = f'echo "$1 $2 $(env | wc -l) $(ls /proc/self/fd | wc -l) $(grep CapEff /proc/self/status)" >>{told}'
    service, traffic = start(lab, directory, rotate_packets=200, hook=script(directory, text))
    traffic.send(2000)
    balance(service, traffic.sent)
    service.wait_until(lambda: told.exists() and told.read_text().count("\n") >= 9, "the hook is run")
    assert service.stop() == 0
    lines = [line.split() for line in told.read_text().splitlines()]
    assert [line[1] for line in lines] == [str(path) for path in service.ready()]
    assert {line[0] for line in lines} == {"--file"}
    assert all(int(line[2]) <= 5 and int(line[3]) <= 6 for line in lines), lines  # the shell's own come on top
    assert {line[-1] for line in lines} == {"0" * 16}


def test_hooks_that_fail_or_hang_are_counted_and_hold_up_no_file(lab: Lab, directory: Path) -> None:
    hook = script(directory, "case $2 in *[02468].pcapng.lz4) exit 3 ;; *) sleep 100 ;; esac")
    service, traffic = start(lab, directory, rotate_packets=200, hook=hook, hook_timeout_s=1)
    traffic.send(2000)
    balance(service, traffic.sent)
    service.wait_until(lambda: service.snapshot().outputs[0].files_published >= 10, "every file is published")
    service.wait_until(lambda: service.snapshot().outputs[0].hook_failures >= 3, "the failures are counted")
    assert "ended with status 3" in service.log
    assert "did not end within 1 s" in service.log
    assert service.stop() == 0
    assert service.leftover_processes() == []
    service.check({0: 2000})


# ---- how long files are kept -----------------------------------------------------------------------------------------


def sizes(service: Service) -> int:
    return sum(path.stat().st_size for path in service.ready())


def numbers(service: Service) -> list[int]:
    return [int(path.name.split("-")[2].split(".")[0]) for path in service.ready()]


def test_by_bytes_the_oldest_go_and_not_one_more_than_needed_also_after_a_restart(lab: Lab, directory: Path) -> None:
    limit = 60_000
    output = {"compressor": "none", "rotate_packets": 100, "rotate_seconds": 0, "retain_bytes": limit}
    service, traffic = start(lab, directory, **output)
    traffic.send(2000)  # files of some 10 kB
    service.wait_until(lambda: service.snapshot().outputs[0].files_published >= 19, "the files")
    service.wait_until(lambda: sizes(service) <= limit, "the limit holds")
    balance(service, traffic.sent)
    assert service.stop() == 0
    kept = numbers(service)
    assert kept == list(range(min(kept), max(kept) + 1))  # the oldest went, nothing in between
    biggest = max(path.stat().st_size for path in service.ready())
    assert limit - biggest < sizes(service) <= limit
    report = check_numbered(service.ready())
    assert report[0].sequences == set(range(2000 - report.packets, 2000))
    again = Service(lab, directory, [{"uri": "ring:a"}], output=output)
    traffic.send(300)
    again.wait_until(lambda: again.snapshot().outputs[0].files_published >= 2, "more files")
    again.wait_until(lambda: sizes(again) <= limit, "the limit holds with the files that were there")
    assert again.stop() == 0
    assert min(numbers(again)) > min(kept)
    assert limit - biggest < sizes(again) <= limit


def test_a_file_under_a_lock_is_never_deleted(lab: Lab, directory: Path) -> None:
    service, traffic = start(
        lab, directory, compressor="none", rotate_packets=100, rotate_seconds=0, retain_bytes=40_000
    )
    traffic.send(200)
    service.wait_until(lambda: len(service.ready()) >= 1, "a file")
    held = service.ready()[0]
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        traffic.send(2000)
        service.wait_until(lambda: service.snapshot().outputs[0].files_expired >= 15, "others go")
        assert held.exists()
        assert len(list(packets(held))) == 100
    traffic.send(500)
    service.wait_until(lambda: not held.exists(), "it goes when nobody holds it")
    balance(service, traffic.sent)
    assert service.stop() == 0


def test_by_age_files_go_with_their_sidecars(lab: Lab, directory: Path) -> None:
    service, traffic = start(lab, directory, retain_seconds=3, empty_segments="skip")
    traffic.send(1000)
    balance(service, traffic.sent)
    service.wait_until(lambda: service.snapshot().outputs[0].files_expired >= 1, "a file is too old", 30)
    service.wait_until(lambda: service.ready() == [], "and so are all")
    assert service.sidecars() == []
    traffic.send(1000)
    last = balance(service, traffic.sent)
    assert last.interfaces[0].written_packets == 2000
    assert service.stop() == 0


def test_by_free_space_the_oldest_make_room_on_a_full_disk(lab: Lab, directory: Path) -> None:
    with small_disk(directory / "disk", 8 << 20) as disk:
        output = {
            "directory": str(disk / "out"),
            "compressor": "none",
            "rotate_packets": 500,
            "min_free_bytes": 5 << 20,
        }
        service, traffic = start(lab, directory, **output)
        service.directory = disk / "out"
        traffic.send(20_000, sizes=(400,))  # as much as the disk holds
        balance(service, traffic.sent)
        service.wait_until(lambda: shutil.disk_usage(disk).free >= 5 << 20, "the room that is asked for")
        kept = numbers(service)
        last = balance(service, traffic.sent)
        assert service.stop() == 0
        assert last.interfaces[0].lost_packets == 0
        assert kept == list(range(min(kept), max(kept) + 1))
        assert last.outputs[0].files_expired > 0
        assert sizes(service) > 1 << 20  # not more than needed


def test_retention_tolerates_a_consumer_that_moves_and_deletes(lab: Lab, directory: Path) -> None:
    (directory / "taken").mkdir()
    (directory / "ready").mkdir()
    consumer = Consumer(directory / "ready", directory / "taken")
    consumer.start()
    service, traffic = start(lab, directory, compressor="none", rotate_packets=100, retain_bytes=100_000)
    for sent in range(500, 10_500, 500):  # never so much at once that retention takes what nobody has read yet
        traffic.send(500)
        wait_until(lambda: len(consumer.sequences) == sent, f"{sent} packets are taken")  # noqa: B023
    balance(service, traffic.sent)
    assert service.stop() == 0
    consumer.end()
    assert consumer.sequences == list(range(10_000))
    assert "ERROR" not in service.log
    wait_until(lambda: list((directory / "ready").iterdir()) == [], "everything was taken")
