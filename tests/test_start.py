"""The command line of `appliance flows`, which has a reader of its own, and what it costs to start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from craft import Packet, pcap_file
from pydantic import BaseModel, TypeAdapter, ValidationError

from appliance import flows_command
from appliance.cli import run_command
from appliance.config import Meter, MeterExport
from appliance.errors import UsageError
from appliance.flows_command import parser, settings_of
from appliance.meter.settings import MeterSettings
from appliance.start import exit_status

PLAIN: list[tuple[list[str], dict[str, Any]]] = [
    (["a.pcap", "-o", "out"], {"files": ["a.pcap"], "output": "out"}),
    (["-o", "out", "b", "a"], {"files": ["b", "a"]}),
    (["b", "-o", "out", "a"], {"files": ["b", "a"]}),
    (["-", "--output=out", "--json"], {"files": ["-"], "output": "out", "json": True}),
    (["a.pcap", "-oout"], {"output": "out"}),
    (["a", "-o", "1", "-o", "2"], {"output": "2"}),
    (["-o", "out", "--", "a", "b"], {"files": ["a", "b"]}),
    (["a", "-o", "out", "--format", "csv"], {"format": "csv"}),
    (["a", "-o", "out", "--idle-timeout-s", "1.5", "--max-flows", "64"], {"idle_timeout_s": 1.5, "max_flows": 64}),
    (["a", "-o", "out", "--no-tcp-analysis", "--interface-in-key"], {"tcp_analysis": False, "interface_in_key": True}),
    (["a", "-o", "out", "--elements", "x", "--elements", "y"], {"elements": ["x", "y"]}),
]
WRONG = [
    ([], "the following arguments are required: --output/-o"),
    (["a.pcap"], "the following arguments are required: --output/-o"),
    (["-o", "out"], "the following arguments are required: FILE"),
    (["a.pcap", "-o"], "argument --output/-o: expected one argument"),
    (["a.pcap", "-o", ""], "argument --output/-o: must not be empty"),
    (["", "-o", "out"], "argument FILE: must not be empty"),
    (["a.pcap", "-o", "out", "--verbose"], "unrecognized arguments: --verbose"),
    (["a.pcap", "-o", "out", "--max-f", "100"], "unrecognized arguments: --max-f"),
    (["a.pcap", "-o", "out", "--idle-timeout-s", "soon"], "argument --idle-timeout-s: invalid number value: 'soon'"),
    (["a.pcap", "-o", "out", "--idle-timeout-s", "0"], "must be between 0.001 and 86400.0, is 0"),
    (["a.pcap", "-o", "out", "--idle-timeout-s", "nan"], "must be between 0.001 and 86400.0, is nan"),
    (["a.pcap", "-o", "out", "--active-timeout-s", "inf"], "must be between 0.001 and 86400.0, is inf"),
    (["a.pcap", "-o", "out", "--max-flows", "63"], "argument --max-flows: must be between 64 and 100000000, is 63"),
    (["a.pcap", "-o", "out", "--max-flows", "1.5"], "argument --max-flows: invalid number value: '1.5'"),
    (["a.pcap", "-o", "out", "--tunnels", "both"], "argument --tunnels: invalid choice: 'both'"),
    (["a.pcap", "-o", "out", "--format", "xml"], "argument --format: invalid choice: 'xml'"),
]
# Of the service alone: where things are, who does the work, and what belongs to connections.
SERVICE_KEYS = {"enabled", "directory", "cpus", "exports"}
CONNECTION_KEYS = {"uri", "template_refresh_s", "template_refresh_messages", "mtu_bytes", "rotate_seconds"}
CONNECTION_KEYS |= {"tls_ca", "tls_certificate", "tls_key", "tls_name"}
OFFLINE_KEYS = {"files", "output", "format", "json"}
EDGES = (-1, 0, 1, 2, 3, 20, 21, 63, 64, 86400, 86401, 1_000_000, 1_000_001, 1 << 24, 1 << 25, 100_000_000, 100_000_001)
EDGES += ((1 << 32) - 1, 1 << 32)
CONFIG_KEYS = [(Meter, name) for name in Meter.model_fields if name not in SERVICE_KEYS]
CONFIG_KEYS += [(MeterExport, name) for name in MeterExport.model_fields if name not in CONNECTION_KEYS]


def read(arguments: list[str]) -> dict[str, Any]:
    return vars(parser().parse_intermixed_args(arguments))


def accepted(arguments: list[str]) -> bool:
    try:
        read(["a.pcap", "-o", "out", *arguments])
    except UsageError:
        return False
    return True


@pytest.mark.parametrize(("arguments", "expected"), PLAIN)
def test_options_of_flows_are_read_in_any_order_and_form(arguments: list[str], expected: dict[str, Any]) -> None:
    found = read(arguments)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("arguments", "message"), WRONG)
@pytest.mark.parametrize(
    "command", [run_command, lambda arguments: exit_status(lambda: flows_command.run(arguments[1:]))]
)
def test_a_wrong_command_line_is_one_message_and_exit_status_64(
    arguments: list[str], message: str, command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["flows", *arguments]) == os.EX_USAGE
    told = capsys.readouterr()
    assert message in told.err and told.err.endswith("; see `appliance flows --help`\n") and told.err.count("\n") == 1
    assert told.out == ""


def test_the_help_of_flows_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["flows", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in shown for name in read(["a", "-o", "b"]) if name != "files")


def test_flows_has_a_switch_for_every_setting_of_the_meter_and_no_other() -> None:
    assert set(read(["a", "-o", "b"])) == OFFLINE_KEYS | {name for _, name in CONFIG_KEYS}


@pytest.mark.parametrize(("table", "name"), CONFIG_KEYS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_switch_has_the_default_and_the_bounds_of_its_key(table: type[BaseModel], name: str) -> None:
    field = table.model_fields[name]
    default = read(["a", "-o", "b"])[name]
    assert default == (list(field.default) if name == "elements" else field.default)
    if isinstance(field.default, bool):
        assert accepted([f"--{name.replace('_', '-')}"]) and accepted([f"--no-{name.replace('_', '-')}"])
        return
    checked: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, "as in the table", *field.metadata])
    values = ["inner", "outer", "field", "frame", "x"] if isinstance(field.default, str) else list(EDGES)
    if name == "elements":
        values = []
    for value in values:
        try:
            checked.validate_python(value, strict=True)
            wanted = True
        except ValidationError:
            wanted = False
        assert accepted([f"--{name.replace('_', '-')}={value}"]) == wanted, value


def test_settings_come_from_the_switches(tmp_path: Path) -> None:
    given = ["--vlan-in-key", "--no-tcp-analysis", "--flow-sampling=8", "--packet-sequence=3", "--tunnels=inner"]
    given += [
        "--zero-length=frame",
        "--max-fragmented=5",
        "--fragment-timeout-s=2.5",
        "--elements=a(1/2)<unsigned8> = 3",
    ]
    given += [
        "--no-biflow",
        "--domain=9",
        "--no-nanoseconds",
        "--format=json",
        "--no-vlan-in-key",
        "--packet-sampling=4",
    ]
    meter, export = settings_of(parser().parse_intermixed_args(["a", "-o", "b", *given]))
    assert meter == MeterSettings(
        vlan_in_key=False,
        tcp_analysis=False,
        packet_sampling=4,
        flow_sampling=8,
        packet_sequence=3,
        tunnels="inner",
        zero_length="frame",
        max_fragmented=5,
        fragment_timeout_s=2.5,
        elements=("a(1/2)<unsigned8> = 3",),
    )
    assert (export.biflow, export.domain, export.nanoseconds, export.file_format) == (False, 9, False, "json")


def test_metering_files_needs_none_of_the_heavy_packages(tmp_path: Path) -> None:
    capture = tmp_path / "a.pcap"
    capture.write_bytes(pcap_file([Packet(0, bytes(60))]))
    heavy = {"typer", "pydantic", "rich", "importlib.metadata", "hashlib", "zstandard", "lz4", "asyncio", "email"}
    program = f"""
import sys
from appliance.start import main
sys.argv = ["appliance", "flows", {str(capture)!r}, "-o", {str(tmp_path / "out.ipfix")!r}, "--json"]
try:
    main()
finally:
    print(sorted(set(sys.modules) & {heavy!r}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["packets"] == 1
    assert done.stderr == "[]\n"
