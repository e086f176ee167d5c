"""What every test of the running service needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.lab import Lab
from support.service import service_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    with service_directory() as path:
        yield path


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made
