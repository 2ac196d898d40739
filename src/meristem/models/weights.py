"""Weights that learn from the text just read, in a change of them that travels with the state of one reader."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meristem.errors import CapabilityError, ShapeError, WrongValue
from meristem.memory.state import State, detach, flatten
from meristem.nn.cms_mlp import CMSMLPLevel
from meristem.nn.mlp import Feedforward, SwiGLU
from meristem.shapes import Logits, Tokens

Which = Literal["mlp", "all", "head", "levels"]
RATES: Final[Mapping[Which, float]] = {"mlp": 1.5, "all": 1.0, "head": 0.5, "levels": 1.5}
"""Learning rates that were best for titans-mag on source code that it had not been trained on."""

WORSE_NATS: Final = 2.0
"""Nats per token by which a chunk may cost more than those before it until what was learned is dropped."""


FAR_NATS: Final = 10.0
"""Divergence between a prediction before and after a step, beyond which a step is not taken."""


def learnable(model: nn.Module, which: Which) -> tuple[str, ...]:
    """The parameters that learn: matrices of feed-forward layers, all, the head's matrix, or feed-forward levels.

    Raises CapabilityError for a model without them.
    """
    own = dict(model.named_parameters())
    kinds = (CMSMLPLevel,) if which == "levels" else (SwiGLU, Feedforward)
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, kinds))
    chosen = {
        "mlp": [name for name, parameter in own.items() if parameter.ndim > 1 and name.startswith(inside)],
        "all": list(own),
        "head": [name for name in own if name == "head.weight"],
        "levels": [name for name in own if name.startswith(inside)],
    }
    if which not in chosen:
        raise WrongValue(f"'{which}' names no weights that learn; choose {', '.join(chosen)}.", value=which)
    if not chosen[which]:
        raise CapabilityError(
            f"this model has no weights '{which}' that could learn. Choose another of {', '.join(chosen)}, or let its "
            f"memory learn (learn=memory).",
            operation="learn",
            reason=f"no {which}",
        )
    return tuple(chosen[which])


@dataclass(frozen=True)
class WeightLearner:
    """A reader whose weights W + D learn: after every ``chunk`` tokens ``D <- D - rate * min(1, clip / |g|) g``.

    g is the gradient of the mean loss of that chunk's tokens after its first, at the weights and the memory that the
    chunk began with, through nothing before it (dynamic evaluation, Krause 1709.07432). A token is never predicted by
    weights that have seen it. Memories learn too. However the text is cut into calls, D is the same to the bit.

    Two checks hold back a rate that is too large. A step is not taken, and the rate is halved, where the chunk, read
    again after it, would cost more, or one of its predictions moves by over ``FAR_NATS``, or the change is not finite.
    Where a chunk costs over ``WORSE_NATS`` per token more than those before it on average, D is dropped, which leaves
    the model as it was trained, and the rate is halved. So NaN never enters D; the cost of the one chunk that is read
    before D is dropped has no bound.

    The state is the model's, and under ``learned`` D, kept in bfloat16 where weights are float32, the rate, the mean
    nats, and, of an unfinished chunk, its tokens and the state at its beginning. One text is read at a time.
    """

    model: nn.Module
    loss: Any
    which: Which = "mlp"
    rate: float | None = None
    clip: float = 1.0
    chunk: int = 64
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.chunk < 2 or self.clip <= 0 or (self.rate is not None and not 0 <= self.rate < float("inf")):
            raise WrongValue(
                f"chunk {self.chunk}, clip {self.clip}, rate {self.rate}; expected a chunk of at least 2 tokens, a "
                f"positive clip, and a finite rate of at least 0.",
                value=self.rate,
            )
        window = getattr(self.model, "window", None)
        object.__setattr__(self, "chunk", min(self.chunk, window or self.chunk))
        object.__setattr__(self, "names", learnable(self.model, self.which))

    def __call__(self, tokens_bt: Tokens, state: State | None = None) -> tuple[Logits, State]:
        if tokens_bt.shape[0] != 1:
            raise ShapeError(
                f"{tokens_bt.shape[0]} texts were given at once; weights learn from one, in a change of their own. "
                f"Read them one by one.",
                found=tokens_bt.shape[0],
                expected=1,
            )
        carried = None if state is None else {name: leaf for name, leaf in state.items() if name != "learned"}
        learned: dict[str, Any] = self._fresh() if state is None else state["learned"]
        logits, at = [], 0
        while at < tokens_bt.shape[1]:
            read_bt = learned.get("tokens_bt", tokens_bt[:, :0])
            stop = at + self.chunk - read_bt.shape[1]
            piece_bt = tokens_bt[:, at:stop]
            if not read_bt.shape[1] and piece_bt.shape[1] == self.chunk:
                logits_bto, carried, learned = self._whole(piece_bt, carried, learned)
            else:
                if not read_bt.shape[1] and carried is not None:
                    learned = learned | {"begun": carried}
                with torch.no_grad():
                    logits_bto, carried = functional_call(self.model, self._weights(learned), (piece_bt, carried))
                learned = learned | {"tokens_bt": torch.cat([read_bt, piece_bt], dim=1)}
                if learned["tokens_bt"].shape[1] == self.chunk:
                    _, carried, learned = self._whole(learned["tokens_bt"], learned.get("begun"), learned)
            logits.append(logits_bto)
            at = stop
        return torch.cat(logits, dim=1), (carried or {}) | {"learned": learned}

    def _fresh(self) -> dict[str, Any]:
        rate = RATES[self.which] if self.rate is None else self.rate
        return {
            "n_chunks": 0,
            "rate": torch.tensor(rate, dtype=torch.float64),
            "mean_nats": torch.tensor(0.0, dtype=torch.float64),
        }

    def _weights(self, learned: State) -> dict[str, Tensor]:
        """All weights of the reader; a gradient goes to none of them."""
        own = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        change = {name: leaf for name, leaf in flatten(learned.get("delta", {})).items() if isinstance(leaf, Tensor)}
        return own | {name: own[name] + delta.to(own[name].dtype) for name, delta in change.items()}

    def _whole(
        self, tokens_bt: Tokens, begun: State | None, learned: State
    ) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
        """One forward over a chunk, which predicts it, and what its gradient makes of what was learned."""
        weights = self._weights(learned)
        before = {name: weights[name].requires_grad_() for name in self.names}
        begun = None if begun is None else detach(begun)
        with torch.enable_grad():
            logits_bto, after = functional_call(self.model, weights, (tokens_bt, begun))
            nats = self.loss(logits_bto[:, :-1], tokens_bt[:, 1:]) / (self.chunk - 1)
            found = torch.autograd.grad(nats, list(before.values()), materialize_grads=True)
        rate, mean, n_chunks = learned["rate"], learned["mean_nats"], learned["n_chunks"]
        cost = nats.detach().double().to(mean.device)
        logits_bto, after = logits_bto.detach(), detach(after)
        kept = {"n_chunks": n_chunks, "rate": rate, "mean_nats": mean}
        if "delta" in learned and not float(cost) <= float(mean) + WORSE_NATS:
            return logits_bto, after, kept | {"rate": rate / 2}
        kept |= {"n_chunks": n_chunks + 1, "mean_nats": mean + (cost - mean) / (n_chunks + 1)}
        length = torch.stack([gradient.norm() for gradient in found]).norm()
        factor = float(rate) * (self.clip / length.clamp_min(self.clip))
        own = dict(self.model.named_parameters())
        delta = {
            name: _stored(before[name].detach() - factor * gradient - own[name].detach())
            for name, gradient in zip(before, found, strict=True)
        }
        with torch.no_grad():
            trial_bto, _ = functional_call(self.model, self._weights({"delta": delta}), (tokens_bt, begun))
            is_better = bool(self.loss(trial_bto[:, :-1], tokens_bt[:, 1:]) <= nats * (self.chunk - 1))
            is_near = bool(_divergence(logits_bto, trial_bto).max() <= FAR_NATS)
        is_finite = all(bool(leaf.isfinite().all()) for leaf in delta.values())
        if is_better and is_near and is_finite:
            return logits_bto, after, kept | {"delta": delta}
        return (
            logits_bto,
            after,
            kept | {"rate": rate / 2} | ({"delta": learned["delta"]} if "delta" in learned else {}),
        )


def _divergence(before_bto: Logits, after_bto: Logits) -> Tensor:
    """Nats by which each prediction after a step differs from the one before it, ``KL(before | after)``."""
    before_bto, after_bto = before_bto.double().log_softmax(-1), after_bto.double().log_softmax(-1)
    return (before_bto.exp() * (before_bto - after_bto)).sum(-1)


def _stored(delta: Tensor) -> Tensor:
    """A change as it is kept: in half the bytes where the weights are float32."""
    return delta.bfloat16() if delta.dtype == torch.float32 else delta
