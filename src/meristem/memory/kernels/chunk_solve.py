"""The arithmetic of the exact chunk form, forward and backward, with the decays already turned into weights.

For every chunk, with memory and momentum stacked in ``Z`` and rows of weights written before what they scale::

    D N = V - [w K] Z        D = I + z * W' * K K^T     what is new in each value: minus the residual
    Y   = [a Q] Z + (W * Q K^T) N                       what is read
    Z'  = C Z + [r K]^T N                               what leaves the chunk

``W'`` is ``W`` one token earlier, and so is ``W`` in the reads where a token reads before it is written. ``[w K]`` is
``w_1 K`` beside ``w_2 K``, one for memory and one for momentum. Only the line of ``Z'`` must be done in order, and in
reverse order its adjoint ``dZ = C^T dZ' + [a Q]^T dY - [w K]^T dV`` with ``dV = D^-T dN`` and
``dN = (W * Q K^T)^T dY + [r K] dZ'``; everything else is one batched matrix product for all chunks. Saved for the
backward pass are N, D^-1 and Z at the chunk starts: nothing that holds a matrix per token.

What is as large as the keys is overwritten in place once it has served: on a CPU a fresh tensor costs as much as the
product that fills it.

Axes: n chunks, h batch and heads folded together, c and s tokens within a chunk, l memory and momentum, k key width
(of memory and momentum side by side in what is spread or stacked), v value width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from meristem.linalg import solve_unit_lower


@dataclass(frozen=True)
class Weights:
    """intra_nhcs: W, lower triangular. probe_nhcl, read_nhcl, write_nhcl, carry_nhll: w, a, r and C.

    probe_nhcl: None where a write does not read the memory at all.
    scale_nhc: z; None where it is 1.
    is_solved: a write depends on the earlier writes of its chunk; otherwise D is I.
    reads_before: a token reads before it is written.
    """

    intra_nhcs: Tensor
    read_nhcl: Tensor
    write_nhcl: Tensor
    carry_nhll: Tensor
    probe_nhcl: Tensor | None = None
    scale_nhc: Tensor | None = None
    is_solved: bool = False
    reads_before: bool = False


class Solved(NamedTuple):
    """N, D^-1, and Z as it enters every chunk; below the last, Z after the sequence."""

    new_nhcv: Tensor
    inverse_nhcs: Tensor | None
    passing_nhkv: Tensor


Vectors = tuple[Tensor, Tensor]
"""key_nhck, query_nhck."""


def solve(
    vectors: Vectors,
    value_nhcv: Float[Tensor, "n h c v"],
    weights: Weights,
    first_hkv: Float[Tensor, "h ... v"],
) -> tuple[Tensor, Solved]:
    """What is read, and what ``solve_back`` needs.

    first_hkv: memory over momentum, along k.
    """
    key_nhck, query_nhck = vectors
    inverse_nhcs = None
    if weights.is_solved:
        strict_nhcs = _weigh(key_nhck @ key_nhck.mT, weights.intra_nhcs, is_earlier=True)
        if weights.scale_nhc is not None:
            strict_nhcs.mul_(weights.scale_nhc[..., None])
        inverse_nhcs = _invert(strict_nhcs)
    solved = _run_chunks(key_nhck, value_nhcv, weights, first_hkv, inverse_nhcs)
    mixing_nhcs = _weigh(query_nhck @ key_nhck.mT, weights.intra_nhcs, is_earlier=weights.reads_before)
    read_nhcv = mixing_nhcs @ solved.new_nhcv
    _add_product(read_nhcv, _spread(weights.read_nhcl, query_nhck), solved.passing_nhkv[:-1])
    return read_nhcv, solved


def solve_back(
    vectors: Vectors,
    weights: Weights,
    solved: Solved,
    d_read_nhcv: Float[Tensor, "n h c v"],
    d_last_hkv: Float[Tensor, "h ... v"],
) -> tuple[tuple[Tensor, Tensor, Tensor], Weights, Tensor]:
    """The gradients of ``(key, value, query)``, of every weight, and of ``first_hkv``."""
    key_nhck, query_nhck = vectors
    new_nhcv, entering_nhkv = solved.new_nhcv, solved.passing_nhkv[:-1]
    likeness_nhcs = query_nhck @ key_nhck.mT
    d_new_nhcv = _weigh(likeness_nhcs.clone(), weights.intra_nhcs, is_earlier=weights.reads_before).mT @ d_read_nhcv
    d_value_nhcv, d_passing_nhkv = _run_chunks_backward(vectors, weights, solved, (d_new_nhcv, d_read_nhcv, d_last_hkv))
    del d_new_nhcv
    d_key_nhck, d_write_nhcl = _despread(new_nhcv @ d_passing_nhkv[1:].mT, weights.write_nhcl, key_nhck)
    d_left_nhlk, came_nhlk = (
        _by_level(d_passing_nhkv[1:], weights.carry_nhll),
        _by_level(entering_nhkv, weights.carry_nhll),
    )
    d_carry_nhll, d_first_hkv = d_left_nhlk @ came_nhlk.mT, d_passing_nhkv[0].clone()
    del d_passing_nhkv, d_left_nhlk
    d_query_nhck, d_read_nhcl = _despread(d_read_nhcv @ entering_nhkv.mT, weights.read_nhcl, query_nhck)

    d_likeness_nhcs = d_read_nhcv @ new_nhcv.mT
    d_intra_nhcs = likeness_nhcs.mul_(d_likeness_nhcs)
    if weights.reads_before:
        d_intra_nhcs = sooner(d_intra_nhcs)
    _weigh(d_likeness_nhcs, weights.intra_nhcs, is_earlier=weights.reads_before)
    _add_product(d_query_nhck, d_likeness_nhcs, key_nhck)
    _add_product(d_key_nhck, d_likeness_nhcs.mT, query_nhck)
    del d_likeness_nhcs
    d_probe_nhcl, d_scale_nhc = None, None
    if weights.probe_nhcl is not None:
        d_probed_nhck = _minus_product(d_value_nhcv, entering_nhkv.mT)
        d_probe_nhcl = _despread(d_probed_nhck, weights.probe_nhcl, key_nhck, onto_nhck=d_key_nhck)[1]
        del d_probed_nhck
    if weights.is_solved:
        d_scale_nhc = _system_back(
            key_nhck, weights, _minus_product(d_value_nhcv, new_nhcv.mT), d_intra_nhcs, d_key_nhck
        )
    d_weights = Weights(d_intra_nhcs, d_read_nhcl, d_write_nhcl, d_carry_nhll, d_probe_nhcl, d_scale_nhc)
    return (d_key_nhck, d_value_nhcv, d_query_nhck), d_weights, d_first_hkv


def _system_back(
    key_nhck: Tensor, weights: Weights, d_system_nhcs: Tensor, d_intra_nhcs: Tensor, d_key_nhck: Tensor
) -> Tensor | None:
    """From the gradient of D, what is added to those of weights and keys, in place; gives that of the scale."""
    alike_nhcs, d_scale_nhc = key_nhck @ key_nhck.mT, None
    if weights.scale_nhc is not None:
        strict_nhcs = _weigh(alike_nhcs.clone(), weights.intra_nhcs, is_earlier=True)
        d_scale_nhc = torch.linalg.vecdot(d_system_nhcs, strict_nhcs)
        d_system_nhcs.mul_(weights.scale_nhc[..., None])
    d_intra_nhcs[..., :-1, :].addcmul_(d_system_nhcs[..., 1:, :], alike_nhcs[..., 1:, :])
    d_alike_nhcs = _weigh(d_system_nhcs, weights.intra_nhcs, is_earlier=True)
    _add_product(d_key_nhck, torch.add(d_alike_nhcs, d_alike_nhcs.mT, out=alike_nhcs), key_nhck)
    return d_scale_nhc


def _run_chunks(
    key_nhck: Tensor,
    value_nhcv: Tensor,
    weights: Weights,
    first_hkv: Tensor,
    inverse_nhcs: Tensor | None,
) -> Solved:
    passing, news = [first_hkv], []
    for n, (key_hck, new_hcv) in enumerate(zip(key_nhck, value_nhcv, strict=True)):
        if weights.probe_nhcl is not None:
            new_hcv = torch.baddbmm(new_hcv, _spread(weights.probe_nhcl[n], key_hck), passing[n], alpha=-1)
        if inverse_nhcs is not None:
            new_hcv = inverse_nhcs[n] @ new_hcv
        news.append(new_hcv)
        kept_hkv = _carry(weights.carry_nhll[n], passing[n])
        passing.append(torch.baddbmm(kept_hkv, _spread(weights.write_nhcl[n], key_hck).mT, new_hcv))
    return Solved(torch.stack(news), inverse_nhcs, torch.stack(passing))


def _run_chunks_backward(
    vectors: Vectors,
    weights: Weights,
    solved: Solved,
    sent: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """``d_value_nhcv`` and the gradient of what passes from chunk to chunk; sent: those of new, read and last."""
    key_nhck, query_nhck = vectors
    d_new_nhcv, d_read_nhcv, d_last_hkv = sent
    read_nhkv = _spread(weights.read_nhcl, query_nhck).mT @ d_read_nhcv
    d_passing, d_values = [d_last_hkv], []
    for n in reversed(range(len(key_nhck))):
        d_left_hkv, key_hck = d_passing[-1], key_nhck[n]
        d_value_hcv = torch.baddbmm(d_new_nhcv[n], _spread(weights.write_nhcl[n], key_hck), d_left_hkv)
        d_came_hkv = read_nhkv[n] + _carry(weights.carry_nhll[n].mT, d_left_hkv)
        if solved.inverse_nhcs is not None:
            d_value_hcv = solved.inverse_nhcs[n].mT @ d_value_hcv
        if weights.probe_nhcl is not None:
            d_came_hkv = torch.baddbmm(d_came_hkv, _spread(weights.probe_nhcl[n], key_hck).mT, d_value_hcv, alpha=-1)
        d_values.append(d_value_hcv)
        d_passing.append(d_came_hkv)
    d_value_nhcv = torch.stack(d_values[::-1])
    del d_values, read_nhkv
    return d_value_nhcv, torch.stack(d_passing[::-1])


def _weigh(product_nhcs: Tensor, intra_nhcs: Tensor, *, is_earlier: bool) -> Tensor:
    """The product times the weights, or times the weights one token earlier; in place."""
    if not is_earlier:
        return product_nhcs.mul_(intra_nhcs)
    product_nhcs[..., 1:, :].mul_(intra_nhcs[..., :-1, :])
    product_nhcs[..., 0, :].zero_()
    return product_nhcs


def sooner(rows: Float[Tensor, "n h c ..."]) -> Float[Tensor, "n h c ..."]:
    """Each row in the place of the one before it, the last zero."""
    return torch.cat([rows[..., 1:, :], torch.zeros_like(rows[..., :1, :])], dim=-2)


def _invert(strict_nhcs: Tensor) -> Tensor:
    """``(I + strict)^-1``."""
    identity_cs = torch.eye(strict_nhcs.shape[-1], dtype=strict_nhcs.dtype, device=strict_nhcs.device)
    return solve_unit_lower(strict_nhcs, identity_cs.expand_as(strict_nhcs))


def _spread(weight_nhcl: Tensor, vector_nhck: Tensor) -> Tensor:
    """One copy of the vectors for every weight, side by side along k."""
    return (weight_nhcl[..., None] * vector_nhck[..., None, :]).flatten(-2)


def _despread(
    d_spread_nhck: Tensor, weight_nhcl: Tensor, vector_nhck: Tensor, onto_nhck: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of the vectors and of the weights of ``spread``; onto_nhck: where the first is added, in place."""
    d_copies_nhclk = d_spread_nhck.unflatten(-1, (weight_nhcl.shape[-1], -1))
    d_weight_nhcl = torch.linalg.vecdot(d_copies_nhclk, vector_nhck[..., None, :])
    first, *others = zip(d_copies_nhclk.unbind(-2), weight_nhcl.split(1, dim=-1), strict=True)
    d_vector_nhck = torch.mul(*first) if onto_nhck is None else onto_nhck.addcmul_(*first)
    for d_copy_nhck, weight_nhc1 in others:
        d_vector_nhck.addcmul_(d_copy_nhck, weight_nhc1)
    return d_vector_nhck, d_weight_nhcl


