"""Compressors that fail, hang or crawl: capture goes on, and what they spoil is set aside and counted."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from support.faults import lab_with_wires
from support.identities import Traffic, balance, conclude
from support.judges import check_numbered
from support.lab import Lab, requires_root, requires_tool
from support.service import Service, descendants

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]


def script(directory: Path, text: str) -> list[str]:
    """A compressor of our own; files end in its name."""
    path = directory / "own"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return [str(path)]


def start(lab: Lab, directory: Path, **output: object) -> tuple[Service, Traffic]:
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    return Service(lab, directory, [{"uri": "ring:a"}], output=output), traffic


def test_files_of_a_compressor_that_ends_with_an_error_are_set_aside_and_the_next_ones_published(
    lab: Lab, directory: Path
) -> None:
    broken = directory / "broken"
    broken.touch()
    service, traffic = start(lab, directory, compressor=script(directory, f"cat; if [ -e {broken} ]; then exit 1; fi"))
    traffic.send(2000)
    service.wait_until(lambda: service.snapshot().outputs[0].quarantined_packets > 0, "a file with frames fails")
    assert "ended with status 1" in service.log
    broken.unlink()
    balance(service, traffic.sent)
    service.wait_until(lambda: service.snapshot().outputs[0].files_published > 1, "files are published again")
    traffic.send(1000)
    last = conclude(service, traffic)
    assert last.outputs[0].compressor_failures > 0
    assert not check_numbered(service.ready())[0].missing(1000, traffic.each - 1000)


def test_a_compressor_that_always_dies_costs_packets_that_are_counted(lab: Lab, directory: Path) -> None:
    service, traffic = start(lab, directory, compressor=script(directory, "exit 1"))
    traffic.send(2000)
    service.wait_until(lambda: service.snapshot().outputs[0].compressor_failures > 0, "the failure is counted")
    last = conclude(service, traffic)
    assert last.outputs[0].published_packets == 0


def test_a_stopped_compressor_is_given_up_and_costs_its_file_alone(lab: Lab, directory: Path) -> None:
    service, traffic = start(lab, directory, compressor=["lz4", "-q", "-c"], compressor_timeout_s=2)
    traffic.send(2000)
    balance(service, traffic.sent)
    stopped = descendants(service.pids()["merge/main"])
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    pids = service.pids()
    traffic.send(2000)
    service.wait_until(lambda: service.snapshot().outputs[0].compressor_failures > 0, "it is given up")
    assert service.interface("a").received_packets == traffic.each
    traffic.send(2000)
    last = conclude(service, traffic)
    assert last.interfaces[0].dropped["kernel"] == last.interfaces[0].dropped["ring"] == 0
    assert {worker.name: worker.pid for worker in last.workers if worker.name != "supervisor"}.items() <= pids.items()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in stopped)


def test_a_hung_compressor_of_a_killed_merge_is_ended_and_what_it_wrote_recovered(lab: Lab, directory: Path) -> None:
    service, traffic = start(lab, directory, compressor=["lz4", "-q", "-c"], rotate_seconds=3600)
    traffic.send(2000)
    balance(service, traffic.sent)
    merge = service.pids()["merge/main"]
    hung = descendants(merge)
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    os.kill(merge, signal.SIGKILL)
    service.wait_for_start("merge/main", merge)
    traffic.send(1000)
    service.wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in hung), "it is ended", timeout_s=40)
    conclude(service, traffic)
    assert "its compressor outlived the merge worker, and hung: it was killed" in service.log


def test_a_slow_compressor_fills_the_ring_and_not_a_byte_more_memory(lab: Lab, directory: Path) -> None:
    """What it cannot take is dropped by the ring, the newest first, and counted."""
    slow = script(directory, "while dd bs=65536 count=1 status=none iflag=fullblock | grep -a . ; do sleep 0.05; done")
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    interface = {"uri": "ring:a", "ring_bytes": 1 << 20}
    service = Service(lab, directory, [interface], output={"compressor": slow, "rotate_seconds": 3600})
    traffic.send(15_000, rate=15_000, sizes=(1514,))
    received = service.interface("a")
    assert received.received_packets > 14_000
    last = balance(service, traffic.sent, timeout_s=60)
    assert last.interfaces[0].dropped["ring"] > 0
    assert last.interfaces[0].dropped["kernel"] == 0
    begun = time.monotonic()
    service.signal(signal.SIGTERM)
    service.wait(40)
    assert time.monotonic() - begun < 40
