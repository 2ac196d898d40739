"""What happens to the old memory when something is written (memory.md 2.6).

A retention may store something other than the weights: logarithms, a sum of surprises, the image under a mirror map.
What is stored then changes linearly, and ``weights`` makes of it what is read. All of them are one family,
``W_t = argmin <g, W> + D(W, W_(t-1)) / write + G(W)`` (MIRAS 2504.13173, eq. 8).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from meristem.errors import WrongValue
from meristem.linalg import unit
from meristem.memory.gates import RowGates
from meristem.memory.state import Memory, beside
from meristem.plugins import Registry

TINY = 1e-12


def _same(stored: Tensor) -> Tensor:
    return stored


def _nothing(stored: Memory) -> Memory:
    return {}


def _sum(memory: Memory, change: Memory, gates: RowGates) -> Memory:
    return {name: per_head(gates.retain_bhc) * memory[name] + part for name, part in change.items()}


@dataclass(frozen=True)
class Retention:
    """How old weights and a change become new weights.

    weights: from what is stored to the weights that are read; first: from initial weights to what is stored at first.
    is_mapped: the two differ.
    apply: what is stored after a write, from the whole memory, the change of every stored tensor and the gates.
    carry: first values of what it carries beside the weights.
    settle: brings what was learned, or ``retain * stored + change``, to the form in which it is stored; with
    ``is_linear`` that is all of ``apply``.
    has_retain: the retain gate acts; without it the old memory is retained whole.
    is_bounding: the weights that are read have a greatest size, whatever is written.
    """

    name: str
    apply: Callable[[Memory, Memory, RowGates], Memory] = _sum
    weights: Callable[[Tensor], Tensor] = _same
    first: Callable[[Tensor], Tensor] = _same
    settle: Callable[[Tensor], Tensor] = _same
    carry: Callable[[Memory], Memory] = _nothing
    is_linear: bool = False
    has_retain: bool = True
    is_bounding: bool = False

    @property
    def is_mapped(self) -> bool:
        return self.weights is not _same


def decay() -> Retention:
    """``W <- retain W + change``: the squared distance to nothing (l2)."""
    return Retention("decay", is_linear=True)


def local(strength: float = 0.01, period: int = 16) -> Retention:
    """``W <- retain W + change - strength (W - W_ref)``: near where the memory was (l2-local; MIRAS, section 5.3).

    period: writes after which W_ref is taken anew; a chunk of a frozen form is one write.
    """
    if period < 1:
        raise WrongValue(f"the period of local retention is {period}; expected 1 write or more.")

    def apply(memory: Memory, change: Memory, gates: RowGates) -> Memory:
        is_due_b = memory["anchor_age_b"] % period == 0
        after: Memory = {"anchor_age_b": (memory["anchor_age_b"] + 1) % period}
        for name, part in change.items():
            old = memory[name]
            anchor = torch.where(is_due_b[:, None, None, None], old, memory[beside(name, "anchor")])
            after[name] = per_head(gates.retain_bhc) * old + part - strength * (old - anchor)
            after[beside(name, "anchor")] = anchor
        return after

    def carry(stored: Memory) -> Memory:
        some = next(iter(stored.values()))
        anchors = {beside(name, "anchor"): torch.zeros_like(weight) for name, weight in stored.items()}
        return anchors | {"anchor_age_b": some.new_zeros(some.shape[0])}

    return Retention("local", apply, carry=carry)


def simplex() -> Retention:
    """``W <- softmax(retain log W + change)``: every stored column sums to 1 (KL; MIRAS, section 5.4, MEMORA).

    Logarithms are stored, so that no logarithm of a weight is ever taken.
    """
    settle = partial(torch.log_softmax, dim=-2)

    def apply(memory: Memory, change: Memory, gates: RowGates) -> Memory:
        return {name: settle(stored) for name, stored in _sum(memory, change, gates).items()}

    def first(drawn: Tensor) -> Tensor:
        return settle(0.1 * torch.randn_like(drawn))

    return Retention("simplex", apply, weights=torch.exp, first=first, settle=settle, is_linear=True, is_bounding=True)


def f_divergence(kind: Literal["kl", "pearson", "hellinger"] = "kl") -> Retention:
    """``W <- W u``, ``u = (f')^-1(change - zeta)``: zeta by bisection so that every stored column sums to 1.

    ``f``: ``u log u``, which is ``simplex`` without decay; ``(u-1)^2``; ``(sqrt(u) - 1)^2`` (MIRAS, section 5.2).
    """
    if kind not in _INVERSE:
        raise WrongValue(f"the kind of an f-divergence is '{kind}'; expected one of {', '.join(_INVERSE)}.")
    ratio, rise = _INVERSE[kind]

    def apply(memory: Memory, change: Memory, gates: RowGates) -> Memory:
        after = {}
        for name, part in change.items():
            # A weight at 0 stays there, whatever its change. zeta takes up any shift; what is near 0 keeps its digits.
            is_zero = memory[name] == 0
            least = part.detach().masked_fill(is_zero, torch.inf).amin(dim=-2, keepdim=True)
            part = torch.where(is_zero, least, part)
            part = part - part.detach().amax(dim=-2, keepdim=True)
            reached = memory[name] * ratio(part - _level(memory[name], part, ratio, rise))
            after[name] = reached / reached.sum(dim=-2, keepdim=True)
        return after

    def first(drawn: Tensor) -> Tensor:
        return (0.1 * torch.randn_like(drawn)).softmax(dim=-2)

    def settle(stored: Tensor) -> Tensor:
        positive = stored.clamp_min(TINY)
        return positive / positive.sum(dim=-2, keepdim=True)

    return Retention("f_divergence", apply, first=first, settle=settle, has_retain=False, is_bounding=True)


Ratio = Callable[[Tensor], Tensor]

_INVERSE: dict[str, tuple[Ratio, Ratio]] = {
    # From a slope to u, and from u to how fast it rises with the slope.
    "kl": (lambda slope: (slope - 1).exp(), lambda u: u),
    "pearson": (lambda slope: (1 + slope / 2).clamp(min=0.0), lambda u: (u > 0) / 2),
    # f' = 1 - 1 / sqrt(u) stays below 1; the clamp keeps the search inside, and no solution lies beyond it.
    "hellinger": (lambda slope: (1 - slope.clamp(max=1 - 1e-6)) ** -2, lambda u: 2 * u**1.5),
}


def _level(weight: Tensor, change: Tensor, ratio: Ratio, rise: Ratio) -> Tensor:
    """zeta of every column, by bisection; one Newton step of length 0 at the end gives it its gradient."""

    def excess(level: Tensor) -> Tensor:
        return (weight * ratio(change - level)).sum(dim=-2, keepdim=True) - 1

    with torch.no_grad():
        reach = change.abs().amax(dim=-2, keepdim=True) + 4
        low, high = -reach, reach
        for _ in range(60):
            middle = (low + high) / 2
            # Far below the solution u may be infinite, and the excess no number.
            is_above = excess(middle) <= 0
            low, high = torch.where(is_above, low, middle), torch.where(is_above, middle, high)
        slope = -(weight * rise(ratio(change - high))).sum(dim=-2, keepdim=True)
    wrong = excess(high)
    return high - (wrong - wrong.detach()) / slope


def elastic(alpha: float = 10.0, beta: float = 10.0, *, is_smooth: bool = False) -> Retention:
    """``W <- S_gamma(lambda (W + change))``, ``lambda = beta / (beta + write)``, ``gamma = lambda write / alpha``.

    The exact minimiser of ``<g, W> + |W - W_0|^2 / 2 write + |W|_1 / alpha + |W|^2 / 2 beta`` (MIRAS, eq. 20), with
    exact zeros. is_smooth: ``|z| arctan(z / gamma) 2 / pi`` in the place of the soft threshold.
    """

    def apply(memory: Memory, change: Memory, gates: RowGates) -> Memory:
        kept = _sum(memory, change, gates)
        after = {}
        for name, weight in kept.items():
            shrink = beta / (beta + per_head(gates.write_bhc))
            limit = shrink * per_head(gates.write_bhc) / alpha
            soft = _smooth_threshold if is_smooth else soft_threshold
            after[name] = soft(shrink * weight, limit)
        return after

    return Retention("elastic", apply)


def elastic_leader(limit: float = 0.05) -> Retention:
    """``A <- A + change``, ``W = S_limit(A)``: small sums are read as exact zeros (MIRAS, section 5.2).

    Backwards the threshold is passed straight through, for a weight at zero must be able to leave it.
    """

    def weights(stored: Tensor) -> Tensor:
        sparse = soft_threshold(stored, torch.as_tensor(limit, dtype=stored.dtype, device=stored.device))
        return stored + (sparse - stored).detach()

    return Retention("elastic_leader", weights=weights, is_linear=True, has_retain=False)


def power_norm(q: float = 4.0, mapped: Literal["paper", "mirror", "off"] = "paper") -> Retention:
    """``A <- retain A + change``, ``W = map(A)`` (MIRAS, eqs. 24-25, MONETA), per weight matrix.

    mapped: ``paper``: ``A / |A|_q^(q-2)``, homogeneous of degree 3 - q, so that at q = 4 a fading A raises W.
    ``mirror``: the exact inverse of the gradient of ``1/2 |W|_q^2``; of degree 1. ``off``: A itself.
    """
    if mapped == "off" or q == 2:
        return Retention("power_norm", is_linear=True)
    if q <= 1 or (mapped == "paper" and q == 3):
        raise WrongValue(
            f"power_norm has q {q} with the map '{mapped}'; expected q above 1, and not 3 with 'paper', where no first "
            f"value exists. Choose another q, or mapped='mirror'."
        )
    dual = q / (q - 1)

    def paper(stored: Tensor) -> Tensor:
        return stored / _p_norm(stored, q) ** (q - 2)

    def first_of_paper(drawn: Tensor) -> Tensor:
        return drawn * _p_norm(drawn, q) ** ((q - 2) / (3 - q))

    if mapped == "paper":
        return Retention("power_norm", weights=paper, first=first_of_paper, is_linear=True, is_bounding=q >= 4)
    return Retention("power_norm", weights=partial(_dual, p=dual), first=partial(_dual, p=q), is_linear=True)


def bregman(forward: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor]) -> Retention:
    """``F'(W) <- retain F'(W) + change``: the caller's own mirror map F', elementwise, and its inverse.

    The pair is tried on numbers from -4 to 4 (the range of the inverse). Raises WrongValue where it is none.
    """
    stored = torch.linspace(-4, 4, 33, dtype=torch.float64)
    there = forward(inverse(stored))
    if not torch.allclose(there, stored, rtol=1e-6, atol=1e-6):
        at = int((there - stored).abs().nan_to_num(torch.inf).argmax())
        raise WrongValue(
            f"the maps of a bregman retention are no pair: forward(inverse({stored[at]:.4g})) is {there[at]:.4g}. "
            f"Give F' and its exact inverse."
        )
    return Retention("bregman", weights=inverse, first=forward, is_linear=True)


def quadratic() -> Retention:
    """``bregman`` with ``F = W^2 / 2``: plain descent."""
    return bregman(_same, _same)


def entropy() -> Retention:
    """``bregman`` with the negative entropy: exponentiated gradients on positive weights, stored as logarithms."""
    made = bregman(torch.log, torch.exp)
    return Retention("entropy", weights=made.weights, first=lambda drawn: 0.1 * drawn, is_linear=True)


def bounded() -> Retention:
    """``W = sigmoid(z)``, ``z <- z + change``: weights stay in (0, 1); z does not fade (MIRAS, section 5.2)."""
    return Retention("bounded", weights=torch.sigmoid, is_linear=True, has_retain=False, is_bounding=True)


def sphere(scope: Literal["row", "matrix"] = "row", *, is_tangent: bool = True) -> Retention:
    """``W <- (W + change) / |W + change|`` per stored row, or per matrix (Lattice 2504.05646).

    is_tangent: the change is first projected beside W, and the norm then is ``sqrt(1 + |change|^2)`` exactly.
    """
    axes = (-1,) if scope == "row" else (-2, -1)

    def settle(weight: Tensor) -> Tensor:
        return unit(weight, axes).to(weight.dtype)

    def apply(memory: Memory, change: Memory, gates: RowGates) -> Memory:
        after = {}
        for name, part in change.items():
            old = memory[name]
            if is_tangent:
                part = part - old * (old * part).sum(dim=axes, keepdim=True)
            after[name] = settle(old + part)
        return after

    def first(drawn: Tensor) -> Tensor:
        # A matrix of zeros has no direction.
        return settle(torch.where(drawn.square().sum(dim=axes, keepdim=True) > 0, drawn, torch.randn_like(drawn)))

    return Retention("sphere", apply, first=first, settle=settle, has_retain=False, is_bounding=True)


retentions: Registry[Callable[..., Retention]] = Registry(
    "retention",
    {
        "decay": decay,
        "local": local,
        "simplex": simplex,
        "f_divergence": f_divergence,
        "elastic": elastic,
        "elastic_leader": elastic_leader,
        "power_norm": power_norm,
        "quadratic": quadratic,
        "entropy": entropy,
        "bounded": bounded,
        "sphere": sphere,
    },
)


def per_head(gate: Tensor) -> Tensor:
    """The gate of one token with as many axes as the weights that it scales."""
    return gate[..., None]


def soft_threshold(weight: Tensor, limit: Tensor) -> Tensor:
    """``sign(w) max(|w| - limit, 0)``."""
    return weight.sign() * (weight.abs() - limit).clamp(min=0.0)


def _smooth_threshold(weight: Tensor, limit: Tensor) -> Tensor:
    return weight.abs() * torch.arctan(weight / limit.clamp(min=TINY)) * (2 / torch.pi)


def _p_norm(weight: Tensor, p: float) -> Tensor:
    """The p-norm of every matrix, guarded where all is 0."""
    return (weight.abs().pow(p).sum(dim=(-2, -1), keepdim=True) + TINY) ** (1 / p)


def _dual(weight: Tensor, p: float) -> Tensor:
    """The gradient of ``1/2 |W|_p^2``; with 1/p + 1/q = 1 the one of q is its inverse."""
    # A power below 1 has an infinite slope at 0; the guard makes it a large one.
    size = (weight.square() + TINY**2).sqrt()
    return weight.sign() * size ** (p - 1) / _p_norm(weight, p) ** (p - 2)
