"""Changes of structure that a model went through after it was built: the log that rebuilds it from its settings.

A model that was changed is no longer the one that its settings describe. Its checkpoints hold this log too, and
``models.build`` makes the changes again, in order, before any weight is put back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from torch import nn

from meristem.errors import CheckpointMismatch
from meristem.plugins import Registry


@dataclass(frozen=True)
class Change:
    """One change. name: a registered one. fields: the plain values that it was made with."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)


Topology: TypeAlias = tuple[Change, ...]
"""Changes in the order in which they were made."""

changes: Registry[Callable[[nn.Module, Mapping[str, Any]], nn.Module]] = Registry("change", {})
"""Makers of changes: the model before and the fields -> the model after, which may be the same object.

A change gives the shapes alone; what the weights are is put back afterwards.
"""


LOG: Final = "operations"
"""The attribute of a model that was operated on: the changes that are not slots and seeds, in order."""


def recorded(model: nn.Module) -> Topology:
    """The operations that a model went through, as inserted blocks; slots and seeds are read off the model."""
    found: Topology = getattr(model, LOG, ())
    return found


def record(model: nn.Module, change: Change, *, undoes: Change | None = None) -> nn.Module:
    """The model, with one operation more in its log; or with one less, where the last one is what this undoes."""
    before = recorded(model)
    setattr(model, LOG, before[:-1] if undoes and before[-1:] == (undoes,) else (*before, change))
    return model


def changed(model: nn.Module, topology: Topology) -> nn.Module:
    """The model after all changes of the log. CheckpointMismatch names one that is not known."""
    for change in topology:
        if change.name not in changes.names():
            raise CheckpointMismatch(
                f"the model went through a change of structure '{change.name}', which this meristem does not know; it "
                f"knows {', '.join(changes.names()) or 'none'}. Use the version, or install the plugin, that made it.",
                change=change.name,
            )
        model = changes.get(change.name)(model, change.fields)
    return model


def to_json(topology: Topology) -> list[dict[str, Any]]:
    """Plain values for a checkpoint."""
    return [{"name": change.name, "fields": dict(change.fields)} for change in topology]


def from_json(saved: Sequence[Mapping[str, Any]]) -> Topology:
    """What ``to_json`` wrote; a change without fields may leave them out."""
    return tuple(Change(str(each["name"]), dict(each.get("fields", {}))) for each in saved)
