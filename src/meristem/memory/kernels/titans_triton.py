"""The chunk loop of ``chunk_solve`` as one Triton kernel per pass: what every linear rule, titans first, launches most.

For every chunk, with memory and momentum stacked in ``Z`` and rows of weights written before what they scale::

    N  = D^-1 (X + [i K] Z)         what is new in the chunk
    Z' = C Z + A + [o K]^T N        what leaves the chunk

Forwards X is the values, i the probe's weights with a minus, o the write weights, and there is no A. Backwards the same
walk, last chunk first, is its own adjoint: i and o change places, D^-1 and C are transposed, X is dN, and A what the
reads send to Z. Z never leaves the chip; a column of values never meets another, so that every program takes a few
columns of one head through all chunks.

Products are exact float32 (``input_precision="ieee"``): the loop is what a memory is made of, and TF32 would drift.

Axes as in ``chunk_solve``, h batch and heads folded together.
Source: the chunk recurrence of DeltaNet (Yang 2406.06484, section 3.2), with momentum below the memory (memory.md 4.3).
"""

from contextlib import nullcontext
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

Solved: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor, Tensor]
"""inverse_nhcs (D^-1), probe_nhcl (w), write_nhcl (r), carry_nhll (C); the first two None where a write does not
read the memory."""

Walked: TypeAlias = tuple[Float[Tensor, "n h ... v"], Float[Tensor, "n h c v"], Float[Tensor, "h ... v"]]

MOST_COLUMNS = 32
"""Columns of values that one program carries: more would spill, fewer would read the keys too often."""


def run_chunks(
    key_nhck: Float[Tensor, "n h c k"],
    value_nhcv: Float[Tensor, "n h c v"],
    first_hkv: Float[Tensor, "h ... v"],
    solved: Solved,
) -> Walked:
    """``entering_nhkv, new_nhcv, last_hkv``: Z before every chunk, N of every chunk, Z after the last."""
    inverse_nhcs, probe_nhcl, write_nhcl, carry_nhll = solved
    into_nhcl = None if probe_nhcl is None else -probe_nhcl
    does = into_nhcl, inverse_nhcs, write_nhcl, carry_nhll
    return _launch(key_nhck, value_nhcv, first_hkv, None, does, is_reversed=False)


def run_chunks_backward(
    key_nhck: Float[Tensor, "n h c k"],
    d_new_nhcv: Float[Tensor, "n h c v"],
    d_last_hkv: Float[Tensor, "h ... v"],
    d_entering_nhkv: Float[Tensor, "n h ... v"],
    solved: Solved,
) -> Walked:
    """``d_leaving_nhkv, d_value_nhcv, d_first_hkv`` from what the reads and what follows the sequence send back."""
    inverse_nhcs, probe_nhcl, write_nhcl, carry_nhll = solved
    onto_nhcl = None if probe_nhcl is None else -probe_nhcl
    inverse_nhcs = None if inverse_nhcs is None else inverse_nhcs.mT
    does = write_nhcl, inverse_nhcs, onto_nhcl, carry_nhll.mT
    return _launch(key_nhck, d_new_nhcv, d_last_hkv, d_entering_nhkv, does, is_reversed=True)


