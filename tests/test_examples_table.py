"""EXAMPLES.md names a test for each line of the originals' documentation, and the tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "seed-apis.md"
SYSTEMS = {"mtracecap 0.4": 21, "python-libtrace": 15, "Xena port capture": 12, "pcapkit TraceFlow": 11}
SYSTEMS |= {"python-ipfix 0.9.7": 5}


@pytest.fixture(scope="module")
def systems(project: Path) -> dict[str, tuple[Path, list[list[str]]]]:
    """System -> the file of its tests, and the rows of its table."""
    found: dict[str, tuple[Path, list[list[str]]]] = {}
    for line in (project / "tests" / "EXAMPLES.md").read_text().splitlines():
        if heading := re.fullmatch(r"## (.*): `(tests/.*\.py)`", line):
            rows: list[list[str]] = []
            found[heading[1]] = (project / heading[2], rows)
        elif line.startswith("| ") and not line.startswith("| Line"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))])
    return found


def test_every_system_has_its_rows(systems: dict[str, tuple[Path, list[list[str]]]]) -> None:
    assert {name: len(rows) for name, (_, rows) in systems.items()} == SYSTEMS
    assert all(len(row) == 2 and all(row) for _, rows in systems.values() for row in rows)


def test_every_test_that_is_named_exists(systems: dict[str, tuple[Path, list[list[str]]]]) -> None:
    for path, rows in systems.values():
        functions = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row[1])}
        assert len(named) >= len(rows) - 1
        assert named <= functions, named - functions


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs ../shared/reference")
def test_every_option_and_every_call_of_the_reference_has_its_row(
    systems: dict[str, tuple[Path, list[list[str]]]],
) -> None:
    text = REFERENCE.read_text()
    first = text[text.index("## 1.") : text.index("## 2.")]
    lines = " ".join(row[0] for row in systems["mtracecap 0.4"][1])
    options = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", first[first.index("```") : first.rindex("```")]))
    assert options <= set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", lines))
    third = text[text.index("## 3.") : text.index("## 4.")]
    calls = set(re.findall(r"capturer\.(\w+\.\w+|obtain_captured)\(", third)) - {"trigger.set"}
    rows = " ".join(row[0] for row in systems["Xena port capture"][1])
    assert all(call.partition(".")[2] in rows or call in rows for call in calls)
