"""A network laboratory: namespaces and veth pairs of a test's own, in which only its own frames are seen.

    with Lab() as lab:
        a, peer = lab.veth("a")
        capture = lab.popen(["tcpdump", "-i", a, ...])
        report = lab.send([peer], frames=1000, rate=10_000)

Everything goes at the end, also after a failure: first the processes, by their ids, then the namespaces with all that
is in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from support import xdpsend
from support.frames import format_sizes

TESTS_DIRECTORY = Path(__file__).resolve().parent.parent
INTERFACE_NAME_BYTES = 15  # IFNAMSIZ - 1
_QUIET = (
    "for f in /proc/sys/net/ipv6/conf/all/disable_ipv6 /proc/sys/net/ipv6/conf/default/disable_ipv6;"
    " do if [ -e $f ]; then echo 1 > $f; fi; done"
)


Word = str | os.PathLike[str]


class LabError(Exception):
    """A command of the laboratory failed; the message has the command and what it said."""


@cache
def _namespaces_refused() -> str | None:
    """Why no network namespace can be made here, or None."""
    if os.geteuid() != 0:
        return "needs root: it makes network namespaces and veth pairs"
    if shutil.which("ip") is None:
        return "needs the program ip (Debian package iproute2)"
    name = f"lab-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"cannot make network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return None


requires_root = pytest.mark.skipif(_namespaces_refused() is not None, reason=str(_namespaces_refused()))


def requires_tool(*names: str) -> pytest.MarkDecorator:
    """Skips a test when one of the programs is not installed, and says which."""
    missing = [name for name in names if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0, interval_s: float = 0.02) -> None:
    """Returns as soon as `condition()` holds; AssertionError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(interval_s)


@dataclass(frozen=True)
class SendReport:
    """What a sender put on the wire. `sent` and `ids` are per interface name; numbers begin at `first_sequence`."""

    sent: dict[str, int]
    ids: dict[str, int]
    first_sequence: int
    retries: int
    seconds: float
    rate_pps: float

    @property
    def sent_by_id(self) -> dict[int, int]:
        return {self.ids[name]: count for name, count in self.sent.items()}

    @property
    def total(self) -> int:
        return sum(self.sent.values())