def _launch(
    key_nhck: Tensor,
    side_nhcv: Tensor,
    first_hkv: Tensor,
    added_nhkv: Tensor | None,
    does: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor],
    is_reversed: bool,
) -> Walked:
    """does: i, D^-1, o and C of every chunk."""
    into_nhcl, inverse_nhcs, onto_nhcl, carry_nhll = does
    inverse_nhcs, carry_nhll = None if inverse_nhcs is None else _packed(inverse_nhcs), _packed(carry_nhll)
    key_nhck, side_nhcv, first_hkv = key_nhck.contiguous(), side_nhcv.contiguous(), first_hkv.contiguous()
    rest = into_nhcl, onto_nhcl, added_nhkv
    into_nhcl, onto_nhcl, added_nhkv = (None if x is None else x.contiguous() for x in rest)
    n_chunks, heads, chunk, key_width = key_nhck.shape
    value_width = side_nhcv.shape[-1]
    columns = min(value_width, MOST_COLUMNS)
    entering_nhkv = first_hkv.new_empty(n_chunks, *first_hkv.shape)
    new_nhcv, last_hkv = torch.empty_like(side_nhcv), torch.empty_like(first_hkv)
    with torch.cuda.device(key_nhck.device) if key_nhck.is_cuda else nullcontext():
        _walk_kernel[heads, value_width // columns](
            (key_nhck, into_nhcl, inverse_nhcs, onto_nhcl, carry_nhll, side_nhcv, first_hkv, added_nhkv),
            (entering_nhkv, new_nhcv, last_hkv),
            n_chunks,
            ((0, 0) if inverse_nhcs is None else inverse_nhcs.stride()[-2:]) + carry_nhll.stride()[-2:],
            sizes=(chunk, key_width, value_width, columns, 16),
            n_levels=carry_nhll.shape[-1],
            is_reversed=is_reversed,
            num_warps=8 if chunk * key_width > 64 * 64 else 4,
            num_stages=1,
        )
    return entering_nhkv, new_nhcv, last_hkv


def _packed(square: Tensor) -> Tensor:
    """A stack of matrices without gaps, each as it is or transposed; the kernel reads them by their strides."""
    return square if square.mT.is_contiguous() else square.contiguous()


def _run_chunks(
    taken: tl.tuple,
    made: tl.tuple,
    n_chunks: tl.tensor,
    strides: tl.tuple,
    sizes: tl.constexpr,
    n_levels: tl.constexpr,
    is_reversed: tl.constexpr,
) -> None:
    """One program: ``columns`` columns of the memory of one head, through all chunks.

    taken, made: what ``_launch`` gives and expects, None where there is nothing.
    strides: of the rows and columns of D^-1, then of C.
    sizes: chunk, key width, value width, columns, and how many terms of a product are on the chip at once: all terms of
    all products would need more registers than there are. What is summed in pieces is written to its place first.
    """
    key, into, inverse, onto, carried, side, first, added = taken
    entering, new, last = made
    chunk: tl.constexpr = sizes[0]
    key_width: tl.constexpr = sizes[1]
    value_width: tl.constexpr = sizes[2]
    below: tl.constexpr = key_width * value_width
    head = tl.program_id(0).to(tl.int64)
    row_c = tl.arange(0, chunk)
    column_v = tl.program_id(1) * sizes[3] + tl.arange(0, sizes[3])
    at_cv = row_c[:, None] * value_width + column_v[None, :]
    at_kv = tl.arange(0, key_width)[:, None] * value_width + column_v[None, :]

    memory_kv = tl.load(first + head * n_levels * below + at_kv)
    if n_levels == 2:
        momentum_kv = tl.load(first + head * n_levels * below + below + at_kv)
    for step in range(n_chunks):
        place = (n_chunks - 1 - step if is_reversed else step) * tl.num_programs(0) + head
        keys = key + place * chunk * key_width
        came = entering + place * n_levels * below
        news = new + place * chunk * value_width
        tl.store(came + at_kv, memory_kv)
        if n_levels == 2:
            tl.store(came + below + at_kv, momentum_kv)
        new_cv = tl.load(side + place * chunk * value_width + at_cv)
        if into is not None:
            tl.debug_barrier()
            weight_c = into + (place * chunk + row_c) * n_levels
            new_cv += tl.load(weight_c)[:, None] * _recall_tile(keys, came, column_v, sizes)
            if n_levels == 2:
                new_cv += tl.load(weight_c + 1)[:, None] * _recall_tile(keys, came + below, column_v, sizes)
        if inverse is not None:
            tl.store(news + at_cv, new_cv)
            tl.debug_barrier()
            new_cv = _solve_tile(inverse + place * chunk * chunk, strides, news, column_v, sizes)
            tl.debug_barrier()
        tl.store(news + at_cv, new_cv)
        mix = carried + place * n_levels * n_levels
        if n_levels == 2:
            past_kv = memory_kv
            memory_kv = tl.load(mix) * past_kv + tl.load(mix + strides[3]) * momentum_kv
            momentum_kv = tl.load(mix + strides[2]) * past_kv + tl.load(mix + strides[2] + strides[3]) * momentum_kv
        else:
            memory_kv = tl.load(mix) * memory_kv
        if added is not None:
            memory_kv += tl.load(added + place * n_levels * below + at_kv)
            if n_levels == 2:
                momentum_kv += tl.load(added + place * n_levels * below + below + at_kv)
        if onto is not None:
            tl.debug_barrier()
            weights = onto + place * chunk * n_levels
            memory_kv = _write_tile(memory_kv, keys, (weights, n_levels), news, column_v, sizes)
            if n_levels == 2:
                momentum_kv = _write_tile(momentum_kv, keys, (weights + 1, n_levels), news, column_v, sizes)
    tl.store(last + head * n_levels * below + at_kv, memory_kv)
    if n_levels == 2:
        tl.store(last + head * n_levels * below + below + at_kv, momentum_kv)


