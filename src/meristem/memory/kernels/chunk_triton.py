"""The exact chunk form of the linear family as Triton kernels, two forward and two backward: what it computes, and in
which letters, stands at the top of ``native/form.hpp``.

    prepare     every chunk at once: D^-1, G = W * Q K^T, and the weights of what enters, of what is written and of what
                leaves
    run         the chunks of a head in order, the memory on the chip: N = D^-1 (V - z (a' K M + b' K S)),
                Y = a Q M + b Q S + G N, then M and S as they leave
    run back    the same from the last chunk to the first: dN = G^T dY + [W_c K] dM'' + [P_c K] dS'', dV = D^-T dN, then
                dM and dS as they entered
    gradients   every chunk at once: of keys, queries and gates, from N, dV and what entered and left

A column of values never meets another in ``run``, so that every program takes a few columns of one head through all
chunks. W and P are products of factors, as the native core has them, and not exponentials of summed logarithms: a
factor of nearly nought, where a document begins, costs no digits. ``R'[t, j]`` is the product of the retain factors
after j and before t; the same of momentum factors is ``H'``::

    P' = H' theta,  P = mu P' + I theta,  W' = R' P,  W = rho W' + P
    x = dW + R'^T (dW' + rho dW),  pi = x + dP + H'^T mu (x + dP)
    d rho = x . W',  d mu = pi . P',  d theta = the diagonal of pi

Products that make or change a memory have the precision of float32 (three TF32 products on tensor cores); those of
reads may have less. Axes: c and s tokens of a chunk, k and v the widths, or the columns of values that are at hand.

Source: the UT transform of DeltaNet (Yang 2406.06484, section 3.2), with momentum below the memory (memory.md 4.3).
"""

import triton
import triton.language as tl


def _times(a: tl.tensor, b: tl.tensor, onto: tl.tensor, precision: tl.constexpr) -> tl.tensor:
    """``onto + a b``. precision: one of ``tl.dot``, or bfloat16, which the interpreter has to be given as float32."""
    if precision == "bfloat16":
        onto = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), onto)
    elif precision == "rounded to bfloat16":
        a, b = a.to(tl.bfloat16).to(onto.dtype), b.to(tl.bfloat16).to(onto.dtype)
        onto = tl.dot(a, b, onto, input_precision="ieee", out_dtype=onto.dtype)
    else:
        onto = tl.dot(a, b, onto, input_precision=precision, out_dtype=onto.dtype)
    return onto


def _load_gate(gate: tl.tensor, at_c: tl.tensor, is_token_c: tl.tensor, least: tl.constexpr) -> tl.tensor:
    """Factors of tokens, 1 where there is no gate or no token; one below ``least`` counts as that."""
    if gate is None:
        gate_c = tl.where(is_token_c, 1.0, 1.0)
    else:
        gate_c = tl.load(gate + at_c, mask=is_token_c, other=1.0)
        gate_c = tl.where(gate_c < least, least, gate_c)
    return gate_c


def _products_between(earlier_c: tl.tensor, tile: tl.constexpr) -> tl.tensor:
    """``[t, j]``: the product of the factors after token j and before token t, 0 unless j comes before t.

    earlier_c: the factor of the token before each.
    """
    row_c = tl.arange(0, tile)
    is_inside_cs = row_c[:, None] - 1 > row_c[None, :]
    between_cs = tl.cumprod(tl.where(is_inside_cs, earlier_c[:, None], 1.0), axis=0)
    return tl.where(row_c[:, None] > row_c[None, :], between_cs, 0.0)


