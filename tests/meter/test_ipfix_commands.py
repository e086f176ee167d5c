"""`appliance ipfix read` and `listen`, and the other files of `appliance flows`: against exporters of others."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from meter.craft_ipfix import a_set, message, options_template, template
from meter.flow_packets import NO_SHARED, SHARED

from appliance.cli import run_command

APPLIANCE = [sys.executable, "-c", "from appliance.start import main; main()"]
CAPTURE = SHARED / "captures" / "bstats.pcap"  # 417 packets of 37,222 octets in 10 flows, as three others count
needs_captures = pytest.mark.skipif(not SHARED.is_dir(), reason=NO_SHARED)


def meter(capture: Path, output: Path, *options: str) -> None:
    assert run_command(["flows", str(capture), "-o", str(output), *options]) == 0


def flows_of(text: str) -> list[dict[str, Any]]:
    return [record["flow"] for record in map(json.loads, text.splitlines()) if "flow" in record]


def total(flows: list[dict[str, Any]], name: str) -> int:
    reverse = "reverse" + name[0].upper() + name[1:]
    return sum(int(flow.get(name) or 0) + int(flow.get(reverse) or 0) for flow in flows)


class Listening:
    """`appliance ipfix listen` as a process."""

    def __init__(self, *arguments: str) -> None:
        command = [*APPLIANCE, "ipfix", "listen", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        first = self.process.stderr.readline()
        self.ports = [int(port) for port in re.findall(r":(\d+)(?=[,;])", first)]
        assert self.ports, first

    def end(self, signal_number: int | None = signal.SIGINT) -> tuple[str, str]:
        """(records, messages); without a signal it is waited for."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        out, said = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, said
        return out, said


@pytest.fixture
def listening() -> Iterator[Any]:
    made: list[Listening] = []

    def make(*arguments: str) -> Listening:
        made.append(Listening(*arguments))
        return made[-1]

    yield make
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


@needs_captures
def test_our_own_file_is_read_with_every_packet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meter(CAPTURE, tmp_path / "a.ipfix")
    capsys.readouterr()
    assert run_command(["ipfix", "read", str(tmp_path / "a.ipfix")]) == 0
    out, said = capsys.readouterr()
    flows = flows_of(out)
    assert (len(flows), total(flows, "packetDeltaCount"), total(flows, "octetDeltaCount")) == (10, 417, 37222)
    assert "10 records" not in said and "did not come" not in said and "messages" in said
    options = [record for record in map(json.loads, out.splitlines()) if "options" in record]
    assert any(record["scope"] == ["templateId"] for record in options)


@needs_captures
def test_a_table_has_a_line_for_each_flow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meter(CAPTURE, tmp_path / "a.ipfix")
    capsys.readouterr()
    assert run_command(["ipfix", "read", "--format", "table", str(tmp_path / "a.ipfix")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("options")]
    assert lines[0].split()[:6] == ["start", "duration", "proto", "source", "destination", "packets"]
    assert len(lines) == 11 and all(" UDP " in line for line in lines[1:])


def test_text_from_the_wire_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.ipfix"
    path.write_bytes(message(options_template(300, 1, [(10, 4), (82, 8)]), a_set(300, bytes(4) + b"\x1b[2Jboo\n")))
    for output_format in ("table", "json"):
        assert run_command(["ipfix", "read", "--format", output_format, str(path)]) == 0
        out = capsys.readouterr().out
        assert "boo" in out and "\x1b" not in out and out.count("\n") == 1


def test_a_damaged_file_gives_what_stood_before_and_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.ipfix"
    path.write_bytes(message(template(256, [(7, 2)]), a_set(256, b"\0\1")) + b"\0\x0a\0\x30")
    assert run_command(["ipfix", "read", str(path)]) == 74
    out, said = capsys.readouterr()
    assert flows_of(out) == [{"sourceTransportPort": 1}]
    assert f"{path}: at octet 34" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["read", "/no/such/file"], 66, "/no/such/file: No such file"),
        (["read", "--format", "xml", "/dev/null"], 64, "--format xml"),
        (["listen", "http://x"], 78, "http://x"),
        (["listen", "tls://127.0.0.1:0"], 78, "--certificate"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["ipfix", *arguments]) == status
    assert said in capsys.readouterr().err


def test_standard_input_is_a_file_too() -> None:
    content = message(template(256, [(7, 2)]), a_set(256, b"\0\1\0\2"))
    done = subprocess.run(
        [*APPLIANCE, "ipfix", "read", "-"], input=content, capture_output=True, timeout=60, check=True
    )
    assert [flow["sourceTransportPort"] for flow in flows_of(done.stdout.decode())] == [1, 2]


def test_listening_ends_after_a_count_and_tells_gaps(listening: Any) -> None:
    collector = listening("udp://127.0.0.1:0", "--count", "3")
    with socket.socket(type=socket.SOCK_DGRAM) as exporter:
        exporter.connect(("127.0.0.1", collector.ports[0]))
        exporter.send(message(template(256, [(7, 2)]), a_set(256, b"\0\1")))
        exporter.send(message(a_set(256, b"\0\2\0\3"), sequence=8))
        out, said = collector.end(signal_number=None)
    assert [flow["sourceTransportPort"] for flow in flows_of(out)] == [1, 2, 3]
    assert "7 records before it did not come" in said and "7 records that did not come" in said


