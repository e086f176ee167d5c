"""The laboratory itself: what it makes is there, and nothing of it stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import xdpsend
from support.frames import IMIX_SIZES, Shape, numbered_frame
from support.judges import check_numbered, packets
from support.lab import TESTS_DIRECTORY, Lab, LabError, requires_root, requires_tool, wait_until

pytestmark = [requires_root, requires_tool("tcpdump")]


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def start_tcpdump(lab: Lab, interface: str, path: Path, count: int) -> subprocess.Popen[str]:
    """A tcpdump that captures already when this returns, and ends after `count` packets."""
    command = ["tcpdump", "-i", interface, "-w", str(path), "-c", str(count), "-B", "65536", "-Z", "root"]
    process = lab.popen([*command, "--time-stamp-precision=nano"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "listening on" in line:
            return process
    raise AssertionError(f"tcpdump ended: {process.wait()}")


def test_namespaces_and_processes_are_gone_after_a_failure() -> None:
    with pytest.raises(ZeroDivisionError), Lab() as lab:
        name = lab.namespace
        lab.add_namespace("second")
        sleeper = lab.popen(["sh", "-c", "trap '' TERM; (setsid sleep 1000 &) ; sleep 1001"])
        wait_until(lambda: len(lab.run(["ip", "netns", "pids", name]).stdout.split()) >= 3, "the sleepers")
        assert name in namespaces()
        raise ZeroDivisionError
    assert name not in namespaces()
    assert sleeper.returncode is not None


def test_numbered_frames_cross_a_pair_exactly_once_and_nothing_else_does(tmp_path: Path) -> None:
    with Lab() as lab:
        a, peer = lab.veth("a")
        tcpdump = start_tcpdump(lab, a, tmp_path / "a.pcap", 5000)
        report = lab.send([peer], frames=5000, rate=50_000, first_id=7)
        assert tcpdump.wait(10) == 0
        assert lab.statistics(a)["rx_packets"] == 5000
    assert report.sent_by_id == {7: 5000}
    check_numbered([tmp_path / "a.pcap"]).assert_exact(report.sent_by_id)


def test_frames_go_round_the_interfaces_one_by_one(tmp_path: Path) -> None:
    with Lab() as lab:
        outside = lab.add_namespace("outside")
        _, a_peer = lab.veth("a", peer_namespace=outside)
        _, b_peer = lab.veth("b", peer_namespace=outside)
        tcpdump = start_tcpdump(lab, "any", tmp_path / "any.pcap", 200)
        report = lab.send([a_peer, b_peer], frames=100, rate=5_000, namespace=outside)
        assert tcpdump.wait(10) == 0
    found = check_numbered([tmp_path / "any.pcap"])
    found.assert_exact(report.sent_by_id)
    assert report.sent_by_id == {0: 100, 1: 100}
    assert 150 / 5_000 < report.seconds < 10 * 200 / 5_000


@pytest.mark.parametrize(
    "shape", [Shape((590, 60, 1514), vlan=5), Shape((100,), udp=True, flows=3)], ids=["vlan", "udp"]
)
def test_sizes_tags_and_flows_reach_the_other_end(tmp_path: Path, shape: Shape) -> None:
    with Lab() as lab:
        a, peer = lab.veth("a")
        tcpdump = start_tcpdump(lab, a, tmp_path / "a.pcap", 300)
        flows = shape.flows if shape.udp else None
        report = lab.send([peer], frames=300, rate=10_000, sizes=shape.sizes, vlan=shape.vlan, flows=flows)
        assert tcpdump.wait(10) == 0
    check_numbered([tmp_path / "a.pcap"]).assert_exact(report.sent_by_id)


needs_live_frames = pytest.mark.skipif(
    not xdpsend.available(), reason="the kernel refuses live XDP frames (Linux 5.18, CAP_BPF)"
)


@needs_live_frames
@pytest.mark.parametrize("rate", [0.0, 30_000.0])
@pytest.mark.parametrize("shape", [Shape((100,)), Shape(IMIX_SIZES), Shape((90, 300), udp=True, flows=50_001)])
def test_frames_sent_from_the_kernel_are_the_same_frames(tmp_path: Path, shape: Shape, rate: float) -> None:
    count, first = 3000, 44_000
    with Lab() as lab:
        pairs = [lab.veth("a"), lab.veth("b")]
        tcpdump = start_tcpdump(lab, "b", tmp_path / "b.pcap", count)
        flows = shape.flows if shape.udp else None
        options = {"sizes": shape.sizes, "flows": flows, "first_sequence": first}
        report = lab.start_fast_sender(pairs, frames=count, rate=rate, **options).report()
        assert tcpdump.wait(10) == 0
    check_numbered([tmp_path / "b.pcap"]).assert_exact({1: report.sent_by_id[1]}, first)
    frames = [bytes(packet.data) for packet in packets(tmp_path / "b.pcap")]
    assert frames == [numbered_frame(1, number, shape) for number in range(first, first + count)]
    assert rate == 0 or report.seconds >= 0.9 * 2 * count / rate


@needs_live_frames
def test_a_paced_sender_ends_though_its_signal_came_before_the_call() -> None:
    """Run in a process of its own, whose first call into the kernel begins after everything was due."""
    late = (
        "import time; from support import xdpsend as x; run = x.XdpSender._run_program;"
        "x.XdpSender._run_program = lambda self, repeat: (time.sleep(0.2), run(self, repeat));"
        "raise SystemExit(x.main())"
    )
    with Lab() as lab:
        a, peer = lab.veth("a")
        command = [sys.executable, "-c", late, peer, "--receiver", a, "--frames", "100", "--rate", "10000"]
        done = lab.run(command, env=os.environ | {"PYTHONPATH": str(TESTS_DIRECTORY)}, timeout_s=20)
    assert json.loads(done.stdout)["sent"] == {peer: 100}


@needs_live_frames
def test_a_rate_that_cannot_be_reached_is_sent_at_the_limit() -> None:
    """Calls that a timer breaks before they have begun would send next to nothing."""
    with Lab() as lab:
        pair = lab.veth("a")
        report = lab.start_fast_sender([pair], frames=400_000, rate=50e6).report(timeout_s=60)
        assert report.total == 400_000
        assert lab.statistics(pair[0])["rx_packets"] == 400_000


@needs_live_frames
@pytest.mark.parametrize("rate", [0.0, 50_000.0])
def test_an_endless_sender_from_the_kernel_ends_when_told(rate: float) -> None:
    with Lab() as lab:
        pair = lab.veth("a")
        sender = lab.start_fast_sender([pair], rate=rate)
        wait_until(lambda: lab.statistics(pair[0])["rx_packets"] > 1000, "traffic")
        assert sender.stop().total > 1000


def test_an_endless_sender_reports_what_it_sent_when_stopped() -> None:
    with Lab() as lab:
        a, peer = lab.veth("a")
        sender = lab.start_sender([peer], rate=20_000)
        wait_until(lambda: lab.statistics(a)["rx_packets"] > 100, "traffic")
        report = sender.stop()
        assert lab.statistics(a)["rx_packets"] == report.total > 100


def test_interfaces_go_down_up_away_and_change_names() -> None:
    with Lab() as lab:
        a, peer = lab.veth("a")
        lab.down(a)
        assert not lab.carrier(peer)
        lab.up(a)
        wait_until(lambda: lab.carrier(peer), "carrier")
        before = lab.index(a)
        assert lab.recreate(a) == (a, peer)
        assert lab.index(a) != before
        lab.rename(a, "z")
        assert lab.index("z") > 0
        lab.mtu("z", 9000)
        lab.delete("z")
        with pytest.raises(LabError, match="z"):
            lab.index("z")


def test_a_quiet_pair_carries_nothing_at_all() -> None:
    with Lab() as lab:
        a, _ = lab.veth("a")
        lab.run(["sleep", "1"])
        assert lab.statistics(a)["rx_packets"] == lab.statistics(a)["tx_packets"] == 0


def test_a_command_that_fails_is_named_with_what_it_said() -> None:
    with Lab() as lab, pytest.raises(LabError, match=r"import sys.*status 3.*no luck"):
        lab.run([sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"])


def test_a_sender_that_is_stopped_before_it_began_reports_that() -> None:
    with Lab() as lab:
        _, peer = lab.veth("a")
        assert lab.start_sender([peer], rate=1000).stop().sent[peer] <= 1000
