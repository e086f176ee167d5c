"""Tables and progress for people on a terminal; the same figures plain, stable and unabridged in a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Cell = str | int | float | bool | None
Progress = Callable[[int, int], None]  # (done, total); a total of 0 is unknown


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns. `marks` are the rows to point at on a terminal: "good", "warn" or "bad"."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    marks: dict[int, str] = field(default_factory=dict)


_STYLES = {"good": "green", "warn": "yellow", "bad": "bold red"}


def print_table(table: Table, out: TextIO | None = None) -> None:
    """On a terminal a drawn table with digits in groups; else aligned columns, one line a row, nothing cut off."""
    out = out or sys.stdout
    if out.isatty():
        _print_drawn(table, out)
    else:
        _print_plain(table, out)


def print_json(value: object, out: TextIO | None = None) -> None:
    import json

    print(json.dumps(value, indent=2), file=out or sys.stdout)


def cell_text(cell: Cell, grouped: bool) -> str:
    """How a cell is shown; `grouped` puts commas between thousands."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}" if grouped else str(cell)
    return f"{cell:.1f}" if isinstance(cell, float) else cell


def _is_numeric(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows]
    return all(cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool)) for cell in cells)


def _print_plain(table: Table, out: TextIO) -> None:
    lines = [table.columns, *(tuple(cell_text(cell, False) for cell in row) for row in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    numeric = [_is_numeric(table, i) for i in range(len(table.columns))]
    if table.title:
        print(f"# {table.title}", file=out)
    for line in lines:
        cells = [
            text.rjust(w) if right else text.ljust(w) for text, w, right in zip(line, widths, numeric, strict=True)
        ]
        print("  ".join(cells).rstrip(), file=out)


def _print_drawn(table: Table, out: TextIO) -> None:
    from rich.console import Console

    Console(file=out, highlight=False).print(drawn(table))


def drawn(table: Table) -> RichTable:
    """The table as a rich renderable."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(title=table.title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(table.columns):
        made.add_column(column, justify="right" if _is_numeric(table, i) else "left", overflow="fold")
    for i, row in enumerate(table.rows):
        # Text, not markup: a label or a path may hold what rich would take for a style.
        made.add_row(*(Text(cell_text(cell, True)) for cell in row), style=_STYLES.get(table.marks.get(i, ""), ""))
    return made


@contextlib.contextmanager
def progress(what: str, unit: Literal["bytes", "packets"]) -> Iterator[Progress]:
    """A bar (without a total, a count) on standard error while that is a terminal; nothing at all in a pipe."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress as Bar, TextColumn, TimeElapsedColumn

    count = DownloadColumn() if unit == "bytes" else TextColumn("{task.completed:,.0f} packets")
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


@contextlib.contextmanager
def rewritten_line() -> Iterator[Callable[[str], None] | None]:
    """One line on standard error that is written over again and again, and gone at the end; None in a pipe.

    Without a thread, unlike `progress`: for a process that forks.
    """
    if not sys.stderr.isatty():
        yield None
        return
    try:
        yield lambda text: print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def size_text(count: float | None) -> str:
    """Bytes in binary units."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def rate_text(per_second: float, unit: str) -> str:
    """A rate in decimal units: 12,345 and "pkt/s" make 12.3 kpkt/s."""
    for prefix in ("", "k", "M", "G", "T"):
        if per_second < 1000 or prefix == "T":
            break
        per_second /= 1000
    return f"{per_second:.0f} {prefix}{unit}" if not prefix or per_second >= 100 else f"{per_second:.1f} {prefix}{unit}"


def duration_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def joined(parts: Sequence[str]) -> str:
    return ", ".join(parts) or "-"
