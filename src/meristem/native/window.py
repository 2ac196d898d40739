"""Attention over a sliding window by the native core, as an operation of torch with its gradient.

``native/attention.hpp`` has what is computed, of float32, float64 or bfloat16, the last in float32. Who may call it is
decided by ``memory.kernels.select.fuses``.
"""

import ctypes
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from meristem.native.interface import NUMBERS, counting, function, torchs_threads

ROTATION_BASE: Final = 10_000.0
"""Of the angles by which queries and keys are rotated (Su et al. 2104.09864)."""

WORTH_A_THREAD: Final = 2e6
"""Multiplications that take several times as long as starting a thread."""


class Window(ctypes.Structure):
    """``MeristemWindow`` of ``core.cpp``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "time", "past", "heads", "width", "span", "threads")),
        ("numbers", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("vectors", "past_keys", "past_values", "cosine", "sine")),
        *((name, ctypes.c_void_p) for name in ("kept", "mixed", "sent")),
        *((name, ctypes.c_void_p) for name in ("d_vectors", "d_past_keys", "d_past_values", "scratch")),
        ("n_scratch_bytes", ctypes.c_int64),
        ("parallel", ctypes.c_void_p),
    )


def windowed_attention(
    vectors_btn: Tensor, past: tuple[Tensor, Tensor] | None, heads: int, span: int, *, is_rotated: bool
) -> Tensor:
    """What each query gathers of the ``span`` keys that end with its own, ``b t (h v)``, under autograd.

    vectors_btn: queries, keys and values as they are projected, side by side, neither scaled nor rotated. past: keys
    and values before them, ``b s h k``, of the same dtype; None where there are none.
    """
    keys, values = past if past is not None and past[0].shape[1] else (None, None)
    keeps = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (vectors_btn, keys, values))
    mixed_btf: Tensor = _forward(vectors_btn, keys, values, heads, span, is_rotated, keeps)[0]
    return mixed_btf


@torch.library.custom_op("meristem::windowed_attention", mutates_args=(), device_types="cpu")
def _forward(
    vectors_btn: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    heads: int,
    span: int,
    is_rotated: bool,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """What is gathered, and the weights for the backward pass, empty unless it keeps them."""
    call = _Call(vectors_btn, past_keys, past_values, heads, span, is_rotated)
    batch, n_time, channels = vectors_btn.shape
    mixed_btf = vectors_btn.new_empty(batch, n_time, channels // 3)
    kept = vectors_btn.new_empty(call.n_kept() if keeps else 0, dtype=call.dtype)
    call.given.mixed, call.given.kept = mixed_btf.data_ptr(), kept.data_ptr() if keeps else None
    call.run("forward")
    return mixed_btf, kept


@_forward.register_fake
def _forward_shapes(vectors_btn: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    past_keys, _, heads, span, _, keeps = rest
    batch, n_time, channels = vectors_btn.shape
    given = _given(vectors_btn.shape, 0 if past_keys is None else past_keys.shape[1], heads, span, vectors_btn.dtype)
    dtype = torch.promote_types(vectors_btn.dtype, torch.float32)
    kept = vectors_btn.new_empty(_n_kept(given) if keeps else 0, dtype=dtype)
    return vectors_btn.new_empty(batch, n_time, channels // 3), kept


@torch.library.custom_op("meristem::windowed_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    vectors_btn: Tensor,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    kept: Tensor,
    sent_btf: Tensor,
    heads: int,
    span: int,
    is_rotated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the first three inputs; empty for what is not there."""
    call, sent_btf = _Call(vectors_btn, past_keys, past_values, heads, span, is_rotated), sent_btf.contiguous()
    made: tuple[Tensor, ...] = _backward_shapes(vectors_btn, past_keys, past_values)
    given = call.given
    given.kept, given.sent, given.d_vectors = (x.data_ptr() for x in (kept, sent_btf, made[0]))
    if past_keys is not None:
        given.d_past_keys, given.d_past_values = (x.data_ptr() for x in made[1:])
    call.run("backward")
    return made[0], made[1], made[2]


@_backward.register_fake
def _backward_shapes(
    vectors_btn: Tensor, past_keys: Tensor | None, past_values: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return vectors_btn.new_empty(0 if x is None else x.shape)

    return like(vectors_btn), like(past_keys), like(past_values)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    vectors_btn, past_keys, past_values, *settings, _ = inputs
    ctx.save_for_backward(vectors_btn, past_keys, past_values, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros as large as the weights would be made
    ctx.settings = settings


def _send_back(ctx: Any, sent_btf: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(*ctx.saved_tensors, sent_btf, *ctx.settings)
    return *(None if d.numel() == 0 else d for d in found), None, None, None, None


_forward.register_autograd(_send_back, setup_context=_keep)


class _Call:
    """A call of the core, with the tensors that it reads."""

    def __init__(
        self,
        vectors_btn: Tensor,
        past_keys: Tensor | None,
        past_values: Tensor | None,
        heads: int,
        span: int,
        is_rotated: bool,
    ) -> None:
        n_past = 0 if past_keys is None else past_keys.shape[1]
        self.dtype = torch.promote_types(vectors_btn.dtype, torch.float32)
        self.given = _given(vectors_btn.shape, n_past, heads, span, vectors_btn.dtype)
        inputs = vectors_btn, past_keys, past_values
        tables = _angles(n_past + self.given.time, self.given.width, self.dtype) if is_rotated else (None, None)
        self.inputs = [None if x is None else x.contiguous() for x in (*inputs, *tables)]
        for name, x in zip(("vectors", "past_keys", "past_values", "cosine", "sine"), self.inputs, strict=True):
            setattr(self.given, name, None if x is None else x.data_ptr())

    def n_kept(self) -> int:
        return _n_kept(self.given)

    def run(self, what: str) -> None:
        given = self.given
        n_products = given.rows * given.heads * given.time * min(given.span, given.past + given.time) * given.width
        most = min(torch.get_num_threads(), given.rows * given.heads)
        given.threads = max(1, min(most, int(n_products / WORTH_A_THREAD)))
        each_bytes = counting("window_scratch")(ctypes.byref(given), what == "backward")
        scratch = torch.empty(each_bytes * given.threads, dtype=torch.uint8)
        given.scratch, given.n_scratch_bytes, given.parallel = scratch.data_ptr(), scratch.numel(), torchs_threads()
        fault = function(f"window_{what}")(ctypes.byref(given))
        if fault:
            raise RuntimeError(
                f"the native core refused attention with code {fault}: memory.kernels.select let it through"
            )


def _given(shape: torch.Size, n_past: int, heads: int, span: int, dtype: torch.dtype) -> Window:
    rows, n_time, channels = shape
    return Window(rows, n_time, n_past, heads, channels // (3 * heads), span, 1, NUMBERS[dtype])


def _n_kept(given: Window) -> int:
    return int(given.rows * given.heads * counting("window_kept")(ctypes.byref(given)))


@lru_cache(maxsize=8)
def _angles(n: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, ``(n, width / 2)``, of the angle position * base^(-2 j / width)."""
    exponent_k = torch.arange(0, width, 2, dtype=dtype) / width
    angle_nk = torch.arange(n, dtype=dtype)[:, None] * ROTATION_BASE**-exponent_k
    return angle_nk.cos(), angle_nk.sin()
