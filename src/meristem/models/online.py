"""Ways to read: with a frozen memory, with one that learns, or with levels or other weights that learn as well.

Each is called as a model is, ``reader(tokens_bt, state) -> (logits_bto, state)``; the model's weights never change.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meristem.errors import CapabilityError, ShapeError
from meristem.memory.state import State, detach
from meristem.models.config import LearnConfig
from meristem.models.weights import TAILS, TailLearner, WeightLearner, named_tensors, sharing_weights
from meristem.nn.cms_mlp import CMSMLPLevel
from meristem.shapes import Logits, Tokens

Learn = Literal["none", "memory", "levels", "weights"]
LEARNED: Final = "learned"
"""Where the state of a reader holds what its levels learned."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits and targets to the nats of all targets together: ``train.loss.cross_entropy``."""


@runtime_checkable
class Writing(Protocol):
    """A layer that writes the memories it reads, unless ``is_writing`` is False."""

    is_writing: bool


def online_reader(
    model: nn.Module, learn: Learn, loss: Loss, learning: LearnConfig | None = None
) -> Callable[[Tokens, State | None], tuple[Logits, State]]:
    """The model as it is read while ``learn`` of it learns; weights as ``learning`` says, or as its defaults do."""
    if learn == "weights":
        learning = learning or LearnConfig()
        return (TailLearner if learning.which in TAILS else WeightLearner)(model, learning)
    if learn == "levels":
        return OnlineLearner(model, loss)
    return frozen(model) if learn == "none" else model


def frozen(model: nn.Module) -> nn.Module:
    """The same model with memories that are read and never written. It shares the weights."

    For a state S, however it came about, each token t of ``frozen(model)(tokens_bt, S)`` reads of every memory what the
    learning model would read next at S if nothing were written: ``f(M, q_t)`` where that reads M as the tokens before
    left it, and the copy of the last border where it reads that (levels with tokens ``each``, the makers of a
    self-reference). Cached memories are read as well. Segment ends that tokens of S have completed count, as they would
    for the next token; tokens read here complete none: no memory is written, cached, replaced or reset by them.

    All else moves on with each token: keys and values of attention, tails of convolutions, means over periods and
    the last outputs of slow levels, and segments of MAC, where a new segment is given the memory as it
    stands. Persistent tokens are written into a fresh memory also here: they are weights of the model.
    """
    reader = sharing_weights(model)
    for module in reader.modules():
        if isinstance(module, Writing):
            module.is_writing = False
    return reader


@dataclass(frozen=True)
class OnlineLearner:
    """Feed-forward levels that learn from the text just read, in a copy that travels with the state (CMS, online).

    After every ``chunk`` tokens the gradient g of their next-token loss, at the weights and the memory that the chunk
    began with, is added to what waits for each level. Level l then moves, where the tokens read are a multiple of its
    period C_l, by ``w <- w - rate * min(1, clip / |G|) G`` with G the sum that waited (Nested Learning 2512.24695, eq.
    71; memory.md 6.2). A token is never judged by weights that have seen it. Memories learn too.

    The state is the model's, and under ``learned`` what has moved, what waits, the tokens of the unfinished chunk, and
    the state at its beginning. One text is read at a time.
    """

    model: nn.Module
    loss: Loss
    rate: float = 0.02
    clip: float = 1.0
    chunk: int = 64
    periods: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        periods = dict(_periods(self.model))
        if not periods:
            raise CapabilityError(
                "this model has no feed-forward levels that could learn. Train one with model.mlp=levels, such as the "
                "preset hope, or let its memory learn (learn=memory).",
                operation="learn",
                reason="no levels",
            )
        object.__setattr__(self, "periods", periods)

    def __call__(self, tokens_bt: Tokens, state: State | None = None) -> tuple[Logits, State]:
        if tokens_bt.shape[0] != 1:
            raise ShapeError(
                f"{tokens_bt.shape[0]} texts were given at once; levels learn from one, in a copy of their own. Read "
                f"them one by one.",
                found=tokens_bt.shape[0],
                expected=1,
            )
        carried = None if state is None else {name: leaf for name, leaf in state.items() if name != LEARNED}
        learned: dict[str, Any] = {"n_tokens": 0} if state is None else state[LEARNED]
        logits, at = [], 0
        while at < tokens_bt.shape[1]:
            read_bt = learned.get("tokens_bt", tokens_bt[:, :0])
            stop = at + self.chunk - read_bt.shape[1]
            piece_bt = tokens_bt[:, at:stop]
            if carried is not None and not read_bt.shape[1]:
                learned = learned | {"begun": carried}
            logits_bto, carried = functional_call(
                self.model, named_tensors(learned.get("moved", {})), (piece_bt, carried)
            )
            logits.append(logits_bto)
            learned = learned | {"tokens_bt": torch.cat([read_bt, piece_bt], dim=1)}
            if learned["tokens_bt"].shape[1] == self.chunk:
                learned = self._stepped(learned)
            at = stop
        return torch.cat(logits, dim=1), (carried or {}) | {LEARNED: learned}

    def _stepped(self, learned: dict[str, Any]) -> dict[str, Any]:
        """What is learned once a chunk is full."""
        tokens_bt, n_tokens = learned["tokens_bt"], learned["n_tokens"] + self.chunk
        own, moved = dict(self.model.named_parameters()), named_tensors(learned.get("moved", {}))
        weights = {name: moved.get(name, own[name]).detach().requires_grad_() for name in self.periods}
        with torch.enable_grad():
            begun = detach(learned["begun"]) if "begun" in learned else None
            logits_bto, _ = functional_call(self.model, weights, (tokens_bt[:, :-1], begun))
            nats = self.loss(logits_bto, tokens_bt[:, 1:])
            # A slow level that reads means has said nothing before the first of them is whole.
            found = torch.autograd.grad(nats, list(weights.values()), materialize_grads=True)
        before = named_tensors(learned.get("waiting", {}))
        waiting = {name: before.get(name, 0) + gradient for name, gradient in zip(weights, found, strict=True)}
        due = {period for period in self.periods.values() if n_tokens % period == 0}
        for period in sorted(due):
            names = [name for name, each in self.periods.items() if each == period]
            length = torch.stack([waiting[name].norm() for name in names]).norm()
            factor = self.rate * (self.clip / length.clamp_min(self.clip))
            moved = moved | {name: (weights[name] - factor * waiting.pop(name)).detach() for name in names}
        return {"n_tokens": n_tokens, "moved": moved, "waiting": waiting}


def _periods(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The parameters of feed-forward levels by name, each with the period of its level."""
    for path, module in model.named_modules():
        if isinstance(module, CMSMLPLevel):
            for name, _ in module.named_parameters(prefix=path):
                yield name, module.period
