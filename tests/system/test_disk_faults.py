"""What a failing disk costs: what it must, and not a packet that is not counted."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.faults import failing_calls, lab_with_wires, small_disk
from support.identities import Traffic, balance, conclude, judge, recount
from support.judges import capinfos, check_numbered
from support.lab import Lab, requires_root, requires_tool
from support.service import Service

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]

MIB = 1 << 20


@pytest.fixture
def disk(directory: Path) -> Iterator[Path]:
    with small_disk(directory / "disk", 4 * MIB) as path:
        yield path


def start(lab: Lab, directory: Path, **tables: object) -> tuple[Service, Traffic]:
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    return Service(lab, directory, [{"uri": "ring:a"}], **tables), traffic


# ---- no room ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compressor", "room_bytes"), [("none", MIB), ("lz4", 64 << 10)])
def test_a_full_disk_costs_only_what_is_counted_and_ends_when_there_is_room(
    lab: Lab, directory: Path, disk: Path, compressor: str, room_bytes: int
) -> None:
    output = {"directory": str(disk / "out"), "compressor": compressor}
    service, traffic = start(lab, directory, output=output)
    service.directory = disk / "out"
    filler = disk / "filler"
    filler.write_bytes(bytes(4 * MIB - room_bytes))
    traffic.send(10_000, sizes=(214,))
    service.wait_until(lambda: service.snapshot().outputs[0].write_errors > 0, "the failure is counted")
    service.wait_until(lambda: "No space left" in service.log, "the failure is told")
    filler.unlink()
    for path in service.ready():
        capinfos(path)
    before = service.snapshot().outputs[0].files_published
    service.wait_until(lambda: service.snapshot().outputs[0].files_published > before + 1, "files are published again")
    traffic.send(500)
    last = conclude(service, traffic)
    assert not check_numbered(service.ready())[0].missing(500, traffic.each - 500)
    assert last.outputs[0].write_errors > 0


# ---- calls that fail -------------------------------------------------------------------------------------------------


@requires_tool("strace")
@pytest.mark.parametrize(
    "call",
    ["openat", *(pytest.param(call, marks=pytest.mark.slow) for call in ("fsync", "renameat2", "rename", "close"))],
)
def test_any_file_operation_may_fail_and_no_packet_is_lost_in_silence(lab: Lab, directory: Path, call: str) -> None:
    """The first, the second, ... call of its kind fails; in between nothing is started anew."""
    service, traffic = start(
        lab, directory, output={"compressor": "none"}, service={"restart_limit": 100, "restart_window_s": 1}
    )
    for number in range(1, 7):
        merge = running_merge(service)
        with failing_calls(merge, f"{call}:error=EIO:when={number}", directory / "trace"):
            traffic.send(300)
            service.ask("rotate")
            time.sleep(0.5)
    conclude_with_deaths(service, traffic)


@requires_tool("strace")
@pytest.mark.parametrize(
    "error", ["ENOSPC", pytest.param("EIO", marks=pytest.mark.slow), pytest.param("EINTR", marks=pytest.mark.slow)]
)
def test_writes_that_fail_are_written_again_or_counted(lab: Lab, directory: Path, error: str) -> None:
    service, traffic = start(
        lab, directory, output={"compressor": "none"}, service={"restart_limit": 100, "restart_window_s": 1}
    )
    for number in range(1, 6):
        merge = running_merge(service)
        with failing_calls(merge, f"write:error={error}:when={number}", directory / "trace"):
            traffic.send(300)
            time.sleep(0.2)
    conclude_with_deaths(service, traffic)


def running_merge(service: Service) -> int:
    """Its process id, once it lives: the last failed call may have ended it."""
    service.wait_until(lambda: os.path.exists(f"/proc/{service.pids()['merge/main']}"), "a running merge")
    return service.pids()["merge/main"]


def conclude_with_deaths(service: Service, traffic: Traffic) -> None:
    """As `conclude`, where a failed call may have ended a worker, and files may wait for the next start."""
    last = balance(service, traffic.sent)
    assert service.stop() == 0, service.log
    recount(service, last)
    judge(service, traffic, last)
    assert service.leftover_processes() == []


@requires_tool("strace")
def test_a_file_that_could_not_be_synced_is_not_published_and_never_synced_again(lab: Lab, directory: Path) -> None:
    service, traffic = start(lab, directory, output={"rotate_seconds": 3600})
    traffic.send(1000)
    balance(service, traffic.sent)
    trace = directory / "trace"
    with failing_calls(service.pids()["merge/main"], "fsync:error=EIO:when=1", trace):
        service.ask("rotate")
        service.wait_until(lambda: service.snapshot().outputs[0].files_quarantined == 1, "it is set aside")
    traffic.send(1000)
    last = conclude(service, traffic)
    staged = re.escape(str(directory / "work"))
    synced = re.findall(rf"fsync\(\d+<{staged}/[^>]*>\) += -1 EIO", trace.read_text())
    assert len(synced) == 1, trace.read_text()
    assert last.outputs[0].quarantined_packets == 1000
    (reason,) = (directory / "quarantine").glob("*.json")
    assert "Input/output error" in json.loads(reason.read_text())["reason"]
    assert last.outputs[0].write_errors > 0


# ---- directories -----------------------------------------------------------------------------------------------------


def test_an_output_directory_that_was_removed_is_made_again_and_what_went_with_it_is_counted(
    lab: Lab, directory: Path
) -> None:
    out = directory / "out"
    service, traffic = start(lab, directory, output={"directory": str(out)})
    service.directory = out
    traffic.send(1000)
    balance(service, traffic.sent)
    shutil.rmtree(out)
    removed = time.monotonic()
    service.wait_until(lambda: (out / "ready").is_dir() and bool(list((out / "ready").iterdir())), "files again")
    assert time.monotonic() - removed < 8  # a file of one second, and the five seconds that a recovery may take
    traffic.send(1000)
    last = balance(service, traffic.sent)
    assert service.stop() == 0
    lost = last.interfaces[0].dropped["writer"]
    report = judge_what_is_there(service)
    # Published files that somebody removed are no loss of ours; a file that was being written is.
    assert report >= 1000
    assert last.outputs[0].quarantined_packets == 0
    assert lost <= 1000


def judge_what_is_there(service: Service) -> int:
    report = check_numbered(service.ready())
    assert (report[0].duplicates, report[0].corrupt, report[0].disordered) == (0, 0, 0)
    service.check_sidecars()
    return report.packets


def test_a_file_that_vanishes_while_it_is_written_is_counted_as_lost_by_the_writer(lab: Lab, directory: Path) -> None:
    service, traffic = start(lab, directory, output={"rotate_seconds": 3600, "compressor": "none"})
    traffic.send(1000)
    balance(service, traffic.sent)
    (staged,) = (directory / "work").iterdir()
    staged.unlink()
    traffic.send(500)
    balance(service, traffic.sent)
    service.ask("rotate")
    service.wait_until(lambda: service.interface("a").dropped["writer"] == 1500, "the loss is counted")
    traffic.send(700)
    last = conclude(service, traffic)
    assert last.interfaces[0].written_packets == 700
    assert "does not exist any longer" in service.log


def test_a_directory_that_cannot_be_written_for_a_while_costs_nothing_that_the_ring_holds(
    lab: Lab, directory: Path
) -> None:
    """Without its capabilities even root is refused by a mode: as on a disk that was remounted read-only."""
    service, traffic = start(lab, directory)
    traffic.send(1000)
    balance(service, traffic.sent)
    work = directory / "work"
    work.chmod(0o500)
    service.wait_until(lambda: "no file can be written" in service.log, "the failure is told")
    traffic.send(1000)
    work.chmod(0o750)
    mended = time.monotonic()
    balance(service, traffic.sent)
    assert time.monotonic() - mended < 10
    conclude(service, traffic)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_names_that_are_taken_are_never_written_over(lab: Lab, directory: Path) -> None:
    """Somebody took every name of the next seconds: numbers are skipped until one is free."""
    service, traffic = start(lab, directory, output={"compressor": "none"})
    number = int((directory / "meta" / "sequence").read_text())
    now = int(time.time())
    taken = [
        directory / "ready" / time.strftime(f"main-%Y%m%dT%H%M%SZ-{number + i:08d}.pcapng", time.gmtime(now + second))
        for second in range(-2, 15)
        for i in range(-2, 12)
    ]
    ours = {path.name for path in service.ready()}
    taken = [path for path in taken if path.name not in ours]
    for path in taken:
        path.write_text("another's")
    traffic.send(1000)
    balance(service, traffic.sent)
    service.ask("rotate")
    service.wait_until(lambda: len(service.sidecars()) > 1, "a published file")
    last = balance(service, traffic.sent)
    assert service.stop() == 0
    assert {path.read_text() for path in taken if path.stat().st_size < 100} == {"another's"}
    assert all(path.read_text() == "another's" for path in taken)
    for path in taken:
        path.unlink()
    recount(service, last)
    judge(service, traffic, last)


def test_a_link_in_the_place_of_a_staging_file_is_not_followed(lab: Lab, directory: Path) -> None:
    service, traffic = start(lab, directory)
    target = directory / "target"
    target.write_text("untouched")
    number = int((directory / "meta" / "sequence").read_text())
    for i in range(1, 30):
        link = directory / "work" / f"main-{number + i:08d}.pcapng.lz4"
        if not link.exists():
            link.symlink_to(target)
    traffic.send(1000)
    service.wait_until(lambda: len(service.ready()) > 2, "files of the next numbers")
    last = balance(service, traffic.sent)
    assert service.stop() == 0
    recount(service, last)
    judge(service, traffic, last)
    assert target.read_text() == "untouched"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
