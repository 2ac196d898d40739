"""How what a seed gives enters the hidden vectors of its host (growth.md 7.1).

Each gives the addition a in ``y = h + a``: per token, out of the hidden vector h, the seed's delta and the blend weight
alpha alone. Where ``a = alpha g delta``, ``factor`` is g: by how much what is added is less than alpha says.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Final, Protocol, Self, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from meristem.config.mistakes import explain
from meristem.errors import BlendRefused, WrongValue
from meristem.growth.course import CURVES
from meristem.models.growing import Blending
from meristem.plugins import Registry, read_call

CHANNEL_OPEN: Final = 4.0
"""First logit of a channel: sigmoid(4) = 0.98."""
TOKEN_OPEN: Final = -2.0
"""First logit of the gate of a token: sigmoid(-2) = 0.12."""
SHARPNESS: Final = 4.0
"""k of the confidence blend."""
SURE_FROM: Final = 0.2
"""tau of the confidence blend: the margin of two logits at which half is added."""


class Blend(Protocol):
    """What every blend is, a module."""

    def __call__(self, host: Tensor, delta: Tensor, weight: Tensor) -> Tensor: ...

    def factor(self, host: Tensor) -> Tensor:
        """g, of any shape that is broadcast to hidden vectors; 1 where the blend weight alone decides."""


class Residual(nn.Module):
    """``a = alpha delta``."""

    def forward(self, host_btd: Tensor, delta_btd: Tensor, weight: Tensor) -> Tensor:
        return weight * delta_btd

    def factor(self, host_btd: Tensor) -> Tensor:
        return host_btd.new_ones(())


class Channel(nn.Module):
    """``a = alpha sigmoid(w) * delta``, with a learned w for every channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.logit_d = nn.Parameter(torch.full((width,), CHANNEL_OPEN))

    def forward(self, host_btd: Tensor, delta_btd: Tensor, weight: Tensor) -> Tensor:
        return weight * (delta_btd * self.factor(host_btd))

    def factor(self, host_btd: Tensor) -> Tensor:
        return self.logit_d.sigmoid()


class Gated(nn.Module):
    """``a = alpha sigmoid(u h + b) * delta``, with u = 0 and b = -2 at first."""

    matrices: ClassVar = frozenset({"gate.weight"})

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, TOKEN_OPEN)

    def forward(self, host_btd: Tensor, delta_btd: Tensor, weight: Tensor) -> Tensor:
        return weight * (delta_btd * self.factor(host_btd))

    def factor(self, host_btd: Tensor) -> Tensor:
        return self.gate(host_btd).sigmoid()


class Multiplicative(nn.Module):
    """``a = alpha h * tanh(delta)``, so that ``y = h (1 + alpha tanh delta)``."""

    def forward(self, host_btd: Tensor, delta_btd: Tensor, weight: Tensor) -> Tensor:
        return weight * (host_btd * delta_btd.tanh())

    def factor(self, host_btd: Tensor) -> Tensor:
        return host_btd.new_ones(())


class ReadsOut(Protocol):
    """A model that says what hidden vectors of its residual stream would predict, as ``models.lm.LM`` does."""

    def readout(self, hidden: Tensor, /) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class Confidence(nn.Module):
    """``a = alpha g delta`` with ``g = sigmoid(k (m - tau))``: more is added where the host is sure.

    m is the largest logit less the second largest of what the host would predict from h, per token; k = 4, tau = 0.2.
    No gradient goes through g. It belongs on the residual stream, as the output of a block.
    """

    model: tuple[ReadsOut, ...] = ()

    def bind(self, model: nn.Module, width: int) -> None:
        """Take logits from this model, which is no part of the blend. Raises BlendRefused where it gives none.

        width: of the hidden vectors that are to be read out.
        """
        like = next(model.parameters(), None)
        reason = "" if callable(getattr(model, "readout", None)) and like is not None else "has no method 'readout'"
        if like is not None and not reason:
            try:
                with torch.no_grad():
                    cast(ReadsOut, model).readout(torch.zeros(1, 1, width, device=like.device, dtype=like.dtype))
            except RuntimeError as cause:
                reason = f"cannot read out vectors of the width {width} ({str(cause).partition(chr(10))[0]})"
        if reason:
            raise BlendRefused(
                f"the blend 'confidence' needs the logits of its host, and a {type(model).__name__} {reason}. Give its "
                f"class readout(hidden_btd) -> logits_bto, stand at its residual stream, or take the blend 'gated'.",
                blend="confidence",
            )
        self.model = (cast(ReadsOut, model),)

    def forward(self, host_btd: Tensor, delta_btd: Tensor, weight: Tensor) -> Tensor:
        return weight * (delta_btd * self.factor(host_btd))

    @torch.no_grad()
    def factor(self, host_btd: Tensor) -> Tensor:
        if not self.model:
            raise BlendRefused(
                "a blend 'confidence' without a host was called. Put its seed into a model with grow.graft.",
                blend="confidence",
            )
        model = self.model[0]
        two = model.readout(host_btd.to(next(model.parameters()).dtype)).topk(2, dim=-1).values
        margin_bt1 = two[..., :1] - two[..., 1:]
        return (SHARPNESS * (margin_bt1 - SURE_FROM)).sigmoid().to(host_btd.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy in a copied model reads that one out; one of a seed or a slot alone reads the same model."""
        made = type(self)().train(self.training)
        made.model = tuple(memo.get(id(each), each) for each in self.model)
        return made


class LogitMix(nn.Module):
    """``softmax(y) = (1 - alpha) softmax(h) + alpha softmax(h + delta)``, where what the host gives are logits.

    ``a = log(1 - alpha + alpha exp d)`` with ``d = log softmax(h + delta) - log softmax(h)``. It belongs at the head.
    """

    def forward(self, host_bto: Tensor, delta_bto: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(torch.promote_types(host_bto.dtype, torch.float32))
        apart_bto = (host_bto + delta_bto).log_softmax(-1) - host_bto.log_softmax(-1)
        none, all_of_it = torch.log1p(-weight), weight.log()
        # What is taken off is nothing but rounding: where delta is 0 the addition is 0 exactly.
        return torch.logaddexp(none, all_of_it + apart_bto) - torch.logaddexp(none, all_of_it)

    def factor(self, host_bto: Tensor) -> Tensor:
        return host_bto.new_ones(())


blends: Registry[Callable[[int], nn.Module]] = Registry(
    "blend",
    {
        "residual": lambda width: Residual(),
        "channel": Channel,
        "confidence": lambda width: Confidence(),
        "gated": Gated,
        "logit_mix": lambda width: LogitMix(),
        "multiplicative": lambda width: Multiplicative(),
    },
)
"""Makers of blends by the width of the host: modules ``(host_btd, delta_btd, weight) -> addition_btd``, zero where
delta is zero; each is a ``Blend``."""


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
