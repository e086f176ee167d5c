"""A short soak in the suite: `./bootstrap soak` runs for longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.lab import requires_root, requires_tool


@requires_root
@requires_tool("lz4")
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_short_soak_holds_every_identity(project: Path) -> None:
    command = [sys.executable, "-m", "soak", "--minutes", "1", "--round-seconds", "20", "--seed", "4"]
    environment = os.environ | {"PYTHONPATH": str(project / "tests")}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| exact") >= 3
    assert "every identity exact" in done.stdout
