"""Every kind of input and output that a URI names, through the whole engine, judged by programs that others wrote."""

from __future__ import annotations

import gzip
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from support.judges import capinfos, packets_by_wireshark, tshark_fields
from support.lab import requires_tool

from appliance.formats.output_trace import Packet, input_trace, output_trace
from appliance.formats.verify import verify_directory

pytestmark = requires_tool("capinfos", "tshark", "editcap")
MTRACECAP = [sys.executable, "-m", "appliance.mtracecap"]
START_S = 1_700_000_000
S = 10**9


def some_packets(count: int = 300) -> list[Packet]:
    chance = random.Random(11)
    return [
        Packet(START_S * S + i * 1_000_001, b"\2" * 12 + b"\x88\xb5" + chance.randbytes(60), 1000) for i in range(count)
    ]


def written(path: Path, scheme: str) -> Path:
    with output_trace(f"{scheme}:{path}") as trace:
        trace.write_packets(some_packets())
    return path


def mtracecap(*argv: str | Path, stdin: bytes | None = None) -> None:
    done = subprocess.run([*MTRACECAP, *map(str, argv)], input=stdin, capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("compression", ["", "gzip"])
@pytest.mark.parametrize("scheme", ["pcapfile", "pcap", "pcapng", "erf", "rawerf", ""])
def test_a_file_of_any_kind_is_recorded_with_its_packets_and_times(
    tmp_path: Path, scheme: str, compression: str
) -> None:
    path = written(tmp_path / "in", scheme or "erf")
    if compression:
        path.write_bytes(gzip.compress(path.read_bytes()))
    mtracecap(f"pcapng:{tmp_path / 'out'}", f"{scheme}:{path}" if scheme else path)
    read = packets_by_wireshark(tmp_path / "out")
    assert [(p.time_ns, bytes(p.data)) for p in read] == [(p.timestamp_ns, p.data) for p in some_packets()]


@pytest.mark.parametrize("scheme", ["pcapfile", "pcapng", "erf"])
def test_standard_input_may_be_any_kind(tmp_path: Path, scheme: str) -> None:
    content = written(tmp_path / "in", scheme).read_bytes()
    mtracecap(f"pcapng:{tmp_path / 'out'}", "-", stdin=content)
    assert capinfos(tmp_path / "out").packets == 300


@pytest.mark.parametrize("scheme", ["legacyeth", "legacypos", "tsh", "fr+"])
def test_old_traces_are_recorded_by_the_name_of_their_scheme(tmp_path: Path, scheme: str) -> None:
    packet = b"\x45\x00\x00\x64" + bytes(5) + b"\x06" + bytes(26)
    if scheme in ("tsh", "fr+"):
        records = [struct.pack(">II", START_S + i, 500) + packet for i in range(5)]
    elif scheme == "legacyeth":
        records = [struct.pack("<IIH", 2148, START_S + i, 100).ljust(64, b"\0") for i in range(5)]
    else:
        records = [(struct.pack("<IIII", 2148, START_S + i, 0, 100) + b"\xff\x03").ljust(64, b"\0") for i in range(5)]
        records = [record[:8] + struct.pack(">II", 48, 100) + record[16:] for record in records]
    (tmp_path / "in").write_bytes(b"".join(records))
    mtracecap(f"pcapng:{tmp_path / 'out'}", f"{scheme}:{tmp_path / 'in'}")
    seconds = [float(row[0]) for row in tshark_fields(tmp_path / "out", "frame.time_epoch")]
    assert [int(second) for second in seconds] == [START_S + i for i in range(5)]
    assert set(tshark_fields(tmp_path / "out", "frame.len")) == {("100",)}


@pytest.mark.parametrize("cut", [1, 15, 17, 40, 75, 77])
def test_a_cut_erf_file_gives_its_whole_packets_and_a_clear_error(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "in", "erf")
    path.write_bytes(path.read_bytes()[: -cut or None])
    argv = [*MTRACECAP, f"pcapng:{tmp_path / 'out'}", f"erf:{path}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    assert "after the beginning of a record" in done.stderr
    assert "Traceback" not in done.stderr


@requires_tool("tracestats", "tracepktdump")
@pytest.mark.parametrize("flags", [(), ("-z", "5")])
def test_an_erf_recording_is_what_libtrace_and_wireshark_read(tmp_path: Path, flags: tuple[str, ...]) -> None:
    source = written(tmp_path / "in", "pcapfile")
    out = tmp_path / "out"
    mtracecap(*flags, f"erf:{out}", source)
    done = subprocess.run(["tracestats", f"erf:{out}"], capture_output=True, text=True, check=True)
    total = next(line.split() for line in done.stdout.splitlines() if "Total:" in line)
    assert total[1:3] == ["300", str(300 * 1004)]
    with input_trace(str(out)) as trace:
        assert list(trace) == some_packets()
    if not flags:
        times = [p.time_ns for p in packets_by_wireshark(out)]
        assert times == [p.timestamp_ns for p in some_packets()]


def test_a_series_of_erf_files_holds_every_packet_once_in_order(tmp_path: Path) -> None:
    source = tmp_path / "in"
    with output_trace(f"pcapfile:{source}") as trace:
        trace.write_packets(Packet(START_S * S + i * 1000, bytes(1500)) for i in range(2500))
    (tmp_path / "out").mkdir()
    mtracecap("-S", "1", "-B", f"erf:{tmp_path / 'out'}", source)
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 4  # 3.6 MiB
    times = []
    for path in files:
        with input_trace(f"erf:{path}") as trace_in:
            times += [p.timestamp_ns for p in trace_in]
    assert times == [START_S * S + i * 1000 for i in range(2500)]


def test_a_packet_that_is_longer_than_an_erf_record_is_cut_and_still_written(tmp_path: Path) -> None:
    with output_trace(f"pcapfile:{tmp_path / 'in'}") as trace:
        trace.write_packets([Packet(START_S * S, bytes(70_000)), Packet(START_S * S + 1, bytes(60))])
    mtracecap(f"erf:{tmp_path / 'out'}", tmp_path / "in")
    with input_trace(f"erf:{tmp_path / 'out'}") as trace_in:
        assert [len(p.data) for p in trace_in] == [65517, 60]


def test_a_link_type_that_erf_has_not_is_refused_before_the_start(tmp_path: Path) -> None:
    with output_trace(f"pcapfile:{tmp_path / 'in'}") as trace:
        trace.write_packet(Packet(START_S * S, bytes(60), link_type=113))
    argv = [*MTRACECAP, f"erf:{tmp_path / 'out'}", str(tmp_path / "in")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    assert "link type 113, for which ERF has no type" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compressor", ["none", "lz4"])
def test_the_service_publishes_erf_files_that_agree_with_their_sidecars(tmp_path: Path, compressor: str) -> None:
    written(tmp_path / "in", "pcapng")
    config = tmp_path / "config.toml"
    config.write_text(
        f'[[interface]]\nuri = "pcapng:{tmp_path / "in"}"\n'
        f'[[output]]\ndirectory = "{tmp_path / "out"}"\nformat = "erf"\ncompressor = "{compressor}"\n'
        "min_free_bytes = 0\nrotate_packets = 100\n"
        '[meter]\nenabled = false\n[monitor]\nlisten = ""\ncontrol_socket = ""\n'
    )
    argv = [str(Path(sys.executable).with_name("appliance")), "run", "--no-figures", "-c", str(config)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    rows = verify_directory(tmp_path / "out")
    assert [(row.packets, row.problems) for row in rows] == [(100, ())] * 3
    assert all(row.file.endswith(".erf" if compressor == "none" else ".erf.lz4") for row in rows)


@requires_tool("traceconvert")
def test_what_libtrace_converts_from_erf_is_what_we_make_of_it(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "captures" / "100_packets.erf"
    theirs, ours = tmp_path / "theirs.pcap", tmp_path / "ours.pcap"
    subprocess.run(["traceconvert", f"erf:{source}", f"pcapfile:{theirs}"], check=True, capture_output=True)
    mtracecap(f"pcapfile:{ours}", f"erf:{source}")
    read = packets_by_wireshark(ours)
    expected = packets_by_wireshark(theirs)
    assert [(p.time_ns // 1000, bytes(p.data), p.original_length) for p in read] == [
        (p.time_ns // 1000, bytes(p.data), p.original_length) for p in expected
    ]
