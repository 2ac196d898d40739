"""Weights of which each row wrote an outer product, and what rows read there: two steps of the frozen chunk form.

For one stored tensor W of a chunk, its momentum S where there is one, and the rows a and d of the surprise::

    Y  = A Q W + c Q S - (intra * Q a^T) d                   what rows Q read (``FrozenRead``)
    W' = C W + ... - (r a)^T d,  S' = H S - (r' a)^T d       what leaves the chunk (``FrozenWrite``)

with weights for rows before what they scale. The gradients are written out: autograd passes once over every matrix for
each weight and term, which takes longer than the products. Weights of rows are taken into the narrower side of a
product, so that a hidden layer is never scaled; saved for the backward pass are the inputs alone, and what is narrow.

Axes: n batch and heads folded, c and s tokens of the chunk, i and j the widths of what goes into a weight tensor and
comes out of it, l memory and momentum.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meristem.memory.state import full_precision


class FrozenRead(torch.autograd.Function):
    """``apply(rows_bhci, inward_bhsi, outward_bhsj, intra_bhcs, entering_bhcl, *stored_bhij) -> met_bhcj``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        rows_nci, inward_nsi, outward_nsj, intra_ncs, entering_ncl, *stored = (x.flatten(0, 1) for x in inputs)
        weights = entering_ncl.split(1, dim=-1)
        products: list[Tensor] = []
        if _is_narrow(rows_nci, outward_nsj):
            met_ncj = (weights[0] * rows_nci) @ stored[0]
            for weight_nc1, stored_nij in zip(weights[1:], stored[1:], strict=True):
                met_ncj = met_ncj.baddbmm_(weight_nc1 * rows_nci, stored_nij)
        else:
            products = [rows_nci @ stored_nij for stored_nij in stored]
            met_ncj = _weighed_sum(weights, products)
        ctx.save_for_backward(*inputs, *products)
        mixing_ncs = (rows_nci @ inward_nsi.mT).mul_(intra_ncs)
        return met_ncj.baddbmm_(mixing_ncs, outward_nsj, alpha=-1).unflatten(0, inputs[0].shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_met_bhcj: Tensor) -> tuple[Tensor, ...]:
        n_stored = ctx.saved_tensors[4].shape[-1]
        inputs, products = ctx.saved_tensors[: 5 + n_stored], ctx.saved_tensors[5 + n_stored :]
        # The engine may call this under the caller's autocast; memories keep their precision backwards as well.
        with full_precision(d_met_bhcj.device):
            found = _read_backward(d_met_bhcj.flatten(0, 1), [x.flatten(0, 1) for x in inputs], products)
        return tuple(x.unflatten(0, d_met_bhcj.shape[:2]) for x in found)


