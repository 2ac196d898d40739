"""A memory rule: ``memory.rule=cautious``."""

from dataclasses import replace

import torch

from meristem.memory import Rule, named
from meristem.memory.bias import Bias

MERISTEM_API = 1


def cautious() -> Rule:
    """The delta rule with every coordinate of the residual kept below one.

    It has every parallel form that its parts allow, and all that holds of rules is tested for it as for ours.
    """
    return replace(named("delta"), bias=Bias("cautious", lambda recalled, target, _: torch.tanh(recalled - target)))
