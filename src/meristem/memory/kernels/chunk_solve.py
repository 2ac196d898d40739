"""The arithmetic of the exact chunk form, forward and backward, with the decays already turned into weights.

For every chunk, with memory and momentum stacked in ``Z`` and rows of weights written before what they scale::

    D N = V - [w K] Z        D = I + inner * K K^T      what is new in each value: minus the residual
    Y   = [a Q] Z + (outer * Q K^T) N                   what is read
    Z'  = C Z + [r K]^T N                               what leaves the chunk

``[w K]`` is ``w_1 K`` beside ``w_2 K``, one for memory and one for momentum. Only the line of ``Z'`` must be done in
order, and in reverse order its adjoint ``dZ = C^T dZ' + [a Q]^T dY - [w K]^T dV`` with ``dV = D^-T dN`` and
``dN = (outer * Q K^T)^T dY + [r K] dZ'``; everything else is one batched matrix product for all chunks. Kept for the
backward pass are the inputs, N, D^-1 and Z at the chunk starts: nothing that holds a matrix per token.

Axes: n chunks, h batch and heads folded together, c and s tokens within a chunk, l memory and momentum, k key width
(of memory and momentum side by side in what is spread or stacked), v value width.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meristem.memory.kernels.select import loop_kernel
from meristem.memory.value import full_precision


class ChunkSolve(torch.autograd.Function):
    """``apply(keys, values, queries, inner, outer, probe, sight, arriving, carried, first) -> (read, last)``.

    inner_nhcs: strictly lower triangular, or None where a write does not look at what its chunk wrote: D is I.
    probe_nhcl, sight_nhcl, arriving_nhcl: the weights w, a and r. probe_nhcl is None where a write does not look at the
    memory at all. carried_nhll: C.
    first_hkv, last_hkv: memory over momentum, along k.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        key_nhck, value_nhcv, query_nhck, inner_nhcs, outer_nhcs, *weights, first_hkv = inputs
        probe_nhcl, sight_nhcl, arriving_nhcl, carried_nhll = weights
        arriving_nhck = _spread(arriving_nhcl, key_nhck)
        inverse_nhcs = None if inner_nhcs is None else _invert(inner_nhcs * (key_nhck @ key_nhck.mT))
        probe_nhck = None if probe_nhcl is None else _spread(probe_nhcl, key_nhck)
        # Chosen once: the way back may run on another thread, or after ``force_reference`` has ended.
        ctx.kernel = loop_kernel(key_nhck, value_nhcv)
        if ctx.kernel is not None:
            solved = inverse_nhcs, probe_nhcl, arriving_nhcl, carried_nhll
            entering_nhkv, new_nhcv, passing_hkv = ctx.kernel.walk(key_nhck, value_nhcv, first_hkv, solved)
        else:
            passing_hkv, entering, news = first_hkv, [], []
            for n in range(len(key_nhck)):
                entering.append(passing_hkv)
                new_hcv = value_nhcv[n]
                if probe_nhck is not None:
                    new_hcv = torch.baddbmm(new_hcv, probe_nhck[n], passing_hkv, alpha=-1)
                if inverse_nhcs is not None:
                    new_hcv = inverse_nhcs[n] @ new_hcv
                news.append(new_hcv)
                passing_hkv = torch.baddbmm(_carry(carried_nhll[n], passing_hkv), arriving_nhck[n].mT, new_hcv)
            entering_nhkv, new_nhcv = torch.stack(entering), torch.stack(news)
        mixing_nhcs = (query_nhck @ key_nhck.mT) * outer_nhcs
        read_nhcv = _add_product(mixing_nhcs @ new_nhcv, _spread(sight_nhcl, query_nhck), entering_nhkv)
        made = new_nhcv, inverse_nhcs, entering_nhkv
        ctx.save_for_backward(key_nhck, query_nhck, *made, inner_nhcs, outer_nhcs, *weights)
        return read_nhcv, passing_hkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_read_nhcv: Tensor, d_last_hkv: Tensor) -> tuple[Tensor | None, ...]:
        # The engine may call this under the caller's autocast; memories keep their precision backwards as well.
        with full_precision(d_read_nhcv.device):
            return _backward(ctx.kernel, ctx.saved_tensors, d_read_nhcv.contiguous(), d_last_hkv)


