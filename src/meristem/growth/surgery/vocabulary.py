"""More tokens than a model was built with (growth.md 11.2)."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from meristem.errors import WrongValue
from meristem.growth.plan import Applied, Carry, Plan, draft
from meristem.growth.surgery.host import refused, require_lm, resize
from meristem.models.lm import LM
from meristem.models.topology import Change, changes, record, recorded
from meristem.nn.slot import slot_of
from meristem.optim.surgery import Places, appended

EXTEND: Final = "extend_vocabulary"
ACTIVATE: Final = "activate_vocabulary"
SHRINK: Final = "shrink_vocabulary"


def plan_extend_vocabulary(model: nn.Module, n: int) -> Plan:
    """``n`` more tokens, which can be read and are not said: the logits of the others are the same to the bit.

    Their rows of embedding and head are the means of the others. Until ``plan_activate_vocabulary`` they have the least
    logit that there is, a share of zero in the softmax, and their rows of the head no gradient.

    Raises WrongValue for less than one, and CapabilityError for a model that is none of ours.
    """
    lm = _ready(model, EXTEND, n)
    flops = 2.0 * n * lm.embedding.weight.shape[1]
    return draft(model, EXTEND, {"n": n}, _of(EXTEND, n), preserves="exact", flops_per_token=flops, writes=frozenset())


def plan_activate_vocabulary(model: nn.Module) -> Plan:
    """Let the tokens be said that ``plan_extend_vocabulary`` added: another function, for they take a share."""
    n = require_lm(model, ACTIVATE).n_masked
    if not n:
        raise refused(ACTIVATE, "all tokens of its vocabulary are in use")
    fields, apply = {"n": n}, _of(ACTIVATE, n)
    return draft(model, ACTIVATE, fields, apply, preserves="nothing", flops_per_token=0.0, writes=frozenset())


def plan_shrink_vocabulary(model: nn.Module, n: int) -> Plan:
    """Take the last ``n`` tokens away: exact while they are not in use."""
    lm = _ready(model, SHRINK, n)
    if n >= lm.embedding.weight.shape[0]:
        raise refused(SHRINK, f"it has {lm.embedding.weight.shape[0]} tokens")
    preserves: Any = "exact" if n <= lm.n_masked else "nothing"
    flops = -2.0 * n * lm.embedding.weight.shape[1]
    return draft(
        model, SHRINK, {"n": n}, _of(SHRINK, n), preserves=preserves, flops_per_token=flops, writes=frozenset()
    )


def _ready(model: nn.Module, operation: str, n: int) -> LM:
    if n < 1:
        raise WrongValue(f"{n} tokens were found; expected 1 or more.", value=n)
    lm = require_lm(model, operation)
    for name, module in (("embedding", lm.embedding), ("head", lm.head)):
        if module is not None and slot_of(module) is not None:
            raise refused(operation, f"{name} has a slot, whose seed knows the vocabulary as it is")
    return lm


def _of(operation: str, n: int) -> Any:
    return lambda model: OPERATORS[operation](model, {"n": n})


def _extend(model: nn.Module, fields: Mapping[str, Any]) -> Applied:
    lm = require_lm(model, EXTEND)
    n_old = lm.embedding.weight.shape[0]
    places: Places = (appended(n_old, n_old + fields["n"]), None)
    carries = _resized(lm, places)
    with torch.no_grad():
        for module in (lm.embedding, lm.head):
            if module is not None:
                module.weight[n_old:] = module.weight[:n_old].mean(dim=0)
    lm.n_masked += fields["n"]
    return Applied(record(lm, Change(EXTEND, dict(fields))), carries)


def _activate(model: nn.Module, fields: Mapping[str, Any]) -> Applied:
    lm = require_lm(model, ACTIVATE)
    lm.n_masked -= fields["n"]
    return Applied(record(lm, Change(ACTIVATE, dict(fields))))


def _shrink(model: nn.Module, fields: Mapping[str, Any]) -> Applied:
    lm = require_lm(model, SHRINK)
    places: Places = (torch.arange(lm.embedding.weight.shape[0] - fields["n"], device="cpu"), None)
    carries = _resized(lm, places)
    lm.n_masked = max(0, lm.n_masked - fields["n"])
    last = recorded(lm)[-1:]
    undoes = last[0] if last == (Change(EXTEND, dict(fields)),) else None
    return Applied(record(lm, Change(SHRINK, dict(fields)), undoes=undoes), carries)


def _resized(lm: LM, places: Places) -> dict[str, Carry]:
    carries = {}
    for name, module in (("embedding", lm.embedding), ("head", lm.head)):
        if module is not None:
            resize(module, "weight", places)
            carries[f"{name}.weight"] = Carry(f"{name}.weight", places)
    return carries


OPERATORS: Final = {EXTEND: _extend, ACTIVATE: _activate, SHRINK: _shrink}
changes.register(EXTEND, lambda model, fields: _extend(model, fields).model)
changes.register(ACTIVATE, lambda model, fields: _activate(model, fields).model)
changes.register(SHRINK, lambda model, fields: _shrink(model, fields).model)
