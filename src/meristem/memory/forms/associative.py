"""The associative form: all memories of a sequence by a scan of logarithmic depth."""

import torch
from torch import Tensor

from meristem.memory.gates import Gates
from meristem.memory.rule import Rule
from meristem.memory.state import Memory
from meristem.memory.structure import Live
from meristem.memory.update import momentum_name
from meristem.shapes import Keys, Queries, Values


def refusals(rule: Rule) -> list[str]:
    """Why this form cannot run the rule; empty when it can."""
    reasons = {
        "what it writes depends on what it holds": rule.slope == 0,
        "its retention does more than scale the old memory": rule.retention.is_linear and not rule.retention.is_mapped,
        "its update is not linear in the surprise": rule.update.is_linear,
    }
    return [reason for reason, is_met in reasons.items() if not is_met]


def associative(
    rule: Rule,
    memory: Memory,
    keys_bthk: Keys,
    values_bthv: Values,
    queries_bthk: Queries,
    gates: Gates,
    *,
    chunk: int = 64,
) -> tuple[Values, Memory]:
    """Reads and the memory left behind, as ``scan`` gives them, for writes that do not read the memory.

    ``Z_t = C_t Z_(t-1) + U_t`` with memory and momentum stacked in Z; two of these are one of the same kind, and so
    doubling distances joins all (Blelloch 1990; memory.md 4.6). It holds a matrix per token: for short sequences and
    for checks. chunk: has no effect.
    """
    name = rule.structure.weights[0]
    names = [name, momentum_name(name)][: 1 + rule.update.has_momentum]
    address_bhtk = rule.structure.address(keys_bthk).movedim(1, 2)
    rate_bth = rule.update.rate(gates.write_bth, rule.structure.address(keys_bthk))
    rated_bhtk = rate_bth.movedim(1, 2)[..., None] * address_bhtk
    written_bhtkv = rated_bhtk[..., None] * values_bthv.movedim(1, 2)[..., None, :]
    retain_bht = (gates.retain_bth if rule.has_retain else torch.ones_like(gates.retain_bth)).movedim(1, 2)
    carried_bhtll, added_bhtlkv = _elements(
        retain_bht, gates.momentum_bth if rule.update.has_momentum else None, written_bhtkv
    )
    carried_bhtll, added_bhtlkv = _join_all(carried_bhtll, added_bhtlkv)
    first_bhlkv = torch.stack([memory[source] for source in names], dim=2)
    reached_bhtlkv = torch.einsum("bhtcl,bhlkv->bhtckv", carried_bhtll, first_bhlkv) + added_bhtlkv
    held_bhtkv = reached_bhtlkv[:, :, :, 0]
    if rule.reads == "before":
        held_bhtkv = torch.cat([first_bhlkv[:, :, :1], held_bhtkv[:, :, :-1]], dim=2)
    query_bht1k = queries_bthk.movedim(1, 2)[..., None, :]
    read_bht1v = rule.structure.recall(Live({name: held_bhtkv}), query_bht1k)
    last = {source: reached_bhtlkv[:, :, -1, index] for index, source in enumerate(names)}
    return read_bht1v[..., 0, :].movedim(1, 2), memory | last


def _elements(retain_bht: Tensor, momentum_bth: Tensor | None, written_bhtkv: Tensor) -> tuple[Tensor, Tensor]:
    if momentum_bth is None:
        return retain_bht[..., None, None], written_bhtkv[:, :, :, None]
    moving_bht = momentum_bth.movedim(1, 2)
    rows = [torch.stack([retain_bht, moving_bht], dim=-1), torch.stack([torch.zeros_like(retain_bht), moving_bht], -1)]
    return torch.stack(rows, dim=-2), torch.stack([written_bhtkv, written_bhtkv], dim=3)


def _join_all(carried_bhtll: Tensor, added_bhtlkv: Tensor) -> tuple[Tensor, Tensor]:
    """Every element joined with all before it: distances of 1, 2, 4, ... tokens."""
    n_time, distance = carried_bhtll.shape[2], 1
    while distance < n_time:
        later, sooner = slice(distance, None), slice(None, -distance)
        moved_bhtckv = torch.einsum("bhtcl,bhtlkv->bhtckv", carried_bhtll[:, :, later], added_bhtlkv[:, :, sooner])
        added = added_bhtlkv[:, :, later] + moved_bhtckv
        carried = carried_bhtll[:, :, later] @ carried_bhtll[:, :, sooner]
        added_bhtlkv = torch.cat([added_bhtlkv[:, :, :distance], added], dim=2)
        carried_bhtll = torch.cat([carried_bhtll[:, :, :distance], carried], dim=2)
        distance *= 2
    return carried_bhtll, added_bhtlkv
