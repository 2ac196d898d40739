"""A wider residual stream (growth.md 11.2)."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from meristem.growth.attach import slots_in
from meristem.growth.plan import Applied, Carry, Plan, draft
from meristem.growth.surgery.host import refused, require_lm, resize
from meristem.models.init import seeded
from meristem.models.topology import Change, changes, record
from meristem.nn.attention import Attention
from meristem.nn.combine import Additive
from meristem.nn.mag import MemoryAsGate
from meristem.nn.mal import MemoryAsLayer
from meristem.nn.memory import MemoryLayer
from meristem.nn.mlp import Feedforward, SwiGLU
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.norm import RMSNorm
from meristem.optim.surgery import Places, appended

WIDEN: Final = "widen_residual"


class Wide(NamedTuple):
    """A parameter with an axis along the residual stream. std: of its fresh entries, 0 for zeros."""

    name: str
    axis: int
    std: float = 0.0


def plan_widen_residual(model: nn.Module, width: int, *, random_seed: int = 0) -> Plan:
    """A residual stream of ``width`` channels; the model computes what it did, but for rounding.

    Fresh channels are zero: whatever writes to the stream gets rows of zeros, the embedding columns. What reads it gets
    columns that are drawn, for of two zeros neither would learn. A norm over more channels sees a smaller mean, so that
    ``gain' = gain sqrt(d / d')`` and ``eps' = eps d / d'``, since then
    ``sqrt(sum x^2 / d' + eps') = sqrt(d / d') sqrt(sum x^2 / d + eps)``. Heads of attention and memories keep their
    number and width.

    Raises CapabilityError where a block has something for which there is no such rule, and seeds that have a width.
    """
    lm = require_lm(model, WIDEN)
    old = lm.embedding.weight.shape[1]
    if width <= old:
        raise refused(WIDEN, f"it is {old} wide, and {width} is no more")
    full = [name for name, slot in slots_in(lm).items() if slot.parts]
    if full:
        raise refused(WIDEN, f"the seed in {full[0]} has the width of its slot; fuse or remove it")
    fields = {"width": width, "random_seed": random_seed}
    share = width / old
    flops = sum((share - 1) * 2 * each.numel() for name, each in _along(lm))
    return draft(
        model,
        WIDEN,
        fields,
        lambda m: _widen(m, fields),
        preserves="rounding",
        flops_per_token=flops,
        writes=frozenset(),
    )


def _along(lm: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices that grow with the stream."""
    for name, module, wide in _wide_parameters(lm):
        parameter = module.get_parameter(wide.name)
        if parameter.dim() == 2 and not isinstance(module, nn.Embedding):
            yield name, parameter


def _widen(model: nn.Module, fields: Mapping[str, Any]) -> Applied:
    lm, width = require_lm(model, WIDEN), fields["width"]
    carries = {}
    with seeded(fields["random_seed"], "growth.widen", width):
        for name, module, wide in [*_wide_parameters(lm)]:
            carries[name] = Carry(name, _widen_parameter(module, wide, width))
    for name, slot in slots_in(lm).items():
        host = lm.get_submodule(name)
        added = host.out_features if isinstance(host, nn.Linear) else width
        slot.widths = (host.in_features if isinstance(host, nn.Linear) and slot.reads == "input" else added, added)
    return Applied(record(lm, Change(WIDEN, dict(fields))), carries)


def widen_block(block: nn.Module, width: int) -> None:
    """Widen a block that stands by itself, as blocks of a wide model are."""
    for _, module, wide in [*_in(block, "")]:
        _widen_parameter(module, wide, width)


def _widen_parameter(module: nn.Module, wide: Wide, width: int) -> Places:
    """Resize one parameter; how its entries came out of the old ones."""
    old = module.get_parameter(wide.name)
    n_old = old.shape[wide.axis]
    places: Places = tuple(appended(n_old, width) if axis == wide.axis else None for axis in range(old.dim()))
    if isinstance(module, RMSNorm):
        share = n_old / width
        resize(module, wide.name, places, fill=1.0)
        with torch.no_grad():
            module.gain_d.mul_(math.sqrt(share))
        module.eps *= share
    else:
        resize(module, wide.name, places, std=wide.std / math.sqrt(width))
    return places


def _wide_parameters(lm: Any) -> Iterator[tuple[str, nn.Module, Wide]]:
    """Every parameter along the stream, with its name in the model and the module that it is a parameter of."""
    yield "embedding.weight", lm.embedding, Wide("weight", 1)
    for index, block in enumerate(lm.blocks):
        yield from _in(block, f"blocks.{index}.")
    yield "norm.gain_d", lm.norm, Wide("gain_d", 0)
    if lm.head is not None:
        yield "head.weight", lm.head, Wide("weight", 1, 1.0)


def _in(block: Any, prefix: str) -> Iterator[tuple[str, nn.Module, Wide]]:
    parts = {"mixer_norm": block.mixer_norm, "mixer": block.mixer, "mlp_norm": block.mlp_norm, "mlp": block.mlp}
    for part, module in parts.items():
        for wide in _of(module, f"{prefix}{part}") if module is not None else ():
            path, _, name = wide.name.rpartition(".")
            yield f"{prefix}{part}.{wide.name}", module.get_submodule(path), wide._replace(name=name)


def _of(module: Any, name: str) -> list[Wide]:
    """The parameters of a part of a block along the residual stream. Raises CapabilityError where that is not known."""
    if isinstance(module, RMSNorm):
        return [Wide("gain_d", 0)]
    if isinstance(module, SwiGLU):
        return [Wide("gate_up.weight", 1, 1.0), Wide("out.weight", 0)]
    if isinstance(module, Feedforward):
        return [Wide("up.weight", 1, 1.0), Wide("out.weight", 0), Wide("out.bias", 0)]
    if isinstance(module, Attention):
        persistent = [] if module.persistent_gd is None else [Wide("persistent_gd", 1)]
        biases = [] if module.out.bias is None else [Wide("out.bias", 0)]
        return [Wide("qkv.weight", 1, 1.0), Wide("out.weight", 0), *biases, *persistent]
    if isinstance(module, NeuralMemory):
        gates = "gates.weight_hd" if module.gates.down_rd is None else "gates.down_rd"
        codes = [] if module.gates.code is None else [Wide("gates.code.weight", 1, 1.0)]
        # Gates begin as they are: what a memory keeps is not to depend on channels that say nothing yet.
        return [Wide("qkv.weight", 1, 1.0), Wide(gates, 1), *codes]
    if isinstance(module, MemoryLayer):
        return [*_under("recall", module), Wide("gate.weight", 1, 1.0), Wide("out.weight", 0)]
    if isinstance(module, MemoryAsLayer):
        return [*_under("memory", module), *_under("attention", module)]
    if isinstance(module, MemoryAsGate):
        gate = [Wide("combine.gate.weight", 1, 1.0)] if isinstance(module.combine, Additive) else []
        return [*_under("attention", module), *_under("recall", module), *gate]
    raise refused(WIDEN, f"{name} is a {type(module).__name__}, and it is not known what of it lies along the stream")


def _under(child: str, module: nn.Module) -> list[Wide]:
    found = _of(module.get_submodule(child), child)
    return [wide._replace(name=f"{child}.{wide.name}") for wide in found]


changes.register(WIDEN, lambda model, fields: _widen(model, fields).model)
