"""From settings to a model."""

from collections.abc import Callable

from torch import nn

from meristem.models.config import ModelConfig
from meristem.models.topology import Topology, changed
from meristem.nn.config import MemoryConfig
from meristem.plugins import Registry

models: Registry[Callable[[ModelConfig, MemoryConfig, int, int], nn.Module]] = Registry(
    "model",
    {
        "lm": "meristem.models.lm:LM",
        "charformer": "meristem.models.char:CharFormer",
        "charrnn": "meristem.models.char:char_rnn",
        "chargru": "meristem.models.char:char_gru",
    },
)
"""Makers of models: ``model(tokens_bt, state) -> (logits_bto, state)``, at most ``max_seq_len`` tokens at once."""


def build(
    model: ModelConfig, memory: MemoryConfig, vocabulary: int, random_seed: int, topology: Topology = ()
) -> nn.Module:
    """A fresh model; its weights depend on these five and on nothing else.

    Under ``torch.device("meta")`` it has shapes only. vocabulary: how many ids there are.
    topology: changes of structure that the model of these settings has gone through since.
    """
    return changed(models.get(model.name)(model, memory, vocabulary, random_seed), topology)
