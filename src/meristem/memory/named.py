"""The catalogue: every rule of the literature that this package knows, as three to ten lines of parts.

``form`` is how the source trains a rule where no exact form is fast: surprises frozen at the start of a chunk (Titans
2501.00663, section 3.2; MIRAS 2504.13173, section 5.4; TTT 2407.04620), slots linearised there (Lattice 2504.05646,
section 4), or momenta orthogonalised together (Atlas 2505.23735, section 5.2). A linear rule, whose exact form is fast,
declares none; ``titans`` does for its networks.

Each says how large its memory can become, for any unit keys, values up to ``|v|`` and gates that the gate layer can
give: ``e`` is the decay by a write of rate 1 and m the greatest momentum of the head (``memory.region``). That holds in
``scan`` and in exact forms. In ``frozen_chunk``, their usual one, ``trellis``, ``omega_net`` and ``ftrl`` are bounded
as networks are, by ``rule.LONGEST``.
"""

from collections.abc import Callable

from meristem.memory.bias import dot, huber_switch, power, squared
from meristem.memory.check import check
from meristem.memory.features import polynomial
from meristem.memory.retention import decay, elastic_leader, local, power_norm, simplex, sphere
from meristem.memory.rule import Rule
from meristem.memory.structure import matrix, mlp, slots, two_slots
from meristem.memory.update import delta_descent as delta_descending
from meristem.memory.update import implicit, leader, momentum, orthogonal_momentum, plain
from meristem.plugins import Registry, spelled


def hebbian() -> Rule:
    """``M <- retain M + write v k^T``: gated linear attention (Katharopoulos 2006.16236; RetNet, GLA, Mamba2).

    Bounded: ``|M| <= |v| / e``.
    """
    return Rule(structure=matrix(), bias=dot(), retention=decay(), update=plain())


def delta() -> Rule:
    """``M <- retain M - write (M k - v) k^T``: the delta rule measured at the old memory (Schlag 2102.11174, eq.
    24).

    Bounded: ``|M|^2 <= 9 |v|^2 / e``.
    """
    return Rule(structure=matrix(), bias=squared(), retention=decay(), update=plain())


def gated_delta() -> Rule:
    """``M <- retain M - write (retain M k - v) k^T``: decay first, then the delta rule (Gated DeltaNet 2412.06464,
    eq. 10).

    Bounded: ``|M|^2 <= 9 |v|^2 / e``.
    """
    return Rule(structure=matrix(), bias=squared(), retention=decay(), update=plain(), probe="warm")


def implicit_delta() -> Rule:
    """``delta`` at the proximal rate ``write / (1 + write |k|^2)``: stable at any rate (Longhorn 2407.14207, eq. 8).

    Bounded: ``|M|^2 <= |v|^2 / e``.
    """
    return Rule(structure=matrix(), bias=squared(), retention=decay(), update=implicit())


def delta_descent() -> Rule:
    """``M <- M (retain - rate k k^T) + rate v k^T``, ``rate = write / (1 + write |k|^2)``, read before it is written
    (HOPE 2512.24695, eq. 57).

    Bounded: ``|M|^2 <= |v|^2 / e``.
    """
    return Rule(structure=matrix(), bias=dot(), retention=decay(), update=delta_descending(), reads="before")


def titans(n_layers: int = 1) -> Rule:
    """``S <- momentum S - write grad 1/2 |f(k) - v|^2; M <- retain M + S`` (Titans 2501.00663, eqs. 9-14); f is one
    matrix, or a network of ``n_layers`` with a LayerNorm, without which values ten times as large end in NaN.

    Bounded with one layer: ``|M|^2 <= 9 |v|^2 / (e (1 - m))``. A network, as no surprise is longer than
    LONGEST: ``|W| <= 1.1 LONGEST / (e (1 - m))`` over all weights.
    """
    return Rule(
        structure=mlp(n_layers, is_normed=True),
        bias=squared(),
        retention=decay(),
        update=momentum(),
        form="frozen_chunk",
    )


def titans_mlp() -> Rule:
    """``titans`` with a network of two layers as memory (Titans 2501.00663, section 3.1).

    Bounded, as no surprise is longer than LONGEST: ``|W| <= 1.1 LONGEST / (e (1 - m))`` over all weights.
    """
    return titans(n_layers=2)


def momentum_delta() -> Rule:
    """``S <- momentum S - write (retain M k - v) k^T; M <- retain M + S`` (Momentum DeltaNet 2605.05838).

    Bounded: ``|M|^2 <= 9 |v|^2 / (e (1 - m))``.
    """
    return Rule(structure=matrix(), bias=squared(), retention=decay(), update=momentum(), probe="warm")


def moneta() -> Rule:
    """``A <- retain A - write grad |f(k) - v|_3^3; W = A / |A|_4^2`` (MIRAS 2504.13173, eqs. 24-25).

    Bounded: ``|W| <= 707 n^(1/4)`` for matrices of n numbers.
    """
    return Rule(
        structure=mlp(is_normed=True), bias=power(3), retention=power_norm(4), update=plain(), form="frozen_chunk"
    )


