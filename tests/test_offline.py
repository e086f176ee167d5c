"""Files into flows: what the thread and the merge must not change, and how they end."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from craft import Packet, pcap_file
from meter.flow_packets import Decoder, flow_records, number

from appliance import offline
from appliance.errors import CannotCreateError, MissingInputError
from appliance.meter.settings import MeterSettings

MS = 1_000_000
PACKETS = 20_000  # more digests than all batches together hold
PORTS = 50


def frame(port: int, size: int) -> bytes:
    octets = 28 + size
    ip = bytes([0x45, 0, *octets.to_bytes(2, "big"), 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2])
    return bytes(12) + b"\x08\x00" + ip + port.to_bytes(2, "big") + b"\x00\x35" + bytes(4) + bytes(size)


def packets() -> list[Packet]:
    return [Packet(i * MS, frame(1000 + i * i % PORTS, i % 9)) for i in range(PACKETS)]


def write(path: Path, wanted: list[Packet]) -> str:
    path.write_bytes(pcap_file(wanted))
    return str(path)


def conversations(path: Path) -> list[tuple[int, int, int, int]]:
    records = flow_records(Decoder().stream(path.read_bytes()))
    return sorted((number(r, 7), number(r, 2), number(r, 1), number(r, 152)) for r in records)


def threads() -> int:
    return sum(thread.name == "digests" for thread in threading.enumerate())


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_a_capture_in_parts_has_the_flows_of_the_whole(parts: int, tmp_path: Path) -> None:
    whole = packets()
    names = [write(tmp_path / f"{i}.pcap", whole[i::parts]) for i in range(parts)]
    told: list[int] = []
    counts = offline.meter_files(names, str(tmp_path / "out.ipfix"), MeterSettings(), told.append)
    assert (counts.packets, counts.metered_packets, counts.late_packets) == (PACKETS, PACKETS, 0)
    expected = Counter(1000 + i * i % PORTS for i in range(PACKETS))
    assert {port: count for port, count, _, _ in conversations(tmp_path / "out.ipfix")} == expected
    assert told == sorted(told) and told[-1] == PACKETS
    offline.meter_files([write(tmp_path / "whole.pcap", whole)], str(tmp_path / "whole.ipfix"), MeterSettings())
    assert conversations(tmp_path / "out.ipfix") == conversations(tmp_path / "whole.ipfix")


def test_packets_that_are_out_of_order_are_late(tmp_path: Path) -> None:
    wanted = [Packet(i * MS, frame(1, 0)) for i in (5, 1, 6, 2)]
    counts = offline.meter_files([write(tmp_path / "a.pcap", wanted)], str(tmp_path / "out.ipfix"), MeterSettings())
    assert (counts.metered_packets, counts.late_packets) == (4, 2)


def test_what_is_not_metered_is_counted_with_its_octets_and_told_to_collectors(tmp_path: Path) -> None:
    arp = bytes(12) + b"\x08\x06" + bytes(28)
    names = [
        write(tmp_path / "a.pcap", [Packet(0, arp), Packet(MS, frame(1, 0))]),
        write(tmp_path / "b.pcap", [Packet(2, arp)]),
    ]
    counts = offline.meter_files(names, str(tmp_path / "out.ipfix"), MeterSettings())
    assert (counts.ignored["not_ip"], counts.ignored_octets) == (2, 2 * len(arp))
    messages = Decoder().stream((tmp_path / "out.ipfix").read_bytes())
    (told,) = [record for message in messages for template, record in message.records if template == 301]
    assert (number(told, 164), number(told, 165)) == (2, 2 * len(arp))


def test_of_several_files_a_damaged_one_counts_with_its_whole_packets(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{i}.pcap", packets()[i::2]) for i in range(2)]
    cut = Path(names[1])
    cut.write_bytes(cut.read_bytes()[:-1])
    counts = offline.meter_files(names, str(tmp_path / "out.ipfix"), MeterSettings())
    assert counts.metered_packets == PACKETS - 1
    assert [name in text for name, text in zip(names[1:], counts.damage, strict=True)] == [True]


def test_a_thread_is_not_left_behind_when_metering_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.ipfix").touch()
    name = write(tmp_path / "a.pcap", packets())
    with pytest.raises(CannotCreateError):
        offline.meter_files([name], str(tmp_path / "out.ipfix"), MeterSettings())
    monkeypatch.setattr(offline.Metering, "feed", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        offline.meter_files([name], str(tmp_path / "other.ipfix"), MeterSettings())
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == 0


def test_what_the_thread_raises_is_raised_by_the_metering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Iterator[int]:
        raise MissingInputError("gone")

    name = write(tmp_path / "a.pcap", packets())
    monkeypatch.setattr(offline._Input, "fill", fail)
    with pytest.raises(MissingInputError, match="gone"):
        offline.meter_files([name], str(tmp_path / "out.ipfix"), MeterSettings())
