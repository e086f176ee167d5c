"""Tunnels and fragments in the running service: the flows are those that the same packets have in a file."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from capture.crafted import C4, ETHERNET, TUNNELS, ethernet, ipv4, udp
from meter.flow_packets import Decoder, flow_records, number
from support.captures import write_pcap
from support.lab import Lab, requires_root
from support.service import APPLIANCE, meter_frames

pytestmark = requires_root

FRAMES = [frame for linktype, frame in TUNNELS.values() if linktype == ETHERNET] + [
    ethernet(0x0800, ipv4(17, udp(b"first of two"), fragment=0x2000)),
    ethernet(0x0800, ipv4(17, b"second one..", fragment=0x0003)),
]
Flow = tuple[bytes, bytes, int, int, int, int, int]


def flows_of(files: Sequence[Path]) -> list[Flow]:
    """Ends, protocol, ports, packets and octets of every flow record; an end is a flow's own side."""
    found = []
    for path in files:
        for record in flow_records(Decoder().stream(path.read_bytes())):
            version = 4 if number(record, 60) == 4 else 6
            source, destination = ((0, 8), (0, 12)) if version == 4 else ((0, 27), (0, 28))
            counts = number(record, 2), number(record, 1)
            ports = number(record, 7), number(record, 11)
            found.append((record[source], record[destination], number(record, 4), *ports, *counts))
    return sorted(found)


def offline(directory: Path, tunnels: str) -> list[Flow]:
    capture = write_pcap(directory / "frames.pcap", list(enumerate(FRAMES)))
    out = directory / "offline.ipfix"
    subprocess.run([*APPLIANCE, "flows", capture, "-o", out, "--tunnels", tunnels], check=True, capture_output=True)
    return flows_of([out])


@pytest.mark.parametrize("source", ["ring", "pcap", "pcapfile"])
@pytest.mark.parametrize("tunnels", ["outer", "inner"])
def test_flows_of_tunnels_are_those_of_the_same_packets_in_a_file(
    lab: Lab, directory: Path, tmp_path: Path, source: str, tunnels: str
) -> None:
    expected = offline(tmp_path, tunnels)
    files = meter_frames(lab, directory, source, FRAMES, tmp_path, tunnels=tunnels)
    assert flows_of(files) == expected
    assert any(flow[0] == C4 for flow in expected) == (tunnels == "inner")
    assert sum(flow[5] for flow in expected) == len(FRAMES)
