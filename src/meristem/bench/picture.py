"""Benchmarks as pictures: the training speed of every rule in every form, and the tables of the evidence."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from meristem.bench.evidence import ReadingConfig, TableConfig
from meristem.bench.verdict import BITS, Result, estimate
from meristem.evaluate.picture import empty_figure, write_figure

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


def plot_table(path: Path, table: TableConfig, results: Sequence[Result]) -> None:
    """Write a row of panels for each text and budget as a PNG: curves, ends with 95 % intervals, recall, reading."""
    rows = [(group, list(own)) for group, own in groupby(results, key=lambda result: result.cell.group)]
    has_recall = any(result.values("mentions/memory/far") for result in results)
    read = [(table.reading, text) for text in table.reading.texts] if table.reading else []
    width, height = 2 + has_recall + len(read), max(3.6, 1.4 + 0.3 * len(table.variants))
    figure = empty_figure(path, 1 + 4.8 * width, height * len(rows))
    for axes, (group, own) in zip(figure.subplots(len(rows), width, squeeze=False), rows, strict=True):
        measured = [result for result in own if result.is_measured]
        _draw_curves(axes[0], measured)
        axes[0].set_title(f"{group.text}, equal {group.budget}", fontsize="medium")
        _draw_ends(axes[1], measured)
        if has_recall:
            _draw_recall(axes[2], measured)
        for panel, (reading, text) in zip(axes[2 + has_recall :], read, strict=True):
            _draw_reading(panel, text, reading, measured)
    write_figure(path, figure)


def _draw_curves(axes: Any, measured: Sequence[Result]) -> None:
    for place, result in enumerate(measured):
        points = zip(*(one.curve for one in result.by_seed.values() if one.curve), strict=False)
        mean = [(statistics.fmean(n for n, _ in at), statistics.fmean(bits for _, bits in at)) for at in points]
        if mean:
            axes.plot(*zip(*mean, strict=True), **_style(place), label=result.cell.variant)
    axes.set(xlabel="tokens read", ylabel="bits per byte of held-out text")
    axes.legend(fontsize="x-small")


def _draw_ends(axes: Any, measured: Sequence[Result]) -> None:
    for place, result in enumerate(measured):
        bits = list(result.values(BITS).values())
        found = estimate(bits)
        axes.errorbar(found.mean, place, xerr=found.half or 0, fmt="s", capsize=4, **_style(place))
        axes.plot(bits, [place] * len(bits), "k.", markersize=4)
    axes.set_yticks(range(len(measured)), [result.cell.variant for result in measured])
    axes.set_ylim(len(measured) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.set_xlabel("bits per byte at the end: means with 95 %, a point for every seed")


def _draw_recall(axes: Any, measured: Sequence[Result]) -> None:
    for place, result in enumerate(measured):
        figures = [one.figures for one in result.by_seed.values() if one.figures]
        keys = [key for key in figures[0] if key.startswith("mentions/memory/") and key.split("/")[2].isdigit()]
        distances = [int(key.split("/")[2]) for key in keys if not key.endswith("/n")]
        shares = [statistics.fmean(result.values(f"mentions/memory/{d}").values()) for d in distances]
        axes.plot(distances, shares, marker="o", markersize=3, **_style(place))
        _mark(axes, distances[::3])
    axes.set(xlabel="distance in bytes (up to)", ylabel="share of values recalled", ylim=(-0.03, 1.03))


def _draw_reading(axes: Any, text: str, reading: ReadingConfig, measured: Sequence[Result]) -> None:
    for place, result in enumerate(measured):
        for learn, line in zip(reading.learn, LINES * len(reading.learn), strict=False):
            values = [result.values(f"reading/{learn}/{text}/{mark}").values() for mark in reading.marks]
            if all(values):
                style = _style(place) | {"linestyle": line, "marker": "o", "markersize": 3}
                bits = [statistics.fmean(one) for one in values]
                axes.plot(reading.marks, bits, **style, label=f"{result.cell.variant}, learn={learn}")
    _mark(axes, reading.marks)
    axes.set(xlabel="tokens read", ylabel="bits per byte since the point before")
    axes.set_title(f"reading {text}", fontsize="medium")
    axes.legend(fontsize="x-small")


def _mark(axes: Any, numbers: Sequence[int]) -> None:
    """A logarithmic axis that names these numbers."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])


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
