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
from meristem.nn.config import MemoryConfig
from meristem.plugins import spelled


def rule_of(config: MemoryConfig) -> Rule:
    """The named rule, with the parts that the settings choose in the place of its own.

    Raises ConflictingKeys that lists every reason why these parts do not go together.
    """
    rule = named(config.rule)
    if config.structure:
        rule = replace(rule, structure=spelled(structures, config.structure))
    if config.bias:
        rule = replace(rule, bias=spelled(biases, config.bias))
    if config.retention:
        rule = replace(rule, retention=spelled(retentions, config.retention))
    if config.update:
        rule = replace(rule, update=spelled(updates, config.update))
    if config.features:
        rule = replace(rule, features=spelled(features, config.features))
    return check(replace(rule, reads=config.reads or rule.reads, probe=config.probe or rule.probe))
