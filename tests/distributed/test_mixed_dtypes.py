"""Parameters in parts and parameters of two dtypes do not go together, and the error says what to set."""

import pytest
import torch

from meristem.distributed.engine import sharded
from meristem.distributed.world import World
from meristem.errors import ConflictingKeys
from meristem.models.build import build
from zoo import VOCABULARY, ZOO


def test_parts_of_a_bfloat16_model_with_a_memory_are_refused():
    model = build(*ZOO["preset-titans-mag"], VOCABULARY, random_seed=3).to(torch.bfloat16)
    with pytest.raises(ConflictingKeys, match=r"found torch.bfloat16, torch.float32, .* Set device.param_dtype=fp32"):
        sharded(model, World(), device=torch.device("cpu"), slow=[])
