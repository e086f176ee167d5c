"""The same packets give the same flow records from live interfaces and from the files that were recorded of them.

Every field of every record is compared. Of messages, the export time and the sequence number may differ (they are the
session's, and no record's); of records nothing may, but for ingressInterface where one file holds the packets of two
interfaces: a file is one source, and its number is that of the file among those that are metered.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from capture.crafted import ETHERNET, TUNNELS, ethernet, ipv4, ipv6, tag, udp
from meter.flow_packets import ACK, FIN, RST, SYN, Decoder, number
from support.lab import Lab, requires_root, requires_tool
from support.replay import send_frames
from support.service import APPLIANCE, Service

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]

HERE, THERE = b"\n\1\0\1", b"\n\1\0\2"
HERE6, THERE6 = b"\x20\1" + bytes(13) + b"\1", b"\x20\1" + bytes(13) + b"\2"
PUSH = 0x08
IDLE_S, ACTIVE_S = 3, 4
METER: dict[str, Any] = {"idle_timeout_s": IDLE_S, "active_timeout_s": ACTIVE_S, "packet_sequence": 8}
INGRESS_INTERFACE = (0, 10)
OPTIONS_FROM = 300  # template IDs of options data

Record = tuple[tuple[tuple[int, int], bytes], ...]


def segment(out: bool, sequence: int, acknowledgement: int, flags: int, payload: int = 0, **more: int) -> bytes:
    """A TCP segment of one connection; `out`: from here to there. `vlan`: in such a tag; `six`: over IPv6."""
    ports = (40000 + more.get("port", 0), 443) if out else (443, 40000 + more.get("port", 0))
    head = struct.pack(">HHIIBBHHH", *ports, sequence, acknowledgement, 0x50, flags, more.get("window", 1000), 0, 0)
    data = head + bytes(payload)
    if more.get("six"):
        inside, ethertype = ipv6(6, data, ends=HERE6 + THERE6 if out else THERE6 + HERE6), 0x86DD
    else:
        inside, ethertype = ipv4(6, data, ends=HERE + THERE if out else THERE + HERE), 0x0800
    return ethernet(0x8100, tag(more["vlan"], ethertype, inside)) if "vlan" in more else ethernet(ethertype, inside)


def datagram(out: bool, payload: int) -> bytes:
    ends, ports = (HERE + THERE, (5000, 53)) if out else (THERE + HERE, (53, 5000))
    return ethernet(0x0800, ipv4(17, struct.pack(">HHHH", *ports, 8 + payload, 0) + bytes(payload), ends=ends))


def echo(out: bool) -> bytes:
    return ethernet(
        0x0800, ipv4(1, bytes([8 if out else 0, 0]) + bytes(30), ends=HERE + THERE if out else THERE + HERE)
    )


def connection(**more: int) -> list[tuple[bool, list[bytes]]]:
    """(outward, frames) in turn: handshake, data with repeats, disorder, losses and a closed window, FIN both ways."""
    there = [segment(True, 1 + 100 * i, 1, ACK | PUSH, 100, **more) for i in (0, 1, 1, 3, 2, 6, 7)]
    answers = [segment(False, 1, 101, ACK, **more)] * 4 + [segment(False, 1, 401, ACK, **(more | {"window": 0}))]
    return [
        (True, [segment(True, 0, 0, SYN, **more)]),
        (False, [segment(False, 0, 1, SYN | ACK, **more)]),
        (True, [segment(True, 1, 1, ACK, **more), *there]),
        (False, [*answers, segment(False, 1, 801, ACK | FIN, **more)]),
        (True, [segment(True, 801, 2, ACK | FIN, **more)]),
    ]


FRAGMENTS = [
    ethernet(0x0800, ipv4(17, udp(bytes(16)), fragment=0x2000)),
    ethernet(0x0800, ipv4(17, bytes(24), fragment=0x2003)),
    ethernet(0x0800, ipv4(17, bytes(9), fragment=0x0006)),
]
OTHERS = [
    ethernet(0x0806, bytes(28)),  # ARP: not metered
    ethernet(0x88A8, tag(7, 0x8100, tag(8, 0x0800, ipv4(17, udp(b"twice tagged"))))),
    *FRAGMENTS,
    *(frame for linktype, frame in TUNNELS.values() if linktype == ETHERNET),
]


def send_mixture(lab: Lab, out: str, back: str, directory: Path) -> dict[str, int]:
    """Sends from the far ends of both directions' interfaces; the frames for each. It ends with one packet a flow that
    is over with it, long after all others' time-outs: so what is still waited for is the same, live and in a file."""
    sent = Counter[str]()

    def send(outward: bool, frames: list[bytes]) -> None:
        sent["a" if outward else "b"] += send_frames(lab, out if outward else back, frames, directory)

    plain, six, tagged = connection(), connection(six=1, port=1), connection(vlan=5, port=2)
    for steps in zip(plain, six, tagged, strict=True):
        for outward, frames in steps:
            send(outward, frames)
    for _ in range(5):  # goes on for longer than the active time-out, and is never silent for the idle one
        send(True, [datagram(True, 20), echo(True), *OTHERS])
        send(False, [datagram(False, 200), echo(False)])
        time.sleep(1)
    time.sleep(IDLE_S)
    send(True, [segment(True, 5, 0, RST, port=9)])
    send(False, [segment(False, 5, 0, RST, port=10)])
    return dict(sent)


