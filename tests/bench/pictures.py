"""One picture of each table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.results import Picture, RowResult, Table

CAPTION_HEIGHT = 0.03  # of the picture's
SERIES_A_LINE = 6  # of a legend


def draw(results: Iterable[RowResult], directory: Path, caption: str) -> list[Path]:
    """Writes the pictures into `directory`; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for result in results:
        for table in result.tables:
            for i, picture in enumerate(table.pictures):
                path = directory / (f"{table.name}.png" if i == 0 else f"{table.name}-{i + 1}.png")
                if _draw(table, picture, path, caption):
                    written.append(path)
    return written


def _draw(table: Table, picture: Picture, path: Path, caption: str) -> bool:
    """False when there is nothing to draw."""
    from matplotlib.figure import Figure

    points = _points(table, picture)
    if not points:
        return False
    groups = list(dict.fromkeys(group for _, group in points))
    series = list(dict.fromkeys(name for name, _ in points))
    figure = Figure(figsize=(8, 4.5))
    figure.set_layout_engine("constrained", rect=(0, CAPTION_HEIGHT, 1, 1 - CAPTION_HEIGHT))
    axes = figure.add_subplot()
    if picture.lines:
        for name in series:
            places = [group for group in groups if (name, group) in points]
            axes.plot(places, [points[name, group] for group in places], marker="o", label=name)
        axes.set_xticks(groups)
        axes.set_ylim(bottom=0)
    elif picture.group == picture.series:
        axes.barh([str(group) for group in groups], [points[group, group] for group in groups])
        axes.invert_yaxis()
    else:
        _bars(axes, points, groups, series)
    (axes.set_xlabel if picture.group == picture.series else axes.set_ylabel)(picture.value)
    if picture.logarithmic:
        axes.set_yscale("log")
    if picture.group != picture.series:
        axes.set_xlabel(picture.group)
        columns = min(len(series), SERIES_A_LINE)  # below the axes: inside it would cover bars
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=columns, fontsize="small")
    axes.set_title(table.title, fontsize="medium", wrap=True)
    figure.text(0.01, 0.005, caption, fontsize=6, color="gray")
    figure.savefig(path, dpi=120)
    return True


def _points(table: Table, picture: Picture) -> dict[tuple[Any, Any], float]:
    value, group, series = (table.columns.index(name) for name in (picture.value, picture.group, picture.series))
    return {
        (row[series], row[group]): float(row[value])
        for row in table.rows
        if isinstance(row[value], int | float) and row[value] == row[value]
    }


def _bars(axes: Any, points: dict[tuple[Any, Any], float], groups: list[Any], series: list[Any]) -> None:
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        places = [(place, points[name, group]) for place, group in enumerate(groups) if (name, group) in points]
        axes.bar([place + i * width for place, _ in places], [value for _, value in places], width, label=str(name))
    ticks = [place + 0.4 - width / 2 for place in range(len(groups))]
    axes.set_xticks(ticks, [f"{group:,}" if isinstance(group, int) else str(group) for group in groups])
