"""FAULTS.md is whole, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROWS = 48
REQUIREMENTS = 11
ON_RUNNING_PROCESSES = 44


@pytest.fixture(scope="module")
def tables(project: Path) -> list[list[list[str]]]:
    """The rows of each table: its cells."""
    found: list[list[list[str]]] = []
    for line in (project / "tests" / "system" / "FAULTS.md").read_text().splitlines():
        if line.startswith("| # |"):
            found.append([])
        elif re.match(r"\| \d+ \|", line):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_every_fault_and_every_requirement_has_its_row(tables: list[list[list[str]]]) -> None:
    faults, requirements = tables
    assert [int(row[0]) for row in faults] == list(range(1, ROWS + 1))
    assert [int(row[0]) for row in requirements] == list(range(1, REQUIREMENTS + 1))
    assert all(len(row) == 5 and all(row) for row in faults + requirements)


def test_most_faults_are_shown_on_running_processes(tables: list[list[list[str]]]) -> None:
    running = [row for row in tables[0] if row[2] == "running"]
    assert len(running) >= ON_RUNNING_PROCESSES
    assert all("`tests/system/" in row[3] for row in running)
    assert {row[2] for table in tables for row in table} <= {"running", "below"}


def test_every_test_that_is_named_exists(tables: list[list[list[str]]], project: Path) -> None:
    named = {name for table in tables for row in table for cell in row for name in re.findall(r"`(tests/[^`]+)`", cell)}
    missing = [name for name in sorted(named) if not exists(project, name)]
    assert missing == []


def exists(project: Path, name: str) -> bool:
    path, _, function = name.partition("::")
    if not (project / path).is_file():
        return False
    tree = ast.parse((project / path).read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)
