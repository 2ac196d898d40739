"""Blocks that are put into a stack, taken out of it, and copied (growth.md 11.2)."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from meristem.growth.attach import attach, slots_in, strip
from meristem.growth.plan import Applied, Plan, draft
from meristem.growth.surgery.host import BLOCKS, moved_names, refused, rename_slots, require_lm, require_place
from meristem.growth.surgery.width import widen_block
from meristem.growth.topology import without_numbers
from meristem.models.init import seeded
from meristem.models.lm import LM, Block
from meristem.models.topology import Change, changes, record, recorded
from meristem.nn.cms_mlp import CMSMLP

INSERT: Final = "insert_block"
REMOVE: Final = "remove_block"
COPY: Final = "copy_blocks"
N_TIME: Final = 64
"""Tokens over which the FLOPs of a block are counted."""


def plan_insert_block(model: nn.Module, at: int, *, like: int | None = None, random_seed: int = 0) -> Plan:
    """A fresh block before block ``at``, or on top where that is how many there are; the model computes what it did.
    It has empty slots where the block has some that it is like.

    The last projections of its mixer and feed-forward layers are zero: ``x + 0`` twice (growth.md 11.2, exact).
    like: the block whose settings it has; None for the one below it. random_seed: of its first weights.

    Raises CapabilityError for a model that is no stack of ours, and a mixer without a last projection; WrongValue for
    a number that there is not.
    """
    lm = require_lm(model, INSERT)
    require_place(at, len(lm.blocks) + 1, "a place for a block of")
    like = max(0, at - 1) if like is None else like
    require_place(like, len(lm.blocks), "a block like")
    fields = {"at": at, "like": like, "random_seed": random_seed}
    flops = _flops(lm.blocks[like], is_bare=True)
    return draft(
        model,
        INSERT,
        fields,
        lambda m: _insert(m, fields),
        preserves="exact",
        flops_per_token=flops,
        writes=frozenset(),
    )


def plan_interleave(model: nn.Module, *, random_seed: int = 0) -> Plan:
    """Above each block a fresh one like it, which adds nothing: twice as deep, and the model computes what it did.

    Raises what ``plan_insert_block`` raises.
    """
    lm = require_lm(model, INSERT)
    flops = sum(_flops(block, is_bare=True) for block in lm.blocks)
    return draft(
        model,
        "interleave",
        {"random_seed": random_seed},
        lambda m: _interleave(m, random_seed),
        preserves="exact",
        flops_per_token=flops,
        writes=frozenset(),
    )


def plan_remove_block(model: nn.Module, at: int) -> Plan:
    """Take block ``at`` out: exact where its last projections are zero, and another function otherwise."""
    lm = require_lm(model, REMOVE)
    require_place(at, len(lm.blocks), "block")
    if len(lm.blocks) == 1:
        raise refused(REMOVE, "it has one block, and a model without any reads nothing but the last token")
    outs = [out for out in _outs(lm.blocks[at]) if out is not None]
    is_silent = bool(outs) and not any(bool(each.any()) for out in outs for each in out.parameters())
    fields = {"at": at}
    return draft(
        model,
        REMOVE,
        fields,
        lambda m: _remove(m, fields),
        preserves="exact" if is_silent else "nothing",
        flops_per_token=-_flops(lm.blocks[at]),
        writes=frozenset(),
    )


def plan_copy_blocks(model: nn.Module, of: Sequence[int], at: int) -> Plan:
    """Copies of the blocks ``of``, seeds included, before block ``at``: another function, as two layers do more than
    one (the middle of the stack: MIDAS, Saunshi et al. 2409.19044).

    Moments are copied with the weights. Raises what ``plan_insert_block`` raises.
    """
    lm = require_lm(model, COPY)
    require_place(at, len(lm.blocks) + 1, "a place for a block of")
    for each in of:
        require_place(each, len(lm.blocks), "block")
    fields = {"of": [*of], "at": at}
    flops = sum(_flops(lm.blocks[each]) for each in of)
    return draft(
        model, COPY, fields, lambda m: _copy(m, fields), preserves="nothing", flops_per_token=flops, writes=frozenset()
    )


def plan_stack(model: nn.Module) -> Plan:
    """The whole stack again, on top of itself: another function (G_stack, Du et al. 2405.15319)."""
    n_blocks = len(require_lm(model, COPY).blocks)
    return plan_copy_blocks(model, range(n_blocks), n_blocks)


def _insert(model: nn.Module, fields: Mapping[str, Any]) -> Applied:
    lm, at = require_lm(model, INSERT), fields["at"]
    like = lm.blocks[fields["like"]]
    block = _fresh_block(lm, like, fields)
    carries = moved_names(lm, {old: [old + 1] for old in range(at, len(lm.blocks))})
    slots = [(name.split(".")[2:], slot) for name, slot in slots_in(lm).items() if _number(name) == fields["like"]]
    lm.blocks.insert(at, block)
    rename_slots(lm)
    for rest, slot in slots:
        name = ".".join([BLOCKS, str(at), *rest])
        attach(lm, name, reads=slot.reads, width=slot.widths[1], layout=slot.layout)
    return Applied(record(lm, Change(INSERT, dict(fields))), carries)


def _interleave(model: nn.Module, random_seed: int) -> Applied:
    lm = require_lm(model, INSERT)
    n_blocks = len(lm.blocks)
    carries = moved_names(lm, {old: [2 * old] for old in range(n_blocks)})
    for old in range(n_blocks):
        _insert(lm, {"at": 2 * old + 1, "like": 2 * old, "random_seed": random_seed})
    return Applied(lm, carries)


def _remove(model: nn.Module, fields: Mapping[str, Any]) -> Applied:
    lm, at = require_lm(model, REMOVE), fields["at"]
    carries = moved_names(lm, {old: [old - 1] for old in range(at + 1, len(lm.blocks))})
    del lm.blocks[at]
    rename_slots(lm)
    last = recorded(lm)[-1:]
    is_inverse = bool(last) and last[0].name == INSERT and last[0].fields["at"] == at
    return Applied(record(lm, Change(REMOVE, dict(fields)), undoes=last[0] if is_inverse else None), carries)


def _copy(model: nn.Module, fields: Mapping[str, Any]) -> Applied:
    lm, at, of = require_lm(model, COPY), fields["at"], fields["of"]
    moves = {old: [old if old < at else old + len(of)] for old in range(len(lm.blocks))}
    for index, old in enumerate(of):
        moves[old].append(at + index)
    carries = moved_names(lm, moves)
    for index, block in enumerate([copy.deepcopy(lm.blocks[old]) for old in of]):
        block.joined = _part(lm)
        lm.blocks.insert(at + index, block)
    rename_slots(lm)
    return Applied(record(lm, Change(COPY, dict(fields))), carries)


def _fresh_block(lm: LM, like: Any, fields: Mapping[str, Any]) -> Block:
    """A block of the settings of another, as wide, which adds nothing; where that is and in its precision."""
    first: Tensor = like.mixer_norm.gain_d
    place = torch.device("meta") if first.is_meta else nullcontext()
    with seeded(fields["random_seed"], "growth.block", len(recorded(lm)), fields["at"]), place:
        block = Block(*like.settings)
        if len(first) != like.settings[0].dim:
            widen_block(block, len(first))
    for out in _outs(block):
        if out is None:
            raise refused(INSERT, f"its mixer, a {type(block.mixer).__name__}, has no last projection called out")
        for parameter in out.parameters():
            nn.init.zeros_(parameter)
    block.m3_every, block.joined = like.m3_every, _part(lm)
    dtype = like.mixer.out.weight.dtype
    return block.to(device=first.device, dtype=dtype).train(like.training)


def _number(name: str) -> int | None:
    """The number of the block that a module stands in, or None."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == BLOCKS and len(parts) > 1 else None


def _part(lm: LM) -> str:
    """What blocks that come now say of when they came: the optimizer warms up for them alone."""
    return f"joined:{len(recorded(lm))}"


def _outs(block: Any) -> list[nn.Linear | None]:
    """The last projections of a block: of its mixer, of its feed-forward layer or of each of its levels."""
    last = block.mlp.outs if isinstance(block.mlp, CMSMLP) else [block.mlp.out]
    return [getattr(block.mixer, "out", None), *last]


def _flops(block: nn.Module, *, is_bare: bool = False) -> float:
    """FLOPs per token of a block's matrix products, counted without numbers. is_bare: without what is in its slots."""
    twin: Any = without_numbers(block).requires_grad_(False)
    if is_bare:
        strip(twin)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(torch.zeros(1, N_TIME, len(twin.mixer_norm.gain_d), dtype=twin.mixer.out.weight.dtype))
    return counter.get_total_flops() / N_TIME


changes.register(INSERT, lambda model, fields: _insert(model, fields).model)
changes.register(REMOVE, lambda model, fields: _remove(model, fields).model)
changes.register(COPY, lambda model, fields: _copy(model, fields).model)
