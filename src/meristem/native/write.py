"""The write of a sequence into a memory as one operation of torch: vectors, gates and form, head by head.

What ``layers.memory_vectors``, ``nn.gates`` and ``operations.chunk_form`` do one after the other, with nothing between
them that tensors or autograd would have to hold (``native/write.hpp``). Who may call it is decided by ``nn.write``.
"""

import ctypes
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from meristem.native.interface import NUMBERS, View, counting, function, lanes, torchs_threads
from meristem.native.layers import MOST_VECTORS, Vectors
from meristem.native.operations import PROBES, Form, chunk_of

WORTH_A_THREAD: Final = 1e6
"""Multiplications that take several times as long as starting a thread."""

N_UNITS: Final = 2
"""Queries and keys have length one, values do not."""


class Write(ctypes.Structure):
    """``MeristemWrite`` of ``core.cpp``."""

    _fields_ = (
        *(("form", Form), ("vectors", Vectors)),
        *((name, ctypes.c_void_p) for name in ("logits", "most", "d_logits", "d_most")),
        *((name, ctypes.c_double) for name in ("slope", "write_limit", "curvature")),
        *((name, ctypes.c_int32) for name in ("is_warm", "has_retain", "has_retain_gate")),
    )


class Rule(NamedTuple):
    """What a write is, beside its tensors: numbers and yes or no, as an operation of torch can take them.

    chunk: tokens solved together at most. slope: how much of what is recalled a write takes away; 0 does not read it.
    curvature: 0 where the write rate has no limit (``memory.region``).
    """

    chunk: float
    slope: float
    is_warm: float
    reads_before: float
    has_retain: float
    has_retain_gate: float
    write_limit: float
    curvature: float

    @property
    def probe(self) -> int:
        return PROBES["token" if self.slope else "never"]


class Inputs(NamedTuple):
    """What is differentiated.

    mixed_btd: queries, keys and values of all heads as they are projected; tail_bsd: the inputs of the convolution
    before them; weight_dc: its taps. logits_btf: of the gates write rate, retain and momentum, as far as the rule has
    them, each of all heads. most_h: the greatest momentum. memory, moving: ``b h k v``; without momentum None.
    """

    mixed_btd: Tensor
    tail_bsd: Tensor
    weight_dc: Tensor
    logits_btf: Tensor
    most_h: Tensor | None
    memory_bhkv: Tensor
    moving_bhkv: Tensor | None

    @property
    def wide(self) -> torch.dtype:
        """In which all but the first two are, and everything is computed."""
        return torch.promote_types(self.mixed_btd.dtype, torch.float32)

    @property
    def sizes(self) -> "Sizes":
        (batch, n_time, channels), (_, heads, width, _) = self.mixed_btd.shape, self.memory_bhkv.shape
        if channels != MOST_VECTORS * heads * width:
            raise ValueError(f"found {channels} channels; expected queries, keys and values of {heads} x {width}")
        n_lanes = lanes(self.mixed_btd.dtype)
        return Sizes(batch, n_time, heads, width, self.weight_dc.shape[1], 1 + (self.moving_bhkv is not None), n_lanes)

    def dense(self) -> "Inputs":
        """Without gaps, and those that are computed with as wide as that."""
        found = [None if x is None else x.to(self.wide).contiguous() for x in self[2:]]
        memories = (None if x is None else _by_head(x) for x in self[5:])
        return Inputs(self.mixed_btd.contiguous(), self.tail_bsd.contiguous(), *found[:3], *memories)  # type: ignore[arg-type]


