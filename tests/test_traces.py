"""`appliance trace`: every TCP flow of a file into a file of its own; Wireshark is the judge of what a flow is."""

from __future__ import annotations

import collections
import json
import plistlib
import random
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from support.captures import START_NS, write_pcap
from support.judges import capinfos, packets
from support.lab import requires_tool

from appliance.cli import run_command
from appliance.errors import CannotCreateError, MissingInputError, UsageError
from appliance.traces import INDEX_NAME, TraceCounts, TraceSettings, trace_files

FIN, SYN, RST, ACK = 1, 2, 4, 16
# Wireshark ends a conversation in the middle of mix-apps.pcap, where a dissector took it for one of its own; and
# FDDI is a link type that is not parsed here.
OTHERWISE = {"mix-apps.pcap", "llc.pcap"}


def tcp_frame(
    source_port: int, flags: int, *, seq: int = 1, ack: int = 0, host: int = 1, back: bool = False, data: bytes = b"x"
) -> bytes:
    addresses = [b"\x0a\0" + struct.pack(">H", host), b"\xc0\0\2\1"]
    ports = [source_port, 80]
    if back:
        addresses.reverse()
        ports.reverse()
    tcp = struct.pack(">HHIIBBHHH", *ports, seq, ack, 0x50, flags, 1000, 0, 0) + data
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + addresses[0] + addresses[1]
    return bytes(12) + b"\x08\x00" + ip + tcp


def trace(tmp_path: Path, frames: Iterable[tuple[int, bytes]], **settings: Any) -> tuple[TraceCounts, list[Any]]:
    source = write_pcap(tmp_path / "in.pcap", frames)
    counts = trace_files([str(source)], str(tmp_path / "out"), TraceSettings(frames=True, **settings))
    return counts, index(tmp_path / "out")


def index(directory: Path) -> list[Any]:
    return [json.loads(line) for line in (directory / INDEX_NAME).read_text().splitlines()]


def test_each_flow_has_a_file_with_its_packets_and_a_line_in_the_index(tmp_path: Path) -> None:
    frames = [(i * 1000 + 7, tcp_frame(1000 + i % 3, ACK, seq=i)) for i in range(30)]
    frames.insert(5, (5500, bytes(60)))
    counts, flows = trace(tmp_path, frames)
    assert counts == TraceCounts(packets=31, tcp_packets=30, other_packets=1, flows=3)
    assert [flow["packets"] for flow in flows] == [10, 10, 10]
    assert flows[0]["frames"] == [1, 4, 8, 11, 14, 17, 20, 23, 26, 29]
    for flow in flows:
        read = list(packets(tmp_path / "out" / flow["file"]))
        assert [(p.time_ns - START_NS, bytes(p.data)) for p in read] == [frames[n - 1] for n in flow["frames"]]
        assert (flow["first_ns"], flow["last_ns"]) == (read[0].time_ns, read[-1].time_ns)
        assert flow["file"] == f"{flow['label']}.pcap"
        assert flow["octets"] == sum(len(p.data) for p in read)
    assert flows[0]["label"] == f"10.0.0.1_1000-192.0.2.1_80-{START_NS // 10**9}.000000007"


def test_reasons_of_the_end_are_told(tmp_path: Path) -> None:
    second = 10**9
    frames = [
        (0, tcp_frame(1, SYN, seq=10)),
        (1, tcp_frame(1, SYN, seq=10)),  # repeated
        (2, tcp_frame(1, SYN, seq=99)),  # used again
        (3, tcp_frame(2, FIN | ACK)),
        (4, tcp_frame(3, RST)),
        (5, tcp_frame(4, ACK)),
        (400 * second, tcp_frame(5, ACK)),
    ]
    _, flows = trace(tmp_path, frames)
    ended = {(flow["srcport"], flow["ended"]): flow["frames"] for flow in flows}
    assert ended == {
        (1, "reused"): [1, 2],
        (1, "idle"): [3],
        (2, "closed"): [4],
        (3, "closed"): [5],
        (4, "idle"): [6],
        (5, "end"): [7],
    }


def test_a_refused_and_repeated_connection_is_one_flow_of_both_directions(tmp_path: Path) -> None:
    frames = [
        (0, tcp_frame(1, SYN, seq=10)),
        (1, tcp_frame(1, RST | ACK, ack=11, seq=0, back=True)),
        (2, tcp_frame(1, SYN | ACK, seq=777, ack=11, back=True)),
        (3, tcp_frame(1, ACK, seq=11, ack=778)),
    ]
    _, flows = trace(tmp_path, frames, bidirectional=True)
    assert [flow["frames"] for flow in flows] == [[1, 2, 3, 4]]


