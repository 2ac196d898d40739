"""Benchmarks as pictures: the training speed of every rule in every form, and the tables of the evidence."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from meristem.bench.estimate import Estimate, estimate
from meristem.bench.evidence import Cell, ReadingConfig, TableConfig
from meristem.bench.growth import ArmCell
from meristem.bench.tuned import BITS, Result
from meristem.bench.verdict import MENTIONS, recall_distances
from meristem.evaluate.picture import empty_figure, mark_doublings, write_figure

COLOURS: Final = ("#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#d62728", "#17becf", "#bcbd22")
"""One for every form, in the order of their names; more forms go round."""

LINES: Final = ("-", "--", ":", "-.")
"""Of curves that share a colour."""


def plot_speeds(path: Path, figures: Sequence[Mapping[str, Any]]) -> None:
    """Write training tokens a second as bars, a group for each rule, a panel for each width and length, as a PNG.

    figures: those of the rows of a benchmark; those that are no training speed of a rule are passed over.
    """
    bars = [found for found in figures if "training_tokens_per_s" in found]
    panels = list(dict.fromkeys((found["width"], found["n_time"]) for found in bars))
    rules = list(dict.fromkeys(found["rule"] for found in bars))
    colours = dict(zip(sorted({found["form"] for found in bars}), COLOURS * len(bars), strict=False))
    n_forms = {rule: len({found["form"] for found in bars if found["rule"] == rule}) for rule in rules}
    height = 1.5 + 0.17 * sum(n + 1 for n in n_forms.values())
    figure = empty_figure(path, 1.5 + 6.5 * len(panels), height)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        _draw_panel(axes, [found for found in bars if (found["width"], found["n_time"]) == panel], n_forms, colours)
        axes.set_title(f"width {panel[0]}, sequences of {panel[1]:,} tokens", fontsize="medium")
    handles = [figure.axes[0].barh([0], [0], color=colour, label=form) for form, colour in colours.items()]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=min(len(colours), 5 * len(panels)), fontsize="small"
    )
    write_figure(path, figure)


def plot_table(path: Path, table: TableConfig, results: Sequence[Result[Cell]]) -> None:
    """Write a row of panels for each text and budget as a PNG.

    They show the curves, the ends with 95 % intervals and recall by distance; of a table that reads, a panel for each
    text instead. results: measured ones, in the order of the table.
    """
    rows = [(group, list(own)) for group, own in groupby(results, key=lambda result: result.cell.group)]
    panels: list[Callable[[Any, Sequence[Result[Cell]]], None]] = [_draw_curves, _draw_ends]
    if recall_distances(results):
        panels.append(_draw_recall)
    if table.reading is not None:
        panels = [partial(_draw_reading, text=text, reading=table.reading) for text in table.reading.texts]
    figure = empty_figure(path, 1 + 4.8 * len(panels), max(3.6, 1.4 + 0.3 * len(table.variants)) * len(rows))
    for axes, (group, measured) in zip(figure.subplots(len(rows), len(panels), squeeze=False), rows, strict=True):
        for panel, draw in zip(axes, panels, strict=True):
            draw(panel, measured)
        axes[0].set_title(f"{group.text}, equal {group.budget}", fontsize="medium", loc="left")
    write_figure(path, figure)


def plot_growth(path: Path, results: Mapping[str, Mapping[str, Result[ArmCell]]]) -> None:
    """Write a panel for each budget, with held-out text over operations, and one with the ends by budget, as a PNG.

    results: measured ones, by budget and arm.
    """
    if not results:
        return
    figure = empty_figure(path, 1 + 4.2 * (len(results) + 1), 4.2)
    *panels, last = figure.subplots(1, len(results) + 1)
    ends: dict[str, list[tuple[float, Estimate]]] = {}
    for axes, (budget, own) in zip(panels, results.items(), strict=True):
        _draw_curves(axes, [*own.values()])
        bits = [bits for result in own.values() for one in result.by_seed.values() for _, bits in one.curve]
        axes.set(xlabel="operations", xscale="log", ylim=(min(bits) - 0.03, sorted(bits)[2 * len(bits) // 3]))
        axes.set_title(budget, fontsize="medium", loc="left")
        for name, result in own.items():
            ends.setdefault(name, []).append((result.cell.flops, estimate([*result.values(BITS).values()])))
    for place, (name, points) in enumerate(ends.items()):
        at, found = zip(*points, strict=True)
        halves = [each.half or 0 for each in found]
        beside = [flops * (1 + 0.02 * place) for flops in at]  # so that each interval is seen
        last.errorbar(beside, [each.mean for each in found], yerr=halves, capsize=3, **_style(place), label=name)
    last.set(xlabel="budget in operations", xscale="log", ylabel="bits per byte at the end, with 95 %")
    for axes in (*panels, last):
        axes.tick_params(axis="x", which="minor", labelbottom=False)  # they would stand over each other
    last.legend(fontsize="x-small")
    write_figure(path, figure)


def _draw_curves(axes: Any, measured: Sequence[Result[Any]]) -> None:
    for place, result in enumerate(measured):
        points = zip(*(one.curve for one in result.by_seed.values() if one.curve), strict=False)
        mean = [(statistics.fmean(n for n, _ in at), statistics.fmean(bits for _, bits in at)) for at in points]
        if mean:
            axes.plot(*zip(*mean, strict=True), marker=".", **_style(place), label=result.cell.variant)
    axes.set(xlabel="tokens read", ylabel="bits per byte of held-out text")
    if axes.lines:
        axes.legend(fontsize="x-small")


def _draw_ends(axes: Any, measured: Sequence[Result[Cell]]) -> None:
    for place, result in enumerate(measured):
        bits = list(result.values(BITS).values())
        found = estimate(bits)
        axes.errorbar(found.mean, place, xerr=found.half or 0, fmt="s", capsize=4, **_style(place))
        axes.plot(bits, [place] * len(bits), "k.", markersize=4, zorder=3)
    axes.set_yticks(range(len(measured)), [result.cell.variant for result in measured])
    axes.set_ylim(len(measured) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.set_xlabel("bits per byte at the end: mean, 95 %, each seed")


def _draw_recall(axes: Any, measured: Sequence[Result[Cell]]) -> None:
    distances = recall_distances(measured)
    if not distances:
        axes.set_axis_off()
        return
    for place, result in enumerate(measured):
        shares = [statistics.fmean(result.values(f"{MENTIONS}{d}").values()) for d in distances]
        axes.plot(distances, shares, marker="o", markersize=3, **_style(place))
    mark_doublings(axes, distances[::3])
    axes.set(xlabel="distance in bytes (up to)", ylabel="share of values recalled", ylim=(-0.03, 1.03))


def _draw_reading(axes: Any, measured: Sequence[Result[Cell]], *, text: str, reading: ReadingConfig) -> None:
    for place, result in enumerate(measured):
        for learn, line in zip(reading.learn, LINES * len(reading.learn), strict=False):
            values = [result.values(f"reading/{learn}/{text}/{mark}").values() for mark in reading.marks]
            if all(values):
                style = _style(place) | {"linestyle": line, "marker": "o", "markersize": 3}
                bits = [statistics.fmean(one) for one in values]
                axes.plot(reading.marks, bits, **style, label=f"{result.cell.variant}, learn={learn}")
    mark_doublings(axes, reading.marks)
    axes.set(xlabel=f"tokens read of {text}", ylabel="bits per byte since the point before")
    axes.legend(fontsize="x-small")


def _style(place: int) -> dict[str, Any]:
    return {"color": f"C{place % 10}", "linestyle": LINES[place // 10 % len(LINES)], "linewidth": 1}


def _draw_panel(
    axes: Any, bars: Sequence[Mapping[str, Any]], n_forms: Mapping[str, int], colours: Mapping[str, str]
) -> None:
    """The bars of one width and length; every rule has its place, whether all its forms were measured or not."""
    place, ticks = 0.0, []
    for rule, n in n_forms.items():
        own = sorted((found for found in bars if found["rule"] == rule), key=lambda found: str(found["form"]))
        for index, found in enumerate(own):
            speed = found["training_tokens_per_s"]
            axes.barh(place + index, speed, height=0.9, color=colours[found["form"]])
            axes.text(speed * 1.04, place + index, f"{speed:,.0f}", va="center", fontsize=7)
        ticks.append(place + (n - 1) / 2)
        place += n + 1
    axes.set_yticks(ticks, list(n_forms))
    axes.set_ylim(place - 0.5, -1)
    axes.set_xscale("log")
    axes.set_xlim(right=2 * max(found["training_tokens_per_s"] for found in bars))
    axes.set_xlabel("tokens a second of training, forward and backward (logarithmic)")
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
