"""The command line as a user meets it: real files, a real monitor behind the control socket, real terminals."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from monitor.forked import Worker
from monitor.pages import make_appliance

from appliance import cli, start
from appliance.cli import run_command
from appliance.console import Table, duration_text, print_table, rate_text, size_text
from appliance.monitor.view import Snapshot

COMMANDS = (
    "run",
    "check-config",
    "status",
    "rotate",
    "top",
    "interfaces",
    "doctor",
    "flows",
    "trace",
    "verify",
    "version",
)
APPLIANCE = [sys.executable, "-c", "from appliance.start import main; main()"]


def udp_pcap(path: Path, sources: int, packets: int, start_s: int = 1_700_000_000) -> Path:
    """A pcap file of `packets` UDP packets from each of `sources` hosts, one every 10 ms, all to one server."""
    out = io.BytesIO()
    out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
    for i in range(sources * packets):
        host = i % sources
        udp = struct.pack(">HHHH", 1000 + host, 53, 8 + 4, 0) + b"ping"
        ip = struct.pack(
            ">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), i, 0, 64, 17, 0, bytes([10, 0, 0, host]), b"\x0a\1\1\1"
        )
        frame = bytes(12) + b"\x08\x00" + ip + udp
        moment_us = i * 10_000
        out.write(struct.pack("<IIII", start_s + moment_us // 1_000_000, moment_us % 1_000_000, len(frame), len(frame)))
        out.write(frame)
    path.write_bytes(out.getvalue())
    return path


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Worker]:
    appliance = make_appliance(str(tmp_path))
    appliance.beat(time.monotonic_ns())
    appliance.realtime_ns = time.time_ns()
    appliance.traffic()
    made = Worker(appliance, tmp_path / "control.sock")
    yield made
    made.close()


def in_terminal(arguments: list[str]) -> tuple[int, str]:
    """Runs a command with a terminal for standard output and error; returns its status and what it showed."""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
    process = subprocess.Popen([*APPLIANCE, *arguments], stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown = bytearray()
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # EIO: the last holder of the other end is gone
            break
        if not part:
            break
        shown += part
    os.close(leader)
    return process.wait(), shown.decode()


# What every command has in common ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([command, "--help"]) == 0
    assert f"Usage: appliance {command}" in capsys.readouterr().out


def test_no_command_is_a_usage_error_that_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([]) == os.EX_USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert all(command in shown.err for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], r"appliance: No such command 'frobnicate'.*; see `appliance --help`\n"),
        (["status", "--frob"], r"appliance: No such option: --frob.*; see `appliance status --help`\n"),
        (["run"], r"appliance: Missing option '--config' / '-c'; see `appliance run --help`\n"),
        (
            ["flows", "a.pcap"],
            r"appliance: the following arguments are required: --output/-o; see `appliance flows --help`\n",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_and_64(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == os.EX_USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(message, shown.err)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out.startswith("appliance ")


def test_a_fault_of_the_program_is_one_line_and_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(start.DEBUG_VARIABLE, raising=False)
    monkeypatch.setattr(cli, "_version", lambda: 1 // 0)
    assert run_command(["version"]) == 70
    error = capsys.readouterr().err
    assert error == (
        "appliance: a fault of the program itself: ZeroDivisionError: integer division or modulo by zero; "
        "APPLIANCE_DEBUG=1 shows where\n"
    )


def test_a_fault_shows_where_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(start.DEBUG_VARIABLE, "1")
    monkeypatch.setattr(cli, "_version", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run_command(["version"])


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*APPLIANCE, "interfaces"], stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_needs_none_of_the_heavy_parts() -> None:
    program = (
        "import sys; from appliance.cli import run_command; run_command(['--help']); "
        "print(sorted(set(sys.modules) & {'pydantic', 'prometheus_client', 'starlette', 'uvicorn', 'psutil', "
        "'appliance.config', 'appliance.supervisor'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# Asking a service -----------------------------------------------------------------------------------------------------


def test_status_shows_the_balance_of_every_interface(service: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["status", "--socket", str(service.control_path)]) == 0
    shown = capsys.readouterr().out
    assert (
        "uplink: received 1000 = written 700 + dropped 205 (foreign 3, filter 7, kernel 100, ring 50, merge 10, "
        "writer 30, unclean 5) + in flight 95 (kernel 20, reorder 5, ring 40, merge 30)\n"
    ) in shown
    assert "lo: received 40 = written 40 + dropped 0 + in flight 0\n" in shown
    assert "\x1b" not in shown


def test_status_names_what_is_unaccounted(service: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    service.pages["merge/main/lo"]["written_packets"] = 37
    assert run_command(["status", "--socket", str(service.control_path)]) == 0
    assert "lo: received 40 = written 37 + dropped 0 + in flight 0 + unaccounted 3\n" in capsys.readouterr().out


def test_status_as_json_is_the_snapshot(service: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["status", "--json", "--socket", str(service.control_path)]) == 0
    snapshot = Snapshot.from_json(json.loads(capsys.readouterr().out))
    assert [(row.label, row.received_packets) for row in snapshot.interfaces] == [("uplink", 1000), ("lo", 40)]


def test_status_finds_the_socket_by_the_configuration(
    service: Worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "a.toml"
    config.write_text(
        f'[[interface]]\nuri = "ring:lo"\n[monitor]\ncontrol_socket = "{service.control_path}"\n', encoding="utf-8"
    )
    assert run_command(["status", "-c", str(config)]) == 0
    assert "uplink: received 1000" in capsys.readouterr().out


def test_a_configuration_without_a_socket_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "a.toml"
    config.write_text('[[interface]]\nuri = "ring:lo"\n[monitor]\ncontrol_socket = ""\n', encoding="utf-8")
    assert run_command(["rotate", "-c", str(config)]) == os.EX_USAGE
    assert "that service has no control socket" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "rotate", "top"])
def test_a_service_that_does_not_run_is_69(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([command, "--socket", str(tmp_path / "no.sock")]) == os.EX_UNAVAILABLE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"appliance: no service listens on {tmp_path / 'no.sock'}; start one with")


def test_rotate_reaches_the_supervisor(service: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["rotate", "--socket", str(service.control_path)]) == 0
    service.channel.settimeout(10)
    assert service.channel.recv(100) == b"rotate"
    assert capsys.readouterr().out == "the open files will be closed and published\n"


def test_version_tells_both(service: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["version", "--json", "--socket", str(service.control_path)]) == 0
    assert json.loads(capsys.readouterr().out)["service"] == "1.2.3"


def test_top_in_a_pipe_is_a_line_every_interval(service: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["top", "-n", "2", "-d", "0.2", "--socket", str(service.control_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("received 1,040 = written 740 + dropped 205 + in flight 95 | lost 195 | 3 files")
    assert second.startswith("0 pkt/s, 0 b/s | received 1,040")


def test_status_on_a_terminal_is_drawn(service: Worker) -> None:
    status, shown = in_terminal(["status", "--socket", str(service.control_path)])
    assert status == 0
    assert "─" in shown
    assert "1,000" in shown
    assert "uplink: received 1000 = written 700" in shown


def test_top_on_a_terminal_leaves_it_as_it_was(service: Worker) -> None:
    status, shown = in_terminal(["top", "-n", "2", "-d", "0.2", "--socket", str(service.control_path)])
    assert status == 0
    assert "\x1b[?1049h" in shown and "\x1b[?1049l" in shown  # the alternate screen, entered and left
    assert "uplink" in shown


# Files ----------------------------------------------------------------------------------------------------------------


def test_flows_are_metered_into_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = udp_pcap(tmp_path / "a.pcap", sources=5, packets=20)
    assert run_command(["flows", str(capture), "-o", str(tmp_path / "out.ipfix"), "--json"]) == 0
    shown = capsys.readouterr()
    counts = json.loads(shown.out)
    assert shown.err == ""
    assert (counts["packets"], counts["metered_packets"], counts["flows"]) == (100, 100, 5)
    assert counts["metered_octets"] == 100 * 32
    assert (tmp_path / "out.ipfix").read_bytes()[:2] == b"\x00\x0a"  # IPFIX, version 10


def test_several_files_are_metered_in_the_order_of_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The second one goes on where the first one ends: five flows, none late, in whatever order we name the files.
    early = udp_pcap(tmp_path / "early.pcap", sources=5, packets=20)
    late = udp_pcap(tmp_path / "late.pcap", sources=5, packets=20, start_s=1_700_000_001)
    assert run_command(["flows", str(late), str(early), "-o", str(tmp_path / "out.ipfix"), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["packets"], counts["flows"], counts["late_packets"]) == (200, 5, 0)


def test_the_flow_file_is_read_by_others(tmp_path: Path) -> None:
    tshark = shutil.which("tshark")
    if tshark is None:
        pytest.skip("tshark is not installed")
    capture = udp_pcap(tmp_path / "a.pcap", sources=5, packets=20)
    assert run_command(["flows", str(capture), "-o", str(tmp_path / "out.ipfix")]) == 0
    done = subprocess.run(
        [tshark, "-r", str(tmp_path / "out.ipfix"), "-T", "fields", "-e", "cflow.srcaddr", "-e", "cflow.packets"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert sorted(word for line in done.stdout.splitlines() for word in line.replace("\t", ",").split(",") if word)[
        :5
    ] == [f"10.0.0.{host}" for host in range(5)]


def test_a_damaged_file_counts_with_its_whole_packets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = udp_pcap(tmp_path / "a.pcap", sources=1, packets=10)
    capture.write_bytes(capture.read_bytes()[:-7])
    assert run_command(["flows", str(capture), "-o", str(tmp_path / "out.ipfix"), "--json"]) == os.EX_IOERR
    shown = capsys.readouterr()
    assert json.loads(shown.out)["metered_packets"] == 9
    assert "a.pcap is damaged" in shown.err
    assert shown.err.count("\n") == 1


def test_a_file_that_does_not_exist_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["flows", str(tmp_path / "no.pcap"), "-o", str(tmp_path / "out.ipfix")]
    assert run_command(arguments) == os.EX_NOINPUT
    assert capsys.readouterr().err == f"appliance: {tmp_path / 'no.pcap'} does not exist\n"
    assert list(tmp_path.iterdir()) == []


def test_an_existing_flow_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = udp_pcap(tmp_path / "a.pcap", sources=1, packets=1)
    (tmp_path / "out.ipfix").write_text("precious", encoding="utf-8")
    assert run_command(["flows", str(capture), "-o", str(tmp_path / "out.ipfix")]) == os.EX_CANTCREAT
    assert "out.ipfix" in capsys.readouterr().err
    assert (tmp_path / "out.ipfix").read_text(encoding="utf-8") == "precious"


def test_progress_is_for_terminals_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capture = udp_pcap(tmp_path / "a.pcap", sources=5, packets=100)
    status, shown = in_terminal(["flows", str(capture), "-o", str(tmp_path / "1.ipfix")])
    assert status == 0
    assert "metering" in shown and "\x1b[" in shown
    assert run_command(["flows", str(capture), "-o", str(tmp_path / "2.ipfix")]) == 0
    piped = capsys.readouterr()
    assert piped.err == ""
    assert "\x1b" not in piped.out


def test_verify_names_what_does_not_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ready").mkdir()
    (tmp_path / "meta").mkdir()
    udp_pcap(tmp_path / "ready" / "a.pcap", sources=2, packets=5)
    assert run_command(["verify", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "a.pcap" in shown
    assert "1 files, 10 packets, 1 with problems" in shown  # it has no sidecar


def test_verify_needs_the_directory_of_an_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", str(tmp_path)]) == os.EX_NOINPUT
    assert f"{tmp_path} has no folder ready/" in capsys.readouterr().err


# Configuration and host ----------------------------------------------------------------------------------------------


def config_file(tmp_path: Path, **interface: str) -> Path:
    path = tmp_path / "a.toml"
    keys = {"uri": "ring:lo", **interface}
    lines = ["[[interface]]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    lines += ["[[output]]", f'directory = "{tmp_path / "out"}"', 'compressor = ["xz", "-0"]']
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_check_config_shows_the_plan_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["check-config", "--json", "-c", str(config_file(tmp_path, filter="udp port 53"))]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(row["label"], row["filter"]) for row in plan["sources"]] == [("lo", "udp port 53")]
    assert plan["outputs"][0]["compressor"] == "xz -0"
    assert [row["name"] for row in plan["processes"]] == ["capture/lo", "merge/main", "meter", "monitor"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("interface", "status", "named"),
    [
        ({"filter": "tcp port"}, os.EX_CONFIG, "tcp port"),
        ({"uri": "ring:nosuch0"}, os.EX_NOINPUT, "nosuch0"),
        ({"uri": "pcapfile:/no/such.pcap"}, os.EX_NOINPUT, "/no/such.pcap"),
        ({"filtr": "udp"}, os.EX_CONFIG, "filtr"),
    ],
)
def test_check_config_names_the_fault(
    tmp_path: Path, interface: dict[str, str], status: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["check-config", "-c", str(config_file(tmp_path, **interface))]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("appliance: ") and named in shown.err
    assert "Traceback" not in shown.err


def test_interfaces_are_listed_with_what_is_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["interfaces", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["lo"]["kind"] == "loopback"
    assert all(row["recorded"] == "yes" or row["recorded"].startswith("no, ") for row in rows.values())


def test_doctor_names_every_check_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run_command(["doctor", "--json", "-c", str(config_file(tmp_path))])
    checks = json.loads(capsys.readouterr().out)
    assert status == (1 if any(check["outcome"] == "fail" for check in checks) else 0)
    names = {check["check"] for check in checks}
    assert {
        "right to capture",
        "kernel",
        "clock",
        "packages",
        "workers",
        "interface lo",
        "memory",
        "output main",
    } <= names
    assert all(check["advice"] for check in checks if check["outcome"] == "fail")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give the right to capture up")
def test_doctor_says_how_to_get_the_right_to_capture(tmp_path: Path) -> None:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv is not installed (package util-linux)")
    drop = [setpriv, "--bounding-set=-net_raw", "--inh-caps=-all", "--ambient-caps=-all"]
    done = subprocess.run(
        [*drop, *APPLIANCE, "doctor", "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    [check] = [check for check in json.loads(done.stdout) if check["check"] == "right to capture"]
    assert check["outcome"] == "fail"
    assert "lacks CAP_NET_RAW" in check["finding"]
    assert "sudo ./bootstrap run" in check["advice"] and "setcap" not in check["advice"]


# Console --------------------------------------------------------------------------------------------------------------


def test_a_piped_table_is_aligned_plain_and_whole() -> None:
    out = io.StringIO()
    print_table(Table("Things", ("name", "count"), [("a" * 100, 1), ("b", 1234567), ("[red]c", None)]), out)
    assert out.getvalue().splitlines() == [
        "# Things",
        "name" + " " * 98 + "  count",
        "a" * 100 + "        1",
        "b" + " " * 99 + "  1234567",
        "[red]c" + " " * 94 + "        -",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (size_text(None), "-"),
        (size_text(1023), "1023 B"),
        (size_text(1536), "1.5 KiB"),
        (size_text(3 << 30), "3.0 GiB"),
        (rate_text(999, "pkt/s"), "999 pkt/s"),
        (rate_text(12345, "pkt/s"), "12.3 kpkt/s"),
        (rate_text(9.4e9, "b/s"), "9.4 Gb/s"),
        (duration_text(None), "-"),
        (duration_text(5), "5.0 s"),
        (duration_text(600), "10 min"),
        (duration_text(3 * 86400), "3.0 days"),
    ],
)
def test_figures_have_units(text: str, expected: str) -> None:
    assert text == expected