@pytest.mark.parametrize("format", ["json", "plist", "tree"])
def test_textual_formats_have_an_entry_for_each_packet(tmp_path: Path, format: str) -> None:
    frames = [(i, tcp_frame(1000 + i % 2, SYN if i < 2 else ACK, seq=5)) for i in range(6)]
    _, flows = trace(tmp_path, frames, format=format, buffer_bytes=600)
    for flow in flows:
        path = tmp_path / "out" / flow["file"]
        if format == "tree":
            assert path.read_text().count("|-- frame -> ") == 3
            continue
        content = json.loads(path.read_text()) if format == "json" else plistlib.loads(path.read_bytes())
        assert list(content) == [f"Frame {number}" for number in flow["frames"]]
        first = content[f"Frame {flow['frames'][0]}"]
        assert (first["flags"], first["seq"], first["src"]) == ("SYN", 5, "10.0.0.1")
        assert bytes.fromhex(first["frame"]) == frames[flow["frames"][0] - 1][1]


@pytest.mark.parametrize("buffer_bytes", [65536, 1 << 20, 64 << 20])
def test_memory_for_packets_is_bounded_and_no_packet_is_lost(tmp_path: Path, buffer_bytes: int) -> None:
    chance = random.Random(2)
    frames = [(i, tcp_frame(chance.randrange(1, 3000), ACK, data=bytes(chance.randrange(900)))) for i in range(9000)]
    counts, flows = trace(tmp_path, frames, buffer_bytes=buffer_bytes, max_flows=1 << 20)
    assert sum(flow["packets"] for flow in flows) == counts.tcp_packets == 9000
    assert sorted(number for flow in flows for number in flow["frames"]) == list(range(1, 9001))
    for flow in chance.sample(flows, 50):
        assert [bytes(p.data) for p in packets(tmp_path / "out" / flow["file"])] == [
            frames[number - 1][1] for number in flow["frames"]
        ]


def test_more_flows_than_the_table_holds_are_cut_short_and_counted(tmp_path: Path) -> None:
    frames = [(i, tcp_frame(1 + i % 100, ACK)) for i in range(1000)]
    counts, flows = trace(tmp_path, frames, max_flows=60)
    assert counts.evicted_flows == sum(flow["ended"] == "evicted" for flow in flows) > 0
    assert sum(flow["packets"] for flow in flows) == 1000
    assert len({flow["file"] for flow in flows}) == counts.flows


