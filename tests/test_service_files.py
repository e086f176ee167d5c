"""The service's files, judged by systemd's own programs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from appliance import errors

# systemd-analyze's scale: 0 is a service that can do nothing, 10 one that can do anything.
WORST_EXPOSURE = 2.5


def run(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout + done.stderr


def section(unit: Path, name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    current = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            current = line.strip("[]")
        elif "=" in line and not line.startswith("#") and current == name:
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def unit(project: Path) -> Path:
    return project / "systemd" / "appliance.service"


def test_the_unit_exposes_no_more_than_it_must(unit: Path) -> None:
    told = run("systemd-analyze", "security", "--offline=true", unit)
    level = re.search(r"Overall exposure level for appliance\.service: ([\d.]+)", told)
    assert level, told
    assert float(level[1]) <= WORST_EXPOSURE, told


def test_systemd_finds_no_fault_in_the_unit(unit: Path, tmp_path: Path) -> None:
    # The program is where an installation puts it; here any program stands in its place.
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/capture-appliance/bin/appliance", "/bin/true"))
    assert [line for line in run("systemd-analyze", "verify", copy).splitlines() if unit.name in line] == []


def test_the_unit_speaks_of_the_names_that_are_fixed(unit: Path) -> None:
    service = section(unit, "Service")
    assert service["Type"] == ["notify"]
    assert [line.partition(" ")[2] for line in service["ExecStart"]] == ["run -c /etc/appliance/appliance.toml"]
    assert service["StateDirectory"] == service["RuntimeDirectory"] == ["appliance"]
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"] == ["CAP_NET_RAW"]
    assert set(service["RestartPreventExitStatus"][0].split()) == {
        str(code) for code in (errors.EXIT_USAGE, errors.EXIT_PERMISSION, errors.EXIT_CONFIG)
    }


def test_the_unit_allows_longer_to_stop_than_the_workers_get_to_drain(unit: Path) -> None:
    from appliance.config import Output, Service

    seconds = int(section(unit, "Service")["TimeoutStopSec"][0])
    assert seconds >= Service().drain_timeout_s + 10
    assert seconds >= Output().compressor_timeout_s


def test_the_user_and_the_directories_are_made_as_the_unit_needs_them(
    project: Path, unit: Path, tmp_path: Path
) -> None:
    told = run("systemd-sysusers", "--dry-run", project / "systemd" / "sysusers.d" / "appliance.conf")
    assert "appliance" in told or told == "", told  # silent where the user exists
    assert section(unit, "Service")["User"] == ["appliance"]

    # In a tree of our own and with our own user in the place of the service's: neither root nor that user is needed.
    rules = (project / "systemd" / "tmpfiles.d" / "appliance.conf").read_text()
    copy = tmp_path / "appliance.conf"
    copy.write_text(re.sub(r"(?<=\s)(root|appliance)\s+appliance\s+-$", "- - -", rules, flags=re.MULTILINE))
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "var" / "lib").mkdir(parents=True)
    run("systemd-tmpfiles", "--create", f"--root={root}", copy)
    modes = {path.name: path.stat().st_mode & 0o7777 for path in (root / "var/lib/appliance").iterdir()}
    assert modes == {"work": 0o2700, "ready": 0o2770, "meta": 0o2750, "flows": 0o2770, "quarantine": 0o2750}
    assert (root / "etc/appliance").stat().st_mode & 0o7777 == 0o750
