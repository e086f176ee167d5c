"""What a death costs: every process of the service is killed or stopped under load, in turn."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.faults import failing_calls
from support.identities import recount
from support.judges import capinfos, check_numbered
from support.lab import Lab, Sender, requires_root, requires_tool, wait_until
from support.service import Service, descendants, process_name

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]

RATE = 10_000
LABELS = "abcdef"
ANSWER_DELAY_S = 0.1


def start_under_load(
    lab: Lab, directory: Path, rate: int = RATE, count: int = 2, **tables: object
) -> tuple[Service, Sender]:
    pairs = [lab.veth(label) for label in LABELS[:count]]
    # The kernel's ring must hold what comes while a worker is dead: 128 blocks of 8 ms.
    interfaces = [{"uri": f"ring:{name}", "kernel_ring_bytes": 128 << 20} for name, _ in pairs]
    service = Service(lab, directory, interfaces, meter={"enabled": True}, **tables)
    sender = lab.start_sender([peer for _, peer in pairs], rate=rate)
    service.wait_until(lambda: service.interface("a").written_packets > rate // 4, "traffic in files")
    return service, sender


def assert_frames_are_published_after(service: Service, moment_s: float) -> None:
    """Packets stamped two seconds after `moment_s` are in published files, within a few seconds."""

    def published() -> bool:
        return any((sidecar["last_ns"] or 0) / 1e9 > moment_s + 2 for sidecar in service.sidecars())

    service.wait_until(published, "frames from 2 s later in a published file", timeout_s=12)


def stop_and_balance(service: Service, sender: Sender) -> tuple[int, int]:
    """Ends traffic and service; (packets missing in the files, packets that the figures call lost).

    Whatever arrived is there once, whole and in order; every file is valid, and agrees with its sidecar.
    """
    sent = sender.stop()
    last = service.wait_at_rest({name[0]: count for name, count in sent.sent.items()})
    assert service.stop() == 0, service.log
    recount(service, last)
    report = check_numbered(service.ready())
    missing = 0
    for view in last.interfaces:
        number = LABELS.index(view.label)
        found, count = report[number], sent.sent_by_id[number]
        assert (found.duplicates, found.corrupt, found.disordered) == (0, 0, 0), (view, service.log)
        assert not found.unexpected(count)
        assert found.received == view.written_packets, (found.received, view, service.log)
        missing += count - found.received
    assert (report.foreign, report.unreadable) == (0, 0)
    assert report.inversions == sum(output.late_packets for output in last.outputs)
    service.check_sidecars()
    for path in service.ready():
        capinfos(path)
    service.assert_nothing_left()
    return missing, sum(view.lost_packets for view in last.interfaces)


@pytest.mark.parametrize("worker", ["capture/a", "meter", "monitor"])
def test_a_killed_worker_costs_nothing(lab: Lab, directory: Path, worker: str) -> None:
    service, sender = start_under_load(lab, directory)
    pids = service.pids()
    moment = time.time()
    os.kill(pids[worker], signal.SIGKILL)
    reborn = service.wait_for_start(worker, pids[worker])
    assert service.pids() == pids | {worker: reborn}
    assert_frames_are_published_after(service, moment)
    assert stop_and_balance(service, sender) == (0, 0)
    assert f"{worker} was ended by signal 9" in service.log


def test_a_killed_worker_of_many_that_turn_together_costs_nothing(lab: Lab, directory: Path) -> None:
    service, sender = start_under_load(lab, directory, rate=RATE // 2, count=6)
    chance = random.Random(4)
    for _ in range(5):
        killed = service.pids()["capture/c"]
        time.sleep(chance.uniform(0, 0.3))
        os.kill(killed, signal.SIGKILL)
        service.wait_for_start("capture/c", killed)
    assert stop_and_balance(service, sender) == (0, 0)


def test_a_killed_merge_costs_only_what_it_counts(lab: Lab, directory: Path) -> None:
    service, sender = start_under_load(lab, directory)
    pids = service.pids()
    moment = time.time()
    os.kill(pids["merge/main"], signal.SIGKILL)
    reborn = service.wait_for_start("merge/main", pids["merge/main"])
    assert service.pids() == pids | {"merge/main": reborn}
    assert_frames_are_published_after(service, moment)
    missing, counted = stop_and_balance(service, sender)
    assert missing == counted
    assert missing < RATE  # one megabyte in a pipe, and one batch


def test_merges_that_are_killed_in_a_row_cost_only_what_they_count(lab: Lab, directory: Path) -> None:
    """At any moment of a segment's life: opening, writing, publishing, and in the middle of the last one's recovery."""
    service, sender = start_under_load(
        lab, directory, output={"rotate_packets": 3000}, service={"restart_limit": 1000, "restart_window_s": 1}
    )
    chance = random.Random(3)
    for _ in range(12):
        killed = service.pids()["merge/main"]
        time.sleep(chance.uniform(0, 0.3))
        os.kill(killed, signal.SIGKILL)
        service.wait_for_start("merge/main", killed)
    missing, counted = stop_and_balance(service, sender)
    assert missing == counted


def test_a_killed_compressor_costs_only_what_it_counts(lab: Lab, directory: Path) -> None:
    service, sender = start_under_load(lab, directory)
    pids = service.pids()
    moment = time.time()
    for compressor in descendants(pids["merge/main"]):
        os.kill(compressor, signal.SIGKILL)
    service.wait_until(lambda: service.snapshot().outputs[0].compressor_failures > 0, "the failure is counted")
    assert service.pids() == pids
    assert_frames_are_published_after(service, moment)
    sent = sender.stop()
    last = service.wait_at_rest({name[0]: count for name, count in sent.sent.items()})
    assert service.stop() == 0
    published = check_numbered(service.ready())
    quarantined = last.outputs[0].quarantined_packets
    for view in last.interfaces:
        number = LABELS.index(view.label)
        assert (published[number].duplicates, published[number].corrupt, published[number].disordered) == (0, 0, 0)
        assert view.received_packets == view.written_packets + view.dropped_packets
    assert published.packets + quarantined == sum(view.written_packets for view in last.interfaces)
    assert quarantined or any(view.dropped["writer"] for view in last.interfaces)
    service.check_sidecars()
    assert service.leftover_processes() == []


def test_twenty_deaths_of_capture_workers_cost_no_packet(lab: Lab, directory: Path) -> None:
    """Killed at any moment, a successor goes on at the very packet that was published last."""
    service, sender = start_under_load(
        lab, directory, rate=20_000, service={"restart_limit": 1000, "restart_window_s": 1}
    )
    chance = random.Random(20)
    for _ in range(10):
        pids = service.pids()
        for worker in ("capture/a", "capture/b"):
            time.sleep(chance.uniform(0, 0.02))
            os.kill(pids[worker], signal.SIGKILL)
        for worker in ("capture/a", "capture/b"):
            service.wait_for_start(worker, pids[worker])
    assert stop_and_balance(service, sender) == (0, 0)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_deaths_right_after_the_kernel_told_its_count_cost_no_count(lab: Lab, directory: Path, tmp_path: Path) -> None:
    """The kernel forgets what it has told. The worker dies between the answer's system call and its own next step."""
    service, sender = start_under_load(
        lab, directory, service={"restart_limit": 1000, "restart_window_s": 1}, rate=RATE
    )
    for death in range(3):
        worker = service.pids()["capture/a"]
        trace = tmp_path / f"trace{death}"
        with failing_calls(worker, f"getsockopt:delay_exit={int(ANSWER_DELAY_S * 1e6)}", trace):
            # Each answer but the first holds the packets of a whole delay. The next one waits when this one is noted.
            wait_until(lambda trace=trace: trace.read_text().count("PACKET_STATISTICS") > 2, "answers of the kernel")
            time.sleep(ANSWER_DELAY_S / 2)
            os.kill(worker, signal.SIGKILL)
            service.wait_for_start("capture/a", worker)
    assert stop_and_balance(service, sender) == (0, 0)


