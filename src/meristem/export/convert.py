"""A checkpoint from a folder of ``transformers``: one that ``meristem export hf`` wrote, or a plain transformer."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

import meristem.growth.topology  # noqa: F401 - registers the changes that a grown model is built by
from meristem.adapters.base import shape_differences, weights_in
from meristem.adapters.remote import CONFIG, described
from meristem.checkpoint import store
from meristem.config import dump_yaml
from meristem.data.given import of_folder
from meristem.errors import CheckpointMismatch
from meristem.export import plain
from meristem.export.hf import INSIDE, TOKENIZER, TYPE, require_new
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.topology import from_json, to_json
from meristem.nn.config import MemoryConfig


def to_checkpoint(folder: Path, to: Path) -> Path:
    """Write a checkpoint with the model and the tokenizer of a folder under the new directory ``to``.

    Raises WrongValue for a transformer that no model of ours equals, CheckpointMismatch with every weight that is
    missing, left over or of another shape, DataError for a folder without a
    tokenizer.
    """
    require_new(to)
    config = described(folder)
    tokenizer = of_folder(folder)
    weights = weights_in(folder)
    if config["model_type"] == TYPE:
        settings = {"model": config["lm"], "memory": config["memory"]}
        weights = {name.removeprefix(INSIDE): tensor for name, tensor in weights.items()}
    else:
        settings = {"model": plain.settings_of(config), "memory": {}}
        weights = plain.from_plain(weights, config["num_hidden_layers"], is_tied=settings["model"]["tied"])
    topology = from_json(config.get("topology") or [])
    try:
        parts = ModelConfig.model_validate(settings["model"]), MemoryConfig.model_validate(settings["memory"])
    except ValidationError as cause:
        raise CheckpointMismatch(
            f"{folder / CONFIG} describes a model that this version does not know: {cause.errors()[0]['msg']}. Use the "
            f"version of meristem that wrote it.",
            path=str(folder),
        ) from cause
    with torch.device("meta"):
        model = build(*parts, tokenizer.vocab_size, 0, topology)
    rebuilt = dict(model.named_buffers()).keys() - model.state_dict().keys()
    kept = {name: tensor for name, tensor in weights.items() if name not in rebuilt}
    _require_fitting(folder, {name: tuple(t.shape) for name, t in model.state_dict().items()}, kept)
    return store.save(
        to,
        step=0,
        trees={"model": kept},
        values={"topology": to_json(topology)} if topology else {},
        files={"config.yaml": dump_yaml(settings).encode(), TOKENIZER: tokenizer.to_bytes()},
        header={"reason": "converted", "tokenizer_fingerprint": tokenizer.fingerprint},
    )


def _require_fitting(folder: Path, wanted: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differences = shape_differences(found, wanted)
    if differences:
        raise CheckpointMismatch(
            f"the weights in {folder} do not fit its {CONFIG} and {TOKENIZER}: {'; '.join(differences)}. Use a whole "
            f"folder.",
            path=str(folder),
            differences=differences,
        )
