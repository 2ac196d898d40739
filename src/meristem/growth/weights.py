"""The weights of a seed as a file, and back: names and numbers, and nothing of where it stands in its life."""

from typing import Final

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from meristem.errors import CheckpointCorrupt
from meristem.growth.seed import Seed

STATE: Final = ("blend_weight", "course")
"""What a seed holds of its life, which is not stored with its weights."""


def packed(seed: Seed) -> bytes:
    """The weights of a seed as a safetensors file; equal weights give equal bytes."""
    held = {name: each for name, each in seed.state_dict().items() if name not in STATE}
    # A copy of each: the format takes no tensor that shares its memory with another.
    return safetensors.save({name: held[name].detach().cpu().contiguous().clone() for name in sorted(held)})


def unpacked(content: bytes, name: str) -> dict[str, Tensor]:
    """The tensors in a safetensors file. name: of the seed, for CheckpointCorrupt."""
    try:
        return safetensors.load(content)
    except SafetensorError as cause:
        raise CheckpointCorrupt(
            f"the weights of '{name}' are no safetensors file: {cause}. Store the seed again.", name=name
        ) from cause
