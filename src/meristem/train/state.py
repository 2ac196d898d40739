"""What training changes, as one value in one place: whoever needs a part of it takes it from there when it is needed.

held.state = replace(held.state, model=larger, optimizer=its_optimizer, engine=its_engine, topology=log_with_the_change)

After that assignment the next step, snapshot, checkpoint, record and rollback are those of the new model. So nobody
keeps a model, an optimizer or an engine from one step to the next.
"""

from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import nn

from meristem.distributed.engine import Engine, alone
from meristem.models.topology import Topology
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.train.progress import Progress


class Saved(Protocol):
    """A value that is saved as plain ones."""

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class TrainingState:
    """A run at one moment, between two steps.

    engine: how ``model`` is called so that its gradients are those of all processes.
    topology: every change of structure that ``model`` went through since it was built from its settings.
    garden: what is known of its growth (``growth.garden``), saved and brought back with all else; None of a run that
        does not grow.
    """

    model: nn.Module
    optimizer: MultiPeriodOptimizer
    engine: Engine
    progress: Progress
    topology: Topology = ()
    garden: Saved | None = None


class Holder(Protocol):
    """Whatever has the state of a training. It is replaced by assignment, and only between two steps."""

    state: TrainingState


@dataclass
class Held:
    """A state by itself."""

    state: TrainingState

    @classmethod
    def alone(cls, model: nn.Module, optimizer: MultiPeriodOptimizer, start: Progress) -> Self:
        """The state of a single process, in which the model is called as it is."""
        return cls(TrainingState(model, optimizer, alone(model), start))
