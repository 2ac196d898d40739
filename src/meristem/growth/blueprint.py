"""What seeds can be built from: descriptions by name, made of plain values (growth.md 8)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError
from torch import nn

from meristem.config import ConfigSection
from meristem.config.mistakes import explain
from meristem.errors import ShapeError
from meristem.growth import layers
from meristem.nn.config import MemoryConfig
from meristem.plugins import Registry


@dataclass(frozen=True)
class Blueprint:
    """A frozen description. ``build(widths, settings)`` gives a module that turns hidden vectors into what a seed adds.

    build: widths are those of what is read and of what is added to. All that it builds adds zero at first, since its
        last projection is zero, and depends on no later token.
    settings: their names, defaults and bounds. version: changes when the same settings mean another module.
    has_state: ``forward(hidden_btd, state) -> (delta_btd, state)`` and not ``forward(hidden_btd) -> delta_btd``.
    is_square: both widths have to be the same.
    """

    build: Callable[[tuple[int, int], Any], nn.Module]
    settings: type[ConfigSection]
    version: int = 1
    has_state: bool = False
    is_square: bool = True

    def settle(self, given: Mapping[str, Any]) -> ConfigSection:
        """The settings with defaults. Raises UnknownKey or WrongValue with the nearest names, or the bounds."""
        try:
            return self.settings.model_validate(dict(given))
        except ValidationError as cause:
            raise explain(cause, self.settings, lambda path: "the blueprint's settings") from cause


class LowRankConfig(ConfigSection):
    """Of a low-rank addition."""

    rank: Annotated[int, Field(ge=1, le=4096, description="Numbers between the two projections.")] = 8


class NormConfig(ConfigSection):
    """Of a norm: it has no settings."""


class FeedforwardConfig(ConfigSection):
    """Of a feed-forward layer."""

    hidden: Annotated[int, Field(ge=1, le=262144, description="Width between the projections.")] = 64
    is_normed: Annotated[
        bool, Field(description="Whether it norms what it reads; false where that is normed, as the input of a layer.")
    ] = True


class ConvConfig(ConfigSection):
    """Of a causal convolution."""

    kernel: Annotated[int, Field(ge=2, le=64, description="Tokens that a channel sees, the present one included.")] = 4


class HeadsConfig(ConfigSection):
    """Of heads of attention, wherever they stand."""

    n_heads: Annotated[int, Field(ge=1, le=1024, description="Heads.")] = 2
    head_dim: Annotated[int, Field(ge=1, le=1024, description="Width of the keys of a head; even with rope.")] = 32
    sliding_window: Annotated[int | None, Field(ge=1, description="Keys that are seen; null for all before.")] = 64
    rope: Annotated[bool, Field(description="Rotary positions.")] = True


class AttentionConfig(HeadsConfig):
    """Of heads of attention."""

    is_normed: Annotated[
        bool,
        Field(description="Whether they norm what they read; false where that is normed, as the input of a layer."),
    ] = True


class BlockConfig(HeadsConfig):
    """Of attention and a gated feed-forward layer."""

    hidden: Annotated[int, Field(ge=1, le=262144, description="Width between the projections of the second.")] = 128


def _attention(widths: tuple[int, int], settings: AttentionConfig) -> nn.Module:
    sizes = settings.n_heads, settings.head_dim, settings.sliding_window
    return layers.attention(widths[1], *sizes, rope=settings.rope, is_normed=settings.is_normed)


def _block(widths: tuple[int, int], settings: BlockConfig) -> nn.Module:
    sizes = settings.n_heads, settings.head_dim
    return layers.block(widths[1], sizes, settings.sliding_window, rope=settings.rope, hidden=settings.hidden)


def _memory(widths: tuple[int, int], settings: MemoryConfig) -> nn.Module:
    if widths[1] % settings.head_dim:
        raise ShapeError(
            f"a memory with heads of {settings.head_dim} cannot fill the width {widths[1]} of its slot. Give it a "
            f"head_dim that divides {widths[1]}.",
            found=settings.head_dim,
            expected=widths[1],
        )
    return layers.memory(widths[1], settings)


blueprints: Registry[Blueprint] = Registry(
    "blueprint",
    {
        "low_rank": Blueprint(lambda w, s: layers.LowRank(*w, s.rank), LowRankConfig, is_square=False),
        "norm": Blueprint(lambda w, s: layers.norm(w[1]), NormConfig),
        "bottleneck": Blueprint(
            lambda w, s: layers.bottleneck(w[1], s.hidden, is_normed=s.is_normed), FeedforwardConfig
        ),
        "gated_feedforward": Blueprint(
            lambda w, s: layers.gated_feedforward(w[1], s.hidden, is_normed=s.is_normed), FeedforwardConfig
        ),
        "conv": Blueprint(lambda w, s: layers.Convolution(w[1], s.kernel), ConvConfig, has_state=True),
        "attention": Blueprint(_attention, AttentionConfig, has_state=True),
        "block": Blueprint(_block, BlockConfig, has_state=True),
        "memory": Blueprint(_memory, MemoryConfig, has_state=True),
    },
    accepts=lambda found: isinstance(found, Blueprint),
)
"""Blueprints by name; ``layers`` has what they build, with the cost of each."""
