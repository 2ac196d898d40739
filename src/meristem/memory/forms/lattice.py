"""The form of unit slots: linearised around the slots that enter a chunk."""

import math

import torch
from torch import Tensor

from meristem.memory.forms.by_chunk import run_chunks
from meristem.memory.forms.decay import decay_between
from meristem.memory.gates import LOG_FLOOR, Gates
from meristem.memory.rule import Rule
from meristem.memory.state import Memory
from meristem.memory.structure import Live, Pairs
from meristem.shapes import Keys, Queries, Values


def refusals(rule: Rule) -> list[str]:
    """Why this form cannot run the rule; empty when it can."""
    reasons = {
        "its structure is not slots": rule.structure.kind == "slots",
        "its retention does not keep slots on the sphere": rule.retention.name == "sphere",
        "its update is not 'plain'": rule.update.name == "plain",
    }
    return [reason for reason, is_met in reasons.items() if not is_met]


def lattice(
    rule: Rule,
    memory: Memory,
    keys_bthk: Keys,
    values_bthv: Values,
    queries_bthk: Queries,
    gates: Gates,
    *,
    chunk: int = 16,
) -> tuple[Values, Memory]:
    """Reads and the memory left behind; slots follow ``s_t = (1 - scale) s_(t-1) + step``, at unit length.

    The write ``P_i u`` of a slot is ``u - s_i (s_i u)``; with ``s_i u`` taken where the chunk begins it is linear in
    the slot (Lattice 2504.05646, section 4; memory.md 4.8). scale is at most 1. Each token reads slots of unit length.
    """
    return run_chunks(_chunk, rule, memory, (keys_bthk, values_bthv, queries_bthk), gates, chunk)


def _chunk(
    rule: Rule, memory: Memory, keys_bthk: Keys, values_bthv: Values, queries_bthk: Queries, gates: Gates
) -> tuple[Values, Memory]:
    key_bhck, value_bhck, query_bhck = (x.movedim(1, 2) for x in (keys_bthk, values_bthv, queries_bthk))
    rows, slots_bhgk = gates.rows(0, key_bhck.shape[2]), memory["slots_bhgk"]
    recalled, target, pull = rule.structure.vjp(Live(memory), Pairs(key_bhck, value_bhck, rows.code_bhcg))
    amount_bhsg, inward_bhsk = pull(rule.bias.gradient(recalled, target, rows.threshold_bhc))["slots_bhgk"]
    amount_bhsg = -rows.write_bhc[..., None] * amount_bhsg
    scale_bhgs = (amount_bhsg * (inward_bhsk @ slots_bhgk.mT)).clamp(max=1.0).mT
    kept_bhgcs, kept_bhgc = decay_between((1 - scale_bhgs).clamp_min(math.exp(LOG_FLOOR)).log())
    written_bhcgk = torch.einsum("bhgcs,bhsg,bhsk->bhcgk", kept_bhgcs, amount_bhsg, inward_bhsk)
    held_bhcgk = _unit(torch.einsum("bhgc,bhgk->bhcgk", kept_bhgc, slots_bhgk) + written_bhcgk)
    last_bhgk = held_bhcgk[:, :, -1]
    if rule.reads == "before":
        held_bhcgk = torch.cat([slots_bhgk[:, :, None], held_bhcgk[:, :, :-1]], dim=2)
    # Every token has slots of its own, as heads have.
    met = Live({"slots_bhgk": held_bhcgk.flatten(1, 2)})
    read_bh1k = rule.structure.recall(met, query_bhck.flatten(1, 2)[:, :, None])
    read_bhck = read_bh1k[:, :, 0].unflatten(1, query_bhck.shape[1:3])
    return read_bhck.movedim(1, 2), memory | {"slots_bhgk": last_bhgk}


def _unit(slots: Tensor) -> Tensor:
    return slots / (slots.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()
