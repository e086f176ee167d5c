"""Packets and files made to do harm: what they cost is counted, and it is not much."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import pytest
from support.captures import START_NS, write_pcap
from support.frames import numbered_frame
from support.identities import balance
from support.judges import check_numbered, packets
from support.lab import Lab, requires_root, requires_tool
from support.replay import send_frames
from support.service import Service, configuration, refused

pytestmark = [requires_root, requires_tool("capinfos", "lz4")]

ETHERNET = b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02"


def start(lab: Lab, directory: Path) -> tuple[Service, str]:
    _, pa = lab.veth("a")
    return Service(lab, directory, [{"uri": "ring:a"}], meter={"enabled": True}), pa


def vlan_bomb(layers: int) -> bytes:
    return ETHERNET + b"\x81\x00\x00\x05" * layers + b"\x08\x00" + bytes(60)


def extension_bomb(headers: int) -> bytes:
    """IPv6 with so many Destination Options headers (RFC 8200, 4.6), each of 8 octets."""
    options = b"".join(bytes([60 if i + 1 < headers else 17, 0, 1, 4, 0, 0, 0, 0]) for i in range(headers))
    payload = options + struct.pack("!HHHH", 9, 9, 8, 0)
    return ETHERNET + b"\x86\xdd" + struct.pack("!IHBB", 0x60000000, len(payload), 60, 64) + bytes(32) + payload


def gre_bomb(layers: int) -> bytes:
    """IPv4 in GRE in IPv4 ... (RFC 2784)."""
    packet = b""
    for _ in range(layers):
        inner = b"\x00\x00\x08\x00" + packet
        packet = struct.pack("!BBHHHBBHII", 0x45, 0, 20 + len(inner), 0, 0, 64, 47, 0, 0x0A000001, 0x0A000002) + inner
    return ETHERNET + b"\x08\x00" + packet + bytes(max(0, 46 - len(packet)))


def test_towers_of_headers_are_recorded_and_cost_a_bounded_time(lab: Lab, directory: Path) -> None:
    service, pa = start(lab, directory)
    frames = [vlan_bomb(100), extension_bomb(100), gre_bomb(50)] * 500
    send_frames(lab, pa, frames, directory)
    last = balance(service, {"a": 1500})
    view = last.interfaces[0]
    assert view.written_packets == 1500
    assert view.ignored["too_many_layers"] + view.ignored["not_ip"] + view.ignored["malformed"] >= 1000
    assert view.ignored["too_many_layers"] >= 500
    assert service.stop() == 0
    recorded = [bytes(packet.data) for path in service.ready() for packet in packets(path)]
    assert recorded == frames
    assert "Traceback" not in service.log


def test_headers_that_lie_are_recorded_as_they_are_and_counted(lab: Lab, directory: Path) -> None:
    """Each octet of a good packet's headers takes a hundred other values; what is cut short is cut at every length."""
    service, pa = start(lab, directory)
    good = (
        ETHERNET + b"\x08\x00" + bytes.fromhex("4500002e00004000401100000a0000010a000002") + b"\0\x09" * 4 + bytes(18)
    )
    chance = random.Random(34)
    frames = [good[:i] + bytes([chance.randrange(256)]) + good[i + 1 :] for i in range(12, 42) for _ in range(100)]
    frames += [good[:length] for length in range(14, len(good))]
    send_frames(lab, pa, frames, directory)
    last = balance(service, {"a": len(frames)})
    view = last.interfaces[0]
    assert view.written_packets == len(frames)
    assert view.ignored["malformed"] > 0
    assert last.meter is not None
    assert last.meter.observed_packets + sum(view.ignored.values()) == len(frames)
    assert service.stop() == 0
    assert [bytes(packet.data) for path in service.ready() for packet in packets(path)] == frames


def test_a_flood_of_bad_packets_is_no_flood_of_log_lines(lab: Lab, directory: Path) -> None:
    service, pa = start(lab, directory)
    begun, lines = time.monotonic(), service.log.count("\n")
    bad = numbered_frame(0, 0)[:12] + b"\x08\x00" + b"\x4f" + bytes(60)  # an IPv4 header longer than the packet
    send_frames(lab, pa, [bad] * 20_000, directory, rate=20_000)
    balance(service, {"a": 20_000})
    seconds = time.monotonic() - begun
    assert service.log.count("\n") - lines <= 10 * seconds
    assert service.stop() == 0


# ---- times -----------------------------------------------------------------------------------------------------------

YEAR_2106_S = 0xFFFFFFFF


