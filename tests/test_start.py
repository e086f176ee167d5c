"""What the console script reads by itself means the same as in the command line, and the rest is left to that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from craft import Packet, pcap_file

from appliance import cli
from appliance.start import plain_flows

PLAIN = [
    (["a.pcap", "-o", "out"], {"files": ["a.pcap"], "output": "out"}),
    (["-o", "out", "b", "a"], {"files": ["b", "a"], "output": "out"}),
    (["-", "--output", "out", "--json"], {"files": ["-"], "output": "out", "as_json": True}),
    (["a", "-o", "-out"], {"files": ["a"], "output": "-out"}),
    (["a", "-o", "1", "-o", "2"], {"files": ["a"], "output": "2"}),
    (["a", "-o", "out", "--format", "csv"], {"files": ["a"], "output": "out", "file_format": "csv"}),
    (
        ["a", "-o", "out", "--idle-timeout-s", "1.5", "--active-timeout-s", "60", "--max-flows", "64"],
        {"files": ["a"], "output": "out", "idle_timeout_s": 1.5, "active_timeout_s": 60.0, "max_flows": 64},
    ),
    (["a", "--tunnels", "inner", "-o", "out"], {"files": ["a"], "output": "out", "tunnels": "inner"}),
    (["a", "--max-fragmented", "0", "-o", "out"], {"files": ["a"], "output": "out", "max_fragmented": 0}),
    (["a", "--zero-length", "frame", "-o", "out"], {"files": ["a"], "output": "out", "zero_length": "frame"}),
    (["a", "--applications", "-o", "out"], {"files": ["a"], "output": "out", "applications": True}),
    (["a", "-o", "out", "--entropy"], {"files": ["a"], "output": "out", "entropy": True}),
]
NOT_PLAIN = [
    [],
    ["--help"],
    ["a.pcap"],
    ["-o", "out"],
    ["a.pcap", "-o"],
    ["a.pcap", "-oout"],
    ["a.pcap", "--output=out"],
    ["a.pcap", "-o", ""],
    ["", "-o", "out"],
    ["a.pcap", "-o", "out", "--", "b"],
    ["a.pcap", "-o", "out", "--verbose"],
    ["a.pcap", "-o", "out", "--idle-timeout-s", "soon"],
    ["a.pcap", "-o", "out", "--idle-timeout-s", "0"],
    ["a.pcap", "-o", "out", "--idle-timeout-s", "nan"],
    ["a.pcap", "-o", "out", "--active-timeout-s", "inf"],
    ["a.pcap", "-o", "out", "--max-flows", "63"],
    ["a.pcap", "-o", "out", "--max-flows", "1.5"],
    ["a.pcap", "-o", "out", "--tunnels", "both"],
    ["a.pcap", "-o", "out", "--zero-length", "none"],
    ["a.pcap", "-o", "out", "--max-fragmented", "-1"],
    ["a.pcap", "-o", "out", "--format", "xml"],
]


@pytest.mark.parametrize(("arguments", "expected"), PLAIN)
def test_plain_arguments_mean_what_they_mean_in_the_command_line(
    arguments: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plain_flows(arguments) == {"as_json": False} | expected
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cli, "meter_flows", lambda *values: called.append(values) or 0)
    assert cli.run_command(["flows", *arguments]) == 0
    defaults = {"idle_timeout_s": 30.0, "active_timeout_s": 300.0, "max_flows": 1_000_000}
    defaults |= {"tunnels": "outer", "max_fragmented": 65_536, "zero_length": "field"}
    names = (
        "files",
        "output",
        "idle_timeout_s",
        "active_timeout_s",
        "max_flows",
        "tunnels",
        "max_fragmented",
        "zero_length",
        "as_json",
        "file_format",
        "applications",
        "entropy",
    )
    defaults |= {"as_json": False, "file_format": None, "applications": False, "entropy": False}
    assert dict(zip(names, called[0], strict=True)) == defaults | expected


@pytest.mark.parametrize("arguments", NOT_PLAIN)
def test_whatever_else_is_left_to_the_command_line(arguments: list[str]) -> None:
    assert plain_flows(arguments) is None


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
