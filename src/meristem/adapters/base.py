"""Weights that stay: which they are, whether they are the same, and how a model rests on them.

A model that rests on a base has a ``state_dict`` without it: checkpoints, snapshots and exports of the run hold what is
trained, and the log of its structure holds where the base is, its hash and its keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from meristem.adapters.remote import CONFIG, is_folder, located
from meristem.checkpoint.store import Checkpoint, find, is_checkpoint
from meristem.data.files import read
from meristem.distributed.agreement import fingerprint
from meristem.errors import CheckpointMismatch, NoCheckpoint, WrongValue
from meristem.events import silent

WEIGHTS: Final = "model.safetensors"
INDEX: Final = f"{WEIGHTS}.index.json"
"""Which file holds which tensor, where there are several."""

_LISTED: Final = 4
"""So many keys that differ are named, and of the others their number."""


@dataclass(frozen=True)
class FrozenWeights:
    """Which weights these are. keys: the shape of each tensor by its name."""

    place: str
    sha256: str
    keys: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, place: str, weights: Mapping[str, Tensor]) -> Self:
        """The record of some weights."""
        return cls(place, fingerprint(weights), {name: tuple(tensor.shape) for name, tensor in weights.items()})

    def to_json(self) -> dict[str, Any]:
        """Plain values for the log of a model."""
        return {
            "place": self.place,
            "sha256": self.sha256,
            "keys": {name: [*shape] for name, shape in self.keys.items()},
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """What ``to_json`` wrote."""
        return cls(saved["place"], saved["sha256"], {name: tuple(shape) for name, shape in saved["keys"].items()})

    def weights(self) -> dict[str, Tensor]:
        """The weights, in memory of their own. CheckpointMismatch names what is not as it was."""
        path = self._there()
        weights = weights_in(path) if is_folder(path) else tree_of(find(path, silent))
        found = FrozenWeights.of(self.place, weights)
        if found.sha256 != self.sha256:
            differences = self._differences(found)
            rest = f", and {len(differences) - _LISTED} more" if len(differences) > _LISTED else ""
            raise CheckpointMismatch(
                f"{self.place} is not the base that this was trained on: {'; '.join(differences[:_LISTED])}{rest}. Put "
                f"that one back (SHA-256 {self.sha256[:12]}, this one has {found.sha256[:12]}).",
                path=self.place,
                differences=differences,
                found=found.sha256,
                expected=self.sha256,
            )
        return weights

    def _there(self) -> Path:
        try:
            return located(self.place)
        except WrongValue as cause:
            raise NoCheckpoint(
                f"{self.place}, whose weights this model rests on, is gone. Put it back there (its weights have the "
                f"SHA-256 {self.sha256[:12]}).",
                path=self.place,
            ) from cause

    def _differences(self, found: "FrozenWeights") -> list[str]:
        by_key = shape_differences(found.keys, self.keys)
        return by_key or ["it has the same keys, and other numbers"]


def shape_differences(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names whose shapes differ, in words."""
    return [
        f"{name}: found {found.get(name, 'nothing')}, expected {wanted.get(name, 'nothing')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]


def pinned(path: Path) -> Path:
    """The one checkpoint that a run stands for now; a folder, or a checkpoint, is itself."""
    return path if is_folder(path) or is_checkpoint(path) else find(path, silent).path.resolve()


def tree_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint. Copies: mapped from a file they lie otherwise, and sums may end in other bits."""
    return {name: tensor.clone() for name, tensor in checkpoint.tree("model").items()}


def weights_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, on the CPU, in memory of their own."""
    import orjson

    files = [WEIGHTS]
    if (folder / INDEX).is_file():
        files = sorted(set(orjson.loads(read(folder / INDEX))["weight_map"].values()))
    found: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise NoCheckpoint(
                f"{folder} holds no {name}; only safetensors are read, for other files may run code. Save the model "
                f"with save_pretrained, which writes them.",
                path=str(folder / name),
            )
        try:
            found |= {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
        except SafetensorError as cause:
            raise CheckpointMismatch(
                f"{folder / name} is not a safetensors file: {cause}. Use a whole folder; its {CONFIG} alone is none.",
                path=str(folder / name),
            ) from cause
    return found


def in_shapes() -> bool:
    """Whether models are made in shapes only at the moment."""
    return torch.get_default_device().type == "meta"


def rest(model: nn.Module, names: frozenset[str]) -> nn.Module:
    """Freeze weights of a model, in place, and leave them out of what it saves and wants when it is loaded."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)

    def without_base(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
        for name in names:
            state.pop(f"{prefix}{name}", None)

    def missing_nothing(_module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in names]

    model.register_state_dict_post_hook(without_base)
    model.register_load_state_dict_post_hook(missing_nothing)
    return model
