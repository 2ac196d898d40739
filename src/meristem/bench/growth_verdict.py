"""Whether growing pays: a table for each budget, the budget at which it starts to, and the verdict (growth.md 29.2)."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

from meristem.bench.estimate import Estimate, estimate, holm, paired, said, table
from meristem.bench.growth import ArmCell, GrowthConfig
from meristem.bench.tuned import BITS, Result, rate_words, tuning_words

NATS: Final = "nats"
TERA: Final = 1e12

GAIN_NATS: Final = 0.01
"""R6: by how much a grown model has to be better than the better of both that did not grow."""

SAVED: Final = 0.15
"""R6: or the share of the operations that it has to save on the way to the loss of the large one."""

BEYOND: Final = 3.0
"""R6: from how many times the crossover on a budget counts."""

FALSE: Final = 0.05
"""How often a difference may be called one that is none."""

Results: TypeAlias = Mapping[str, Mapping[str, Result[ArmCell]]]
"""By budget, the smallest first, and arm."""


@dataclass(frozen=True)
class Win:
    """A grown arm against the better of both that did not grow, under one budget.

    bits, nats: ours less theirs, per byte and per token. p: of the others that grew under this budget too (Holm).
    saved: as a share of the budget, on the way to the last loss of the large arm; None where a seed did not get there.
    """

    arm: str
    against: str
    flops: float
    bits: Estimate
    nats: Estimate
    p: float
    saved: Estimate | None

    @property
    def is_better(self) -> bool:
        """Whether it is, and not by chance."""
        return self.bits.mean < 0 and self.p <= FALSE

    @property
    def is_worth_it(self) -> bool:
        """R6, but for how large the budget is."""
        is_clear = self.is_better and -self.nats.mean >= GAIN_NATS
        saves = self.saved is not None and self.saved.is_clear and self.saved.mean >= SAVED
        return is_clear or saves


def measured(results: Results) -> dict[str, dict[str, Result[ArmCell]]]:
    """What has figures, of budgets under which anything has."""
    found = {budget: {name: one for name, one in own.items() if one.is_measured} for budget, own in results.items()}
    return {budget: own for budget, own in found.items() if own}


def reached(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """The operations after which a curve is at a level or below for the first time, on straight lines between its
    points; None where it never is."""
    if curve and curve[0][1] <= level:
        return curve[0][0]
    for (before, high), (after, low) in pairwise(curve):
        if low <= level:
            return before + (after - before) * (high - level) / (high - low)
    return None


def flops_saved(ours: Result[ArmCell], large: Result[ArmCell]) -> dict[int, float | None]:
    """By seed, the share of the operations of the large arm that ours saves on the way to its last loss; None where it
    does not get there within the budget."""
    found: dict[int, float | None] = {}
    for seed, theirs in large.by_seed.items():
        one = ours.by_seed.get(seed)
        if one is None or not one.curve or not theirs.curve:
            continue
        at = reached(one.curve, theirs.curve[-1][1])
        found[seed] = None if at is None else 1 - at / theirs.curve[-1][0]
    return found


def saving(ours: Result[ArmCell], large: Result[ArmCell]) -> Estimate | None:
    """Over all seeds; None unless each gets there."""
    found = [*flops_saved(ours, large).values()]
    every = [each for each in found if each is not None]
    return estimate(every) if found and len(every) == len(found) else None


def wins(config: GrowthConfig, results: Results) -> dict[str, list[Win]]:
    """By budget, every arm that grows against the better of both that do not; of budgets of which both are known."""
    found = {}
    for budget, own in measured(results).items():
        if config.small not in own or config.large not in own:
            continue
        mean = {name: statistics.fmean(own[name].values(BITS).values()) for name in (config.small, config.large)}
        against = min(mean, key=mean.__getitem__)
        pairs = []
        for name in own.keys() - mean.keys():
            bits = paired(own[name].values(BITS), own[against].values(BITS))
            nats = paired(own[name].values(NATS), own[against].values(NATS))
            if bits is not None and nats is not None:
                pairs.append((name, bits, nats))
        pairs.sort(key=lambda each: list(config.arms).index(each[0]))
        ps = holm([1.0 if bits.p is None else bits.p for _, bits, _ in pairs])
        flops = own[against].cell.flops
        found[budget] = [
            Win(name, against, flops, bits, nats, p, saving(own[name], own[config.large]))
            for (name, bits, nats), p in zip(pairs, ps, strict=True)
        ]
    return found


def crossover(config: GrowthConfig, results: Results) -> float | None:
    """R7: the operations from which on the large arm is better than the small one on average, on straight lines over
    their logarithm between budgets. The smallest budget where it is from there; None where it is under none.
    """
    points = []
    for own in measured(results).values():
        if config.small in own and config.large in own:
            apart = paired(own[config.large].values(BITS), own[config.small].values(BITS))
            if apart is not None:
                points.append((math.log(own[config.small].cell.flops), apart.mean))
    at = next((place for place, (_, mean) in enumerate(points) if mean < 0), None)
    if at is None:
        return None
    if at == 0:
        return math.exp(points[0][0])
    (before, high), (after, low) = points[at - 1], points[at]
    return math.exp(before + (after - before) * high / (high - low))


def is_worth_it(config: GrowthConfig, results: Results) -> bool:
    """R6: under some budget of at least three times the crossover growth is worth it."""
    at = crossover(config, results)
    return at is not None and any(
        win.is_worth_it and win.flops >= BEYOND * at for own in wins(config, results).values() for win in own
    )


def verdict(config: GrowthConfig, results: Results) -> list[str]:
    """In plain sentences: where size begins to pay, where growth does, and whether it is worth it."""
    found = wins(config, results)
    if not any(found.values()):
        return ["Nothing can be said yet: under no budget are both baselines and a grown arm known."]
    return [
        *_unfinished(config, results),
        *_about_worth(config, results),
        *_about_winning(found),
        *_about_size(config, results),
        *_differences(config, results),
        *_failed(results),
    ]


def _unfinished(config: GrowthConfig, results: Results) -> Iterator[str]:
    every = [result for own in results.values() for result in own.values()]
    n_known, n_all = sum(len(result.by_seed) for result in every), len(every) * len(config.seeds)
    if n_known < n_all:
        yield f"**Not all is measured yet:** {n_known} of {n_all} runs are known, and what follows is said of these."


def _about_winning(found: Mapping[str, Sequence[Win]]) -> Iterator[str]:
    first: dict[str, Win | None] = {}
    for win in (win for own in found.values() for win in own):
        first[win.arm] = first.get(win.arm) or (win if win.is_better else None)
    for arm, won in first.items():
        if won is None:
            yield f"**`{arm}` does not win** within the budgets tried: under none is it better than both."
        else:
            yield f"**`{arm}` starts to win** at {_tera(won.flops)}, the first budget under which it beats both."


def _about_size(config: GrowthConfig, results: Results) -> Iterator[str]:
    at, budgets = crossover(config, results), [own[0].flops for own in wins(config, results).values() if own]
    if at is None:
        yield (
            f"**Crossover.** Under none of the budgets is the larger model better on average: up to "
            f"{_tera(max(budgets))} it is better to begin small than to begin large."
        )
    elif at <= min(budgets):
        yield f"**Crossover.** The larger model is better on average already under the smallest budget, {_tera(at)}."
    else:
        yield f"**Crossover.** The larger model is better on average from about {_tera(at)} on."


def _differences(config: GrowthConfig, results: Results) -> Iterator[str]:
    for budget, own in wins(config, results).items():
        known = results[budget]
        apart = paired(known[config.large].values(BITS), known[config.small].values(BITS))
        if apart is not None:
            yield f"{budget}: `{config.large}` against `{config.small}`: {said(apart, 'bits per byte')}."
        for win in own:
            rates = known[win.arm].rate, known[win.against].rate
            tuned = "" if len(set(rates)) == 1 else f"; learning rates {rates[0]:g} and {rates[1]:g}"
            chance = "" if win.bits.p is None else f"; p = {win.p:.2g} beside the others that grow"
            saved = "" if win.saved is None else f"; operations saved to the loss of the large: {_share(win.saved)}"
            yield (
                f"{budget}: `{win.arm}` against the better of both, `{win.against}`: "
                f"{said(win.bits, 'bits per byte')}{chance}{saved}{tuned}."
            )


def _about_worth(config: GrowthConfig, results: Results) -> Iterator[str]:
    asked = (
        f"under a budget of at least {BEYOND:g} times the crossover to be better than the better of both by "
        f"{GAIN_NATS:g} nats per token, or to save {SAVED:.0%} of the operations on the way to the loss of "
        f"`{config.large}`"
    )
    at, found = crossover(config, results), wins(config, results)
    if at is None:
        yield f"**Growing is not worth it here.** Asked was {asked}, and there is no crossover within the budgets."
        return
    large_enough = [win for own in found.values() for win in own if win.flops >= BEYOND * at]
    worth = [f"`{win.arm}` at {_tera(win.flops)}" for win in large_enough if win.is_worth_it]
    if worth:
        yield f"**Growing is worth it here:** {', '.join(worth)}. Asked was {asked}."
    elif large_enough:
        yield f"**Growing is not worth it here.** Asked was {asked}."
    else:
        yield (
            f"**Whether growing is worth it is open.** Asked was {asked}, and the largest budget lies below "
            f"{_tera(BEYOND * at)}."
        )


def _failed(results: Results) -> Iterator[str]:
    for budget, own in results.items():
        for name, result in own.items():
            for seed, outcome in result.by_seed.items():
                if outcome.failure is not None:
                    yield f"{budget}: `{name}` from seed {seed} ended before it was trained: {outcome.failure}"


def growth_page(config: GrowthConfig, results: Results, *, title: str, picture: str | None) -> str:
    """The whole document. title: where, when and by which command; picture: the name of its file."""
    lines = ["# Does growing pay?", "", title, "", "**Verdict.**", ""]
    lines += [f"- {sentence}" for sentence in verdict(config, results)]
    lines += [] if picture is None else ["", f"![Held-out text over operations, for every arm and budget]({picture})"]
    lines += ["", "## What was compared", ""]
    lines += table(["arm", "what it is"], [[f"`{name}`", arm.what] for name, arm in config.arms.items()])
    lines += [
        "",
        "**Equal cost.** All arms under a budget end when they have spent its floating-point operations: every pass of "
        "the host and of seeds, every gate, probe and check, and evaluation for arms that decide by it. A step counts "
        "as three forward passes. The learning rate warms up, and falls along a cosine to "
        f"{_floor(results)} of it at the end of the budget. Tuned alike: {tuning_words(config)} What is new in a grown "
        f"model has its own moments and warm-up. `{config.large}` has the last size of the grown arms from the "
        "beginning: it is both *larger from scratch* and *static final shape*.",
        "",
        f"**Figures** are means over {len(config.seeds)} seeds ± half of a 95 % interval (Student's t); differences "
        "are paired by seed, whose runs read the same text in the same order. Bits per byte are of held-out text at "
        "the end; less is better. *Saved* is the share of the budget that an arm does not need to reach the last loss "
        f"of `{config.large}`, of the same seed. Seconds are of the whole run, evaluation included, on a machine that "
        "did other work beside.",
    ]
    for budget, own in results.items():
        known = {name: result for name, result in own.items() if result.is_measured}
        flops = next(iter(own.values())).cell.flops
        lines += ["", f"## {budget} ({_tera(flops)})", ""]
        lines += _rows(config, known) if known else ["Not measured yet."]
        lines += [f"\n{line}" for line in _seeds(known)]
    return "\n".join([*lines, ""])


def _rows(config: GrowthConfig, known: Mapping[str, Result[ArmCell]]) -> list[str]:
    titles = ["arm", "parameters at the end", "tokens", "learning rate", "TFLOP", "seeds", "bits per byte"]
    titles += [f"less `{config.small}`", f"less `{config.large}`", "saved", "seconds"]
    rows = []
    for name, result in known.items():
        bits = result.values(BITS)
        row = [f"`{name}`", _mean(result, "n_parameters"), _mean(result, "tokens"), rate_words(config, result.rate)]
        row += [f"{statistics.fmean(result.values('flops').values()) / TERA:.3g}", str(len(bits))]
        row.append(f"**{estimate(list(bits.values())).text()}**")
        for other in (config.small, config.large):
            apart = paired(bits, known[other].values(BITS)) if other in known and other != name else None
            row.append(apart.text(sign="+") if apart else "")
        row.append(_saved(result, known.get(config.large)) if name != config.large else "")
        rows.append([*row, _mean(result, "wall_s")])
    return table(titles, rows)


def _saved(result: Result[ArmCell], large: Result[ArmCell] | None) -> str:
    if large is None:
        return ""
    by_seed = flops_saved(result, large)
    every = [each for each in by_seed.values() if each is not None]
    if len(every) < len(by_seed):
        return f"not reached by {len(by_seed) - len(every)} of {len(by_seed)}"
    return _share(estimate(every)) if every else ""


def _seeds(known: Mapping[str, Result[ArmCell]]) -> Iterator[str]:
    """What the gardener did, of arms that plant seeds."""
    for name, result in known.items():
        n_seeds = result.values("n_seeds")
        if any(n_seeds.values()):
            spent = statistics.fmean(result.values("probe_flops").values())
            spent /= statistics.fmean(result.values("flops").values())
            yield (
                f"`{name}` put in {sum(n_seeds.values()):g} seeds in {len(n_seeds)} runs and kept "
                f"{sum(result.values('n_kept').values()):g}; {spent:.1%} of its operations went into trials, gates and "
                f"evaluation."
            )


def _mean(result: Result[ArmCell], key: str) -> str:
    return f"{statistics.fmean(result.values(key).values()):,.0f}"


def _share(found: Estimate) -> str:
    return f"{found.mean:.1%}" + ("" if found.half is None else f" ± {found.half:.1%}")


def _tera(flops: float) -> str:
    return f"{flops / TERA:.3g} TFLOP"


def _floor(results: Results) -> str:
    floors = {result.cell.config.schedule.floor for own in results.values() for result in own.values()}
    return " or ".join(f"{floor:.0%}" for floor in sorted(floors))
