"""From groups of parameters and settings to torch optimizers that honour ``found_inf``: one maker for each kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch

from meristem.optim.adamuon import AdaMuon
from meristem.optim.m3 import M3, EmaM3
from meristem.optim.part import OptimPart
from meristem.optim.skip import begin_momentum, skippable_muon

Group: TypeAlias = dict[str, Any]
"""As torch has it: ``params``, ``lr``, ``weight_decay``, and the ``period`` in steps at which it moves."""

Maker: TypeAlias = Callable[[list[Group], OptimPart], torch.optim.Optimizer]


@dataclass(frozen=True)
class Kind:
    """What moves the matrices of hidden layers, where that is something of its own, and what moves the rest."""

    rest: Maker
    matrices: Maker | None = None


def adamw(groups: list[Group], part: OptimPart) -> torch.optim.Optimizer:
    """Torch's, with the betas of each period."""
    groups = [group | {"betas": part.betas(group["period"])} for group in groups]
    return torch.optim.AdamW(groups, lr=part.rate, eps=part.eps, fused=True)


def sgd(groups: list[Group], part: OptimPart) -> torch.optim.Optimizer:
    """Torch's, with momentum that begins at 0, where torch would leave it undefined after a skipped first step."""
    optimizer = torch.optim.SGD(groups, lr=part.rate, momentum=part.momentum, fused=True)
    if part.momentum:
        optimizer.register_step_pre_hook(begin_momentum)
    return optimizer


def muon(groups: list[Group], part: OptimPart) -> torch.optim.Optimizer:
    """Torch's, its steps as large as those of AdamW, so that both can share a rate."""
    made = torch.optim.Muon(groups, lr=part.rate, momentum=part.momentum, adjust_lr_fn="match_rms_adamw")
    return skippable_muon(made)


def adamuon(groups: list[Group], part: OptimPart) -> torch.optim.Optimizer:
    """AdaMuon of the signs of momenta."""
    return AdaMuon(groups, rate=part.rate, momentum=part.momentum, beta=part.beta2, eps=part.eps)


def adamuon_raw(groups: list[Group], part: OptimPart) -> torch.optim.Optimizer:
    """AdaMuon with the second moment of the raw gradient."""
    return AdaMuon(groups, rate=part.rate, momentum=part.momentum, beta=part.beta2, eps=part.eps, is_raw=True)


def m3(groups: list[Group], part: OptimPart) -> torch.optim.Optimizer:
    """M3 as printed, or its decaying momenta."""
    if part.m3_ema:
        return EmaM3(groups, rate=part.rate)
    betas = part.m3_beta1, part.m3_beta2, part.m3_beta3
    return M3(groups, rate=part.rate, betas=betas, alpha=part.m3_alpha, every=part.m3_every, eps=part.eps)


KINDS: Final = {
    "adamw": Kind(adamw),
    "sgd": Kind(sgd),
    "muon": Kind(adamw, muon),
    "adamuon": Kind(adamw, adamuon),
    "adamuon_raw": Kind(adamw, adamuon_raw),
    "m3": Kind(adamw, m3),
}
"""``optim.kind`` to what makes its steps."""
