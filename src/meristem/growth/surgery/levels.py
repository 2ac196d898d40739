"""One more level for a chain of feed-forward layers or for a memory (memory.md 6.7, growth.md 11.2)."""

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import nn

from meristem.growth.plan import Applied, Carry, Plan, Preserves, draft
from meristem.growth.surgery.host import refused, require_lm, require_place
from meristem.models.init import seeded
from meristem.models.topology import Change, changes, record, recorded
from meristem.nn.cms_memory import CMSMemory
from meristem.nn.cms_mlp import CMSMLP
from meristem.nn.mac import MemoryAsContext
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.promotion import Grown, push_up, push_up_chain, stack_up, stack_up_chain
from meristem.optim.surgery import Places

ADD: Final = "add_level"

Where: TypeAlias = Literal["below", "on_top"]


def plan_add_level(model: nn.Module, block: int, where: Where = "on_top", *, random_seed: int = 0) -> Plan:
    """One more level in a block: of its chain of feed-forward layers where it has one, else of its memory.

    below: a fresh level that is stepped or read at every token; the others take the periods above their own.
    on_top: a fresh one slower than all. In a chain it adds nothing yet, and the block computes what it did, unless a
    level is raised to read means of tokens; a fresh memory recalls, so that the block computes something else. States
    of readers that carry levels begin anew.

    Raises CapabilityError for a block with neither, and for memories with a cache or in front of attention (MAC).
    """
    lm = require_lm(model, ADD)
    require_place(block, len(lm.blocks), "block")
    found: Any = _found(lm.blocks[block])[2]
    is_silent = isinstance(found, CMSMLP) and (where == "on_top" or found.config.tokens == "each")
    preserves: Preserves = "exact" if is_silent else "nothing"
    fields = {"block": block, "where": where, "random_seed": random_seed}
    return draft(model, ADD, fields, lambda m: _add(m, fields), preserves=preserves, writes=frozenset())


def _add(model: nn.Module, fields: Mapping[str, Any]) -> Applied:
    lm = require_lm(model, ADD)
    block: Any = lm.blocks[fields["block"]]
    holder, name, found = _found(block)
    is_below = fields["where"] == "below"
    with seeded(fields["random_seed"], "growth.level", len(recorded(lm)), fields["block"]), torch.no_grad():
        if isinstance(found, CMSMLP):
            grown: Grown[Any] = push_up_chain(found) if is_below else stack_up_chain(found)
        else:
            config = found.config if isinstance(found, CMSMemory) else block.settings[1]
            grown = push_up(found, config) if is_below else stack_up(found, config)
    prefix = next(path for path, each in lm.named_modules() if each is found)
    carries = {f"{prefix}.{new}": Carry(f"{prefix}.{old}") for old, new in grown.names.items()}
    for path in [path for path, _ in found.named_parameters() if path.rpartition(".")[0] == "" or "frequency" in path]:
        carries |= _resized(grown, found, prefix, path)
    for old, new in grown.names.items():
        _share(found, old, grown.module, new)
    holder.register_module(name, grown.module.train(found.training))
    return Applied(record(lm, Change(ADD, dict(fields))), carries)


def _found(block: Any) -> tuple[nn.Module, str, CMSMLP | NeuralMemory | CMSMemory]:
    """What holds the chain or the memory of a block, under which name, and that itself."""
    if isinstance(block.mlp, CMSMLP):
        return block, "mlp", block.mlp
    holders: list[Any] = [block.mixer, getattr(block.mixer, "memory", None)]
    for holder in holders:
        found = getattr(holder, "recall", None)
        if isinstance(holder, MemoryAsContext) or not isinstance(found, NeuralMemory | CMSMemory):
            continue
        if isinstance(found, NeuralMemory) and found.qkv.in_features * len(found.used) != found.qkv.out_features:
            raise refused(ADD, "its residual stream was widened, and a fresh memory would have other heads")
        return holder, "recall", found
    raise refused(ADD, f"a block with a {type(block.mixer).__name__} and a {type(block.mlp).__name__} has no levels")


def _resized(grown: Grown[Any], found: nn.Module, prefix: str, path: str) -> dict[str, Carry]:
    """How a parameter with one number for each level came out of the old one."""
    after = dict(grown.module.named_parameters())
    if path not in after or path in grown.names:
        return {}
    first = 0 if after[path].shape[0] == len(grown.moved) + 1 else 1
    index = torch.full((after[path].shape[0],), -1, device="cpu")
    for old, new in grown.moved.items():
        if old >= first:
            index[new - first] = old - first
    places: Places = (index, *[None] * (after[path].dim() - 1))
    return {f"{prefix}.{path}": Carry(f"{prefix}.{path}", places)}


def _share(before: nn.Module, old: str, after: nn.Module, new: str) -> None:
    """The very parameter or buffer of the old module, where the new one has a copy of it."""
    owner, _, name = new.rpartition(".")
    there, _, known = old.rpartition(".")
    held = getattr(before.get_submodule(there), known)
    holder = after.get_submodule(owner)
    (holder._parameters if isinstance(held, nn.Parameter) else holder._buffers)[name] = held


changes.register(ADD, lambda model, fields: _add(model, fields).model)
