"""What the kernels of the chunk form share: where things stand in memory, tiles that are loaded and stored, products.

Axes: c and s tokens of a chunk, k and v the widths, or the columns of them that are at hand. ``sizes`` and ``how`` are
the constants ``Sizes`` and ``Kind`` of ``chunk_operation``; ``place`` is what ``_place`` gives.
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


def _place(head: tl.tensor, chunk: tl.tensor, n_time: tl.tensor, heads: tl.tensor, size: tl.constexpr) -> tl.tuple:
    """Where a gate of the first token of a chunk is among those of all rows, tokens and heads, how far the next one is,
    and how many tokens the chunk has. head: of all heads of all rows."""
    first = chunk * size
    row, head = head // heads, head % heads
    return (row * n_time + first) * heads + head, heads, tl.minimum(size, n_time - first)


def _load_gate(gate: tl.tensor, at: tl.tensor, least: tl.constexpr) -> tl.tensor:
    """The factor of one token; one below ``least`` counts as that."""
    factor = tl.load(gate + at)
    return tl.where(factor < least, least, factor).to(gate.dtype.element_ty)


def _load_scale(scale: tl.tensor, place: tl.tuple, row_c: tl.tensor, like: tl.tensor) -> tl.tensor:
    """What is recalled for the residuals of these tokens is scaled so, 1 where there is no gate or no token."""
    if scale is None:
        scale_c = tl.where(row_c < 0, 0.0, 1.0).to(like.dtype.element_ty)
    else:
        scale_c = tl.load(scale + place[0] + row_c * place[1], mask=row_c < place[2], other=1.0)
    return scale_c


def _load_tokens(
    x: tl.tensor, place: tl.tuple, width: tl.constexpr, row_c: tl.tensor, column_k: tl.tensor
) -> tl.tensor:
    """``[c, k]``: those columns of these tokens' rows of ``width`` numbers, 0 where no token or column is."""
    at_ck = (row_c * place[1])[:, None] * width + column_k[None, :]
    return tl.load(
        x + place[0] * width + at_ck, mask=(row_c < place[2])[:, None] & (column_k < width)[None, :], other=0.0
    )


def _load_turned(
    x: tl.tensor, place: tl.tuple, width: tl.constexpr, row_c: tl.tensor, column_k: tl.tensor
) -> tl.tensor:
    """``[k, c]``: as ``_load_tokens``, columns first."""
    at_kc = (row_c * place[1])[None, :] * width + column_k[:, None]
    return tl.load(
        x + place[0] * width + at_kc, mask=(row_c < place[2])[None, :] & (column_k < width)[:, None], other=0.0
    )


def _store_tokens(
    x: tl.tensor, value_ck: tl.tensor, place: tl.tuple, width: tl.constexpr, row_c: tl.tensor, column_k: tl.tensor
) -> None:
    at_ck = (row_c * place[1])[:, None] * width + column_k[None, :]
    tl.store(x + place[0] * width + at_ck, value_ck, mask=(row_c < place[2])[:, None] & (column_k < width)[None, :])


def _load_matrix(x: tl.tensor, column_k: tl.tensor, column_v: tl.tensor, sizes: tl.constexpr) -> tl.tensor:
    """``[k, v]``: those rows and columns of a memory, 0 where there is none."""
    is_there_kv = (column_k < sizes.key_width)[:, None] & (column_v < sizes.value_width)[None, :]
    return tl.load(x + column_k[:, None] * sizes.value_width + column_v[None, :], mask=is_there_kv, other=0.0)


def _load_matrix_turned(x: tl.tensor, column_k: tl.tensor, column_v: tl.tensor, sizes: tl.constexpr) -> tl.tensor:
    """``[v, k]``: as ``_load_matrix``, columns first."""
    is_there_vk = (column_k < sizes.key_width)[None, :] & (column_v < sizes.value_width)[:, None]
    return tl.load(x + column_k[None, :] * sizes.value_width + column_v[:, None], mask=is_there_vk, other=0.0)


def _store_matrix(
    x: tl.tensor, value_kv: tl.tensor, column_k: tl.tensor, column_v: tl.tensor, sizes: tl.constexpr
) -> None:
    is_there_kv = (column_k < sizes.key_width)[:, None] & (column_v < sizes.value_width)[None, :]
    tl.store(x + column_k[:, None] * sizes.value_width + column_v[None, :], value_kv, mask=is_there_kv)


def _load_pairs(
    x: tl.tensor, row_c: tl.tensor, column_s: tl.tensor, n_tokens: tl.tensor, tile: tl.constexpr
) -> tl.tensor:
    """``[c, s]``: those rows and columns of a square of pairs of tokens, of which the lower half is there."""
    is_there_cs = (row_c < n_tokens)[:, None] & (row_c[:, None] >= column_s[None, :])
    return tl.load(x + row_c[:, None] * tile + column_s[None, :], mask=is_there_cs, other=0.0)


def _load_pairs_turned(
    x: tl.tensor, row_c: tl.tensor, column_s: tl.tensor, n_tokens: tl.tensor, tile: tl.constexpr
) -> tl.tensor:
    """``[s, c]``: as ``_load_pairs``, columns first."""
    is_there_sc = (row_c < n_tokens)[None, :] & (row_c[None, :] >= column_s[:, None])
    return tl.load(x + row_c[None, :] * tile + column_s[:, None], mask=is_there_sc, other=0.0)


def _store_pairs(x: tl.tensor, value_cs: tl.tensor, row_c: tl.tensor, column_s: tl.tensor, tile: tl.constexpr) -> None:
    tl.store(x + row_c[:, None] * tile + column_s[None, :], value_cs)


def _load_state(
    pair: tl.tuple, at: tl.tensor, column_k: tl.tensor, column_v: tl.tensor, sizes: tl.constexpr, how: tl.constexpr
) -> tl.tuple:
    """Rows and columns of a memory and of its momentum, in the place of which stands the memory where there is none."""
    memory_kv = load_matrix(pair[0] + at, column_k, column_v, sizes)
    moving_kv = memory_kv
    if how.levels == 2:
        moving_kv = load_matrix(pair[1] + at, column_k, column_v, sizes)
    return memory_kv, moving_kv


def _store_state(
    pair: tl.tuple,
    state: tl.tuple,
    at: tl.tensor,
    column_k: tl.tensor,
    column_v: tl.tensor,
    sizes: tl.constexpr,
    how: tl.constexpr,
) -> None:
    store_matrix(pair[0] + at, state[0], column_k, column_v, sizes)
    if how.levels == 2:
        store_matrix(pair[1] + at, state[1], column_k, column_v, sizes)


times, place_of = triton.jit(_times), triton.jit(_place)
load_gate, load_scale = triton.jit(_load_gate), triton.jit(_load_scale)
load_tokens, load_turned, store_tokens = triton.jit(_load_tokens), triton.jit(_load_turned), triton.jit(_store_tokens)
load_matrix, load_matrix_turned = triton.jit(_load_matrix), triton.jit(_load_matrix_turned)
store_matrix, store_pairs = triton.jit(_store_matrix), triton.jit(_store_pairs)
load_state, store_state = triton.jit(_load_state), triton.jit(_store_state)
load_pairs, load_pairs_turned = triton.jit(_load_pairs), triton.jit(_load_pairs_turned)
