"""A seed: a layer in a slot with its blend, its blend weight, and where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, cast

import torch
from torch import Tensor

from meristem.errors import CheckpointMismatch
from meristem.growth.blend import blends
from meristem.growth.blueprint import Blueprint, blueprints
from meristem.growth.course import Course
from meristem.memory.state import State, rows_apart
from meristem.models.init import seeded
from meristem.nn.documents import Documents, ReadsDocuments, read_documents
from meristem.nn.precision import KeepsFloat32


@dataclass(frozen=True)
class Origin:
    """All that a seed is built from, in plain values: two seeds of one origin in slots of one name are equal.

    settings: every setting of the blueprint, defaults included. random_seed: first weights are drawn from a stream of
    it and the slot's name.
    """

    blueprint: str
    version: int
    settings: Mapping[str, Any]
    blend: str = "residual"
    random_seed: int = 0

    @classmethod
    def of(cls, blueprint: str, settings: Mapping[str, Any], *, blend: str, random_seed: int) -> Self:
        """Checked, with defaults. Raises WrongValue for a name that nobody knows, and what the settings raise."""
        found = blueprints.get(blueprint)
        blends.get(blend)
        settled = found.settle(settings).model_dump(mode="json")
        return cls(blueprint.casefold(), found.version, settled, blend.casefold(), random_seed)

    def described(self) -> Blueprint:
        """The blueprint. Raises CheckpointMismatch where it has another version by now."""
        found = blueprints.get(self.blueprint)
        if found.version != self.version:
            raise CheckpointMismatch(
                f"a seed was built from version {self.version} of the blueprint '{self.blueprint}'; this meristem has "
                f"version {found.version}. Use the version that made it.",
                found=found.version,
                expected=self.version,
            )
        return found


CAP: Final = 0.1
"""Largest addition of a seed that learns capped, by the size of the hidden vector: with half of it the seed drifts, as
it never sees what it does (growth.md 2)."""


class Seed(KeepsFloat32):
    """What stands in a slot: ``h + alpha blend(h, layer(x))``, and nothing at all where alpha is 0.

    blend_weight: alpha, a buffer without axes in float32, so that a compiled model is not compiled anew when it
    changes. course: where alpha stands on its way, saved beside it. is_live: whether the layer is called at all.
    is_capped: alpha is 0, and the seed learns as if ``CAP`` bounded what it adds; what comes out is ``h``.
    """

    float32 = frozenset({"blend_weight", "course"})
    blend_weight: Tensor
    course: Tensor

    def __init__(self, origin: Origin, widths: tuple[int, int], slot: str) -> None:
        """widths: of what it reads and of what it adds to. slot: the name of its slot."""
        super().__init__()
        found = origin.described()
        self.origin, self.slot, self.widths, self.has_state = origin, slot, widths, found.has_state
        with seeded(origin.random_seed, f"growth.{slot}"):
            self.layer = found.build(widths, found.settle(origin.settings))
            self.blend = blends.get(origin.blend)(widths[1])
        self.register_buffer("blend_weight", torch.ones(()))
        self.register_buffer("course", Course(1.0, 1.0).to_tensor())
        self.is_live, self.is_capped, self._learns_capped = True, False, False

    def forward(
        self, host: Tensor, read: Tensor, state: State | None, documents: Documents | None
    ) -> tuple[Tensor, State]:
        """The hidden vectors with what the seed adds, and the state that it leaves; {} of a layer without one.

        host, read: ``(b, t, d)``, what is added to and what is read. state: None begins one.
        """
        after: State = {}
        # Of a host that is to stay what it is the seed gets no graph: it learns alone.
        read, onto = (read.detach(), host.detach()) if self.is_capped else (read, host)
        if not self.has_state:
            delta_btd = self.layer(read)
        elif documents is None:
            delta_btd, after = self._carry(read, state)
        elif isinstance(self.layer, ReadsDocuments):
            delta_btd, after = self.layer.forward_documents(read, state, documents)
        else:
            delta_btd, after = read_documents(self._carry, read, state, documents)
        weight = torch.ones_like(self.blend_weight) if self.is_capped else self.blend_weight
        added_btd = self.blend(onto, delta_btd.to(host.dtype), weight)
        if self.is_capped:
            return cast(Tensor, _Straight.apply(host, _capped(added_btd, onto))), after
        return host + added_btd.to(host.dtype), after

    @rows_apart
    def _carry(self, read: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        found: tuple[Tensor, State] = self.layer(read, state or None)
        return found

    @property
    def way(self) -> Course:
        """Where the blend weight stands."""
        return Course.from_tensor(self.course)

    @torch.no_grad()
    def follow(self, course: Course) -> None:
        """Stand where ``course`` says."""
        self.course.copy_(course.to_tensor())
        weight = self.way.weight
        self.blend_weight.fill_(weight)
        self.is_capped = self._learns_capped and weight == 0
        self.is_live = weight > 0 or self.is_capped

    def learn_capped(self, is_capped: bool) -> None:
        """From here on it does, wherever alpha is 0, or no longer does. It is not saved: whoever trains says it."""
        self._learns_capped = is_capped
        self.follow(self.way)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        weighs = self.blend_weight.is_meta or bool(self.blend_weight > 0)
        self.is_capped = self._learns_capped and not weighs
        self.is_live = weighs or self.is_capped

    def extra_repr(self) -> str:
        return f"{self.origin.blueprint}, blend={self.origin.blend}"


class _Straight(torch.autograd.Function):
    """``h`` itself, whose gradient is that of what would be added as well, whatever numbers that holds."""

    @staticmethod
    def forward(ctx: Any, host_btd: Tensor, added_btd: Tensor) -> Tensor:
        return host_btd.clone()

    @staticmethod
    def backward(ctx: Any, gradient_btd: Tensor) -> tuple[Tensor, Tensor]:
        return gradient_btd, gradient_btd


def _capped(added_btd: Tensor, host_btd: Tensor) -> Tensor:
    """``a min(1, CAP |h| / |a|)`` for each token, in the precision of the host."""
    size_bt1 = added_btd.float().norm(dim=-1, keepdim=True)
    most_bt1 = CAP * host_btd.float().norm(dim=-1, keepdim=True)
    is_over_bt1 = size_bt1 > most_bt1
    # An addition of zero, as a seed's at first, is not divided by its size: that would have no gradient.
    scale_bt1 = torch.where(is_over_bt1, most_bt1 / torch.where(is_over_bt1, size_bt1, 1.0), 1.0)
    return (added_btd * scale_bt1).to(host_btd.dtype)