def test_a_machine_that_stood_still_costs_no_order(lab: Lab, directory: Path) -> None:
    """The merge holds the packets of one interface for those of the other when everything stops for longer than
    max_wait; it goes on first, the capture workers after it."""
    service, sender = start_under_load(lab, directory, output={"max_wait_ms": 400})
    merge, a, b = (service.pids()[name] for name in ("merge/main", "capture/a", "capture/b"))
    for _ in range(3):
        os.kill(b, signal.SIGSTOP)
        time.sleep(0.03)
        for pid in (merge, a):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(0.6)
        os.kill(merge, signal.SIGCONT)
        time.sleep(0.02)
        for pid in (a, b):
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.4)
    assert stop_and_balance(service, sender) == (0, 0)
    assert check_numbered(service.ready()).inversions == 0


def test_a_stopped_worker_is_ended_and_started_again(lab: Lab, directory: Path) -> None:
    service, sender = start_under_load(lab, directory, service={"heartbeat_timeout_s": 2})
    pids = service.pids()
    moment = time.time()
    os.kill(pids["capture/b"], signal.SIGSTOP)
    reborn = service.wait_for_start("capture/b", pids["capture/b"])
    assert service.pids() == pids | {"capture/b": reborn}
    assert "capture/b shows no sign of life" in service.log
    assert_frames_are_published_after(service, moment)
    missing, counted = stop_and_balance(service, sender)
    assert missing == counted  # two seconds are more than the kernel's ring holds


