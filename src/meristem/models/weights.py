"""Weights that learn from the text just read, in a change of them that travels with the state of its reader.

A chunk of tokens is predicted by ``W + D``, and then ``D <- D - rate * min(1, clip / |g|) g``, with g the gradient of
the chunk's mean loss at the weights and the memory that the chunk began with, through nothing before it: dynamic
evaluation (Krause et al. 1709.07432, 1904.08378), or test-time training of a language model (2512.23675). So no token
is predicted by weights that have seen it. W never changes. Memories learn as well. Every row has a D of its own.

Where D is not zero, probabilities p of the learning model over V ids are given as ``(1 - e) p + e / V`` with e =
``UNIFORM``; where p is not finite as ``1 / V``. So no token costs more than ``log(V / e)`` nats, whatever was learned.
A guard predicts some chunks by W as well, from the state with which they began, and keeps a balance b of what W + D
cost: ``b <- min(0, b + nats at W - nats at W + D)``, per token of a chunk. Where b is under ``-MARGIN_NATS``, or D is
not finite, D is dropped, and the state after the chunk is the one that W leaves. So one chunk that is much worse ends
what was learned, as do several that are a little worse. The rate is halved then, and is 0 from the ``MOST_DROPS``th
time on, unless D had saved as much since it was zero as a drop can cost, ``MARGIN_NATS + log(V / e)`` for each token of
a chunk: text of another kind drops D as well as a rate that is too large.

State: the model's, and under ``learned`` the change ``delta``, in bfloat16 where the weights are float32, the number of
chunks read, and for each row the rate, the balance, what was saved, the mean cost of its chunks, and the steps since D
was zero.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from meristem.device.random import stream
from meristem.errors import CapabilityError, ShapeError
from meristem.memory.state import State, detach, flatten, join_rows, rows_apart, select_rows, unflatten
from meristem.models.config import LearnConfig
from meristem.nn.mlp import Feedforward, SwiGLU
from meristem.shapes import Hidden, Logits, Targets, Tokens

RATES: Final[Mapping[str, float]] = {"mlp": 1.5, "last_mlp": 1.5, "all": 1.0, "head": 0.5, "low_rank": 4.0}
"""Learning rates that were best for titans-mag on source code that it had not been trained on."""

RANK: Final = 8
"""Columns of what a low-rank change learns for each matrix."""

UNIFORM: Final = 1e-3
"""Share of the uniform distribution in what weights that learn predict."""

MARGIN_NATS: Final = 0.5
"""Nats per token of a chunk by which the balance of what was learned may be negative."""

LIMIT_NATS: Final = 0.5
"""Nats per token by which a chunk may cost more than those before it on average, until it is read without as well."""

CHECK_EVERY: Final = 16
"""Chunks from one that is read without what was learned, whatever it cost, to the next."""

MOST_DROPS: Final = 8
"""How often a change may be dropped that did not pay for it, until its reader learns no more."""

Rows = Float[Tensor, " b"]
Choice = Bool[Tensor, " b"]


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules of a model that holds the same parameters and buffers, not copies of them."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def named_tensors(state: State) -> dict[str, Tensor]:
    """The tensors of a state by the names of parameters, however a file has nested these."""
    return {name: leaf for name, leaf in flatten(state).items() if isinstance(leaf, Tensor)}


def put_rates(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Keep with a model the learning rates that were found for it, by what learns."""
    model.learn_rates = dict(rates)  # type: ignore[assignment]


def rates_of(model: nn.Module) -> Mapping[str, float]:
    """The learning rates that were found for a model; none where nobody looked for them."""
    found: Mapping[str, float] = getattr(model, "learn_rates", {})
    return found


def rate_of(model: nn.Module, learning: LearnConfig) -> float:
    """The learning rate: the one given, else the one found for the model, else the usual one.

    Of the last feed-forward layer it is that of all of them, which was best for it too where both were tried.
    """
    usual = rates_of(model).get(learning.which.removeprefix("last_"), RATES[learning.which])
    return usual if learning.lr is None else learning.lr


