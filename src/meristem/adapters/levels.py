"""From the feed-forward layers of a trained transformer into levels: the same function at first (memory.md 6.7)."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from meristem.checkpoint.store import Checkpoint
from meristem.errors import WrongValue
from meristem.models.config import ModelConfig
from meristem.models.init import seeded
from meristem.nn.cms_mlp import CMSMLP, CMSMLPLevel
from meristem.nn.config import CMSConfig
from meristem.nn.promotion import cms_mlp_from, stack_up_chain


@torch.no_grad()
def levels_of(base: Checkpoint, wanted: ModelConfig, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Give a model with levels, in place, the weights of a base whose feed-forward layers were single ones.

    Of each chain the level of period 1 is the layer of the base; the slower ones add nothing until they have learned.
    """
    was = base.settings().get("model", {})
    reasons = {
        f"model.name is {was.get('name', 'lm')}": was.get("name", "lm") != "lm",
        f"its feed-forward layers are {was.get('mlp', 'swiglu')}, and levels are made of gelu layers": was.get(
            "mlp", "swiglu"
        )
        != "gelu",
        "model.levels.variant is not chained": wanted.levels.variant != "chained",
        "model.levels.order is not fastest": wanted.levels.order != "fastest",
        "model.levels.tokens is not each": wanted.levels.tokens != "each",
    }
    found = [reason for reason, is_so in reasons.items() if is_so]
    if found:
        raise WrongValue(
            f"{base.path} cannot be given levels: {'; '.join(found)}. Take a transformer with model.mlp=gelu, and "
            f"leave these keys out.",
            reasons=found,
        )
    chains = {name: module for name, module in model.named_modules() if isinstance(module, CMSMLP)}
    left = dict(weights)
    for name, chain in chains.items():
        first = cast(CMSMLPLevel, chain.level[0])
        norm, feedforward = first.norm, first.feedforward
        block = name.removesuffix("mlp")
        norm.load_state_dict({"gain_d": left.pop(f"{block}mlp_norm.gain_d")})
        own = {key: left.pop(f"{name}.{key}") for key in feedforward.state_dict()}
        feedforward.load_state_dict(own)
        grown = cms_mlp_from([(norm, feedforward)], CMSConfig(count=1))
        with seeded(0, f"adapters.levels.{name}"):
            for _ in range(len(chain.level) - 1):
                grown = stack_up_chain(grown).module
        chain.load_state_dict(grown.state_dict())
    told = model.load_state_dict(left, strict=False)
    missing = [name for name in told.missing_keys if not any(name.startswith(f"{chain}.") for chain in chains)]
    if missing or told.unexpected_keys:
        raise WrongValue(
            f"{base.path} is another model but for its levels: missing {', '.join(missing) or 'nothing'}, left over "
            f"{', '.join(told.unexpected_keys) or 'nothing'}. Leave the keys of model as they are.",
            missing=missing,
            surplus=told.unexpected_keys,
        )
