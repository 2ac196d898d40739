"""Models of ours that are plain transformers, under the names that Llama and Mistral have for their weights.

A stack of attention and SwiGLU with rotary positions and RMSNorm is a Llama; with a sliding window it is a Mistral.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from meristem.errors import WrongValue
from meristem.models.config import ModelConfig
from meristem.models.topology import Topology
from meristem.native.window import ROTATION_BASE

TYPES: Final = ("llama", "mistral")
"""``model_type`` in the ``config.json`` of a plain transformer."""

EPS: Final = 1e-6
FAR: Final = 131_072
"""Positions of a model whose attention slides: it sees no farther than its window, however long a text is."""

ENDS: Final = {"embedding.weight": "model.embed_tokens.weight", "norm.gain_d": "model.norm.weight"}
HEAD: Final = {"head.weight": "lm_head.weight"}
OF_LAYER: Final = {
    "mixer_norm.gain_d": ("input_layernorm",),
    "mixer.qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixer.out.weight": ("self_attn.o_proj",),
    "mlp_norm.gain_d": ("post_attention_layernorm",),
    "mlp.gate_up.weight": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.out.weight": ("mlp.down_proj",),
}
"""Our names in a block, and theirs; several of theirs are parts of one of ours, in this order."""

_BLOCK: Final = re.compile(r"blocks\.(\d+)\.(.+)")


def differences(model: ModelConfig, topology: Topology) -> list[str]:
    """Why a model is no plain transformer; empty where it is one."""
    if model.name != "lm":
        return [f"model.name is {model.name}"]
    checks = {
        f"model.mixer is {', '.join(dict.fromkeys(model.mixers))}": set(model.mixers) != {"attention"},
        f"model.mlp is {model.mlp}": model.mlp != "swiglu",
        "model.rope is false": not model.rope,
        f"model.n_persistent_tokens is {model.n_persistent_tokens}": model.n_persistent_tokens > 0,
        f"model.aggregate is {model.aggregate}": model.aggregate != "stack",
        f"its structure was changed ({len(topology)} times)": len(topology) > 0,
    }
    return [reason for reason, is_so in checks.items() if is_so]


def config_of(model: ModelConfig, weights: Mapping[str, Tensor], n_positions: int) -> dict[str, Any]:
    """The ``config.json`` of a plain transformer. n_positions: tokens of the sequences that it was trained on."""
    is_sliding = model.sliding_window is not None
    kind, title = ("mistral", "Mistral") if is_sliding else ("llama", "Llama")
    vocabulary, width = weights["embedding.weight"].shape
    return {
        "architectures": [f"{title}ForCausalLM"],
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights["blocks.0.mlp.out.weight"].shape[1],
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_heads,
        "head_dim": width // model.n_heads,
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTATION_BASE},
        "max_position_embeddings": FAR if is_sliding else n_positions,
        "tie_word_embeddings": model.tied,
        "attention_bias": False,
        "mlp_bias": False,
        # Their defaults would end a text at what is an ordinary token here.
        "bos_token_id": None,
        "eos_token_id": None,
    } | ({"sliding_window": model.sliding_window} if is_sliding else {})


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``model`` of a ``config.json``, of ours or of anybody's. Raises WrongValue for what ours is not."""
    n_heads, width = config["num_attention_heads"], config["hidden_size"]
    turning = config.get("rope_parameters") or {}
    theta = turning.get("rope_theta", config.get("rope_theta", ROTATION_BASE))
    wanted = {
        "model_type": (config["model_type"], "llama or mistral", config["model_type"] in TYPES),
        "num_key_value_heads": ((shared := config.get("num_key_value_heads") or n_heads), n_heads, shared == n_heads),
        "head_dim": ((own := config.get("head_dim") or width // n_heads), width // n_heads, own == width // n_heads),
        "rms_norm_eps": ((eps := config.get("rms_norm_eps", EPS)), EPS, eps == EPS),
        "rope_theta": (theta, ROTATION_BASE, theta == ROTATION_BASE),
        "rope_type": ((way := turning.get("rope_type", "default")), "default", way == "default"),
        "hidden_act": ((act := config.get("hidden_act", "silu")), "silu", act == "silu"),
        "attention_bias": (bool(config.get("attention_bias")), False, not config.get("attention_bias")),
        "mlp_bias": (bool(config.get("mlp_bias")), False, not config.get("mlp_bias")),
    }
    wrong = [f"{key} is {found}, not {expected}" for key, (found, expected, is_ours) in wanted.items() if not is_ours]
    if wrong:
        raise WrongValue(
            f"this is a transformer that no model of meristem equals: {'; '.join(wrong)}. Train it on as it is: "
            f"`meristem finetune` takes the folder.",
            reasons=wrong,
        )
    return {
        "name": "lm",
        "mixer": "attention",
        "mlp": "swiglu",
        "dim": width,
        "n_layers": config["num_hidden_layers"],
        "n_heads": n_heads,
        "mlp_dim": config["intermediate_size"],
        "sliding_window": config.get("sliding_window") if config["model_type"] == "mistral" else None,
        "tied": bool(config.get("tie_word_embeddings", False)),
    }


def to_plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the other names; each tensor has bytes of its own."""
    return {name: part.clone().contiguous() for name, part in _parts(weights)}


def _parts(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            yield (ENDS | HEAD)[name], tensor
            continue
        theirs = OF_LAYER[block[2]]
        for part, piece in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            yield f"model.layers.{block[1]}.{part}.weight", piece


def from_plain(weights: Mapping[str, Tensor], n_layers: int, *, is_tied: bool) -> dict[str, Tensor]:
    """The inverse of ``to_plain``. Raises WrongValue with the names that are missing or left over."""
    left = dict(weights)
    if is_tied:
        left.pop(HEAD["head.weight"], None)
    missing: list[str] = []

    def take(name: str) -> Tensor:
        if name not in left:
            missing.append(name)
            return torch.empty(0)
        return left.pop(name)

    found = {ours: take(theirs) for ours, theirs in (ENDS if is_tied else ENDS | HEAD).items()}
    for layer in range(n_layers):
        for ours, theirs in OF_LAYER.items():
            pieces = [take(f"model.layers.{layer}.{part}.weight") for part in theirs]
            found[f"blocks.{layer}.{ours}"] = torch.cat(pieces)
    if missing or left:
        raise WrongValue(
            f"the weights are not those of its config.json: missing {', '.join(missing) or 'none'}; left over "
            f"{', '.join(sorted(left)) or 'none'}. Use a whole folder.",
            missing=missing,
            surplus=sorted(left),
        )
    return found
