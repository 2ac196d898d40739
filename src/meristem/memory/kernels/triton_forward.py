"""The exact chunk form of the linear family in Triton, forward: the equations stand at the top of ``native/form.hpp``.

    weigh       every chunk at once: W and P row by row, and what a token finds of the memory that entered: a, b, h
    invert      every block of tokens on the diagonal of D at once: its inverse, by substitution
    merge       the inverses of two neighbouring blocks into that of both; one launch for each doubling
    run         the chunks of a head in order: N = D^-1 (V - z (a' K M + b' K S)), then M and S as they leave
    read        every chunk at once: Y = a Q M + b Q S + (W * Q K^T) N

A column of values never meets another in ``run``, so that each program takes a few columns of one head through all
chunks, and holds no more than the memory and the momentum of these. All else is parallel over chunks, and no kernel
holds more than three tiles at a time: what passes between them is in the device's memory. W and P follow from the
factors, and not from exponentials of summed logarithms: a factor of nearly nought, where a document begins, costs no
digits, and nothing cancels.

Products that make a memory have the precision of float32 (three TF32 products on tensor cores); those of reads may
have less.

Source: the UT transform of DeltaNet (Yang 2406.06484, section 3.2), with momentum below the memory (memory.md 4.3);
the split into kernels is that of flash-linear-attention's gated delta rule.
"""

import triton
import triton.language as tl

from meristem.memory.kernels.triton_tiles import (
    load_gate,
    load_matrix,
    load_pairs,
    load_scale,
    load_state,
    load_tokens,
    load_turned,
    place_of,
    store_pairs,
    store_state,
    store_tokens,
    times,
)


def _weigh(
    gates: tl.tuple, made: tl.tuple, n_time: tl.tensor, heads: tl.tensor, sizes: tl.constexpr, how: tl.constexpr
) -> None:
    """One chunk of one head, token by token.

    gates: retain, momentum, write. made: W and P, ``[tile + 1, tile]`` with a row of zeros before the first, and
    ``[3, tile + 1]`` with a, b and h before the first token and after each.
    """
    retain, momentum, write = gates
    weights, writes, through = made
    tile: tl.constexpr = sizes.tile
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = place_of(head, chunk, n_time, heads, sizes.chunk)
    at = head * tl.num_programs(1) + chunk
    column_s = tl.arange(0, tile)
    weights += at * (tile + 1) * tile + column_s
    through += at * 3 * (tile + 1)
    dtype: tl.constexpr = write.dtype.element_ty
    weight_s, a = tl.zeros([tile], dtype), tl.full([], 1.0, dtype)
    tl.store(weights, weight_s)
    tl.store(through, a)
    push_s, b, h = weight_s, tl.full([], 0.0, dtype), a
    if how.levels == 2:
        writes += at * (tile + 1) * tile + column_s
        tl.store(writes, push_s)
        tl.store(through + tile + 1, b)
        tl.store(through + 2 * (tile + 1), h)
    for token in range(place[2]):
        gate = place[0] + token * place[1]
        push_new_s = tl.where(column_s == token, tl.load(write + gate), 0.0)
        rho = tl.full([], 1.0, dtype)
        if retain is not None:
            rho = load_gate(retain, gate, how.least)
        if how.levels == 2:
            mu = load_gate(momentum, gate, how.least)
            push_s = mu * push_s + push_new_s
            h = mu * h
            b = rho * b + h
            tl.store(writes + (token + 1) * tile, push_s)
            tl.store(through + tile + 2 + token, b)
            tl.store(through + 2 * tile + 3 + token, h)
        else:
            push_s = push_new_s
        weight_s = rho * weight_s + push_s
        a = rho * a
        tl.store(weights + (token + 1) * tile, weight_s)
        tl.store(through + 1 + token, a)