def records_of(paths: list[Path], *, without: set[tuple[int, int]]) -> Counter[Record]:
    """All records of flows and of their first packets, each with all fields but those."""
    messages = [message for path in paths for message in Decoder().stream(path.read_bytes())]
    return Counter(
        tuple(sorted((element, octets) for element, octets in record.items() if element not in without))
        for message in messages
        for template_id, record in message.records
        if template_id < OPTIONS_FROM
    )


def offline(files: list[Path], out: Path, settings: dict[str, Any]) -> Path:
    switches = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    subprocess.run([*APPLIANCE, "flows", *files, "-o", out, *switches], check=True, capture_output=True)
    return out


def outputs(directory: Path, a_file_each: bool) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """(interfaces, outputs): one output for both, in several files, or one with one file for each."""
    if not a_file_each:
        return [{"uri": "ring:a"}, {"uri": "ring:b"}], [{}]
    places = [directory / name for name in ("of-a", "of-b")]
    for place in places:
        place.mkdir()
    interfaces = [{"uri": f"ring:{name}", "output": f"of-{name}"} for name in "ab"]
    return interfaces, [{"name": place.name, "directory": str(place), "rotate_seconds": 0} for place in places]


@pytest.mark.parametrize("a_file_each", [False, True], ids=["files of both interfaces", "a file of each interface"])
@pytest.mark.parametrize("tunnels", ["outer", "inner"])
def test_a_live_meter_and_one_of_the_recorded_files_say_the_same(
    lab: Lab, directory: Path, tmp_path: Path, tunnels: str, a_file_each: bool
) -> None:
    (_, out), (_, back) = lab.veth("a"), lab.veth("b")
    settings = METER | {"tunnels": tunnels}
    interfaces, places = outputs(directory, a_file_each)
    meter = settings | {"enabled": True, "directory": str(directory), "export": [{"uri": "file:"}]}
    service = Service(lab, directory, interfaces, output=places, meter=meter)
    sent = send_mixture(lab, out, back, tmp_path)
    service.wait_at_rest(sent)
    assert service.stop() == 0, service.log

    recorded = sorted(path for place in ("ready", "of-a/ready", "of-b/ready") for path in (directory / place).glob("*"))
    assert len(recorded) == 2 if a_file_each else len(recorded) > 2
    without = set() if a_file_each else {INGRESS_INTERFACE}
    live = records_of(sorted((directory / "flows").iterdir()), without=without)
    again = records_of([offline(recorded, tmp_path / "again.ipfix", settings)], without=without)
    assert live - again == Counter() and again - live == Counter()

    flows = [dict(record) for record in live if (0, 136) in dict(record)]
    assert {number(flow, 136) for flow in flows} >= {1, 2, 3}  # idle, active, end of flow
    assert {number(flow, 4) for flow in flows} >= {1, 6, 17} and {number(flow, 60) for flow in flows} == {4, 6}
    tcp = [flow for flow in flows if number(flow, 4) == 6 and (35566, 1025) in flow]
    assert any(number(flow, 1025, 35566) for flow in tcp), "no repeat was seen"
    assert any((29305, 2) in flow and number(flow, 2, 29305) for flow in tcp), "no biflow of both interfaces"


@pytest.mark.skipif(shutil.which("ipfixDump") is None, reason="ipfixDump is not installed")
def test_another_reader_finds_the_same_in_both(lab: Lab, directory: Path, tmp_path: Path) -> None:
    (_, out), (_, back) = lab.veth("a"), lab.veth("b")
    interfaces, places = outputs(directory, a_file_each=True)
    settings = METER | {"packet_sequence": 0}
    meter = settings | {"enabled": True, "directory": str(directory), "export": [{"uri": "file:", "rotate_seconds": 0}]}
    service = Service(lab, directory, interfaces, output=places, meter=meter)
    service.wait_at_rest(send_mixture(lab, out, back, tmp_path))
    assert service.stop() == 0, service.log
    recorded = [path for place in ("of-a", "of-b") for path in (directory / place / "ready").iterdir()]
    again = offline(recorded, tmp_path / "again.ipfix", settings)
    (live,) = (directory / "flows").iterdir()
    found = flow_texts(live)
    assert found == flow_texts(again) and sum(found.values()) > 20


def flow_texts(path: Path) -> Counter[str]:
    """What ipfixDump says of each record that has a flowEndReason."""
    done = subprocess.run(["ipfixDump", "-i", path], check=True, capture_output=True, text=True)
    blocks = [block.partition("\n") for block in done.stdout.split("\n--- ")]
    return Counter(
        text.partition("***")[0].strip()
        for title, _, text in blocks
        if title.startswith("data record") and "flowEndReason :" in text
    )
