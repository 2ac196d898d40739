"""How what a seed gives enters the hidden vectors of its host (growth.md 7.1).

Each gives the addition a in ``y = h + alpha a``: per token, out of the hidden vector h and the seed's delta alone.
"""

from collections.abc import Callable
from typing import ClassVar, Final

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from meristem.config.mistakes import explain
from meristem.errors import WrongValue
from meristem.growth.course import CURVES
from meristem.models.growing import Blending
from meristem.plugins import Registry, read_call

CHANNEL_OPEN: Final = 4.0
"""First logit of a channel: sigmoid(4) = 0.98."""
TOKEN_OPEN: Final = -2.0
"""First logit of the gate of a token: sigmoid(-2) = 0.12."""


class Residual(nn.Module):
    """``a = delta``."""

    def forward(self, host_btd: Tensor, delta_btd: Tensor) -> Tensor:
        return delta_btd


class Channel(nn.Module):
    """``a = sigmoid(w) * delta``, with a learned w for every channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.logit_d = nn.Parameter(torch.full((width,), CHANNEL_OPEN))

    def forward(self, host_btd: Tensor, delta_btd: Tensor) -> Tensor:
        return delta_btd * self.logit_d.sigmoid()


class Gated(nn.Module):
    """``a = sigmoid(u h + b) * delta``, with u = 0 and b = -2 at first."""

    matrices: ClassVar = frozenset({"gate.weight"})

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, TOKEN_OPEN)

    def forward(self, host_btd: Tensor, delta_btd: Tensor) -> Tensor:
        return delta_btd * self.gate(host_btd).sigmoid()


class Multiplicative(nn.Module):
    """``a = h * tanh(delta)``, so that ``y = h (1 + alpha tanh delta)``."""

    def forward(self, host_btd: Tensor, delta_btd: Tensor) -> Tensor:
        return host_btd * delta_btd.tanh()


blends: Registry[Callable[[int], nn.Module]] = Registry(
    "blend",
    {
        "residual": lambda width: Residual(),
        "channel": Channel,
        "gated": Gated,
        "multiplicative": lambda width: Multiplicative(),
    },
)
"""Makers of blends by the width of the host: modules ``(host_btd, delta_btd) -> addition_btd``, zero where delta is."""


def blending(text: str, usual: Blending | None = None) -> Blending:
    """What ``channel`` or ``channel(target=0.5, steps=50)`` says; the policy and what carries out its orders read it
    with this alone.

    usual: what holds of all that the text leaves open. Raises WrongValue and UnknownKey with what was found.
    """
    name, places, chosen = read_call("blend", text)
    blends.get(name)
    if places or "name" in chosen:
        raise WrongValue(
            f"found '{text}'; expected a blend and its settings with their names, as channel(target=0.5).", value=text
        )
    given = (usual or Blending()).model_dump() | chosen | {"name": name.casefold()}
    try:
        found = Blending.model_validate(given)
    except ValidationError as cause:
        raise explain(cause, Blending, lambda path: f"the blend '{text}'") from cause
    if found.curve not in CURVES:
        raise WrongValue(f"found the curve '{found.curve}'; expected one of {', '.join(CURVES)}.", value=found.curve)
    return found