class LowRank(nn.Module):
    """``W x + D A x`` beside a linear layer: D ``(b, d, r)`` learns, a change for each row; A is random and stays.

    The r rows of A have length 1 on average. A belongs to ``name`` and is drawn again wherever it is needed.
    """

    down_rd: Tensor
    delta_bdr: Tensor

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.linear = linear
        drawn_rd = torch.randn(RANK, linear.in_features, generator=stream(0, f"weights.low_rank.{name}"))
        down_rd = drawn_rd.to(linear.weight) / math.sqrt(linear.in_features)
        self.register_buffer("down_rd", down_rd, persistent=False)
        self.register_buffer("delta_bdr", linear.weight.new_zeros(1, linear.out_features, RANK), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        low_btr = functional.linear(hidden, self.down_rd)
        return self.linear(hidden) + torch.einsum("btr,bdr->btd", low_btr, self.delta_bdr.to(low_btr.dtype))


@dataclass(frozen=True)
class WeightLearner:
    """A reader whose feed-forward matrices (``mlp``), all weights, or a low-rank part of the former learn.

    A chunk is read once with a gradient, which predicts it, and backward once through the weights that learn. Tokens of
    an unfinished chunk are predicted as they come, and all are read once more when it is full: writing token by token
    therefore costs one forward more. However a text is cut into calls, D is the same to the bit. The loss is that of a
    chunk's tokens after its first.

    The guard reads a chunk at W where it cost over ``LIMIT_NATS`` per token more than those before it on average, and
    every ``CHECK_EVERY`` th. What a text costs more than at W, whose state differs, has no other bound than that of
    each token. Rows learn side by side with ``low_rank`` alone; with the others one text is read at a time.
    """

    model: nn.Module
    learning: LearnConfig = field(default_factory=LearnConfig)
    chunk: int = field(init=False)
    rate: float = field(init=False)
    reader: nn.Module = field(init=False)
    shapes: Mapping[str, tuple[int, ...]] = field(init=False)
    """Of the tensors that are replaced in ``reader``, by name: parameters, or the D of a low-rank change."""

    def __post_init__(self) -> None:
        which, window = self.learning.which, getattr(self.model, "window", None)
        reader, own = sharing_weights(self.model), dict(self.model.named_parameters())
        layers = [(path, layer) for path, layer in reader.named_modules() if isinstance(layer, SwiGLU | Feedforward)]
        names = list(own)
        if which == "mlp":
            names = [f"{path}.{name}" for path, layer in layers for name in sorted(layer.matrices)]
        elif which == "low_rank":
            names = []
            for path, layer in layers:
                for name in sorted(matrix.removesuffix(".weight") for matrix in layer.matrices):
                    setattr(layer, name, LowRank(getattr(layer, name), f"{path}.{name}"))
                    names.append(f"{path}.{name}.delta_bdr")
        if not names:
            raise _lacking(which)
        held = own | dict(reader.named_buffers())
        object.__setattr__(self, "chunk", min(self.learning.chunk, window or self.learning.chunk))
        object.__setattr__(self, "rate", rate_of(self.model, self.learning))
        object.__setattr__(self, "reader", reader)
        object.__setattr__(self, "shapes", {name: tuple(held[name].shape) for name in names})

    def __call__(self, tokens_bt: Tokens, state: State | None = None) -> tuple[Logits, State]:
        if tokens_bt.shape[0] != 1 and self.learning.which != "low_rank":
            raise ShapeError(
                f"{tokens_bt.shape[0]} texts were given at once; with learn.which={self.learning.which} weights learn "
                f"from one. Read them one by one, or set learn.which to head, last_mlp or low_rank.",
                found=tokens_bt.shape[0],
                expected=1,
            )
        return self._read_on(tokens_bt, state)

    @rows_apart
    def _read_on(self, tokens_bt: Tokens, state: State | None = None) -> tuple[Logits, State]:
        carried, learned = _parts(state) or (None, self._fresh(tokens_bt))
        logits, at = [], 0
        while at < tokens_bt.shape[1]:
            read_bt = learned.get("tokens_bt", tokens_bt[:, :0])
            stop = at + self.chunk - read_bt.shape[1]
            piece_bt = tokens_bt[:, at:stop]
            if not read_bt.shape[1] and piece_bt.shape[1] == self.chunk:
                logits_bto, carried, learned = self.learn_chunk(piece_bt, carried, learned)
            else:
                if not read_bt.shape[1] and carried is not None:
                    learned = learned | {"begun": carried}
                with torch.no_grad():
                    logits_bto, carried = self._call(self._weights(learned), piece_bt, carried)
                    logits_bto = mixed(logits_bto, learned["steps_b"])
                learned = learned | {"tokens_bt": torch.cat([read_bt, piece_bt], dim=1)}
                if learned["tokens_bt"].shape[1] == self.chunk:
                    _, carried, learned = self.learn_chunk(learned["tokens_bt"], learned.get("begun"), learned)
            logits.append(logits_bto)
            at = stop
        return torch.cat(logits, dim=1), (carried or {}) | {"learned": learned}

    def _fresh(self, tokens_bt: Tokens) -> State:
        like = next(self.model.parameters())
        return fresh(self.rate, tokens_bt) | {"delta": unflatten(zeros(self._leaves(tokens_bt.shape[0]), like))}

    def _leaves(self, batch: int) -> dict[str, tuple[int, ...]]:
        """The shapes of D by name; the first axis is that of rows, as the end of the name says."""
        if self.learning.which == "low_rank":
            return {name: (batch, *shape[1:]) for name, shape in self.shapes.items()}
        return {f"{name}_b": (1, *shape) for name, shape in self.shapes.items()}

    def _weights(self, learned: State) -> dict[str, Tensor]:
        """What stands in ``reader`` in place of its own tensors."""
        delta = named_tensors(learned["delta"])
        if self.learning.which == "low_rank":
            like = next(self.model.parameters())
            return {name: delta[name].to(like.dtype) for name in self.shapes}
        own = {name: self.model.get_parameter(name).detach() for name in self.shapes}
        return {name: delta[f"{name}_b"][0].to(weight.dtype) + weight for name, weight in own.items()}

    def _call(self, weights: Mapping[str, Tensor], tokens_bt: Tokens, state: State | None) -> tuple[Tensor, State]:
        found: tuple[Tensor, State] = functional_call(
            self.reader, dict(weights), (tokens_bt, state), tie_weights=self.learning.which == "all"
        )
        return found

    def moved(self, learned: State) -> nn.Module:
        """The model with W + D in the place of what learns; all else it shares. A low-rank change is no weight of a
        model, so that there is none with it."""
        model = sharing_weights(self.model)
        for name, weight in self._weights(learned).items():
            path, _, own = name.rpartition(".")
            setattr(model.get_submodule(path), own, nn.Parameter(weight, requires_grad=False))
        return model

    def learn_chunk(self, tokens_bt: Tokens, begun: State | None, learned: State) -> tuple[Logits, State, State]:
        """Logits of a whole chunk from the state that it begins with, that after it, and what is learned then."""
        begun = None if begun is None else detach(begun)
        leaves = {name: leaf.requires_grad_() for name, leaf in self._weights(learned).items()}
        with torch.enable_grad():
            logits_bto, after = self._call(leaves, tokens_bt, begun)
            nats_bt = nats_of(logits_bto[:, :-1], tokens_bt[:, 1:])
            found = torch.autograd.grad(nats_bt.mean(1).sum(), list(leaves.values()), materialize_grads=True)
        logits_bto, after, nats_bt = logits_bto.detach(), detach(after), nats_bt.detach()
        steps_b = learned["steps_b"]
        cost_b = paid(nats_bt, logits_bto.shape[-1], steps_b)
        n_like = 1 if (learned["n_chunks"] + 1) % CHECK_EVERY else CHECK_EVERY
        is_due_b = torch.full_like(steps_b, n_like == CHECK_EVERY, dtype=torch.bool)
        is_due_b |= ~(cost_b <= learned["mean_nats_b"] + LIMIT_NATS)
        is_due_b &= steps_b > 0
        static_b = cost_b
        if bool(is_due_b.any()):
            with torch.no_grad():
                static_bto, left = self.model(tokens_bt, begun)
            read_b = nats_of(static_bto[:, :-1], tokens_bt[:, 1:]).mean(1)
            static_b = torch.where(is_due_b, read_b.to(cost_b.dtype), cost_b)
        gradients = dict(zip(self._leaves(len(tokens_bt)), found, strict=True))
        if self.learning.which != "low_rank":
            gradients = {name: gradient[None] for name, gradient in gradients.items()}
        how = {"first_rate": self.rate, "clip": self.learning.grad_clip, "lost_nats": lost_nats(logits_bto.shape[-1])}
        stepped, is_worse_b = step(learned, gradients, (cost_b, static_b), **how, n_like=n_like)
        if bool(is_worse_b.any()):
            rows = [row + len(tokens_bt) * is_worse for row, is_worse in enumerate(is_worse_b.tolist())]
            after = select_rows(join_rows([after, left]), rows)
        return mixed(logits_bto, steps_b), after, stepped


class Nothing(nn.Module):
    """In the place of a layer that is computed apart: it adds nothing to what it is given."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(())


@dataclass(frozen=True)
class Tail:
    """The last part of a model, whose weights learn: from the vectors that it is given to logits.

    body: the model without it, which gives these vectors. weights: those that learn, by the names of their changes.
    read: the logits, where other weights ``(b, out, in)``, or those of the model ``(out, in)``, are in their place.
    pull: the same, and a function from a gradient with respect to the logits to those with respect to the weights.
    """

    body: nn.Module
    weights: Mapping[str, Tensor]
    read: Callable[[Hidden, Mapping[str, Tensor]], Logits]
    pull: Callable[[Hidden, Mapping[str, Tensor]], tuple[Logits, Callable[[Logits], Mapping[str, Tensor]]]]


def head_of(model: nn.Module) -> Tail:
    """The head: logits ``W h + b`` of the vectors h that the model gives it."""
    weight_od, bias_o = _head(model)
    body = sharing_weights(model)
    body.head = nn.Identity()

    def read(hidden_btd: Hidden, own: Mapping[str, Tensor]) -> Logits:
        return _linear(hidden_btd, own["head_bod"], bias_o)

    def pull(hidden_btd: Hidden, own: Mapping[str, Tensor]) -> tuple[Logits, Callable[[Logits], Mapping[str, Tensor]]]:
        logits_bto = read(hidden_btd, own)
        # Not by autograd, which would give a transposed view, and all that is done with it would be slow.
        return logits_bto, lambda wrong_bto: {"head_bod": wrong_bto.mT @ hidden_btd.to(wrong_bto.dtype)}

    return Tail(body, {"head_bod": weight_od}, read, pull)


def last_mlp_of(model: nn.Module) -> Tail:
    """The last feed-forward layer, behind which stand a norm and the head alone: ``head(norm(x + mlp(mlp_norm(x))))``.

    The vectors x are those of the residual stream before it.
    """
    block = list(getattr(model, "blocks", [None]))[-1]
    mlp, norm = getattr(block, "mlp", None), getattr(block, "mlp_norm", None)
    is_last = getattr(model, "join", model) is None and not getattr(model, "n_masked", 0)
    if not is_last or norm is None or not isinstance(mlp, SwiGLU | Feedforward):
        raise _lacking("last_mlp")
    whole: Any = model
    body: Any = sharing_weights(model)
    body.blocks[-1].mlp, body.norm, body.head = Nothing(), nn.Identity(), nn.Identity()
    up = mlp.gate_up if isinstance(mlp, SwiGLU) else mlp.up

    def read(hidden_btd: Hidden, own: Mapping[str, Tensor]) -> Logits:
        inner_btf = mlp.inner(_linear(norm(hidden_btd), own["up_bfd"], up.bias))
        logits_bto: Logits = whole.readout(hidden_btd + _linear(inner_btf, own["out_bdf"], mlp.out.bias))
        return logits_bto

    def pull(hidden_btd: Hidden, own: Mapping[str, Tensor]) -> tuple[Logits, Callable[[Logits], Mapping[str, Tensor]]]:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in own.items()}
        with torch.enable_grad():
            logits_bto = read(hidden_btd, leaves)

        def gradients(wrong_bto: Logits) -> Mapping[str, Tensor]:
            found = torch.autograd.grad(logits_bto, list(leaves.values()), wrong_bto)
            return dict(zip(leaves, found, strict=True))

        return logits_bto.detach(), gradients

    return Tail(body, {"up_bfd": up.weight, "out_bdf": mlp.out.weight}, read, pull)


TAILS: Final[Mapping[str, Callable[[nn.Module], Tail]]] = {"head": head_of, "last_mlp": last_mlp_of}


@dataclass(frozen=True)
class TailLearner:
    """A reader whose last part learns: the head, or the last feed-forward layer.

    What the rest of the model gives it does not depend on D, nor does any memory, so a call reads its text at once,
    however many chunks it holds. The gradient of a chunk needs a backward pass through the last part alone, and is
    taken once the token after the chunk is there; of the head it is ``mean_t (softmax(z_t) - onehot(x_(t+1))) h_t^T``.
    Rows learn side by side.

    The guard compares every chunk with W. From one drop of D to the next, W + D cost at most ``chunk * MARGIN_NATS``
    nats more than W, as the balance is at most what they have saved, and in the last chunk, after which D is dropped or
    which is unfinished, at most ``chunk * log(V / UNIFORM)`` more: together L. Where they had saved L before, they cost
    nothing more; all other drops halve the rate, and there are at most ``MOST_DROPS``. So a text of any length costs at
    most ``(MOST_DROPS + 1) * L`` nats more than at W (``most_lost``).
    """

    model: nn.Module
    learning: LearnConfig = field(default_factory=LearnConfig)
    rate: float = field(init=False)
    tail: Tail = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tail", TAILS[self.learning.which](self.model))
        object.__setattr__(self, "rate", rate_of(self.model, self.learning))

    @rows_apart
    @torch.no_grad()
    def __call__(self, tokens_bt: Tokens, state: State | None = None) -> tuple[Logits, State]:
        carried, learned = _parts(state) or (None, self._fresh(tokens_bt))
        hidden_btd, carried = self.tail.body(tokens_bt, carried)
        logits_bto, learned, _ = self.read_tail(hidden_btd, tokens_bt, learned)
        return logits_bto, carried | {"learned": learned}

    @torch.no_grad()
    def read_tail(
        self, hidden_btd: Hidden, tokens_bt: Tokens, learned: State, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[Logits, State, Mapping[str, Tensor]]:
        """Logits of the vectors that the last part is given for these tokens, what is learned then, and W + D of it.

        weights: W + D of ``learned``, where they are known. Rows are alike.
        """
        n_seen, chunk = 0, self.learning.chunk
        if "hidden_btd" in learned:
            n_seen = learned["hidden_btd"].shape[1]
            hidden_btd = torch.cat([learned["hidden_btd"], hidden_btd], dim=1)
            tokens_bt = torch.cat([learned["tokens_bt"], tokens_bt], dim=1)
        logits = []
        while hidden_btd.shape[1] > chunk:
            logits_bto, learned = self._whole(hidden_btd[:, :chunk], tokens_bt[:, 1 : chunk + 1], learned, n_seen)
            logits.append(logits_bto)
            hidden_btd, tokens_bt, n_seen, weights = hidden_btd[:, chunk:], tokens_bt[:, chunk:], 0, None
        weights = weights or self._weights(learned)
        logits.append(mixed(self.tail.read(hidden_btd[:, n_seen:], weights), learned["steps_b"]))
        learned = learned | {"hidden_btd": hidden_btd.clone(), "tokens_bt": tokens_bt.clone()}
        return torch.cat(logits, dim=1), learned, weights

    def _fresh(self, tokens_bt: Tokens) -> State:
        own = self.tail.weights
        shapes = {name: (len(tokens_bt), *weight.shape) for name, weight in own.items()}
        return fresh(self.rate, tokens_bt) | {"delta": zeros(shapes, next(iter(own.values())))}

    def _weights(self, learned: State) -> dict[str, Tensor]:
        own = self.tail.weights
        return {name: learned["delta"][name].to(weight.dtype).add(weight.detach()) for name, weight in own.items()}

    def _whole(self, hidden_btd: Hidden, targets_bt: Targets, learned: State, n_seen: int) -> tuple[Tensor, State]:
        """The logits of a chunk after its first ``n_seen``, and what its gradient makes of what was learned."""
        steps_b, at_bto = learned["steps_b"], targets_bt[..., None]
        static_bto = self.tail.read(hidden_btd, self.tail.weights)
        static_b = nats_of(static_bto, targets_bt).mean(1).to(steps_b.dtype)
        logits_bto, gradients = self.tail.pull(hidden_btd, self._weights(learned))
        share_bto = wide(logits_bto).softmax(-1)
        n_ids = share_bto.shape[-1]
        cost_b = -smoothed(share_bto.gather(-1, at_bto), n_ids).log().mean((1, 2)).to(steps_b.dtype)
        costs = (torch.where(steps_b > 0, cost_b, static_b), static_b)
        mixed_bto = mixed(logits_bto[:, n_seen:], steps_b, share_bto[:, n_seen:])
        wrong_bto = share_bto.scatter_add_(-1, at_bto, torch.full_like(at_bto, -1, dtype=share_bto.dtype))
        wrong_bto = wrong_bto.div_(targets_bt.shape[1]).to(logits_bto.dtype)
        lost, clip = lost_nats(n_ids), self.learning.grad_clip
        stepped, _ = step(learned, gradients(wrong_bto), costs, first_rate=self.rate, clip=clip, lost_nats=lost)
        return mixed_bto, stepped


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer by a matrix of each row, ``(b, out, in)``, or by one of all, ``(out, in)``."""
    if weight.ndim == 2 or len(weight) == 1:
        # Of rows alone: what is a piece of a longer text, or has a matrix for each of one row, torch multiplies as a
        # batch of one, in three times the time.
        found = functional.linear(hidden.flatten(0, -2), weight.flatten(0, -2).to(hidden.dtype), bias)
        return found.unflatten(0, hidden.shape[:-1])
    found_btf = torch.einsum("btd,bfd->btf", hidden, weight.to(hidden.dtype))
    return found_btf if bias is None else found_btf + bias


def fresh(rate: float, tokens_bt: Tokens) -> State:
    """What is known of the learning of rows that have read nothing."""
    zeros_b = torch.zeros(len(tokens_bt), device=tokens_bt.device)
    names = ("balance_b", "saved_b", "mean_nats_b", "steps_b")
    return {"n_chunks": 0, "rate_b": torch.full_like(zeros_b, rate)} | dict.fromkeys(names, zeros_b)


def zeros(shapes: Mapping[str, tuple[int, ...]], like: Tensor) -> dict[str, Tensor]:
    """A change that changes nothing, as it is kept."""
    return {name: _stored(like.new_zeros(shape)) for name, shape in shapes.items()}


def step(
    learned: State,
    gradients: Mapping[str, Tensor],
    costs: tuple[Rows, Rows],
    *,
    first_rate: float,
    clip: float,
    lost_nats: float,
    n_like: int = 1,
) -> tuple[State, Choice]:
    """What is learned after a chunk, and in which rows the guard dropped it for its cost.

    costs: nats per token that the chunk cost each row, and that it cost at W. first_rate: that of a fresh reader.
    lost_nats: per token of a chunk, what a drop can cost. n_like: chunks for which this one stands in what was saved.
    """
    (cost_b, static_b), rate_b, delta = costs, learned["rate_b"], named_tensors(learned["delta"])
    balance_b = (learned["balance_b"] + static_b - cost_b).clamp_max(0)
    saved_b = learned["saved_b"] + n_like * (static_b - cost_b)
    # A cost that is no number compares with nothing, and counts as worse.
    is_worse_b = ~(balance_b >= -MARGIN_NATS) & (learned["steps_b"] > 0)
    length_b = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients.values()]).norm(dim=0)
    factor_b = rate_b.to(length_b.dtype) * clip / length_b.clamp_min(clip)
    moved = {
        name: delta[name].to(gradient.dtype, copy=True).addcmul_(_by_row(factor_b, gradient), gradient, value=-1)
        for name, gradient in gradients.items()
    }
    is_finite_b = torch.stack([leaf.flatten(1).norm(dim=1) for leaf in moved.values()]).isfinite().all(0)
    is_dropped_b = is_worse_b | ~is_finite_b
    if bool(is_dropped_b.any()):
        moved = {name: torch.where(_by_row(is_dropped_b, leaf), 0, leaf) for name, leaf in moved.items()}
        rate_b = torch.where(is_dropped_b & ~(learned["saved_b"] >= lost_nats), rate_b / 2, rate_b)
        rate_b = torch.where(rate_b > first_rate * 2**-MOST_DROPS, rate_b, 0)
    n_chunks, mean_b = learned["n_chunks"] + 1, learned["mean_nats_b"]
    after = {
        "n_chunks": n_chunks,
        "rate_b": rate_b,
        "balance_b": torch.where(is_dropped_b, 0, balance_b),
        "saved_b": torch.where(is_dropped_b, 0, saved_b),
        "mean_nats_b": mean_b + (torch.where(is_worse_b, static_b, cost_b) - mean_b) / n_chunks,
        "steps_b": torch.where(is_dropped_b | (rate_b == 0), 0, learned["steps_b"] + 1),
        "delta": unflatten({name: _stored(leaf) for name, leaf in moved.items()}),
    }
    return after, is_worse_b


