"""A low-rank seed of a higher rank (growth.md 11.2)."""

import math
from dataclasses import replace
from typing import Any, Final

from torch import nn

from meristem.growth.graft import cost, find_seed
from meristem.growth.layers import LowRank
from meristem.growth.plan import Applied, Carry, Plan, draft
from meristem.growth.surgery.host import refused, resize
from meristem.models.init import seeded
from meristem.nn.slot import CHILD
from meristem.optim.surgery import Places, appended

RAISE: Final = "raise_rank"


def plan_raise_rank(model: nn.Module, slot: str, rank: int, *, random_seed: int = 0) -> Plan:
    """More rank for the low-rank seed in a slot, of any model; it gives what it did, but for the order of a sum.

    Fresh rows of the first projection are drawn, fresh columns of the last are zero. The log says the new rank of the
    seed, and nothing else. Raises WrongValue for an empty slot, CapabilityError for another seed or no more rank.
    """
    seed = find_seed(model, slot)
    layer: Any = seed.layer
    if not isinstance(layer, LowRank):
        raise refused(RAISE, f"the seed in {slot} is a '{seed.origin.blueprint}', which has no rank")
    old = layer.down.weight.shape[0]
    if rank <= old:
        raise refused(RAISE, f"the seed in {slot} has the rank {old}, and {rank} is no more")
    widths = layer.down.weight.shape[1], layer.out.weight.shape[0]
    settings = dict(seed.origin.settings) | {"rank": rank}
    flops = cost("low_rank", widths, **settings).flops_per_token - cost("low_rank", widths, rank=old).flops_per_token

    def apply(host: nn.Module) -> Applied:
        found = find_seed(host, slot)
        rows: Places = (appended(old, rank), None)
        columns: Places = (None, appended(old, rank))
        with seeded(random_seed, f"growth.{slot}.rank", rank):
            resize(found, "layer.down.weight", rows, std=1 / math.sqrt(widths[0]))
        resize(found, "layer.out.weight", columns)
        found.origin = replace(found.origin, settings=settings)
        names = {f"{slot}.{CHILD}.seed.layer.down.weight": rows, f"{slot}.{CHILD}.seed.layer.out.weight": columns}
        return Applied(host, {name: Carry(name, places) for name, places in names.items()})

    fields = {"slot": slot, "rank": rank, "random_seed": random_seed}
    return draft(model, RAISE, fields, apply, preserves="rounding", flops_per_token=flops, writes=frozenset())
