"""Whether the memories of a run go through the native core: measured once, when the run begins, and kept by it."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from meristem.checkpoint.store import Checkpoint
from meristem.memory import Gates
from meristem.memory.forms import run_trusted
from meristem.memory.kernels.fused_form import FORMS
from meristem.memory.kernels.select import force_reference, native_refusals, plain_layers
from meristem.memory.rule import Rule
from meristem.nn.neural_memory import NeuralMemory
from meristem.runs.config import Config

N_ROUNDS: Final = 3
LEAST_GAIN: Final = 0.8
"""From which on the core is taken. What is measured wavers, and two runs from one seed are to choose alike: tensor code
is taken only where it is faster beyond doubt."""

MOST_ROWS, MOST_TIME, MOST_HEADS, MOST_WIDTH = 4, 256, 4, 256
"""Of what is measured: enough to see which is faster, a tenth of a second."""


@dataclass(frozen=True)
class Backend:
    """What the memories of a run are computed by, and why.

    name: the native core, or tensor code; ``auto`` where there was nothing to choose, and each call decides by itself.
    gain: how many times faster the core was, where that was measured.
    layers: whether what stands around the memories goes through the core where they do: norms, SwiGLU, cross entropy
    and kin. False in a run that began before it could.
    """

    name: Literal["native", "reference", "auto"]
    why: str
    gain: float | None = None
    layers: bool = True

    def entered(self) -> AbstractContextManager[None]:
        """Where the run goes on: every form inside is run as was chosen."""
        if self.name == "reference":
            return force_reference()
        return nullcontext() if self.layers else plain_layers()

    def to_json(self) -> dict[str, Any]:
        """For events and the report of a plan."""
        return asdict(self)


def choose_backend(model: nn.Module, config: Config, device: torch.device, checkpoint: Checkpoint | None) -> Backend:
    """The faster of the native core and tensor code at the sizes of the run, or what the run began with.

    A run that goes on keeps its choice, or its steps would not be those that it would have made; without the core it
    goes on by tensor code, as does one from before there was a core. Nothing is measured where no memory would go
    through the core, as on another device.
    """
    module = next((m for m in model.modules() if isinstance(m, NeuralMemory) and _goes_through(m)), None)
    saved = checkpoint.value("device") if checkpoint and checkpoint.has("device") else None
    layers = saved is None or saved.get("layers", False)
    if module is None or device.type != "cpu":
        why = f"the device is {device.type}" if module else "no memory of this model would go through it"
        return Backend("auto", why, layers=layers)
    sizes = _sizes(module, config)
    reasons = native_refusals(torch.empty(sizes.keys), torch.empty(sizes.values))
    if reasons:
        return Backend("reference", "; ".join(reasons))
    name = None if saved is None else saved.get("memory", "reference")
    if name in ("native", "reference"):
        return Backend(name, "the run began so", layers=layers)
    gain = measured_gain(module.rule.without_features(), sizes, module.chunk)
    why = f"the native core ran at {gain:.1f} times the speed of tensor code"
    return Backend("native" if gain >= LEAST_GAIN else "reference", why, round(gain, 2))


def _goes_through(module: NeuralMemory) -> bool:
    return module.form in FORMS and module.rule.is_linear


class _Sizes(NamedTuple):
    """The shapes of keys and values."""

    keys: tuple[int, int, int, int]
    values: tuple[int, int, int, int]


def _sizes(module: NeuralMemory, config: Config) -> _Sizes:
    """As the memory will have them in a step, or a part of that."""
    data, heads, width = config.data, module.heads * module.channels, module.qkv.in_features // module.heads
    shape = min(data.batch_size, MOST_ROWS), min(data.seq_len, MOST_TIME), min(heads, MOST_HEADS)
    widths = (min(each, MOST_WIDTH) for each in (module.rule.features.width(width), width // module.channels))
    keys, values = ((*shape, each) for each in widths)
    return _Sizes(keys, values)


_gains: Final[dict[tuple[object, ...], float]] = {}


def measured_gain(rule: Rule, sizes: _Sizes, chunk: int) -> float:
    """Seconds of the processor of tensor code over those of the core, forward and backward; the best of ``N_ROUNDS`` of
    each, interleaved, so that other programs do not tell. Measured once for a process, so that its runs, and the plan
    before them, choose alike."""
    parts = rule.structure.kind, rule.bias.name, rule.update.name, rule.probe, rule.reads
    place = *parts, sizes, chunk, torch.get_num_threads()
    if place not in _gains:
        _gains[place] = _measure(rule, sizes, chunk)
    return _gains[place]


def _measure(rule: Rule, sizes: _Sizes, chunk: int) -> float:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys_bthk, values_bthv = functional.normalize(draw(*sizes.keys), dim=-1), draw(*sizes.values)
    retain_bth, write_bth, momentum_bth = (draw(*sizes.keys[:3]).sigmoid() for _ in range(3))
    gates = Gates(retain_bth, 0.1 * write_bth, momentum_bth if rule.update.has_momentum else None)
    batch, _, heads, key_width = sizes.keys
    memory = rule.init(batch, heads, key_width, sizes.values[-1])
    leaves = [x.requires_grad_() for x in (keys_bthk, values_bthv, *vars(gates).values()) if x is not None]

    def step() -> None:
        vectors = keys_bthk, values_bthv, keys_bthk
        read_bthv, _ = run_trusted(rule, memory, vectors, gates, form="exact_chunk", chunk=chunk)
        torch.autograd.grad(read_bthv.sum(), leaves)

    best_s = {"native": math.inf, "reference": math.inf}
    for _ in range(N_ROUNDS):
        for name in best_s:
            with force_reference() if name == "reference" else nullcontext():
                began_s = time.process_time()
                step()
                best_s[name] = min(best_s[name], time.process_time() - began_s)
    return best_s["reference"] / best_s["native"]
