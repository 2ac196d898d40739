"""Floating-point operations of one dispatched operation, counted from shapes: two per multiply-add.

Torch's own registry is the base. It gives nothing for attention on the CPU and for triangular solves, and counts the
weight gradient of a grouped convolution ``groups`` times; those formulas are ours. A causal mask is not discounted.
Elementwise work, reductions, copies and lookups count zero, as everywhere in the literature.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from meristem.device.resolve import Device
from meristem.memory.kernels.chunk_operation import BACKWARD, FORWARD
from meristem.native import layers as _layers  # noqa: F401, they register operations
from meristem.native import window as _window_of_keys  # noqa: F401
from meristem.native.operations import PROBES

aten, core = torch.ops.aten, torch.ops.meristem

Formula = Callable[..., int]

# Beginnings of the names of operations that are neither elementwise nor reductions by their tag, and still hold no
# matrix product: they make, move, look up, sort, accumulate or normalise, or are optimizer steps over lists of tensors.
ZERO = (
    *("empty", "new_", "zeros", "ones", "full", "eye", "arange", "linspace", "scalar_tensor", "_efficientzerotensor"),
    *("rand", "normal", "uniform", "bernoulli", "exponential", "multinomial", "native_dropout"),
    *("fill", "zero_", "copy", "_to_copy", "cat", "stack", "repeat", "roll", "flip", "constant_pad", "tril", "triu"),
    *("index", "masked_", "gather", "scatter", "select", "slice", "split", "unsafe_split", "_unsafe_view"),
    *("embedding", "unfold_backward", "squeeze", "unsqueeze", "transpose", "t_", "diag", "sort", "topk", "arg"),
    "softplus",
    *(
        "max",
        "min",
        "cum",
        "logcumsumexp",
        "equal",
        "is_",
        "_local_scalar_dense",
        "_softmax",
        "_log_softmax",
        "log_sigmoid",
        "floor_divide",
        "promote_types",
    ),
    *("nll_loss", "native_layer_norm", "native_group_norm", "_fused_rms_norm", "var", "std"),
    *("_foreach_", "_fused_adam", "_fused_sgd"),
)


def flops_of(operation: OpOverload, args: Sequence[object], kwargs: dict[str, object], out: object) -> int | None:
    """Operations that this call carries out; None when no formula is known and zero is not expected either."""
    packet = operation._overloadpacket
    formula = FORMULAS.get(packet)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    return 0 if is_free(operation) else None


def counted(run: Callable[[], object]) -> int:
    """Operations that ``run`` carries out on tensors; of what no formula is known, none."""
    with _Sum() as found:
        run()
    return found.n


@torch.no_grad()
def forward_flops(model: nn.Module, device: Device, n_time: int) -> float:
    """Operations of a forward pass for each token of a sequence of ``n_time``; the model is left as it is."""
    (tokens_bt,) = device.move(torch.zeros(1, n_time, dtype=torch.long))

    def read() -> None:
        with device.autocast(), torch.compiler.set_stance("force_eager"):
            model(tokens_bt, None)

    return counted(read) / n_time


class _Sum(TorchDispatchMode):
    """Adds up what is called while it is entered."""

    n = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        self.n += flops_of(func, args, kwargs or {}, out) or 0
        return out


def is_free(operation: OpOverload) -> bool:
    """Whether the operation holds no matrix product by its nature."""
    if operation.is_view or torch.Tag.pointwise in operation.tags or torch.Tag.reduction in operation.tags:
        return True
    if operation.namespace != "aten":
        return operation.namespace in ("prim", "profiler")
    return operation._schema.name.removeprefix("aten::").startswith(ZERO)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object) -> int:
    """2 b h t s (k + v): scores, then the weighted sum."""
    b, h, t, k = query.shape
    s, v = value.shape[-2:]
    return 2 * b * h * t * s * (k + v)


def _attention_backward(
    upstream: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
) -> int:
    """Five products where the forward has two: the scores are formed again, then gradients of v, weights, q and k."""
    b, h, t, k = query.shape
    s, v = value.shape[-2:]
    return 2 * b * h * t * s * (3 * k + 2 * v)


def _triangular_solve(
    triangle: torch.Tensor, right: torch.Tensor, *args: object, out_val: torch.Tensor, **kwargs: object
) -> int:
    """n (n - 1) / 2 multiply-adds and n divisions per right-hand side: n^2 operations. Batch axes may be broadcast."""
    return triangle.shape[-1] * out_val.numel()


def _convolution_backward(
    upstream: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *geometry: Any,
    out_val: tuple[torch.Tensor | None, ...],
    **kwargs: object,
) -> int:
    """As much as the forward for each of the two gradients that are needed; that of the bias is a sum."""
    is_transposed = geometry[4]
    positions = (hidden if is_transposed else upstream).shape[2:]
    forward = 2 * hidden.shape[0] * prod(positions) * weight.numel()
    return forward * sum(gradient is not None for gradient in out_val[:2])


def _matrix_vector(matrix: torch.Tensor, vector: torch.Tensor, *args: object, **kwargs: object) -> int:
    return 2 * matrix.numel()


def _added_matrix_vector(start: torch.Tensor, matrix: torch.Tensor, *args: object, **kwargs: object) -> int:
    return 2 * matrix.numel()


def _outer(start: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *args: object, **kwargs: object) -> int:
    return 2 * left.numel() * right.numel()


def _chunk_form(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **kwargs: object) -> int:
    """The products of ``native/form.hpp``: per token with memory and momentum, and triangles of every chunk."""
    *_, moving, chunk, probe, _, _ = rest
    per_level, triangles = _parts_of_form(query, values.shape[-1], chunk)
    levels, is_solved = 1 if moving is None else 2, probe == PROBES["token"]
    n_levels = 2 * levels + _probed(levels, probe)
    return per_level * n_levels + triangles * (1 + is_solved) * (query.shape[-1] + values.shape[-1])


def _chunk_form_backward(query: torch.Tensor, *rest: Any, **kwargs: object) -> int:
    """Twice the products of the forward pass: those of keys with keys and queries are kept."""
    *_, d_read, _, d_last_moving, chunk, probe, _ = rest
    per_level, triangles = _parts_of_form(query, d_read.shape[-1], chunk)
    levels, is_solved = 1 if d_last_moving is None else 2, probe == PROBES["token"]
    n_levels = 4 * levels + 2 * _probed(levels, probe)
    return per_level * n_levels + triangles * 2 * (1 + is_solved) * (query.shape[-1] + d_read.shape[-1])


def _parts_of_form(query: torch.Tensor, value_width: int, chunk: int) -> tuple[int, int]:
    """Operations of one product of all tokens with a memory, and of one triangle of every chunk for each channel."""
    b, t, h, k = query.shape
    whole, rest = divmod(t, chunk)
    return 2 * b * t * h * k * value_width, b * h * (whole * chunk**2 + rest**2)


def _probed(levels: int, probe: int) -> int:
    """With how many of memory and momentum keys are multiplied for the residuals."""
    return {PROBES["never"]: 0, PROBES["start"]: 1, PROBES["token"]: levels}[probe]


def _memory_vectors(
    hidden: torch.Tensor, tail: torch.Tensor, weight: torch.Tensor, *rest: Any, **kwargs: object
) -> int:
    """A multiply-add for each tap of each channel."""
    return 2 * hidden.numel() * weight.shape[1]


def _memory_vectors_backward(
    hidden: torch.Tensor, tail: torch.Tensor, weight: torch.Tensor, *rest: Any, **kwargs: object
) -> int:
    """The inputs are filtered once more; then the gradients of inputs and weights."""
    return 6 * hidden.numel() * weight.shape[1]


def _window(vectors: torch.Tensor, past: torch.Tensor | None, *rest: Any, **kwargs: object) -> int:
    """Scores and what they gather, of the keys that each query sees: the core leaves out what it does not."""
    return 4 * _seen(vectors, past, rest[2]) * (vectors.shape[-1] // 3)


def _window_backward(vectors: torch.Tensor, past: torch.Tensor | None, *rest: Any, **kwargs: object) -> int:
    """Twice as much: the weights are kept."""
    return 8 * _seen(vectors, past, rest[4]) * (vectors.shape[-1] // 3)


def _seen(vectors: torch.Tensor, past: torch.Tensor | None, span: int) -> int:
    """Keys that all queries of all rows see together."""
    n_past = 0 if past is None else past.shape[1]
    return len(vectors) * sum(min(span, n_past + t + 1) for t in range(vectors.shape[1]))


def _none(*args: object, **kwargs: object) -> int:
    """Of what works on each number alone."""
    return 0


FORMULAS: dict[OpOverloadPacket, Formula] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.linalg_solve_triangular: _triangular_solve,
    aten.convolution_backward: _convolution_backward,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten.mv: _matrix_vector,
    aten.dot: _matrix_vector,
    aten.vdot: _matrix_vector,
    aten.addmv: _added_matrix_vector,
    aten.addmv_: _added_matrix_vector,
    aten.addr: _outer,
    aten.addr_: _outer,
    core.chunk_form: _chunk_form,
    core.chunk_form_backward: _chunk_form_backward,
    core.windowed_attention: _window,
    core.windowed_attention_backward: _window_backward,
    core.memory_vectors: _memory_vectors,
    core.memory_vectors_backward: _memory_vectors_backward,
    **dict.fromkeys((core.norm, core.norm_backward, core.swiglu, core.swiglu_backward), _none),
    **dict.fromkeys((core.cross_entropy, core.cross_entropy_backward), _none),
    FORWARD: _chunk_form,
    BACKWARD: _chunk_form_backward,
}
