"""The gradients of the exact chunk form in Triton; what is computed forward stands in ``triton_forward``.

    send        every chunk at once: what reads send to N, (W * Q K^T)^T dY
    run back    the chunks of a head from the last to the first: dN = ... + W_c K dM'' + P_c K dS'', dV = D^-T dN, then
                dM and dS as they entered
    pairs       every chunk at once: what is sent to W, to Q K^T and to K K^T, from dY N^T and - dV N^T
    vectors     every chunk and some columns of keys: dK, dQ, and what is sent to a, b, h and the last rows of W and P
    gates       every chunk at once, from the last token to the first: of retain, momentum, write and the scale

With x the gradient of a row of W, pi that of P, ' for the token before, and what each row is sent directly left out::

    x' = rho x,  pi = x + mu_after pi_after,  d rho = x . W',  d mu = pi . P',  d theta_t = pi[t]

and the same for a, b and h. No division, nothing cancels.
"""

import triton
import triton.language as tl

from meristem.memory.kernels.triton_tiles import (
    load_gate,
    load_matrix,
    load_matrix_turned,
    load_pairs,
    load_pairs_turned,
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


def _send(
    given: tl.tuple,
    d_new: tl.tensor,
    n_time: tl.tensor,
    heads: tl.tensor,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """What the reads of a chunk send to some columns of N. given: queries, keys, W, and the gradient of reads."""
    query, keys, weights, d_read = given
    tile: tl.constexpr = sizes.tile
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = place_of(head, chunk, n_time, heads, sizes.chunk)
    at = head * tl.num_programs(1) + chunk
    row_c = tl.arange(0, tile)
    column_v = tl.program_id(2) * sizes.value_columns + tl.arange(0, sizes.value_columns)
    after: tl.constexpr = 0 if how.reads_before else 1
    mix_sc = tl.zeros([tile, tile], query.dtype.element_ty)
    for start in range(0, sizes.key_width, sizes.key_columns):
        column_k = start + tl.arange(0, sizes.key_columns)
        key_sk = load_tokens(keys, place, sizes.key_width, row_c, column_k)
        mix_sc = times(key_sk, load_turned(query, place, sizes.key_width, row_c, column_k), mix_sc, precision)
    mix_sc *= load_pairs_turned(weights + (at * (tile + 1) + after) * tile, row_c, row_c, place[2], tile)
    d_read_cv = load_tokens(d_read, place, sizes.value_width, row_c, column_v)
    d_new_cv = times(mix_sc, d_read_cv, tl.zeros_like(d_read_cv), precision)
    store_tokens(d_new, d_new_cv, place, sizes.value_width, row_c, column_v)


def _sent_to_new(
    given: tl.tuple,
    state: tl.tuple,
    place: tl.tuple,
    rows: tl.tuple,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tensor:
    """``W_c K dM'' + P_c K dS''`` of some columns of keys. given: keys, and the last rows of W and P. rows: tokens, and
    columns of keys."""
    keys, weight_row, write_row = given
    memory_kv, moving_kv = state
    key_ck = load_tokens(keys, place, sizes.key_width, rows[0], rows[1])
    nothing_cv = tl.zeros([rows[0].shape[0], memory_kv.shape[1]], memory_kv.dtype)
    d_new_cv = tl.load(weight_row)[:, None] * times(key_ck, memory_kv, nothing_cv, precision)
    if how.levels == 2:
        d_new_cv += tl.load(write_row)[:, None] * times(key_ck, moving_kv, nothing_cv, precision)
    return d_new_cv


def _carried_back(
    given: tl.tuple,
    state: tl.tuple,
    sent: tl.tuple,
    place: tl.tuple,
    rows: tl.tuple,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tuple:
    """The gradients of memory and momentum as they entered a chunk, for some columns of keys. given: queries, keys, and
    a with b and h. sent: gradients of reads, and of values times the scale. rows: tokens, and columns of keys."""
    query, keys, enters = given
    memory_kv, moving_kv = state
    d_read_cv, d_probe_cv = sent
    after: tl.constexpr = 0 if how.reads_before else 1
    query_kc = load_turned(query, place, sizes.key_width, rows[0], rows[1])
    if how.levels == 2:
        moving_kv *= tl.load(enters + 2 * (sizes.tile + 1) + place[2])
        moving_kv += tl.load(enters + sizes.tile + 1 + place[2]) * memory_kv
        b_c = tl.load(enters + sizes.tile + 1 + after + rows[0])[:, None]
        moving_kv = times(query_kc, b_c * d_read_cv, moving_kv, precision[1])
    memory_kv *= tl.load(enters + place[2])
    memory_kv = times(query_kc, tl.load(enters + after + rows[0])[:, None] * d_read_cv, memory_kv, precision[1])
    if how.probe > 0:
        key_kc = load_turned(keys, place, sizes.key_width, rows[0], rows[1])
        if how.probe == 2:
            if how.levels == 2:
                b_c = tl.load(enters + sizes.tile + 1 + rows[0])[:, None]
                moving_kv = times(key_kc, -b_c * d_probe_cv, moving_kv, precision[0])
            d_probe_cv *= tl.load(enters + rows[0])[:, None]
        memory_kv = times(key_kc, -d_probe_cv, memory_kv, precision[0])
    return memory_kv, moving_kv


def _run_back(
    given: tl.tuple,
    made: tl.tuple,
    n_time: tl.tensor,
    heads: tl.tensor,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """The adjoint of ``run``, last chunk first.

    given: queries, keys, scale, W and P, a with b and h, D^-1, and the gradients of what was read and of the last
    memory and momentum. made: of N what reads send, in the place of which comes the gradient of values; and the
    gradients of what left each chunk, and of the first memory and momentum.
    """
    query, keys, scale, weights, writes, through, inverse, d_read, d_last, d_last_moving = given
    d_values, d_left, d_memory, d_moving = made
    tile: tl.constexpr = sizes.tile
    has_halves: tl.constexpr = sizes.key_width > sizes.key_columns
    head, n_chunks = tl.program_id(0).to(tl.int64), tl.cdiv(n_time, sizes.chunk)
    row_c, column_k = tl.arange(0, tile), tl.arange(0, sizes.key_columns)
    column_v = tl.program_id(1) * sizes.value_columns + tl.arange(0, sizes.value_columns)
    rows, other_rows = (row_c, column_k), (row_c, sizes.key_columns + column_k)
    state = load_state((d_last, d_last_moving), head * sizes.area, column_k, column_v, sizes, how)
    other = state
    if has_halves:
        other = load_state((d_last, d_last_moving), head * sizes.area, other_rows[1], column_v, sizes, how)
    for step in range(n_chunks):
        chunk = n_chunks - 1 - step
        place = place_of(head, chunk, n_time, heads, sizes.chunk)
        at = head * n_chunks + chunk
        enters = through + at * 3 * (tile + 1)
        last_row = at * (tile + 1) * tile + place[2] * tile + row_c
        to = at * how.levels * sizes.area
        store_state((d_left, d_left + sizes.area), state, to, column_k, column_v, sizes, how)
        weight_row, write_row = weights + last_row, weights
        if how.levels == 2:
            write_row = writes + last_row
        d_new_cv = load_tokens(d_values, place, sizes.value_width, row_c, column_v)
        d_new_cv += sent_to_new((keys, weight_row, write_row), state, place, rows, sizes, how, precision[0])
        if has_halves:
            store_state((d_left, d_left + sizes.area), other, to, other_rows[1], column_v, sizes, how)
            d_new_cv += sent_to_new((keys, weight_row, write_row), other, place, other_rows, sizes, how, precision[0])
        if how.probe == 2:
            inverse_sc = load_pairs_turned(inverse + at * tile * tile, row_c, row_c, tile, tile)
            d_new_cv = times(inverse_sc, d_new_cv, tl.zeros_like(d_new_cv), precision[0])
        store_tokens(d_values, d_new_cv, place, sizes.value_width, row_c, column_v)
        d_read_cv = load_tokens(d_read, place, sizes.value_width, row_c, column_v)
        sent = d_read_cv, load_scale(scale, place, row_c, keys)[:, None] * d_new_cv
        state = carried_back((query, keys, enters), state, sent, place, rows, sizes, how, precision)
        if has_halves:
            other = carried_back((query, keys, enters), other, sent, place, other_rows, sizes, how, precision)
    store_state((d_memory, d_moving), state, head * sizes.area, column_k, column_v, sizes, how)
    if has_halves:
        store_state((d_memory, d_moving), other, head * sizes.area, other_rows[1], column_v, sizes, how)


def _products(
    given: tl.tuple,
    place: tl.tuple,
    row_c: tl.tensor,
    width: tl.constexpr,
    n_columns: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tensor:
    """``[c, s]``: the product of every row of one with every row of another. n_columns: that are at hand."""
    left, right = given
    sum_cs = tl.zeros([row_c.shape[0], row_c.shape[0]], left.dtype.element_ty)
    for start in range(0, width, n_columns):
        column_k = start + tl.arange(0, n_columns)
        left_ck = load_tokens(left, place, width, row_c, column_k)
        sum_cs = times(left_ck, load_turned(right, place, width, row_c, column_k), sum_cs, precision)
    return sum_cs


def _pairs(
    given: tl.tuple,
    made: tl.tuple,
    n_time: tl.tensor,
    heads: tl.tensor,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """What pairs of tokens of one chunk of one head are sent.

    given: queries, keys, scale, W, N, and the gradients of reads and of values. made: what is sent to the weights of
    reads and to those of D, row by row; to Q K^T and to K K^T, as squares; and to the scale.
    """
    query, keys, scale, weights, new, d_read, d_values = given
    d_reads, d_probes, d_match, d_alike, d_scale = made
    tile: tl.constexpr = sizes.tile
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = place_of(head, chunk, n_time, heads, sizes.chunk)
    at = head * tl.num_programs(1) + chunk
    row_c = tl.arange(0, tile)
    square = at * tile * tile
    after: tl.constexpr = 0 if how.reads_before else 1
    if tl.program_id(2) == 0:
        d_mix_cs = products((d_read, new), place, row_c, sizes.value_width, sizes.value_columns, precision[1])
        weight_cs = load_pairs(weights + (at * (tile + 1) + after) * tile, row_c, row_c, place[2], tile)
        store_pairs(d_match + square, weight_cs * d_mix_cs, row_c, row_c, tile)
        d_mix_cs *= products((query, keys), place, row_c, sizes.key_width, sizes.key_columns, precision[0])
        store_pairs(d_reads + square, d_mix_cs, row_c, row_c, tile)
    elif how.probe == 2:
        d_system_cs = -products((d_values, new), place, row_c, sizes.value_width, sizes.value_columns, precision[0])
        weight_cs = load_pairs(weights + at * (tile + 1) * tile, row_c, row_c, place[2], tile)
        scale_c = load_scale(scale, place, row_c, keys)[:, None]
        store_pairs(d_alike + square, scale_c * weight_cs * d_system_cs, row_c, row_c, tile)
        d_system_cs *= products((keys, keys), place, row_c, sizes.key_width, sizes.key_columns, precision[0])
        store_pairs(d_probes + square, scale_c * d_system_cs, row_c, row_c, tile)
        tl.store(d_scale + at * tile + row_c, tl.sum(weight_cs * d_system_cs, axis=1))


def _against(
    rows: tl.tensor,
    matrix: tl.tensor,
    place: tl.tuple,
    at_hand: tl.tuple,
    sizes: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tensor:
    """``[c, k]``: rows of tokens, as wide as values, times a memory turned. at_hand: tokens, and columns of keys."""
    row_c, column_k = at_hand
    sum_ck = tl.zeros([row_c.shape[0], column_k.shape[0]], rows.dtype.element_ty)
    for start in range(0, sizes.value_width, sizes.value_columns):
        column_v = start + tl.arange(0, sizes.value_columns)
        rows_cv = load_tokens(rows, place, sizes.value_width, row_c, column_v)
        sum_ck = times(rows_cv, load_matrix_turned(matrix, column_k, column_v, sizes), sum_ck, precision)
    return sum_ck


def _overlap(a: tl.tensor, b: tl.tensor, column_k: tl.tensor, sizes: tl.constexpr) -> tl.tensor:
    """The sum of ``a * b`` of those rows of two memories."""
    sum_k = tl.zeros([column_k.shape[0]], a.dtype.element_ty)
    for start in range(0, sizes.value_width, sizes.value_columns):
        column_v = start + tl.arange(0, sizes.value_columns)
        a_kv = load_matrix(a, column_k, column_v, sizes)
        sum_k += tl.sum(a_kv * load_matrix(b, column_k, column_v, sizes), axis=1)
    return tl.sum(sum_k)


def _vectors(
    given: tl.tuple,
    made: tl.tuple,
    n_time: tl.tensor,
    heads: tl.tensor,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """Some columns of the gradients of keys and queries of one chunk of one head.

    given: queries, keys, scale, W and P, a with b and h, N, what entered, the gradients of reads, of values and of what
    left, and of Q K^T and K K^T. made: gradients of queries and of keys; and ``[8, tile]``, what these columns send to
    a and b of reads, to the scale times a and times b of probes, to the last rows of W and P, and in the first three
    places of one row to a, b and h of the whole chunk.
    """
    query, keys, scale, weights, writes, through, new, entered, d_read, d_values, d_left, d_match, d_alike = given
    d_query, d_keys, sums = made
    tile: tl.constexpr = sizes.tile
    area: tl.constexpr = sizes.area
    head, chunk, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    place = place_of(head, chunk, n_time, heads, sizes.chunk)
    at = head * tl.num_programs(1) + chunk
    row_c = tl.arange(0, tile)
    column_k = block * sizes.key_columns + tl.arange(0, sizes.key_columns)
    after: tl.constexpr = 0 if how.reads_before else 1
    enters = through + at * 3 * (tile + 1) + row_c
    last_row = at * (tile + 1) * tile + place[2] * tile + row_c
    sums += (at * tl.num_programs(2) + block) * 8 * tile + row_c
    came, left = entered + at * how.levels * area, d_left + at * how.levels * area
    at_hand = row_c, column_k

    query_ck = load_tokens(query, place, sizes.key_width, row_c, column_k)
    each_ck = against(d_read, came, place, at_hand, sizes, precision[1])
    tl.store(sums, tl.sum(each_ck * query_ck, axis=1))
    sum_ck = tl.load(enters + after)[:, None] * each_ck
    if how.levels == 2:
        each_ck = against(d_read, came + area, place, at_hand, sizes, precision[1])
        tl.store(sums + tile, tl.sum(each_ck * query_ck, axis=1))
        sum_ck += tl.load(enters + tile + 1 + after)[:, None] * each_ck
    d_match_cs = load_pairs(d_match + at * tile * tile, row_c, row_c, tile, tile)
    key_ck = load_tokens(keys, place, sizes.key_width, row_c, column_k)
    sum_ck = times(d_match_cs, key_ck, sum_ck, precision[1])
    store_tokens(d_query, sum_ck, place, sizes.key_width, row_c, column_k)

    each_ck = against(new, left, place, at_hand, sizes, precision[0])
    tl.store(sums + 4 * tile, tl.sum(each_ck * key_ck, axis=1))
    sum_ck = tl.load(weights + last_row)[:, None] * each_ck
    if how.levels == 2:
        each_ck = against(new, left + area, place, at_hand, sizes, precision[0])
        tl.store(sums + 5 * tile, tl.sum(each_ck * key_ck, axis=1))
        sum_ck += tl.load(writes + last_row)[:, None] * each_ck
    if how.probe > 0:
        scale_c = load_scale(scale, place, row_c, keys)
        each_ck = against(d_values, came, place, at_hand, sizes, precision[0])
        tl.store(sums + 2 * tile, -tl.sum(each_ck * key_ck, axis=1))
        if how.probe == 2:
            each_ck *= tl.load(enters)[:, None]
            if how.levels == 2:
                moved_ck = against(d_values, came + area, place, at_hand, sizes, precision[0])
                tl.store(sums + 3 * tile, -tl.sum(moved_ck * key_ck, axis=1))
                each_ck += tl.load(enters + tile + 1)[:, None] * moved_ck
        sum_ck -= scale_c[:, None] * each_ck
    d_match_sc = load_pairs_turned(d_match + at * tile * tile, row_c, row_c, tile, tile)
    query_ck = load_tokens(query, place, sizes.key_width, row_c, column_k)
    sum_ck = times(d_match_sc, query_ck, sum_ck, precision[1])
    if how.probe == 2:
        d_alike_cs = load_pairs(d_alike + at * tile * tile, row_c, row_c, tile, tile)
        d_alike_cs += load_pairs_turned(d_alike + at * tile * tile, row_c, row_c, tile, tile)
        key_ck = load_tokens(keys, place, sizes.key_width, row_c, column_k)
        sum_ck = times(d_alike_cs, key_ck, sum_ck, precision[0])
    store_tokens(d_keys, sum_ck, place, sizes.key_width, row_c, column_k)

    whole_c = tl.where(row_c == 0, overlap(left, came, column_k, sizes), 0.0)
    if how.levels == 2:
        whole_c += tl.where(row_c == 1, overlap(left, came + area, column_k, sizes), 0.0)
        whole_c += tl.where(row_c == 2, overlap(left + area, came + area, column_k, sizes), 0.0)
    tl.store(sums + 6 * tile, whole_c)


def _row_if(x: tl.tensor, row: tl.tensor, is_there: tl.tensor, tile: tl.constexpr) -> tl.tensor:
    column_s = tl.arange(0, tile)
    return tl.load(x + row * tile + column_s, mask=(column_s >= 0) & is_there, other=0.0)


def _store_gate(to: tl.tensor, gradient: tl.tensor, gate: tl.tensor, at: tl.tensor, least: tl.constexpr) -> None:
    """The gradient of a gate; 0 where it is below ``least``."""
    tl.store(to + at, tl.where(tl.load(gate + at) < least, 0.0, gradient))


def _gates(
    given: tl.tuple,
    made: tl.tuple,
    n_time: tl.tensor,
    heads: tl.tensor,
    sizes: tl.constexpr,
    how: tl.constexpr,
) -> None:
    """One chunk of one head, from the last token to the first.

    given: retain, momentum and the scale, W and P, a with b and h, what is sent to the weights of reads and to those of
    D, the sums of ``vectors``, and what D sends to the scale. made: gradients of retain, momentum, write and scale.
    """
    retain, momentum, scale, weights, writes, through, d_reads, d_probes, sums, d_scale_pairs = given
    d_retain, d_momentum, d_write, d_scale = made
    tile: tl.constexpr = sizes.tile
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = place_of(head, chunk, n_time, heads, sizes.chunk)
    at = head * tl.num_programs(1) + chunk
    column_s = tl.arange(0, tile)
    row, square = at * (tile + 1) * tile + column_s, at * tile * tile
    enters = through + at * 3 * (tile + 1)
    sums += at * 8 * tile
    later: tl.constexpr = 1 if how.reads_before else 0
    dtype: tl.constexpr = weights.dtype.element_ty
    rho, mu = tl.full([], 1.0, dtype), tl.full([], 1.0, dtype)
    x_s, pi_s = tl.load(sums + 4 * tile + column_s), tl.zeros([tile], dtype)
    d_a, d_b, d_h = tl.load(sums + 6 * tile), tl.full([], 0.0, dtype), tl.full([], 0.0, dtype)
    if how.levels == 2:
        pi_s = tl.load(sums + 5 * tile + column_s)
        d_b, d_h = tl.load(sums + 6 * tile + 1), tl.load(sums + 6 * tile + 2)
    for step in range(place[2]):
        token = place[2] - 1 - step
        gate = place[0] + token * place[1]
        has_next = token + 1 < place[2]
        has_read = token + later < place[2]
        x_s = rho * x_s + row_if(d_reads + square, token + later, has_read, tile)
        d_a = rho * d_a + tl.load(sums + token + later, mask=has_read, other=0.0)
        z = tl.full([], 1.0, dtype)
        if how.levels == 2:
            d_b = rho * d_b + tl.load(sums + tile + token + later, mask=has_read, other=0.0)
        if how.probe == 2:
            x_s += row_if(d_probes + square, token + 1, has_next, tile)
            if scale is not None:
                z = tl.load(scale + gate + place[1], mask=has_next, other=0.0)
            d_a += z * tl.load(sums + 2 * tile + token + 1, mask=has_next, other=0.0)
            if how.levels == 2:
                d_b += z * tl.load(sums + 3 * tile + token + 1, mask=has_next, other=0.0)
        d_rho = tl.sum(x_s * tl.load(weights + row + token * tile)) + d_a * tl.load(enters + token)
        if how.levels == 2:
            pi_s = mu * pi_s + x_s
            d_h = mu * d_h + d_b
            d_rho += d_b * tl.load(enters + tile + 1 + token)
            d_mu = tl.sum(pi_s * tl.load(writes + row + token * tile)) + d_h * tl.load(enters + 2 * tile + 2 + token)
            store_gate(d_momentum, d_mu, momentum, gate, how.least)
            mu = load_gate(momentum, gate, how.least)
        else:
            pi_s = x_s
        tl.store(d_write + gate, tl.sum(tl.where(column_s == token, pi_s, 0.0)))
        if retain is not None:
            store_gate(d_retain, d_rho, retain, gate, how.least)
            rho = load_gate(retain, gate, how.least)
        if scale is not None:
            d_z = tl.full([], 0.0, dtype)
            if how.probe > 0:
                d_z += tl.load(sums + 2 * tile + token) * (tl.load(enters + token) if how.probe == 2 else 1.0)
            if how.probe == 2:
                d_z += tl.load(d_scale_pairs + at * tile + token)
                if how.levels == 2:
                    d_z += tl.load(sums + 3 * tile + token) * tl.load(enters + tile + 1 + token)
            tl.store(d_scale + gate, d_z)


sent_to_new, carried_back = triton.jit(_sent_to_new), triton.jit(_carried_back)
products, against, overlap = triton.jit(_products), triton.jit(_against), triton.jit(_overlap)
row_if, store_gate = triton.jit(_row_if), triton.jit(_store_gate)
send_kernel, run_back_kernel = triton.jit(_send), triton.jit(_run_back)
pairs_kernel, vectors_kernel, gates_kernel = triton.jit(_pairs), triton.jit(_vectors), triton.jit(_gates)
