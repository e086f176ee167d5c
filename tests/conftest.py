"""What several tests need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the project's tree."""
    return PROJECT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real captures and their truth, which live beside the project; without them the test is skipped."""
    directory = Path(os.environ.get("APPLIANCE_SHARED_DATA", PROJECT.parent / "shared" / "data")).resolve()
    if not (directory / "captures").is_dir():
        pytest.skip(f"no captures in {directory} (APPLIANCE_SHARED_DATA names another place)")
    return directory
