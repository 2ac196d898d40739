"""The exact chunk form by the kernels of ``chunk_triton`` as an operation of torch, with its gradient.

It takes and gives what the operation of the native core does (``native.operations``): ``torch.compile`` sees one
operation and its shapes, autograd one node. Triton is imported when it runs.
"""

import math
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from meristem.memory.gates import LOG_FLOOR
from meristem.native.operations import PROBES, GateTensors, Matrix, Vectors, backward_shapes, keep, sends_back

LEAST: Final = math.exp(LOG_FLOOR)

EXACT: Final = "tf32x3"
"""Three TF32 products of what float32 is split into: as exact as one of float32, on the tensor cores."""

READS: Final = {"highest": EXACT, "high": "tf32", "medium": "bfloat16"}
"""What products of reads are made with, by ``torch.get_float32_matmul_precision``: what torch allows its own."""

LONGEST: Final = 128
"""Tokens of a chunk that fit on a chip."""

TOGETHER: Final = 64
"""Tokens that are solved together at most where the length of a chunk does not matter."""

RUN_COLUMNS, GRADIENT_COLUMNS = 32, 64
"""Columns of values at hand: of a program that carries a memory, and of one that sums over all of them."""

N_ROWS: Final = 8
"""Rows below the two matrices of a chunk in ``products``: the weights of probes, reads and writes, each for memory and
momentum, then the factors of what goes through the whole chunk; the last is empty. ``chunk_triton`` counts on eight."""


def chunk_form(
    vectors: Vectors,
    gates: GateTensors,
    memory: tuple[Matrix, Matrix | None],
    *,
    chunk: int,
    probed_at: str,
    reads_before: bool,
) -> tuple[Tensor, Matrix, Matrix | None]:
    """``native.operations.chunk_form`` on a CUDA device, or anywhere by Triton's interpreter."""
    keeps = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*vectors, *gates, *memory))
    together = chunk if probed_at == "start" else min(chunk, TOGETHER)
    settings = min(together, vectors[0].shape[1]), PROBES[probed_at], reads_before, keeps
    read_bthv, last_bhkv, moving_bhkv, *_ = _forward(*vectors, *gates, *memory, *settings)
    return read_bthv, last_bhkv, None if memory[1] is None else moving_bhkv


