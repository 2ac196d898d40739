"""Where a memory keeps what it knows, and how it recalls.

A structure never touches its weights: it calls for products with them (``Weights``). With the weights of one moment it
is the plain meaning of a rule; with weights that change from row to row it is the same rule in a parallel form. Each
surprise is a sum of outer products, one pair of vectors per row and weight tensor (memory.md 2.4), and is stored so.

Rows: ``_bhck``, one per token, c of them for every head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from meristem.errors import WrongValue
from meristem.memory.state import Memory
from meristem.plugins import Registry

Factor: TypeAlias = tuple[Tensor, Tensor]
"""Rows a and d: the gradient of a weight tensor is the sum over rows of the outer product of a and d."""
Surprise: TypeAlias = dict[str, Factor]
Pullback: TypeAlias = Callable[[Tensor], Surprise]
"""From the gradient at the recalled rows to the surprise of every weight tensor."""


@dataclass(frozen=True)
class Pairs:
    """What is to be written: keys, values and, for slots, the code of each row."""

    key_bhck: Tensor
    value_bhcv: Tensor
    code_bhcg: Tensor | None = None


class Weights(Protocol):
    """Products of rows with the weights of a memory."""

    def matmul(self, name: str, rows: Tensor) -> Tensor:
        """Rows times the stored tensor: its first axis is contracted."""
        ...

    def matmul_t(self, name: str, rows: Tensor) -> Tensor:
        """Rows times its transpose: its second axis is contracted."""
        ...


@dataclass(frozen=True)
class Live:
    """The weights as they are."""

    memory: Memory

    def matmul(self, name: str, rows: Tensor) -> Tensor:
        return rows @ self.memory[name]

    def matmul_t(self, name: str, rows: Tensor) -> Tensor:
        return rows @ self.memory[name].mT


class Structure(Protocol):
    """The weight tensors of a memory. Their names carry their axes and are their names in checkpoints."""

    kind: ClassVar[str]

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the tensors that surprise, retention and update act on; a memory may carry others beside them."""
        ...

    @property
    def n_codes(self) -> int:
        """How many slots the code gate has to address; 0 where there are none."""
        ...

    @property
    def used(self) -> tuple[str, ...]:
        """Which of query, key and value recall and surprise depend on."""
        ...

    def init(self, batch: int, heads: int, key_width: int, value_width: int, like: Tensor) -> Memory:
        """First weights, in the dtype and on the device of ``like``, the same for all rows of the batch."""
        ...

    def address(self, key: Tensor) -> Tensor:
        """What the one matrix of a linear memory is multiplied with."""
        ...

    def recall(self, weights: Weights, query: Tensor) -> Tensor:
        """The memory's output for each query."""
        ...

    def vjp(self, weights: Weights, pairs: Pairs) -> tuple[Tensor, Tensor, Pullback]:
        """What is recalled for each pair, what should have been, and the map from a gradient to the surprise."""
        ...


@dataclass(frozen=True)
class Matrix:
    """One matrix per head: recall is ``M k``; the stored tensor is M transposed."""

    kind: ClassVar[str] = "matrix"
    weights: tuple[str, ...] = ("matrix_bhkv",)
    n_codes: int = 0
    used: tuple[str, ...] = ("query", "key", "value")

    def init(self, batch: int, heads: int, key_width: int, value_width: int, like: Tensor) -> Memory:
        return {self.weights[0]: like.new_zeros(batch, heads, key_width, value_width)}

    def address(self, key: Tensor) -> Tensor:
        return key

    def recall(self, weights: Weights, query: Tensor) -> Tensor:
        return weights.matmul(self.weights[0], self.address(query))

    def vjp(self, weights: Weights, pairs: Pairs) -> tuple[Tensor, Tensor, Pullback]:
        address_bhck = self.address(pairs.key_bhck)
        recalled_bhcv = weights.matmul(self.weights[0], address_bhck)
        return recalled_bhcv, pairs.value_bhcv, lambda gradient: {self.weights[0]: (address_bhck, gradient)}


@dataclass(frozen=True)
class Vector:
    """One value per head, whatever the key: a matrix whose every key is the number 1, so that all forms take it."""

    kind: ClassVar[str] = "vector"
    weights: tuple[str, ...] = ("vector_bhkv",)
    n_codes: int = 0
    used: tuple[str, ...] = ("value",)

    def init(self, batch: int, heads: int, key_width: int, value_width: int, like: Tensor) -> Memory:
        return {self.weights[0]: like.new_zeros(batch, heads, 1, value_width)}

    def address(self, key: Tensor) -> Tensor:
        return torch.ones_like(key[..., :1])

    def recall(self, weights: Weights, query: Tensor) -> Tensor:
        return Matrix(self.weights).recall(weights, self.address(query))

    def vjp(self, weights: Weights, pairs: Pairs) -> tuple[Tensor, Tensor, Pullback]:
        return Matrix(self.weights).vjp(weights, Pairs(self.address(pairs.key_bhck), pairs.value_bhcv))


