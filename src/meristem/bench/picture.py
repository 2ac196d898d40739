"""Benchmarks as pictures: the training speed of every rule in every form, and what an ablation found."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from meristem.bench.trial import Figures
from meristem.evaluate.picture import empty_figure, write_figure

COLOURS: Final = ("#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#d62728", "#17becf", "#bcbd22")
"""One for every form, in the order of their names; more forms go round."""


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


def plot_ablation(path: Path, found: Mapping[str, Sequence[Figures]]) -> None:
    """Write the mean held-out curves of all variants, and beside them every end with the mean over starts, as a PNG."""
    figure = empty_figure(path, 11, max(4.0, 1.5 + 0.35 * len(found)))
    curves, ends = figure.subplots(1, 2)
    for place, (name, starts) in enumerate(found.items()):
        colour, style = f"C{place % 10}", ("-", "--", ":")[place // 10 % 3]
        points = zip(*(figures.curve for figures in starts), strict=False)
        mean = [(start[0][0], statistics.fmean(bits for _, bits in start)) for start in points]
        curves.plot(*zip(*mean, strict=True), color=colour, linestyle=style, linewidth=1, label=name)
        bits = [figures.bits_per_byte for figures in starts]
        ends.barh(place, statistics.fmean(bits), height=0.8, color=colour, alpha=0.5)
        ends.plot(bits, [place] * len(bits), "k.", markersize=4)
    curves.set(xlabel="tokens read", ylabel="bits per byte of held-out text")
    ends.set_yticks(range(len(found)), list(found))
    ends.invert_yaxis()
    all_bits = [figures.bits_per_byte for starts in found.values() for figures in starts]
    room = max(0.02, max(all_bits) - min(all_bits))
    ends.set_xlim(min(all_bits) - room, max(all_bits) + room / 4)
    ends.set_xlabel("bits per byte at the end; a point for every start\n(the axis does not begin at 0)")
    curves.legend(fontsize="x-small")
    write_figure(path, figure)


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