def test_times_of_any_year_are_recorded_and_stop_nobody(lab: Lab, directory: Path) -> None:
    """Files whose packets are of 1970, of 2106, and in between, in no order at all."""
    times_s = [0, 1, YEAR_2106_S, 1_700_000_000, 0, YEAR_2106_S, 1_700_000_001]
    count = len(times_s) * 100
    path = write_pcap(
        directory / "times.pcap",
        ((times_s[i % 7] * 10**9 + i - START_NS, numbered_frame(0, i)) for i in range(count)),
    )
    service = Service(
        lab,
        directory,
        [{"uri": f"pcapfile:{path}", "label": "a"}],
        meter={"enabled": True},
        output={"rotate_seconds": 0},
        wait=False,
    )
    assert service.wait(60) == 0, service.log
    report = check_numbered(service.ready())
    assert report[0].sequences == set(range(count))
    assert report[0].duplicates == 0
    assert f"received {count} = written {count} + dropped 0 + in flight 0" in service.log
    found = sorted(packet.time_ns // 10**9 for path in service.ready() for packet in packets(path))
    assert found == sorted(times_s * 100)
    assert report.inversions == sum(sidecar["late"] for sidecar in service.sidecars())


# ---- files -----------------------------------------------------------------------------------------------------------


def broken_files(directory: Path) -> dict[str, bytes]:
    good = write_pcap(directory / "good.pcap", ((i, numbered_frame(0, i)) for i in range(50))).read_bytes()
    return {
        "empty": b"",
        "text": b"this is no capture\n" * 50,
        "header cut": good[:20],
        "record cut": good[:-7],
        "length of 4 GiB": good[:24] + struct.pack("<IIII", 1, 1, 0xFFFFFFFF, 0xFFFFFFFF) + good[40:],
        "block of 4 GiB": struct.pack("<III", 0x0A0D0D0A, 0xFFFFFFFC, 0x1A2B3C4D) + bytes(64),
        "block of nothing": struct.pack("<IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28) + bytes(64),
        "gzip of nothing": b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + b"\xff" * 40,
    }


@requires_tool("prlimit")
def test_broken_input_files_end_with_a_status_and_in_bounded_memory(lab: Lab, directory: Path) -> None:
    for name, content in broken_files(directory).items():
        path = directory / "broken.pcap"
        path.write_bytes(content)
        out = directory / "out"
        config = configuration(out, [{"uri": f"pcapfile:{path}", "label": "a", "kernel_ring_bytes": 1 << 20}])
        out.mkdir(exist_ok=True)
        config["monitor"] = {"listen": "", "control_socket": ""}
        status, said = refused(lab, directory, config, prefix=("prlimit", f"--as={1 << 30}"))
        assert status in (65, 66, 74, 78), (name, status, said)
        assert "Traceback" not in said, (name, said)
        assert str(path) in said, (name, said)


@requires_tool("prlimit")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_damaged_captures_of_others_end_cleanly(lab: Lab, directory: Path, shared_data: Path) -> None:
    for path in sorted((shared_data / "captures" / "malformed").iterdir()):
        if path.suffix in (".md", ".tsv", ".txt"):
            continue
        out = directory / path.name
        config = configuration(out, [{"uri": f"pcapfile:{path}", "label": "a"}], meter={"enabled": True})
        config["monitor"] = {"listen": "", "control_socket": ""}
        status, said = refused(lab, directory, config, prefix=("prlimit", f"--as={1 << 30}"))
        assert status in (0, 65, 66, 74, 78), (path, status, said)
        assert "Traceback" not in said, (path, said)
        if status == 0:
            assert " in flight 0" in said, (path, said)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_an_interface_with_a_hostile_name_is_left_out_and_does_no_harm(lab: Lab, directory: Path) -> None:
    """The kernel allows such names. Whoever takes every interface gets those whose names are safe, and is told."""
    _, pa = lab.veth("a")
    trap = directory / "trap"
    for name in ("a;id", "$(id)", "`>trap`"):
        lab.ip("link", "add", "name", name, "type", "veth", "peer", "name", f"x{name}")
        lab.ip("link", "set", "dev", name, "up")
    service = Service(lab, directory, [{"uri": "ring:*"}])
    lab.send([pa], frames=500, rate=10_000)
    labels = {view.label for view in service.snapshot().interfaces}
    assert "a" in labels
    assert labels <= {"a", "ap", "lo"}, labels
    balance(service, {"a": 500})
    assert service.stop() == 0
    assert not trap.exists()


def test_a_filter_that_is_wrong_refuses_the_start_and_never_captures_everything(lab: Lab, directory: Path) -> None:
    lab.veth("a")
    for text in ("tcp port", "host", "port 99999", "((tcp)"):
        config = configuration(directory / "out", [{"uri": "ring:a", "filter": text}])
        status, said = refused(lab, directory, config)
        assert status == 78, (text, said)
        assert text in said
        assert not (directory / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ring_bytes", (1 << 52) + 4096),
        ("kernel_ring_bytes", (1 << 32) * 5),
        ("snaplen", (1 << 32) + 96),
        ("fanout", 1 << 33),
        ("block_timeout_ms", -1),
    ],
)
def test_sizes_beyond_their_range_are_refused_by_name(lab: Lab, directory: Path, key: str, value: int) -> None:
    lab.veth("a")
    config = configuration(directory / "out", [{"uri": "ring:a", key: value}])
    status, said = refused(lab, directory, config)
    assert status == 78, said
    assert f"interface[0].{key}" in said or "memory_bytes" in said
