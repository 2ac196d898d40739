"""Memories that are rewritten while they read: rules made of parts, one plain meaning, many fast forms."""

from meristem.memory.forms import run
from meristem.memory.gates import Gates
from meristem.memory.named import named as named_rule
from meristem.memory.rule import Rule, scan

# The catalogue's module and its one function share a name; the function is the public one.
named = named_rule

__all__ = ["Gates", "Rule", "named", "run", "scan"]
