"""What the benchmark says of its figures."""

from __future__ import annotations

import json

import pytest

from bench.__main__ import ROWS, parse
from bench.report import cell_text, row_text, targets_text
from bench.results import RowResult, Table, Target, absolute


@pytest.mark.parametrize(
    ("ours", "peer", "relation", "limit", "verdict"),
    [
        (5.0, 2.0, ">=", 2.5, "met"),
        (4.9, 2.0, ">=", 2.5, "NOT met"),
        (1.0, 2.0, "<=", 0.5, "met"),
        (1.1, 2.0, "<=", 0.5, "NOT met"),
        (None, 2.0, "<=", 0.5, "no figure"),
        (1.1, None, "<=", 0.5, "no figure"),
    ],
)
def test_a_target_with_a_peer_is_a_ratio(
    ours: float | None, peer: float | None, relation: str, limit: float, verdict: str
) -> None:
    assert Target("job", "s", ours, "peer", peer, relation, limit).verdict == verdict


def test_a_target_without_a_peer_is_the_figure_itself() -> None:
    assert absolute("job", "lost", 0, "<=", 0).verdict == "met"
    assert absolute("job", "lost", 1, "<=", 0).verdict == "NOT met"
    assert absolute("job", "lost", None, "<=", 0).verdict == "no figure"


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, "-"), (float("nan"), "-"), (0.0, "0"), (1234567, "1,234,567"), (0.01234, "0.0123"), (12.34, "12.3"),
     (1234.6, "1,235"), ("word", "word"), (True, "yes")],
)  # fmt: skip
def test_cells_have_three_digits(cell: object, text: str) -> None:
    assert cell_text(cell) == text  # type: ignore[arg-type]


def result() -> RowResult:
    table = Table("row", "A table", ("program", "Mpps"))
    table.add("ours", 12.5)
    table.add("peer", None)
    return RowResult("row", "A row", [table], [Target("job", "Mpps", 12.5, "peer", None, ">=", 2, "peer is missing")],
                     missing=["peer"])  # fmt: skip


def test_a_missing_peer_is_named_and_has_no_figure() -> None:
    text = row_text(result())
    assert "not installed, so not measured: peer" in text
    assert text.splitlines()[-2:] == ["ours     12.5", "peer        -"]
    assert "no figure  peer is missing" in targets_text([result()])


def test_results_are_plain_data() -> None:
    content = json.loads(json.dumps(result().as_json()))
    assert content["tables"][0]["rows"] == [["ours", 12.5], ["peer", None]]
    assert content["targets"][0]["met"] is None


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        Table("name", "title", ("a", "b")).add(1)


def test_rows_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--rows", "idle"]).rows == ["idle"]
    assert parse([]).rows == list(ROWS)
    assert (parse([]).rounds, parse(["--quick"]).rounds) == (3, 1)
    with pytest.raises(SystemExit):
        parse(["--rows", "idle,none"])
    assert "no row none; there are " in capsys.readouterr().err
