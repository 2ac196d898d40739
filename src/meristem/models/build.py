"""From settings to a model."""

from collections.abc import Callable

from torch import nn

from meristem.models.part import ModelPart
from meristem.nn.part import MemoryPart
from meristem.plugins import Registry

models: Registry[Callable[[ModelPart, MemoryPart, int, int], nn.Module]] = Registry(
    "model",
    {
        "lm": "meristem.models.lm:LM",
        "charformer": "meristem.models.char:CharFormer",
        "charrnn": "meristem.models.char:char_rnn",
        "chargru": "meristem.models.char:char_gru",
    },
)
"""Makers of models: ``model(tokens_bt, state) -> (logits_bto, state)``, at most ``model.window`` tokens at once."""


def build(model: ModelPart, memory: MemoryPart, vocabulary: int, random_seed: int) -> nn.Module:
    """A fresh model; its weights depend on these four and on nothing else.

    Under ``torch.device("meta")`` it has shapes only. vocabulary: how many ids there are.
    """
    return models.get(model.name)(model, memory, vocabulary, random_seed)
