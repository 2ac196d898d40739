"""The trackers that ``sinks.use`` names, ready to follow a run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from meristem.errors import MissingExtra, PluginError, SinkError, WrongValue
from meristem.events import Emit, Event
from meristem.extras import require as require_library
from meristem.plugins import Registry
from meristem.sinks.trackers.follow import Followed, Follower, Tracker

trackers: Final[Registry[Callable[[Followed], Tracker]]] = Registry(
    "sink",
    {
        "tensorboard": "meristem.sinks.trackers.board:TensorBoard",
        "mlflow": "meristem.sinks.trackers.flow:MLflow",
        "wandb": "meristem.sinks.trackers.wandb:WandB",
    },
)

OPTIONAL: Final = "?"
"""After the name of a tracker that the run does without where it cannot be had."""


def require(use: Sequence[str], places: Mapping[str, str]) -> None:
    """Refuse names of no tracker, and trackers whose library is not installed, before anything is made.

    Raises WrongValue, or MissingExtra with the command that installs it.
    """
    names = [text.removesuffix(OPTIONAL) for text in use]
    for name in [name for name in names if names.count(name) > 1] + [name for name in places if name not in names]:
        raise WrongValue(
            f"sinks.use is {list(use)} and sinks.places has {sorted(places)}: name '{name}' once in sinks.use.",
            value=name,
        )
    for text, name in zip(use, names, strict=True):
        if name not in trackers.names():
            trackers.get(name)  # which raises, with the nearest names
        if text == name:
            _require_library(name)


def followers(use: Sequence[str], run: Followed, places: Mapping[str, str], emit: Emit) -> dict[str, Follower]:
    """A sink for each. One with ``?`` that cannot be had is the event ``degraded``, else SinkError or MissingExtra."""
    found: dict[str, Follower] = {}
    for text in use:
        name = text.removesuffix(OPTIONAL)
        try:
            _require_library(name)
            found[name] = _follower(name, run, places.get(name))
        except (MissingExtra, PluginError, SinkError) as error:
            if text == name:
                raise
            emit(Event("degraded", {"what": f"sink {name}", "reason": str(error)}, "warning"))
    return found


def _follower(name: str, run: Followed, place: str | None) -> Follower:
    make = trackers.get(name)
    try:
        return Follower(run.directory, make(Followed(**{**vars(run), "place": place})))
    except Exception as cause:  # foreign code may raise anything
        raise SinkError(
            f"the sink '{name}' cannot start: {type(cause).__name__}: {_first_line(cause)}. Mend that, or write "
            f"'{name}?' in sinks.use to go on without it.",
            sink=name,
        ) from cause


def _first_line(cause: Exception) -> str:
    return str(cause).strip().partition("\n")[0].rstrip(".")


def _require_library(name: str) -> None:
    is_ours = any(origin.is_ours for origin in trackers.origins() if origin.name == name)
    if is_ours:
        require_library(name, f"sinks.use={name}", f"Or write '{name}?' to go on without it.")
