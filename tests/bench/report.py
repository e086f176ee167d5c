"""The results for people: plain aligned tables, and the table of targets with its verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from bench.results import Cell, RowResult, Table


def cell_text(cell: Cell) -> str:
    """Three significant digits, digits in groups; "-" for what was not measured."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, str):
        return cell
    if cell == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(cell))))
    return f"{cell:,.{min(digits, 6)}f}"


def table_text(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]], notes: Iterable[str] = ()) -> str:
    """Numbers to the right, words to the left."""
    rows = list(rows)
    texts = [[cell_text(cell) for cell in row] for row in rows]
    widths = [max([len(columns[i]), *(len(row[i]) for row in texts)]) for i in range(len(columns))]
    right = [all(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]

    def shown(cells: Sequence[str]) -> str:
        aligned = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(cells, widths, right, strict=True)]
        return "  ".join(aligned).rstrip()

    return "\n".join([title, shown(columns), *map(shown, texts), *(f"  {note}" for note in notes)])


def row_text(result: RowResult) -> str:
    """One row of the benchmark: its conditions and its tables."""
    parts = [f"== {result.name}: {result.title}" + (f" ({result.conditions})" if result.conditions else "")]
    if result.error:
        parts.append(f"not measured: {result.error}")
    if result.missing:
        parts.append(f"not installed, so not measured: {', '.join(result.missing)}")
    parts += [_one(table) for table in result.tables]
    return "\n\n".join(parts)


def _one(table: Table) -> str:
    return table_text(table.title, table.columns, table.rows, table.notes)


def targets_text(results: Iterable[RowResult]) -> str:
    """The table of targets: ours, the peer's, their ratio, what was wanted, and whether it is so."""
    columns = ("job", "figure", "ours", "peer", "peer's", "ratio", "target", "", "remark")
    rows: list[list[Cell]] = [
        [one.job, one.measure, one.ours, one.peer_name, one.peer, one.ratio, one.text, one.verdict, one.remark]
        for result in results
        for one in result.targets
    ]
    return table_text("== Targets", columns, rows)


def heading(machine: Mapping[str, str], rounds: int, quick: bool) -> str:
    shown = "; ".join(f"{key} {value}" if key in ("date", "python") else value for key, value in machine.items())
    return f"{shown}; {rounds} rounds, medians{'; quick: short runs, rough figures' if quick else ''}"
