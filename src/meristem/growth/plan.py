"""What a change of structure would do, found out on a copy that has shapes only (growth.md 11.1).

receipt = transaction(model, optimizer, plan_graft(model, "blocks.1", "low_rank", rank=4), probe, rebuild=rebuild)
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from meristem.growth.attach import find_slot, require_unwrapped
from meristem.growth.graft import cost_in, find_seed, graft, remove
from meristem.growth.seed import Origin, Seed
from meristem.growth.topology import topology, without_numbers
from meristem.models.topology import Topology, to_json
from meristem.optim.surgery import Places

Preserves: TypeAlias = Literal["exact", "rounding", "nothing"]
"""How a change leaves what the model computes: the same numbers, the same but for rounding, or something else."""

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

EVERYTHING: Final = frozenset({"*"})
"""Of ``Plan.writes``: any tensor may be written into."""


@dataclass(frozen=True)
class Carry:
    """What a parameter goes on from: the one that was called ``source``, and where its entries are now.

    beside: other parameters whose entries stand at fresh places, and where: their moments do too.
    """

    source: str
    places: Places = ()
    beside: Mapping[str, Places] = field(default_factory=dict)


class Applied(NamedTuple):
    """The model after a change, and by its name there, what became of every parameter with another name or shape."""

    model: nn.Module
    carries: Mapping[str, Carry] = MappingProxyType({})


Apply: TypeAlias = Callable[[nn.Module], Applied]
"""Makes a change in place."""


@dataclass(frozen=True)
class Plan:
    """One change of structure before it is made: plain values, and ``apply``, which makes it in place.

    fields: what it is about, for records. before, after: every saved tensor's name with its shape.
    n_parameters, size_bytes, flops_per_token: what is added, negative where it is taken away; FLOPs of matrix products
    per token and forward pass, None where they are not known.
    topology: the whole log of the model afterwards. carries: by the new name, parameters that had another name or
    shape; every other of an old name goes on as it is. writes: names of tensors that are written in place.
    """

    operation: str
    fields: Mapping[str, Any]
    apply: Apply
    before: Shapes
    after: Shapes
    n_parameters: int
    size_bytes: int
    flops_per_token: float | None
    preserves: Preserves
    topology: Topology
    carries: Mapping[str, Carry] = field(default_factory=dict)
    writes: frozenset[str] = EVERYTHING

    @property
    def digest(self) -> str:
        """A hash of all that the plan says; the same in every process that plans the same for the same model."""
        said = [self.operation, sorted(self.fields.items()), self.after, to_json(self.topology), self.preserves]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def sources(self) -> dict[str, Carry]:
        """By the name afterwards, what every tensor that is not new goes on from."""
        taken = {carry.source for carry in self.carries.values()}
        same = {name: Carry(name) for name in self.after if name in self.before and name not in taken}
        return same | {name: carry for name, carry in self.carries.items() if name in self.after}

    @property
    def added(self) -> list[str]:
        """Names of what is new."""
        sources = self.sources
        return [name for name in self.after if name not in sources]

    @property
    def removed(self) -> list[str]:
        """Names of what nothing goes on from."""
        taken = {carry.source for carry in self.sources.values()}
        return [name for name in self.before if name not in taken]

    @property
    def resized(self) -> list[str]:
        """Names, afterwards, of what has another shape."""
        return [name for name, carry in self.sources.items() if self.before[carry.source] != self.after[name]]


def draft(
    model: nn.Module,
    operation: str,
    fields: Mapping[str, Any],
    apply: Apply,
    *,
    preserves: Preserves,
    shapes: Apply | None = None,
    flops_per_token: float | None = None,
    writes: frozenset[str] = EVERYTHING,
) -> Plan:
    """The plan of a change, which is tried on a copy of the model without numbers; the model is not touched.

    apply: makes the change in place; where it needs numbers, ``shapes`` makes it for the copy.
    Raises what ``apply`` raises, and CapabilityError for a model that is wrapped or cannot be copied.
    """
    require_unwrapped(model)
    twin = without_numbers(model)
    before, was = shapes_of(twin), _size(twin)
    with torch.device("meta"):
        after, carries = (shapes or apply)(twin)
    now = _size(after)
    return Plan(
        operation,
        dict(fields),
        apply,
        before,
        shapes_of(after),
        n_parameters=now[0] - was[0],
        size_bytes=now[1] - was[1],
        flops_per_token=flops_per_token,
        preserves=preserves,
        topology=topology(after),
        carries=carries,
        writes=writes,
    )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name to shape of all that is saved of a model."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def plan_graft(
    model: nn.Module, slot: str, seed: str | Seed, *, blend: str = "residual", random_seed: int = 0, **settings: Any
) -> Plan:
    """The plan of ``graft`` with the same arguments; raises what that raises."""
    if isinstance(seed, Seed):
        origin = seed.origin
    else:
        origin = Origin.of(seed, settings, blend=blend, random_seed=random_seed)
    priced = cost_in(model, find_slot(model, slot), origin)

    def apply(host: nn.Module) -> Applied:
        graft(host, slot, seed, blend=blend, random_seed=random_seed, **settings)
        return Applied(host)

    fields = {"slot": slot, "blueprint": origin.blueprint}
    # A seed that was removed goes on blending where it stood: it may add something.
    preserves: Preserves = "nothing" if isinstance(seed, Seed) and seed.is_live else "exact"
    flops = priced.flops_per_token
    return draft(model, "graft", fields, apply, preserves=preserves, flops_per_token=flops, writes=frozenset())


def plan_remove(model: nn.Module, slot: str) -> Plan:
    """The plan of ``remove``. It preserves nothing but where the seed is switched off; raises what that raises."""
    seed = find_seed(model, slot)

    def apply(host: nn.Module) -> Applied:
        remove(host, slot)
        return Applied(host)

    fields = {"slot": slot, "blueprint": seed.origin.blueprint}
    preserves: Preserves = "nothing" if seed.is_live and not seed.is_capped else "exact"
    flops = -flops_of(model, slot, seed)
    return draft(model, "remove", fields, apply, preserves=preserves, flops_per_token=flops, writes=frozenset())


def flops_of(model: nn.Module, slot: str, seed: Seed) -> float:
    """FLOPs per token of a seed of that slot."""
    return cost_in(model, find_slot(model, slot), seed.origin).flops_per_token


def _size(model: nn.Module) -> tuple[int, int]:
    """Numbers that it learns, and bytes of parameters and buffers."""
    held: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(each.numel() for each in model.parameters()), sum(each.numel() * each.element_size() for each in held)
