"""A form that is not exact is its own recurrence, written here token by token."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from memory.inputs import Window, window
from meristem.memory import Rule, named, run
from meristem.memory.forms.by_chunk import finished
from meristem.memory.structure import Live, Pairs

LATTICES = ("lattice", "lattice_encode", "lattice_similarity")


def unit(slots_bhgk: Tensor) -> Tensor:
    return slots_bhgk / (slots_bhgk.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()


def lattice_by_token(rule: Rule, inputs: Window, chunk: int) -> tuple[Tensor, Tensor]:
    """memory.md 4.8: ``s = (1 - scale (s_0 in)) s + scale in``, both at the slots ``s_0`` that enter the chunk."""
    reads, entered = [], inputs.memory["slots_bhgk"]
    state = entered
    for t in range(inputs.keys_bthk.shape[1]):
        if t % chunk == 0:
            entered = state = unit(state) if t else state
        gates = inputs.gates.at(t)
        pair = Pairs(inputs.keys_bthk[:, t, :, None], inputs.values_bthv[:, t, :, None], gates.code_bhcg)
        recalled, target, pull = rule.structure.vjp(Live({"slots_bhgk": entered}), pair)
        amount, inward = pull(rule.bias.gradient(recalled, target, gates.threshold_bhc))["slots_bhgk"]
        scale = (-gates.write_bhc[..., None] * amount)[:, :, 0, :, None].clamp(max=1.0)
        before = unit(state) if t % chunk else state
        state = (1 - scale * (entered * inward).sum(dim=-1, keepdim=True)) * state + scale * inward
        met = before if rule.reads == "before" else unit(state)
        reads.append(rule.structure.recall(Live({"slots_bhgk": met}), inputs.queries_bthk[:, t, :, None])[:, :, 0])
    return torch.stack(reads, dim=1), unit(state)


@pytest.mark.parametrize("reads", ["after", "before"])
@pytest.mark.parametrize("name", LATTICES)
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, 30.0])
def test_lattice_is_its_recurrence(name: str, reads: str, rate: float) -> None:
    """S1-M20: with factors that are 1, above 1 and negative; values and gradients."""
    rule = replace(named(name), reads=reads)
    drawn = window(rule, 7, batch=1)
    ones = torch.ones_like(drawn.gates.write_bth)
    drawn = replace(drawn, gates=replace(drawn.gates, write_bth=rate * ones))
    results = []
    for by_token in (False, True):
        inputs = drawn.tracked()
        if by_token:
            read, slots = lattice_by_token(rule, inputs, 4)
        else:
            read, after = run(rule, *inputs.arguments(), form="lattice", chunk=4)
            slots = finished(after)["slots_bhgk"]
        loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in (read, slots))
        gradients = torch.autograd.grad(loss, list(inputs.leaves().values()), materialize_grads=True, allow_unused=True)
        results.append([read.detach(), slots.detach(), *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
