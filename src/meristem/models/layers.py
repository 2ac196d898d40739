"""What each layer of a stack is, and the five ways in which layers with levels are deployed together."""

from collections.abc import Callable, Iterator
from typing import Final

from meristem.errors import ConflictingKeys
from meristem.models.config import READS, ModelConfig
from meristem.nn.config import LevelsConfig, MemoryConfig


def of_layer(model: ModelConfig, memory: MemoryConfig, layer: int) -> tuple[ModelConfig, MemoryConfig]:
    """The settings as one layer sees them."""
    own = model.of_layer(layer)
    in_model: dict[str, object] = {"mixer": own.mixer or model.mixer}
    in_memory: dict[str, object] = own.model_dump(include={"rule", "retention"}, exclude_none=True)
    if own.periods is not None:
        of_levels = {"count": len(own.periods), "periods": own.periods}
        if model.mlp == "levels":
            in_model["levels"] = type(model.levels).model_validate(model.levels.model_dump() | of_levels)
        else:
            in_memory["levels"] = LevelsConfig.model_validate(memory.levels.model_dump() | of_levels)
    return model.model_copy(update=in_model), memory.model_copy(update=in_memory)


MEMORY_KEYS: Final = {
    "attention": frozenset[str](),
    "self_reference": frozenset({"head_dim", "conv", "self_reference"}),
    **dict.fromkeys(("mag", "mac", "mal", "memory"), frozenset(MemoryConfig.model_fields) - {"self_reference"}),
}
"""What each of our mixers reads of the settings of memories; a plugin's mixer may read any."""


def memory_keys(model: ModelConfig) -> frozenset[str]:
    """The settings of memories that some layer of the model reads."""
    every = frozenset(MemoryConfig.model_fields)
    if model.name != "lm":
        return frozenset() if model.name in READS else every
    return frozenset().union(*(MEMORY_KEYS.get(mixer, every) for mixer in model.mixers))


def require_pattern(model: ModelConfig, memory: MemoryConfig, optimizer: str) -> None:
    """Raises ConflictingKeys with all reasons why the layers do not follow ``model.pattern``.

    optimizer: its kind. The patterns are those of Nested Learning 2512.24695 as memory.md 6.9 validates them.
    """
    if model.pattern is None:
        return
    asked = PATTERNS[model.pattern]
    reasons = list(asked(model, memory, optimizer))
    if reasons:
        raise ConflictingKeys(
            f"model.pattern is '{model.pattern}': {asked.__doc__} Here {'; '.join(reasons)}. Change these, or set "
            f"model.pattern to null.",
            path="model.pattern",
            reasons=reasons,
        )


def _basic(model: ModelConfig, memory: MemoryConfig, optimizer: str) -> Iterator[str]:
    """one layer."""
    if model.n_layers != 1:
        yield f"model.n_layers is {model.n_layers}"


def _nested(model: ModelConfig, memory: MemoryConfig, optimizer: str) -> Iterator[str]:
    """each layer is stepped by an m3 of its own speed."""
    if optimizer != "m3":
        yield f"optim.name is '{optimizer}'"
    silent = [str(layer) for layer in range(model.n_layers) if model.of_layer(layer).m3_every is None]
    if silent:
        yield f"m3_every is not given for the layers {', '.join(silent)}"


def _sequential(model: ModelConfig, memory: MemoryConfig, optimizer: str) -> Iterator[str]:
    """no layer has fewer levels than the one below it."""
    counts = [len(periods) for periods in _periods(model, memory)]
    for layer, (below, above) in enumerate(zip(counts, counts[1:], strict=False), start=1):
        if above < below:
            yield f"layer {layer} has {above} levels above one with {below}"


def _independent(model: ModelConfig, memory: MemoryConfig, optimizer: str) -> Iterator[str]:
    """layers stand side by side, each with periods of its own."""
    if model.aggregate == "stack":
        yield "model.aggregate is 'stack'"
    silent = [str(layer) for layer in range(model.n_layers) if model.of_layer(layer).periods is None]
    if silent:
        yield f"periods are not given for the layers {', '.join(silent)}"
    if len(set(_periods(model, memory))) < 2:
        yield "all layers have the same periods"


def _hybrid(model: ModelConfig, memory: MemoryConfig, optimizer: str) -> Iterator[str]:
    """some layers have levels, and others are plain attention."""
    has_levels = [len(periods) > 1 for periods in _periods(model, memory)]
    if not any(has_levels):
        yield "no layer has more than one level"
    plain = [mixer == "attention" and not levels for mixer, levels in zip(model.mixers, has_levels, strict=True)]
    if not any(plain):
        yield "no layer is plain attention without levels"


PATTERNS: Final[dict[str, Callable[[ModelConfig, MemoryConfig, str], Iterator[str]]]] = {
    "basic": _basic,
    "nested": _nested,
    "sequential": _sequential,
    "independent": _independent,
    "hybrid": _hybrid,
}


def _periods(model: ModelConfig, memory: MemoryConfig) -> list[tuple[int, ...]]:
    """The periods of the levels of every layer, the lowest layer first; one period where it has no levels."""
    found = []
    for layer in range(model.n_layers):
        in_model, in_memory = of_layer(model, memory, layer)
        if in_model.mlp == "levels":
            found.append(in_model.levels.all_periods)
        else:
            found.append((1,) if in_model.mixer == "attention" else in_memory.levels.all_periods)
    return found
