"""From the wish in the configuration to a device and dtypes that were tried before any weight is loaded."""

import contextlib
import functools
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from meristem.device.allocator import keep_freed_memory
from meristem.device.config import DeviceConfig
from meristem.device.limits import n_cpus
from meristem.device.tf32 import allow_tf32
from meristem.errors import CapabilityError
from meristem.events import Emit, Event

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What a processor calls the units that multiply bf16 matrices: x86, then ARM.
BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
_WORTHWHILE = 1.2
_WIDTH = 64


@dataclass(frozen=True)
class Device:
    """A device that works, with the dtypes of parameters and of matrix products on it."""

    device: torch.device
    param_dtype: torch.dtype
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products inside the block run in the compute dtype."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def move(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same tensors on this device."""
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)


def resolve(config: DeviceConfig, emit: Emit) -> Device:
    """The device and dtypes of ``config``, probed. The choice is the event ``capability.chosen``."""
    # Torch counts the processors of the machine; more threads than a quota allows wait for each other, stopped in turn.
    torch.set_num_threads(config.threads or min(torch.get_num_threads(), n_cpus()))
    name = available()[0] if config.device == "auto" else _present(config.device)
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a call that names no GPU would else start the first one
        allow_tf32(config.tf32)
    parameters = DTYPES[config.param_dtype]
    if config.dtype == "auto":
        compute, why = _best_compute(device, parameters)
    else:
        compute, why = DTYPES[config.dtype], "configured"
    probe(device, parameters, compute)
    keeps_memory = device.type == "cpu" and keep_freed_memory()
    chosen = {"device": name, "param_dtype": NAMES[parameters], "dtype": NAMES[compute], "why": why}
    asked = {"device": config.device, "param_dtype": config.param_dtype, "dtype": config.dtype}
    emit(
        Event(
            "capability.chosen",
            {**chosen, "asked": asked, "threads": torch.get_num_threads(), "keeps_memory": keeps_memory},
        )
    )
    return Device(device, parameters, compute)


def own_gpu(config: DeviceConfig, local_rank: int = 0) -> int | None:
    """The number of the one GPU that a process uses, of all on its machine; None where it uses none.

    local_rank: which of the processes on its machine it is.
    """
    kind, _, index = config.device.partition(":")
    if kind not in ("auto", "cuda") or not torch.cuda.is_available():
        return None
    return int(index) if index else local_rank


def available() -> list[str]:
    """The devices of this machine, the best first."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def _present(name: str) -> str:
    found = available()
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in found:
        raise CapabilityError(
            f"there is no device '{name}' here; found {', '.join(found)}. Set device.device to one of these or auto.",
            device=name,
            reason="absent",
            alternatives=found,
        )
    return wanted


def _best_compute(device: torch.device, parameters: torch.dtype) -> tuple[torch.dtype, str]:
    """The dtype of matrix products that ``auto`` means here, and why."""
    if parameters == torch.bfloat16:
        return torch.bfloat16, "parameters are stored in bf16"
    if device.type == "mps":
        return torch.float32, "bf16 is not chosen unasked on mps"
    if device.type == "cpu":
        units = [unit for unit in BF16_UNITS if torch.cpu.get_capabilities().get(unit)]
        if not units:
            return torch.float32, "the processor has no units for bf16 matrices"
        gain = bf16_gain()
        if gain < _WORTHWHILE:
            return torch.float32, f"bf16 products ran at {gain:.1f} times the speed of fp32 in spite of {units[0]}"
        why = f"bf16 products ran at {gain:.1f} times the speed of fp32 ({units[0]})"
    else:
        why = "bf16 is the rule on cuda"
    best = torch.bfloat16
    if device.type == "cuda" and not has_bf16(device):
        best, why = torch.float16, "the card has no units for bf16; fp16 with a loss scale"
    try:
        probe(device, parameters, best)
    except CapabilityError as error:
        return torch.float32, f"{NAMES[best]} failed its probe: {error.fields['reason']}"
    return best, why


def has_bf16(device: torch.device) -> bool:
    """Whether a CUDA card multiplies bf16 itself. An older one imitates it, slower than fp32."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


