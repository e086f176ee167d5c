"""What the tests of the merge's inner parts share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from merge.outputs import Life, Make


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes lives of one output, all below `out`; those of one run may share their rings."""
    lives: list[Life] = []

    def make_life(*arguments: Any, **settings: Any) -> Life:
        lives.append(Life(tmp_path / "out", *arguments, **settings))
        return lives[-1]

    yield make_life
    for source in {id(source): source for life in lives for source in life.sources}.values():
        source.close()