def _carry(carried_hll: Tensor, passing_hkv: Tensor) -> Tensor:
    """Memory and momentum after a chunk in which nothing is written: each a mix of the two."""
    return (carried_hll @ _by_level(passing_hkv, carried_hll)).view_as(passing_hkv)


def _by_level(passing_nhkv: Tensor, carry_nhll: Tensor) -> Tensor:
    """Memory and momentum as one row each."""
    return passing_nhkv.unflatten(-2, (carry_nhll.shape[-1], -1)).flatten(-2)


def _add_product(sum_nhck: Tensor, left_nhcs: Tensor, right_nhsk: Tensor) -> None:
    """``sum += left @ right``, in place, in one pass."""
    sum_nhck.flatten(0, 1).baddbmm_(left_nhcs.flatten(0, 1), right_nhsk.flatten(0, 1))


def _minus_product(left_nhcv: Tensor, right_nhvk: Tensor) -> Tensor:
    """``- left @ right``, in one pass."""
    minus_nhck = left_nhcv.new_empty(*left_nhcv.shape[:-1], right_nhvk.shape[-1])
    minus_nhck.flatten(0, 1).baddbmm_(left_nhcv.flatten(0, 1), right_nhvk.flatten(0, 1), beta=0, alpha=-1)
    return minus_nhck