@functools.cache
def bf16_gain() -> float:
    """How many times faster than in fp32 one thread multiplies bf16 matrices on this CPU; measured once, 20 ms.

    The best of several repetitions is taken, and fp32 and bf16 are interleaved. The clock is that of the thread: beside
    other programs the time of the day gave factors from 0.2 to 18 for one of 2.1, and runs of one sweep then differed.
    """
    factor = torch.linspace(-1, 1, 512 * 512).reshape(512, 512)
    best_s = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(7):
            for dtype in best_s:
                operand = factor.to(dtype)
                start_s = time.thread_time()
                operand @ operand
                best_s[dtype] = min(best_s[dtype], time.thread_time() - start_s)
    finally:
        torch.set_num_threads(n_threads)
    return best_s[torch.float32] / best_s[torch.bfloat16]


def probe(device: torch.device, parameters: torch.dtype, compute: torch.dtype) -> None:
    """Run on ``device`` what training will run: a product with its gradient and an attention, in these dtypes."""
    if device.type == "cpu" and compute == torch.float16:
        raise _incapable(device, compute, "fp16 training is not supported on a CPU")
    if device.type == "cuda" and compute == torch.bfloat16 and not has_bf16(device):
        raise _incapable(device, compute, "the card has no units for it")
    candidate = Device(device, parameters, compute)
    try:
        found = _try_product(candidate) | _try_attention(candidate)
        if compute == torch.float16:
            found |= _try_scaler(device)
    except RuntimeError as cause:
        raise _incapable(device, compute, str(cause).splitlines()[0]) from cause
    for what, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise _incapable(device, compute, f"{what} is not finite")
    if found["the product"].dtype != compute:
        raise _incapable(device, compute, f"the product came out in {found['the product'].dtype}")


def _try_product(candidate: Device) -> dict[str, Tensor]:
    operand = torch.linspace(-1, 1, _WIDTH * _WIDTH, device=candidate.device).reshape(_WIDTH, _WIDTH)
    weight = operand.to(candidate.param_dtype).requires_grad_()
    with candidate.autocast():
        product = torch.matmul(operand.to(candidate.param_dtype), weight)
    (gradient,) = torch.autograd.grad(product.float().square().mean(), weight)
    return {"the product": product.detach(), "the gradient of the product": gradient}


def _try_attention(candidate: Device) -> dict[str, Tensor]:
    tokens = torch.linspace(-1, 1, 2 * _WIDTH * 16, device=candidate.device).reshape(1, 2, _WIDTH, 16)
    query = tokens.to(candidate.dtype).requires_grad_()
    read = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    (gradient,) = torch.autograd.grad(read.float().square().mean(), query)
    return {"the attention": read.detach(), "the gradient of the attention": gradient}


def _try_scaler(device: torch.device) -> dict[str, Tensor]:
    """fp16 gradients need a scale; one step with it must work."""
    weight = torch.nn.Parameter(torch.ones(_WIDTH, device=device))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(weight.square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    return {"the scaled step": weight.detach()}


def _incapable(device: torch.device, compute: torch.dtype, reason: str) -> CapabilityError:
    names = ("fp32", "bf16") if device.type == "cpu" else DTYPES
    alternatives = [f"device.dtype={name}" for name in names if DTYPES[name] != compute]
    alternatives += [f"device.device={name}" for name in available() if torch.device(name) != device]
    return CapabilityError(
        f"{NAMES[compute]} does not work on {device}: {reason}. Try {' or '.join(alternatives)}.",
        device=str(device),
        dtype=NAMES[compute],
        reason=reason,
        alternatives=alternatives,
    )