@dataclass(frozen=True)
class Mlp:
    """``f(k) = k + W_n gelu(... gelu(W_1 k))`` without biases; the term k only where key and value width are equal.

    n_layers: weight matrices, 2 or more. expand: hidden width over key width.
    is_normed: LayerNorm, without gain, on what is added to k (MIRAS 2504.13173, section 5.3; TTT 2407.04620).
    is_gated: ``W_2 (gelu(W_1 k) * W_3 k)`` (Atlas 2505.23735, section 5), with two layers only.
    """

    kind: ClassVar[str] = "mlp"
    n_layers: int = 2
    expand: int = 4
    is_normed: bool = False
    is_gated: bool = False
    n_codes: int = 0
    used: tuple[str, ...] = ("query", "key", "value")

    def __post_init__(self) -> None:
        if self.n_layers < 2 or self.expand < 1 or (self.is_gated and self.n_layers != 2):
            raise WrongValue(
                f"an MLP memory has n_layers {self.n_layers} and expand {self.expand}; expected 2 or more layers, two "
                f"where it is gated, and expand 1 or more. One layer is the structure 'matrix'."
            )

    @property
    def inner(self) -> tuple[str, ...]:
        """The weights before the last, in order."""
        return ("in_bhkf", *(f"hidden{index}_bhff" for index in range(1, self.n_layers - 1)))

    @property
    def weights(self) -> tuple[str, ...]:
        gate = ("gate_bhkf",) if self.is_gated else ()
        return (*self.inner, *gate, "out_bhfv")

    def init(self, batch: int, heads: int, key_width: int, value_width: int, like: Tensor) -> Memory:
        hidden = self.expand * key_width
        shapes = {name: (key_width if name.endswith("kf") else hidden, hidden) for name in self.weights}
        shapes["out_bhfv"] = (hidden, value_width)
        # Random, never all zero: with both matrices zero no gradient ever leaves the saddle.
        first = {name: like.new_empty(heads, *shape) for name, shape in shapes.items()}
        for weight_hff in first.values():
            for matrix_ff in weight_hff:
                torch.nn.init.xavier_uniform_(matrix_ff)
        return {name: weight[None].expand(batch, *weight.shape).clone() for name, weight in first.items()}

    def address(self, key: Tensor) -> Tensor:
        raise TypeError("an MLP memory has no one matrix")

    def recall(self, weights: Weights, query: Tensor) -> Tensor:
        return self._output(query, self._forward(weights, query)[-1])

    def vjp(self, weights: Weights, pairs: Pairs) -> tuple[Tensor, Tensor, Pullback]:
        slopes, curved, gate_bhcf, last_bhcf, added_bhcv = self._forward(weights, pairs.key_bhck)

        def pull(gradient_bhcv: Tensor) -> Surprise:
            if self.is_normed:
                gradient_bhcv = _pull_norm(added_bhcv, gradient_bhcv)
            surprise: Surprise = {"out_bhfv": (last_bhcf, gradient_bhcv)}
            gradient_bhcf = weights.matmul_t("out_bhfv", gradient_bhcv)
            if gate_bhcf is not None:
                surprise["gate_bhkf"] = (pairs.key_bhck, gradient_bhcf * curved[-1])
                gradient_bhcf = gradient_bhcf * gate_bhcf
            inputs = [pairs.key_bhck, *curved[:-1]]
            for name, rows, slope_bhcf in reversed(list(zip(self.inner, inputs, slopes, strict=True))):
                gradient_bhcf = gradient_bhcf * slope_bhcf
                surprise[name] = (rows, gradient_bhcf)
                if name != self.inner[0]:
                    gradient_bhcf = weights.matmul_t(name, gradient_bhcf)
            return {name: surprise[name] for name in self.weights}

        return self._output(pairs.key_bhck, added_bhcv), pairs.value_bhcv, pull

    def _forward(
        self, weights: Weights, key_bhck: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor, Tensor]:
        """The slope and the value of every GELU, the gate, what the last layer is given, and what it adds."""
        slopes, curved, rows = [], [], key_bhck
        for name in self.inner:
            rows, slope_bhcf = Gelu.apply(weights.matmul(name, rows))
            slopes.append(slope_bhcf)
            curved.append(rows)
        gate_bhcf = weights.matmul("gate_bhkf", key_bhck) if self.is_gated else None
        last_bhcf = rows if gate_bhcf is None else rows * gate_bhcf
        return slopes, curved, gate_bhcf, last_bhcf, weights.matmul("out_bhfv", last_bhcf)

    def _output(self, key_bhck: Tensor, added_bhcv: Tensor) -> Tensor:
        if self.is_normed:
            added_bhcv = functional.layer_norm(added_bhcv, added_bhcv.shape[-1:])
        return added_bhcv + key_bhck if added_bhcv.shape == key_bhck.shape else added_bhcv