def test_open_files_do_not_grow_with_the_flows(tmp_path: Path) -> None:
    source = write_pcap(tmp_path / "in.pcap", [(i, tcp_frame(1 + i % 500, ACK)) for i in range(5000)])
    program = Path(sys.executable).with_name("appliance")
    argv = ["sh", "-c", 'ulimit -n 20; exec "$@"', "sh", str(program), "trace", str(source), "-o", "out"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out: 500 flows of 5000 TCP packets; 0 other packets read\n"


def test_several_files_go_on_with_the_flows_of_the_one_before(tmp_path: Path) -> None:
    first = write_pcap(tmp_path / "a", [(0, tcp_frame(1, SYN)), (1, bytes(60))])
    second = write_pcap(tmp_path / "b", [(2, tcp_frame(1, ACK))])
    counts = trace_files([str(first), str(second)], str(tmp_path / "out"), TraceSettings(frames=True))
    assert (counts.flows, [flow["frames"] for flow in index(tmp_path / "out")]) == (1, [[1, 3]])


def test_a_damaged_file_counts_with_its_whole_packets(tmp_path: Path) -> None:
    source = write_pcap(tmp_path / "a", [(i, tcp_frame(1, ACK)) for i in range(3)])
    source.write_bytes(source.read_bytes()[:-1])
    counts = trace_files([str(source)], str(tmp_path / "out"), TraceSettings())
    assert counts.tcp_packets == 2
    assert "2 packets are whole" in counts.damage[0]


def test_a_directory_that_cannot_be_written_on_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    frames = [(i, tcp_frame(1 + i, ACK, data=bytes(1400))) for i in range(3)]
    source = write_pcap(tmp_path / "in.pcap", frames)
    program = Path(sys.executable).with_name("appliance")
    # A limit on the length of files stands for a full disk.
    argv = ["sh", "-c", 'trap "" XFSZ; ulimit -f 1; exec "$@"', "sh", str(program), "trace", str(source), "-o", "out"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 74
    assert ".pcap: File too large" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_earlier_trace_is_not_overwritten(tmp_path: Path) -> None:
    trace(tmp_path, [(0, tcp_frame(1, ACK))])
    with pytest.raises(CannotCreateError, match=r"flows\.jsonl is there already"):
        trace(tmp_path, [(0, tcp_frame(1, ACK))])


def test_nothing_is_made_for_a_missing_file_or_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        trace_files([str(tmp_path / "nothing")], str(tmp_path / "out"), TraceSettings())
    with pytest.raises(UsageError, match="must be one of pcap"):
        trace_files(["x"], str(tmp_path / "out"), TraceSettings(format="csv"))
    assert not (tmp_path / "out").exists()


def test_the_command_counts_on_one_line_and_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_pcap(tmp_path / "a", [(i, tcp_frame(1, ACK)) for i in range(3)]))
    assert run_command(["trace", source, "-o", str(tmp_path / "one"), "--format", "json"]) == 0
    assert capsys.readouterr().out.endswith("1 flows of 3 TCP packets; 0 other packets read\n")
    assert run_command(["trace", source, "-o", str(tmp_path / "two"), "--json", "--bidirectional"]) == 0
    assert json.loads(capsys.readouterr().out)["tcp_packets"] == 3
    assert run_command(["trace", source, "-o", str(tmp_path / "two")]) == 73
    assert "is not overwritten" in capsys.readouterr().err


# Wireshark as the judge -----------------------------------------------------------------------------------------------


def streams_by_tshark(path: Path) -> tuple[set[tuple[int, ...]], set[int]]:
    """Frame numbers by tcp.stream; and the frames in which TCP is not in the outermost IP packet."""
    fields = ["-e", "frame.number", "-e", "tcp.stream", "-e", "frame.protocols"]
    options = [word for name in ("ip", "ipv6") for word in ("-o", f"{name}.defragment:FALSE")]
    argv = ["tshark", "-n", "-r", str(path), "-Y", "tcp", "-T", "fields", *fields, *options]
    lines = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=110).stdout.splitlines()
    streams: dict[str, list[int]] = collections.defaultdict(list)
    inner = set()
    for number, stream, protocols in (line.split("\t") for line in lines):
        layers = protocols.split(":")
        if "," in stream or layers.count("ip") + layers.count("ipv6") != 1 or "icmp" in layers:
            inner.add(int(number))
        else:
            streams[stream].append(int(number))
    return {tuple(frames) for frames in streams.values()}, inner


@requires_tool("tshark")
def test_joined_flows_are_tsharks_tcp_streams_on_the_shared_captures(tmp_path: Path, shared_data: Path) -> None:
    settings = TraceSettings(bidirectional=True, idle_timeout_s=0, linger_s=0, frames=True)
    compared = 0
    for path in sorted((shared_data / "captures").iterdir()):
        if path.name in OTHERWISE or path.is_dir() or path.suffix in (".tsv", ".snoop"):
            continue
        theirs, inner = streams_by_tshark(path)
        if not theirs:
            continue
        directory = tmp_path / path.name
        trace_files([str(path)], str(directory), settings)
        ours = {tuple(frame for frame in flow["frames"] if frame not in inner) for flow in index(directory)} - {()}
        assert ours == theirs, path.name
        compared += len(theirs)
    assert compared > 3000


@requires_tool("tshark")
def test_a_flows_file_holds_the_packets_that_tshark_filters_for_it(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "captures" / "skype.pcap"
    trace_files([str(source)], str(tmp_path / "out"), TraceSettings(frames=True))
    for flow in index(tmp_path / "out")[:10]:
        wanted = f"ip.src=={flow['src']} && tcp.srcport=={flow['srcport']} && ip.dst=={flow['dst']}"
        argv = ["tshark", "-n", "-r", source, "-Y", f"{wanted} && tcp.dstport=={flow['dstport']}", "-w", tmp_path / "t"]
        subprocess.run(argv, check=True, capture_output=True)
        assert capinfos(tmp_path / "out" / flow["file"]).packets == flow["packets"]
        assert capinfos(tmp_path / "t").packets >= flow["packets"]


def test_tcp_in_a_tunnel_is_traced_when_asked_for(tmp_path: Path, shared_data: Path) -> None:
    source = str(shared_data / "captures" / "vxlan.pcap")
    found = {}
    for inner in (False, True):
        settings = TraceSettings(bidirectional=True, inner=inner)
        found[inner] = trace_files([source], str(tmp_path / str(inner)), settings).tcp_packets
    assert found[False] == 0 < found[True]
