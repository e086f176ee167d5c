"""Flow traces of the running service: real TCP connections between two namespaces, a file for each.

tshark's `tcp.stream` over the recorded file of the same run, and `appliance trace` over it, must find the same flows.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from support.captures import write_capture
from support.identities import Traffic, conclude
from support.judges import capinfos, packet_count, packets
from support.lab import TESTS_DIRECTORY, Lab, requires_root, requires_tool, wait_until
from support.service import APPLIANCE, Service, refused

from appliance.monitor.view import TraceflowView

pytestmark = [requires_root, requires_tool("capinfos", "tshark")]

HOST = "10.9.0.2"
PLAIN = {"compressor": "none", "rotate_seconds": 0, "rotate_bytes": 0}


class Talk:
    """A server behind a wire, in a namespace of its own; connections to it come from the service's namespace."""

    def __init__(self, lab: Lab, port: int = 8000, name: str = "a") -> None:
        self.lab, self.port = lab, port
        self.behind = lab.add_namespace(f"behind-{name}")
        self.near, far = lab.veth(name, peer_namespace=self.behind, arp=True)
        lab.address(self.near, "10.9.0.1/24")
        lab.address(far, f"{HOST}/24", namespace=self.behind)
        # One packet of the wire is one of the recording, so that sizes can be compared.
        for interface, namespace in ((self.near, None), (far, self.behind)):
            lab.offload(interface, namespace=namespace, tso=False, gso=False, gro=False)
        self.server = lab.popen(self.command("serve"), namespace=self.behind, env=self.environment)
        listens = ["ss", "-Hltn", f"sport = :{port}"]
        wait_until(lambda: str(port) in lab.run(listens, namespace=self.behind).stdout, "the server listens")

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(TESTS_DIRECTORY)}

    def command(self, what: str, *options: str) -> list[str]:
        return [sys.executable, "-m", "support.tcptalk", what, HOST, str(self.port), *options]

    def connect(self, connections: int, **options: int) -> None:
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        command = self.command("connect", "--connections", str(connections), *words)
        done = self.lab.run(command, env=self.environment)
        assert done.stdout == f"{connections}\n", done.stderr


def tcp_frame(port: int) -> bytes:
    """A segment of one of many flows."""
    ip = struct.pack("!BBHHHBB2x4s4s", 0x45, 0, 40, 1, 0, 64, 6, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]))
    return bytes(12) + b"\x08\x00" + ip + struct.pack("!HHIIBB6x", 1024 + port, 80, 1, 1, 0x50, 0x10)


def traceflow(service: Service) -> TraceflowView:
    found = service.snapshot().traceflow
    assert found is not None
    return found


