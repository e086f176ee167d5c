"""What a HUP takes up under numbered traffic: no packet is lost over it, and the books balance."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support.collector import Collector
from support.faults import lab_with_wires
from support.frames import ETHERTYPE_NUMBERED
from support.identities import Traffic, conclude
from support.judges import check_numbered
from support.lab import Lab, requires_root, requires_tool
from support.service import APPLIANCE, Service

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]

RATE = 5_000
NUMBERED = f"ether proto {ETHERTYPE_NUMBERED}"  # a filter that every frame of the sender passes


def reload(service: Service, config: dict[str, Any], said: str = "reload: done") -> None:
    """Writes the configuration, sends HUP, and waits for its end in the log."""
    service.config = config
    service.write_config(config)
    before = service.log.count(said)
    service.signal(signal.SIGHUP)
    service.wait_until(lambda: service.log.count(said) > before, said)


def with_output(service: Service, **keys: Any) -> dict[str, Any]:
    return service.config | {"output": [service.config["output"][0] | keys]}


def ready_bytes(service: Service) -> int:
    """Of all published files; one that goes meanwhile counts nothing."""
    total = 0
    for path in service.ready():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_the_wait_for_order_and_the_turns_that_follow_it_change_under_traffic(lab: Lab, directory: Path) -> None:
    traffic = Traffic(lab, lab_with_wires(lab, "a", "b"))
    service = Service(lab, directory, [{"uri": f"ring:{name}"} for name in traffic.wires], meter={"enabled": True})
    pids = service.pids()
    sender = traffic.start(rate=10_000)
    for max_wait_ms in (20, 500, 24, 1000):
        reload(service, with_output(service, max_wait_ms=max_wait_ms))
    traffic.stop(sender)
    assert service.pids() == pids
    last = conclude(service, traffic)
    assert [view.lost_packets for view in last.interfaces] == [0, 0]


def program(directory: Path, name: str, text: str) -> list[str]:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return [str(path)]


def test_a_hook_is_changed_and_taken_away_while_it_runs(lab: Lab, directory: Path) -> None:
    a, peer = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}], output={"rotate_packets": 500})
    pids = service.pids()
    sender = lab.start_sender([peer], rate=RATE)
    for name in ("first", "second"):
        told = directory / f"told-{name}"
        hook = program(directory, name, f'echo "$1" >> {told}')
        reload(service, with_output(service, hook=hook, close_write=True))
        service.wait_until(lambda told=told: told.exists() and told.read_text().count("\n") > 2, f"{name} is run")
    reload(service, with_output(service, hook=[]))
    sent = sender.stop()
    service.wait_at_rest({name[0]: count for name, count in sent.sent.items()})
    assert service.pids() == pids
    assert service.stop() == 0
    service.check(sent.sent_by_id)
    first, second = ((directory / f"told-{name}").read_text().split() for name in ("first", "second"))
    assert not set(first) & set(second)
    assert max(first) < min(second) < max(second) < str(service.ready()[-1])  # the last ones were told to nobody
    assert {*first, *second} <= {str(path) for path in service.ready()}


def test_a_retention_takes_effect_and_is_lifted_while_it_runs(lab: Lab, directory: Path) -> None:
    a, peer = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}], output={"rotate_packets": 200, "compressor": "none"})
    pids = service.pids()
    sender = lab.start_sender([peer], rate=RATE)
    service.wait_until(lambda: len(service.ready()) > 20, "more files than there will be")
    limit = 4 * max(path.stat().st_size for path in service.ready())
    reload(service, with_output(service, retain_bytes=limit))
    service.wait_until(lambda: 0 < ready_bytes(service) <= limit, "the old ones go")
    reload(service, with_output(service, retain_bytes=0))
    service.wait_until(lambda: ready_bytes(service) > 4 * limit, "they stay again")
    sent = sender.stop()
    count = sent.sent_by_id[0]
    service.wait_at_rest({"a": count})
    assert service.pids() == pids
    assert service.stop() == 0
    assert f"received {count} = written {count} + dropped 0 + in flight 0" in service.log


def with_filter(service: Service, text: str) -> dict[str, Any]:
    return service.config | {"interface": [table | {"filter": text} for table in service.config["interface"]]}


def filters_of(path: Path) -> list[str]:
    """What a pcapng file says of its interfaces' filters, in capinfos' words."""
    plain = path.with_suffix("")
    subprocess.run(["lz4", "-qdf", path, plain], check=True)
    shown = subprocess.run(["capinfos", plain], capture_output=True, text=True, check=True).stdout
    plain.unlink()
    return [line.partition("=")[2].strip() for line in shown.splitlines() if "ilter string" in line]


@pytest.mark.parametrize("fanout", [1, 2])
def test_a_new_filter_takes_the_place_of_the_old_one_between_two_packets(
    lab: Lab, directory: Path, fanout: int
) -> None:
    """Each of them passes every frame: not one is lost, and none comes twice, while they change under load."""
    traffic = Traffic(lab, lab_with_wires(lab, "a", "b"))
    service = Service(lab, directory, [{"uri": f"ring:{name}", "fanout": fanout} for name in traffic.wires])
    pids = service.pids()
    sender = traffic.start(rate=10_000)
    for text in (NUMBERED, "not ip", f"{NUMBERED} and not tcp", "", "greater 10", "not arp", NUMBERED):
        reload(service, with_filter(service, text))
    assert service.pids() == pids
    traffic.stop(sender)
    if fanout == 1:
        last = conclude(service, traffic)
        assert [view.lost_packets for view in last.interfaces] == [0, 0]
    else:
        service.wait_until(
            lambda: sum(v.written_packets for v in service.snapshot().interfaces) == 2 * traffic.each, "all"
        )
        assert service.stop() == 0
        service.check({0: traffic.each, 1: traffic.each})
    assert filters_of(service.ready()[-1]) == [NUMBERED] * 2 * fanout


def test_what_a_new_filter_rejects_is_not_received_and_the_next_one_brings_it_back(lab: Lab, directory: Path) -> None:
    a, peer = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    received = []
    for first, text in ((0, ""), (500, f"not {NUMBERED}"), (1000, NUMBERED)):
        if text:
            reload(service, with_filter(service, text))
        lab.send([peer], frames=500, rate=5000, first_sequence=first)
        time.sleep(0.3)
        received.append(service.wait_at_rest({}).interfaces[0].received_packets)
    assert received == [500, 500, 1000]
    assert service.stop() == 0
    report = check_numbered(service.ready())
    assert (report[0].received, report[0].duplicates, report[0].corrupt) == (1000, 0, 0)
    assert report.faults({0: 1500}) != []  # those in the middle are missing


def test_an_interface_that_comes_back_has_the_new_filter(lab: Lab, directory: Path) -> None:
    lab.veth("a")
    service = Service(lab, directory, [{"uri": "ring:a"}])
    reload(service, with_filter(service, f"not {NUMBERED}"))
    _, peer = lab.recreate("a")
    service.wait_until(lambda: service.interface("a").reopened == 1, "it is opened again")
    lab.send([peer], frames=500, rate=5000)
    time.sleep(0.3)
    assert service.interface("a").received_packets == 0
    assert service.stop() == 0


def test_an_opener_that_does_not_answer_holds_nothing_up(lab: Lab, directory: Path) -> None:
    a, peer = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    os.kill(service.opener_pid(), signal.SIGSTOP)
    for said in ("has not answered within 4 s", "only the opener process could compile it"):
        reload(service, with_filter(service, NUMBERED), "the old configuration stays in force")
        assert said in service.log
    sent = lab.send([peer], frames=500, rate=5000)
    service.wait_at_rest({"a": 500})
    assert service.snapshot().service.restarts == 0
    os.kill(service.opener_pid(), signal.SIGCONT)
    assert service.stop() == 0
    service.check(sent.sent_by_id)


def test_a_filter_that_does_not_compile_changes_nothing(lab: Lab, directory: Path) -> None:
    a, peer = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    reload(service, with_filter(service, "udp port"), "the old configuration stays in force")
    assert "filter 'udp port' on a" in service.log
    sent = lab.send([peer], frames=500, rate=5000)
    service.wait_at_rest({"a": 500})
    assert service.stop() == 0
    service.check(sent.sent_by_id)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"output": {"hook": ["no-such-hook"], "rotate_seconds": 3600}},
            "hook 'no-such-hook': there is no such program",
        ),
        ({"output": {"rotate_seconds": -1}}, "output[0].rotate_seconds"),
    ],
)
def test_a_configuration_with_a_fault_changes_nothing_at_all(
    lab: Lab, directory: Path, change: dict[str, Any], said: str
) -> None:
    a, peer = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    reload(service, with_output(service, **change["output"]), "the old configuration stays in force")
    assert said in service.log
    assert not service.snapshot().service.last_reload_ok
    sent = lab.send([peer], frames=500, rate=1000)
    service.wait_at_rest({"a": 500})
    service.wait_until(lambda: any(s["packets"] for s in service.sidecars()), "files are still closed every second")
    assert service.stop() == 0
    service.check(sent.sent_by_id)


def test_what_needs_a_restart_is_named_key_by_key_and_the_rest_is_taken_up(lab: Lab, directory: Path) -> None:
    a, peer = lab.veth("a")
    b, _ = lab.veth("b")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    config = with_output(service, format="pcap", rotate_packets=100)
    config["interface"] = [config["interface"][0] | {"snaplen": 100}, {"uri": f"ring:{b}"}]
    config["service"] = {"drain_timeout_s": 3}
    reload(service, config)
    for key in ("output main: format", "interface a: snaplen", "interface b, which is new,", "service.drain_timeout_s"):
        assert f"reload: {key} changes only with a restart" in service.log
    sent = lab.send([peer], frames=3000, rate=1000)
    service.wait_at_rest({"a": 3000})
    assert service.stop() == 0
    service.check(sent.sent_by_id)
    assert {sidecar["packets"] for sidecar in service.sidecars() if sidecar["closed_because"] == "packets"} == {100}
    assert all(path.name.endswith(".pcapng.lz4") for path in service.ready())


def test_a_service_without_a_monitor_reloads_too(lab: Lab, directory: Path) -> None:
    a, peer = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}], monitor={"control_socket": ""})
    reload(service, with_output(service, rotate_packets=100, max_wait_ms=400))
    sent = lab.send([peer], frames=3000, rate=1000)
    service.wait_until(lambda: sum(sidecar["packets"] for sidecar in service.sidecars()) == 3000, "all are published")
    assert service.stop() == 0
    service.check(sent.sent_by_id)
    assert any(sidecar["closed_because"] == "packets" for sidecar in service.sidecars())


# The meter -----------------------------------------------------------------------------------------------------------


def metered(service: Service, packets: int) -> bool:
    found = service.snapshot().meter
    return found is not None and found.exported_packets == packets and found.active_flow_packets == 0


def with_meter(service: Service, **keys: Any) -> dict[str, Any]:
    return service.config | {"meter": service.config["meter"] | keys}


def test_collectors_come_and_go_and_every_packet_is_in_the_flows_of_one_that_stays(lab: Lab, directory: Path) -> None:
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    kinds = {"tcp": 4739, "udp": 4740}
    collectors = {kind: Collector(lab, directory, kind, port) for kind, port in kinds.items()}
    stays, comes = ({"uri": f"{kind}://127.0.0.1:{port}"} for kind, port in kinds.items())
    settings = {"enabled": True, "idle_timeout_s": 1, "active_timeout_s": 1, "export": [stays]}
    service = Service(lab, directory, [{"uri": "ring:a"}], meter=settings)
    pids = service.pids()
    sender = traffic.start(rate=5_000, flows=20)
    service.wait_until(lambda: service.interface("a").received_packets > 2000, "traffic")
    reload(service, with_meter(service, export=[comes, stays]))
    meter = service.wait_for_start("meter", pids["meter"])
    service.wait_until(lambda: len(service.snapshot().exports) == 2, "the monitor shows the collector that came")
    service.wait_until(lambda: service.snapshot().exports[0].flow_records > 0, "it gets flows")
    reload(service, with_meter(service, export=[stays]))
    service.wait_for_start("meter", meter)
    service.wait_until(lambda: len(service.snapshot().exports) == 1, "it is gone again")
    traffic.stop(sender)
    service.wait_until(lambda: metered(service, traffic.each), "all flows are exported")
    shown = service.snapshot()
    assert (shown.service.restarts, shown.service.planned_restarts) == (0, 2)
    assert {**service.pids(), "meter": 0} == {**pids, "meter": 0}
    assert shown.exports[0].flow_records == shown.meter.exported_flows
    assert shown.exports[0].not_sent_flows == 0
    service.wait_until(lambda: collectors["tcp"].received().packets == traffic.each, "and received")
    conclude(service, traffic, others=[collector.process.pid for collector in collectors.values()])
    assert 0 < collectors["udp"].received().packets < traffic.each
    assert all(collector.received().undescribed_sets == 0 for collector in collectors.values())


def test_flow_time_outs_change_and_what_was_metered_is_exported_first(lab: Lab, directory: Path) -> None:
    traffic = Traffic(lab, lab_with_wires(lab, "a"))
    settings = {"enabled": True, "idle_timeout_s": 600, "export": [{"uri": "file:"}]}
    service = Service(lab, directory, [{"uri": "ring:a"}], meter=settings)
    killed = service.pids()["meter"]
    traffic.send(500, flows=5)
    service.wait_until(lambda: service.snapshot().meter.active_flows == 5, "the flows are in the table")
    reload(service, with_meter(service, idle_timeout_s=1))
    service.wait_for_start("meter", killed)
    assert metered(service, 500)
    traffic.send(500, flows=5)
    service.wait_until(lambda: metered(service, 1000), "the new time-out ends the flows")
    conclude(service, traffic)
    records = 0
    for path in sorted((directory / "flows").glob("*.ipfix")):
        read = subprocess.run([*APPLIANCE, "ipfix", "read", path], capture_output=True, text=True, check=True)
        records += sum("flowEndReason" in line for line in read.stdout.splitlines())
    assert records == 10


def test_a_collector_that_cannot_be_had_changes_nothing(lab: Lab, directory: Path) -> None:
    lab.veth("a")
    service = Service(lab, directory, [{"uri": "ring:a"}], meter={"enabled": True})
    pids = service.pids()
    export = {"uri": "tls://127.0.0.1:4740", "tls_ca": f"{directory}/none.pem"}
    reload(service, with_meter(service, export=[export]), "the old configuration stays in force")
    assert f"{directory}/none.pem: No such file or directory" in service.log
    assert service.pids() == pids
    assert service.stop() == 0
