"""The exact chunk form by the kernels of ``triton_forward`` and ``triton_backward`` as an operation of torch.

It takes and gives what the operation of the native core does (``native.operations``): ``torch.compile`` sees one
operation and its shapes, autograd one node. Triton is imported when it runs.
"""

import math
import os
from contextlib import AbstractContextManager, nullcontext
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

EDGE: Final = 32
"""Tokens of a block of the triangular system that is inverted by substitution; larger ones are merged from such."""

COLUMNS: Final = 32
"""Columns of keys or values that a kernel has at hand, of those that it does not carry through all chunks."""

HALF, CARRIED = 64, 16
"""Columns of keys, of which there may be twice as many, and of values in a program that carries a memory."""

N_SUMS: Final = 8
"""Rows of sums over the columns of keys of which gradients of gates are made: ``triton_backward`` counts on eight."""


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


Given = tuple[Tensor | None, ...]
"""What a kernel is launched with; None for a gate, or a momentum, that is not there."""


class Sizes(NamedTuple):
    """Constants of a kernel: of a chunk its tokens, and the rows of a tile that holds them; the widths of keys and
    values, and how many columns of each are at hand; and the numbers of a memory."""

    chunk: int
    tile: int
    key_width: int
    key_columns: int
    value_width: int
    value_columns: int
    area: int


class Kind(NamedTuple):
    """Constants of a kernel: levels, 2 with momentum; the least factor that counts; the memory at which residuals are
    taken, 0 none, 1 that at the start of the chunk, 2 that of the token; whether a token reads before it writes."""

    levels: int
    least: float
    probe: int
    reads_before: bool


