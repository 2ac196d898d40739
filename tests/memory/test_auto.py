"""``form="auto"`` keeps the meaning that a rule is trained with: exact, or what the rule declares."""

from dataclasses import replace

import pytest
import torch

from memory.inputs import named, window
from meristem.memory import Rule, run
from meristem.memory.bias import absolute
from meristem.memory.forms import choose, forms
from meristem.memory.named import rules
from meristem.memory.retention import decay
from meristem.memory.state import flatten
from meristem.memory.structure import matrix
from meristem.memory.update import deep_momentum, momentum
from meristem.nn.config import MemoryConfig
from meristem.nn.neural_memory import NeuralMemory

DECLARED = {
    **dict.fromkeys(("titans_mlp", "moneta", "yaad", "memora", "trellis", "omega_net", "ftrl"), "frozen_chunk"),
    **dict.fromkeys(("lattice", "lattice_encode", "lattice_similarity"), "lattice"),
    "atlas": "atlas",
}


@pytest.mark.parametrize("name", rules.names())
def test_auto_is_exact_where_a_fast_form_is_and_else_what_the_rule_declares(name: str) -> None:
    rule = named(name)
    chosen = choose(rule)
    if forms.get("exact_chunk").refusals(rule):
        assert chosen == rule.form == DECLARED[name]
        assert not forms.get(chosen).is_exact
    else:
        assert chosen == "exact_chunk"
    inputs = window(rule, 11)
    read_bthv, memory = run(rule, *inputs.arguments(), chunk=4)
    same_bthv, same = run(rule, *inputs.arguments(), form=chosen, chunk=4)
    assert torch.equal(read_bthv, same_bthv)
    assert flatten(memory).keys() == flatten(same).keys()
    assert NeuralMemory.from_config(32, MemoryConfig(rule=name, head_dim=8)).form == chosen


def test_a_rule_that_declares_nothing_is_run_by_scan() -> None:
    """As is one whose declared form does not take the parts that were chosen."""
    assert choose(Rule(structure=matrix(), bias=absolute(), retention=decay(), update=momentum())) == "scan"
    assert choose(replace(named("titans_mlp"), update=deep_momentum())) == "scan"


def test_a_declared_form_is_one_of_ours() -> None:
    assert {named(name).form for name in rules.names()} <= set(forms.names())
