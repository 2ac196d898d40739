"""How surprises become change (memory.md 2.7)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from meristem.linalg import newton_schulz
from meristem.memory.gates import RowGates
from meristem.memory.retention import per_head
from meristem.memory.state import Memory, beside
from meristem.memory.structure import Surprise, outer
from meristem.plugins import Registry


def _given(write: Tensor, address: Tensor) -> Tensor:
    return write


def _nothing(stored: Memory) -> Memory:
    return {}


@dataclass(frozen=True)
class Update:
    """From the surprise of a token to the change of the weights, and what is carried to the next token.

    change: from memory, weights, surprise and gates to the change of every stored tensor, and the carried tensors.
    carry: first values of what is carried beside the weights.
    rate: the write rate in effect, from the write gate and the rows of the address.
    erase: how often ``rate * W k k^T`` is subtracted beside the surprise.
    is_linear: the change is ``-rate * (surprise + erase)``, or the momentum recurrence of it: for the linear forms.
    has_retain: the retain gate acts; without it old memory is summed whole, or only fades as it is written over where
    ``is_discounted`` (``memory.region``).
    is_learned: what is carried does not start at zero, and where it starts is learned.
    """

    name: str
    change: Callable[[Memory, Memory, Surprise, RowGates], tuple[Memory, Memory]]
    carry: Callable[[Memory], Memory] = _nothing
    rate: Callable[[Tensor, Tensor], Tensor] = _given
    erase: float = 0.0
    has_momentum: bool = False
    is_linear: bool = False
    has_retain: bool = True
    is_discounted: bool = False
    is_learned: bool = False


def plain() -> Update:
    """Gradient descent: the change is ``-write * surprise``."""
    return Update("plain", _descend, is_linear=True)


def leader(*, is_discounted: bool = False) -> Update:
    """Follow the regularised leader: all surprises are summed, none fades; the retention says what is made of the sum.

    is_discounted: the sum fades at the least rate at which it stays bounded (``memory.region``).

    With decay as retention it is plain descent from the first memory (MIRAS 2504.13173, section 3.2).
    """
    return Update("leader", _descend, is_linear=True, has_retain=False, is_discounted=is_discounted)


def _descend(memory: Memory, weights: Memory, surprise: Surprise, gates: RowGates) -> tuple[Memory, Memory]:
    return {name: -per_head(gates.write_bhc) * outer(part) for name, part in surprise.items()}, {}


def implicit() -> Update:
    """The exact proximal step: ``write / (1 + write |k|^2)`` in ``plain``; stable at any rate (Longhorn 2407.14207)."""
    return Update("implicit", _at_proximal_rate(erase=0.0), rate=_proximal, is_linear=True)


def delta_descent() -> Update:
    """``W <- retain W - rate W k k^T - rate surprise``, ``rate = write / (1 + write |k|^2)`` (HOPE 2512.24695, eq. 57).

    With a dot bias it is the delta rule; with a squared one the old value is erased twice.
    """
    return Update("delta_descent", _at_proximal_rate(erase=1.0), rate=_proximal, erase=1.0, is_linear=True)


def _proximal(write: Tensor, address: Tensor) -> Tensor:
    return write / (1 + write * address.square().sum(dim=-1))


def _at_proximal_rate(
    erase: float,
) -> Callable[[Memory, Memory, Surprise, RowGates], tuple[Memory, Memory]]:
    def change(memory: Memory, weights: Memory, surprise: Surprise, gates: RowGates) -> tuple[Memory, Memory]:
        changed = {}
        for name, (rows, gradient) in surprise.items():
            erased = gradient + erase * (rows @ memory[name]) if erase else gradient
            changed[name] = -outer((rows, _proximal(gates.write_bhc, rows)[..., None] * erased))
        return changed, {}

    return change


def momentum() -> Update:
    """``S <- momentum S - write surprise``; the change is S (Titans 2501.00663, eqs. 9-14)."""

    def change(memory: Memory, weights: Memory, surprise: Surprise, gates: RowGates) -> tuple[Memory, Memory]:
        moved = _descend(memory, weights, surprise, gates)[0]
        for name, part in moved.items():
            moved[name] = per_head(_momentum(gates)) * memory[momentum_name(name)] + part
        return moved, {momentum_name(name): part for name, part in moved.items()}

    return Update("momentum", change, _zeros, has_momentum=True, is_linear=True)


def delta_momentum() -> Update:
    """``S <- S (momentum - g^T g) - write g``: momentum that forgets along what just came (HOPE 2512.24695, eq. 49)."""

    def change(memory: Memory, weights: Memory, surprise: Surprise, gates: RowGates) -> tuple[Memory, Memory]:
        moved = {}
        for name, (rows, gradient) in surprise.items():
            old = memory[momentum_name(name)]
            # g^T g in the paper's orientation is |d|^2 a a^T; S is stored transposed.
            erased = gradient.square().sum(dim=-1, keepdim=True) * (rows @ old)
            written = gates.write_bhc[..., None] * gradient
            moved[name] = per_head(_momentum(gates)) * old - outer((rows, erased + written))
        return moved, {momentum_name(name): part for name, part in moved.items()}

    return Update("delta_momentum", change, _zeros, has_momentum=True)


def deep_momentum(hidden: int = 16) -> Update:
    """A network m trained while it runs to give the surprise back: ``W <- retain W - m`` (HOPE 2512.24695, eq. 50).

    Its inputs are the rows of W, so that ``m = silu(D_in) D_out`` has the shape of W. Each token takes one step on
    ``1/2 |m - surprise|^2``, at ``write`` over one plus ``write`` times the greatest curvature there can be, and keeps
    ``momentum`` of D_out. One linear layer trained on ``-<m, surprise>`` instead is ``momentum``.
    """

    def carry(stored: Memory) -> Memory:
        carried = {}
        for name, weight in stored.items():
            *axes, n_rows, n_columns = weight.shape
            first = weight.new_empty(*axes[1:], n_rows, hidden).normal_()
            carried[beside(name, "deep_in")] = first.expand(*axes, n_rows, hidden).clone()
            carried[beside(name, "deep_out")] = weight.new_zeros(*axes, hidden, n_columns)
        return carried

    def change(memory: Memory, weights: Memory, surprise: Surprise, gates: RowGates) -> tuple[Memory, Memory]:
        keep, write = per_head(_momentum(gates)), per_head(gates.write_bhc)
        moved: Memory = {}
        carried: Memory = {}
        for name, factor in surprise.items():
            first, last = memory[beside(name, "deep_in")], memory[beside(name, "deep_out")]
            # Rows of about unit length: silu of a normal number has the mean square 0.36.
            scale = (0.36 * hidden) ** -0.5
            reached, sigmoid = scale * functional.silu(first), first.sigmoid()
            wrong = reached @ last - outer(factor)
            rate = write / (1 + write * reached.square().sum(dim=(-2, -1), keepdim=True))
            pulled = scale * (wrong @ last.mT) * sigmoid * (1 + first * (1 - sigmoid))
            first, last = first - rate * pulled, keep * last - rate * (reached.mT @ wrong)
            carried |= {beside(name, "deep_in"): first, beside(name, "deep_out"): last}
            moved[name] = -scale * functional.silu(first) @ last
        return moved, carried

    return Update("deep_momentum", change, carry, has_momentum=True, is_learned=True)


def orthogonal_momentum() -> Update:
    """``S <- momentum S + surprise``, ``W <- retain W - write NS(S)`` (Atlas 2505.23735, eqs. 32-33; Muon).

    NS gives every direction of S about the same length, so the write rate alone says how far a step goes.
    """

    def change(memory: Memory, weights: Memory, surprise: Surprise, gates: RowGates) -> tuple[Memory, Memory]:
        moved = {
            name: per_head(_momentum(gates)) * memory[momentum_name(name)] + outer(part)
            for name, part in surprise.items()
        }
        steps = {name: -per_head(gates.write_bhc) * newton_schulz(part) for name, part in moved.items()}
        return steps, {momentum_name(name): part for name, part in moved.items()}

    return Update("orthogonal_momentum", change, _zeros, has_momentum=True)


updates: Registry[Callable[..., Update]] = Registry(
    "update",
    {
        "plain": plain,
        "momentum": momentum,
        "delta_descent": delta_descent,
        "delta_momentum": delta_momentum,
        "deep_momentum": deep_momentum,
        "leader": leader,
        "implicit": implicit,
        "orthogonal_momentum": orthogonal_momentum,
    },
)


def momentum_name(weight_name: str) -> str:
    """Where the momentum of a weight is stored: ``matrix_bhkv`` -> ``matrix_momentum_bhkv``."""
    return beside(weight_name, "momentum")


def _zeros(stored: Memory) -> Memory:
    return {momentum_name(name): torch.zeros_like(weight) for name, weight in stored.items()}


def _momentum(gates: RowGates) -> Tensor:
    if gates.momentum_bhc is None:
        raise ValueError("a rule with momentum needs momentum gates; they are None. Pass Gates(momentum_bth=...)")
    return gates.momentum_bhc
