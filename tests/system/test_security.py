"""What an attacker finds in a running service: no rights, no names, no shell, and files that are nobody else's."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from support.faults import lab_with_wires
from support.identities import Traffic, balance, conclude
from support.lab import Lab, requires_root, requires_tool
from support.service import Service, descendants, process_name, process_status

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]


def start(lab: Lab, directory: Path, **tables: object) -> tuple[Service, Traffic]:
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    tables = {"meter": {"enabled": True, "export": [{"uri": "file:", "rotate_seconds": 1}]}} | tables
    return Service(lab, directory, [{"uri": "ring:a"}], **tables), traffic


def test_an_interface_is_opened_again_by_processes_without_any_right(lab: Lab, directory: Path) -> None:
    service, traffic = start(lab, directory)
    traffic.send(500)
    balance(service, traffic.sent)
    lab.recreate("a")
    service.wait_until(lambda: service.interface("a").reopened == 1, "it is open again")
    traffic.send(500)
    last = balance(service, traffic.sent)
    for pid in service.processes():
        status = process_status(pid)
        kept = 1 << 13 if process_name(pid) == "opener" else 0
        assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {kept}, process_name(pid)
        assert status["NoNewPrivs"] == "1"
    assert last.interfaces[0].lost_packets == 0
    assert service.stop() == 0


@requires_tool("strace")
def test_every_file_is_made_exclusively_without_links_and_closed_on_exec(lab: Lab, directory: Path) -> None:
    trace = directory / "trace"
    out = directory / "out"
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    service = Service(
        lab,
        directory,
        [{"uri": "ring:a"}],
        output={"directory": str(out), "compressor": ["lz4", "-q", "-c"]},
        meter={"enabled": True, "export": [{"uri": "file:", "rotate_seconds": 1}]},
        prefix=["strace", "-f", "-y", "-s", "300", "-e", "trace=openat,execve,dup2,dup3", "-o", str(trace)],
        service={"heartbeat_timeout_s": 60},
    )
    service.directory = out
    traffic.send(500, flows=10)
    service.wait_until(lambda: len(service.ready()) >= 2, "files")
    lab.run(["kill", "-TERM", str(service.pids_by_page()["supervisor"])])
    assert service.wait(40) == 0
    text = trace.read_text(errors="replace")
    below = re.escape(f"{out}/")
    made = re.findall(rf'openat\([^"]*"({below}[^"]*)", ([A-Z_|]*O_CREAT[A-Z_|]*), 0?(\d+)\) = \d+', text)
    staged = [flags for path, flags, _ in made if path.startswith(f"{out}/work/")]
    assert staged
    for flags in staged:
        assert {"O_EXCL", "O_NOFOLLOW", "O_CLOEXEC"} <= set(flags.split("|")), flags
    for path, flags, mode in made:
        assert {"O_NOFOLLOW", "O_CLOEXEC"} <= set(flags.split("|")), (path, flags)
        assert int(mode, 8) & 0o137 == 0, (path, mode)  # never more than 0640, from the first moment
    # The staging file is the compressor's standard output: it opens nothing itself.
    assert re.search(rf"dup[23]\(\d+<{re.escape(str(out))}/work/[^>]*>, 1", text)
    assert {stat.S_IMODE(path.stat().st_mode) for path in service.ready()} == {0o640}


def test_children_get_an_argv_and_a_minimal_environment_and_never_a_shell(lab: Lab, directory: Path) -> None:
    service, traffic = start(
        lab,
        directory,
        output={"compressor": ["lz4", "-q", "-c"], "rotate_seconds": 3600},
        environment={"SECRET": "of the parent"},
    )
    traffic.send(500)
    balance(service, traffic.sent)
    compressors = descendants(service.pids()["merge/main"])
    assert compressors
    for pid in compressors:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
        assert os.path.basename(argv[0]) == b"lz4"
        assert argv[1:] == [b"-q", b"-c"]
        names = {line.partition(b"=")[0] for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if line}
        assert names == {b"PATH", b"LANG"}
        assert len(os.listdir(f"/proc/{pid}/fd")) == 3
    conclude(service, traffic)


def test_shared_memory_has_no_name_and_belongs_to_the_service_alone(lab: Lab, directory: Path) -> None:
    service, traffic = start(lab, directory)
    traffic.send(500)
    balance(service, traffic.sent)
    for pid in service.processes():
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[1] == "rw-s":
                # Memfds, the kernel's packet ring, what was unlinked: none of them can be opened by a name.
                unnamed = fields[5].startswith(("/memfd:", "socket:")) or fields[5].endswith(" (deleted)")
                assert unnamed, (process_name(pid), line)
        for fd in os.listdir(f"/proc/{pid}/fd"):
            target = f"/proc/{pid}/fd/{fd}"
            if os.readlink(target).startswith("/memfd:ring-"):
                assert not os.stat(target).st_mode & 0o077 or os.stat(target).st_nlink == 0
    conclude(service, traffic)


def test_metrics_listen_on_loopback_and_tell_nothing_of_the_packets(lab: Lab, directory: Path) -> None:
    service, traffic = start(lab, directory, monitor={"listen": "127.0.0.1:9750"})
    traffic.send(500, flows=50)
    balance(service, traffic.sent)
    listening = lab.run(["ss", "-Hltn"]).stdout.split()
    assert [word for word in listening if word.endswith(":9750")] == ["127.0.0.1:9750"]
    page = lab.run(["curl", "-s", "http://127.0.0.1:9750/metrics"]).stdout if shutil.which("curl") else fetch(lab)
    assert "appliance_packets_received_total" in page
    for address in ("10.1.0.0", "10.2.0.1", "02:00:00", ":20000"):  # of the frames
        assert address not in page
    labels = set(re.findall(r'(\w+)="', page))
    assert len(labels) < 40, labels
    conclude(service, traffic)


def fetch(lab: Lab) -> str:
    code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9750/metrics').read().decode())"
    return lab.run(["python3", "-c", code]).stdout


SANDBOXED = ("NoNewPrivileges=", "CapabilityBoundingSet=", "ProtectSystem=", "SystemCallFilter=", "MemoryMax=")


@requires_tool("systemd-analyze", "strace")
@pytest.mark.slow
def test_the_service_runs_inside_the_sandbox_that_the_unit_describes(lab: Lab, directory: Path, project: Path) -> None:
    """No systemd runs here. What it would enforce is taken from the unit: every system call that a whole life of the
    service makes, with a meter, compressors, a killed worker and a stop, must be one that the unit's filter allows."""
    unit = (project / "systemd" / "appliance.service").read_text()
    assert all(f"\n{key}" in unit for key in SANDBOXED)
    for key in ("RestrictAddressFamilies=", "WatchdogSec=", "ProtectHome="):
        assert f"\n{key}" in unit
    trace = directory / "calls"
    service, traffic = start(
        lab,
        directory,
        prefix=["strace", "-f", "-q", "-e", "signal=none", "-o", str(trace)],
        service={"heartbeat_timeout_s": 60},
        monitor={"listen": "127.0.0.1:9750"},
    )
    traffic.send(200, rate=2000, flows=10)
    killed = service.pids()["meter"]
    os.kill(killed, signal.SIGKILL)
    service.wait_for_start("meter", killed, 60)
    fetch(lab)
    lab.run(["kill", "-TERM", str(service.pids_by_page()["supervisor"])])
    assert service.wait(60) == 0, service.log
    made = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(errors="replace"), re.MULTILINE))
    assert len(made) > 40
    forbidden = sorted(made - allowed_calls("@system-service"))
    # What changes the identity and the limits is refused with EPERM by such a unit, and is tried only by root.
    assert forbidden == [], forbidden


def allowed_calls(group: str) -> set[str]:
    listed = subprocess.run(["systemd-analyze", "syscall-filter", "--no-pager", group], capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    found: set[str] = set()
    for line in listed.stdout.splitlines()[1:]:
        word = line.strip()
        if word.startswith("@"):
            found |= allowed_calls(word)
        elif word and not word.startswith("#"):
            found.add(word)
    return found


@pytest.mark.parametrize("target", ["ready", "meta", "quarantine"])
def test_a_link_in_the_place_of_a_directory_is_refused_at_the_start(lab: Lab, directory: Path, target: str) -> None:
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir()
    out = directory / "out"
    out.mkdir()
    (out / target).symlink_to(elsewhere)
    lab.veth("a")
    begun = time.monotonic()
    service = Service(lab, directory, [{"uri": "ring:a"}], output={"directory": str(out)}, wait=False)
    assert service.wait() == 73
    assert "symbolic link" in service.log
    assert list(elsewhere.iterdir()) == []
    assert time.monotonic() - begun < 20