def yaad() -> Rule:
    """``W <- retain W - write g - 0.01 (W - W_ref)``, g of the squared loss where ``|f(k) - v|`` is at most the token's
    threshold, else of the absolute one times the threshold (MIRAS 2504.13173, section 5.3).

    Bounded, as no surprise is longer than LONGEST: ``|W| <= 1.3 LONGEST / e`` over all weights.
    """
    return Rule(
        structure=mlp(is_normed=True), bias=huber_switch(), retention=local(), update=plain(), form="frozen_chunk"
    )


def memora() -> Rule:
    """``W <- softmax(retain log W - write grad 1/2 |f(k) - v|^2)`` by columns, read before (MIRAS, section 5.3).

    Bounded: every column of W sums to 1.
    """
    return Rule(
        structure=mlp(), bias=squared(), retention=simplex(), update=plain(), reads="before", form="frozen_chunk"
    )


def lattice(n_slots: int = 16) -> Rule:
    """``s_i <- unit(s_i + write c_i P_i (v - S^T c))``: decode, on unit slots, read before (Lattice 2504.05646).

    Bounded: ``|s_i| = 1``.
    """
    return Rule(
        structure=slots(n_slots), bias=squared(), retention=sphere(), update=plain(), reads="before", form="lattice"
    )


def lattice_encode(n_slots: int = 16) -> Rule:
    """``s_i <- unit(s_i + write (c_i - s_i k) P_i k)`` (Lattice 2504.05646).

    Bounded: ``|s_i| = 1``.
    """
    return Rule(
        structure=slots(n_slots, "encode"),
        bias=squared(),
        retention=sphere(),
        update=plain(),
        reads="before",
        form="lattice",
    )


def lattice_similarity(n_slots: int = 16) -> Rule:
    """``s_i <- unit(s_i + write c_i P_i k)`` (Lattice 2504.05646).

    Bounded: ``|s_i| = 1``.
    """
    return Rule(
        structure=slots(n_slots, "encode"),
        bias=dot(),
        retention=sphere(),
        update=plain(),
        reads="before",
        form="lattice",
    )


def trellis(n_slots: int = 16) -> Rule:
    """``N <- retain N - write J^T (phi(N k) - c) k^T``, the same for U and v; read ``phi(U^T f(N q))`` (Trellis
    2512.23852).

    Bounded: ``|n_i| <= (1.1 |c_i| + 0.15) / e``.
    """
    return Rule(structure=two_slots(n_slots), bias=squared(), retention=decay(), update=plain(), form="frozen_chunk")


def atlas(span: int = 4) -> Rule:
    """``S <- momentum S + grad sum of the last losses; M <- retain M - write NS(S)`` on polynomial keys (Atlas
    2505.23735, eqs. 9, 32-33).

    Bounded: ``|M| <= 1.21 sqrt(rank) / e``.
    """
    return Rule(matrix(), squared(), decay(), orthogonal_momentum(), span=span, features=polynomial(), form="atlas")


def omega_net(span: int = 4) -> Rule:
    """``M <- retain M - write grad sum of the last losses`` on polynomial keys (Atlas 2505.23735, eq. 9).

    Bounded: ``|M|^2 <= 9 span |v|^2 / e``.
    """
    return Rule(matrix(), squared(), decay(), plain(), span=span, features=polynomial(), form="frozen_chunk")


def omega() -> Rule:
    """``S <- momentum S + write u k^T; M <- retain M + S``: ``u = W silu([k; v])`` never sees the memory, so
    one product serves all tokens: a surrogate of Atlas (2505.23735).

    Bounded: ``|M| <= |u| / (e (1 - m))``.
    """
    return Rule(structure=matrix(), bias=dot(), retention=decay(), update=momentum(), values="mixed")


def ftrl() -> Rule:
    """``A <- retain A - write (M k - v) k^T; M = soft threshold of A``: follow the regularised leader (MIRAS, section
    3.2); ``retain = exp(-e write)``, without which ``|A|`` would grow as ``sqrt(t)``.

    Bounded: ``|A|^2 <= 9 (|v| + 0.05 sqrt(n))^2 / e`` for a matrix of n numbers.
    """
    sum_of_all = leader(is_discounted=True)
    return Rule(structure=matrix(), bias=squared(), retention=elastic_leader(), update=sum_of_all, form="frozen_chunk")


rules: Registry[Callable[..., Rule]] = Registry(
    "memory",
    {
        made.__name__: made
        for made in (
            hebbian,
            delta,
            gated_delta,
            implicit_delta,
            delta_descent,
            titans,
            titans_mlp,
            momentum_delta,
            moneta,
            yaad,
            memora,
            lattice,
            lattice_encode,
            lattice_similarity,
            trellis,
            atlas,
            omega_net,
            omega,
            ftrl,
        )
    },
)


def named(text: str) -> Rule:
    """The rule of that name, such as ``titans`` or, with another choice in it, ``titans(n_layers=3)``.

    Raises WrongValue for a name or a choice that is unknown, and ConflictingKeys where parts do not go together.
    """
    return check(spelled(rules, text))
