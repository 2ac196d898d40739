"""Every model of the package at small sizes, different for different axes; the law tests run over it."""

import functools
from collections.abc import Iterator
from importlib import resources

import torch
from torch import nn

from meristem.config import preset_names, read_yaml
from meristem.memory.named import rules
from meristem.models.build import build, models
from meristem.models.config import ModelConfig
from meristem.models.lm import mixers
from meristem.nn.config import MemoryConfig

VOCABULARY = 29
N_TIME = 13

SMALL = {"dim": 12, "n_layers": 2, "n_heads": 2, "mlp_dim": 17, "sliding_window": 5, "max_seq_len": 23, "segment": 5}
SMALL_MEMORY = {"head_dim": 4, "chunk": 3}
KINDS = ("titans", "titans_mlp", "trellis")
"""A rule of each structure: a matrix, a network, slots. What holds of every rule is tested on the rule itself."""
SLOWER = [
    ({"mixer": "mac", "n_persistent_tokens": 3}, [1, 2, 3, 5], "each"),
    ({"mixer": "mal", "is_residual": False, "n_persistent_tokens": 3}, [1, 3], "each"),
    ({"mixer": "memory"}, [1, 2, 5], "pooled"),
]
"""Models, the periods of their memories, and which tokens the slower ones read."""
SMALL_CHUNKS = {"chunk_memory": 2, "chunk_other": 4}
SELF_REFERENCES = [
    {"setting": "static"},
    {"structure": "mlp", "setting": "adaptive", "loss": "squared", "adaptive_query": True},
]


def small(settings: dict[str, object]) -> ModelConfig:
    """The chosen model with the small sizes that it reads."""
    reads = ModelConfig.model_validate(settings).reads
    return ModelConfig.model_validate(settings | {key: size for key, size in SMALL.items() if key in reads})


def small_memory(settings: dict[str, object]) -> MemoryConfig:
    chosen = settings.get("self_reference", {})
    chunks = {"self_reference": dict(chosen) | SMALL_CHUNKS}
    return MemoryConfig.model_validate(settings | SMALL_MEMORY | chunks)


@functools.cache
def preset(name: str) -> dict[str, dict[str, object]]:
    """What a preset says about its model and memory, and where it is silent, what the one it builds on says."""
    text = (resources.files("meristem.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    tree = read_yaml(text)
    below = preset(tree["base"]) if "base" in tree else {"model": {}, "memory": {}}
    return {key: below[key] | tree.get(key, {}) for key in ("model", "memory")}


def _entries() -> Iterator[tuple[str, ModelConfig, MemoryConfig]]:
    alone = {name for rule in set(rules.names()) - set(KINDS) for name in (rule, f"lmm-{rule}")}
    presets = [name for name in preset_names() if name not in alone]
    for name in presets:
        yield f"preset-{name}", small(preset(name)["model"]), small_memory(preset(name)["memory"])
    for name in models.names():
        yield name, small({"name": name}), small_memory({})
    for mixer in sorted(set(mixers.names()) - {preset(name)["model"].get("mixer") for name in presets}):
        yield f"lm-{mixer}", small({"mixer": mixer}), small_memory({})
    for rule in KINDS:
        yield f"lm-memory-{rule}", small({"mixer": "memory"}), small_memory({"rule": rule})
    persistent = small({"mixer": "attention", "n_persistent_tokens": 3, "mlp": "gelu", "tied": True})
    yield "lm-persistent", persistent.model_copy(update={"sliding_window": None}), small_memory({})
    hybrid = [{"mixer": "memory", "rule": "yaad"}, {"mixer": "attention"}]
    yield "lm-hybrid-attention", small({"layers": hybrid, "aggregate": "attention"}), small_memory({})
    kept = {"rule": "titans_mlp", "form": "frozen_chunk", "cache": {"read": "soup", "length": 4}}
    yield "lm-mag-kept-soup", small({}), small_memory(kept)
    for tokens in ("each", "pooled"):
        levels = {"count": 3, "periods": [1, 2, 5], "tokens": tokens}
        yield f"lm-levels-{tokens}", small({"mixer": "attention", "mlp": "levels", "levels": levels}), small_memory({})
    for chosen in SELF_REFERENCES:
        name = f"lm-self_reference-{chosen['setting']}"
        yield name, small({"mixer": "self_reference"}), small_memory({"self_reference": chosen})
    for model, periods, tokens in SLOWER:
        slower = {"count": len(periods), "periods": periods, "tokens": tokens}
        yield f"lm-{model['mixer']}-{len(periods)}-{tokens}", small(model), small_memory({"levels": slower})
    for combine, tokens, frequency in (("additive", "pooled", "output"), ("projected", "each", "write")):
        learned = {"count": 2, "periods": [1, 3], "mix": "softmax", "tokens": tokens, "frequency": frequency}
        levels = {"rule": "gated_delta", "levels": learned}
        model = {"mixer": "mag", "combine": combine, "n_persistent_tokens": 3}
        yield f"lm-mag-frequency-{frequency}", small(model), small_memory(levels)
    yield "charformer-pre", small({"name": "charformer", "order": "pre", "positions": "learned"}), small_memory({})


def _distinct() -> dict[str, tuple[ModelConfig, MemoryConfig]]:
    """The entries without those that say the same as an earlier one."""
    zoo: dict[str, tuple[ModelConfig, MemoryConfig]] = {}
    for name, *settings in _entries():
        if tuple(settings) not in zoo.values():
            zoo[name] = (settings[0], settings[1])
    return zoo


ZOO = _distinct()
"""Name to the settings of one model. A new preset, model or mixer is in it by being registered."""


NATIVE = {
    *("preset-attention", "preset-default", "preset-delta-mag", "preset-gated-delta", "preset-lmm"),
    *("preset-titans-mag", "preset-titans-mal", "preset-hope", "preset-hope-attention"),
    *("lm-self_reference-static", "lm-levels-each", "lm-levels-pooled"),
}
"""Those that the native core reads token by token."""


def grown(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One model of the zoo, its weights moved off their first values; the same for all tests of a process.

    A test that changes its model makes its own by ``moved``.
    """
    model, first = _shared(name, dtype)
    assert _marks(model) == first, f"{name} was changed by a test before this one; it has to make its own by zoo.moved"
    return model


@functools.cache
def _shared(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[object]]:
    model = moved(*ZOO[name], dtype)
    return model, _marks(model)


def _marks(model: nn.Module) -> list[object]:
    """What changes with a model: its weights in place, their dtype, and gradients that were gathered."""
    return [(x._version, x.dtype, x.requires_grad, x.grad is None) for x in model.parameters()]


def moved(model_part: ModelConfig, memory_part: MemoryConfig, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose weights are off their first values: a zero must not hide what it multiplies."""
    model = build(model_part, memory_part, VOCABULARY, random_seed=3).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def ids(batch: int, n_time: int = N_TIME, random_seed: int = 7) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(VOCABULARY, (batch, n_time), generator=torch.Generator().manual_seed(random_seed))