def _recall(keys: tl.tensor, came: tl.tensor, column_v: tl.tensor, sizes: tl.constexpr) -> tl.tensor:
    """``K Z`` of one level."""
    row_c, row_r = tl.arange(0, sizes[0]), tl.arange(0, sizes[4])
    recalled_cv = tl.zeros((sizes[0], sizes[3]), came.dtype.element_ty)
    for start in range(0, sizes[1], sizes[4]):
        key_cr = tl.load(keys + row_c[:, None] * sizes[1] + (start + row_r)[None, :])
        came_rv = tl.load(came + (start + row_r)[:, None] * sizes[2] + column_v[None, :])
        recalled_cv = tl.dot(key_cr, came_rv, recalled_cv, input_precision="ieee", out_dtype=recalled_cv.dtype)
    return recalled_cv


def _solve(
    inverse: tl.tensor, strides: tl.tuple, news: tl.tensor, column_v: tl.tensor, sizes: tl.constexpr
) -> tl.tensor:
    """``D^-1 N`` of what was written to ``news``."""
    row_c, row_r = tl.arange(0, sizes[0]), tl.arange(0, sizes[4])
    new_cv = tl.zeros((sizes[0], sizes[3]), news.dtype.element_ty)
    for start in range(0, sizes[0], sizes[4]):
        inverse_cr = tl.load(inverse + row_c[:, None] * strides[0] + (start + row_r)[None, :] * strides[1])
        side_rv = tl.load(news + (start + row_r)[:, None] * sizes[2] + column_v[None, :])
        new_cv = tl.dot(inverse_cr, side_rv, new_cv, input_precision="ieee", out_dtype=new_cv.dtype)
    return new_cv


def _write(
    memory_kv: tl.tensor,
    keys: tl.tensor,
    weights: tl.tuple,
    news: tl.tensor,
    column_v: tl.tensor,
    sizes: tl.constexpr,
) -> tl.tensor:
    """``Z + [o K]^T N`` of one level; weights: where o is, and the stride of its tokens."""
    row_k, row_r = tl.arange(0, sizes[1]), tl.arange(0, sizes[4])
    for start in range(0, sizes[0], sizes[4]):
        weight_r = tl.load(weights[0] + (start + row_r) * weights[1])
        key_kr = tl.load(keys + row_k[:, None] + (start + row_r)[None, :] * sizes[1])
        new_rv = tl.load(news + (start + row_r)[:, None] * sizes[2] + column_v[None, :])
        write_kr = weight_r[None, :] * key_kr
        memory_kv = tl.dot(write_kr, new_rv, memory_kv, input_precision="ieee", out_dtype=memory_kv.dtype)
    return memory_kv


_recall_tile, _solve_tile, _write_tile = triton.jit(_recall), triton.jit(_solve), triton.jit(_write)
_walk_kernel = triton.jit(_run_chunks)
