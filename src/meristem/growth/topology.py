"""The slots and seeds of a model as plain values, from which the grown model is built again (growth.md 11.4).

The log is read off the model: it cannot differ from what is there. Weights are not in it; they are in the state dict.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from itertools import chain
from typing import Any, Final

import torch
from torch import nn

from meristem.errors import CapabilityError, CheckpointCorrupt, CheckpointMismatch, WrongValue
from meristem.growth.attach import attach, find_slot, slots_in
from meristem.growth.graft import build, seeds_in
from meristem.growth.seed import Origin
from meristem.growth.settle import settle, settled_in
from meristem.models.topology import Change, Topology, changed, changes, from_json, recorded
from meristem.models.topology import to_json as listed
from meristem.nn.slot import CHILD

VERSION: Final = 1

PLACED: Final = ("slot", "settled", "seed")
"""Changes that are read off the model, and come after its operations."""


def topology(model: nn.Module) -> Topology:
    """The changes that make the grown model of its host: operations, slots, what is settled in them, and seeds.

    For a model of ours it is the last argument of ``models.build.build``, and what a run keeps as its topology.
    """
    slots = [
        Change("slot", {"name": name, "reads": slot.reads, "width": slot.widths[1], "layout": slot.layout})
        for name, slot in slots_in(model).items()
    ]
    settled = (
        Change("settled", {"slot": name, **vars(seed.origin)})
        for name, seeds in settled_in(model).items()
        for seed in seeds
    )
    seeds = (Change("seed", {"slot": name, **vars(seed.origin)}) for name, seed in seeds_in(model).items())
    return (*recorded(model), *slots, *settled, *seeds)


def to_json(model: nn.Module) -> dict[str, Any]:
    """The log as JSON values, with the host it belongs to and a checksum."""
    body = {"version": VERSION, "host": _host(model), "changes": listed(topology(model))}
    return body | {"sha256": _digest(body)}


def replay(model: nn.Module, saved: Mapping[str, Any]) -> nn.Module:
    """Grow a host, in place, as the log of another says; weights are put back by ``load_state_dict`` afterwards.

    saved: what ``to_json`` gave. Raises CheckpointCorrupt for a log that is broken, CheckpointMismatch for one of
    another host or that this version does not know, WrongValue for a model that has grown already; the host is
    untouched then.
    """
    if slots_in(model) or recorded(model):
        has = ", ".join([*slots_in(model), *(change.name for change in recorded(model))])
        raise WrongValue(
            f"the model has grown already ({has}); a log is replayed on a host that has not. Strip it first, or build "
            f"it anew.",
            value=has,
        )
    body = {key: saved.get(key) for key in ("version", "host", "changes")}
    if saved.get("sha256") != _digest(body) or not isinstance(body["changes"], list):
        raise CheckpointCorrupt(
            "the topology log is broken: it is not what its checksum was made of. Take another copy, or the checkpoint "
            "before it."
        )
    found = f"version {body['version']}"
    if body["version"] == VERSION:
        log = from_json(body["changes"])
        operations = tuple(change for change in log if change.name not in PLACED)
        twin = without_numbers(model)
        with torch.device("meta"):
            is_host = body["host"] == _host(changed(twin, operations))
            if is_host:
                changed(twin, log[len(operations) :])
        if is_host:
            return changed(model, log)
        found = "a host with other weights"
    raise CheckpointMismatch(
        f"the topology log is of {found}; expected version {VERSION} and a host whose parameters have the names and "
        f"shapes of this one. Build the host that the log was made with.",
        found=body["host"],
        expected=_host(model),
    )


def _slot(model: nn.Module, fields: Mapping[str, Any]) -> nn.Module:
    return attach(model, fields["name"], reads=fields["reads"], width=fields["width"], layout=fields["layout"])


def _seed(model: nn.Module, fields: Mapping[str, Any]) -> nn.Module:
    origin = {name: value for name, value in fields.items() if name != "slot"}
    place = find_slot(model, fields["slot"])
    place.seed = build(model, place, Origin(**origin))
    return model


def _settled(model: nn.Module, fields: Mapping[str, Any]) -> nn.Module:
    settle(_seed(model, fields), fields["slot"])
    return model


changes.register("slot", _slot)
changes.register("settled", _settled)
changes.register("seed", _seed)


def without_numbers(model: nn.Module) -> nn.Module:
    """A copy of a model in shapes only, on ``meta``. Raises CapabilityError where it holds what cannot be copied."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        bare = tensor.detach().to("meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(bare, requires_grad=tensor.requires_grad) if is_parameter else bare
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as cause:
        raise CapabilityError(
            f"a change of structure is tried on a copy first, and {type(model).__name__} holds something that cannot "
            f"be copied: {cause}. Take it off the model, or give its class a __deepcopy__.",
            operation="grow",
            reason="no copy",
        ) from cause


def _host(model: nn.Module) -> str:
    """What tells one host from another: names and shapes of all but seeds, after all operations."""
    shapes = [
        [name, list(tensor.shape)] for name, tensor in model.state_dict().items() if f".{CHILD}." not in f".{name}"
    ]
    return _digest(shapes)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