class Between(torch.autograd.Function):
    """``apply(total) -> factor``: exp(total_c - total_s) for s <= c, else 0, along the last axis, whatever leads.

    Autograd would pass six times over what one product and two sums give.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor) -> Tensor:
        # Clamped before exp: above the diagonal the difference is positive, would overflow, and is cut off afterwards.
        # Filling it with -inf instead costs seven times as much, for exp is slow on what it cannot represent.
        factor = (total[..., :, None] - total[..., None, :]).clamp(max=0.0).exp().tril()
        ctx.save_for_backward(factor)
        return factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_factor: Tensor) -> Tensor:
        (factor,) = ctx.saved_tensors
        d_difference = d_factor * factor
        return d_difference.sum(dim=-1) - d_difference.sum(dim=-2)


def _backward(
    kernel: ModuleType | None, saved: tuple[Any, ...], d_read_nhcv: Tensor, d_last_hkv: Tensor
) -> tuple[Tensor | None, ...]:
    key_nhck, query_nhck, new_nhcv, inverse_nhcs, entering_nhkv, inner_nhcs, outer_nhcs, *weights = saved
    probe_nhcl, sight_nhcl, arriving_nhcl, carried_nhll = weights
    likeness_nhcs = query_nhck @ key_nhck.mT
    d_new_nhcv = (likeness_nhcs * outer_nhcs).mT @ d_read_nhcv
    d_entering_nhkv = _spread(sight_nhcl, query_nhck).mT @ d_read_nhcv
    arriving_nhck = _spread(arriving_nhcl, key_nhck)
    probe_nhck = None if probe_nhcl is None else _spread(probe_nhcl, key_nhck)
    if kernel is not None:
        solved = inverse_nhcs, probe_nhcl, arriving_nhcl, carried_nhll
        d_leaving_nhkv, d_value_nhcv, d_passing_hkv = kernel.walk_back(
            key_nhck, d_new_nhcv, d_last_hkv, d_entering_nhkv, solved
        )
    else:
        d_passing_hkv, d_leaving, d_values = d_last_hkv, [], []
        for n in reversed(range(len(key_nhck))):
            d_leaving.append(d_passing_hkv)
            d_value_hcv = torch.baddbmm(d_new_nhcv[n], arriving_nhck[n], d_passing_hkv)
            d_passing_hkv = _carry(carried_nhll[n].mT, d_passing_hkv) + d_entering_nhkv[n]
            if inverse_nhcs is not None:
                d_value_hcv = inverse_nhcs[n].mT @ d_value_hcv
            if probe_nhck is not None:
                d_passing_hkv = torch.baddbmm(d_passing_hkv, probe_nhck[n].mT, d_value_hcv, alpha=-1)
            d_values.append(d_value_hcv)
        d_leaving_nhkv, d_value_nhcv = torch.stack(d_leaving[::-1]), torch.stack(d_values[::-1])

    d_mixing_nhcs = d_read_nhcv @ new_nhcv.mT
    d_outer_nhcs, d_likeness_nhcs = d_mixing_nhcs * likeness_nhcs, d_mixing_nhcs * outer_nhcs
    d_query_nhck, d_sight_nhcl = _despread(d_read_nhcv @ entering_nhkv.mT, sight_nhcl, query_nhck)
    d_key_nhck, d_arriving_nhcl = _despread(new_nhcv @ d_leaving_nhkv.mT, arriving_nhcl, key_nhck)
    d_query_nhck = _add_product(d_query_nhck, d_likeness_nhcs, key_nhck)
    d_key_nhck = _add_product(d_key_nhck, d_likeness_nhcs.mT, query_nhck)
    d_left_nhlk, came_nhlk = (
        x.unflatten(-2, (-1, key_nhck.shape[-1])).flatten(-2) for x in (d_leaving_nhkv, entering_nhkv)
    )
    d_carried_nhll = d_left_nhlk @ came_nhlk.mT
    d_inner_nhcs, d_probe_nhcl, d_side_nhcv = None, None, -d_value_nhcv
    if probe_nhcl is not None:
        d_probed_nhck, d_probe_nhcl = _despread(d_side_nhcv @ entering_nhkv.mT, probe_nhcl, key_nhck)
        d_key_nhck = d_key_nhck + d_probed_nhck
    if inner_nhcs is not None:
        d_system_nhcs = d_side_nhcv @ new_nhcv.mT
        d_inner_nhcs, d_alike_nhcs = d_system_nhcs * (key_nhck @ key_nhck.mT), d_system_nhcs * inner_nhcs
        d_key_nhck = _add_product(d_key_nhck, d_alike_nhcs, key_nhck)
        d_key_nhck = _add_product(d_key_nhck, d_alike_nhcs.mT, key_nhck)
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


def _invert(strict_nhcs: Tensor) -> Tensor:
    """(I + strict)^-1 by substitution: a product of powers would lose all digits when keys are alike."""
    identity_cs = torch.eye(strict_nhcs.shape[-1], dtype=strict_nhcs.dtype, device=strict_nhcs.device)
    sides_nhcs = identity_cs.expand_as(strict_nhcs)
    return torch.linalg.solve_triangular(strict_nhcs, sides_nhcs, upper=False, unitriangular=True)


def _spread(weight_nhcl: Tensor, vector_nhck: Tensor) -> Tensor:
    """One copy of the vectors for every weight, side by side along k."""
    return (weight_nhcl[..., None] * vector_nhck[..., None, :]).flatten(-2)


def _despread(d_spread_nhck: Tensor, weight_nhcl: Tensor, vector_nhck: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the vectors and of the weights of ``spread``."""
    pieces = list(zip(d_spread_nhck.split(vector_nhck.shape[-1], dim=-1), weight_nhcl.split(1, dim=-1), strict=True))
    d_vector_nhck = pieces[0][0] * pieces[0][1]
    for d_copy_nhck, weight_nhc1 in pieces[1:]:
        d_vector_nhck = torch.addcmul(d_vector_nhck, d_copy_nhck, weight_nhc1)
    return d_vector_nhck, torch.stack([torch.linalg.vecdot(d_copy, vector_nhck) for d_copy, _ in pieces], dim=-1)


def _carry(carried_hll: Tensor, passing_hkv: Tensor) -> Tensor:
    """Memory and momentum after a chunk in which nothing is written: each a mix of the two."""
    stacked_hlk = passing_hkv.unflatten(-2, (carried_hll.shape[-1], -1)).flatten(-2)
    return (carried_hll @ stacked_hlk).view_as(passing_hkv)


def _add_product(base_nhck: Tensor, left_nhcs: Tensor, right_nhsk: Tensor) -> Tensor:
    """``base + left @ right``, in one pass over the result."""
    folded = (x.flatten(0, 1) for x in (base_nhck, left_nhcs, right_nhsk))
    return torch.baddbmm(*folded).unflatten(0, base_nhck.shape[:2])
