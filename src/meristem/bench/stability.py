"""Whether every rule learns in every composition with several levels, and stays finite (memory.md, S1-M16)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Final

import torch
from torch import nn

from meristem.bench.rules import part_of
from meristem.device.random import stream
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import LevelsConfig
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build as build_optimizer
from meristem.train.loss import cross_entropy

RULES: Final = ("hebbian", "delta", "titans", "moneta", "yaad", "memora", "lattice", "trellis")
COMPOSITIONS: Final = ("mag", "mac", "mal")
COUNTS: Final = (1, 2, 4)

ENOUGH: Final = 0.8
"""Share of the cells whose loss has to fall."""

VOCABULARY: Final = 17
PERIODS: Final = (1, 2, 4, 8)
"""Short, so that the slowest level writes in every sequence."""

SIZES: Final = {"dim": 8, "n_layers": 1, "n_heads": 2, "mlp_dim": 16}
LENGTH: Final = 16
RATE: Final = 1e-2


@dataclass(frozen=True)
class Cell:
    """One rule in one composition with so many levels: its loss at the first step, and the mean over the last tenth."""

    rule: str
    composition: str
    n_levels: int
    first_nats: float
    last_nats: float
    is_finite: bool

    @property
    def falls(self) -> bool:
        return self.is_finite and self.last_nats < self.first_nats

    @property
    def line(self) -> str:
        """For a person."""
        verdict = "falls" if self.falls else "does not fall" if self.is_finite else "NOT FINITE"
        name = f"{self.rule}, {self.composition}, {self.n_levels} levels"
        return f"{name:<28} {self.first_nats:.3f} -> {self.last_nats:.3f} nats  {verdict}"


def sweep(steps: int) -> Iterator[Cell]:
    """All cells, each trained for ``steps`` steps."""
    for rule, composition, n_levels in product(RULES, COMPOSITIONS, COUNTS):
        yield trained(rule, composition, n_levels, steps=steps)


def trained(rule: str, composition: str, n_levels: int, *, steps: int) -> Cell:
    """A tiny model that learns to count: x_(t+1) = 3 x_t + 1 modulo the vocabulary, from random beginnings.

    A loss, gradient or weight that is not finite ends it.
    """
    model = _model(rule, composition, n_levels)
    optimizer = build_optimizer(model, OptimConfig(lr=RATE))
    generator = stream(0, "stability")
    losses: list[float] = []
    while len(losses) < steps:
        tokens_bt = counting(2, LENGTH + 1, generator)
        logits_bto, _ = model(tokens_bt[:, :-1], None)
        loss = cross_entropy(logits_bto, tokens_bt[:, 1:]) / tokens_bt[:, 1:].numel()
        loss.backward()
        losses.append(float(loss.detach()))
        is_skipped = bool(optimizer.step(loss.detach()).is_skipped)
        optimizer.zero_grad()
        if is_skipped:
            break
    optimizer.flush()
    is_finite = len(losses) == steps and all(math.isfinite(nats) for nats in losses) and _is_finite(model)
    tail = losses[-max(1, steps // 10) :]
    return Cell(rule, composition, n_levels, losses[0], sum(tail) / len(tail), is_finite)


def counting(n_rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Rows in which every id says what the next one is."""
    columns = [torch.randint(VOCABULARY, (n_rows,), generator=generator)]
    for _ in range(length - 1):
        columns.append((3 * columns[-1] + 1) % VOCABULARY)
    return torch.stack(columns, dim=1)


def is_stable(cells: Sequence[Cell]) -> bool:
    """All are finite, and enough of them fall."""
    return all(cell.is_finite for cell in cells) and sum(cell.falls for cell in cells) >= ENOUGH * len(cells)


def table(cells: Sequence[Cell], steps: int) -> str:
    """A page: a line for every rule and composition, a column for every number of levels."""
    n_falling = sum(cell.falls for cell in cells)
    lines = [
        "# Which rules stay finite and learn",
        "",
        f"Written by `meristem bench stability --steps {steps}`. Nats per token of a model of width {SIZES['dim']}, "
        f"at the first step and over the last tenth. {n_falling} of {len(cells)} cells fall; "
        f"{sum(cell.is_finite for cell in cells)} are finite.",
        "",
        "| rule | composition | " + " | ".join(f"{count} levels" for count in COUNTS) + " |",
        "|---|---|" + "---|" * len(COUNTS),
    ]
    found = {(cell.rule, cell.composition, cell.n_levels): cell for cell in cells}
    for rule, composition in product(RULES, COMPOSITIONS):
        row = [_entry(found.get((rule, composition, count))) for count in COUNTS]
        if any(row):
            lines.append(f"| {rule} | {composition} | {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def to_json(cells: Sequence[Cell], steps: int) -> dict[str, object]:
    """For programs."""
    rows = [asdict(cell) | {"falls": cell.falls} for cell in cells]
    return {"schema": "meristem.stability/1", "steps": steps, "is_stable": is_stable(cells), "cells": rows}


def _entry(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if not cell.is_finite:
        return "**not finite**"
    return f"{cell.first_nats:.2f} to {cell.last_nats:.2f}" + ("" if cell.falls else ", **does not fall**")


def _model(rule: str, composition: str, n_levels: int) -> nn.Module:
    levels = LevelsConfig() if n_levels == 1 else LevelsConfig(count=n_levels, periods=PERIODS[:n_levels])
    memory = part_of(rule).model_copy(update={"head_dim": 4, "chunk": 4, "levels": levels})
    size = SIZES | ({"segment": 4} if composition == "mac" else {"sliding_window": 8})
    return build(ModelConfig.model_validate({"mixer": composition, **size}), memory, VOCABULARY, random_seed=0)


def _is_finite(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())
