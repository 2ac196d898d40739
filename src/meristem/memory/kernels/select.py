"""Which code runs the chunk form of a linear rule: plain tensor code, the native core, our Triton kernels, or those of
``fla-core``.

    reference   plain tensor code: any device, any width, any dtype
    native      ``native.operations``: the whole form in compiled code on a CPU, forward and backward; and what stands
                around it, ``native.layers``
    triton      ``chunk_operation``: the whole form on a CUDA device, forward and backward
    fla         ``fla_delta``: delta and gated delta as a whole; its products round to TF32

A kernel is taken where it can run, silently, for it means the same; ``force_reference`` disables all of them. Neither
``triton`` nor ``fla`` is imported before a tensor on a CUDA device, or TRITON_INTERPRET=1, needs it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Final, Literal

import torch
from torch import Tensor

from meristem.memory.kernels.chunk_operation import LONGEST, interprets
from meristem.memory.rule import Rule
from meristem.native.interface import NUMBERS, lanes
from meristem.native.library import core
from meristem.shapes import Keys, Values

Backend = Literal["reference", "native", "triton", "fla"]

WIDEST = 128
"""Keys that the Triton kernels take at most: wider memories do not fit in the registers of a program."""

DELTA = ("matrix", "squared", "decay", "plain")
"""Structure, bias, retention and update of delta and gated delta."""

_is_forced: ContextVar[bool] = ContextVar("force_reference", default=False)
_are_layers_plain: ContextVar[bool] = ContextVar("plain_layers", default=False)


@dataclass
class _Forced:
    """How many ``force_reference`` the process is inside of: what the compiler can check, which knows no contexts."""

    depth: int = 0


_forced: Final = _Forced()


@contextmanager
def force_reference() -> Iterator[None]:
    """Plain tensor code inside, whatever is installed; a backward pass runs as its forward pass did.

    What is compiled while any thread is inside is plain as well, and is compiled anew afterwards.
    """
    token = _is_forced.set(True)
    _forced.depth += 1
    try:
        yield
    finally:
        _forced.depth -= 1
        _is_forced.reset(token)


@contextmanager
def plain_layers() -> Iterator[None]:
    """Tensor code inside for what stands around the forms of memories (``fuses``), and for nothing else."""
    token = _are_layers_plain.set(True)
    try:
        yield
    finally:
        _are_layers_plain.reset(token)


def is_forced() -> bool:
    """Whether ``force_reference`` is in effect."""
    return _is_forced.get()


def choose_window(rule: Rule, keys_bthk: Keys, values_bthv: Values) -> Backend:
    """What runs a whole sequence: ``fla``, or ``reference`` for the form's own code."""
    return "reference" if _is_plain() or fla_refusals(rule, keys_bthk, values_bthv) else "fla"


def choose_form(keys_bthk: Keys, values_bthv: Values, frozen: int = 1) -> Literal["reference", "native", "triton"]:
    """What runs the chunk form of a linear rule. The compiler sees ``native`` and ``triton`` as one operation each.

    frozen: tokens of a chunk whose residuals are all taken at its start.
    """
    if _forced.depth > 0 if torch.compiler.is_compiling() else _is_forced.get():
        return "reference"
    if not native_refusals(keys_bthk, values_bthv):
        return "native"
    return "reference" if triton_refusals(keys_bthk, values_bthv, frozen) else "triton"


def fuses(*tensors: Tensor, width: int) -> bool:
    """Whether the native core runs what stands around the products of a training step on these tensors of one shape.

    width: of the rows that it works on, which are whole vectors of the core. The compiler fuses tensor code itself, and
    one token alone, outside training, takes less time than a call.
    """
    first = tensors[0]
    if torch.compiler.is_compiling() or _is_forced.get() or _are_layers_plain.get():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    is_worth = torch.is_grad_enabled() or (first.dim() > 2 and first.shape[1] > 1)
    if not is_worth or not first.is_cpu or first.dtype not in NUMBERS or first.numel() == 0:
        return False
    is_one_kind = all(each.dtype == first.dtype and each.is_cpu for each in tensors)
    return is_one_kind and not _why_no_core() and width % lanes(first.dtype) == 0


def native_refusals(keys_bthk: Keys, values_bthv: Values) -> list[str]:
    """Why the native core cannot run the form on these tensors; empty when it can."""
    reasons = {
        f"the device is {keys_bthk.device.type}": keys_bthk.device.type == "cpu",
        f"the memory is {keys_bthk.dtype}": keys_bthk.dtype in (torch.float32, torch.float64),
        "there is nothing to read": keys_bthk.numel() > 0 and values_bthv.numel() > 0,
    }
    return [reason for reason, is_met in reasons.items() if not is_met] + _why_no_core()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_no_core() -> list[str]:
    if interprets():
        return ["Triton's interpreter is on"]
    return [] if core().library is not None else [f"there is no native core: {core().said}"]


def triton_refusals(keys_bthk: Keys, values_bthv: Values, frozen: int = 1) -> list[str]:
    """Why the Triton kernels cannot run the form on these tensors; empty when they can. frozen: as for
    ``choose_form``."""
    device, is_interpreted, width = keys_bthk.device, interprets(), keys_bthk.shape[-1]
    dtypes = (torch.float32, torch.float64) if is_interpreted else (torch.float32,)
    reasons = {
        f"the device is {device.type}": device.type == "cuda" or (device.type == "cpu" and is_interpreted),
        "triton is not installed": _is_installed("triton"),
        f"the memory is {keys_bthk.dtype}": keys_bthk.dtype in dtypes,
        f"a key is {width} wide, the most is {WIDEST}": width <= WIDEST,
        f"a chunk has {frozen} tokens, the most is {LONGEST}": frozen <= LONGEST,
        "there is nothing to read": keys_bthk.numel() > 0 and values_bthv.numel() > 0,
    }
    return [reason for reason, is_met in reasons.items() if not is_met]


def fla_refusals(rule: Rule, keys_bthk: Keys, values_bthv: Values) -> list[str]:
    """Why the kernels of ``fla-core`` cannot run the rule on these tensors; empty when they can.

    Their products of float32 are TF32, a thousandth of relative error: taken only where torch's own may be.
    """
    parts = (rule.structure.kind, rule.bias.name, rule.retention.name, rule.update.name)
    reasons = {
        f"the device is {keys_bthk.device.type}": keys_bthk.device.type == "cuda",
        "fla-core is not installed": _is_installed("fla") and _is_installed("triton"),
        "the rule is neither delta nor gated delta": rule.is_linear and parts == DELTA,
        "the rule reads before it writes": rule.reads == "after",
        f"the memory is {keys_bthk.dtype}": keys_bthk.dtype == torch.float32,
        f"a key is {keys_bthk.shape[-1]} wide, the most is 256": keys_bthk.shape[-1] <= 256,
        "torch keeps products of float32 exact; torch.set_float32_matmul_precision('high') lets them be TF32": (
            torch.backends.cuda.matmul.fp32_precision == "tf32"
        ),
    }
    return [reason for reason, is_met in reasons.items() if not is_met]


def _is_plain() -> bool:
    """No kernel may run. The compiler is checked first: it cannot trace the other check, and fuses plain code well."""
    return torch.compiler.is_compiling() or is_forced()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_installed(package: str) -> bool:
    return _found(package)


@cache
def _found(package: str) -> bool:
    return find_spec(package) is not None