class _Sizes(NamedTuple):
    """How many there are of what, as the kernels have it."""

    rows: int
    heads: int
    time: int
    chunk: int
    key: int
    value: int
    levels: int

    @property
    def n_memories(self) -> int:
        return self.rows * self.heads

    @property
    def n_chunks(self) -> int:
        return -(-self.time // self.chunk)

    @property
    def tile(self) -> int:
        """Rows of a tile of tokens."""
        return _tile(self.chunk)

    def saved(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of N, of what ``_prepare`` makes, and of what entered each chunk."""
        each = self.n_memories, self.n_chunks
        products = *each, 2 * self.tile + N_ROWS, self.tile
        new = self.rows, self.time, self.heads, self.value
        return new, products, (*each, self.levels, self.key, self.value)

    def constants(self, most_columns: int) -> tuple[int, ...]:
        """``sizes`` of the kernels."""
        return self.chunk, self.tile, self.key, _tile(self.key), self.value, min(_tile(self.value), most_columns)

    def programs(self, most_columns: int) -> tuple[int, int]:
        """One for some columns of each head."""
        return self.n_memories, -(-self.value // min(_tile(self.value), most_columns))

    @property
    def n_warps(self) -> int:
        return 4 if self.tile * _tile(self.key) <= 32 * 64 else 8


def _sizes(query: Tensor, values: Tensor, moving: Tensor | None, chunk: int) -> _Sizes:
    rows, time, heads, key = query.shape
    return _Sizes(rows, heads, time, chunk, key, values.shape[-1], 1 if moving is None else 2)


def _tile(n: int) -> int:
    """The power of two, 16 at least, that holds n: products of the tensor cores are no narrower."""
    return max(16, 1 << (n - 1).bit_length())


@torch.library.custom_op("meristem::triton_chunk_form", mutates_args=())
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
    query, keys, values, memory = (x.contiguous() for x in (query, keys, values, memory))
    gates = [None if x is None else x.contiguous() for x in (retain, momentum, write, scale)]
    moving = None if moving is None else moving.contiguous()
    new_shape, products_shape, entered_shape = sizes.saved()
    products = values.new_empty(products_shape)
    new, entered = (values.new_empty(shape) if keeps else None for shape in (new_shape, entered_shape))
    read, last = torch.empty_like(values), torch.empty_like(memory)
    last_moving = None if moving is None else torch.empty_like(moving)
    how, with_warps = (sizes.levels, LEAST, probe, reads_before), {"num_warps": sizes.n_warps, "num_stages": 1}
    form, counts = _kernels(), (sizes.time, sizes.heads)
    with _device_of(query):
        form.prepare_kernel[sizes.n_memories, sizes.n_chunks](
            (query, keys, *gates), products, *counts, sizes.constants(RUN_COLUMNS), how, EXACT, **with_warps
        )
        form.run_kernel[sizes.programs(RUN_COLUMNS)](
            (query, keys, values, products, memory, moving),
            (read, last, last_moving, new, entered),
            *counts,
            sizes.constants(RUN_COLUMNS),
            how,
            (EXACT, _precision_of_reads()),
            **with_warps,
        )
    empty = values.new_empty(0)
    saved = (empty, empty.clone(), empty.clone()) if new is None or entered is None else (new, products, entered)
    return read, last, values.new_empty(0) if last_moving is None else last_moving, *saved


@_forward.register_fake
def _forward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    query, _, values, *_, memory, moving, chunk, _, _, keeps = inputs
    last = torch.empty_like(memory, memory_format=torch.contiguous_format)
    last_moving = values.new_empty(0) if moving is None else torch.empty_like(last)
    read = torch.empty_like(values, memory_format=torch.contiguous_format)
    saved = _sizes(query, values, moving, chunk).saved() if keeps else ((0,), (0,), (0,))
    return read, last, last_moving, *(values.new_empty(shape) for shape in saved)


@torch.library.custom_op("meristem::triton_chunk_form_backward", mutates_args=())
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
    query, keys, d_read, d_last = (x.contiguous() for x in (query, keys, d_read, d_last))
    gates = [None if x is None else x.contiguous() for x in (retain, momentum, write, scale)]
    d_last_moving = None if d_last_moving is None else d_last_moving.contiguous()
    d_query, d_keys, d_values, d_left, d_memory = map(torch.empty_like, (query, keys, d_read, entered, d_last))
    d_gates = [None if x is None else torch.empty_like(x) for x in gates]
    d_moving = None if d_last_moving is None else torch.empty_like(d_last_moving)
    how, with_warps = (sizes.levels, LEAST, probe, reads_before), {"num_warps": sizes.n_warps, "num_stages": 1}
    precision = EXACT, _precision_of_reads()
    form, counts = _kernels(), (sizes.time, sizes.heads)
    with _device_of(query):
        form.run_back_kernel[sizes.programs(RUN_COLUMNS)](
            (query, keys, products, d_read, d_last, d_last_moving),
            (d_values, d_left, d_memory, d_moving),
            *counts,
            sizes.constants(RUN_COLUMNS),
            how,
            precision,
            **with_warps,
        )
        form.gradients_kernel[sizes.n_memories, sizes.n_chunks](
            (query, keys, *gates, products, new_values, entered, d_read, d_values, d_left),
            (d_query, d_keys, *d_gates),
            *counts,
            sizes.constants(GRADIENT_COLUMNS),
            how,
            precision,
            **with_warps,
        )
    found = d_query, d_keys, d_values, *d_gates, d_memory, d_moving
    return tuple(query.new_empty(0) if x is None else x for x in found)  # type: ignore[return-value]


_backward.register_fake(backward_shapes)
_forward.register_autograd(sends_back(_backward), setup_context=keep)

FORWARD, BACKWARD = torch.ops.meristem.triton_chunk_form, torch.ops.meristem.triton_chunk_form_backward
"""The operations, for those who count what they do."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def interprets() -> bool:
    """Triton is set to run its kernels on the CPU, as NumPy code; it reads this once, when a kernel is made."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _precision_of_reads() -> Literal["tf32x3", "tf32", "bfloat16", "rounded to bfloat16"]:
    precision = READS[torch.get_float32_matmul_precision()]
    return "rounded to bfloat16" if precision == "bfloat16" and interprets() else precision  # type: ignore[return-value]


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _kernels() -> ModuleType:
    from meristem.memory.kernels import chunk_triton

    return chunk_triton