class Sender:
    """A sender that runs; `report()` waits for its end, `stop()` ends it early."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def report(self, timeout_s: float = 120.0) -> SendReport:
        output, complaints = self.process.communicate(timeout=timeout_s)
        if self.process.returncode != 0:
            raise LabError(f"the sender ended with {self.process.returncode}: {complaints.strip()}")
        return SendReport(**json.loads(output))

    def stop(self) -> SendReport:
        self.process.send_signal(signal.SIGTERM)
        return self.report()


class Lab:
    """One or several network namespaces; see the module's text. Names of interfaces are as in the kernel."""

    def __init__(self) -> None:
        self.namespace = f"lab-{os.getpid()}-{secrets.token_hex(3)}"
        self._namespaces: list[str] = []
        self._processes: list[subprocess.Popen[Any]] = []
        self._pairs: dict[str, tuple[str, str | None]] = {}

    def __enter__(self) -> Self:
        try:
            self._make_namespace(self.namespace)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process that the lab started, and whatever else still runs in its namespaces, then removes them.

        Output that nobody reads is closed, so that no process hangs on a full pipe. An interrupt waits until all is
        gone.
        """
        with uninterrupted():
            for process in self._processes:
                end_process(process)
            for name in self._namespaces:
                self._end_leftovers(name)
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            self._processes.clear()
            self._namespaces.clear()
            self._pairs.clear()

    # Namespaces and interfaces

    def add_namespace(self, label: str) -> str:
        """A further namespace; returns its name, which every `namespace=` of this class takes."""
        name = f"{self.namespace}-{label}"
        self._make_namespace(name)
        return name

    def veth(self, name: str, *, peer_namespace: str | None = None, arp: bool = False) -> tuple[str, str]:
        """A veth pair, both ends up: (`name`, `name`p). The second end may be in another namespace.

        Without `arp` the kernel sends nothing of its own on it, and no address is resolved.
        """
        peer = name + "p"
        if len(peer.encode()) > INTERFACE_NAME_BYTES:
            raise ValueError(f"interface name too long: {peer}")
        self._pairs[name] = (peer, peer_namespace)
        command = ["link", "add", "name", name, "type", "veth", "peer", "name", peer]
        self.ip(*command, *(("netns", peer_namespace) if peer_namespace else ()))
        state = "on" if arp else "off"
        self.ip("link", "set", "dev", peer, "arp", state, "up", namespace=peer_namespace)
        self.ip("link", "set", "dev", name, "arp", state, "up")
        wait_until(lambda: self.carrier(name) and self.carrier(peer, peer_namespace), f"carrier on {name}")
        return name, peer

    def down(self, name: str, namespace: str | None = None) -> None:
        self.ip("link", "set", "dev", name, "down", namespace=namespace)

    def up(self, name: str, namespace: str | None = None) -> None:
        self.ip("link", "set", "dev", name, "up", namespace=namespace)

    def delete(self, name: str, namespace: str | None = None) -> None:
        """Removes an interface; of a veth pair both ends go."""
        self.ip("link", "del", "dev", name, namespace=namespace)

    def recreate(self, name: str) -> tuple[str, str]:
        """Deletes a veth pair and makes it anew under the same names, with new interface indices."""
        _, peer_namespace = self._pairs[name]
        self.delete(name)
        return self.veth(name, peer_namespace=peer_namespace)

    def rename(self, name: str, new_name: str, namespace: str | None = None) -> None:
        """Renames an interface, which is down meanwhile, as older kernels ask."""
        self.down(name, namespace)
        self.ip("link", "set", "dev", name, "name", new_name, namespace=namespace)
        self.up(new_name, namespace)

    def offload(self, name: str, namespace: str | None = None, **switches: bool) -> None:
        """Sets ethtool features, by ethtool's names: `lab.offload("a", gro=False, tx_checksumming=False)`."""
        words = [word for key, on in switches.items() for word in (key.replace("_", "-"), "on" if on else "off")]
        self.run(["ethtool", "-K", name, *words], namespace=namespace)

    def mtu(self, name: str, mtu_bytes: int, namespace: str | None = None) -> None:
        self.ip("link", "set", "dev", name, "mtu", str(mtu_bytes), namespace=namespace)

    def address(self, name: str, prefix: str, namespace: str | None = None) -> None:
        """Gives an interface an address: `lab.address("a", "10.0.0.1/24")`."""
        self.ip("address", "add", prefix, "dev", name, namespace=namespace)

    def carrier(self, name: str, namespace: str | None = None) -> bool:
        return "LOWER_UP" in self._link(name, namespace)["flags"]

    def index(self, name: str, namespace: str | None = None) -> int:
        return int(self._link(name, namespace)["ifindex"])

    def statistics(self, name: str, namespace: str | None = None) -> dict[str, int]:
        """The interface's own counters: rx_packets, rx_bytes, rx_dropped, tx_packets, tx_bytes, tx_dropped."""
        counters = self._link(name, namespace)["stats64"]
        fields = ("packets", "bytes", "dropped")
        return {f"{way}_{field}": int(counters[way][field]) for way in ("rx", "tx") for field in fields}

    def ip(self, *words: str, namespace: str | None = None) -> str:
        """Runs `ip` in the namespace (the lab's own by default); returns what it printed."""
        command = self.argv(["ip", *words], namespace)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    # Processes

    def argv(self, command: Sequence[Word], namespace: str | None = None) -> list[str]:
        """The command as it runs in the namespace; nsenter becomes it, so the process id is the command's."""
        # Neither `ip netns exec` nor `ip -n`: they mount a /sys of their own, which a plain chroot (no mount) refuses.
        return ["nsenter", f"--net=/run/netns/{namespace or self.namespace}", *_words(command)]

    def popen(self, command: Sequence[Word], *, namespace: str | None = None, **options: Any) -> subprocess.Popen[Any]:
        """Starts a command in the namespace; options as for subprocess.Popen. The lab ends it at the latest."""
        process: subprocess.Popen[Any] = subprocess.Popen(self.argv(command, namespace), **options)
        self._processes.append(process)
        return process

    def run(
        self,
        command: Sequence[Word],
        *,
        namespace: str | None = None,
        timeout_s: float = 60.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Word | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the namespace to its end, with its output as text; LabError when `check` and it fails."""
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = self.popen(command, namespace=namespace, env=env, cwd=cwd, **options)
        try:
            output, complaints = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            end_process(process)
            raise LabError(f"{' '.join(_words(command))}: still running after {timeout_s} s") from None
        if check and process.returncode != 0:
            said = f"{output}{complaints}".strip()
            raise LabError(f"{' '.join(_words(command))}: status {process.returncode}: {said}")
        return subprocess.CompletedProcess(_words(command), process.returncode, output, complaints)

    # Traffic

    def start_sender(
        self,
        interfaces: Sequence[str],
        *,
        frames: int = 0,
        rate: float = 0.0,
        sizes: Iterable[int] = (60,),
        vlan: int | None = None,
        flows: int | None = None,
        first_id: int = 0,
        first_sequence: int = 0,
        namespace: str | None = None,
    ) -> Sender:
        """Starts sending numbered frames: `frames` per interface (0: until stopped), `rate` per second in all.

        A `rate` of 0 is the limit. The n-th interface has the number `first_id` + n. `vlan` puts an 802.1Q tag into the
        frames themselves. With `flows` the frames are UDP datagrams of so many flows.
        """
        command = [sys.executable, "-m", "support.sender", *interfaces]
        command += ["--frames", str(frames), "--rate", str(rate), "--sizes", format_sizes(tuple(sizes))]
        command += ["--first-id", str(first_id), "--first-sequence", str(first_sequence)]
        command += [] if vlan is None else ["--vlan", str(vlan)]
        command += [] if flows is None else ["--udp", "--flows", str(flows)]
        return self._start_module(command, namespace)

    def send(self, interfaces: Sequence[str], *, frames: int, **options: Any) -> SendReport:
        """Sends to the end and reports; options as for `start_sender`."""
        return self.start_sender(interfaces, frames=frames, **options).report()

    def start_fast_sender(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        frames: int = 0,
        rate: float = 0.0,
        sizes: Iterable[int] = (60,),
        flows: int | None = None,
        first_sequence: int = 0,
        cpu: int | None = None,
    ) -> Sender:
        """As `start_sender` for benches: from the kernel where that is possible (1-2 M frames/s), else through sockets.

        `pairs` as `veth` returned them; the frames arrive at the first of each. The receivers' rx_packets tell how many
        of the frames sent found room. `cpu`: where it runs, and with it the reception of what it sends.
        """
        senders = [sender for _, sender in pairs]
        module = "support.xdpsend" if xdpsend.available() else "support.sender"
        command = [] if cpu is None else ["taskset", "-c", str(cpu)]
        command += [sys.executable, "-m", module, *senders]
        if module == "support.xdpsend":
            command += [word for receiver, _ in pairs for word in ("--receiver", receiver)]
        command += ["--frames", str(frames), "--rate", str(rate), "--sizes", format_sizes(tuple(sizes))]
        command += ["--first-sequence", str(first_sequence)]
        command += [] if flows is None else ["--udp", "--flows", str(flows)]
        return self._start_module(command, None)

    # Inside

    def _start_module(self, command: Sequence[str], namespace: str | None) -> Sender:
        environment = os.environ | {"PYTHONPATH": str(TESTS_DIRECTORY)}
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # Whoever stops a sender that is only starting gets its report all the same: it unblocks the signal (Stop).
        with uninterrupted():
            return Sender(self.popen(command, namespace=namespace, env=environment, **options))

    def _make_namespace(self, name: str) -> None:
        self._namespaces.append(name)  # before it is there: an interrupt that another thread took comes in between
        with uninterrupted():
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            if made.returncode != 0:
                raise LabError(f"cannot make the namespace {name}: {made.stderr.strip()}")
        self.run(["sh", "-c", _QUIET], namespace=name)
        self.ip("link", "set", "dev", "lo", "up", namespace=name)

    def _link(self, name: str, namespace: str | None) -> dict[str, Any]:
        links: list[dict[str, Any]] = json.loads(
            self.ip("-json", "-statistics", "link", "show", "dev", name, namespace=namespace)
        )
        return links[0]

    def _end_leftovers(self, name: str) -> None:
        """Whatever still runs in a namespace of ours came from what we started there."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for _ in range(50):
                listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
                pids = [int(pid) for pid in listed.stdout.split() if int(pid) != os.getpid()]
                if not pids:
                    return
                for pid in pids:
                    _signal(pid, number)
                time.sleep(0.02)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that end a program wait until the end of the block: it is never left half done. Threads that are started
    in it never take them, so that they wait also where the main thread is in such a block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _words(command: Sequence[Word]) -> list[str]:
    return [os.fspath(word) for word in command]


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass


def end_process(process: subprocess.Popen[Any], timeout_s: float = 5.0) -> None:
    """TERM, then KILL; reaps the process and closes its pipes."""
    if process.poll() is None:
        _signal(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