def index(service: Service) -> list[dict[str, Any]]:
    """All lines of all indexes."""
    paths = sorted((service.directory / "traces" / "ready").glob("flows-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def traces(directory: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Label of a flow -> its file's packets (time, bytes)."""
    return {path.stem: [(p.time_ns, bytes(p.data)) for p in packets(path)] for path in directory.glob("*.pcap")}


def tshark_streams(path: Path) -> dict[int, list[tuple[int, str]]]:
    """tcp.stream -> (time in ns, source port) of its packets."""
    fields = [word for field in ("tcp.stream", "frame.time_epoch", "tcp.srcport") for word in ("-e", field)]
    command = ["tshark", "-n", "-r", str(path), "-Y", "tcp", "-T", "fields", *fields]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    streams: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for line in listed.splitlines():
        stream, time_text, port = line.split("\t")
        seconds, _, fraction = time_text.partition(".")
        streams[int(stream)].append((int(seconds) * 1_000_000_000 + int(fraction.ljust(9, "0")[:9]), port))
    return streams


def offline(service: Service, directory: Path, *options: str) -> dict[str, list[tuple[int, bytes]]]:
    """What `appliance trace` makes of the recorded files."""
    files = [str(path) for path in service.ready()]
    subprocess.run([*APPLIANCE, "trace", *files, "-o", str(directory), *options], check=True, capture_output=True)
    return traces(directory)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_live_flows_are_those_of_tshark_and_of_the_recorded_file(
    lab: Lab, directory: Path, bidirectional: bool
) -> None:
    talk = Talk(lab)
    settings = {"enabled": True, "bidirectional": bidirectional}
    service = Service(lab, directory, [{"uri": "ring:a"}], output=PLAIN, traceflow=settings)
    talk.connect(60, resets=20)
    last = service.wait_at_rest({})
    view = last.traceflow
    assert view is not None
    assert view.observed_packets == last.interfaces[0].written_packets
    assert (view.missed_packets, view.lost_unclean_packets, sum(view.left_out.values())) == (0, 0, 0)
    assert service.stop() == 0, service.log
    found = traces(directory / "traces" / "ready")
    (recorded,) = service.ready()
    streams = tshark_streams(recorded)
    assert len(streams) == 60
    assert len(found) == 60 if bidirectional else 120
    by_times = {tuple(time_ns for time_ns, _ in content) for content in found.values()}
    if bidirectional:
        assert by_times == {tuple(time_ns for time_ns, _ in stream) for stream in streams.values()}
    else:
        assert by_times == {
            tuple(time_ns for time_ns, port in stream if (port == "8000") == from_server)
            for stream in streams.values()
            for from_server in (False, True)
        }
    assert found == offline(service, directory / "offline", *(["--bidirectional"] if bidirectional else []))
    tcp = sum(len(stream) for stream in streams.values())
    assert f"in files {tcp} + left out 0 + waiting 0; missed 0" in service.log
    lines = index(service)
    assert {line["label"]: line["packets"] for line in lines} == {name: len(held) for name, held in found.items()}
    assert all(line["file"] == f"{line['label']}.pcap" for line in lines)
    assert not list((directory / "traces" / "work").iterdir())


def test_a_killed_worker_under_traffic_costs_no_recorded_packet_and_its_flows_are_counted_as_lost(
    lab: Lab, directory: Path
) -> None:
    talk = Talk(lab)
    traffic = Traffic(lab, {"b": lab.veth("b")[1]})
    service = Service(lab, directory, [{"uri": "ring:a"}, {"uri": "ring:b"}], output=PLAIN, traceflow={"enabled": True})
    talk.connect(20)
    sender = traffic.start(rate=5000)
    service.wait_until(lambda: traceflow(service).flows_created >= 40, "flows are traced")
    killed = service.pids()["traceflow"]
    os.kill(killed, signal.SIGKILL)
    talk.connect(20)
    service.wait_for_start("traceflow", killed)
    talk.connect(20)
    traffic.stop(sender)
    last = service.wait_at_rest({})
    view = last.traceflow
    assert view is not None
    views = {row.label: row for row in last.interfaces}
    assert sum(row.lost_packets for row in last.interfaces) == 0
    assert views["b"].written_packets == traffic.each
    # What waited in the ring was not lost with the worker: what it had taken out is all that is.
    assert view.tapped_packets == views["a"].written_packets + views["b"].written_packets
    assert view.missed_packets == 0
    assert view.lost_unclean_packets > 0
    assert [worker.restarts for worker in last.workers if worker.name == "traceflow"] == [1]
    assert service.stop() == 0, service.log
    in_files = sum(len(held) for held in traces(directory / "traces" / "ready").values())
    tcp = sum(len(stream) for stream in tshark_streams(service.ready()[0]).values())
    # TCP packets alone are in flows; the worker's last batch may have held others, which nobody has told apart.
    assert in_files <= tcp <= in_files + view.lost_unclean_packets
    assert not list((directory / "traces" / "work").iterdir())


def test_a_worker_that_stands_still_is_missed_packet_by_packet_while_the_recording_goes_on(
    lab: Lab, directory: Path
) -> None:
    traffic = Traffic(lab, {"a": lab.veth("a")[1]})
    service = Service(
        lab,
        directory,
        [{"uri": "ring:a"}],
        traceflow={"enabled": True, "ring_bytes": 2 << 20},
        service={"heartbeat_timeout_s": 60},
    )
    stopped = service.pids()["traceflow"]
    os.kill(stopped, signal.SIGSTOP)
    traffic.send(30_000, rate=20_000, sizes=(200,))
    service.wait_until(
        lambda: service.interface("a").written_packets == 30_000, "everything is written although nobody traces"
    )
    missed = traceflow(service).missed_packets
    assert missed > 0
    assert traceflow(service).tapped_packets == 30_000 - missed
    os.kill(stopped, signal.SIGCONT)
    conclude(service, traffic)
    assert service.log.count("Traceback") == 0


def test_traces_that_are_given_up_leave_the_recording_alone(lab: Lab, directory: Path) -> None:
    traffic = Traffic(lab, {"a": lab.veth("a")[1]})
    service = Service(lab, directory, [{"uri": "ring:a"}], traceflow={"enabled": True}, service={"restart_limit": 0})
    os.kill(service.pids()["traceflow"], signal.SIGKILL)
    service.wait_until(lambda: "giving up" in service.log, "the worker is given up")
    traffic.send(2000)
    service.wait_until(lambda: service.interface("a").written_packets == 2000, "everything is written")
    assert not service.has_ended
    assert service.stop() == 69
    service.check({0: 2000})


def test_flows_end_on_time_although_no_packet_comes(lab: Lab, directory: Path) -> None:
    talk = Talk(lab)
    settings = {"enabled": True, "linger_s": 1, "idle_timeout_s": 1}
    service = Service(lab, directory, [{"uri": "ring:a"}], output=PLAIN, traceflow=settings)
    talk.connect(5)
    service.wait_until(lambda: traceflow(service).published_files == 10, "the flows are published while it runs")
    assert traceflow(service).active_flows == 0
    assert service.stop() == 0, service.log


def test_retention_keeps_the_newest_flows_and_a_long_one_is_cut(lab: Lab, directory: Path) -> None:
    talk = Talk(lab)
    settings = {"enabled": True, "linger_s": 1, "retain_files": 8, "max_flow_bytes": 20_000}
    service = Service(lab, directory, [{"uri": "ring:a"}], output=PLAIN, traceflow=settings)
    talk.connect(10)
    service.wait_until(lambda: traceflow(service).published_files == 20, "all are published")
    service.wait_until(lambda: traceflow(service).stored_files <= 8, "the oldest are gone")
    talk.connect(1, octets=200_000)
    service.wait_until(lambda: traceflow(service).published_files == 22, "the long one too")
    view = service.wait_at_rest({}).traceflow
    assert view is not None
    assert view.expired_files >= 14
    assert view.left_out["cut"] > 0
    assert view.left_out["refused"] == view.left_out["failed"] == 0
    assert service.stop() == 0, service.log
    kept = list((directory / "traces" / "ready").iterdir())
    assert len(kept) <= 9  # and the last index
    sizes = [path.stat().st_size for path in kept if path.suffix == ".pcap"]
    assert 19_000 - 1600 < max(sizes) <= 20_000 + 24
    # What is in a cut file are its flow's first packets.
    longest = next(path for path in kept if path.suffix == ".pcap" and path.stat().st_size == max(sizes))
    whole = offline(service, directory / "offline")[longest.stem]
    held = traces(directory / "traces" / "ready")[longest.stem]
    assert 0 < len(held) < len(whole)
    assert whole[: len(held)] == held


def test_textual_formats_and_a_choice_of_interfaces(lab: Lab, directory: Path) -> None:
    talk = Talk(lab)
    traffic = Traffic(lab, {"b": lab.veth("b")[1]})
    settings = {"enabled": True, "format": "json", "interfaces": ["a"]}
    service = Service(lab, directory, [{"uri": "ring:a"}, {"uri": "ring:b"}], output=PLAIN, traceflow=settings)
    traffic.send(500)
    talk.connect(3)
    last = service.wait_at_rest({})
    assert last.traceflow is not None
    assert last.traceflow.tapped_packets == next(row.written_packets for row in last.interfaces if row.label == "a")
    assert service.stop() == 0, service.log
    paths = list((directory / "traces" / "ready").glob("*.json"))
    assert len(paths) == 6
    recorded = [str(path) for path in service.ready()]
    subprocess.run([*APPLIANCE, "trace", *recorded, "-o", str(directory / "offline"), "--format", "json"], check=True)
    for path in paths:
        ours = [entry["frame"] for entry in json.loads(path.read_text()).values()]
        theirs = [entry["frame"] for entry in json.loads((directory / "offline" / path.name).read_text()).values()]
        assert ours == theirs


def test_two_outputs_of_recorded_files_are_traced_as_one_stream(lab: Lab, directory: Path) -> None:
    """A file for each output: an interface's packets, recorded before, and replayed through the service."""
    talk = Talk(lab)
    first = directory / "first"
    first.mkdir()
    live = Service(lab, first, [{"uri": "ring:a"}], output=PLAIN)
    talk.connect(10)
    live.wait_at_rest({})
    assert live.stop() == 0
    (recorded,) = live.ready()
    outputs = [{"name": name, "directory": str(directory / name)} | PLAIN for name in ("one", "two")]
    interfaces = [{"uri": f"pcapng:{recorded}", "label": name, "output": name} for name in ("one", "two")]
    service = Service(
        lab, directory, interfaces, wait=False, output=outputs, traceflow={"enabled": True, "interfaces": ["one"]}
    )
    assert service.wait() == 0, service.log
    count = packet_count([recorded])
    found = traces(directory / "one" / "traces" / "ready")
    assert len(found) == 20
    assert sum(len(held) for held in found.values()) == sum(len(s) for s in tshark_streams(recorded).values()) <= count
    assert {path.name for path in (directory / "one" / "traces" / "ready").glob("*.pcap")} == {
        f"{name}.pcap" for name in offline(live, directory / "offline")
    }


def test_a_second_service_and_an_unknown_interface_are_refused(lab: Lab, directory: Path) -> None:
    lab.veth("a")
    config = {
        "interface": [{"uri": "ring:a"}],
        "output": [{"directory": str(directory / "other")}],
        "meter": {"enabled": False},
        "monitor": {"listen": "", "control_socket": ""},
        "traceflow": {"enabled": True, "interfaces": ["b"]},
    }
    status, said = refused(lab, directory, config)
    assert status == 78
    assert "traceflow.interfaces[0]: no interface is called 'b', only a" in said
    traces_directory = directory / "traces"
    Service(lab, directory, [{"uri": "ring:a"}], traceflow={"enabled": True})
    config["traceflow"] = {"enabled": True, "directory": str(traces_directory)}
    status, said = refused(lab, directory, config)
    assert status == 69
    assert f"{traces_directory}: another instance is writing there" in said


def test_files_open_in_capinfos_as_soon_as_they_can_be_seen(lab: Lab, directory: Path) -> None:
    """Whoever looks into ready/ at any moment finds whole files only."""
    talk = Talk(lab)
    settings = {"enabled": True, "linger_s": 1}
    service = Service(lab, directory, [{"uri": "ring:a"}], output=PLAIN, traceflow=settings)
    talk.connect(5)
    ready = directory / "traces" / "ready"
    seen: set[Path] = set()
    deadline = time.monotonic() + 10
    while len(seen) < 10 and time.monotonic() < deadline:
        for path in set(ready.glob("*.pcap")) - seen:
            expected = path.read_bytes()
            assert capinfos(path).packets > 0
            assert path.read_bytes() == expected
            seen.add(path)
    assert len(seen) == 10, service.log
    assert service.stop() == 0
    assert {path.stat().st_nlink for path in seen} == {1}


def test_a_killed_merge_takes_no_flow_with_it_and_every_identity_holds(lab: Lab, directory: Path) -> None:
    talk = Talk(lab)
    traffic = Traffic(lab, {"b": lab.veth("b")[1]})
    service = Service(lab, directory, [{"uri": "ring:a"}, {"uri": "ring:b"}], output=PLAIN, traceflow={"enabled": True})
    sender = traffic.start(rate=5000)
    talk.connect(10)
    service.wait_until(lambda: traceflow(service).flows_created >= 20, "flows are traced")
    killed = service.pids()["merge/main"]
    os.kill(killed, signal.SIGKILL)
    service.wait_for_start("merge/main", killed)
    talk.connect(10)
    traffic.stop(sender)
    last = service.wait_at_rest({})
    view = last.traceflow
    assert view is not None
    assert (view.missed_packets, view.lost_unclean_packets) == (0, 0)
    # What the merge held when it died is lost to both; what it had published in its tap may be lost to the files alone.
    lost = sum(row.lost_packets for row in last.interfaces)
    written = sum(row.written_packets for row in last.interfaces)
    assert written <= view.tapped_packets + lost
    assert view.tapped_packets <= written + lost
    assert service.stop() == 0, service.log
    assert len(traces(directory / "traces" / "ready")) >= 38


def test_live_outputs_are_traced_together_in_the_order_of_time(lab: Lab, directory: Path) -> None:
    """Both directions of each connection cross both ends of one wire, and each end has an output of its own."""
    talk = Talk(lab)
    lab.ip("link", "add", "name", "mirror", "type", "veth", "peer", "name", "mirrorp")
    for end in ("mirror", "mirrorp"):
        lab.ip("link", "set", "dev", end, "up")
    outputs = [{"name": name, "directory": str(directory / name)} | PLAIN for name in ("one", "two")]
    interfaces = [{"uri": "ring:a", "output": "one"}, {"uri": "ring:mirror", "output": "two"}]
    service = Service(
        lab, directory, interfaces, output=outputs, traceflow={"enabled": True, "bidirectional": True, "linger_s": 1}
    )
    talk.connect(8)
    service.wait_until(lambda: traceflow(service).published_files == 8, "the idle output holds nothing back for long")
    last = service.wait_at_rest({})
    assert last.traceflow is not None
    assert last.traceflow.late_packets == 0
    assert service.stop() == 0, service.log
    assert len(traces(directory / "one" / "traces" / "ready")) == 8


@requires_tool("promtool")
def test_every_count_is_a_metric_that_promtool_takes(lab: Lab, directory: Path) -> None:
    talk = Talk(lab)
    service = Service(
        lab,
        directory,
        [{"uri": "ring:a"}],
        traceflow={"enabled": True},
        monitor={"listen": "127.0.0.1:9751"},
    )
    talk.connect(3)
    service.wait_at_rest({})
    fetch = (
        "import sys, urllib.request as u; sys.stdout.write(u.urlopen('http://127.0.0.1:9751/metrics').read().decode())"
    )
    told = lab.run([sys.executable, "-c", fetch]).stdout
    checked = subprocess.run(["promtool", "check", "metrics"], input=told, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    figures = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in told.splitlines()
        if line.startswith("appliance_traceflow_")
    }
    view = traceflow(service)
    assert figures["appliance_traceflow_observed_packets_total"] == view.observed_packets > 0
    assert figures["appliance_traceflow_active_flows"] == 6
    assert figures['appliance_traceflow_waiting_packets{place="held"}'] == view.held_packets
    assert len(figures) >= 25
    assert service.stop() == 0, service.log


def test_an_output_of_files_holds_no_other_one_up_and_every_packet_is_traced_or_missed(
    lab: Lab, directory: Path
) -> None:
    """One output has 40,000 packets, the other a single one; the ring between holds a part of them."""
    frames = [(i * 1000, tcp_frame(i % 50)) for i in range(40_000)]
    sources = [
        write_capture(directory / "long", "nsecpcap", frames),
        write_capture(directory / "short", "pcap", frames[:1]),
    ]
    outputs = [{"name": name, "directory": str(directory / name)} | PLAIN for name in ("long", "short")]
    interfaces = [
        {"uri": f"pcapfile:{path}", "label": name, "output": name}
        for path, name in zip(sources, ("long", "short"), strict=True)
    ]
    service = Service(
        lab, directory, interfaces, wait=False, output=outputs, traceflow={"enabled": True, "ring_bytes": 2 << 20}
    )
    assert service.wait() == 0, service.log
    (said,) = [line for line in service.log.splitlines() if "flow traces: observed" in line]
    observed, in_files, missed = (
        int(found[1])
        for word in ("observed", "in files", "missed")
        if (found := re.search(rf"{word} (\d+)", said)) is not None
    )
    assert observed == in_files
    assert observed + missed == 40_001
    held = traces(directory / "long" / "traces" / "ready")
    assert sum(len(packets_of_flow) for packets_of_flow in held.values()) == in_files > 0
