"""A memory that is written by one call of the native core: convolution, gates and form together (``native.write``)."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from meristem.memory.kernels.select import fuses
from meristem.memory.region import curvature
from meristem.memory.rule import Rule
from meristem.memory.state import State, full_precision
from meristem.memory.update import momentum_name
from meristem.native import write as native
from meristem.native.layers import MOST_TAPS, MOST_WIDTH
from meristem.nn.conv import CausalConv
from meristem.nn.gates import GateMap
from meristem.shapes import Hidden, MatrixMemory, Mixed

Tail = Float[Tensor, "b s d"]


@runtime_checkable
class Writable(Protocol):
    """What is read here of a ``NeuralMemory``."""

    heads: int
    is_plain: bool
    form: str
    chunk: int
    qkv: nn.Linear
    conv: CausalConv
    gates: GateMap

    @property
    def rule(self) -> Rule: ...


def can_write(recall: Writable, hidden_btd: Hidden, state: State) -> bool:
    """Several tokens that the core takes, and a rule of one matrix whose rates are the gates themselves."""
    rule, width = recall.rule, recall.qkv.in_features // recall.heads
    if not recall.is_plain or recall.form != "exact_chunk" or rule.update.name not in ("plain", "momentum"):
        return False
    if hidden_btd.shape[1] == 1 or not fuses(hidden_btd, width=width):
        return False
    if not (is_bare(recall.gates, GateMap) and is_bare(recall.conv, CausalConv)):
        return False
    weight, memory = rule.structure.weights[0], state["memory"]
    if not memory.keys() <= {weight, momentum_name(weight)}:  # an unfinished chunk of another form
        return False
    wide = torch.promote_types(hidden_btd.dtype, torch.float32)
    is_one_kind = all(x.dtype == wide and x.is_cpu for x in (*memory.values(), recall.gates.weight_hd))
    return is_one_kind and width <= MOST_WIDTH and recall.conv.weight_dc.shape[1] <= MOST_TAPS


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module does what its class does and no more: what is not called would not be heard by its hooks."""
    is_heard = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not is_heard


def write(recall: Writable, hidden_btd: Hidden, state: State) -> tuple[Mixed, State]:
    """What ``NeuralMemory`` does with a sequence, for one that ``can_write``."""
    mixed_btf = recall.qkv(hidden_btd)
    with full_precision(hidden_btd.device):
        logits_btf = recall.gates.logits(hidden_btd.to(recall.gates.weight_hd.dtype))
        inputs = inputs_of(recall, mixed_btf, logits_btf, state)
        read_btf, last_bhkv, moving_bhkv, tail_bsd = native.memory_write(inputs, rule_of(recall))
    return read_btf.to(mixed_btf.dtype), state_of(recall, last_bhkv, moving_bhkv, tail_bsd)


def state_of(recall: Writable, last_bhkv: MatrixMemory, moving_bhkv: MatrixMemory | None, tail_bsd: Tail) -> State:
    """The state of a reader, of what a write leaves."""
    name = recall.rule.structure.weights[0]
    momentum = {} if moving_bhkv is None else {momentum_name(name): moving_bhkv}
    return {"memory": {name: last_bhkv} | momentum, "conv": {"tail_bsd": tail_bsd}}


def inputs_of(recall: Writable, mixed_btd: Hidden, logits_btf: Mixed, state: State) -> native.Inputs:
    """What the core is given of a memory and of what was projected for it."""
    memory_bhkv, moving_bhkv, tail_bsd = memories_of(recall, state, mixed_btd.dtype)
    most_h = recall.gates.most_momentum()
    return native.Inputs(mixed_btd, tail_bsd, recall.conv.weight_dc, logits_btf, most_h, memory_bhkv, moving_bhkv)


def memories_of(recall: Writable, state: State, dtype: torch.dtype) -> tuple[MatrixMemory, MatrixMemory | None, Tail]:
    """Memory and momentum, where the rule has it, and what the convolution has read, in the dtype of what it reads."""
    name, memory = recall.rule.structure.weights[0], state["memory"]
    return memory[name], memory.get(momentum_name(name)), state["conv"]["tail_bsd"].to(dtype)


def rule_of(recall: Writable) -> native.Rule:
    """The numbers of a rule and its gates."""
    rule, gates = recall.rule, recall.gates
    return native.Rule(
        chunk=recall.chunk,
        slope=rule.slope or 0.0,
        is_warm=rule.probe == "warm",
        reads_before=rule.reads == "before",
        has_retain=rule.has_retain,
        has_retain_gate=rule.has_retain_gate,
        write_limit=gates.write_limit,
        curvature=curvature(rule) or 0.0,
    )
