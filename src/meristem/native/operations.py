"""The exact chunk form of the native core as an operation of torch, with its gradient.

``torch.compile`` sees one operation and its shapes, autograd one node. What is computed stands in ``native/form.hpp``.
"""

import ctypes
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from meristem.native.interface import View, counting, function, lanes, torchs_threads

PROBES: Final = {"never": 0, "start": 1, "token": 2}
"""The memory at which a write takes its residual: none, that at the start of its chunk, or that of its token."""

WORTH_A_THREAD: Final = 2e6
"""Multiplications that take several times as long as starting a thread."""

MOST_TOGETHER, NARROW = 32, 64
"""Tokens that the core solves together at most where keys are no wider than so: more take longer there."""

GATES: Final = ("retain", "momentum", "write", "scale")

Vectors = tuple[Float[Tensor, "b t h k"], Float[Tensor, "b t h k"], Float[Tensor, "b t h v"]]
Gate = Float[Tensor, "b t h"]
GateTensors = tuple[Gate | None, Gate | None, Gate, Gate | None]
Matrix = Float[Tensor, "b h k v"]


class Form(ctypes.Structure):
    """``MeristemForm`` of ``core.cpp``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "time", "heads", "key", "value", "chunk", "threads")),
        *((name, ctypes.c_int32) for name in ("levels", "probe", "reads_before", "is_double")),
        *((name, View) for name in ("query", "keys", "values", *GATES)),
        *((name, View) for name in ("memory", "moving", "read", "last", "last_moving")),
        *((name, ctypes.c_void_p) for name in ("new_values", "products", "entered")),
        *(("scratch", ctypes.c_void_p), ("n_scratch_bytes", ctypes.c_int64), ("parallel", ctypes.c_void_p)),
        *((name, View) for name in ("d_read", "d_last", "d_last_moving", "d_query", "d_keys", "d_values")),
        *((f"d_{name}", View) for name in (*GATES, "memory", "moving")),
    )


def chunk_form(
    vectors: Vectors,
    gates: GateTensors,
    memory: tuple[Matrix, Matrix | None],
    *,
    chunk: int,
    probed_at: str,
    reads_before: bool,
) -> tuple[Float[Tensor, "b t h v"], Matrix, Matrix | None]:
    """What every token reads, and memory and momentum after the sequence, under autograd.

    vectors: queries, keys and values. gates: retain, momentum, write, and the scale of what is recalled for a residual;
    retain and scale are 1 where they are None. memory: and momentum, where the rule has it. All of float32 or all of
    float64, on the CPU, none empty. chunk: tokens solved together at most, which changes
    the speed alone unless residuals are those at its start.
    """
    keeps = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*vectors, *gates, *memory))
    # Where the residual is that at the start of a chunk, the chunk is part of what is computed.
    together = chunk if probed_at == "start" else chunk_of(vectors[1].shape[-1], chunk)
    settings = together, PROBES[probed_at], reads_before, keeps
    read_bthv, last_bhkv, moving_bhkv, *_ = _forward(*vectors, *gates, *memory, *settings)
    return read_bthv, last_bhkv, None if memory[1] is None else moving_bhkv


class _Sizes(NamedTuple):
    """As the core has them: widths padded to whole vectors, the chunk no longer than the sequence."""

    rows: int
    time: int
    heads: int
    key: int
    value: int
    chunk: int
    levels: int
    lanes: int

    def saved(self, n_products: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of what the backward pass reads again, for every chunk of every head: what is new in the values,
        products of keys, and what entered."""
        each = self.rows * self.heads, -(-self.time // self.chunk)
        products = *each, n_products, self.chunk, _up(self.chunk, 2 * self.lanes)
        return (*each, self.chunk, self.value), products, (*each, self.levels * self.key, self.value)

    @property
    def n_threads(self) -> int:
        """As many as torch may use, heads of all rows are there, and the work is worth."""
        per_token = 3 * self.levels * self.key * self.value + 2 * self.chunk * (self.key + self.value)
        heads = self.rows * self.heads
        return max(1, min(torch.get_num_threads(), heads, int(heads * self.time * per_token / WORTH_A_THREAD)))


def _sizes(query: Tensor, values: Tensor, moving: Tensor | None, chunk: int) -> _Sizes:
    n_lanes = lanes(values.dtype)
    rows, time, heads, key = query.shape
    widths = _up(key, n_lanes), _up(values.shape[-1], n_lanes)
    return _Sizes(rows, time, heads, *widths, min(chunk, time), 1 if moving is None else 2, n_lanes)


def chunk_of(key_width: int, chunk: int) -> int:
    """How many tokens are solved together where ``chunk`` are allowed."""
    return min(chunk, MOST_TOGETHER) if key_width <= NARROW else chunk


@torch.library.custom_op("meristem::chunk_form", mutates_args=(), device_types="cpu")
def _forward(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    retain: Tensor | None,
    momentum: Tensor | None,
    write: Tensor,
    scale: Tensor | None,
    memory: Tensor,
    moving: Tensor | None,
    chunk: int,
    probe: int,
    reads_before: bool,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """read, memory, momentum (empty without one), and what the backward pass reads again (empty unless it keeps)."""
    sizes = _sizes(query, values, moving, chunk)
    given: dict[str, Tensor | None] = {
        **_widened({"query": query, "keys": keys, "values": values}, sizes),
        **dict(zip(GATES, (retain, momentum, write, scale), strict=True)),
    }
    stored = _widened_memory({"memory": memory, "moving": moving}, sizes)
    read = values.new_empty(sizes.rows, sizes.time, sizes.heads, sizes.value)
    left = {f"last{name}": torch.empty_like(x) for name, x in zip(("", "_moving"), stored.values(), strict=False)}
    new_values, products, entered = (values.new_empty(shape) for shape in _shapes_of_saved(sizes, probe, keeps))
    _run(
        "forward", sizes, (probe, reads_before), given | {"read": read}, stored | left, (new_values, products, entered)
    )
    width, shape = values.shape[-1], memory.shape[-2:]
    last = [x[:, :, : shape[0], : shape[1]].contiguous() for x in left.values()]
    last_moving = last[1] if moving is not None else values.new_empty(0)
    return read[..., :width].contiguous(), last[0], last_moving, new_values, products, entered


@_forward.register_fake
def _forward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    query, _, values, *_, memory, moving, chunk, probe, _, keeps = inputs
    last = torch.empty_like(memory, memory_format=torch.contiguous_format)
    saved = _shapes_of_saved(_sizes(query, values, moving, chunk), probe, keeps)
    last_moving = values.new_empty(0) if moving is None else torch.empty_like(last)
    read = torch.empty_like(values, memory_format=torch.contiguous_format)
    return read, last, last_moving, *(values.new_empty(shape) for shape in saved)


def _shapes_of_saved(sizes: _Sizes, probe: int, keeps: bool) -> tuple[tuple[int, ...], ...]:
    return sizes.saved(2 if probe == PROBES["token"] else 1) if keeps else ((0,), (0,), (0,))


@torch.library.custom_op("meristem::chunk_form_backward", mutates_args=(), device_types="cpu")
def _backward(
    query: Tensor,
    keys: Tensor,
    retain: Tensor | None,
    momentum: Tensor | None,
    write: Tensor,
    scale: Tensor | None,
    new_values: Tensor,
    products: Tensor,
    entered: Tensor,
    d_read: Tensor,
    d_last: Tensor,
    d_last_moving: Tensor | None,
    chunk: int,
    probe: int,
    reads_before: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first nine inputs of the operation; empty for what is not there."""
    sizes = _sizes(query, d_read, d_last_moving, chunk)
    widths = query.shape[-1], d_read.shape[-1]
    gates = dict(zip(GATES, (retain, momentum, write, scale), strict=True))
    given: dict[str, Tensor | None] = {
        **_widened({"query": query, "keys": keys, "d_read": d_read}, sizes),
        **gates,
    }
    stored = _widened_memory({"d_last": d_last, "d_last_moving": d_last_moving}, sizes)
    narrow = sizes.rows, sizes.time, sizes.heads
    made = {f"d_{name}": query.new_empty(*narrow, sizes.key) for name in ("query", "keys")}
    made["d_values"] = query.new_empty(*narrow, sizes.value)
    made |= {f"d_{name}": query.new_empty(narrow) for name, gate in gates.items() if gate is not None}
    sent = {f"d_{name}": torch.empty_like(x) for name, x in zip(("memory", "moving"), stored.values(), strict=False)}
    _run("backward", sizes, (probe, reads_before), given | {**made}, stored | sent, (new_values, products, entered))
    cut = {
        name: made[name][..., : widths[name == "d_values"]].contiguous() for name in ("d_query", "d_keys", "d_values")
    }
    cut |= {name: x[:, :, : widths[0], : widths[1]].contiguous() for name, x in sent.items()}
    found = made | cut
    order = ("query", "keys", "values", *GATES, "memory", "moving")
    return tuple(found.get(f"d_{name}", query.new_empty(0)) for name in order)  # type: ignore[return-value]


@_backward.register_fake
def backward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    """What an operation like ``_backward`` gives, without its numbers."""
    query, keys, *gates, _, _, _, d_read, d_last, d_last_moving, _, _, _ = inputs
    shapes = [query, keys, d_read, *gates, d_last, d_last_moving]
    return tuple(query.new_empty(0 if x is None else x.shape) for x in shapes)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, keys, _, *gates, memory, moving, chunk, probe, reads_before, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, keys, *gates, *output[3:])
    ctx.like_last, ctx.has_momentum, ctx.settings = memory.shape, moving is not None, (chunk, probe, reads_before)
    ctx.value_shape = output[0].shape


def sends_back(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradients of all inputs of an operation like ``_forward``, of whose outputs ``keep`` has kept the last three,
    by the operation that computes them."""

    def send_back(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        query, keys, *gates, new_values, products, entered = ctx.saved_tensors
        shapes = ctx.value_shape, ctx.like_last, ctx.like_last
        wanted = 3 if ctx.has_momentum else 2
        sent = [
            query.new_zeros(shape) if d is None else d for d, shape in zip(d_outputs[:wanted], shapes, strict=False)
        ]
        sent += [None] * (3 - wanted)
        found = backward(query, keys, *gates, new_values, products, entered, *sent, *ctx.settings)
        return *(None if d.numel() == 0 else d for d in found), None, None, None, None

    return send_back


_forward.register_autograd(sends_back(_backward), setup_context=keep)


def _run(
    what: str,
    sizes: _Sizes,
    order: tuple[int, bool],
    given: dict[str, Tensor | None],
    stored: dict[str, Tensor],
    saved: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Call the core with the tensors by the names that it has for them; order: the probe, and if reads come first."""
    form = Form(*sizes[:6], sizes.n_threads, sizes.levels, *order, saved[0].dtype == torch.float64)
    for name, x in given.items():
        if x is not None:
            row, time, head = x.stride()[:3]
            setattr(form, name, View(x.data_ptr(), row, time, head))
    for name, x in stored.items():
        setattr(form, name, View(x.data_ptr(), x.stride(0), 0, x.stride(1)))
    if saved[0].numel():
        form.new_values, form.products, form.entered = (x.data_ptr() for x in saved)
    run = function(f"form_{what}")
    scratch = torch.empty(
        counting("form_scratch")(ctypes.byref(form), what == "backward") * sizes.n_threads, dtype=torch.uint8
    )
    form.scratch, form.n_scratch_bytes, form.parallel = scratch.data_ptr(), scratch.numel(), torchs_threads()
    fault = run(ctypes.byref(form))
    if fault:
        raise RuntimeError(f"the native core refused {sizes} with code {fault}: memory.kernels.select let it through")


def _widened(vectors: dict[str, Tensor], sizes: _Sizes) -> dict[str, Tensor]:
    """With zeros up to whole vectors, and without gaps in the last axis."""
    return {
        name: _dense(_pad(x, 0, sizes.value if name in ("values", "d_read") else sizes.key))
        for name, x in vectors.items()
    }


def _widened_memory(stored: dict[str, Tensor | None], sizes: _Sizes) -> dict[str, Tensor]:
    found = {name: _pad(x, sizes.key, sizes.value) for name, x in stored.items() if x is not None}
    return {name: x if x[0, 0].is_contiguous() else x.contiguous() for name, x in found.items()}


def _pad(x: Tensor, rows: int, width: int) -> Tensor:
    below = rows - x.shape[-2] if rows else 0
    return functional.pad(x, (0, width - x.shape[-1], 0, below)) if below or width > x.shape[-1] else x


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
