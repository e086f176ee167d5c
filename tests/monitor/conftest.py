from __future__ import annotations

import time
from pathlib import Path

import pytest
from monitor.pages import Appliance, make_appliance


@pytest.fixture
def appliance(tmp_path: Path) -> Appliance:
    """A service at rest in made-up time: every worker beats, nothing was received yet."""
    made = make_appliance(str(tmp_path))
    made.beat()
    return made


@pytest.fixture
def running(tmp_path: Path) -> Appliance:
    """A service that runs now, by the real clocks, with `traffic`."""
    made = make_appliance(str(tmp_path))
    made.monotonic_ns, made.realtime_ns = time.monotonic_ns(), time.time_ns()
    made.beat()
    made.traffic()
    return made
