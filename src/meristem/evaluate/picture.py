"""Losses as pictures."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meristem.checkpoint.atomic import write_atomic
from meristem.extras import needed

Point = tuple[int, float]
"""Tokens read, and bits per byte there."""

Share = tuple[int, float, float, float]
"""A distance, the share that is remembered there, and the bounds of its interval."""


def draw_loss(
    path: Path, training: Sequence[Point], held_out: Sequence[Point], baselines: Sequence[tuple[str, float]]
) -> None:
    """Write the two curves over tokens as a PNG, with the compressors as level lines."""
    figure = empty_figure(path, 8, 4.5)
    axes = figure.add_subplot()
    axes.plot(*_columns(training), linewidth=0.8, alpha=0.6, label="training batches")
    axes.plot(*_columns(held_out), marker="o", markersize=4, label="held-out text")
    for number, (name, bits_per_byte) in enumerate(baselines):
        axes.axhline(bits_per_byte, linewidth=0.8, linestyle="--", color=f"C{2 + number}", label=name)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(0, _top(training))
    axes.legend(fontsize="small")
    write_figure(path, figure)


def draw_reading(path: Path, curves: Mapping[str, Sequence[Point]]) -> None:
    """Write as a PNG how well a text was predicted over the tokens read, a curve for each way to read it."""
    figure = empty_figure(path, 8, 4.5)
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*_columns(points), marker="o", markersize=4, label=name)
    mark_doublings(axes, sorted({tokens for points in curves.values() for tokens, _ in points}))
    axes.set_xlabel("tokens read")
    axes.set_ylabel("bits per byte of all that was read")
    axes.legend(fontsize="small")
    write_figure(path, figure)


def draw_remembered(
    path: Path, told: Mapping[str, Sequence[Share]], returned: Mapping[str, Sequence[Share]], *, chance: float
) -> None:
    """Write as a PNG what is remembered, a curve for each way, with intervals of 95 %: on the left facts that a text
    gave once, over the tokens since; on the right values in documents, over the bytes since they stood there last.
    """
    figure = empty_figure(path, 10, 4.5)
    left, right = figure.subplots(1, 2, sharey=True)
    colours = {name: f"C{number}" for number, name in enumerate({**told, **returned})}
    for axes, curves in ((left, told), (right, returned)):
        for name, points in curves.items():
            at, share, low, high = zip(*points, strict=True)
            below, above = ([abs(a - b) for a, b in zip(share, ends, strict=True)] for ends in (low, high))
            drawn = {"marker": "o", "markersize": 4, "capsize": 2, "color": colours[name]}
            axes.errorbar(at, share, yerr=(below, above), label=name, **drawn)
        mark_doublings(axes, sorted({point[0] for points in curves.values() for point in points}))
        axes.tick_params(axis="x", labelrotation=45)
    left.axhline(chance, linewidth=0.8, linestyle="--", color="grey", label="chance")
    left.set_xlabel("tokens since the text gave eight facts")
    left.set_ylabel("share remembered")
    left.set_ylim(0, 1.02)
    left.legend(fontsize="small")
    right.set_xlabel("bytes since a value stood in the document, at most")
    write_figure(path, figure)


def draw_runs(path: Path, panels: Mapping[str, Mapping[str, Sequence[Point]]], along: str) -> None:
    """Write the curves of several runs as a PNG: a panel for each metric, in it a curve for each run that has it.

    along: what the numbers from left to right count. A run has the same colour in every panel.
    """
    figure = empty_figure(path, 6.5 * len(panels), 4.5)
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colours = {name: f"C{number % 10}" for number, name in enumerate(names)}
    for axes, (metric, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in curves.items():
            marker = "o" if len(points) < 50 else ""
            axes.plot(*_columns(points), marker=marker, markersize=3, linewidth=1, color=colours[name], label=name)
        axes.set_title(metric, fontsize="medium")
        axes.set_xlabel(along)
        axes.legend(fontsize="small")
    write_figure(path, figure)


def draw_text(path: Path, splits: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write as a PNG what a text is made of, a colour for each split.

    splits: the tokens of each document, and how often each id stands there. On the left documents over their tokens, in
    steps of a quarter of a doubling; on the right how often ids stand there, the most frequent first.
    """
    figure = empty_figure(path, 10, 4.5)
    left, right = figure.subplots(1, 2)
    longest = max(int(lengths.max()) for lengths, _ in splits.values())
    steps = 2 ** np.arange(0, np.log2(longest) + 0.5, 0.25)
    for name, (lengths, ids) in splits.items():
        left.hist(lengths, bins=steps, histtype="step", label=f"{name}: {len(lengths):,} documents")
        used = np.sort(ids[ids > 0])[::-1]
        right.plot(np.arange(1, len(used) + 1), used, marker=".", markersize=2, label=f"{name}: {len(used):,} ids")
    left.set_xscale("log", base=2)
    left.set_xlabel("tokens of a document")
    left.set_ylabel("documents")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("ids, the most frequent first")
    right.set_ylabel("times in the text")
    for axes in (left, right):
        axes.legend(fontsize="small")
    write_figure(path, figure)


def mark_doublings(axes: Any, numbers: Sequence[int]) -> None:
    """Make the axis from left to right logarithmic, with these numbers named on it."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, labels=[f"{number:,}" for number in numbers])


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure as a PNG, whole or not at all."""
    png = io.BytesIO()
    figure.canvas.print_png(png)
    write_atomic(path, png.getvalue())


def empty_figure(path: Path, width: float, height: float) -> Any:
    """An empty figure with a canvas and without pyplot: no global state, no display, nothing left behind."""
    with needed(f"drawing {path.name}"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _columns(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    return [tokens for tokens, _ in points], [bits for _, bits in points]


def _top(training: Sequence[Point]) -> float:
    """Bytes cost at most 8 bits each; a start above that would flatten the rest of the picture."""
    return min(8.5, max([bits for _, bits in training], default=8.0) * 1.05)
