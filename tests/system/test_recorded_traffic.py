"""A real capture, replayed into one of two interfaces: files, sidecars, flows and metrics tell the same."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from support.captures import write_pcap
from support.frames import ETHERNET_BYTES
from support.judges import capinfos, packet_count, packets, tshark_fields
from support.lab import Lab, requires_root, requires_tool
from support.replay import replay
from support.service import Service

pytestmark = [requires_root, requires_tool("capinfos", "tshark", "lz4", "nfcapd", "nfdump")]

COLLECTOR_PORT = 4739
RATE = 25_000
FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


def metrics(lab: Lab) -> dict[str, float]:
    """All samples, by name and labels as they stand in the text."""
    text = lab.run([sys.executable, "-c", FETCH, "http://127.0.0.1:9750/metrics"]).stdout
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def total(samples: dict[str, float], name: str, *labels: str) -> int:
    """The sum of a family's samples that have all these labels."""
    return int(
        sum(
            value
            for sample, value in samples.items()
            if sample.partition("{")[0] == name and all(label in sample for label in labels)
        )
    )


def start_nfcapd(lab: Lab, directory: Path) -> subprocess.Popen[str]:
    directory.mkdir()
    collector = lab.popen(
        ["nfcapd", "-w", directory, "-b", "127.0.0.1", "-p", str(COLLECTOR_PORT), "-B", "4000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return collector


def what_can_be_sent(capture: Path, target: Path) -> list[bytes]:
    """The capture's packets, as far as they were captured, but for what is less than a header; also as a file."""
    frames = [bytes(packet.data) for packet in packets(capture) if len(packet.data) >= ETHERNET_BYTES]
    write_pcap(target, enumerate(frames))
    return frames


def test_files_sidecars_flows_and_metrics_of_a_replayed_capture_agree(
    lab: Lab, directory: Path, shared_data: Path, tmp_path: Path
) -> None:
    a, pa = lab.veth("a")
    b, _ = lab.veth("b")
    for name in (a, pa):
        lab.mtu(name, 65535)  # the capture has super-frames
    frames = what_can_be_sent(shared_data / "captures" / "mix-apps.pcap", tmp_path / "mix.pcap")
    nfcapd = start_nfcapd(lab, tmp_path / "nfcapd")
    service = Service(
        lab,
        directory,
        [{"uri": f"ring:{a}"}, {"uri": f"ring:{b}"}],
        meter={"enabled": True, "export": [{"uri": f"udp://127.0.0.1:{COLLECTOR_PORT}"}, {"uri": "file:"}]},
        monitor={"listen": "127.0.0.1:9750"},
        output={"rotate_seconds": 5},
    )
    assert replay(lab, pa, tmp_path / "mix.pcap", RATE) == len(frames)
    service.wait_at_rest({"a": len(frames), "b": 0})

    samples = metrics(lab)
    received = total(samples, "appliance_packets_received_total", 'interface="a"')
    assert received == len(frames)
    assert received == total(samples, "appliance_packets_written_total", 'interface="a"') + total(
        samples, "appliance_packets_dropped_total", 'interface="a"'
    ) + total(samples, "appliance_packets_in_flight", 'interface="a"')
    metered = total(samples, "appliance_meter_metered_packets_total")
    ignored = total(samples, "appliance_meter_ignored_packets_total")

    assert service.stop() == 0
    service.check_sidecars()
    assert packet_count(service.ready()) == len(frames) == sum(s["packets"] for s in service.sidecars())
    assert [bytes(packet.data) for path in service.ready() for packet in packets(path)] == frames
    assert all(capinfos(path).in_order in (True, None) for path in service.ready())
    assert sum(len(tshark_fields(path, "frame.number")) for path in service.ready()) == len(frames)

    lab.run(["sleep", "0.5"])  # nfcapd reads what the kernel holds for it
    nfcapd.send_signal(signal.SIGTERM)
    said = nfcapd.communicate(timeout=20)[0]
    service.assert_nothing_left()
    faults = re.findall(r"(?:[Ss]equence (?:[Ee]rrors|failures)|[Bb]ad [Pp]ackets): *(\d+)", said)
    assert faults and not any(int(fault) for fault in faults), said
    form = "fmt:%pkt,%opkt"
    done = subprocess.run(
        ["nfdump", "-R", tmp_path / "nfcapd", "-q", "-N", "-6", "-o", form], capture_output=True, text=True, check=True
    )
    collected = sum(int(n) for line in done.stdout.splitlines() if "," in line for n in line.split(","))
    assert metered + ignored == len(frames)
    assert collected == metered
