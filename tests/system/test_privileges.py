"""What the processes of a running service may do, and what they hold."""

from __future__ import annotations

import os
import pwd
import re
import stat
from pathlib import Path

from support.lab import Lab, requires_root, requires_tool
from support.service import Service, process_name, process_status

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]

NET_RAW = 1 << 13
CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def start(lab: Lab, directory: Path, **tables: object) -> tuple[Service, str]:
    a, pa = lab.veth("a")
    lab.veth("b")
    service = Service(
        lab,
        directory,
        [{"uri": f"ring:{a}"}, {"uri": "ring:b"}],
        meter={"enabled": True, "export": [{"uri": "file:", "rotate_seconds": 1}]},
        monitor={"listen": "127.0.0.1:9750", "control_socket": str(directory / "run" / "control")},
        **tables,
    )
    return service, pa


def descriptors(pid: int) -> dict[int, str]:
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
    return found


def kinds(pid: int) -> dict[str, list[str]]:
    """Open descriptors but the standard ones, by kind: ring:a, socket, eventfd, pipe, ..."""
    found: dict[str, list[str]] = {}
    for number, target in descriptors(pid).items():
        if number > 2:
            kind = re.sub(r":\[\d+\]$", "", target)
            found.setdefault(kind.removeprefix("/memfd:").removesuffix(" (deleted)"), []).append(target)
    return found


def packet_sockets(lab: Lab) -> set[str]:
    lines = lab.run(["cat", "/proc/net/packet"]).stdout.splitlines()[1:]
    return {f"socket:[{line.split()[-1]}]" for line in lines}


def test_no_process_but_the_opener_keeps_a_capability(lab: Lab, directory: Path) -> None:
    service, pa = start(lab, directory)
    lab.send([pa], frames=100, rate=10_000)
    service.wait_until(lambda: bool(service.ready()), "a file")
    pids = service.processes()
    assert len(pids) >= 8  # supervisor, opener, two captures, merge, meter, monitor, compressor
    for pid in pids:
        status, name = process_status(pid), process_name(pid)
        assert status["NoNewPrivs"] == "1", name
        sets = {key: int(status[key], 16) for key in CAPABILITY_SETS}
        if name == "opener":
            assert sets == {"CapInh": 0, "CapPrm": NET_RAW, "CapEff": NET_RAW, "CapBnd": NET_RAW, "CapAmb": 0}
        else:
            assert sets == dict.fromkeys(CAPABILITY_SETS, 0), name
    assert service.stop() == 0


def test_each_process_holds_its_own_descriptors_only(lab: Lab, directory: Path) -> None:
    service, _ = start(lab, directory)
    pids = service.pids()
    packet = packet_sockets(lab)
    assert len(packet) == 2
    supervisor_side = set(descriptors(pids["supervisor"]).values())
    assert packet < supervisor_side
    for name, pid in pids.items():
        if name == "supervisor":
            continue
        held = kinds(pid)
        sockets = set(held.get("socket", []))
        # Its channel's other end and its log pipe's other end are the supervisor's; nobody else has either.
        mine = sockets & packet
        assert len(mine) == (1 if name.startswith("capture/") else 0), (name, held)
        for other, other_pid in pids.items():
            if other not in (name, "supervisor"):
                assert not sockets & set(kinds(other_pid).get("socket", [])), (name, other)
                assert not set(held.get("pipe", [])) & set(kinds(other_pid).get("pipe", [])), (name, other)
    assert {key: len(value) for key, value in kinds(pids["capture/a"]).items()} == {
        "socket": 2,  # its channel, its packet socket
        "pipe": 1,  # its log
        "ring-a": 2,  # packets, digests
        "port-a": 1,  # port capture
        "anon_inode:[eventfd]": 3,  # its own, the merge's, the meter's
    }
    opener = kinds(service.opener_pid())
    assert len(opener["socket"]) == 1, opener
    assert set(opener) <= {"socket"}, opener
    assert service.stop() == 0


def test_the_service_runs_as_the_user_that_is_named(lab: Lab, directory: Path) -> None:
    account = pwd.getpwnam("daemon")
    home = directory / "state"
    home.mkdir()
    os.chown(home, account.pw_uid, account.pw_gid)
    service, pa = start(
        lab,
        directory,
        service={"user": "daemon"},
        output={"directory": str(home / "output"), "compressor": ["lz4", "-q", "-c"]},
    )
    service.directory = home / "output"
    lab.send([pa], frames=100, rate=10_000)
    service.wait_at_rest({"a": 100})
    for pid in service.processes():
        status = process_status(pid)
        assert set(status["Uid"].split()) == {str(account.pw_uid)}, process_name(pid)
        assert set(status["Gid"].split()) == {str(account.pw_gid)}
        expected = NET_RAW if process_name(pid) == "opener" else 0
        assert int(status["CapPrm"], 16) == expected
    lab.recreate("a")  # opening again works after the drop
    service.wait_until(lambda: service.interface("a").reopened == 1, "it is open again")
    lab.send([pa], frames=100, rate=10_000, first_sequence=100)
    service.wait_at_rest({"a": 200})
    assert service.stop() == 0
    service.check({0: 200})
    assert {path.stat().st_uid for path in service.ready()} == {account.pw_uid}
    service.assert_nothing_left()


def test_files_have_their_mode_whatever_the_umask(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    service = Service(
        lab,
        directory,
        [{"uri": f"ring:{a}"}],
        output={"group_readable": False},
        prefix=["sh", "-c", 'umask 000; exec "$@"', "sh"],
    )
    lab.send([pa], frames=100, rate=10_000)
    service.wait_at_rest({"a": 100})
    staged = [stat.S_IMODE(path.stat().st_mode) for path in (directory / "work").iterdir()]
    assert set(staged) == {0o600}
    assert service.stop() == 0
    assert {stat.S_IMODE(path.stat().st_mode) for path in service.ready()} == {0o600}
    directories = ("work", "ready", "meta", "quarantine")
    assert all(not (directory / name).stat().st_mode & 0o022 for name in directories)


def test_workers_run_on_the_cpus_that_they_are_given(lab: Lab, directory: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    a, _ = lab.veth("a")
    b, _ = lab.veth("b")
    service = Service(
        lab,
        directory,
        [{"uri": f"ring:{a}", "cpus": [cpu]}, {"uri": f"ring:{b}"}],
        output={"cpus": [cpu], "compressor": "none"},
        meter={"enabled": True, "cpus": [cpu]},
    )
    everywhere = os.sched_getaffinity(0)
    found = {worker: os.sched_getaffinity(pid) for worker, pid in service.pids().items()}
    assert service.stop() == 0
    assert found["capture/a"] == found["merge/main"] == found["meter"] == {cpu}
    assert found["capture/b"] == found["supervisor"] == everywhere
