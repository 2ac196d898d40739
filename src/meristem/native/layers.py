"""What stands around the products of a training step, by the native core, as operations of torch with their gradients.

Each is one pass over its inputs where tensor code makes five to fifteen; ``native/layers.hpp`` has what is computed.
Numbers are float32, float64 or bfloat16, of which the last are computed in float32. Who may call them is decided by
``memory.kernels.select.fuses``.
"""

import ctypes
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from meristem.native.interface import NUMBERS, View, counting, function, torchs_threads

WORTH_A_THREAD: Final = 2e5
"""Numbers that take several times as long as starting a thread."""

MOST_TAPS, MOST_WIDTH, MOST_VECTORS = 8, 1024, 3
"""Of a short convolution that the core takes: taps, the width of a head, and vectors of a token."""


class Vectors(ctypes.Structure):
    """``MeristemVectors`` of ``core.cpp``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "time", "vectors", "heads", "width", "taps", "units", "threads")),
        ("numbers", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "before", "weight")),
        ("vector", View * MOST_VECTORS),
        *((name, ctypes.c_void_p) for name in ("d_x", "d_before", "d_weight", "parallel")),
    )


class Rows(ctypes.Structure):
    """``MeristemRows`` of ``core.cpp``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width", "threads")),
        ("numbers", ctypes.c_int32),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "gate", "beside", "gain", "sent")),
        *((name, ctypes.c_void_p) for name in ("out", "d_x", "d_gate", "d_gain", "parallel")),
    )


class CrossEntropy(ctypes.Structure):
    """``MeristemCrossEntropy`` of ``core.cpp``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width", "ignored", "threads")),
        ("numbers", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("logits", "targets", "log_sum", "nats")),
        ("weight", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("d_logits", "parallel")),
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of a dtype are computed."""
    return torch.promote_types(dtype, torch.float32)


def _like(tensor: Tensor) -> Tensor:
    """Of its shape, without gaps."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(name: str, given: ctypes.Structure, n_numbers: int) -> None:
    given.threads = max(1, min(torch.get_num_threads(), int(n_numbers / WORTH_A_THREAD)))
    given.parallel = torchs_threads()
    fault = function(name)(ctypes.byref(given))
    if fault:
        raise RuntimeError(f"the native core refused {name} with code {fault}: memory.kernels.select let it through")


# ---- the vectors of a memory ----


@torch.library.custom_op("meristem::memory_vectors", mutates_args=(), device_types="cpu")
def memory_vectors(
    mixed_btd: Tensor, tail_bsd: Tensor, weight_dc: Tensor, n_vectors: int, heads: int, n_units: int
) -> list[Tensor]:
    """Short convolution over time, SiLU, and length one for the first ``n_units`` of the vectors that come of it.

    ``y_t = sum_i w_i x_(t - kernel + 1 + i)``, ``u = silu(y)``, ``u / sqrt(|u|^2 + 1e-12)``.

    mixed_btd: the inputs; tail_bsd: the ``kernel - 1`` before them, of the same dtype. Gives ``n_vectors`` of ``b t h
    k`` in the dtype that they are computed in, each laid out head by head.
    """
    inputs = _as_computed(mixed_btd, tail_bsd, weight_dc)
    given, shape = _vectors_of(*inputs, n_vectors, heads, n_units)
    dtype = _wide(mixed_btd.dtype)
    found = [mixed_btd.new_empty(shape, dtype=dtype).transpose(1, 2) for _ in range(n_vectors)]
    given.vector = (View * MOST_VECTORS)(*(View.of(each) for each in found))
    _call("vectors_forward", given, mixed_btd.numel())
    return found


@memory_vectors.register_fake
def _vectors_shapes(mixed_btd: Tensor, tail_bsd: Tensor, weight_dc: Tensor, *settings: int) -> list[Tensor]:
    n_vectors, heads, _ = settings
    batch, n_time, channels = mixed_btd.shape
    shape = batch, heads, n_time, channels // n_vectors // heads
    dtype = _wide(mixed_btd.dtype)
    return [mixed_btd.new_empty(shape, dtype=dtype).transpose(1, 2) for _ in range(n_vectors)]


@torch.library.custom_op("meristem::memory_vectors_backward", mutates_args=(), device_types="cpu")
def _vectors_backward(
    mixed_btd: Tensor, tail_bsd: Tensor, weight_dc: Tensor, sent: list[Tensor], heads: int, n_units: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the first three inputs."""
    inputs = _as_computed(mixed_btd, tail_bsd, weight_dc)
    given, _ = _vectors_of(*inputs, len(sent), heads, n_units)
    dense = [each if each.stride(-1) == 1 else each.contiguous() for each in sent]
    given.vector = (View * MOST_VECTORS)(*(View.of(each) for each in dense))
    d_mixed_btd, d_tail_bsd = (torch.empty_like(x) for x in inputs[:2])
    d_weight_bdc = inputs[2].new_empty(len(mixed_btd), *weight_dc.shape)
    given.d_x, given.d_before, given.d_weight = (x.data_ptr() for x in (d_mixed_btd, d_tail_bsd, d_weight_bdc))
    _call("vectors_backward", given, 3 * mixed_btd.numel())
    return d_mixed_btd, d_tail_bsd, d_weight_bdc.sum(dim=0).to(weight_dc.dtype)