class Sizes(NamedTuple):
    batch: int
    time: int
    heads: int
    width: int
    taps: int
    levels: int
    lanes: int

    def saved(self, rule: Rule) -> tuple[tuple[int, ...], ...]:
        """Shapes of what the backward pass reads again: queries and keys, what is new in the values, products of keys,
        and what entered each chunk."""
        chunk = self.chunk(rule)
        each, columns = (
            (self.batch * self.heads, -(-self.time // chunk)),
            -(-chunk // (2 * self.lanes)) * 2 * self.lanes,
        )
        vectors = 2, self.batch, self.heads, self.time, self.width
        products = *each, 2 if rule.slope else 1, chunk, columns
        return vectors, (*each, chunk, self.width), products, (*each, self.levels * self.width, self.width)

    def chunk(self, rule: Rule) -> int:
        return min(chunk_of(self.width, int(rule.chunk)), self.time)

    @property
    def n_threads(self) -> int:
        """As many as torch may use, heads of all rows are there, and the work is worth."""
        heads = self.batch * self.heads
        n_products = heads * self.time * self.width * (3 * self.levels * self.width + 200)
        return max(1, min(torch.get_num_threads(), heads, int(n_products / WORTH_A_THREAD)))


@dataclass(frozen=True)
class Places:
    """Where results go: tensors, or parts of them, that the caller made.

    read_btf: ``b t (h v)``. saved: as ``Sizes.saved`` has them; None where no backward pass follows.
    """

    read_btf: Tensor
    last_bhkv: Tensor
    last_moving_bhkv: Tensor | None
    saved: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Gradients:
    """Of what left, which are read, and of the inputs, which are written, those of the weights for each row apart."""

    d_read_btf: Tensor
    d_last_bhkv: Tensor
    d_last_moving_bhkv: Tensor | None
    saved: tuple[Tensor, ...]
    inputs: Inputs


def write_forward(inputs: Inputs, rule: Rule, places: Places) -> None:
    """Write a sequence; the inputs are dense."""
    given = _given(inputs, rule)
    form, sizes = given.form, inputs.sizes
    form.read = _by_token(places.read_btf, sizes.width)
    form.last = _matrix(places.last_bhkv)
    if places.last_moving_bhkv is not None:
        form.last_moving = _matrix(places.last_moving_bhkv)
    if places.saved is not None:
        _put_saved(form, places.saved)
    _run("forward", given)


def write_backward(inputs: Inputs, rule: Rule, gradients: Gradients) -> None:
    """The gradients of ``write_forward``; the inputs are dense."""
    given = _given(inputs, rule)
    form, vectors, made = given.form, given.vectors, gradients.inputs
    _put_saved(form, gradients.saved)
    form.d_read, form.d_last = _by_token(gradients.d_read_btf, inputs.sizes.width), _matrix(gradients.d_last_bhkv)
    form.d_memory = _matrix(made.memory_bhkv)
    if gradients.d_last_moving_bhkv is not None and made.moving_bhkv is not None and made.most_h is not None:
        form.d_last_moving, form.d_moving = _matrix(gradients.d_last_moving_bhkv), _matrix(made.moving_bhkv)
        given.d_most = made.most_h.data_ptr()
    vectors.d_x, vectors.d_before, vectors.d_weight, given.d_logits = (x.data_ptr() for x in made[:4] if x is not None)
    _run("backward", given)


def _given(inputs: Inputs, rule: Rule) -> Write:
    sizes = inputs.sizes
    numbers, n_threads = NUMBERS[inputs.mixed_btd.dtype], sizes.n_threads
    outer = sizes.batch, sizes.time
    form = Form(*outer, sizes.heads, sizes.width, sizes.width, sizes.chunk(rule), n_threads, sizes.levels, rule.probe)
    form.reads_before, form.is_double = int(rule.reads_before), inputs.wide == torch.float64
    form.memory = _matrix(inputs.memory_bhkv)
    if inputs.moving_bhkv is not None:
        form.moving = _matrix(inputs.moving_bhkv)
    form.parallel = torchs_threads()
    vectors = Vectors(*outer, MOST_VECTORS, sizes.heads, sizes.width, sizes.taps, N_UNITS, n_threads, numbers)
    vectors.x, vectors.before, vectors.weight = (x.data_ptr() for x in inputs[:3] if x is not None)
    given = Write(form, vectors, inputs.logits_btf.data_ptr())
    given.most = None if inputs.most_h is None else inputs.most_h.data_ptr()
    given.slope, given.write_limit, given.curvature = rule.slope, rule.write_limit, rule.curvature
    chosen = rule.is_warm, rule.has_retain, rule.has_retain_gate
    given.is_warm, given.has_retain, given.has_retain_gate = (int(each) for each in chosen)
    return given


def _put_saved(form: Form, saved: tuple[Tensor, ...]) -> None:
    vectors, *rest = saved
    for name, each in zip(("query", "keys"), vectors, strict=True):
        row, head, time, _ = each.stride()
        setattr(form, name, View(each.data_ptr(), row, time, head))
    form.new_values, form.products, form.entered = (x.data_ptr() for x in rest)


def _run(what: str, given: Write) -> None:
    each_bytes = counting("write_scratch")(ctypes.byref(given), what == "backward")
    scratch = torch.empty(each_bytes * given.form.threads, dtype=torch.uint8)
    given.form.scratch, given.form.n_scratch_bytes = scratch.data_ptr(), scratch.numel()
    fault = function(f"write_{what}")(ctypes.byref(given))
    if fault:
        raise RuntimeError(f"the native core refused a write with code {fault}: nn.write let it through")


def _by_token(x_btf: Tensor, width: int) -> View:
    """``b t (h v)`` as ``b t h v``."""
    row, time, _ = x_btf.stride()
    return View(x_btf.data_ptr(), row, time, width)


def _matrix(x_bhkv: Tensor) -> View:
    row, head, _, _ = x_bhkv.stride()
    return View(x_bhkv.data_ptr(), row, 0, head)


def _by_head(x_bhkv: Tensor) -> Tensor:
    """Each matrix without gaps; one that all rows share stays one."""
    return x_bhkv if x_bhkv[0, 0].is_contiguous() else x_bhkv.contiguous()


# ---- as an operation of torch ----


def memory_write(inputs: Inputs, rule: Rule) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What every token reads, ``b t (h v)``, memory and momentum after the sequence, and the inputs that the next
    convolution needs, under autograd.

    What was projected is float32, float64 or bfloat16, of which the last is computed in float32, as what is read is.
    """
    keeps = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    read_btf, last_bhkv, moving_bhkv, tail_bsd, *_ = _forward(*inputs, list(rule), keeps)
    return read_btf, last_bhkv, None if inputs.moving_bhkv is None else moving_bhkv, tail_bsd


@torch.library.custom_op("meristem::memory_write", mutates_args=(), device_types="cpu")
def _forward(
    mixed_btd: Tensor,
    tail_bsd: Tensor,
    weight_dc: Tensor,
    logits_btf: Tensor,
    most_h: Tensor | None,
    memory_bhkv: Tensor,
    moving_bhkv: Tensor | None,
    rule: list[float],
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``memory_write`` has it, and what the backward pass reads again, empty unless it keeps it."""
    inputs = Inputs(mixed_btd, tail_bsd, weight_dc, logits_btf, most_h, memory_bhkv, moving_bhkv)
    made: tuple[Tensor, ...] = _forward_shapes(*inputs, rule, keeps)
    read_btf, last_bhkv, last_moving, tail, *saved = made
    last_moving_bhkv = None if moving_bhkv is None else last_moving
    write_forward(
        inputs.dense(), Rule(*rule), Places(read_btf, last_bhkv, last_moving_bhkv, tuple(saved) if keeps else None)
    )
    n_kept, n_time = tail_bsd.shape[1], mixed_btd.shape[1]
    if n_time < n_kept:
        tail[:, : n_kept - n_time] = tail_bsd[:, n_time:]
    tail[:, max(0, n_kept - n_time) :] = mixed_btd[:, max(0, n_time - n_kept) :]
    return made  # type: ignore[return-value]


@_forward.register_fake
def _forward_shapes(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *tensors, rule, keeps = given
    inputs = Inputs(*tensors)
    sizes = inputs.sizes
    like = inputs.memory_bhkv
    read_btf = like.new_empty(sizes.batch, sizes.time, sizes.heads * sizes.width)
    last_bhkv = like.new_empty(like.shape)
    last_moving = like.new_empty(0 if inputs.moving_bhkv is None else like.shape)
    tail_bsd = torch.empty_like(inputs.tail_bsd, memory_format=torch.contiguous_format)
    saved = sizes.saved(Rule(*rule)) if keeps else ((0,),) * 4
    vectors, new_values, products, entered = (like.new_empty(shape) for shape in saved)
    return read_btf, last_bhkv, last_moving, tail_bsd, vectors, new_values, products, entered


@torch.library.custom_op("meristem::memory_write_backward", mutates_args=(), device_types="cpu")
def _backward(
    mixed_btd: Tensor,
    tail_bsd: Tensor,
    weight_dc: Tensor,
    logits_btf: Tensor,
    most_h: Tensor | None,
    memory_bhkv: Tensor,
    moving_bhkv: Tensor | None,
    saved: list[Tensor],
    d_left: list[Tensor],
    rule: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the inputs; empty for what is not there.

    d_left: of what is read, of memory and momentum after the sequence and of the tail; empty where there is none.
    """
    inputs = Inputs(mixed_btd, tail_bsd, weight_dc, logits_btf, most_h, memory_bhkv, moving_bhkv)
    sizes = inputs.sizes
    made = list(_backward_shapes(*inputs))
    of_rows = Inputs(*made)._replace(
        weight_dc=weight_dc.new_empty(sizes.batch, *weight_dc.shape, dtype=inputs.wide),
        most_h=None if most_h is None else most_h.new_empty(sizes.batch, sizes.heads, dtype=inputs.wide),
        moving_bhkv=None if moving_bhkv is None else made[-1],
    )
    read_shape = sizes.batch, sizes.time, sizes.heads * sizes.width
    d_read, d_last, d_last_moving, d_tail = d_left
    d_read = d_read.to(inputs.wide).contiguous() if d_read.numel() else memory_bhkv.new_zeros(read_shape)
    d_last, d_last_moving = (
        _by_head(d) if d.numel() else memory_bhkv.new_zeros(memory_bhkv.shape) for d in (d_last, d_last_moving)
    )
    left = d_read, d_last, None if moving_bhkv is None else d_last_moving
    write_backward(inputs.dense(), Rule(*rule), Gradients(*left, tuple(saved), of_rows))
    made[2] = of_rows.weight_dc.sum(dim=0).to(weight_dc.dtype)
    if of_rows.most_h is not None:
        made[4] = of_rows.most_h.sum(dim=0)
    if d_tail.numel():
        n_kept, n_time = tail_bsd.shape[1], mixed_btd.shape[1]
        made[0][:, max(0, n_time - n_kept) :] += d_tail[:, max(0, n_kept - n_time) :]
        if n_time < n_kept:
            made[1][:, n_time:] += d_tail[:, : n_kept - n_time]
    return tuple(made)


@_backward.register_fake
def _backward_shapes(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(*given[:7])
    like = inputs.mixed_btd

    def dense(x: Tensor | None) -> Tensor:
        return like.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return tuple(map(dense, inputs))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, ctx.rule, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4:])
    ctx.save_for_backward(*given, *output[4:])


def _send_back(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, saved = ctx.saved_tensors[:7], list(ctx.saved_tensors[7:])
    left = [saved[0].new_empty(0) if d is None else d for d in d_outputs[:4]]
    found = _backward(*inputs, saved, left, ctx.rule)
    return *(None if x is None else d for d, x in zip(found, inputs, strict=True)), None, None


_forward.register_autograd(_send_back, setup_context=_keep)
