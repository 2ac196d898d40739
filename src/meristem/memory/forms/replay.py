"""Unfinished chunks as meristem saved them up to e97c871, made into those of today."""

from typing import Any

import torch

from meristem.memory.forms import forms
from meristem.memory.forms.tnt import LOCAL_CHUNK
from meristem.memory.gates import Gates
from meristem.memory.rule import Rule
from meristem.memory.state import Memory, State


def replayed(state: State, rule: Rule, *, form: str, chunk: int) -> State:
    """The same state with every unfinished chunk in it as ``by_chunk`` carries them now; today's stay as they are.

    Until then a chunk carried the memory at its start and the keys, values and gates of its tokens. These are written
    again, from the start; what is outside ``unfinished`` keeps its bits.

    state: of one memory, of a layer or of a whole model whose memories share one rule, form and chunk.
    form: the name of a form that leaves chunks unfinished, not ``auto``.
    """
    after = {
        name: replayed(inner, rule, form=form, chunk=chunk)
        if isinstance(inner, dict) and name != "unfinished"
        else inner
        for name, inner in state.items()
    }
    carried = after.get("unfinished")
    if carried is None:
        return after
    if "keys_bthk" in carried:
        return after | {"unfinished": _written_again(carried, rule, form, chunk)}
    if form == "tnt":
        start = {name: carried["start"][name] for name in rule.structure.weights}
        local = replayed(carried["local"], rule, form="frozen_chunk", chunk=min(LOCAL_CHUNK, chunk))
        return after | {"unfinished": carried | {"start": start, "local": local}}
    return after


def _written_again(carried: State, rule: Rule, form: str, chunk: int) -> State:
    keys_bthk = _as_wide_as(rule, carried["start"], carried["keys_bthk"])
    inputs = keys_bthk, carried["values_bthv"], torch.zeros_like(keys_bthk)
    mapped = rule.without_features()
    _, memory = forms.get(form).run(mapped, carried["start"], *inputs, Gates(**carried["gates"]), chunk=chunk)
    unfinished: Any = memory["unfinished"]
    return dict(unfinished)


def _as_wide_as(rule: Rule, memory: Memory, keys_bthk: torch.Tensor) -> torch.Tensor:
    """Keys without the channels that ``nn.memory_cache`` joined to them, in souped memories of networks and slots."""
    if rule.structure.kind in ("matrix", "vector"):
        return keys_bthk
    name = rule.structure.weights[0]
    return keys_bthk[..., : memory[name].shape[name.rpartition("_")[2].index("k")]]
