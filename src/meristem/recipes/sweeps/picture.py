"""A picture of what a sweep came to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from meristem.evaluate.picture import empty_figure, write_figure
from meristem.recipes.sweeps.config import RangeConfig, SweepConfig
from meristem.recipes.sweeps.points import Row
from meristem.recipes.sweeps.table import keys_of

FILE: Final = "sweep.png"
_MOST_KEYS: Final = 7
_IN_A_LINE: Final = 4
_LEAST_DECADES: Final = 30.0
"""Ratio of the largest to the smallest value from which on an axis is logarithmic."""


def plot_sweep(config: SweepConfig, place: Path, rows: Sequence[Row]) -> None:
    """Draw the metric over each key that differs, and over the steps where runs were evaluated on their way.

    rows: the best first. Raises MissingExtra without matplotlib, before anything is drawn.
    """
    keys = [key for key in keys_of(rows) if len({str(row.settings.get(key)) for row in rows}) > 1][:_MOST_KEYS]
    known = [row for row in rows if row.value is not None]
    panels: list[str | None] = [*([None] if any(row.reports for row in known) else []), *keys]
    n_lines = max(-(-len(panels) // _IN_A_LINE), 1)
    n_columns = max(min(len(panels), _IN_A_LINE), 1)
    figure = empty_figure(place / FILE, 3.2 * n_columns, 3.0 * n_lines + 0.4)
    all_axes = list(figure.subplots(n_lines, n_columns, squeeze=False, sharey=True).flat)
    for number, axes in enumerate(all_axes):
        if number >= len(panels):
            axes.set_visible(False)
        elif (key := panels[number]) is None:
            _draw_courses(axes, known)
        else:
            _draw_key(config, axes, key, known)
        if number % n_columns == 0:
            axes.set_ylabel(config.metric)
    figure.suptitle(f"{config.name}: {len(known)} of {len(rows)} points; x ended early, the best in colour", fontsize=9)
    write_figure(place / FILE, figure)


def _colour(row: Row, rows: Sequence[Row]) -> str:
    return "C1" if row is rows[0] and row.status == "finished" else "C0"


def _draw_courses(axes: Any, rows: Sequence[Row]) -> None:
    for row in reversed(rows):  # so that the best lies on top
        points = [*row.reports, *([(row.step, row.value)] if row.status == "finished" else [])]
        colour = _colour(row, rows)
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=colour,
            linewidth=0.8 if colour == "C0" else 2,
            marker=None if row.status == "finished" else "x",
            markevery=[-1],
        )
    axes.set_xlabel("step")


def _draw_key(config: SweepConfig, axes: Any, key: str, rows: Sequence[Row]) -> None:
    values: list[Any] = [row.settings.get(key) for row in rows]
    are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    for row, value in reversed(list(zip(rows, values, strict=True))):
        marker = "o" if row.status == "finished" else "x"
        axes.plot([value if are_numbers else str(value)], [row.value], marker, color=_colour(row, rows), markersize=5)
    drawn = config.search or config.random
    among = drawn.keys.get(key) if drawn is not None else None
    is_far = are_numbers and bool(values) and 0 < min(values) * _LEAST_DECADES <= max(values)
    if (isinstance(among, RangeConfig) and among.log) or is_far:
        axes.set_xscale("log")
    axes.set_xlabel(key)