@dataclass(frozen=True)
class Slots:
    """Rows ``s_i`` of unit length; recall is ``sum_i softmax(S q)_i s_i`` (Lattice 2504.05646), values as wide as keys.

    written: what a code c and a pair are for: ``decode`` makes ``S^T c`` the value, ``encode`` makes ``S k`` the code.
    """

    kind: ClassVar[str] = "slots"
    n_slots: int = 16
    written: Literal["decode", "encode"] = "decode"
    weights: tuple[str, ...] = ("slots_bhgk",)

    @property
    def n_codes(self) -> int:
        return self.n_slots

    @property
    def used(self) -> tuple[str, ...]:
        return ("query", "value" if self.written == "decode" else "key")

    def init(self, batch: int, heads: int, key_width: int, value_width: int, like: Tensor) -> Memory:
        if key_width != value_width:
            raise WrongValue(
                f"slots hold keys of width {key_width} and the values have width {value_width}; expected one "
                f"width. Choose equal widths, or the structure 'two_slots'."
            )
        return {"slots_bhgk": _spread_out(batch, heads, self.n_slots, key_width, like)}

    def address(self, key: Tensor) -> Tensor:
        raise TypeError("slots have no one matrix")

    def recall(self, weights: Weights, query: Tensor) -> Tensor:
        return weights.matmul("slots_bhgk", weights.matmul_t("slots_bhgk", query).softmax(dim=-1))

    def vjp(self, weights: Weights, pairs: Pairs) -> tuple[Tensor, Tensor, Pullback]:
        code_bhcg = _code(pairs)
        if self.written == "decode":
            recalled_bhck = weights.matmul("slots_bhgk", code_bhcg)
            # Both transposed, which is the same product: the code times the value less what was recalled is written,
            # and the lattice form bounds the first alone.
            return recalled_bhck, pairs.value_bhcv, lambda gradient: {"slots_bhgk": (-code_bhcg, -gradient)}
        recalled_bhcg = weights.matmul_t("slots_bhgk", pairs.key_bhck)
        return recalled_bhcg, code_bhcg, lambda gradient: {"slots_bhgk": (gradient, pairs.key_bhck)}


@dataclass(frozen=True)
class TwoSlots:
    """Key slots N and value slots U, both trained to give the code of a token back (Trellis 2512.23852).

    ``phi(N k)`` and ``phi(U v)`` should be the code; recall is ``phi(U^T r)``, ``r = LayerNorm(silu(N q))``.
    squash: phi; without one (``identity``) a pass is the gated delta rule on codes.
    """

    kind: ClassVar[str] = "two_slots"
    n_slots: int = 16
    squash: Literal["silu", "l2_silu", "ln_silu", "identity"] = "silu"
    weights: tuple[str, ...] = ("key_slots_bhgk", "value_slots_bhgv")
    used: tuple[str, ...] = ("query", "key", "value")

    @property
    def n_codes(self) -> int:
        return self.n_slots

    def init(self, batch: int, heads: int, key_width: int, value_width: int, like: Tensor) -> Memory:
        widths = zip(self.weights, (key_width, value_width), strict=True)
        return {name: _spread_out(batch, heads, self.n_slots, width, like) for name, width in widths}

    def address(self, key: Tensor) -> Tensor:
        raise TypeError("two slots have no one matrix")

    def recall(self, weights: Weights, query: Tensor) -> Tensor:
        preact_bhcg = functional.silu(weights.matmul_t("key_slots_bhgk", query))
        read_bhcg = functional.layer_norm(preact_bhcg, preact_bhcg.shape[-1:])
        return self._squash(weights.matmul("value_slots_bhgv", read_bhcg))

    def vjp(self, weights: Weights, pairs: Pairs) -> tuple[Tensor, Tensor, Pullback]:
        code_bhcg = _code(pairs)
        written = {"key_slots_bhgk": pairs.key_bhck, "value_slots_bhgv": pairs.value_bhcv}
        preact = {name: weights.matmul_t(name, rows) for name, rows in written.items()}
        recalled = torch.cat([self._squash(preact_bhcg) for preact_bhcg in preact.values()], dim=-1)

        def pull(gradient: Tensor) -> Surprise:
            parts = zip(written.items(), preact.values(), gradient.chunk(2, dim=-1), strict=True)
            return {name: (self._pull(preact_bhcg, part), rows) for (name, rows), preact_bhcg, part in parts}

        return recalled, torch.cat([code_bhcg, code_bhcg], dim=-1), pull

    def _squash(self, preact: Tensor) -> Tensor:
        if self.squash == "identity":
            return preact
        curved = functional.silu(preact)
        if self.squash == "ln_silu":
            return functional.layer_norm(curved, curved.shape[-1:])
        return curved / _norm(curved) if self.squash == "l2_silu" else curved

    def _pull(self, preact: Tensor, gradient: Tensor) -> Tensor:
        if self.squash == "identity":
            return gradient
        curved = functional.silu(preact)
        if self.squash == "ln_silu":
            gradient = _pull_norm(curved, gradient)
        elif self.squash == "l2_silu":
            unit = curved / _norm(curved)
            gradient = (gradient - unit * (unit * gradient).sum(dim=-1, keepdim=True)) / _norm(curved)
        sigmoid = preact.sigmoid()
        return gradient * sigmoid * (1 + preact * (1 - sigmoid))