@_vectors_backward.register_fake
def _vectors_backward_shapes(
    mixed_btd: Tensor, tail_bsd: Tensor, weight_dc: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    d_mixed_btd, d_tail_bsd = (_like(x) for x in (mixed_btd, tail_bsd))
    return d_mixed_btd, d_tail_bsd, _like(weight_dc)


def _as_computed(mixed_btd: Tensor, tail_bsd: Tensor, weight_dc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return mixed_btd.contiguous(), tail_bsd.contiguous(), weight_dc.to(_wide(mixed_btd.dtype)).contiguous()


def _vectors_of(
    mixed_btd: Tensor, tail_bsd: Tensor, weight_dc: Tensor, n_vectors: int, heads: int, n_units: int
) -> tuple[Vectors, tuple[int, ...]]:
    """What both passes are given, and the shape of a vector, ``b h t k``. The tensors have to live as long."""
    (batch, n_time, channels), taps = mixed_btd.shape, weight_dc.shape[1]
    width = channels // n_vectors // heads
    sizes = batch, n_time, n_vectors, heads, width, taps, n_units
    given = Vectors(*sizes, 1, NUMBERS[mixed_btd.dtype], _at(mixed_btd), _at(tail_bsd), _at(weight_dc))
    return given, (batch, heads, n_time, width)


def _keep_vectors(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    mixed_btd, tail_bsd, weight_dc, _, heads, n_units = inputs
    ctx.save_for_backward(mixed_btd, tail_bsd, weight_dc)
    ctx.settings = heads, n_units


def _send_vectors_back(ctx: Any, sent: list[Tensor]) -> tuple[Tensor | None, ...]:
    return *_vectors_backward(*ctx.saved_tensors, sent, *ctx.settings), None, None, None


memory_vectors.register_autograd(_send_vectors_back, setup_context=_keep_vectors)


# ---- norms ----


@torch.library.custom_op("meristem::norm", mutates_args=(), device_types="cpu")
def norm(hidden: Tensor, gain_d: Tensor, gate: Tensor | None, beside: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last axis, that times ``sigmoid(gate)``, added to ``beside``.

    hidden, gate, beside: of as many numbers and one dtype, which the result has as well; the last axis of hidden is a
    multiple of the width of the gain, and each such part a row of its own.
    """
    rows = _Norm.of(hidden, gain_d, gate, beside)
    made = torch.empty_like(rows.hidden)
    given = rows.given(eps)
    given.out = made.data_ptr()
    _call("norm_forward", given, hidden.numel())
    return made


@norm.register_fake
def _norm_shape(hidden: Tensor, *_: Any) -> Tensor:
    return _like(hidden)


@torch.library.custom_op("meristem::norm_backward", mutates_args=(), device_types="cpu")
def _norm_backward(
    hidden: Tensor, gain_d: Tensor, gate: Tensor | None, d_normed: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the first three inputs; the last is empty without a gate."""
    rows, d_normed = _Norm.of(hidden, gain_d, gate, None), d_normed.contiguous()
    d_hidden = torch.empty_like(rows.hidden)
    d_gate = hidden.new_empty(0) if gate is None else torch.empty_like(rows.hidden)
    given = rows.given(eps)
    # Each block of rows has a part of its own of what is summed.
    d_gain_nd = rows.gain_d.new_empty(-(-given.rows // counting("block_rows")()), len(gain_d))
    given.sent, given.d_x, given.d_gate, given.d_gain = map(_at, (d_normed, d_hidden, d_gate, d_gain_nd))
    _call("norm_backward", given, 2 * hidden.numel())
    return d_hidden, d_gain_nd.sum(dim=0).to(gain_d.dtype), d_gate


@_norm_backward.register_fake
def _norm_backward_shapes(hidden: Tensor, gain_d: Tensor, gate: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    return _like(hidden), _like(gain_d), hidden.new_empty(0) if gate is None else _like(hidden)


class _Norm(NamedTuple):
    """What a norm is given, as the core takes it."""

    hidden: Tensor
    gain_d: Tensor
    gate: Tensor | None
    beside: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, gain_d: Tensor, gate: Tensor | None, beside: Tensor | None) -> "_Norm":
        dense = (None if each is None else each.contiguous() for each in (gate, beside))
        return cls(hidden.contiguous(), gain_d.to(_wide(hidden.dtype)).contiguous(), *dense)

    def given(self, eps: float) -> Rows:
        """It has the addresses of these tensors, which have to live as long."""
        width = len(self.gain_d)
        found = Rows(self.hidden.numel() // width, width, 1, NUMBERS[self.hidden.dtype], eps)
        found.x, found.gain, found.gate, found.beside = map(_at, (self.hidden, self.gain_d, self.gate, self.beside))
        return found


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, gain_d, gate, beside, ctx.eps = inputs
    ctx.has_beside = beside is not None
    ctx.save_for_backward(hidden, gain_d, gate)


def _send_norm_back(ctx: Any, d_normed: Tensor) -> tuple[Tensor | None, ...]:
    hidden, gain_d, gate = ctx.saved_tensors
    d_hidden, d_gain_d, d_gate = _norm_backward(hidden, gain_d, gate, d_normed, ctx.eps)
    return d_hidden, d_gain_d, None if gate is None else d_gate, d_normed if ctx.has_beside else None, None


norm.register_autograd(_send_norm_back, setup_context=_keep_norm)


# ---- SwiGLU ----


@torch.library.custom_op("meristem::swiglu", mutates_args=(), device_types="cpu")
def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, where gate is the first half of the last axis and up the second."""
    gate_up = gate_up.contiguous()
    *shape, width = gate_up.shape
    made = gate_up.new_empty(*shape, width // 2)
    given = Rows(gate_up.numel() // width, width // 2, 1, NUMBERS[gate_up.dtype])
    given.x, given.out = gate_up.data_ptr(), made.data_ptr()
    _call("swiglu_forward", given, gate_up.numel())
    return made


@swiglu.register_fake
def _swiglu_shape(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("meristem::swiglu_backward", mutates_args=(), device_types="cpu")
def _swiglu_backward(gate_up: Tensor, d_made: Tensor) -> Tensor:
    gate_up, d_made = gate_up.contiguous(), d_made.contiguous()
    d_gate_up, width = torch.empty_like(gate_up), gate_up.shape[-1]
    given = Rows(gate_up.numel() // width, width // 2, 1, NUMBERS[gate_up.dtype])
    given.x, given.sent, given.d_x = (x.data_ptr() for x in (gate_up, d_made, d_gate_up))
    _call("swiglu_backward", given, 2 * gate_up.numel())
    return d_gate_up


@_swiglu_backward.register_fake
def _swiglu_backward_shape(gate_up: Tensor, d_made: Tensor) -> Tensor:
    return _like(gate_up)


def _keep_swiglu(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _send_swiglu_back(ctx: Any, d_made: Tensor) -> Tensor:
    (gate_up,) = ctx.saved_tensors
    d_gate_up: Tensor = _swiglu_backward(gate_up, d_made)
    return d_gate_up


swiglu.register_autograd(_send_swiglu_back, setup_context=_keep_swiglu)


# ---- cross entropy ----


@torch.library.custom_op("meristem::cross_entropy", mutates_args=(), device_types="cpu")
def cross_entropy(logits_no: Tensor, targets_n: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Nats of all rows together, and of each the logarithm of the sum of the exponentials, for the backward pass.

    targets_n: int64; a row whose target is ``ignored`` costs nothing. Raises IndexError for one that is no logit's.
    """
    logits_no, targets_n = logits_no.contiguous(), targets_n.contiguous()
    wide = _wide(logits_no.dtype)
    log_sum_n, nats_n = (logits_no.new_empty(len(logits_no), dtype=wide) for _ in range(2))
    given = _entropy_of(logits_no, targets_n, log_sum_n, ignored)
    given.nats = nats_n.data_ptr()
    counted_n = targets_n[targets_n != ignored]
    if counted_n.numel() and not 0 <= int(counted_n.min()) <= int(counted_n.max()) < logits_no.shape[1]:
        raise IndexError(
            f"targets lie between {int(counted_n.min())} and {int(counted_n.max())}; expected ids below "
            f"{logits_no.shape[1]}, the number of logits. Use the tokenizer of the model."
        )
    _call("cross_entropy_forward", given, 2 * logits_no.numel())
    return nats_n.sum(dtype=torch.float64).to(wide), log_sum_n


@cross_entropy.register_fake
def _entropy_shapes(logits_no: Tensor, targets_n: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    wide = _wide(logits_no.dtype)
    return logits_no.new_empty((), dtype=wide), logits_no.new_empty(len(logits_no), dtype=wide)


@torch.library.custom_op("meristem::cross_entropy_backward", mutates_args=(), device_types="cpu")
def _entropy_backward(logits_no: Tensor, targets_n: Tensor, log_sum_n: Tensor, d_nats: Tensor, ignored: int) -> Tensor:
    logits_no, targets_n = logits_no.contiguous(), targets_n.contiguous()
    d_logits_no = torch.empty_like(logits_no)
    given = _entropy_of(logits_no, targets_n, log_sum_n, ignored)
    given.weight, given.d_logits = float(d_nats), d_logits_no.data_ptr()
    _call("cross_entropy_backward", given, 2 * logits_no.numel())
    return d_logits_no


@_entropy_backward.register_fake
def _entropy_backward_shape(logits_no: Tensor, *_: Any) -> Tensor:
    return _like(logits_no)


def _entropy_of(logits_no: Tensor, targets_n: Tensor, log_sum_n: Tensor, ignored: int) -> CrossEntropy:
    given = CrossEntropy(*logits_no.shape, ignored, 1, NUMBERS[logits_no.dtype])
    given.logits, given.targets, given.log_sum = (x.data_ptr() for x in (logits_no, targets_n, log_sum_n))
    return given


def _keep_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_no, targets_n, ctx.ignored = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_no, targets_n, output[1])


def _send_entropy_back(ctx: Any, d_nats: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _entropy_backward(*ctx.saved_tensors, d_nats, ctx.ignored), None, None


cross_entropy.register_autograd(_send_entropy_back, setup_context=_keep_entropy)