def _read_backward(d_met_ncj: Tensor, inputs: list[Tensor], products: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    rows_nci, inward_nsi, outward_nsj, intra_ncs, entering_ncl, *stored = inputs
    weights = entering_ncl.split(1, dim=-1)
    # What is subtracted in the end is transposed here, where it is small.
    alike_ncs = rows_nci @ inward_nsi.mT
    d_mixing_ncs = (d_met_ncj @ outward_nsj.mT).neg_()
    d_alike_ncs = d_mixing_ncs * intra_ncs
    d_outward_nsj = (alike_ncs * intra_ncs).neg_().mT @ d_met_ncj
    d_inward_nsi = d_alike_ncs.mT @ rows_nci
    if products:
        scaled = [weight_nc1 * d_met_ncj for weight_nc1 in weights]
        d_stored = [rows_nci.mT @ scaled_ncj for scaled_ncj in scaled]
        d_weights = [(d_met_ncj * product_ncj).sum(dim=-1) for product_ncj in products]
        d_rows_nci = scaled[0] @ stored[0].mT
        for scaled_ncj, stored_nij in zip(scaled[1:], stored[1:], strict=True):
            d_rows_nci = d_rows_nci.baddbmm_(scaled_ncj, stored_nij.mT)
    else:
        d_stored = [(weight_nc1 * rows_nci).mT @ d_met_ncj for weight_nc1 in weights]
        pulled = [d_met_ncj @ stored_nij.mT for stored_nij in stored]
        d_weights = [(pulled_nci * rows_nci).sum(dim=-1) for pulled_nci in pulled]
        d_rows_nci = _weighed_sum(weights, pulled)
    d_rows_nci = d_rows_nci.baddbmm_(d_alike_ncs, inward_nsi)
    d_intra_ncs, d_entering_ncl = d_mixing_ncs.mul_(alike_ncs), torch.stack(d_weights, dim=-1)
    return d_rows_nci, d_inward_nsi, d_outward_nsj, d_intra_ncs, d_entering_ncl, *d_stored


class FrozenWrite(torch.autograd.Function):
    """``apply(address_bhsi, gradient_bhsj, write_bhsl, carry_bhll, *stored_bhij) -> left_bhij, ...``.

    The memory is carried into the memory, the momentum into both.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        address_nsi, gradient_nsj, write_nsl, carry_nll, *stored = (x.flatten(0, 1) for x in inputs)
        ctx.save_for_backward(*inputs)
        carried = carry_nll[..., None, None]
        left = [carried[:, at, at] * stored_nij for at, stored_nij in enumerate(stored)]
        if len(stored) > 1:
            left[0].addcmul_(carried[:, 0, 1], stored[1])
        is_narrow = _is_narrow(address_nsi, gradient_nsj)
        for left_nij, weight_ns1 in zip(left, write_nsl.split(1, dim=-1), strict=True):
            if is_narrow:
                left_nij.baddbmm_((weight_ns1 * address_nsi).mT, gradient_nsj, alpha=-1)
            else:
                left_nij.baddbmm_(address_nsi.mT, weight_ns1 * gradient_nsj, alpha=-1)
        return tuple(left_nij.unflatten(0, inputs[0].shape[:2]) for left_nij in left)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_left: Tensor) -> tuple[Tensor, ...]:
        with full_precision(d_left[0].device):
            found = _write_backward(*([x.flatten(0, 1) for x in xs] for xs in (d_left, ctx.saved_tensors)))
        return tuple(x.unflatten(0, d_left[0].shape[:2]) for x in found)


def _write_backward(d_left: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    address_nsi, gradient_nsj, write_nsl, carry_nll, *stored = inputs
    is_narrow = _is_narrow(address_nsi, gradient_nsj)
    narrow_nsi, wide_nsj = (address_nsi, gradient_nsj) if is_narrow else (gradient_nsj, address_nsi)
    rotated = d_left if is_narrow else [d_left_nij.mT for d_left_nij in d_left]
    weights = (-write_nsl).split(1, dim=-1)
    pulled = [wide_nsj @ d_left_nij.mT for d_left_nij in rotated]
    d_weights = [(pulled_nsi * narrow_nsi).sum(dim=-1) for pulled_nsi in pulled]
    d_wide_nsj = (weights[0] * narrow_nsi) @ rotated[0]
    for weight_ns1, d_left_nij in zip(weights[1:], rotated[1:], strict=True):
        d_wide_nsj = d_wide_nsj.baddbmm_(weight_ns1 * narrow_nsi, d_left_nij)
    sides = _weighed_sum(weights, pulled), d_wide_nsj
    carried = carry_nll[..., None, None]
    d_stored = [carried[:, at, at] * d_left_nij for at, d_left_nij in enumerate(d_left)]
    if len(stored) > 1:
        d_stored[1].addcmul_(carried[:, 0, 1], d_left[0])
    d_carried = [(d * x).sum(dim=(-2, -1)) for at, d in enumerate(d_left) for x in stored[at:]]
    if len(stored) > 1:
        d_carried.insert(2, torch.zeros_like(d_carried[0]))
    d_write_nsl = torch.stack(d_weights, dim=-1).neg_()
    return (
        *(sides if is_narrow else sides[::-1]),
        d_write_nsl,
        torch.stack(d_carried, dim=-1).view_as(carry_nll),
        *d_stored,
    )


def _is_narrow(rows_nci: Tensor, rows_ncj: Tensor) -> bool:
    return rows_nci.shape[-1] <= rows_ncj.shape[-1]


def _weighed_sum(weights: tuple[Tensor, ...], parts: list[Tensor]) -> Tensor:
    total = weights[0] * parts[0]
    for weight_nc1, part_nci in zip(weights[1:], parts[1:], strict=True):
        total.addcmul_(weight_nc1, part_nci)
    return total
