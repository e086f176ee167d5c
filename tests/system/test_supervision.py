"""What the service tells its manager, and what it costs when nothing happens."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from support.lab import Lab, requires_root, requires_tool
from support.service import Service

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]


def cpu_seconds(pids: list[int]) -> float:
    """Of those that are still there: a compressor ends with its file."""
    ticks = 0
    for pid in filter(lambda pid: os.path.exists(f"/proc/{pid}"), pids):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def test_the_manager_hears_ready_status_watchdog_and_stopping(lab: Lab, directory: Path) -> None:
    a, _ = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}], environment={"WATCHDOG_USEC": "1000000"})
    service.wait_until(lambda: service.heard("WATCHDOG=1") and service.heard("STATUS="), "watchdog and status")
    time.sleep(1.2)
    service.heard("")
    assert service.told.count("WATCHDOG=1") >= 2
    assert service.told.index("READY=1") < len(service.told)
    service.signal(signal.SIGTERM)
    service.wait_until(lambda: service.heard("STOPPING=1"), "the end is told")
    assert service.wait() == 0


def test_the_watchdog_is_not_fed_while_a_worker_shows_no_sign_of_life(lab: Lab, directory: Path) -> None:
    a, _ = lab.veth("a")
    service = Service(
        lab,
        directory,
        [{"uri": f"ring:{a}"}],
        environment={"WATCHDOG_USEC": "200000"},
        service={"heartbeat_timeout_s": 1},
    )
    service.wait_until(lambda: service.heard("WATCHDOG=1"), "the watchdog")
    pids = service.pids()
    os.kill(pids["capture/a"], signal.SIGSTOP)
    service.wait_for_start("capture/a", pids["capture/a"])
    assert "capture/a shows no sign of life" in service.log
    assert service.stop() == 0


def test_a_manager_that_listens_no_longer_does_not_hold_up_the_supervisor(lab: Lab, directory: Path) -> None:
    """The queue of its socket is full after some messages, here within a second or two."""
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}], environment={"WATCHDOG_USEC": "100000"})
    time.sleep(3)
    for count in (1, 2):
        killed = service.pids()["capture/a"]
        os.kill(killed, signal.SIGKILL)
        service.wait_for_start("capture/a", killed)
        lab.send([pa], frames=500, rate=10_000, first_sequence=500 * (count - 1))
        service.wait_at_rest({"a": 500 * count})
    assert service.stop() == 0
    service.check({0: 1000})


def test_an_idle_service_sleeps(lab: Lab, directory: Path) -> None:
    """The goal is 1 % of a core (measured: see the bench); this catches what spins."""
    a, _ = lab.veth("a")
    b, _ = lab.veth("b")
    service = Service(
        lab,
        directory,
        [{"uri": f"ring:{a}"}, {"uri": f"ring:{b}"}],
        meter={"enabled": True},
        monitor={"listen": "127.0.0.1:9750"},
        output={"rotate_seconds": 60},
    )
    time.sleep(1)
    pids = service.processes()
    before, started = cpu_seconds(pids), time.monotonic()
    time.sleep(3)
    share = (cpu_seconds(pids) - before) / (time.monotonic() - started)
    assert service.stop() == 0
    assert share < 0.10, f"{share:.1%} of a core while nothing happens"


@requires_tool("prlimit")
def test_a_worker_that_the_machine_has_no_room_for_is_tried_again_until_the_limit(lab: Lab, directory: Path) -> None:
    """Less address space than a worker needs: some worker cannot start, the others are not harmed, the end is named."""
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}], service={"restart_limit": 2})
    sent = lab.send([pa], frames=500, rate=10_000)
    service.wait_at_rest({"a": 500})
    # From now on the supervisor may open nothing more: a new life of the monitor cannot begin.
    held = len(os.listdir(f"/proc/{service.process.pid}/fd"))
    subprocess.run(["prlimit", f"--pid={service.process.pid}", f"--nofile={held - 3}:{held - 3}"], check=True)
    os.kill(service.pids()["monitor"], signal.SIGKILL)
    assert service.wait() == 69
    assert "monitor cannot be started (Too many open files), 3 times within 60 s: giving up" in service.log
    assert "Traceback" not in service.log
    service.check(sent.sent_by_id)
