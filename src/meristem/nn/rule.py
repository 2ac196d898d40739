"""From settings to the rule that they mean."""

from dataclasses import replace

from meristem.memory.bias import biases
from meristem.memory.check import check
from meristem.memory.features import features
from meristem.memory.named import named
from meristem.memory.retention import retentions
from meristem.memory.rule import Rule
from meristem.memory.structure import structures
from meristem.memory.update import updates
from meristem.nn.part import MemoryPart
from meristem.plugins import spelled


def rule_of(part: MemoryPart) -> Rule:
    """The named rule, with the parts that the settings choose in the place of its own.

    Raises ConflictingKeys that lists every reason why these parts do not go together.
    """
    rule = named(part.rule)
    if part.structure:
        rule = replace(rule, structure=spelled(structures, part.structure))
    if part.bias:
        rule = replace(rule, bias=spelled(biases, part.bias))
    if part.retention:
        rule = replace(rule, retention=spelled(retentions, part.retention))
    if part.update:
        rule = replace(rule, update=spelled(updates, part.update))
    if part.features:
        rule = replace(rule, features=spelled(features, part.features))
    return check(replace(rule, reads=part.reads or rule.reads, probe=part.probe or rule.probe))
