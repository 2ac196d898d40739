"""Every model of the package at small sizes, different for different axes; the law tests run over it."""

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
    ({"mixer": "mag", "combine": "additive"}, [1, 3], "pooled"),
    ({"mixer": "mac"}, [1, 2, 3, 5], "each"),
    ({"mixer": "mal", "is_residual": False}, [1, 3], "each"),
    ({"mixer": "memory"}, [1, 2, 5], "pooled"),
]
"""Models, the periods of their memories, and which tokens the slower ones read."""
SMALL_CHUNKS = {"chunk_memory": 2, "chunk_other": 4}
SELF_REFERENCES = [
    {"setting": "static"},
    {"structure": "mlp", "setting": "adaptive", "loss": "squared"},
    {"adaptive_query": True, "loss": "squared"},
]


def small(settings: dict[str, object]) -> ModelConfig:
    """The chosen model with the small sizes that it reads."""
    reads = ModelConfig.model_validate(settings).reads
    return ModelConfig.model_validate(settings | {key: size for key, size in SMALL.items() if key in reads})


def small_memory(settings: dict[str, object]) -> MemoryConfig:
    chosen = settings.get("self_reference", {})
    chunks = {"self_reference": dict(chosen) | SMALL_CHUNKS}
    return MemoryConfig.model_validate(settings | SMALL_MEMORY | chunks)


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
    yield (
        "lm-persistent",
        small({"mixer": "attention", "n_persistent_tokens": 3, "mlp": "gelu", "tied": True}),
        small_memory({}),
    )
    for mixer in ("mag", "mac", "mal"):
        yield f"lm-{mixer}-persistent", small({"mixer": mixer, "n_persistent_tokens": 3}), small_memory({})
    yield "lm-mag-projected", small({"combine": "projected"}), small_memory({})
    hybrid = [{"mixer": "memory", "rule": "yaad"}, {"mixer": "attention"}]
    yield "lm-hybrid-attention", small({"layers": hybrid, "aggregate": "attention"}), small_memory({})
    kept = {"rule": "titans_mlp", "form": "frozen_chunk", "cache": {"read": "soup", "length": 4}}
    yield "lm-mag-kept-soup", small({}), small_memory(kept)
    for tokens in ("each", "pooled"):
        levels = {"count": 3, "periods": [1, 2, 5], "tokens": tokens}
        yield f"lm-levels-{tokens}", small({"mixer": "attention", "mlp": "levels", "levels": levels}), small_memory({})
    for chosen in SELF_REFERENCES:
        name = "-".join(str(word) for word in chosen.values())
        yield f"lm-self_reference-{name}", small({"mixer": "self_reference"}), small_memory({"self_reference": chosen})
    for model, periods, tokens in SLOWER:
        slower = {"count": len(periods), "periods": periods, "tokens": tokens}
        yield f"lm-{model['mixer']}-{len(periods)}-{tokens}", small(model), small_memory({"levels": slower})
    for tokens, frequency in (("pooled", "output"), ("each", "write")):
        learned = {"count": 2, "periods": [1, 3], "mix": "softmax", "tokens": tokens, "frequency": frequency}
        levels = {"rule": "gated_delta", "levels": learned}
        yield f"lm-mag-frequency-{frequency}", small({"mixer": "mag"}), small_memory(levels)
    yield "lm-full", small({"mixer": "attention"}).model_copy(update={"sliding_window": None}), small_memory({})
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


def grown(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One model of the zoo, its weights moved off their first values."""
    return moved(*ZOO[name], dtype)


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
