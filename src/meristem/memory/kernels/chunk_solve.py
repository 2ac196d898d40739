"""The arithmetic of the exact chunk form, forward and backward, with the decays already turned into weights.

For every chunk, with memory and momentum stacked in ``Z`` and rows of weights written before what they scale::

    D E = [w K] Z - V        D = I + inner * K K^T      residuals of the chunk
    Y   = [a Q] Z - (outer * Q K^T) E                   what is read
    Z'  = C Z - [r K]^T E                               what leaves the chunk

``[w K]`` is ``w_1 K`` beside ``w_2 K``, one for memory and one for momentum. Only the line of ``Z'`` must be done in order, and
its adjoint ``dZ = C^T dZ' + [w K]^T D^-T (dE - [r K] dZ') + [a Q]^T dY`` in reverse order; everything else is one batched
matrix product for all chunks. Kept for the backward pass are the inputs, E, D^-1 and Z at the chunk starts: nothing grows
with time times key width times value width.

Axes: n chunks, h batch and heads folded together, c and s tokens within a chunk, l memory and momentum, k key width, the two
side by side where a comment says so, v value width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ChunkSolve(torch.autograd.Function):
    """``apply(key_nhck, value_nhcv, query_nhck, inner_nhcs, outer_nhcs, probe_nhcl, sight_nhcl, arriving_nhcl, carried_nhll,
    first_hkv) -> read_nhcv, last_hkv``.

    inner_nhcs: strictly lower triangular, or None where the surprise does not look at the memory; then probe_nhcl is None too.
    first_hkv, last_hkv: memory over momentum, along k.
    """

    @staticmethod
    def forward(
        ctx: Any,
        key_nhck: Tensor,
        value_nhcv: Tensor,
        query_nhck: Tensor,
        inner_nhcs: Tensor | None,
        outer_nhcs: Tensor,
        probe_nhcl: Tensor | None,
        sight_nhcl: Tensor,
        arriving_nhcl: Tensor,
        carried_nhll: Tensor,
        first_hkv: Tensor,
    ) -> tuple[Tensor, Tensor]:
        arriving_nhck = spread(arriving_nhcl, key_nhck)
        inverse_nhcs = probe_nhck = None
        if inner_nhcs is not None and probe_nhcl is not None:
            inverse_nhcs = invert(inner_nhcs * (key_nhck @ key_nhck.mT))
            probe_nhck = spread(probe_nhcl, key_nhck)
        passing_hkv, entering, residuals = first_hkv, [], []
        for n in range(len(key_nhck)):
            entering.append(passing_hkv)
            residual_hcv = -value_nhcv[n]
            if inverse_nhcs is not None and probe_nhck is not None:
                residual_hcv = inverse_nhcs[n] @ torch.baddbmm(residual_hcv, probe_nhck[n], passing_hkv)
            residuals.append(residual_hcv)
            passing_hkv = torch.baddbmm(carry(carried_nhll[n], passing_hkv), arriving_nhck[n].mT, residual_hcv, alpha=-1)
        entering_nhkv, residual_nhcv = torch.stack(entering), torch.stack(residuals)
        mixing_nhcs = (query_nhck @ key_nhck.mT) * outer_nhcs
        read_nhcv = add_product(spread(sight_nhcl, query_nhck) @ entering_nhkv, mixing_nhcs, residual_nhcv, scale=-1)
        ctx.save_for_backward(
            key_nhck,
            query_nhck,
            inner_nhcs,
            outer_nhcs,
            probe_nhcl,
            sight_nhcl,
            arriving_nhcl,
            carried_nhll,
            residual_nhcv,
            inverse_nhcs,
            entering_nhkv,
        )
        return read_nhcv, passing_hkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_read_nhcv: Tensor, d_last_hkv: Tensor) -> tuple[Tensor | None, ...]:
        (key_nhck, query_nhck, inner_nhcs, outer_nhcs, probe_nhcl, sight_nhcl, arriving_nhcl, carried_nhll) = (
            ctx.saved_tensors[:8]
        )
        residual_nhcv, inverse_nhcs, entering_nhkv = ctx.saved_tensors[8:]
        d_read_nhcv = d_read_nhcv.contiguous()
        likeness_nhcs = query_nhck @ key_nhck.mT
        d_residual_nhcv = -((likeness_nhcs * outer_nhcs).mT @ d_read_nhcv)
        d_entering_nhkv = spread(sight_nhcl, query_nhck).mT @ d_read_nhcv
        arriving_nhck = spread(arriving_nhcl, key_nhck)
        probe_nhck = None if probe_nhcl is None else spread(probe_nhcl, key_nhck)
        d_passing_hkv, d_leaving, d_sides = d_last_hkv, [], []
        for n in reversed(range(len(key_nhck))):
            d_leaving.append(d_passing_hkv)
            d_side_hcv = d_residual_nhcv[n].baddbmm(arriving_nhck[n], d_passing_hkv, alpha=-1)
            d_passing_hkv = carry(carried_nhll[n].mT, d_passing_hkv) + d_entering_nhkv[n]
            if inverse_nhcs is not None and probe_nhck is not None:
                d_side_hcv = inverse_nhcs[n].mT @ d_side_hcv
                d_passing_hkv = torch.baddbmm(d_passing_hkv, probe_nhck[n].mT, d_side_hcv)
            d_sides.append(d_side_hcv)
        d_leaving_nhkv, d_value_nhcv = torch.stack(d_leaving[::-1]), -torch.stack(d_sides[::-1])

        d_mixing_nhcs = -(d_read_nhcv @ residual_nhcv.mT)
        d_outer_nhcs = d_mixing_nhcs * likeness_nhcs
        d_likeness_nhcs = d_mixing_nhcs * outer_nhcs
        d_query_nhck, d_sight_nhcl = despread(d_read_nhcv @ entering_nhkv.mT, sight_nhcl, query_nhck)
        d_key_nhck, d_arriving_nhcl = despread(-(residual_nhcv @ d_leaving_nhkv.mT), arriving_nhcl, key_nhck)
        d_query_nhck = add_product(d_query_nhck, d_likeness_nhcs, key_nhck)
        d_key_nhck = add_product(d_key_nhck, d_likeness_nhcs.mT, query_nhck)
        d_carried_nhll = torch.einsum("nhikv,nhjkv->nhij", _stacked(d_leaving_nhkv, key_nhck), _stacked(entering_nhkv, key_nhck))
        d_inner_nhcs = d_probe_nhcl = None
        if inner_nhcs is not None:
            d_system_nhcs = d_value_nhcv @ residual_nhcv.mT
            d_inner_nhcs = d_system_nhcs * (key_nhck @ key_nhck.mT)
            d_alike_nhcs = d_system_nhcs * inner_nhcs
            d_probed_nhck, d_probe_nhcl = despread(-(d_value_nhcv @ entering_nhkv.mT), probe_nhcl, key_nhck)
            d_key_nhck = add_product(d_key_nhck + d_probed_nhck, d_alike_nhcs + d_alike_nhcs.mT, key_nhck)
        return (
            d_key_nhck,
            d_value_nhcv,
            d_query_nhck,
            d_inner_nhcs,
            d_outer_nhcs,
            d_probe_nhcl,
            d_sight_nhcl,
            d_arriving_nhcl,
            d_carried_nhll,
            d_passing_hkv,
        )


def invert(strict_nhcs: Tensor) -> Tensor:
    """(I + strict)^-1 by substitution, the only stable way: a product of powers loses all digits when keys are alike."""
    identity_cs = torch.eye(strict_nhcs.shape[-1], dtype=strict_nhcs.dtype, device=strict_nhcs.device)
    return torch.linalg.solve_triangular(strict_nhcs, identity_cs.expand_as(strict_nhcs), upper=False, unitriangular=True)


def spread(weight_nhcl: Tensor, vector_nhck: Tensor) -> Tensor:
    """One copy of the vectors for every weight, side by side along k."""
    return (weight_nhcl[..., None] * vector_nhck[..., None, :]).flatten(-2)


def despread(d_spread_nhck: Tensor, weight_nhcl: Tensor, vector_nhck: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the vectors and of the weights of ``spread``."""
    d_copies_nhclk = d_spread_nhck.unflatten(-1, (weight_nhcl.shape[-1], -1))
    return (weight_nhcl[..., None, :] @ d_copies_nhclk).squeeze(-2), (d_copies_nhclk @ vector_nhck[..., None]).squeeze(-1)


def carry(carried_hll: Tensor, passing_hkv: Tensor) -> Tensor:
    """Memory and momentum after a chunk in which nothing is written: a mix of the two by weights."""
    n_stacked = carried_hll.shape[-1]
    return (carried_hll @ passing_hkv.unflatten(-2, (n_stacked, -1)).flatten(-2)).unflatten(-1, (-1, passing_hkv.shape[-1])).flatten(-3, -2)


def add_product(base_nhck: Tensor, left_nhcs: Tensor, right_nhsk: Tensor, *, scale: float = 1) -> Tensor:
    """``base + scale * left @ right``, in one pass over the result."""
    folded = (x.flatten(0, 1) for x in (base_nhck, left_nhcs, right_nhsk))
    return torch.baddbmm(*folded, alpha=scale).unflatten(0, base_nhck.shape[:2])


def _stacked(passing_nhkv: Tensor, key_nhck: Tensor) -> Tensor:
    return passing_nhkv.unflatten(-2, (-1, key_nhck.shape[-1]))
