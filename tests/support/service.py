"""The appliance as a user runs it: `appliance run -c FILE` in a lab's namespace, told to stop, looked into, judged.

with Lab() as lab, service_directory() as directory:
    a, peer = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    sent = lab.send([peer], frames=1000, rate=10_000)
    service.wait_at_rest({"a": 1000})
    assert service.stop() == 0
    service.check({0: 1000})
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.monitor.view import LOSS_STAGES, InterfaceView, Snapshot
from support.captures import write_pcap
from support.equations import imbalances
from support.judges import NumberedReport, check_numbered, packet_count
from support.lab import Lab, wait_until
from support.replay import send_frames

APPLIANCE = [str(Path(sys.executable).with_name("appliance"))]  # the console script of this environment
START_TIMEOUT_S = 20.0
Table = Mapping[str, Any]


@contextlib.contextmanager
def service_directory() -> Iterator[Path]:
    """A directory with a path short enough for unix sockets below it."""
    directory = Path(tempfile.mkdtemp(prefix="ap-"))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def toml(tables: Table) -> str:
    """Tables of plain values, and lists of tables, as TOML."""
    return "\n".join(toml_lines(tables, "")) + "\n"


def toml_lines(tables: Table, above: str) -> Iterator[str]:
    """A table's own values first, then the tables in it, by their full names."""
    for key, value in tables.items():
        if not is_table(value):
            yield f"{key} = {json.dumps(value)}"
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield f"[{above}{key}]"
            yield from toml_lines(value, f"{above}{key}.")
        elif is_table(value):
            for row in value:
                yield f"[[{above}{key}]]"
                yield from toml_lines(row, f"{above}{key}.")


def is_table(value: object) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def configuration(directory: Path, interfaces: Sequence[Table], **tables: Any) -> dict[str, Any]:
    """Small rings, files of one second below `directory`, no meter, a control socket; `tables` are laid over it.

    `max_wait_ms` is large, so that order does not depend on how busy the machine is.

    `output` is a table, or a list of tables for several outputs.
    """
    given = tables.pop("output", {})
    outputs = given if isinstance(given, list) else [given]
    base = {"directory": str(directory), "rotate_seconds": 1, "max_wait_ms": 500, "min_free_bytes": 0}
    memory = {"ring_bytes": 16 << 20}  # the kernel's ring is that of the defaults: it bridges a second
    config: dict[str, Any] = {
        "interface": [memory | dict(interface) for interface in interfaces],
        "output": [base | output for output in outputs],
        "meter": {"enabled": False} | tables.pop("meter", {}),
        "monitor": {"listen": "", "control_socket": str(directory / "control")} | tables.pop("monitor", {}),
        "service": tables.pop("service", {}),
    }
    return tables | config


