"""The monitor worker as a forked process with a real channel, real rings and real sockets."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from monitor.forked import Worker
from monitor.pages import Appliance

from appliance.config import Config, Interface
from appliance.counters import STATES
from appliance.monitor.control import ControlClient
from appliance.monitor.topology import topology_of
from appliance.monitor.view import Snapshot
from appliance.plan import make_plan
from appliance.process import DRAIN, ROTATE


def record(length: int) -> bytes:
    framed = length.to_bytes(4, "little")
    return (6).to_bytes(4, "little") + framed + bytes(length - 12) + framed


@pytest.fixture
def worker(running: Appliance, tmp_path: Path) -> Iterator[Worker]:
    made = Worker(running, tmp_path / "control.sock")
    yield made
    made.close()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "it did not come about within 10 s"
        time.sleep(0.02)


def test_metrics_and_control_socket_tell_the_same(worker: Worker) -> None:
    status, metrics = worker.get("/metrics")
    assert status == 200
    snapshot = Snapshot.from_json(ControlClient(worker.control_path).ask("status"))
    for interface in snapshot.interfaces:
        labels = f'{{interface="{interface.label}",output="main"}}'
        assert f"appliance_packets_received_total{labels} {float(interface.received_packets)}\n".encode() in metrics
        assert interface.unaccounted_packets == 0
    assert worker.pages["monitor"]["scrapes"] == 1
    assert worker.pages["monitor"]["control_requests"] == 1


def test_ring_use_is_read_from_the_ring_itself(worker: Worker) -> None:
    def used_bytes() -> int:
        uplink: int = json.loads(worker.get("/status.json")[1])["interfaces"][0]["ring_used_bytes"]
        return uplink

    assert used_bytes() == 0
    assert worker.ring.push(record(512))
    assert used_bytes() == 0  # not published
    worker.ring.publish(1)
    assert used_bytes() == 512


def test_rotate_goes_to_the_supervisor(worker: Worker) -> None:
    assert "closed and published" in ControlClient(worker.control_path).ask("rotate")
    worker.channel.settimeout(10)
    assert worker.channel.recv(100) == ROTATE


def test_version_is_that_of_the_service(worker: Worker) -> None:
    assert ControlClient(worker.control_path).ask("version") == "1.2.3"


def test_the_heart_beats_while_nobody_asks(worker: Worker) -> None:
    before = time.monotonic_ns()
    wait_until(lambda: worker.pages["monitor"]["heartbeat_ns"] > before)


def test_it_ends_when_told_to_drain(worker: Worker) -> None:
    worker.channel.send(DRAIN)
    assert worker.exit_status() == 0
    assert STATES[worker.pages["monitor"]["state"]] == "draining"


def test_it_ends_when_the_supervisor_is_gone(worker: Worker) -> None:
    worker.channel.close()
    assert worker.exit_status() == 0


def test_it_ends_with_clients_that_hang_on(worker: Worker) -> None:
    hanging = [socket.create_connection(("127.0.0.1", worker.port)) for _ in range(3)]
    controls = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
    for control in controls:
        control.connect(os.fspath(worker.control_path))
    hanging[0].send(b"GET / HTTP/1.1\r\nHost")
    assert worker.get("/healthz")[0] == 200
    worker.channel.send(DRAIN)
    assert worker.exit_status() == 0
    for one in (*hanging, *controls):
        one.close()


def test_the_topology_follows_the_plan() -> None:
    config = Config(
        interfaces=(Interface(uri="ring:eth0", label="uplink", fanout=2), Interface(uri="ring:lo")),
    )
    plan = make_plan(config, machine_bytes=1 << 32)
    topology = topology_of(plan, config, "9.9")
    assert [(source.label, source.interface, source.output) for source in topology.sources] == [
        ("uplink", "eth0", "main"),
        ("uplink.1", "eth0", "main"),
        ("lo", "lo", "main"),
    ]
    names = {name for name, _ in plan.pages}
    assert {worker.name for worker in topology.workers} <= names
    assert {f"capture/{source.label}" for source in topology.sources} <= names
    assert {f"merge/{source.output}/{source.label}" for source in topology.sources} <= names
