"""What the service takes of the machine, what it does when there is no more, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from support.faults import lab_with_wires
from support.identities import Traffic, balance, conclude
from support.lab import Lab, requires_root, requires_tool, wait_until
from support.service import Service, process_name

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]


def named_memory(pids: Iterable[int]) -> set[str]:
    """What these processes have mapped or opened of memory that has a name in /dev/shm."""
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):  # compressors come and go
            found |= set(re.findall(r"/dev/shm/.*", Path(f"/proc/{pid}/maps").read_text()))
            found |= {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    return {name for name in found if name.startswith("/dev/shm/") and not name.endswith(" (deleted)")}


def test_a_kill_of_everything_leaves_no_shared_memory_and_no_packet_socket(lab: Lab, directory: Path) -> None:
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    service = Service(lab, directory, [{"uri": "ring:a"}], meter={"enabled": True})
    traffic.send(1000)
    balance(service, traffic.sent)
    assert named_memory(service.processes()) == set()  # rings are anonymous: there is no name to leave behind
    for pid in service.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    service.wait()
    wait_until(lambda: service.leftover_processes() == [], "nobody is left")
    assert lab.run(["cat", "/proc/net/packet"]).stdout.count("\n") == 1
    again = Service(lab, directory, [{"uri": "ring:a"}])
    assert again.stop() == 0


def test_no_helper_of_pythons_removes_memory_that_others_still_use(lab: Lab, directory: Path) -> None:
    """multiprocessing's resource tracker unlinks what a dead process had attached to: here there is none."""
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    service = Service(lab, directory, [{"uri": "ring:a"}], meter={"enabled": True})
    for pid in service.processes():
        assert b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes(), process_name(pid)
    for worker in ("monitor", "meter"):
        killed = service.pids()[worker]
        traffic.send(500)
        os.kill(killed, signal.SIGKILL)
        service.wait_for_start(worker, killed)
        traffic.send(500)
    last = conclude(service, traffic)
    assert last.interfaces[0].lost_packets == 0


@requires_tool("prlimit")
def test_a_merge_without_descriptors_waits_and_goes_on_when_there_are_some(lab: Lab, directory: Path) -> None:
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    service = Service(lab, directory, [{"uri": "ring:a"}], output={"compressor": "none"})
    traffic.send(1000)
    balance(service, traffic.sent)
    merge = service.pids()["merge/main"]
    limits = subprocess.run(
        ["prlimit", f"--pid={merge}", "--nofile", "--output=SOFT,HARD", "--noheadings", "--raw"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    subprocess.run(["prlimit", f"--pid={merge}", f"--nofile=3:{limits[1]}"], check=True)
    service.wait_until(lambda: "Too many open files" in service.log, "the shortage is told")
    traffic.send(1000)
    subprocess.run(["prlimit", f"--pid={merge}", f"--nofile={limits[0]}:{limits[1]}"], check=True)
    begun = time.monotonic()
    balance(service, traffic.sent)
    assert time.monotonic() - begun < 10
    traffic.send(1000)
    conclude(service, traffic)


def test_five_hundred_silent_connections_do_not_hold_up_a_scrape(lab: Lab, directory: Path) -> None:
    """The port is the lab's: this process goes there for its sockets, and comes back."""
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    service = Service(lab, directory, [{"uri": "ring:a"}], monitor={"listen": "127.0.0.1:9750"})
    with inside(lab):
        idle = [socket.create_connection(("127.0.0.1", 9750), timeout=5) for _ in range(500)]
        for number, connection in enumerate(idle):
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n" if number % 2 else b"")
        traffic.send(1000)
        begun = time.monotonic()
        with urllib.request.urlopen("http://127.0.0.1:9750/metrics", timeout=10) as answer:
            text = answer.read().decode()
        took_s = time.monotonic() - begun
    assert "appliance_packets_received_total" in text
    assert took_s < 3
    for connection in idle:
        connection.close()
    assert "10." not in [line.split("{")[0] for line in text.splitlines()]
    conclude(service, traffic)


class inside:  # noqa: N801 - reads as a word of the with statement
    """While the block runs, this thread's new sockets are in the lab's namespace."""

    def __init__(self, lab: Lab) -> None:
        self.target = os.open(f"/run/netns/{lab.namespace}", os.O_RDONLY)

    def __enter__(self) -> None:
        self.own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        setns(self.target)

    def __exit__(self, *_: object) -> None:
        setns(self.own)
        os.close(self.own)
        os.close(self.target)


def setns(fd: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, 0x40000000) != 0:  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "setns")
