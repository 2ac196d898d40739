"""The slots and seeds of a model as plain values, from which the grown model is built again (growth.md 11.4).

The log is read off the model: it cannot differ from what is there. Weights are not in it; they are in the state dict.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from meristem.errors import CheckpointCorrupt, CheckpointMismatch, MeristemError, WrongValue
from meristem.growth.attach import attach, find_slot, slots_in, strip
from meristem.growth.graft import build, seeds_in
from meristem.growth.seed import Origin
from meristem.models.topology import Change, Topology, changed, changes, from_json
from meristem.models.topology import to_json as listed
from meristem.nn.slot import CHILD

VERSION: Final = 1


def topology(model: nn.Module) -> Topology:
    """The changes that make the grown model of its host: every slot, then every seed.

    For a model of ours it is the last argument of ``models.build.build``, and what a run keeps as its topology.
    """
    slots = [
        Change("slot", {"name": name, "reads": slot.reads, "width": slot.widths[1], "layout": slot.layout})
        for name, slot in slots_in(model).items()
    ]
    return (*slots, *(Change("seed", {"slot": name, **vars(seed.origin)}) for name, seed in seeds_in(model).items()))


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
    if slots_in(model):
        raise WrongValue(
            f"the model has the slots {', '.join(slots_in(model))} already; a log is replayed on a host without any. "
            f"Strip it first.",
            value=list(slots_in(model)),
        )
    body = {key: saved.get(key) for key in ("version", "host", "changes")}
    if saved.get("sha256") != _digest(body) or not isinstance(body["changes"], list):
        raise CheckpointCorrupt(
            "the topology log is broken: it is not what its checksum was made of. Take another copy, or the checkpoint "
            "before it."
        )
    if body["version"] != VERSION or body["host"] != _host(model):
        what = f"version {body['version']}" if body["version"] != VERSION else "a host with other weights"
        raise CheckpointMismatch(
            f"the topology log is of {what}; expected version {VERSION} and a host whose parameters have the names and "
            f"shapes of this one. Build the host that the log was made with.",
            found=body["host"],
            expected=_host(model),
        )
    try:
        return changed(model, from_json(body["changes"]))
    except MeristemError:
        strip(model)
        raise


def _slot(model: nn.Module, fields: Mapping[str, Any]) -> nn.Module:
    return attach(model, fields["name"], reads=fields["reads"], width=fields["width"], layout=fields["layout"])


def _seed(model: nn.Module, fields: Mapping[str, Any]) -> nn.Module:
    origin = {name: value for name, value in fields.items() if name != "slot"}
    place = find_slot(model, fields["slot"])
    place.seed = build(model, place, Origin(**origin))
    return model


changes.register("slot", _slot)
changes.register("seed", _seed)


def _host(model: nn.Module) -> str:
    """What tells one host from another: names, shapes and nothing else."""
    shapes = [
        [name, list(tensor.shape)] for name, tensor in model.state_dict().items() if f".{CHILD}." not in f".{name}"
    ]
    return _digest(shapes)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
