"""A layer that reads and writes a memory: projections, gates and a rule."""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from meristem.errors import ConflictingKeys
from meristem.memory import Rule, named, run
from meristem.memory.value import Memory, State
from meristem.nn.conv import CausalConv
from meristem.nn.gates import GateMap
from meristem.nn.norm import RMSNorm
from meristem.nn.part import MemoryPart
from meristem.shapes import Hidden, Keys


class Initial(nn.Module):
    """The memory that a reader starts with: a learned value of every weight, the same for all rows of a batch.

    What the update carries beside the weights, such as momentum, starts at zero and is not learned.
    """

    def __init__(self, rule: Rule, heads: int, head_width: int) -> None:
        super().__init__()
        first = rule.init(1, heads, head_width, head_width)
        self.learned = nn.ParameterDict({name: nn.Parameter(first.pop(name)) for name in rule.structure.weights})
        self.no_decay = frozenset(f"learned.{name}" for name in self.learned)
        for name, carried in first.items():
            self.register_buffer(name, carried, persistent=False)
        self.carried = tuple(first)

    def forward(self, batch: int) -> Memory:
        value = dict(self.learned.items()) | {name: self.get_buffer(name) for name in self.carried}
        return {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in value.items()}


class Recall(nn.Module):
    """What a memory answers to each token, after that token was written into it (memory.md 5.1, up to the read).

    Queries, keys and values are linear in the hidden vector, mixed with the few tokens before by a short convolution,
    and passed through SiLU; queries and keys have unit length, without which the surprise grows with the width and
    training ends in NaN.

    State: the memory, float32 whatever the autocast, and the convolution's tail. A fresh memory is a learned parameter.
    """

    def __init__(self, width: int, part: MemoryPart) -> None:
        super().__init__()
        if width % part.head_width:
            raise ConflictingKeys(
                f"model.width {width} is not a multiple of memory.head_width {part.head_width}. "
                f"Set memory.head_width to a divisor of {width}."
            )
        self.rule = named(part.rule)
        self.form, self.chunk = part.form, part.chunk
        self.heads = width // part.head_width
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.conv = CausalConv(3 * width, part.conv)
        momentum = part.momentum if self.rule.update.has_momentum else None
        self.gates = GateMap(width, self.heads, half_life=part.half_life, write=part.write, momentum=momentum)
        self.initial = Initial(self.rule, self.heads, part.head_width)

    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        if state is None:
            state = {"memory": self.initial(hidden_btd.shape[0]), "conv": None}
        mixed_btd, tail = self.conv(self.qkv(hidden_btd), state["conv"])
        query_bthk, key_bthk, value_bthv = functional.silu(mixed_btd).unflatten(-1, (3, self.heads, -1)).unbind(2)
        read_bthv, memory = run(
            self.rule,
            state["memory"],
            _unit(key_bthk),
            value_bthv,
            _unit(query_bthk),
            self.gates(hidden_btd),
            form=self.form,
            chunk=self.chunk,
        )
        return read_bthv.flatten(2).to(mixed_btd.dtype), {"memory": memory, "conv": tail}


def _unit(key_bthk: Keys) -> Keys:
    """Keys of length one; in float32, where a tiny key keeps its direction."""
    key_bthk = key_bthk.float() if key_bthk.dtype in (torch.bfloat16, torch.float16) else key_bthk
    return key_bthk * (key_bthk.square().sum(dim=-1, keepdim=True) + 1e-12).rsqrt()


class MemoryLayer(nn.Module):
    """Memory alone as a mixer: what is recalled, normalised per head, gated and projected (memory.md 5.1)."""

    no_decay: ClassVar = frozenset({"gate.weight", "gate.bias"})

    def __init__(self, width: int, part: MemoryPart) -> None:
        super().__init__()
        self.recall = Recall(width, part)
        self.norm = RMSNorm(part.head_width)
        self.gate = nn.Linear(width, width)
        self.out = nn.Linear(width, width, bias=False)
        # The output gate starts open: sigmoid(2) = 0.88.
        nn.init.constant_(self.gate.bias, 2.0)

    def forward(self, hidden_btd: Hidden, state: State | None = None) -> tuple[Hidden, State]:
        recalled_btd, state = self.recall(hidden_btd, state)
        normed_bthv = self.norm(recalled_btd.unflatten(-1, (self.recall.heads, -1)))
        return self.out(normed_bthv.flatten(2) * self.gate(hidden_btd).sigmoid()), state
