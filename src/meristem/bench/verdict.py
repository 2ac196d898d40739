"""What an ablation says: a table of means over starts, and plain sentences on what has an effect and what has none."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from meristem.bench.ablation import TOLERANCE, AblationConfig
from meristem.bench.trial import Figures, Outcome
from meristem.evaluate.adaptation import N_WINDOWS

CLEAR: Final = 2.0
"""A difference of fewer standard errors than this is called none."""

NEAR_CHANCE: Final = 0.02
"""Where no variant is right this much more often than a guess, recall says nothing about it."""

GAIN: Final = "gain_bits_per_byte"


@dataclass(frozen=True)
class Difference:
    """A difference of means with its standard error; no error is known of a single start."""

    value: float
    error: float | None

    @property
    def is_clear(self) -> bool:
        return self.error is not None and self.value != 0 and abs(self.value) >= CLEAR * self.error

    def __str__(self) -> str:
        return f"{self.value:+.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


def unpaired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Of two models, their starts drawn apart: s^2 = s1^2 / n1 + s2^2 / n2."""
    value = statistics.fmean(ours) - statistics.fmean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Difference(value, None)
    return Difference(value, math.hypot(*(statistics.stdev(v) / math.sqrt(len(v)) for v in (ours, theirs))))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Of two passes by the same models: the deviation of their differences."""
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else None
    return Difference(statistics.fmean(apart), error)


def figures_by_variant(config: AblationConfig, outcomes: Sequence[Outcome]) -> dict[str, list[Figures]]:
    """What was measured of every variant, in the order of the file; variants without a result are left out."""
    found = {
        name: [o.figures for o in outcomes if o.variant == name and o.figures is not None] for name in config.variants
    }
    return {name: figures for name, figures in found.items() if figures}


def table(config: AblationConfig, outcomes: Sequence[Outcome]) -> list[str]:
    """One line a variant: means, and the deviation over starts."""
    titles = (
        *("variant", "starts", "parameters", "bits per byte", "recall (a guess)"),
        *("gain in the second half, memory on", "memory off", "tokens/s", "state, bytes"),
    )
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for name, found in figures_by_variant(config, outcomes).items():
        n_parameters = next(o.n_parameters for o in outcomes if o.variant == name)
        cells = (
            *(f"`{name}`", str(len(found)), f"{n_parameters:,}", _spread([f.bits_per_byte for f in found])),
            f"{statistics.fmean(f.recall for f in found):.1%} ({found[0].chance:.1%})",
            *(_spread([f.on[GAIN] for f in found]), _spread([f.off[GAIN] for f in found])),
            f"{statistics.fmean(f.tokens_per_s for f in found):,.0f}",
            f"{found[0].state_bytes:,}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sentences(config: AblationConfig, outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Each variant against those that it names; then what its memory does while it reads; then what failed."""
    by_variant = figures_by_variant(config, outcomes)
    for name, variant in config.variants.items():
        for other in variant.against:
            if name in by_variant and other in by_variant:
                ours, theirs = ([f.bits_per_byte for f in by_variant[key]] for key in (name, other))
                published = f" Published: {variant.published}." if variant.published else ""
                yield _against(name, other, unpaired(ours, theirs)) + published
    for name, found in by_variant.items():
        yield _while_reading(name, found)
    yield from _of_recall(by_variant)
    for outcome in outcomes:
        if outcome.failure is not None:
            yield f"`{outcome.variant}` from seed {outcome.random_seed} ended before it was trained: {outcome.failure}"


def page(
    config: AblationConfig, outcomes: Sequence[Outcome], *, title: Sequence[str], picture: str | None, n_planned: int
) -> str:
    """The whole document. title: lines on where, when and on what this was measured."""
    drawn = [f"![Bits per byte over the tokens read, and at the end]({picture})", ""] if picture else []
    lines = [
        "# What each component of a model is worth",
        "",
        *title,
        "",
        f"{len(outcomes)} of {n_planned} runs are done. All variants read the same tokens and have, within "
        f"{TOLERANCE:.0%}, as many parameters as `{config.same_size_as}`: the hidden width of their feed-forward "
        f"layers makes up for what they have elsewhere. Cells are means over the starts, ± their standard deviation.",
        "",
        *table(config, outcomes),
        "",
        *drawn,
        "**Bits per byte** of held-out text; less is better. **Gain in the second half**: bits per byte by which the "
        f"second half of a held-out document (its first {N_WINDOWS} sequences) costs less than its first half; what "
        "counts is how much more that is with the memory on than with a frozen one, for texts may become "
        "easier by themselves. **Recall** is the mean over generated tasks. **State** is what one session carries.",
        "",
        "## What has an effect, and what has none",
        "",
        f"A difference of less than {CLEAR:g} standard errors is called no effect. With few starts that is a coarse "
        "sieve: of ten comparisons in which nothing is different, about one passes it.",
        "",
        *(f"- {sentence}" for sentence in sentences(config, outcomes)),
    ]
    return "\n".join([*lines, ""])


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def _against(name: str, other: str, difference: Difference) -> str:
    said = f"`{name}` against `{other}`:"
    if difference.error is None:
        return f"{said} {difference} bits per byte, of a single start; whether that is an effect cannot be said."
    if not difference.is_clear:
        return f"{said} **no effect** on bits per byte ({difference})."
    word = "better" if difference.value < 0 else "worse"
    return f"{said} {word} by {abs(difference.value):.4f} bits per byte (± {difference.error:.4f})."


def _while_reading(name: str, found: Sequence[Figures]) -> str:
    if all(dict(f.on) == dict(f.off) for f in found):
        return f"`{name}`: it reads the same whether its memory is on or off; nothing of it is written while it reads."
    more = paired([f.on[GAIN] for f in found], [f.off[GAIN] for f in found])
    again = statistics.fmean(f.on["again_reset_bits_per_byte"] - f.on["again_kept_bits_per_byte"] for f in found)
    second = f"A second pass with the memory carried over costs {again:+.4f} bits per byte less than one with it reset."
    if more.error is None:
        said = f"{more} bits per byte, of a single start; whether that is an effect cannot be said."
    elif not more.is_clear:
        said = f"**no effect** ({more} bits per byte)."
    else:
        said = f"{more} bits per byte, so it {'helps' if more.value > 0 else 'harms'}."
    return f"`{name}`: what its memory adds to the gain in the second half of a document: {said} {second}"


def _of_recall(by_variant: Mapping[str, Sequence[Figures]]) -> Iterator[str]:
    above = {name: statistics.fmean(f.recall - f.chance for f in found) for name, found in by_variant.items()}
    if above and max(above.values()) < NEAR_CHANCE:
        yield (
            "Recall: **no variant** is right noticeably more often than a guess (at most "
            f"{max(above.values()):+.1%}). These models were trained on text, and too little of it to recall random "
            "ids; the column compares nothing."
        )
    elif above:
        best = max(above, key=lambda name: above[name])
        yield f"Recall: `{best}` is furthest above a guess, by {above[best]:.1%}."