class Service:
    """A running service. Its standard error is in `log_path`, its output directory is `directory`."""

    def __init__(
        self,
        lab: Lab,
        directory: Path,
        interfaces: Sequence[Table],
        *,
        wait: bool = True,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        **tables: Any,
    ) -> None:
        """Starts it; returns when it says READY=1, unless `wait` is false. `prefix`: a command that runs it."""
        self.lab = lab
        self.directory = directory
        self.config = configuration(directory, interfaces, **tables)
        self.config_path = directory / "appliance.toml"
        self.log_path = directory / "log"
        self.write_config(self.config)
        self.notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify_path = directory / "notify"
        self.notify_path.unlink(missing_ok=True)
        self.notifications.bind(str(self.notify_path))
        self.notify_path.chmod(0o666)
        self.told: list[str] = []
        with self.log_path.open("ab") as log:
            self.process = lab.popen(
                [*prefix, *APPLIANCE, "run", "-c", str(self.config_path), "--no-figures"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"NOTIFY_SOCKET": str(self.notify_path)} | dict(environment or {}),
            )
        if wait:
            wait_until(lambda: self.heard("READY=1") or self.has_ended, f"READY=1\n{self.log}", START_TIMEOUT_S)
            assert not self.has_ended, self.log

    def write_config(self, config: Table) -> None:
        self.config_path.write_text(toml(config))

    # ---- looking ----

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def heard(self, word: str) -> bool:
        """Whether the service has sent this to its manager (sd_notify)."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.told.append(self.notifications.recv(4096, socket.MSG_DONTWAIT).decode())
        return any(word in message for message in self.told)

    def ask(self, request: str) -> Any:
        """The answer on the control socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            client.connect(self.config["monitor"]["control_socket"])
            client.sendall(json.dumps({"request": request}).encode() + b"\n")
            with client.makefile("rb") as answers:
                answer = json.loads(answers.readline())
        assert answer["ok"], answer
        return answer["result"]

    def snapshot(self) -> Snapshot:
        return Snapshot.from_json(self.ask("status"))

    def interface(self, label: str) -> InterfaceView:
        return next(view for view in self.snapshot().interfaces if view.label == label)

    def pids(self) -> dict[str, int]:
        """Process ids by worker; the supervisor is `supervisor`."""
        return {worker.name: worker.pid for worker in self.snapshot().workers} | {"supervisor": self.process.pid}

    def pids_by_page(self) -> dict[str, int]:
        """As `pids`; with a `prefix` that stays, the supervisor is another process than the one started."""
        children = descendants(self.process.pid)
        supervisor = next((pid for pid in children if self.snapshot().workers[0].pid in descendants(pid)), None)
        return self.pids() | {"supervisor": supervisor or self.process.pid}

    def opener_pid(self) -> int:
        return next(pid for pid in self.processes() if process_name(pid) == "opener")

    def processes(self) -> list[int]:
        """Every process of the service: it and its descendants, the compressors too."""
        return [self.process.pid, *descendants(self.process.pid)]

    def leftover_processes(self) -> list[int]:
        """Processes in the lab's namespace that hold our directory's name in their command line or descend from us."""
        listed = subprocess.run(["ip", "netns", "pids", self.lab.namespace], capture_output=True, text=True, check=True)
        return [int(pid) for pid in listed.stdout.split()]

    def ready(self) -> list[Path]:
        """Published files, in the order of their names."""
        return sorted((self.directory / "ready").iterdir())

    def sidecars(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.directory / "meta").glob("*.json"))]

    # ---- waiting ----

    def wait_until(self, condition: Any, what: str, timeout_s: float = 15.0) -> None:
        """As lab.wait_until; a failure comes with the log."""
        try:
            wait_until(condition, what, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def wait_for_start(self, worker: str, other_than: int, timeout_s: float = 15.0) -> int:
        """Until `worker` runs as another process than `other_than`; its process id."""
        self.wait_until(
            lambda: self.has_new_life(worker, other_than), f"a new life of {worker} (was {other_than})", timeout_s
        )
        return self.pids()[worker]

    def has_new_life(self, worker: str, other_than: int) -> bool:
        try:
            found = next(view for view in self.snapshot().workers if view.name == worker)
        except OSError:
            return False  # the monitor itself is between two lives
        return found.pid != other_than and found.state == "running"

    def wait_at_rest(self, received: Mapping[str, int], timeout_s: float = 15.0) -> Snapshot:
        """Until every packet received is written or counted as dropped, and every accounting identity holds; the
        snapshot of that moment.

        `received`: per label what the interface must have received by then (other interfaces: whatever they have).
        """
        last: list[Snapshot] = []

        def rests() -> bool:
            try:
                last.append(self.snapshot())
            except OSError:
                return False
            views = {view.label: view for view in last[-1].interfaces}
            return all(views[label].received_packets >= count for label, count in received.items()) and not imbalances(
                last[-1]
            )

        try:
            self.wait_until(rests, f"rest after {dict(received)}", timeout_s)
        except AssertionError as error:
            shown = "\n".join(imbalances(last[-1]) + [str(view) for view in last[-1].interfaces]) if last else "-"
            raise AssertionError(f"{shown}\n{error}") from None
        for label, count in received.items():
            view = next(view for view in last[-1].interfaces if view.label == label)
            assert view.received_packets == count, (label, count, view)
        return last[-1]

    # ---- ending ----

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> int:
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s\n{self.log}") from None
        self.notifications.close()
        return status

    def stop(self, timeout_s: float = 20.0) -> int:
        """TERM; the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    # ---- judging ----

    def assert_nothing_left(self) -> None:
        """No staging file, no process, no socket of a service that has ended."""
        assert not list((self.directory / "work").iterdir()), list((self.directory / "work").iterdir())
        quarantined = list((self.directory / "quarantine").iterdir())
        assert not quarantined, [path.read_text() for path in quarantined if path.suffix == ".json"]
        assert not Path(self.config["monitor"]["control_socket"]).exists()
        assert self.leftover_processes() == []

    def check(self, sent: Mapping[int, int], first: int = 0) -> NumberedReport:
        """Every frame sent is in the published files, once, in order; the files agree with their sidecars."""
        report = check_numbered(self.ready())
        assert not (faults := report.faults(sent, first)), f"{faults}\n{self.log}"
        self.check_sidecars()
        return report

    def check_sidecars(self) -> None:
        sidecars = self.sidecars()
        assert {sidecar["file"] for sidecar in sidecars} == {path.name for path in self.ready()}
        for sidecar in sidecars:
            path = self.directory / "ready" / sidecar["file"]
            assert sidecar["packets"] == packet_count([path]), sidecar
            assert sidecar["bytes"] == path.stat().st_size, sidecar


def meter_frames(
    lab: Lab, directory: Path, source: str, frames: Sequence[bytes], scratch: Path, **meter: object
) -> list[Path]:
    """A service's files of flow records of `frames`, which come from an interface or, `pcapfile`, from a file."""
    name, peer = lab.veth("a")
    is_file = source == "pcapfile"
    target = write_pcap(scratch / "metered.pcap", list(enumerate(frames))) if is_file else name
    settings = {"enabled": True, "export": [{"uri": "file:"}], **meter}
    service = Service(lab, directory, [{"uri": f"{source}:{target}", "label": "a"}], meter=settings, wait=not is_file)
    if is_file:
        assert service.process.wait(timeout=30) == 0, service.log
    else:
        assert send_frames(lab, peer, frames, scratch) == len(frames)
        service.wait_at_rest({"a": len(frames)})
        assert service.stop() == 0
    return sorted((directory / "flows").iterdir())


def lost(view: InterfaceView) -> int:
    return sum(view.dropped[stage] for stage in LOSS_STAGES)


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def process_name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def process_status(pid: int) -> dict[str, str]:
    """/proc/PID/status: CapEff, NoNewPrivs, Uid, ..."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def refused(lab: Lab, directory: Path, config: Table | str, prefix: Sequence[str] = ()) -> tuple[int, str]:
    """`appliance run` that must not start: its exit status and what it said."""
    path = directory / "refused.toml"
    path.write_text(config if isinstance(config, str) else toml(config))
    path.chmod(0o644)
    command = [*prefix, *APPLIANCE, "run", "-c", str(path), "--no-figures"]
    done = lab.run(command, check=False, timeout_s=60)  # LabError when it does not end
    path.unlink()
    return done.returncode, done.stdout + done.stderr
