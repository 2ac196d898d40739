"""Tensors of which each process holds a part (FSDP2), and what they are in full.

A checkpoint holds every tensor in full, whatever the number of processes that made it or go on from it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from meristem.distributed.agreement import fingerprint


def is_part(tensor: Tensor) -> bool:
    """Whether other processes hold the rest of it."""
    return hasattr(tensor, "full_tensor")  # a DTensor, by name: its module takes a second to load


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it; where that is all, the tensor itself."""
    held: Any = tensor.detach()
    own: Tensor = held.to_local() if is_part(tensor) else tensor
    return own


def whole(tensor: Tensor) -> Tensor:
    """All of it. Every process must call, for the same tensors in the same order."""
    held: Any = tensor.detach()
    full: Tensor = held.full_tensor() if is_part(tensor) else tensor
    return full


def as_part_of(owner: Tensor, saved: Tensor) -> Tensor:
    """``saved`` in the form in which ``owner`` is held: of what was saved in full, what belongs to this process.

    Nothing is exchanged. What has neither the shape of all of ``owner`` nor of what is here of it, as a counter, stays.
    """
    if not is_part(owner):
        return saved
    from torch.distributed.tensor import DTensor, distribute_tensor

    held: Any = owner
    # A process that holds all has both shapes, and either way the same comes out.
    if saved.shape == owner.shape:
        near = saved.to(local(owner).device)
        return distribute_tensor(near, held.device_mesh, held.placements, src_data_rank=None)
    if saved.shape == local(owner).shape:
        near = saved.to(local(owner).device)
        return DTensor.from_local(
            near, held.device_mesh, held.placements, run_check=False, shape=owner.shape, stride=owner.stride()
        )
    return saved


def local_by_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process holds of each."""
    return {name: local(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Copy parameters and buffers that come whole, one by one, into what this process holds of them.

    Gives a SHA-256 over all that came, which is the same in processes that were given the same.
    """
    held = dict(chain(model.named_parameters(), model.named_buffers()))
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(fingerprint({name: tensor}).encode())
        local(held[name]).copy_(local(as_part_of(held[name], tensor)))
    return digest.hexdigest()