@needs_captures
@pytest.mark.skipif(shutil.which("softflowd") is None, reason="softflowd is not installed")
@pytest.mark.parametrize("options", [[], ["-b"], ["-A", "nano"]])
def test_softflowds_flows_are_collected(listening: Any, tmp_path: Path, options: list[str]) -> None:
    collector = listening("udp://127.0.0.1:0")
    command = ["softflowd", "-r", str(CAPTURE), "-n", f"127.0.0.1:{collector.ports[0]}", "-v", "10", "-d"]
    command += ["-p", str(tmp_path / "pid"), "-c", "none", *options]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    out, said = collector.end()
    flows = flows_of(out)
    assert (total(flows, "packetDeltaCount"), total(flows, "octetDeltaCount")) == (417, 37222), said
    assert '"meteringProcessId"' in out and "did not come" not in said and "malformed" not in said


@needs_captures
@pytest.mark.skipif(shutil.which("pmacctd") is None, reason="pmacctd is not installed")
def test_pmaccts_flows_are_collected(listening: Any, tmp_path: Path) -> None:
    collector = listening("udp://127.0.0.1:0")
    settings = {
        "daemonize": "false",
        "pcap_savefile": CAPTURE,
        "plugins": "nfprobe",
        "aggregate": "src_host,dst_host,src_port,dst_port,proto",
        "nfprobe_receiver": f"127.0.0.1:{collector.ports[0]}",
        "nfprobe_version": 10,
    }
    config = tmp_path / "pmacctd.conf"
    config.write_text("".join(f"{key}: {setting}\n" for key, setting in settings.items()))
    # Its exit status says nothing: the core process may find its plugin gone before it.
    pmacctd = subprocess.run(
        ["pmacctd", "-f", config], capture_output=True, timeout=60, stdin=subprocess.DEVNULL, text=True
    )
    out, said = collector.end()
    assert total(flows_of(out), "packetDeltaCount") == 417, said + pmacctd.stderr + pmacctd.stdout


# The other files of `flows` -------------------------------------------------------------------------------------------


@needs_captures
@pytest.mark.parametrize("name", ["out.json", "out.csv", "out.parquet"])
def test_a_file_of_rows_holds_the_flows_of_the_ipfix_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.endswith("parquet") and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed")
    capture = SHARED / "captures" / "mix-apps.pcap"
    meter(capture, tmp_path / "a.ipfix")
    capsys.readouterr()
    assert run_command(["ipfix", "read", str(tmp_path / "a.ipfix")]) == 0
    expected = flows_of(capsys.readouterr().out)
    meter(capture, tmp_path / name)
    found = rows_of(tmp_path / name)
    assert len(found) == len(expected) > 3000
    for column in ("packetDeltaCount", "octetDeltaCount"):
        assert total(found, column) == total(expected, column)
    assert comparable(found) == comparable(expected)


def comparable(flows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    columns = ("flowId", "packetDeltaCount", "sourceIPv4Address", "destinationTransportPort", "sourceMacAddress")
    columns += ("flowStartNanoseconds", "reverseMaximumTTL")
    return sorted(tuple(str("" if (cell := flow.get(c)) is None else cell) for c in columns) for flow in flows)


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".json":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    import pyarrow
    from pyarrow import compute, parquet

    table = parquet.read_table(path)
    column = table.schema.get_field_index("flowStartNanoseconds")
    assert table.schema.field(column).type == pyarrow.timestamp("ns", tz="UTC")
    text = compute.strftime(table.column(column), format="%Y-%m-%dT%H:%M:%SZ")
    rows: list[dict[str, Any]] = table.set_column(column, "flowStartNanoseconds", text).to_pylist()
    return rows


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_a_file_of_rows_is_never_written_over(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = tmp_path / "empty.pcap"
    capture.write_bytes(bytes.fromhex("d4c3b2a1020004000000000000000000ffff000001000000"))
    output = tmp_path / f"out.{ending}"
    meter(capture, output)
    assert output.read_text().count("\n") == (1 if ending == "csv" else 0)
    assert run_command(["flows", str(capture), "-o", str(output)]) == 73
    assert "exists already" in capsys.readouterr().err


def test_parquet_without_its_package_is_refused_and_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    capture = tmp_path / "empty.pcap"
    capture.write_bytes(bytes.fromhex("d4c3b2a1020004000000000000000000ffff000001000000"))
    assert run_command(["flows", str(capture), "-o", str(tmp_path / "out.parquet")]) == 66
    assert "pip install 'capture-appliance[parquet]'" in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()


def test_an_unknown_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["flows", "x.pcap", "-o", str(tmp_path / "x"), "--format", "xml"]) == 64
    assert "argument --format: invalid choice: 'xml'" in capsys.readouterr().err