def _strict(
    given: tl.tuple,
    place: tl.tuple,
    at: tl.tensor,
    rows: tl.tuple,
    sizes: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tensor:
    """``D - I`` of some tokens, against some: ``z W' * K K^T``. given: keys, W and scale. rows: of both."""
    keys, weights, scale = given
    row_i, column_j = rows
    alike_ij = tl.zeros([row_i.shape[0], column_j.shape[0]], keys.dtype.element_ty)
    for start in range(0, sizes.key_width, sizes.key_columns):
        column_k = start + tl.arange(0, sizes.key_columns)
        key_ik = load_tokens(keys, place, sizes.key_width, row_i, column_k)
        key_kj = load_turned(keys, place, sizes.key_width, column_j, column_k)
        alike_ij = times(key_ik, key_kj, alike_ij, precision)
    square = weights + at * (sizes.tile + 1) * sizes.tile
    earlier_ij = load_pairs(square, row_i, column_j, place[2], sizes.tile)
    return load_scale(scale, place, row_i, keys)[:, None] * earlier_ij * alike_ij


def _invert(
    given: tl.tuple,
    inverse: tl.tensor,
    n_time: tl.tensor,
    heads: tl.tensor,
    sizes: tl.constexpr,
    edge: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """A block of D on its diagonal, inverted by substitution. given: keys, W and scale. edge: tokens of a block.

    A product of powers would lose all digits where keys are alike.
    """
    head, chunk, first = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * edge
    place = place_of(head, chunk, n_time, heads, sizes.chunk)
    at = head * tl.num_programs(1) + chunk
    row_i = tl.arange(0, edge)
    strict_ij = strict(given, place, at, (first + row_i, first + row_i), sizes, precision)
    inverse_ij = tl.where(row_i[:, None] == row_i[None, :], 1.0, 0.0).to(strict_ij.dtype)
    for i in range(1, edge):
        is_row_ij = (row_i == i)[:, None]
        strict_j = tl.sum(tl.where(is_row_ij, strict_ij, 0.0), axis=0)
        minus_j = tl.sum(strict_j[:, None] * inverse_ij, axis=0)
        inverse_ij -= tl.where(is_row_ij, minus_j[None, :], 0.0)
    store_pairs(inverse + at * sizes.tile * sizes.tile, inverse_ij, first + row_i, first + row_i, sizes.tile)


def _merge(
    given: tl.tuple,
    inverse: tl.tensor,
    n_time: tl.tensor,
    heads: tl.tensor,
    sizes: tl.constexpr,
    edge: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """Of two neighbouring blocks of D whose inverses X and Y are there: what stands below X, ``-Y B X``."""
    head, chunk, first = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * 2 * edge
    place = place_of(head, chunk, n_time, heads, sizes.chunk)
    at = head * tl.num_programs(1) + chunk
    before_i = first + tl.arange(0, edge)
    after_i = before_i + edge
    square = inverse + at * sizes.tile * sizes.tile
    below_ij = strict(given, place, at, (after_i, before_i), sizes, precision)
    nothing_ij = tl.zeros_like(below_ij)
    below_ij = times(below_ij, load_pairs(square, before_i, before_i, sizes.tile, sizes.tile), nothing_ij, precision)
    after_ij = load_pairs(square, after_i, after_i, sizes.tile, sizes.tile)
    store_pairs(square, -times(after_ij, below_ij, nothing_ij, precision), after_i, before_i, sizes.tile)


def _recall(
    given: tl.tuple,
    state: tl.tuple,
    place: tl.tuple,
    rows: tl.tuple,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tensor:
    """``a' K M + b' K S`` of some columns of keys, or ``K M``. given: keys, and a with b. rows: tokens, and columns."""
    keys, enters = given
    memory_kv, moving_kv = state
    row_c, column_k = rows
    key_ck = load_tokens(keys, place, sizes.key_width, row_c, column_k)
    nothing_cv = tl.zeros([row_c.shape[0], memory_kv.shape[1]], memory_kv.dtype)
    recalled_cv = times(key_ck, memory_kv, nothing_cv, precision)
    if how.probe == 2:
        recalled_cv *= tl.load(enters + row_c)[:, None]
        if how.levels == 2:
            moved_cv = times(key_ck, moving_kv, nothing_cv, precision)
            recalled_cv += tl.load(enters + sizes.tile + 1 + row_c)[:, None] * moved_cv
    return recalled_cv


def _written(
    given: tl.tuple,
    state: tl.tuple,
    new_cv: tl.tensor,
    place: tl.tuple,
    rows: tl.tuple,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tuple:
    """Memory and momentum after a chunk, for some columns of keys. given: keys, the last rows of W and P, and a with b
    and h after the last token. rows: tokens, and columns of keys."""
    keys, weight_row, write_row, left = given
    memory_kv, moving_kv = state
    key_kc = load_turned(keys, place, sizes.key_width, rows[0], rows[1])
    memory_kv *= tl.load(left)
    if how.levels == 2:
        memory_kv += tl.load(left + sizes.tile + 1) * moving_kv
        moving_kv *= tl.load(left + 2 * (sizes.tile + 1))
        moving_kv = times(key_kc, tl.load(write_row)[:, None] * new_cv, moving_kv, precision)
    memory_kv = times(key_kc, tl.load(weight_row)[:, None] * new_cv, memory_kv, precision)
    return memory_kv, moving_kv


def _run(
    given: tl.tuple,
    made: tl.tuple,
    n_time: tl.tensor,
    heads: tl.tensor,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """One program: some columns of the memory of one head, through all chunks.

    given: keys, values, scale, W and P, a with b and h, D^-1, memory and momentum. made: N, memory and momentum that
    enter each chunk, and those after the last. A memory of wide keys is carried as two halves.
    """
    keys, values, scale, weights, writes, through, inverse, memory, moving = given
    new, entered, last, last_moving = made
    tile: tl.constexpr = sizes.tile
    has_halves: tl.constexpr = sizes.key_width > sizes.key_columns
    head, n_chunks = tl.program_id(0).to(tl.int64), tl.cdiv(n_time, sizes.chunk)
    row_c, column_k = tl.arange(0, tile), tl.arange(0, sizes.key_columns)
    column_v = tl.program_id(1) * sizes.value_columns + tl.arange(0, sizes.value_columns)
    rows, other_rows = (row_c, column_k), (row_c, sizes.key_columns + column_k)
    state = load_state((memory, moving), head * sizes.area, column_k, column_v, sizes, how)
    other = state
    if has_halves:
        other = load_state((memory, moving), head * sizes.area, other_rows[1], column_v, sizes, how)
    for chunk in range(n_chunks):
        place = place_of(head, chunk, n_time, heads, sizes.chunk)
        at = head * n_chunks + chunk
        enters = through + at * 3 * (tile + 1)
        last_row = at * (tile + 1) * tile + place[2] * tile + row_c
        to = at * how.levels * sizes.area
        store_state((entered, entered + sizes.area), state, to, column_k, column_v, sizes, how)
        if has_halves:
            store_state((entered, entered + sizes.area), other, to, other_rows[1], column_v, sizes, how)
        new_cv = load_tokens(values, place, sizes.value_width, row_c, column_v)
        if how.probe > 0:
            recalled_cv = recall((keys, enters), state, place, rows, sizes, how, precision)
            if has_halves:
                recalled_cv += recall((keys, enters), other, place, other_rows, sizes, how, precision)
            new_cv -= load_scale(scale, place, row_c, keys)[:, None] * recalled_cv
        if how.probe == 2:
            inverse_cs = load_pairs(inverse + at * tile * tile, row_c, row_c, tile, tile)
            new_cv = times(inverse_cs, new_cv, tl.zeros_like(new_cv), precision)
        store_tokens(new, new_cv, place, sizes.value_width, row_c, column_v)
        weight_row, write_row = weights + last_row, weights
        if how.levels == 2:
            write_row = writes + last_row
        left = keys, weight_row, write_row, enters + place[2]
        state = written(left, state, new_cv, place, rows, sizes, how, precision)
        if has_halves:
            other = written(left, other, new_cv, place, other_rows, sizes, how, precision)
    store_state((last, last_moving), state, head * sizes.area, column_k, column_v, sizes, how)
    if has_halves:
        store_state((last, last_moving), other, head * sizes.area, other_rows[1], column_v, sizes, how)


def _read(
    given: tl.tuple,
    read: tl.tensor,
    n_time: tl.tensor,
    heads: tl.tensor,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """Some columns of what one chunk of one head reads. given: queries, keys, W, a with b, N, and what entered."""
    query, keys, weights, through, new, entered = given
    tile: tl.constexpr = sizes.tile
    area: tl.constexpr = sizes.area
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = place_of(head, chunk, n_time, heads, sizes.chunk)
    at = head * tl.num_programs(1) + chunk
    row_c = tl.arange(0, tile)
    column_v = tl.program_id(2) * sizes.value_columns + tl.arange(0, sizes.value_columns)
    after: tl.constexpr = 0 if how.reads_before else 1
    enters = through + at * 3 * (tile + 1) + after + row_c
    a_c = tl.load(enters)[:, None]
    dtype: tl.constexpr = query.dtype.element_ty
    n_columns: tl.constexpr = sizes.value_columns
    mix_cs, read_cv = tl.zeros([tile, tile], dtype), tl.zeros([tile, n_columns], dtype)
    for start in range(0, sizes.key_width, sizes.key_columns):
        column_k = start + tl.arange(0, sizes.key_columns)
        query_ck = load_tokens(query, place, sizes.key_width, row_c, column_k)
        mix_cs = times(query_ck, load_turned(keys, place, sizes.key_width, row_c, column_k), mix_cs, precision)
        came = entered + at * how.levels * area
        read_cv = times(a_c * query_ck, load_matrix(came, column_k, column_v, sizes), read_cv, precision)
        if how.levels == 2:
            b_c = tl.load(enters + tile + 1)[:, None]
            read_cv = times(b_c * query_ck, load_matrix(came + area, column_k, column_v, sizes), read_cv, precision)
    mix_cs *= load_pairs(weights + (at * (tile + 1) + after) * tile, row_c, row_c, place[2], tile)
    read_cv = times(mix_cs, load_tokens(new, place, sizes.value_width, row_c, column_v), read_cv, precision)
    store_tokens(read, read_cv, place, sizes.value_width, row_c, column_v)


strict, recall, written = triton.jit(_strict), triton.jit(_recall), triton.jit(_written)
weigh_kernel, invert_kernel, merge_kernel = triton.jit(_weigh), triton.jit(_invert), triton.jit(_merge)
run_kernel, read_kernel = triton.jit(_run), triton.jit(_read)
