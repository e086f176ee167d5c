"""What a row of the benchmark hands back: tables of figures, and the judgement of each target. Plain data, for JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Picture:
    """How a table is drawn: bars of column `value`, one group for each `group`, one colour for each `series`.

    `lines`: lines over the numbers in `group` instead of bars.
    """

    value: str
    group: str
    series: str
    lines: bool = False
    logarithmic: bool = False


@dataclass
class Table:
    """Rows of cells under named columns, units in the columns' names. None is shown as "-"."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def add(self, *cells: Cell) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.name}: {len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(list(cells))

    def value(self, column: str, **where: Cell) -> Cell:
        """The cell of `column` in the first row whose columns have the values of `where` (`_` for a space); None
        when there is no such row."""
        wanted = {self.columns.index(key.replace("_", " ")): value for key, value in where.items()}
        for row in self.rows:
            if all(row[i] == value for i, value in wanted.items()):
                return row[self.columns.index(column)]
        return None


@dataclass(frozen=True)
class Target:
    """One comparison. `relation`: how ours must stand to `limit`, ">=" or "<=".

    With a `peer`, the ratio ours/peer is held against `limit`; without, our figure is. `met` is None when a figure is
    missing: then `remark` says why. `rounds_ratio`: the median of the ratios of rounds, which stands for that of the
    medians.
    """

    job: str
    measure: str
    ours: float | None
    peer_name: str
    peer: float | None
    relation: str
    limit: float
    remark: str = ""
    against_peer: bool = True
    rounds_ratio: float | None = None

    @property
    def ratio(self) -> float | None:
        if self.ours is None or not self.peer:
            return None
        return self.ours / self.peer if self.rounds_ratio is None else self.rounds_ratio

    @property
    def met(self) -> bool | None:
        figure = self.ratio if self.against_peer else self.ours
        if figure is None:
            return None
        return figure >= self.limit if self.relation == ">=" else figure <= self.limit

    @property
    def text(self) -> str:
        """The target as people read it: `>= 2.5 x`, `<= 0`."""
        return f"{self.relation} {self.limit:g}{' x' if self.against_peer else ''}"

    @property
    def verdict(self) -> str:
        return {True: "met", False: "NOT met", None: "no figure"}[self.met]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio, "met": self.met}


def absolute(job: str, measure: str, ours: float | None, relation: str, limit: float, remark: str = "") -> Target:
    """A target that names a figure and no peer."""
    return Target(job, measure, ours, "", None, relation, limit, remark, against_peer=False)


@dataclass
class RowResult:
    """All that a row found. `missing`: programs that are not installed; `conditions`: what it was measured under."""

    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    conditions: str = ""
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "conditions": self.conditions,
            "missing": self.missing,
            "error": self.error,
            "tables": [dataclasses.asdict(table) for table in self.tables],
            "targets": [target.as_json() for target in self.targets],
        }
