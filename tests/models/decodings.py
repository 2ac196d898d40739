"""What tests of decoding share: reading on token by token, and comparing states."""

import torch

from meristem.memory.state import flatten
from meristem.models.decoding import Decoding


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true.double()).norm() / true.double().norm())


def read_on(decoding: Decoding, tokens_bt: torch.Tensor) -> torch.Tensor:
    return torch.stack([decoding.step(column_b.tolist()) for column_b in tokens_bt.unbind(1)], dim=1)


def assert_same_state(found, true) -> None:
    left, right = flatten(found), flatten(true)
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        assert torch.equal(leaf, right[name]) if isinstance(leaf, torch.Tensor) else leaf == right[name], name
