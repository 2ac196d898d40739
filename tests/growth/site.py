"""A tiny model with its optimizer, as the acts of the gardener see the run that it is trained in."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from growth.catalogue import host
from meristem.growth.attach import attach, slots_in
from meristem.growth.garden import Garden
from meristem.growth.gates import GateResult
from meristem.growth.observe import HeldOut
from meristem.growth.plan import Plan
from meristem.growth.report import GrowthReport
from meristem.growth.transaction import transaction
from meristem.models.growing import GrowConfig
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.train.loss import cross_entropy

LOOSE: dict[str, Any] = {
    "training_steps": 1,
    "pairs": 2,
    "margin_nats": 0,
    "gradient_least": 1e-12,
    "gradient_most": 1e12,
    "spread_most": 1e9,
    "holding_steps": 0,
    "quiet_steps": 0,
    "impact_nats": 1e9,
    "probation_steps": 0,
    "rent_parameters": 0,
    "rent_flops": 0,
    "recovery": "off",
}
"""Gates that seeds pass which have changed nothing."""


def loose(**more: Any) -> GrowConfig:
    """Settings by which every boundary is one step."""
    gates = LOOSE | more.pop("gates", {})
    given = {"boundary_every": 1, "blend_steps": 1, "min_age": 0, "embargo_steps": 1, "max_open": 8, "gates": gates}
    return GrowConfig.model_validate(given | more)


def evaluated(n: int = 5) -> Garden:
    """A garden that has seen some evaluations."""
    return Garden(held_out=tuple(HeldOut(step - n, 100 + step, 0.0, 3.0 - 0.01 * step) for step in range(n)))


@dataclass
class TinySite:
    """See ``growth.acts.Site``; everything is measured of the real model."""

    model: nn.Module
    optimizer: Any
    config: OptimConfig
    reports: list[GrowthReport] = field(default_factory=list)
    tokens: int = 1000
    quiet_steps: int | None = 100
    losses: Sequence[float] = (3.0, 2.8, 2.9, 2.7, 2.75)
    flops_per_token: float = 1e4
    step_flops: float = 1e6
    measure_flops: float = 1e5

    @classmethod
    def of(cls, *slots: str, optimizer: str = "adamw") -> "TinySite":
        """The default of the catalogue with slots, and an optimizer that has made a step."""
        model, config = attach(host("preset-default", torch.float32), slots), OptimConfig(name=optimizer)
        made = cls(model, build(model, config), config)
        made.train()
        return made

    def train(self) -> None:
        """One step."""
        loss = self.loss(self.model)
        loss.backward()
        self.optimizer.step(loss.detach())
        self.optimizer.zero_grad()

    def slots(self) -> Collection[str]:
        return slots_in(self.model).keys()

    def _tokens(self, n_rows: int, n_time: int = 9) -> Tensor:
        return torch.randint(zoo.VOCABULARY, (n_rows, n_time), generator=torch.Generator().manual_seed(n_rows))

    @torch.no_grad()
    def measure(self, model: nn.Module) -> list[float]:
        tokens_bt = self._tokens(3)
        logits_bto = model(tokens_bt, None)[0]
        return [
            float(cross_entropy(row[None, :-1], each[None, 1:]))
            for row, each in zip(logits_bto, tokens_bt, strict=True)
        ]

    def loss(self, model: nn.Module) -> Tensor:
        tokens_bt = self._tokens(2)
        return cross_entropy(model(tokens_bt, None)[0][:, :-1], tokens_bt[:, 1:]) / tokens_bt[:, 1:].numel()

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        return model(self._tokens(2), None)[0]

    def evaluate(self) -> float | None:
        return 2.9

    def keep(self) -> bool:
        return True

    def change(self, plan: Plan) -> None:
        receipt = transaction(
            self.model, self.optimizer, plan, self._tokens(1), rebuild=lambda model: build(model, self.config)
        )
        self.model, self.optimizer = receipt.model, receipt.optimizer

    def is_isolated(self, slot: str) -> bool | None:
        return True

    def recover(self, slot: str, n_steps: int) -> tuple[float | None, bool]:
        return None, False

    def agreed(self, result: GateResult) -> GateResult:
        return result

    def report(self, report: GrowthReport) -> None:
        self.reports.append(report)