def test_a_killed_supervisor_leaves_nothing_running_and_everything_published(lab: Lab, directory: Path) -> None:
    service, sender = start_under_load(lab, directory)
    before = {view.label: view.received_packets for view in service.snapshot().interfaces}
    os.kill(service.process.pid, signal.SIGKILL)
    service.process.wait()
    others = sender.process.pid
    wait_until(lambda: service.leftover_processes() == [others], "every process drains and ends", timeout_s=15)
    sent = sender.stop()
    report = check_numbered(service.ready())
    received = {number: report[number].received for number in sent.sent_by_id}
    assert report.faults(received) == []
    assert all(received["ab".index(label)] >= count for label, count in before.items())
    assert not list((directory / "work").iterdir())
    service.check_sidecars()


def test_after_a_kill_of_everything_the_next_start_salvages(lab: Lab, directory: Path) -> None:
    service, sender = start_under_load(lab, directory, output={"rotate_seconds": 3600})
    service.wait_until(lambda: service.interface("a").written_packets > 20_000, "some megabytes in the open file")
    for pid in service.processes():
        os.kill(pid, signal.SIGKILL)
    sent = sender.stop()
    service.wait()
    assert service.ready() == []
    assert list((directory / "work").iterdir())
    again = Service(lab, directory, [{"uri": "ring:a"}, {"uri": "ring:b"}])
    again.wait_until(lambda: bool(again.ready()), "what was left is published")
    assert again.stop() == 0
    report = check_numbered(again.ready())
    received = {number: report[number].received for number in sent.sent_by_id}
    assert report.faults(received) == []
    assert all(count > 5_000 for count in received.values())
    assert any(sidecar["recovered"] for sidecar in again.sidecars())
    again.check_sidecars()
    again.assert_nothing_left()


def test_a_worker_that_always_dies_ends_the_service_with_a_named_status(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    b, _ = lab.veth("b")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}, {"uri": f"ring:{b}"}], service={"restart_limit": 2})
    sent = lab.send([pa], frames=1000, rate=10_000)
    service.wait_at_rest({"a": 1000})
    for _ in range(2):
        pid = service.pids()["capture/b"]
        os.kill(pid, signal.SIGKILL)
        service.wait_for_start("capture/b", pid)
    os.kill(service.pids()["capture/b"], signal.SIGKILL)
    assert service.wait() == 69
    assert "capture/b was ended by signal 9, 3 times within 60 s: giving up" in service.log
    service.check(sent.sent_by_id)
    service.assert_nothing_left()


def test_a_merge_that_dies_while_the_service_stops_is_replaced_and_publishes(lab: Lab, directory: Path) -> None:
    service, sender = start_under_load(lab, directory)
    sent = sender.stop()
    service.wait_at_rest({name[0]: count for name, count in sent.sent.items()})
    merge = service.pids()["merge/main"]
    os.kill(merge, signal.SIGSTOP)
    service.signal(signal.SIGTERM)
    service.wait_until(lambda: "stopping" in service.log, "the service stops")
    time.sleep(0.3)
    os.kill(merge, signal.SIGKILL)
    assert service.wait() == 0
    report = check_numbered(service.ready())
    received = {number: report[number].received for number in sent.sent_by_id}
    assert report.faults(received) == []
    service.check_sidecars()
    service.assert_nothing_left()


def test_a_capture_worker_that_dies_while_the_service_stops_is_replaced_and_drains(lab: Lab, directory: Path) -> None:
    service, sender = start_under_load(lab, directory)
    victim = service.pids()["capture/a"]
    os.kill(victim, signal.SIGSTOP)
    time.sleep(0.1)  # the kernel's ring takes a thousand frames or so meanwhile
    service.signal(signal.SIGTERM)
    service.wait_until(lambda: "stopping" in service.log, "the service stops")
    os.kill(victim, signal.SIGKILL)
    assert service.wait() == 0
    sent = sender.stop()
    report = check_numbered(service.ready())
    for label, number in (("a", 0), ("b", 1)):
        received = report[number].received
        assert received == report[number].highest + 1 <= sent.sent_by_id[number]
        assert f"{label}: received {received} = written {received} + dropped 0 + in flight 0" in service.log
    service.check_sidecars()
    service.assert_nothing_left()


def test_without_its_opener_the_service_goes_on(lab: Lab, directory: Path) -> None:
    service, sender = start_under_load(lab, directory)
    pids = service.pids()
    opener = service.opener_pid()
    os.kill(opener, signal.SIGKILL)
    service.wait_until(lambda: "the opener" in service.log, "the loss of the opener is told")
    assert process_name(opener) in ("", "opener")
    assert service.pids() == pids
    assert stop_and_balance(service, sender) == (0, 0)
