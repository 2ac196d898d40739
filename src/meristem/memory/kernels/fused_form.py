"""The linear family as one operation, forward and backward: by the native core on a CPU, by Triton on a CUDA device."""

from typing import Final, Literal

import torch

from meristem.memory.gates import Gates
from meristem.memory.kernels import chunk_operation
from meristem.memory.rule import Rule
from meristem.memory.state import Memory
from meristem.memory.update import momentum_name
from meristem.native import operations
from meristem.shapes import Keys, Queries, Values

FORMS: Final = ("exact_chunk", "frozen_chunk", "tnt")
"""Forms that run a linear rule as one operation where that can run."""


def fused_form(
    rule: Rule,
    memory: Memory,
    inputs: tuple[Keys, Values, Queries],
    gates: Gates,
    *,
    chunk: int,
    backend: Literal["native", "triton"],
    is_frozen: bool = False,
) -> tuple[Values, Memory]:
    """Reads and the memory left behind, as ``exact_chunk.solved`` gives them. It takes the factors of the gates, as
    ``scan`` does, and not their logarithms: one factor after the other, nothing underflows on the way."""
    keys_bthk, values_bthv, queries_bthk = inputs
    address_bthk, wanted_bthk = rule.structure.address(keys_bthk), rule.structure.address(queries_bthk)
    scale_bth = gates.retain_bth if rule.probe == "warm" and rule.slope else None
    if rule.slope and rule.slope != 1:
        scale_bth = torch.full_like(gates.write_bth, rule.slope) if scale_bth is None else rule.slope * scale_bth
    weight = rule.structure.weights[0]
    moving = momentum_name(weight) if rule.update.has_momentum else None
    chunk_form = operations.chunk_form if backend == "native" else chunk_operation.chunk_form
    read_bthv, last_bhkv, moving_bhkv = chunk_form(
        (wanted_bthk, address_bthk, values_bthv),
        (
            gates.retain_bth if rule.has_retain else None,
            gates.momentum_bth if moving else None,
            rule.update.rate(gates.write_bth, address_bthk),
            scale_bth,
        ),
        (memory[weight], memory[moving] if moving else None),
        chunk=chunk,
        probed_at="never" if not rule.slope else "start" if is_frozen else "token",
        reads_before=rule.reads == "before",
    )
    last = {weight: last_bhkv} if moving is None or moving_bhkv is None else {weight: last_bhkv, moving: moving_bhkv}
    return read_bthv, memory | last
