"""The linear family through the native core, for CPUs: ``native/form.hpp``, forward and backward in one call each."""

from typing import Final

import torch

from meristem.memory.gates import Gates
from meristem.memory.rule import Rule
from meristem.memory.state import Memory
from meristem.memory.update import momentum_name
from meristem.native.operations import chunk_form
from meristem.shapes import Keys, Queries, Values

FORMS: Final = ("exact_chunk", "frozen_chunk", "tnt")
"""Forms that run a linear rule through the core where it is there."""


def native_form(
    rule: Rule,
    memory: Memory,
    inputs: tuple[Keys, Values, Queries],
    gates: Gates,
    *,
    chunk: int,
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
