"""What happened, as frozen records, and the one way to say it.

There is no global run and no callback list: the recipe builds an ``Emit`` from its record streams and passes it down.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["debug", "info", "warning", "error", "critical"]


@dataclass(frozen=True)
class Event:
    """One thing that happened. ``payload`` holds plain JSON values."""

    name: str
    payload: Mapping[str, object] = field(default_factory=dict)
    severity: Severity = "info"


Emit = Callable[[Event], None]


def silent(event: Event) -> None:
    """Drop the event: for callers that keep no record, as in a notebook."""
