"""The captures that the offline rows are measured on."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

import pytest

np = pytest.importorskip("numpy", reason="an extra of the benchmark")

from support.judges import packets  # noqa: E402

from bench.traffic import NAMED_SIZES, Mix, packets_of, write_capture  # noqa: E402


def keys(path: Path) -> list[bytes]:
    """Addresses, protocol and ports of each packet."""
    return [bytes(packet.data[23:24]) + bytes(packet.data[26:38]) for packet in packets(path)]


def test_a_capture_has_the_flows_sizes_and_order_that_were_asked_for(tmp_path: Path) -> None:
    mix = Mix(NAMED_SIZES["IMIX"], flows=50)
    path = write_capture(tmp_path / "a.pcap", 4800, mix)
    found = list(packets(path))
    assert len(found) == packets_of(4800, mix) == 4800
    assert Counter(packet.original_length for packet in found) == {60: 2800, 590: 1600, 1514: 400}
    times = [packet.time_ns for packet in found]
    assert times == sorted(times)
    assert len(set(keys(path))) == 50


def test_headers_are_whole(tmp_path: Path) -> None:
    for packet in packets(write_capture(tmp_path / "a.pcap", 480, Mix(NAMED_SIZES["IMIX"], flows=20))):
        data = bytes(packet.data)
        total = sum(struct.unpack("!10H", data[14:34]))
        assert total % 0xFFFF == 0 and total > 0
        assert struct.unpack("!H", data[16:18])[0] == len(data) - 14
        if data[23] == 17:
            assert struct.unpack("!H", data[38:40])[0] == len(data) - 34
        else:
            assert data[46] >> 4 == 5


def test_the_first_packet_of_a_tcp_flow_alone_has_a_syn(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "a.pcap", 2000, Mix(flows=100, tcp_share=1.0))
    seen: set[bytes] = set()
    for key, packet in zip(keys(path), packets(path), strict=True):
        assert packet.data[47] == (0x10 if key in seen else 0x02)
        seen.add(key)


def test_tcp_flows_send_in_order_and_lose_nothing(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "a.pcap", 20_000, Mix(NAMED_SIZES["IMIX"], flows=30, tcp_share=1.0))
    expected: dict[bytes, int] = {}
    for key, packet in zip(keys(path), packets(path), strict=True):
        assert struct.unpack("!I", packet.data[38:42])[0] == expected.get(key, 0)
        expected[key] = expected.get(key, 0) + len(packet.data) - 54 + (key not in expected)


def test_a_shorter_capture_is_the_beginning_of_a_longer_one(tmp_path: Path) -> None:
    mix = Mix(NAMED_SIZES["IMIX"], flows=1000, skew=1.0)
    short = write_capture(tmp_path / "short.pcap", 4800, mix).read_bytes()
    assert write_capture(tmp_path / "long.pcap", 200_000, mix).read_bytes().startswith(short)


def test_sources_differ_and_interleave(tmp_path: Path) -> None:
    first, second = (write_capture(tmp_path / f"{i}.pcap", 1000, Mix(flows=10), i) for i in range(2))
    times = [[packet.time_ns for packet in packets(path)] for path in (first, second)]
    assert times[0] != times[1]
    assert sum(a < b for a, b in zip(*times, strict=True)) > 100 < sum(a > b for a, b in zip(*times, strict=True))


def test_skew_gives_few_flows_most_of_the_packets(tmp_path: Path) -> None:
    even = Counter(keys(write_capture(tmp_path / "even.pcap", 5000, Mix(flows=100))))
    skewed = Counter(keys(write_capture(tmp_path / "skewed.pcap", 5000, Mix(flows=100, skew=1.0))))
    assert even.most_common(1)[0][1] < 100 < 500 < skewed.most_common(1)[0][1]
