"""Collectors that we did not write, over the loopback: nfcapd misses nothing and finds nothing bad."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from meter.flow_packets import ACK, NO_SHARED, SECOND, SHARED, START, TCP, Memory, Packet, capture_digests, digests

from appliance.meter.metering import Metering
from appliance.meter.settings import ExportSettings, MeterSettings

pytestmark = pytest.mark.skipif(
    shutil.which("nfcapd") is None or shutil.which("nfdump") is None, reason="nfcapd and nfdump are not installed"
)


class Nfcapd:
    """nfcapd on a free UDP port; `stop` gives its flows and what it said."""

    def __init__(self, directory: Path) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.directory = directory
        self.log = (directory.parent / "nfcapd.log").open("w+")
        command = ["nfcapd", "-w", directory, "-b", "127.0.0.1", "-p", str(self.port), "-B", "4000000"]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        self._wait_until_it_listens()

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + 10
        wanted = f":{self.port:04X} "
        while wanted not in Path("/proc/net/udp").read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, "nfcapd does not listen"
            time.sleep(0.02)

    def wait_until_it_has_read(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for line in Path("/proc/net/udp").read_text().splitlines():
                fields = line.split()
                if fields[1].endswith(f":{self.port:04X}") and fields[4].endswith(":00000000"):
                    return
            time.sleep(0.02)

    def stop(self) -> tuple[list[list[str]], str]:
        self.wait_until_it_has_read()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=20)
        self.log.seek(0)
        said = self.log.read()
        form = "fmt:%pr,%sa,%sp,%da,%dp,%pkt,%byt,%opkt,%obyt"
        command = ["nfdump", "-R", self.directory, "-q", "-N", "-6", "-o", form]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if "," in line], said


@pytest.fixture
def nfcapd(tmp_path: Path) -> Iterator[Nfcapd]:
    directory = tmp_path / "nfcapd"
    directory.mkdir()
    collector = Nfcapd(directory)
    yield collector
    if collector.process.poll() is None:
        collector.process.kill()
        collector.process.wait()
    collector.log.close()


def faults(said: str) -> list[int]:
    """All figures of nfcapd about sequence failures and bad packets."""
    return [int(n) for n in re.findall(r"(?:[Ss]equence (?:[Ee]rrors|failures)|[Bb]ad [Pp]ackets): *(\d+)", said)]


def test_nfcapd_receives_every_biflow_with_both_directions(nfcapd: Nfcapd) -> None:
    exports = (ExportSettings(f"udp://127.0.0.1:{nfcapd.port}"),)
    metering = Metering(MeterSettings(export=exports))
    packets = []
    for port in range(1000, 3000):
        there = Packet(time_ns=START + port, protocol=TCP, flags=ACK, status=0x180, source_port=port, octets=100)
        packets += [there, replace(there, **there.back, octets=1000)]
    memory = Memory(digests(packets))
    metering.feed(memory.address, memory.length)
    metering.advance(START + 60 * SECOND)
    metering.finish()
    flows, said = nfcapd.stop()
    assert faults(said) and not any(faults(said)), said
    assert len(flows) == 2000
    assert {tuple(flow[5:]) for flow in flows} == {("1", "100", "1", "1000")}
    assert sorted(int(flow[2]) for flow in flows) == list(range(1000, 3000))


@pytest.mark.skipif(not SHARED.is_dir(), reason=NO_SHARED)
@pytest.mark.parametrize("biflow", [True, False])
def test_nfcapd_counts_a_real_capture_as_we_do(nfcapd: Nfcapd, biflow: bool) -> None:
    exports = (ExportSettings(f"udp://127.0.0.1:{nfcapd.port}", biflow=biflow),)
    metering = Metering(MeterSettings(export=exports))
    for records, _ in capture_digests(SHARED / "captures" / "mix-apps.pcap"):
        memory = Memory(records)
        metering.feed(memory.address, memory.length)
        metering.service(time.monotonic())
    metering.finish(20)
    flows, said = nfcapd.stop()
    assert faults(said) and not any(faults(said)), said
    assert len(flows) == metering.exporters[0].page["flow_records"]
    assert sum(int(flow[5]) + int(flow[7]) for flow in flows) == metering.page["metered_packets"]
    assert sum(int(flow[6]) + int(flow[8]) for flow in flows) == metering.page["metered_octets"]
