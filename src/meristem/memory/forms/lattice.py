"""The form of unit slots: linearised around the slots that enter a chunk."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from meristem.memory.forms.by_chunk import ByChunk, Inputs, run_chunks
from meristem.memory.gates import Gates
from meristem.memory.rule import Rule
from meristem.memory.state import Memory, State
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
    """Reads and the memory left behind; slots follow ``s_t = (1 - scale (s_0 u)) s_(t-1) + scale u``, at unit length.

    The write ``P_i u`` of a slot is ``u - s_i (s_i u)``; with ``s_i u`` taken where the chunk begins it is linear in
    the slot (Lattice 2504.05646, section 4; memory.md 4.8). scale and u are those of the slots ``s_0`` that enter the
    chunk; scale is at most 1. The factor of ``s_(t-1)`` has any sign. Each token reads slots of unit length.
    """
    inputs = keys_bthk, values_bthv, queries_bthk
    return run_chunks(ByChunk(_begin, _part), rule, memory, inputs, gates, chunk)


def _begin(rule: Rule, memory: Memory, inputs: Inputs) -> State:
    """live: the slots before they are brought to unit length, which inside a chunk only a read does."""
    slots = {"slots_bhgk": memory["slots_bhgk"]}
    return {"start": slots, "live": slots}


def _part(rule: Rule, memory: Memory, begun: State, inputs: Inputs, gates: Gates) -> tuple[Values, Memory, State]:
    key_bhck, value_bhck, query_bhck = (x.movedim(1, 2) for x in inputs)
    rows, start, live_bhgk = gates.rows(0, key_bhck.shape[2]), begun["start"], begun["live"]["slots_bhgk"]
    recalled, target, pull = rule.structure.vjp(Live(start), Pairs(key_bhck, value_bhck, rows.code_bhcg))
    amount_bhcg, inward_bhck = pull(rule.bias.gradient(recalled, target, rows.threshold_bhc))["slots_bhgk"]
    # No logs: a factor may be 0, negative, or above 1.
    amount_bhcg = (-rows.write_bhc[..., None] * amount_bhcg).clamp(max=1.0)
    factor_bhcg = 1 - amount_bhcg * (inward_bhck @ start["slots_bhgk"].mT)
    kept_bhgcs = Products.apply(functional.pad(factor_bhcg.mT, (1, 0), value=1.0))
    written_bhcgk = torch.einsum("bhgcs,bhsg,bhsk->bhcgk", kept_bhgcs[..., 1:, 1:], amount_bhcg, inward_bhck)
    live_bhcgk = torch.einsum("bhgc,bhgk->bhcgk", kept_bhgcs[..., 1:, 0], live_bhgk) + written_bhcgk
    begun = begun | {"live": {"slots_bhgk": live_bhcgk[:, :, -1]}}
    held_bhcgk = _unit(live_bhcgk)
    after = memory | {"slots_bhgk": held_bhcgk[:, :, -1]}
    if rule.reads == "before":
        held_bhcgk = torch.cat([memory["slots_bhgk"][:, :, None], held_bhcgk[:, :, :-1]], dim=2)
    # Every token has slots of its own, as heads have.
    read_from = Live({"slots_bhgk": held_bhcgk.flatten(1, 2)})
    read_bh1k = rule.structure.recall(read_from, query_bhck.flatten(1, 2)[:, :, None])
    read_bhck = read_bh1k[:, :, 0].unflatten(1, query_bhck.shape[1:3])
    return read_bhck.movedim(1, 2), after, begun


class Products(torch.autograd.Function):
    """``apply(factor_bhgc)``: the product of the factors after s up to c, at ``[..., c, s]``; 0 where s is after c.

    Without logarithms: a factor may be 0, negative or above 1. The gradient of one factor is summed over all the
    products that it is in, ``K[c, s] = K[c, j] factor_j K[j - 1, s]``.
    """

    @staticmethod
    def forward(ctx: Any, factor_bhgc: Tensor) -> Tensor:
        size = factor_bhgc.shape[-1]
        is_later_cs = torch.ones(size, size, dtype=torch.bool, device=factor_bhgc.device).tril(-1)
        product_bhgcs = torch.where(is_later_cs, factor_bhgc[..., None], 1.0).cumprod(dim=-2).tril()
        ctx.save_for_backward(product_bhgcs)
        return product_bhgcs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_product_bhgcs: Tensor) -> Tensor:
        (product_bhgcs,) = ctx.saved_tensors
        d_within_bhgcs = product_bhgcs.mT @ d_product_bhgcs.tril()
        d_factor_bhgc = (d_within_bhgcs[..., 1:, :] * product_bhgcs[..., :-1, :]).sum(dim=-1)
        return functional.pad(d_factor_bhgc, (1, 0))


def _unit(slots: Tensor) -> Tensor:
    return slots / (slots.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()
