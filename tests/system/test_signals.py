"""What signals do to a service under load."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from support.judges import check_numbered
from support.lab import Lab, requires_root, requires_tool
from support.service import Service

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]

RATE = 10_000


def start_under_load(lab: Lab, directory: Path) -> tuple[Service, object]:
    a, pa = lab.veth("a")
    b, pb = lab.veth("b")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}, {"uri": f"ring:{b}"}], meter={"enabled": True})
    sender = lab.start_sender([pa, pb], rate=RATE)
    service.wait_until(lambda: service.interface("a").written_packets > RATE // 4, "traffic in files")
    return service, sender


def assert_all_accepted_is_published(service: Service, sent: dict[int, int]) -> None:
    """The files hold the frames up to some moment, without a gap; that moment was after the signal."""
    report = check_numbered(service.ready())
    received = {number: report[number].received for number in sent}
    assert not (faults := report.faults(received)), f"{faults}\n{service.log}"
    assert all(0 < received[number] <= sent[number] for number in sent)
    service.check_sidecars()


def balance(service: Service) -> list[str]:
    """The last lines of the log: what each interface received, and where it went."""
    return [line for line in service.log.splitlines() if ": received " in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_is_told_to_stop_publishes_all_that_the_kernel_had_accepted(
    lab: Lab, directory: Path, number: signal.Signals
) -> None:
    service, sender = start_under_load(lab, directory)
    before = {label: service.interface(label).received_packets for label in ("a", "b")}
    if number is signal.SIGINT:
        os.killpg(service.process.pid, number)  # Ctrl-C reaches every process of the terminal's group
    else:
        service.signal(number)
    assert service.wait() == 0
    sent = sender.stop().sent_by_id
    assert_all_accepted_is_published(service, sent)
    report = check_numbered(service.ready())
    for label, count in before.items():
        assert report["ab".index(label)].received >= count
    assert len(balance(service)) == 2
    for index, line in enumerate(balance(service)):
        received = report[index].received
        assert line.endswith(f"received {received} = written {received} + dropped 0 + in flight 0")
    service.assert_nothing_left()


def test_a_second_term_ends_at_once(lab: Lab, directory: Path) -> None:
    service, sender = start_under_load(lab, directory)
    os.kill(service.pids()["merge/main"], signal.SIGSTOP)  # so that a drain would take its full time
    service.signal(signal.SIGTERM)
    service.wait_until(lambda: "stopping" in service.log, "the first TERM is heard")
    time.sleep(0.7)  # within half a second it is taken for the same request
    started = time.monotonic()
    service.signal(signal.SIGTERM)
    assert service.wait() != 0
    assert time.monotonic() - started < 2
    sender.stop()
    assert "told to stop twice" in service.log
    assert service.leftover_processes() == []


def test_hup_takes_up_a_good_file_and_refuses_a_bad_one_without_losing_a_packet(lab: Lab, directory: Path) -> None:
    service, sender = start_under_load(lab, directory)
    pids = service.pids()
    config = service.config | {"output": [service.config["output"][0] | {"rotate_packets": 1000}]}
    service.write_config(config)
    service.signal(signal.SIGHUP)
    service.wait_until(lambda: "reload: done" in service.log, "the reload")
    service.wait_until(
        lambda: any(sidecar["closed_because"] == "packets" for sidecar in service.sidecars()), "files of 1000 packets"
    )
    service.write_config(config | {"nonsense": 1})
    service.signal(signal.SIGHUP)
    service.wait_until(lambda: not service.snapshot().service.last_reload_ok, "the refusal is in the figures")
    assert "nonsense" in service.log
    assert "stays in force" in service.log
    service.write_config(config | {"memory_bytes": 1 << 30})
    service.signal(signal.SIGHUP)
    service.wait_until(lambda: "memory_bytes changes only with a restart" in service.log, "what needs a restart")
    assert service.pids() == pids
    sent = sender.stop()
    service.wait_at_rest({name[0]: count for name, count in sent.sent.items()})
    assert service.stop() == 0
    service.check(sent.sent_by_id)
    assert max(sidecar["packets"] for sidecar in service.sidecars() if sidecar["closed_because"] == "packets") == 1000


def test_usr1_begins_a_new_file_now_and_usr2_logs_the_state(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}], output={"rotate_seconds": 3600})
    sent = lab.send([pa], frames=500, rate=10_000)
    service.wait_at_rest({"a": 500})
    assert service.ready() == []
    service.signal(signal.SIGUSR1)
    service.wait_until(lambda: len(service.ready()) == 1, "the file that USR1 closed")
    assert service.sidecars()[0]["closed_because"] == "request"
    assert service.sidecars()[0]["packets"] == 500
    service.ask("rotate")
    service.wait_until(lambda: len(service.ready()) == 2, "the file that a request closed")
    service.signal(signal.SIGUSR2)
    service.wait_until(lambda: "worker merge/main: pid" in service.log, "the state in the log")
    assert "received 500 = written 500 + dropped 0 + in flight 0" in service.log
    assert service.stop() == 0
    service.check(sent.sent_by_id)


def test_sigpipe_changes_nothing(lab: Lab, directory: Path) -> None:
    a, pa = lab.veth("a")
    service = Service(lab, directory, [{"uri": f"ring:{a}"}])
    service.signal(signal.SIGPIPE)
    sent = lab.send([pa], frames=500, rate=10_000)
    service.wait_at_rest({"a": 500})
    assert service.stop() == 0
    service.check(sent.sent_by_id)
