"""Parameters that stay in float32 whatever a model is cast to: first memories, and what makes the gates of memories."""

from collections.abc import Callable
from itertools import chain
from typing import Self

from torch import Tensor, nn

from meristem.nn.token_pooling import wide


class KeepsFloat32(nn.Module):
    """A module of which some parameters and buffers are never narrower than float32.

    ``.to(dtype)``, ``.bfloat16()`` and ``.half()``, of the module or of a model around it, move them to another device
    and leave them in float32; ``.double()`` makes them float64.

    float32: names of its own parameters, buffers or children.
    """

    float32: frozenset[str] = frozenset()

    def kept(self) -> list[Tensor]:
        """What stays."""
        named = chain(self.named_parameters(), self.named_buffers())
        return [tensor for name, tensor in named if name.split(".")[0] in self.float32]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Torch's one way to every cast and move: it calls fn with each parameter, buffer and gradient.
        kept = {id(each) for tensor in self.kept() for each in (tensor, tensor.grad)}
        return super()._apply(lambda tensor: _no_narrower(fn, tensor) if id(tensor) in kept else fn(tensor), recurse)


def float32_ids(model: nn.Module) -> set[int]:
    """The ids of the parameters and buffers of a model that stay in float32."""
    return {id(each) for module in model.modules() if isinstance(module, KeepsFloat32) for each in module.kept()}


def _no_narrower(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    made = fn(tensor)
    wanted = wide(made.dtype)
    return made if made.dtype == wanted else tensor.to(device=made.device, dtype=wanted)
