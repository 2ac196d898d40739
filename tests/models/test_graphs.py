"""How often a block is compiled: levels that fire at different times must not be compiled anew at every step."""

import pytest

from meristem.memory.state import detach
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from zoo import VOCABULARY, ids

N_TIME, N_WINDOWS = 16, 5
SIZES = {"dim": 16, "n_layers": 1, "n_heads": 2, "mlp_dim": 16}


def memory_levels(mixer, count, **more):
    memory = MemoryConfig.model_validate({"head_dim": 8, "chunk": 8, "levels": {"count": count}})
    sizes = {key: size for key, size in SIZES.items() if mixer != "memory" or key != "n_heads"}
    return ModelConfig.model_validate({"mixer": mixer, **sizes, **more}), memory


def hope(count):
    memory = MemoryConfig.model_validate({"head_dim": 8, "self_reference": {"chunk_memory": 4, "chunk_other": 8}})
    sizes = {key: size for key, size in SIZES.items() if key != "n_heads"}
    chain = {"mlp": "levels", "levels": {"count": count}}
    return ModelConfig.model_validate({"mixer": "self_reference", **sizes, **chain}), memory


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "n_levels"),
    [
        (memory_levels("memory", 1), 1),
        (memory_levels("memory", 4), 4),
        (memory_levels("mac", 2, segment=8), 2),
        (hope(3), 3),
    ],
    ids=["memory", "memory levels", "mac", "hope"],
)
def test_k_levels_are_at_most_k_and_two_graphs(settings, n_levels):
    """Fresh windows are one graph. Where states are carried on, whichever levels fire, k + 2 are the most."""
    from torch._dynamo.utils import counters

    model = build(*settings, VOCABULARY, random_seed=3)
    for block in model.blocks:
        block.compile(backend="eager")
    counters.clear()
    for _ in range(2):
        _, state = model(ids(2, N_TIME))
    assert counters["stats"]["unique_graphs"] == 1
    for window in range(N_WINDOWS):
        _, state = model(ids(2, N_TIME, random_seed=window), detach(state))
    assert counters["stats"]["unique_graphs"] <= n_levels + 2
    assert not counters["graph_break"]
