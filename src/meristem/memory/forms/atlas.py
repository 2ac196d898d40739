"""The form of rules that orthogonalise their momentum: weights per token, but only inside a short chunk."""

from dataclasses import replace

import torch

from meristem.linalg import newton_schulz
from meristem.memory.forms.by_chunk import ByChunk, Inputs, run_chunks
from meristem.memory.forms.decay import decay_between
from meristem.memory.forms.frozen_chunk import decay_at_rate_one, frozen_step
from meristem.memory.gates import Gates
from meristem.memory.rule import Rule
from meristem.memory.state import Memory, State
from meristem.memory.structure import Live, Pairs
from meristem.memory.update import momentum_name, plain
from meristem.shapes import Keys, Queries, Values

MOST = 16
"""Tokens whose momenta exist at once: each is as large as the memory."""


def refusals(rule: Rule) -> list[str]:
    """Why this form cannot run the rule; empty when it can."""
    reasons = {
        "its update does not orthogonalise a momentum": rule.update.name == "orthogonal_momentum",
        "it measures at retained weights": rule.probe == "cold",
        "its retention does more than scale the old memory": rule.retention.is_linear and not rule.retention.is_mapped,
    }
    return [reason for reason, is_met in reasons.items() if not is_met]


def atlas(
    rule: Rule,
    memory: Memory,
    keys_bthk: Keys,
    values_bthv: Values,
    queries_bthk: Queries,
    gates: Gates,
    *,
    chunk: int = 16,
) -> tuple[Values, Memory]:
    """Reads and the memory left behind, with surprises frozen at the start of chunks of at most 16 tokens.

    Span sums by a band, ``S_t`` and ``M_t`` by their decays, Newton-Schulz on all ``S_t`` of a chunk at once (Atlas
    2505.23735, section 5.2; memory.md 4.9).
    """
    inputs = keys_bthk, values_bthv, queries_bthk
    return run_chunks(ByChunk(_begin, _part), rule, memory, inputs, gates, min(chunk, MOST))


def _begin(rule: Rule, memory: Memory, inputs: Inputs) -> State:
    return {"start": {name: memory[name] for name in rule.structure.weights}}


def _part(rule: Rule, memory: Memory, begun: State, inputs: Inputs, gates: Gates) -> tuple[Values, Memory, State]:
    key_bhck, value_bhcv, query_bhck = (x.movedim(1, 2) for x in inputs)
    n_tokens = key_bhck.shape[2]
    log_momentum_bth = gates.log_momentum()
    if log_momentum_bth is None:
        raise ValueError("a rule with momentum needs momentum gates; they are None. Pass Gates(momentum_bth=...)")
    # The momenta alone: a memory whose retain gate is the momentum gate, written at rate 1.
    others = {"weight_bth": gates.weight_bth, "threshold_bth": gates.threshold_bth, "code_bthg": gates.code_bthg}
    moved = Gates.from_logs(log_momentum_bth, torch.ones_like(gates.write_bth), **others)
    rows = moved.rows(0, n_tokens)
    pairs = Pairs(key_bhck, value_bhcv, rows.code_bhcg)
    plain_rule = replace(rule, update=plain())
    (decay,) = decay_at_rate_one(plain_rule, moved, n_tokens)
    step = frozen_step(plain_rule, memory, pairs, rows, decay, start=begun["start"])
    moving = step.moving(decay)
    kept_bhcs, kept_bhc = decay_between(gates.log_retain().movedim(1, 2))
    write_bhc11 = gates.write_bth.movedim(1, 2)[..., None, None]
    held: Memory = {}
    after: Memory = {}
    for name, (addresses, gradients) in step.factors.items():
        entering_bhc11 = step.decay.entering_nhcl[..., 0, None, None]
        momenta_bhckv = torch.einsum("bhcs,bhsk,bhsv->bhckv", moving.intra_bhcs, addresses, gradients)
        momenta_bhckv = momenta_bhckv + entering_bhc11 * memory[momentum_name(name)][:, :, None]
        steps = write_bhc11 * newton_schulz(momenta_bhckv)
        faded = kept_bhc[..., None, None] * memory[name][:, :, None]
        held[name] = faded - torch.einsum("bhcs,bhskv->bhckv", kept_bhcs, steps)
        after |= {name: held[name][:, :, -1], momentum_name(name): momenta_bhckv[:, :, -1]}
    if rule.reads == "before":
        held = {name: torch.cat([memory[name][:, :, None], x[:, :, :-1]], dim=2) for name, x in held.items()}
    # Every token has weights of its own, as heads have.
    read_from = Live({name: x.flatten(1, 2) for name, x in held.items()})
    read_bh1v = rule.structure.recall(read_from, query_bhck.flatten(1, 2)[:, :, None])
    read_bhcv = read_bh1v[:, :, 0].unflatten(1, query_bhck.shape[1:3])
    return read_bhcv.movedim(1, 2), memory | after | step.remembered, begun
