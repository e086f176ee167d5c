"""Applications in the running service: the names are those that the same packets have in a file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from capture.payloads import INITIAL_1, client_hello, handshake, question, record, server_name, tcp, udp
from support.captures import write_pcap
from support.lab import Lab, requires_root
from support.service import APPLIANCE, meter_frames

pytestmark = requires_root

HELLO = client_hello()
FRAMES = [
    tcp(HELLO[:200]),
    tcp(HELLO[200:], sequence=1200),
    udp(INITIAL_1),
    udp(question("www.example.net", 28), 999, 53),
    tcp(b"GET / HTTP/1.1\r\nHost: host.example\r\n\r\n", 40001, 80),
    tcp(b"SSH-2.0-client\r\n", 40002, 22),
    tcp(record(handshake(server_name(b"\x1b]0;title\x07"))), 40003),
]
NAMES = ("applicationName", "sslServerName", "tlsAlpn", "dnsQName", "dnsQRType", "httpRequestHost", "sshVersion")


def named_flows(files: Sequence[Path]) -> list[tuple[Any, ...]]:
    """Port, names and entropy of every flow record, as `appliance ipfix read` shows them."""
    found = []
    for path in files:
        done = subprocess.run([*APPLIANCE, "ipfix", "read", path], check=True, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            flow = json.loads(line).get("flow")
            if flow is not None:
                names = tuple(flow.get(name, "") for name in NAMES)
                found.append((flow["sourceTransportPort"], *names, flow["payloadEntropy"]))
    return sorted(found)


def offline(directory: Path) -> list[tuple[Any, ...]]:
    capture = write_pcap(directory / "frames.pcap", list(enumerate(FRAMES)))
    out = directory / "offline.ipfix"
    command = [*APPLIANCE, "flows", capture, "-o", out, "--applications", "--entropy"]
    subprocess.run(command, check=True, capture_output=True)
    return named_flows([out])


@pytest.mark.parametrize("source", ["ring", "pcap", "pcapfile"])
def test_flows_have_the_names_that_the_same_packets_have_in_a_file(
    lab: Lab, directory: Path, tmp_path: Path, source: str
) -> None:
    expected = offline(tmp_path)
    assert [flow[1] for flow in expected] == ["dns", "quic", "tls", "http", "ssh", "tls"]
    files = meter_frames(lab, directory, source, FRAMES, tmp_path, applications=True, entropy=True)
    assert named_flows(files) == expected
