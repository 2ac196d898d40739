"""From settings to a model."""

from collections.abc import Callable, Iterator
from itertools import chain

from torch import Tensor, nn

from meristem.errors import CheckpointMismatch
from meristem.models.config import HOST, ModelConfig
from meristem.models.init import only_part
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
    if model.name == HOST:
        return _brought(topology)
    return changed(models.get(model.name)(model, memory, vocabulary, random_seed), topology)


def _brought(topology: Topology) -> nn.Module:
    """The model that the first change of the log brings."""
    if not topology or topology[0].name != "host":
        raise CheckpointMismatch(
            f"model.name is '{HOST}', and no model of transformers comes with it. `meristem finetune` brings one.",
            value=HOST,
        )
    return changed(nn.Identity(), topology)


def drawn(make: Callable[[], nn.Module], n_blocks: int) -> Iterator[tuple[str, Tensor]]:
    """First parameters and buffers with their names, to the bit those of ``make()``, and at most one block at once.

    make: ``build`` with its arguments. n_blocks: how many ``model.blocks`` lists.
    First comes what is in no block, then block after block. For each the model is made once, all else of it in shapes
    only, which takes a few milliseconds per block. What is drawn under other indices than those of a block comes last.
    """
    seen: set[str] = set()
    is_whole = False
    for part in ((), *((block,) for block in range(n_blocks)), None):
        if is_whole:
            return
        with only_part(part):
            model = make()
        tensors = dict(chain(model.named_parameters(), model.named_buffers()))
        found = {name: tensor.detach() for name, tensor in tensors.items() if not (tensor.is_meta or name in seen)}
        seen |= found.keys()
        is_whole = seen == tensors.keys()
        del model, tensors
        while found:  # nothing of it is held on to while the next part is drawn
            yield found.popitem()