def lost_nats(n_ids: int) -> float:
    """What the drop of a change can cost, in nats for each token of a chunk."""
    return MARGIN_NATS + math.log(n_ids / UNIFORM)


def most_lost(chunk: int, n_ids: int) -> float:
    """Nats that a head which learns may cost more than one that does not, over a text of any length."""
    return (MOST_DROPS + 1) * chunk * lost_nats(n_ids)


def wide(logits_bto: Logits) -> Logits:
    """In float32 at least."""
    return logits_bto.to(torch.promote_types(logits_bto.dtype, torch.float32))


def nats_of(logits_bto: Logits, targets_bt: Targets) -> Float[Tensor, "b t"]:
    """What each target costs."""
    logits_no = wide(logits_bto).flatten(0, 1)
    return functional.cross_entropy(logits_no, targets_bt.flatten(), reduction="none").view_as(targets_bt)


def smoothed(share: Tensor, n_ids: int) -> Tensor:
    """Shares of ids, with that of the uniform distribution in them."""
    return share.mul(1 - UNIFORM).add_(UNIFORM / n_ids)


def mixed(logits_bto: Logits, steps_b: Rows, share_bto: Logits | None = None) -> Logits:
    """Logits with a share of the uniform distribution, in rows that have learned something.

    share_bto: their softmax, where it is known.
    """
    has_learned_b = steps_b > 0
    if not bool(has_learned_b.any()):
        return logits_bto
    share_bto = wide(logits_bto).softmax(-1) if share_bto is None else share_bto
    n_ids, is_number_bt = logits_bto.shape[-1], share_bto.sum(-1) > 0
    if not bool(is_number_bt.all()):
        share_bto = share_bto.where(is_number_bt[..., None], 1 / n_ids)
    mixed_bto = smoothed(share_bto, n_ids).log_().to(logits_bto.dtype)
    if bool(has_learned_b.all()):
        return mixed_bto
    return torch.where(_by_row(has_learned_b, logits_bto), mixed_bto, logits_bto)


