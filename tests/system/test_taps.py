"""A tap gives each direction on an interface of its own: live, both meet in one flow, or not, as the settings say."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from meter.flow_packets import ACK, FIN, SYN, Decoder, flow_records, number
from support.captures import write_pcap
from support.lab import Lab, requires_root, requires_tool
from support.replay import replay
from support.service import Service

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]

REVERSE, QOF = 29305, 35566
CLIENT, SERVER = b"\n\1\0\1", b"\n\1\0\2"
RATE = 2000


def frame(to_server: bool, vlan: int, sequence: int, acknowledgement: int, flags: int, payload: int = 0) -> bytes:
    ports, hosts = ((40000, 443), CLIENT + SERVER) if to_server else ((443, 40000), SERVER + CLIENT)
    tcp = struct.pack(">HHIIBBHHH", *ports, sequence, acknowledgement, 0x50, flags, 1000, 0, 0) + b"x" * payload
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0x4000, 64, 6, 0) + hosts
    return b"\2\0\0\0\0\2\2\0\0\0\0\1" + struct.pack(">HHH", 0x8100, vlan, 0x0800) + ip + tcp


def flows(service: Service) -> list[dict[tuple[int, int], bytes]]:
    decoder = Decoder()
    messages = [
        m for path in sorted(service.directory.glob("flows/*.ipfix")) for m in decoder.stream(path.read_bytes())
    ]
    return [record for record in flow_records(messages) if number(record, 4) == 6]


@pytest.mark.parametrize(
    ("settings", "records"),
    [({"vlan_in_key": False}, 1), ({"vlan_in_key": True}, 2), ({"vlan_in_key": False, "interface_in_key": True}, 2)],
)
def test_the_directions_of_a_tap_meet_in_one_flow_unless_the_key_keeps_them_apart(
    lab: Lab, directory: Path, tmp_path: Path, settings: dict[str, bool], records: int
) -> None:
    a, pa = lab.veth("a")
    b, pb = lab.veth("b")
    there = [frame(True, 11, 0, 0, SYN), *(frame(True, 11, 1 + 100 * i, 1, ACK, 100) for i in range(20))]
    back = [frame(False, 12, 0, 1, SYN | ACK), *(frame(False, 12, 1, 1 + 100 * i, ACK) for i in range(1, 21))]
    there.append(frame(True, 11, 2001, 1, FIN | ACK))
    meter = {"enabled": True, "export": [{"uri": "file:", "rotate_seconds": 0}], **settings}
    service = Service(lab, directory, [{"uri": f"ring:{a}"}, {"uri": f"ring:{b}"}], meter=meter)
    for peer, frames in ((pa, there), (pb, back)):
        write_pcap(tmp_path / "one.pcap", enumerate(frames))
        assert replay(lab, peer, tmp_path / "one.pcap", RATE) == len(frames)
    service.wait_at_rest({"a": len(there), "b": len(back)})
    assert service.stop() == 0
    found = flows(service)
    assert len(found) == records
    if records == 1:
        (flow,) = found
        assert (flow[0, 8], number(flow, 7), flow[0, 12], number(flow, 11)) == (CLIENT, 40000, SERVER, 443)
        assert (number(flow, 2), number(flow, 2, REVERSE)) == (len(there), len(back))
        assert (number(flow, 1024, QOF), number(flow, 1025, QOF), number(flow, 239)) == (2000, 0, 1)
    assert sum(number(f, 2) + (number(f, 2, REVERSE) if (REVERSE, 2) in f else 0) for f in found) == 43