def _decay(
    gates: tl.tuple, place: tl.tuple, tile: tl.constexpr, how: tl.constexpr, precision: tl.constexpr
) -> tl.tuple:
    """The decay of one chunk, of the token before each: ``rho, mu, theta, R', H', P', W'``, and ``a', b', h'``.

    gates: retain, momentum and write. place: the gate of the first token, how far the next one is, and how many tokens
    there are. how: levels, and the least factor that counts.
    """
    retain, momentum, write = gates
    row_c = tl.arange(0, tile)
    at_c, is_token_c = place[0] + row_c * place[1], row_c < place[2]
    before_c, has_before_c = at_c - place[1], is_token_c & (row_c > 0)
    theta_c = tl.load(write + at_c, mask=is_token_c, other=0.0)
    rho_c = load_gate(retain, at_c, is_token_c, how[1]).to(theta_c.dtype)
    rho_before_c = load_gate(retain, before_c, has_before_c, how[1]).to(theta_c.dtype)
    kept_cs = products_between(rho_before_c, tile).to(theta_c.dtype)
    a_c = tl.cumprod(rho_before_c, axis=0)
    is_same_cs = row_c[:, None] == row_c[None, :]
    written_cs = tl.where(is_same_cs, theta_c[None, :], 0.0)
    mu_c, moved_cs, pushed_cs, b_c, h_c = None, None, None, None, None
    if how[0] == 1:
        earlier_cs = kept_cs * theta_c[None, :]
    else:
        mu_c = load_gate(momentum, at_c, is_token_c, how[1]).to(theta_c.dtype)
        mu_before_c = load_gate(momentum, before_c, has_before_c, how[1]).to(theta_c.dtype)
        moved_cs = products_between(mu_before_c, tile).to(theta_c.dtype)
        pushed_cs = moved_cs * theta_c[None, :]
        h_c = tl.cumprod(mu_before_c, axis=0)
        earlier_cs = times(kept_cs, mu_c[:, None] * pushed_cs + written_cs, tl.zeros_like(kept_cs), precision)
        b_c = tl.sum(kept_cs * (mu_c * h_c)[None, :], axis=1)
    return rho_c, mu_c, theta_c, kept_cs, moved_cs, pushed_cs, earlier_cs, a_c, b_c, h_c


def _invert(strict_cs: tl.tensor, tile: tl.constexpr, precision: tl.constexpr) -> tl.tensor:
    """``(I + strict)^-1``: by substitution in diagonal blocks of 16, which are then merged, two into one.

    With X the inverse of the diagonal blocks and B what stands below them in blocks twice as large, ``X - X B X`` is
    the inverse of those. A product of powers would lose all digits where keys are alike.
    """
    n_blocks: tl.constexpr = tile // 16
    row_c, row_i = tl.arange(0, tile), tl.arange(0, 16)
    is_own_nm = tl.arange(0, n_blocks)[:, None] == tl.arange(0, n_blocks)[None, :]
    split_nims = tl.reshape(strict_cs, (n_blocks, 16, n_blocks, 16))
    block_nij = tl.sum(tl.where(is_own_nm[:, None, :, None], split_nims, 0.0), axis=2)
    inverse_nij = tl.zeros_like(block_nij) + tl.where(row_i[:, None] == row_i[None, :], 1.0, 0.0)[None, :, :]
    for i in range(1, 16):
        is_row_i = row_i == i
        strict_nj = tl.sum(tl.where(is_row_i[None, :, None], block_nij, 0.0), axis=1)
        minus_nj = tl.sum(strict_nj[:, :, None] * inverse_nij, axis=1)
        inverse_nij -= tl.where(is_row_i[None, :, None], minus_nj[:, None, :], 0.0)
    placed_nims = tl.where(is_own_nm[:, None, :, None], inverse_nij[:, :, None, :], 0.0)
    inverse_cs = tl.reshape(placed_nims, (tile, tile)).to(strict_cs.dtype)
    for doubling in tl.static_range(3):
        if 16 << doubling < tile:
            of_c = row_c >> (4 + doubling)
            is_below_cs = (of_c[:, None] % 2 == 1) & (of_c[None, :] == of_c[:, None] - 1)
            below_cs = tl.where(is_below_cs, strict_cs, 0.0)
            half_cs = times(below_cs, inverse_cs, tl.zeros_like(inverse_cs), precision)
            inverse_cs = times(-inverse_cs, half_cs, inverse_cs, precision)
    return inverse_cs


def _load_tokens(
    x: tl.tensor, place: tl.tuple, width: tl.constexpr, tile: tl.constexpr, column_k: tl.tensor
) -> tl.tensor:
    """Rows of ``width`` numbers, those columns of them, 0 where no token or column is. place: as for ``_decay``."""
    row_c = tl.arange(0, tile)
    at_ck = (place[0] + row_c * place[1])[:, None] * width + column_k[None, :]
    return tl.load(x + at_ck, mask=(row_c < place[2])[:, None] & (column_k < width)[None, :], other=0.0)


def _store_tokens(
    x: tl.tensor, value_ck: tl.tensor, place: tl.tuple, width: tl.constexpr, tile: tl.constexpr, column_k: tl.tensor
) -> None:
    row_c = tl.arange(0, tile)
    at_ck = (place[0] + row_c * place[1])[:, None] * width + column_k[None, :]
    tl.store(x + at_ck, value_ck, mask=(row_c < place[2])[:, None] & (column_k < width)[None, :])