class _Call(NamedTuple):
    """How many there are of what, and how a kernel is launched on them."""

    rows: int
    heads: int
    time: int
    chunk: int
    key: int
    value: int
    kind: Kind

    @property
    def tile(self) -> int:
        """Rows of a tile of tokens."""
        return _tile(self.chunk)

    @property
    def chunks(self) -> tuple[int, int]:
        """Memories, and chunks of each."""
        return self.rows * self.heads, -(-self.time // self.chunk)

    def saved(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of N, of the inverses of D, and of what entered each chunk."""
        new = self.rows, self.time, self.heads, self.value
        return new, (*self.chunks, self.tile, self.tile), (*self.chunks, self.kind.levels, self.key, self.value)

    def carrying(self, kernel: Any, given: Given, made: Given, precision: Any) -> None:
        """Launch a kernel that carries memories through all chunks, some columns of values in each program."""
        columns = min(_tile(self.key), HALF), min(_tile(self.value), CARRIED)
        grid = self.chunks[0], -(-self.value // columns[1])
        # Tiles of the next chunk are loaded ahead where they fit on the chip beside those of this one.
        num_stages = 2 if self.tile <= TOGETHER else 1
        self._launch(kernel, grid, given, made, columns, self.kind, precision, num_stages=num_stages)

    def each_chunk(
        self,
        kernel: Any,
        given: Given,
        made: Tensor | Given,
        *constants: Any,
        split: Literal["keys", "values", None] = None,
        blocks: int = 1,
    ) -> None:
        """Launch a kernel on every chunk. split: columns of which its programs share among them, else ``blocks``."""
        columns = min(_tile(self.key), COLUMNS), min(_tile(self.value), COLUMNS)
        if split is not None:
            blocks = -(-self.key // columns[0]) if split == "keys" else -(-self.value // columns[1])
        self._launch(kernel, (*self.chunks, blocks), given, made, columns, *constants)

    def _launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        given: Any,
        made: Any,
        columns: tuple[int, int],
        *constants: Any,
        num_stages: int = 1,
    ) -> None:
        sizes = Sizes(self.chunk, self.tile, self.key, columns[0], self.value, columns[1], self.key * self.value)
        # Of tiles of 64 tokens, eight warps spill more than four.
        options = {"num_warps": 4 if self.tile <= TOGETHER else 8, "num_stages": num_stages}
        kernel[grid](given, made, self.time, self.heads, sizes, *constants, **options)


def _call(query: Tensor, values: Tensor, moving: Tensor | None, chunk: int, probe: int, reads_before: bool) -> _Call:
    rows, time, heads, key = query.shape
    kind = Kind(1 if moving is None else 2, LEAST, probe, reads_before)
    return _Call(rows, heads, time, chunk, key, values.shape[-1], kind)


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
    from meristem.memory.kernels import triton_forward as kernels

    call = _call(query, values, moving, chunk, probe, reads_before)
    query, keys, values, memory = (x.contiguous() for x in (query, keys, values, memory))
    retain, momentum, write, scale, moving = _packed(retain, momentum, write, scale, moving)
    new, inverse, entered = (values.new_empty(shape) for shape in call.saved())
    read, last = torch.empty_like(values), torch.empty_like(memory)
    last_moving = None if moving is None else torch.empty_like(moving)
    with _device_of(query):
        weights, writes, through = _weigh(call, (retain, momentum, write))
        if probe == PROBES["token"]:
            edge, system = min(EDGE, call.tile), (keys, weights, scale)
            call.each_chunk(kernels.invert_kernel, system, inverse, edge, EXACT, blocks=call.tile // edge)
            while edge < call.tile:
                call.each_chunk(kernels.merge_kernel, system, inverse, edge, EXACT, blocks=call.tile // edge // 2)
                edge *= 2
        given: Given = keys, values, scale, weights, writes, through, inverse, memory, moving
        call.carrying(kernels.run_kernel, given, (new, entered, last, last_moving), EXACT)
        given = query, keys, weights, through, new, entered
        call.each_chunk(kernels.read_kernel, given, read, call.kind, _precision_of_reads(), split="values")
    empty = values.new_empty(0)
    saved = (new, inverse, entered) if keeps else (empty, empty.clone(), empty.clone())
    return read, last, values.new_empty(0) if last_moving is None else last_moving, *saved


@_forward.register_fake
def _forward_shapes(*inputs: Any) -> tuple[Tensor, ...]:
    query, _, values, *_, memory, moving, chunk, probe, reads_before, keeps = inputs
    last = torch.empty_like(memory, memory_format=torch.contiguous_format)
    last_moving = values.new_empty(0) if moving is None else torch.empty_like(last)
    read = torch.empty_like(values, memory_format=torch.contiguous_format)
    saved = _call(query, values, moving, chunk, probe, reads_before).saved() if keeps else ((0,), (0,), (0,))
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
    inverse: Tensor,
    entered: Tensor,
    d_read: Tensor,
    d_last: Tensor,
    d_last_moving: Tensor | None,
    chunk: int,
    probe: int,
    reads_before: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first nine inputs of the operation; empty for what is not there."""
    from meristem.memory.kernels import triton_backward as kernels

    call, reads = _call(query, d_read, d_last_moving, chunk, probe, reads_before), _precision_of_reads()
    query, keys, d_read, d_last = (x.contiguous() for x in (query, keys, d_read, d_last))
    retain, momentum, write, scale, d_last_moving = _packed(retain, momentum, write, scale, d_last_moving)
    d_query, d_keys, d_values, d_left, d_memory = map(torch.empty_like, (query, keys, d_read, entered, d_last))
    d_retain, d_momentum, d_write, d_scale = d_gates = tuple(
        None if x is None else torch.empty_like(x) for x in (retain, momentum, write, scale)
    )
    d_moving = None if d_last_moving is None else torch.empty_like(d_last_moving)
    blocks = -(-call.key // min(_tile(call.key), COLUMNS))
    sums = query.new_empty(*call.chunks, blocks, N_SUMS, call.tile)
    squares = [query.new_empty(*call.chunks, call.tile, call.tile) for _ in range(4)]
    d_scale_pairs = query.new_empty(*call.chunks, call.tile)
    with _device_of(query):
        weights, writes, through = _weigh(call, (retain, momentum, write))
        given: Given = query, keys, weights, d_read
        call.each_chunk(kernels.send_kernel, given, d_values, call.kind, reads, split="values")
        given = query, keys, scale, weights, writes, through, inverse, d_read, d_last, d_last_moving
        call.carrying(kernels.run_back_kernel, given, (d_values, d_left, d_memory, d_moving), (EXACT, reads))
        given = query, keys, scale, weights, new_values, d_read, d_values
        call.each_chunk(kernels.pairs_kernel, given, (*squares, d_scale_pairs), call.kind, (EXACT, reads), blocks=2)
        given = (
            query,
            keys,
            scale,
            weights,
            writes,
            through,
            new_values,
            entered,
            d_read,
            d_values,
            d_left,
            *squares[2:],
        )
        call.each_chunk(kernels.vectors_kernel, given, (d_query, d_keys, sums), call.kind, (EXACT, reads), split="keys")
        given = retain, momentum, scale, weights, writes, through, *squares[:2], sums.sum(2), d_scale_pairs
        call.each_chunk(kernels.gates_kernel, given, (d_retain, d_momentum, d_write, d_scale), call.kind)
    found = d_query, d_keys, d_values, *d_gates, d_memory, d_moving
    return tuple(query.new_empty(0) if x is None else x for x in found)  # type: ignore[return-value]


_backward.register_fake(backward_shapes)
_forward.register_autograd(sends_back(_backward), setup_context=keep)

FORWARD, BACKWARD = torch.ops.meristem.triton_chunk_form, torch.ops.meristem.triton_chunk_form_backward
"""The operations, for those who count what they do."""


def _weigh(call: _Call, gates: tuple[Tensor | None, Tensor | None, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
    """W, P, and a with b and h, of every chunk."""
    from meristem.memory.kernels import triton_forward as kernels

    square, like = (*call.chunks, call.tile + 1, call.tile), gates[2]
    writes = like.new_empty(square) if call.kind.levels == 2 else None
    # What is after the last token of a chunk is multiplied by nought, and has to be finite.
    made = like.new_empty(square), writes, like.new_zeros(*call.chunks, 3, call.tile + 1)
    call.each_chunk(kernels.weigh_kernel, gates, made, call.kind)
    return made


def _packed(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def interprets() -> bool:
    """Triton is set to run its kernels on the CPU, as NumPy code; it reads this once, when a kernel is made."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _precision_of_reads() -> Literal["tf32x3", "tf32", "bfloat16", "rounded to bfloat16"]:
    precision = READS[torch.get_float32_matmul_precision()]
    return "rounded to bfloat16" if precision == "bfloat16" and interprets() else precision  # type: ignore[return-value]


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
