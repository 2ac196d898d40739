"""What seeds contribute on held-out text, measured by leaving them out (growth.md 14.4, 29.6)."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import combinations
from typing import Final, TypeAlias

import torch
from torch import nn

from meristem.device.random import stream
from meristem.errors import MissingMetric, WrongValue
from meristem.growth.course import Course
from meristem.growth.graft import find_seed
from meristem.growth.stage import Paired

Measure: TypeAlias = Callable[[nn.Module], Sequence[float]]
"""Held-out losses of a model, in nats per target, a batch each and always the same ones; the caller's."""

FACTORIAL: Final = 4
"""Up to so many seeds every set of them is measured."""


@contextmanager
def switched(model: nn.Module, weights: Mapping[str, float]) -> Iterator[None]:
    """While it lasts the seeds of these slots have these blend weights; then they stand on their courses as before.

    Raises WrongValue for a slot that is not there or holds no seed.
    """
    seeds = {slot: find_seed(model, slot) for slot in weights}
    before = {slot: seed.way for slot, seed in seeds.items()}
    try:
        for slot, weight in weights.items():
            seeds[slot].follow(Course(weight, weight))
        yield
    finally:
        for slot, course in before.items():
            seeds[slot].follow(course)


def live_weights(model: nn.Module, slots: Collection[str]) -> dict[str, float]:
    """The blend weights of seeds when they are live: those that they have, and 1 for one that is off."""
    return {slot: find_seed(model, slot).way.weight or 1.0 for slot in slots}


def ablate(model: nn.Module, slots: Sequence[str], measure: Measure) -> Paired:
    """Loss without the seeds of these slots less loss with them, batch by batch: what they gain, together.

    The model is as it was, to the bit. Raises WrongValue for a slot without a seed, and MissingMetric where a loss is
    not finite.
    """
    live = live_weights(model, slots)
    with switched(model, dict.fromkeys(slots, 0.0)):
        without = measure(model)
    with switched(model, live):
        return _differences(without, measure(model))


def contributions(
    model: nn.Module, slots: Sequence[str], measure: Measure, *, n_permutations: int = 20, random_seed: int = 0
) -> dict[str, Paired]:
    """What each seed gains by itself, batch by batch: Shapley values, which sum to the gain of all together.

    Up to four seeds every set of them is measured, 2^n times in all, and each value is exact. Of more, seeds are put in
    one after the other in ``n_permutations`` orders, half of them drawn and half their reverses, and the value of each
    is its mean; no set is measured twice.

    Raises WrongValue for a slot without a seed, a slot that stands twice, and a number of orders that is odd; and
    MissingMetric where a loss is not finite.
    """
    if len(set(slots)) != len(slots) or n_permutations < 2 or n_permutations % 2:
        raise WrongValue(
            f"the slots {list(slots)} and {n_permutations} orders were found; expected every slot once, and an even "
            f"number of orders.",
            value=n_permutations,
        )
    live = live_weights(model, slots)

    @cache
    def losses(present: frozenset[str]) -> tuple[float, ...]:
        with switched(model, {slot: live[slot] if slot in present else 0.0 for slot in slots}):
            return tuple(measure(model))

    if len(slots) <= FACTORIAL:
        weighted = _every_set(slots)
    else:
        weighted = _orders(slots, n_permutations, random_seed)
    shares: dict[str, list[float]] = {slot: [0.0] * len(losses(frozenset())) for slot in slots}
    for slot, before, weight in weighted:
        gained = zip(losses(before), losses(before | {slot}), strict=True)
        shares[slot] = [so_far + weight * (off - on) for so_far, (off, on) in zip(shares[slot], gained, strict=True)]
    return {slot: _paired(each) for slot, each in shares.items()}


def _every_set(slots: Sequence[str]) -> Iterator[tuple[str, frozenset[str], float]]:
    """For each slot all sets of others, and the share of orders in which just these come before it."""
    n = len(slots)
    for slot in slots:
        others = [each for each in slots if each != slot]
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            yield from ((slot, frozenset(before), weight) for before in combinations(others, size))


def _orders(slots: Sequence[str], n: int, random_seed: int) -> Iterator[tuple[str, frozenset[str], float]]:
    """For each slot those before it in drawn orders and their reverses, each of a weight of 1 / n."""
    generator = stream(random_seed, "growth.contributions")
    for _ in range(n // 2):
        order = [slots[place] for place in torch.randperm(len(slots), generator=generator).tolist()]
        for each in (order, order[::-1]):
            yield from ((slot, frozenset(each[:place]), 1 / n) for place, slot in enumerate(each))


def _differences(without: Sequence[float], live: Sequence[float]) -> Paired:
    return _paired([off - on for off, on in zip(without, live, strict=True)])


def _paired(differences: Sequence[float]) -> Paired:
    if not all(map(math.isfinite, differences)):
        raise MissingMetric(
            "a held-out loss with or without a seed was not finite; expected a number. Leave that batch out.",
            name="contribution",
        )
    paired = Paired()
    for each in differences:
        paired = paired.add(each)
    return paired