def matrix() -> Structure:
    """A linear associative memory."""
    return Matrix()


def vector() -> Structure:
    """One remembered value, without keys."""
    return Vector()


def mlp(n_layers: int = 2, expand: int = 4, *, is_normed: bool = False, is_gated: bool = False) -> Structure:
    """A small network as memory; ``n_layers=1`` is the matrix itself."""
    return Matrix() if n_layers == 1 else Mlp(n_layers, expand, is_normed, is_gated)


def slots(n_slots: int = 16, written: Literal["decode", "encode"] = "decode") -> Structure:
    """Unit vectors that a code mixes."""
    return Slots(n_slots, written)


def two_slots(n_slots: int = 16, squash: Literal["silu", "l2_silu", "ln_silu", "identity"] = "silu") -> Structure:
    """Slots for keys beside slots for values."""
    return TwoSlots(n_slots, squash)


structures: Registry[Callable[..., Structure]] = Registry(
    "structure", {"matrix": matrix, "vector": vector, "mlp": mlp, "slots": slots, "two_slots": two_slots}
)


def outer(factor: Factor) -> Tensor:
    """The gradient itself: the sum over rows of outer products."""
    rows, gradients = factor
    return rows.mT @ gradients


def _code(pairs: Pairs) -> Tensor:
    if pairs.code_bhcg is None:
        raise ValueError("a structure of slots needs code gates; they are None. Pass Gates(code_bthg=...)")
    return pairs.code_bhcg


def _spread_out(batch: int, heads: int, n_slots: int, width: int, like: Tensor) -> Tensor:
    """Orthonormal rows where there is room for as many, else random unit rows."""
    drawn = torch.randn(heads, n_slots, width, dtype=torch.float32)
    rows = torch.linalg.qr(drawn.mT).Q.mT if n_slots <= width else functional.normalize(drawn, dim=-1)
    return rows.to(like).expand(batch, *rows.shape).clone()


def _norm(rows: Tensor) -> Tensor:
    return (rows.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()


class Gelu(torch.autograd.Function):
    """``apply(a) -> (a Phi(a), Phi(a) + a phi(a))``: GELU and its slope, which share all that is slow in them.

    Saved for the backward pass are a and the slope. It may be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(preact: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.erf(preact * 0.7071067811865476).add_(1).mul_(0.5)
        return preact * share, torch.addcmul(share, preact, _bell(preact))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        # A layer that is only read needs no gradient of the slope, and then none is made.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, d_curved: Tensor | None, d_slope: Tensor | None) -> Tensor | None:
        preact, slope = ctx.saved_tensors
        d_preact = None if d_curved is None else d_curved * slope
        if d_slope is None:
            return d_preact
        bent = d_slope * _bell(preact) * (2 - preact.square())
        return bent if d_preact is None else d_preact + bent


def _bell(preact: Tensor) -> Tensor:
    """The normal density."""
    return torch.exp(-0.5 * preact.square()) * 0.3989422804014327


def _pull_norm(rows: Tensor, gradient: Tensor) -> Tensor:
    """The gradient before a LayerNorm without gain (eps 1e-5, as torch's)."""
    centred = rows - rows.mean(dim=-1, keepdim=True)
    scale = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()
    unit = centred * scale
    inward = gradient - gradient.mean(dim=-1, keepdim=True) - unit * (gradient * unit).mean(dim=-1, keepdim=True)
    return scale * inward
