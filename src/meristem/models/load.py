"""From a checkpoint to a model that can be talked to."""

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from meristem.checkpoint.store import Checkpoint, find
from meristem.data.tokenizer import Tokenizer, tokenizer_from_bytes
from meristem.errors import CheckpointMismatch
from meristem.events import Emit, silent
from meristem.memory.forms.replay import replayed
from meristem.memory.state import State
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.shipped import DIRECTORY
from meristem.models.topology import Topology, from_json
from meristem.models.weights import put_rates
from meristem.nn.config import MemoryConfig
from meristem.nn.neural_memory import NeuralMemory, RandomMap
from meristem.nn.precision import float32_ids
from meristem.nn.token_pooling import wide


class Loaded(NamedTuple):
    """A model with its saved weights, and the tokenizer it was trained with."""

    model: nn.Module
    tokenizer: Tokenizer


def load(path: Path | str | None = None, emit: Emit = silent) -> Loaded:
    """The model of a checkpoint, on the CPU, in the precision it was saved in.

    path: a checkpoint, or a run directory for its newest one; None for the small model that comes along
    (``models.shipped``). ``emit`` hears of corrupt ones that were passed over.
    """
    return load_opened(find(DIRECTORY if path is None else Path(path), emit))


def load_opened(checkpoint: Checkpoint) -> Loaded:
    """The same of a checkpoint that was found already."""
    config = checkpoint.settings()
    tokenizer = tokenizer_from_bytes(checkpoint.file("tokenizer.json"))
    try:
        model_part = ModelConfig.model_validate(config.get("model", {}))
        memory_part = MemoryConfig.model_validate(config.get("memory", {}))
    except ValidationError as cause:
        wrong = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in cause.errors())
        raise CheckpointMismatch(
            f"config.yaml of {checkpoint.path} describes a model that this version does not know ({wrong}). "
            f"Use the version of meristem that saved it.",
            path=str(checkpoint.path),
            step=checkpoint.step,
        ) from cause
    model = build(model_part, memory_part, tokenizer.vocab_size, random_seed=0, topology=topology_of(checkpoint))
    put_weights(model, checkpoint.tree("model"), checkpoint)
    if checkpoint.has("learn"):
        put_rates(model, checkpoint.value("learn").get("rates", {}))
    return Loaded(model, tokenizer)


@torch.no_grad()
def of_today(model: nn.Module, state: State) -> State:
    """A saved state as the model goes on from it: chunks left unfinished up to e97c871 become those of today."""
    memories = {numbers(path): module for path, module in model.named_modules() if isinstance(module, NeuralMemory)}
    return _of_today(state, (), memories)


def _of_today(state: State, at: tuple[int, ...], memories: Mapping[tuple[int, ...], NeuralMemory]) -> State:
    after: State = {}
    for name, inner in state.items():
        place = (*at, int(name)) if name.isdecimal() else at
        if name == "memory" and place in memories:
            memory = memories[place]
            after[name] = replayed(inner, memory.rule, form=memory.form, chunk=memory.chunk)
        else:
            after[name] = _of_today(inner, place, memories) if isinstance(inner, dict) else inner
    return after


def numbers(path: str) -> tuple[int, ...]:
    """Layer and level, which a state and the modules of a model count alike."""
    return tuple(int(name) for name in path.split(".") if name.isdecimal())


def topology_of(checkpoint: Checkpoint) -> Topology:
    """The changes of structure that a saved model went through; none where the checkpoint has no log of them."""
    return from_json(checkpoint.value("topology")) if checkpoint.has("topology") else ()


def put_weights(model: nn.Module, weights: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Copy the saved weights into a model, whose parameters stay where they are and take the widest precision that is
    saved; what a model keeps in float32 is never narrower. Raises what ``fitting`` does.
    """
    weights = fitting(model, weights, checkpoint)
    stays = float32_ids(model)
    # A file may hold some of them in fewer bits than they are used with.
    # A model that rests on a base wants what is trained of it, and the base stays as it is.
    saved = [(name, parameter) for name, parameter in model.named_parameters() if name in weights]
    others = [weights[name].dtype for name, parameter in saved if id(parameter) not in stays]
    dtype = reduce(torch.promote_types, others, others[0]) if others else torch.float32
    for name, parameter in saved:
        parameter.data = parameter.data.to(wide(weights[name].dtype) if id(parameter) in stays else dtype)
    model.load_state_dict(weights)


def fitting(model: nn.Module, weights: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The saved weights under the names of the model, which may be in shapes only.

    Names and shapes must be those of the model; all that differ are listed in one CheckpointMismatch. Random maps of
    features, which were not saved up to e97c871, are those that the model drew: they follow from the seed in its
    configuration.
    """
    drawn = {
        f"{path}.{name}": buffer
        for path, module in model.named_modules()
        if isinstance(module, RandomMap)
        for name, buffer in module.named_buffers()
    }
    whole = drawn | dict(weights)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    differences = [
        f"{name}: saved {found.get(name, 'not at all')}, expected {wanted.get(name, 'nothing')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if differences:
        raise CheckpointMismatch(
            f"the weights of {checkpoint.path} do not fit the model of its config.yaml: {'; '.join(differences)}. "
            f"Use a checkpoint of this model, or the configuration that it was trained with.",
            path=str(checkpoint.path),
            step=checkpoint.step,
            differences=differences,
        )
    return whole
