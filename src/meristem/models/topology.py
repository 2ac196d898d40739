"""Changes of structure that a model went through after it was built: the log that rebuilds it from its settings.

A model that was changed is no longer the one that its settings describe. Its checkpoints hold this log too, and
``models.build`` makes the changes again, in order, before any weight is put back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

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
