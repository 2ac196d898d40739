"""From groups of parameters and settings to torch optimizers that honour ``found_inf``: one maker for each kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch

from meristem.optim.adamuon import AdaMuon
from meristem.optim.config import OptimConfig
from meristem.optim.m3 import M3, EmaM3
from meristem.optim.nonfinite import begin_momentum, skippable_muon

Group: TypeAlias = dict[str, Any]
"""As torch has it: ``params``, ``lr``, ``weight_decay``, and the ``period`` in steps at which it moves."""

Maker: TypeAlias = Callable[[list[Group], OptimConfig], torch.optim.Optimizer]


@dataclass(frozen=True)
class Kind:
    """What moves the matrices of hidden layers, where that is something of its own, and what moves the rest."""

    rest: Maker
    matrices: Maker | None = None


def adamw(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """Torch's, with the betas of each period."""
    groups = [group | {"betas": config.betas(group["period"])} for group in groups]
    return torch.optim.AdamW(groups, lr=config.lr, eps=config.eps, fused=True)


def sgd(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """Torch's, with momentum that begins at 0, where torch would leave it undefined after a skipped first step."""
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.momentum:
        optimizer.register_step_pre_hook(begin_momentum)
    return optimizer


def muon(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """Torch's, its steps as large as those of AdamW, so that both can share a learning rate."""
    made = torch.optim.Muon(groups, lr=config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
    return skippable_muon(made)


def adamuon(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """AdaMuon of the signs of momenta."""
    return AdaMuon(groups, rate=config.lr, momentum=config.momentum, beta=config.beta2, eps=config.eps)


def adamuon_raw(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """AdaMuon with the second moment of the raw gradient."""
    return AdaMuon(groups, rate=config.lr, momentum=config.momentum, beta=config.beta2, eps=config.eps, is_raw=True)


def m3(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """M3 as printed, or its decaying momenta."""
    if config.m3_ema:
        return EmaM3(groups, rate=config.lr)
    betas = config.m3_beta1, config.m3_beta2, config.m3_beta3
    return M3(groups, rate=config.lr, betas=betas, alpha=config.m3_alpha, every=config.m3_every, eps=config.eps)


KINDS: Final = {
    "adamw": Kind(adamw),
    "sgd": Kind(sgd),
    "muon": Kind(adamw, muon),
    "adamuon": Kind(adamw, adamuon),
    "adamuon_raw": Kind(adamw, adamuon_raw),
    "m3": Kind(adamw, m3),
}
"""``optim.name`` to what makes its steps."""
