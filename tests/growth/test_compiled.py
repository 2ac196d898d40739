"""A compiled model goes through the life of a seed as one that is not (growth.md 24; V6)."""

from typing import Any

import pytest
import torch

import meristem.growth as grow
import zoo
from growth.catalogue import PLACES, SEEDS, host, logits
from meristem.growth.surgery import plan_fossilize

MOST_GRAPHS = 8
"""Of one slot through a whole life, recompilations after each change of structure included; torch gives up after 8."""


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("seed", "blend"), [("bottleneck", "confidence"), pytest.param("attention", "residual", marks=pytest.mark.slow)]
)
def test_v6_compiled_is_eager_through_a_life(seed: str, blend: str) -> None:
    """Empty, off, half in, live, settled, with another seed after it, and without: equal outputs, and few graphs."""
    from torch._dynamo.testing import CompileCounter

    place, tokens_bt, counter = PLACES["foreign"], zoo.ids(2), CompileCounter()
    model, plain = (grow.attach(host("foreign", torch.float32), place) for _ in range(2))
    layers: Any = model.get_submodule("body.layers")
    for layer in layers:
        layer.compile(backend=counter)

    def agree() -> None:
        with torch.no_grad():
            torch.testing.assert_close(logits(model, tokens_bt), logits(plain, tokens_bt), rtol=0, atol=1e-5)

    agree()
    n_dormant = counter.frame_count
    blueprint, settings = SEEDS[seed]
    for each in (model, plain):
        made = grow.graft(each, place, blueprint, blend=blend, **settings)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    for weight in (0.0, 0.3, 0.6, 1.0):
        for each in (model, plain):
            grow.set_blend(each, place, weight)
        agree()
    for each in (model, plain):
        grow.transaction(each, None, plan_fossilize(each, place), tokens_bt)
    agree()
    for each in (model, plain):
        grow.graft(each, place, "norm")
    agree()
    for each in (model, plain):
        grow.remove(each, place)
    agree()
    assert counter.frame_count - n_dormant <= MOST_GRAPHS