def _place(head: tl.tensor, chunk: tl.tensor, n_time: tl.tensor, heads: tl.tensor, size: tl.constexpr) -> tl.tuple:
    """Where a gate of the first token of a chunk is among those of all rows, tokens and heads, how far the next one is,
    and how many tokens the chunk has. head: of all heads of all rows."""
    first = chunk * size
    row, head = head // heads, head % heads
    return (row * n_time + first) * heads + head, heads, tl.minimum(size, n_time - first)


def _prepare(
    given: tl.tuple,
    products: tl.tensor,
    n_time: tl.tensor,
    heads: tl.tensor,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """One chunk of one head: what ``_run`` needs of it besides keys, queries and values.

    given: queries, keys, and the gates retain, momentum, write and scale. sizes: tokens per chunk, rows of a tile, key
    width, columns of a tile, value width, columns of values that are at hand. how: levels, least factor, the memory at
    which residuals are taken (0 none, 1 that at the start of the chunk, 2 that of the token), whether reads come first.
    """
    query, keys, retain, momentum, write, scale = given
    tile: tl.constexpr = sizes[1]
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = place_of(head, chunk, n_time, heads, sizes[0])
    row_c, column_k = tl.arange(0, tile), tl.arange(0, sizes[3])
    rho_c, mu_c, theta_c, _, _, pushed_cs, earlier_cs, a_c, b_c, h_c = decay(
        (retain, momentum, write), place, tile, how, precision
    )
    written_cs = written(mu_c, theta_c, pushed_cs, how)
    weight_cs = rho_c[:, None] * earlier_cs + written_cs
    after_a_c, after_b_c = rho_c * a_c, None
    if how[0] == 2:
        after_b_c = rho_c * b_c + mu_c * h_c

    key_ck = load_tokens(keys, place, sizes[2], tile, column_k)
    query_ck = load_tokens(query, place, sizes[2], tile, column_k)
    nothing_cs = tl.zeros_like(weight_cs)
    match_cs = times(query_ck, tl.trans(key_ck), nothing_cs, precision)
    to = products + (head * tl.num_programs(1) + chunk) * (2 * tile + 8) * tile
    at_cs = row_c[:, None] * tile + row_c[None, :]
    tl.store(to + tile * tile + at_cs, match_cs * (earlier_cs if how[3] else weight_cs))
    scale_c = load_gate(scale, place[0] + row_c * place[1], row_c < place[2], -float("inf")).to(theta_c.dtype)
    if how[2] == 2:
        alike_cs = times(key_ck, tl.trans(key_ck), nothing_cs, precision)
        tl.store(to + at_cs, invert(scale_c[:, None] * earlier_cs * alike_cs, tile, precision))
    rows = to + 2 * tile * tile + row_c
    tl.store(rows, scale_c * a_c if how[2] == 2 else scale_c)
    tl.store(rows + 2 * tile, a_c if how[3] else after_a_c)
    is_last_c = row_c == place[2] - 1
    tl.store(rows + 4 * tile, tl.sum(tl.where(is_last_c[:, None], weight_cs, 0.0), axis=0))
    through_c = tl.where(row_c == 0, tl.sum(tl.where(is_last_c, after_a_c, 0.0)), 0.0)
    if how[0] == 2:
        tl.store(rows + tile, scale_c * b_c)
        tl.store(rows + 3 * tile, b_c if how[3] else after_b_c)
        tl.store(rows + 5 * tile, tl.sum(tl.where(is_last_c[:, None], written_cs, 0.0), axis=0))
        through_c += tl.where(row_c == 1, tl.sum(tl.where(is_last_c, after_b_c, 0.0)), 0.0)
        through_c += tl.where(row_c == 2, tl.sum(tl.where(is_last_c, mu_c * h_c, 0.0)), 0.0)
    tl.store(rows + 6 * tile, through_c)


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

    given: queries, keys, values, products, memory and momentum. made: what is read, memory and momentum after the
    sequence, N, and what entered each chunk; the last two None where no gradient will be taken. precision: of what
    makes the memory, and of reads.
    """
    query, keys, values, products, memory, moving = given
    read, last, last_moving, new, entered = made
    tile: tl.constexpr = sizes[1]
    levels: tl.constexpr = how[0]
    head, n_chunks = tl.program_id(0).to(tl.int64), tl.cdiv(n_time, sizes[0])
    row_c, column_k = tl.arange(0, tile), tl.arange(0, sizes[3])
    column_v = tl.program_id(1) * sizes[5] + tl.arange(0, sizes[5])
    at_kv = column_k[:, None] * sizes[4] + column_v[None, :]
    is_there_kv = (column_k < sizes[2])[:, None] & (column_v < sizes[4])[None, :]
    at_cs = row_c[:, None] * tile + row_c[None, :]
    memory_kv = tl.load(memory + head * sizes[2] * sizes[4] + at_kv, mask=is_there_kv, other=0.0)
    if levels == 2:
        moving_kv = tl.load(moving + head * sizes[2] * sizes[4] + at_kv, mask=is_there_kv, other=0.0)
    for chunk in range(n_chunks):
        place = place_of(head, chunk, n_time, heads, sizes[0])
        at = head * n_chunks + chunk
        here = products + at * (2 * tile + 8) * tile
        rows = here + 2 * tile * tile + row_c
        key_ck = load_tokens(keys, place, sizes[2], tile, column_k)
        new_cv = load_tokens(values, place, sizes[4], tile, column_v)
        if entered is not None:
            came = entered + at * levels * sizes[2] * sizes[4] + at_kv
            tl.store(came, memory_kv, mask=is_there_kv)
            if levels == 2:
                tl.store(came + sizes[2] * sizes[4], moving_kv, mask=is_there_kv)
        if how[2] > 0:
            new_cv = times(-tl.load(rows)[:, None] * key_ck, memory_kv, new_cv, precision[0])
        if how[2] == 2:
            if levels == 2:
                new_cv = times(-tl.load(rows + tile)[:, None] * key_ck, moving_kv, new_cv, precision[0])
            new_cv = times(tl.load(here + at_cs), new_cv, tl.zeros_like(new_cv), precision[0])
        if new is not None:
            store_tokens(new, new_cv, place, sizes[4], tile, column_v)
        query_ck = load_tokens(query, place, sizes[2], tile, column_k)
        read_cv = times(tl.load(here + tile * tile + at_cs), new_cv, tl.zeros_like(new_cv), precision[1])
        read_cv = times(tl.load(rows + 2 * tile)[:, None] * query_ck, memory_kv, read_cv, precision[1])
        if levels == 2:
            read_cv = times(tl.load(rows + 3 * tile)[:, None] * query_ck, moving_kv, read_cv, precision[1])
        store_tokens(read, read_cv, place, sizes[4], tile, column_v)
        through = here + (2 * tile + 6) * tile
        memory_kv = tl.load(through) * memory_kv
        if levels == 2:
            memory_kv += tl.load(through + 1) * moving_kv
            write_kc = tl.trans(tl.load(rows + 5 * tile)[:, None] * key_ck)
            moving_kv = times(write_kc, new_cv, tl.load(through + 2) * moving_kv, precision[0])
        memory_kv = times(tl.trans(tl.load(rows + 4 * tile)[:, None] * key_ck), new_cv, memory_kv, precision[0])
    tl.store(last + head * sizes[2] * sizes[4] + at_kv, memory_kv, mask=is_there_kv)
    if levels == 2:
        tl.store(last_moving + head * sizes[2] * sizes[4] + at_kv, moving_kv, mask=is_there_kv)


def _run_back(
    given: tl.tuple,
    made: tl.tuple,
    n_time: tl.tensor,
    heads: tl.tensor,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """The adjoint of ``_run``, last chunk first.

    given: queries, keys, products, and the gradients of what was read and of the last memory and momentum. made: the
    gradients of the values, of what left each chunk, and of the first memory and momentum.
    """
    query, keys, products, d_read, d_last, d_last_moving = given
    d_values, d_left, d_memory, d_moving = made
    tile: tl.constexpr = sizes[1]
    levels: tl.constexpr = how[0]
    head, n_chunks = tl.program_id(0).to(tl.int64), tl.cdiv(n_time, sizes[0])
    row_c, column_k = tl.arange(0, tile), tl.arange(0, sizes[3])
    column_v = tl.program_id(1) * sizes[5] + tl.arange(0, sizes[5])
    at_kv = column_k[:, None] * sizes[4] + column_v[None, :]
    is_there_kv = (column_k < sizes[2])[:, None] & (column_v < sizes[4])[None, :]
    at_cs = row_c[:, None] * tile + row_c[None, :]
    memory_kv = tl.load(d_last + head * sizes[2] * sizes[4] + at_kv, mask=is_there_kv, other=0.0)
    if levels == 2:
        moving_kv = tl.load(d_last_moving + head * sizes[2] * sizes[4] + at_kv, mask=is_there_kv, other=0.0)
    for step in range(n_chunks):
        chunk = n_chunks - 1 - step
        place = place_of(head, chunk, n_time, heads, sizes[0])
        at = head * n_chunks + chunk
        here = products + at * (2 * tile + 8) * tile
        rows = here + 2 * tile * tile + row_c
        left = d_left + at * levels * sizes[2] * sizes[4] + at_kv
        tl.store(left, memory_kv, mask=is_there_kv)
        key_ck = load_tokens(keys, place, sizes[2], tile, column_k)
        d_read_cv = load_tokens(d_read, place, sizes[4], tile, column_v)
        mix_sc = tl.trans(tl.load(here + tile * tile + at_cs))
        d_new_cv = times(mix_sc, d_read_cv, tl.zeros_like(d_read_cv), precision[1])
        d_new_cv = times(tl.load(rows + 4 * tile)[:, None] * key_ck, memory_kv, d_new_cv, precision[0])
        if levels == 2:
            tl.store(left + sizes[2] * sizes[4], moving_kv, mask=is_there_kv)
            d_new_cv = times(tl.load(rows + 5 * tile)[:, None] * key_ck, moving_kv, d_new_cv, precision[0])
        if how[2] == 2:
            d_new_cv = times(tl.trans(tl.load(here + at_cs)), d_new_cv, tl.zeros_like(d_new_cv), precision[0])
        store_tokens(d_values, d_new_cv, place, sizes[4], tile, column_v)
        query_ck = load_tokens(query, place, sizes[2], tile, column_k)
        through = here + (2 * tile + 6) * tile
        if levels == 2:
            moving_kv = tl.load(through + 2) * moving_kv + tl.load(through + 1) * memory_kv
            read_kc = tl.trans(tl.load(rows + 3 * tile)[:, None] * query_ck)
            moving_kv = times(read_kc, d_read_cv, moving_kv, precision[1])
            if how[2] == 2:
                probe_kc = tl.trans(-tl.load(rows + tile)[:, None] * key_ck)
                moving_kv = times(probe_kc, d_new_cv, moving_kv, precision[0])
        read_kc = tl.trans(tl.load(rows + 2 * tile)[:, None] * query_ck)
        memory_kv = times(read_kc, d_read_cv, tl.load(through) * memory_kv, precision[1])
        if how[2] > 0:
            memory_kv = times(tl.trans(-tl.load(rows)[:, None] * key_ck), d_new_cv, memory_kv, precision[0])
    tl.store(d_memory + head * sizes[2] * sizes[4] + at_kv, memory_kv, mask=is_there_kv)
    if levels == 2:
        tl.store(d_moving + head * sizes[2] * sizes[4] + at_kv, moving_kv, mask=is_there_kv)


def _against(
    rows: tl.tensor,
    matrix: tl.tensor,
    onto: tl.tensor,
    place: tl.tuple,
    sizes: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tensor:
    """``onto + rows matrix^T``, rows ``[c, v]`` of tokens and the matrix ``[k, v]``."""
    column_k = tl.arange(0, sizes[3])
    for start in range(0, sizes[4], sizes[5]):
        column_v = start + tl.arange(0, sizes[5])
        rows_cv = load_tokens(rows, place, sizes[4], sizes[1], column_v)
        at_kv = column_k[:, None] * sizes[4] + column_v[None, :]
        is_there_kv = (column_k < sizes[2])[:, None] & (column_v < sizes[4])[None, :]
        matrix_kv = tl.load(matrix + at_kv, mask=is_there_kv, other=0.0)
        onto = times(rows_cv, tl.trans(matrix_kv), onto, precision)
    return onto


def _pairs(
    left: tl.tensor,
    right: tl.tensor,
    onto: tl.tensor,
    place: tl.tuple,
    sizes: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tensor:
    """``onto + left right^T``, both rows ``[c, v]`` of tokens."""
    for start in range(0, sizes[4], sizes[5]):
        column_v = start + tl.arange(0, sizes[5])
        left_cv = load_tokens(left, place, sizes[4], sizes[1], column_v)
        right_cv = load_tokens(right, place, sizes[4], sizes[1], column_v)
        onto = times(left_cv, tl.trans(right_cv), onto, precision)
    return onto


def _overlap(a: tl.tensor, b: tl.tensor, sizes: tl.constexpr) -> tl.tensor:
    """The sum of ``a * b`` of two matrices ``[k, v]``."""
    column_k = tl.arange(0, sizes[3])
    sum_k = (column_k * 0).to(a.dtype.element_ty)
    for start in range(0, sizes[4], sizes[5]):
        column_v = start + tl.arange(0, sizes[5])
        at_kv = column_k[:, None] * sizes[4] + column_v[None, :]
        is_there_kv = (column_k < sizes[2])[:, None] & (column_v < sizes[4])[None, :]
        a_kv, b_kv = tl.load(a + at_kv, mask=is_there_kv, other=0.0), tl.load(b + at_kv, mask=is_there_kv, other=0.0)
        sum_k += tl.sum(a_kv * b_kv, axis=1)
    return tl.sum(sum_k)


def _through_memory(
    sums: tl.tuple,
    vectors: tl.tuple,
    sent: tl.tuple,
    matrices: tl.tuple,
    rows: tl.tensor,
    place: tl.tuple,
    settings: tl.constexpr,
) -> tl.tuple:
    """Of memory, or momentum: the gradients of keys and queries, and of the weights of reads, writes and probes.

    sums: gradients of keys and queries so far. vectors: keys and queries. sent: gradients of reads and values, and N.
    matrices: what entered, and the gradient of what left. rows: the weights of probes; reads and writes follow.
    settings: sizes, precision, and whether there is a probe.
    """
    d_key_ck, d_query_ck = sums
    key_ck, query_ck = vectors
    sizes: tl.constexpr = settings[0]
    precision: tl.constexpr = settings[1]
    nothing_ck = tl.zeros_like(key_ck)
    to_query_ck = against(sent[0], matrices[0], nothing_ck, place, sizes, precision[1])
    d_read_c = tl.sum(to_query_ck * query_ck, axis=1)
    d_query_ck += tl.load(rows + 2 * sizes[1])[:, None] * to_query_ck
    from_write_ck = against(sent[2], matrices[1], nothing_ck, place, sizes, precision[0])
    d_write_c = tl.sum(from_write_ck * key_ck, axis=1)
    d_key_ck += tl.load(rows + 4 * sizes[1])[:, None] * from_write_ck
    d_probe_c = tl.zeros_like(d_write_c)
    if settings[2]:
        from_probe_ck = against(sent[1], matrices[0], nothing_ck, place, sizes, precision[0])
        d_probe_c -= tl.sum(from_probe_ck * key_ck, axis=1)
        d_key_ck -= tl.load(rows)[:, None] * from_probe_ck
    return d_key_ck, d_query_ck, d_read_c, d_write_c, d_probe_c


def _earlier_too(d_c: tl.tensor, d_before_c: tl.tensor, factor_c: tl.tensor, between_cs: tl.tensor) -> tl.tensor:
    """The gradient of a row of sums ``x_t = factor_t x_(t-1) + ...``, from that of x and of x one token earlier."""
    return d_c + tl.sum(between_cs * (d_before_c + factor_c * d_c)[:, None], axis=0)


def _store_gate(
    to: tl.tensor, d_c: tl.tensor, gate: tl.tensor, at_c: tl.tensor, is_token_c: tl.tensor, least: tl.constexpr
) -> None:
    """The gradient of a gate; 0 where it is below ``least``, and nowhere where there is no gate."""
    if gate is not None:
        gate_c = tl.load(gate + at_c, mask=is_token_c, other=0.0)
        tl.store(to + at_c, tl.where(gate_c < least, 0.0, d_c), mask=is_token_c)


def _through_pairs(
    sums: tl.tuple,
    vectors: tl.tuple,
    between: tl.tuple,
    weights: tl.tuple,
    scale_c: tl.tensor,
    settings: tl.constexpr,
) -> tl.tuple:
    """What pairs of tokens of a chunk send to keys, queries, W, W', and the scale.

    between: gradients of G and of D. weights: W and W'. settings: ``how`` and precision.
    """
    d_key_ck, d_query_ck = sums
    key_ck, query_ck = vectors
    d_mix_cs, d_system_cs = between
    weight_cs, earlier_cs = weights
    how: tl.constexpr = settings[0]
    precision: tl.constexpr = settings[1]
    nothing_cs = tl.zeros_like(weight_cs)
    read_weight_cs = earlier_cs if how[3] else weight_cs
    d_match_cs = read_weight_cs * d_mix_cs
    d_query_ck = times(d_match_cs, key_ck, d_query_ck, precision[1])
    d_key_ck = times(tl.trans(d_match_cs), query_ck, d_key_ck, precision[1])
    d_read_weight_cs = d_mix_cs * times(query_ck, tl.trans(key_ck), nothing_cs, precision[0])
    d_earlier_cs, d_scale_c = nothing_cs, tl.sum(nothing_cs, axis=1)
    if how[2] == 2:
        alike_cs = times(key_ck, tl.trans(key_ck), nothing_cs, precision[0]) * d_system_cs
        d_scale_c = tl.sum(earlier_cs * alike_cs, axis=1)
        d_earlier_cs = scale_c[:, None] * alike_cs
        d_alike_cs = scale_c[:, None] * earlier_cs * d_system_cs
        d_key_ck = times(d_alike_cs + tl.trans(d_alike_cs), key_ck, d_key_ck, precision[0])
    row_c = tl.arange(0, weight_cs.shape[0])
    is_earlier_cs, is_same_cs = row_c[:, None] > row_c[None, :], row_c[:, None] == row_c[None, :]
    if how[3]:
        d_earlier_cs += d_read_weight_cs
        d_read_weight_cs = nothing_cs
    d_weight_cs = tl.where(is_earlier_cs | is_same_cs, d_read_weight_cs, 0.0)
    return d_key_ck, d_query_ck, d_weight_cs, tl.where(is_earlier_cs, d_earlier_cs, 0.0), d_scale_c


def _written(mu_c: tl.tensor, theta_c: tl.tensor, pushed_cs: tl.tensor, how: tl.constexpr) -> tl.tensor:
    """P, from P'."""
    row_c = tl.arange(0, theta_c.shape[0])
    written_cs = tl.where(row_c[:, None] == row_c[None, :], theta_c[None, :], 0.0)
    if how[0] == 2:
        written_cs += mu_c[:, None] * pushed_cs
    return written_cs


def _through_entered(
    d_read_c: tl.tensor,
    d_probe_c: tl.tensor,
    d_last_c: tl.tensor,
    rho_c: tl.tensor,
    kept_cs: tl.tensor,
    how: tl.constexpr,
) -> tl.tensor:
    """The gradient of a, or b, from that of what is read and probed with it, and of the last one."""
    if how[2] != 2:
        d_probe_c = tl.zeros_like(d_probe_c)
    after_c, before_c = d_last_c + d_read_c, d_probe_c
    if how[3]:
        after_c, before_c = d_last_c, d_probe_c + d_read_c
    return earlier_too(after_c, before_c, rho_c, kept_cs)


def _gradients(
    given: tl.tuple,
    made: tl.tuple,
    n_time: tl.tensor,
    heads: tl.tensor,
    sizes: tl.constexpr,
    how: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """One chunk of one head: the gradients of keys, queries and gates.

    given: queries, keys, the gates retain, momentum, write and scale, products, N, what entered each chunk, and the
    gradients of reads, of values, and of what left. made: the gradients of the first six.
    """
    query, keys, retain, momentum, write, scale, products, new, entered, d_read, d_values, d_left = given
    d_query, d_keys, d_retain, d_momentum, d_write, d_scale = made
    tile: tl.constexpr = sizes[1]
    levels: tl.constexpr = how[0]
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = place_of(head, chunk, n_time, heads, sizes[0])
    at, area = head * tl.num_programs(1) + chunk, sizes[2] * sizes[4]
    row_c, column_k = tl.arange(0, tile), tl.arange(0, sizes[3])
    at_c, is_token_c, is_last_c = place[0] + row_c * place[1], row_c < place[2], row_c == place[2] - 1
    rows = products + at * (2 * tile + 8) * tile + 2 * tile * tile + row_c
    came, left = entered + at * levels * area, d_left + at * levels * area
    key_ck = load_tokens(keys, place, sizes[2], tile, column_k)
    query_ck = load_tokens(query, place, sizes[2], tile, column_k)
    vectors, sent = (key_ck, query_ck), (d_read, d_values, new)
    settings: tl.constexpr = (sizes, precision, how[2] > 0)
    sums = tl.zeros_like(key_ck), tl.zeros_like(query_ck)
    d_key_ck, d_query_ck, d_a_read_c, d_a_write_c, d_a_probe_c = through_memory(
        sums, vectors, sent, (came, left), rows, place, settings
    )
    if levels == 2:
        sums = d_key_ck, d_query_ck
        of_momentum: tl.constexpr = (sizes, precision, how[2] == 2)
        d_key_ck, d_query_ck, d_b_read_c, d_b_write_c, d_b_probe_c = through_memory(
            sums, vectors, sent, (came + area, left + area), rows + tile, place, of_momentum
        )
    rho_c, mu_c, theta_c, kept_cs, moved_cs, pushed_cs, earlier_cs, a_c, b_c, h_c = decay(
        (retain, momentum, write), place, tile, how, precision[0]
    )
    written_cs = written(mu_c, theta_c, pushed_cs, how)
    weight_cs = rho_c[:, None] * earlier_cs + written_cs
    scale_c = load_gate(scale, at_c, is_token_c, -float("inf")).to(theta_c.dtype)
    nothing_cs = tl.zeros_like(weight_cs)
    d_mix_cs = pairs(d_read, new, nothing_cs, place, sizes, precision[1])
    d_system_cs = nothing_cs
    if how[2] == 2:
        d_system_cs -= pairs(d_values, new, nothing_cs, place, sizes, precision[0])
    sums, of_pairs = (d_key_ck, d_query_ck), (d_mix_cs, d_system_cs)
    d_key_ck, d_query_ck, d_weight_cs, d_earlier_cs, d_scale_c = through_pairs(
        sums, vectors, of_pairs, (weight_cs, earlier_cs), scale_c, (how, precision)
    )
    store_tokens(d_keys, d_key_ck, place, sizes[2], tile, column_k)
    store_tokens(d_query, d_query_ck, place, sizes[2], tile, column_k)
    d_weight_cs += tl.where(is_last_c[:, None], d_a_write_c[None, :], 0.0)
    d_earlier_cs += rho_c[:, None] * d_weight_cs
    d_weight_cs = times(tl.trans(kept_cs), d_earlier_cs, d_weight_cs, precision[0])
    d_rho_c = tl.sum(d_weight_cs * earlier_cs, axis=1)
    d_last_c = tl.where(is_last_c, overlap(left, came, sizes), 0.0)
    d_scale_c += d_a_probe_c * a_c if how[2] == 2 else d_a_probe_c
    d_rho_c += a_c * through_entered(d_a_read_c, scale_c * d_a_probe_c, d_last_c, rho_c, kept_cs, how)
    if levels == 2:
        if how[2] == 2:
            d_scale_c += d_b_probe_c * b_c
        d_last_c = tl.where(is_last_c, overlap(left, came + area, sizes), 0.0)
        d_b_c = through_entered(d_b_read_c, scale_c * d_b_probe_c, d_last_c, rho_c, kept_cs, how)
        d_rho_c += b_c * d_b_c
        d_h_c = d_b_c + tl.where(is_last_c, overlap(left + area, came + area, sizes), 0.0)
        d_weight_cs += tl.where(is_last_c[:, None], d_b_write_c[None, :], 0.0)
        d_weight_cs = times(tl.trans(moved_cs), mu_c[:, None] * d_weight_cs, d_weight_cs, precision[0])
        d_mu_c = tl.sum(d_weight_cs * pushed_cs, axis=1)
        d_mu_c += h_c * earlier_too(d_h_c, tl.zeros_like(d_h_c), mu_c, moved_cs)
        store_gate(d_momentum, d_mu_c, momentum, at_c, is_token_c, how[1])
    d_theta_c = tl.sum(tl.where(row_c[:, None] == row_c[None, :], d_weight_cs, 0.0), axis=1)
    tl.store(d_write + at_c, d_theta_c, mask=is_token_c)
    store_gate(d_retain, d_rho_c, retain, at_c, is_token_c, how[1])
    store_gate(d_scale, d_scale_c, scale, at_c, is_token_c, -float("inf"))


times, load_gate, products_between = triton.jit(_times), triton.jit(_load_gate), triton.jit(_products_between)
decay, invert, place_of = triton.jit(_decay), triton.jit(_invert), triton.jit(_place)
load_tokens, store_tokens, store_gate = triton.jit(_load_tokens), triton.jit(_store_tokens), triton.jit(_store_gate)
against, pairs, overlap = triton.jit(_against), triton.jit(_pairs), triton.jit(_overlap)
earlier_too = triton.jit(_earlier_too)
through_memory, through_pairs = triton.jit(_through_memory), triton.jit(_through_pairs)
through_entered, written = triton.jit(_through_entered), triton.jit(_written)
prepare_kernel, run_kernel = triton.jit(_prepare), triton.jit(_run)
run_back_kernel, gradients_kernel = triton.jit(_run_back), triton.jit(_gradients)