def paid(nats_bt: Float[Tensor, "b t"], n_ids: int, steps_b: Rows) -> Rows:
    """The mean cost of targets under ``mixed`` logits, from what they cost before; not a number where one was not."""
    mixed_bt = -smoothed((-nats_bt).exp(), n_ids).log()
    return torch.where(_by_row(steps_b > 0, nats_bt), mixed_bt, nats_bt).mean(1).to(steps_b.dtype)


def _parts(state: State | None) -> tuple[State, State] | None:
    """What the model carries, and what was learned."""
    if state is None:
        return None
    return {name: leaf for name, leaf in state.items() if name != "learned"}, state["learned"]


def _head(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Matrix and bias of the head; the matrix is that of the embedding where they are tied."""
    head = getattr(model, "embedding" if getattr(model, "head", model) is None else "head", None)
    if not isinstance(head, nn.Linear | nn.Embedding):
        raise _lacking("head")
    if getattr(model, "n_masked", 0):
        raise CapabilityError(
            f"the last {model.n_masked} tokens of this model's vocabulary are not in use yet, and a head that learns "
            f"would use them. Activate them first, or set learn.which to another.",
            operation="learn",
            reason="masked tokens",
        )
    return head.weight, getattr(head, "bias", None)


def _by_row(value_b: Tensor, like: Tensor) -> Tensor:
    return value_b.reshape(-1, *[1] * (like.ndim - 1))


def _stored(delta: Tensor) -> Tensor:
    """A change as it is kept: in half the bytes where the weights are float32."""
    return delta.bfloat16() if delta.dtype == torch.float32 else delta


def _lacking(which: str) -> CapabilityError:
    return CapabilityError(
        f"this model has no weights '{which}' that could learn. Choose another learn.which of {', '.join(RATES)}, or "
        f"let its memory learn (learn=memory).",
        operation="learn",
        reason=f"no {which}",
    )
