"""What stays in float32 whatever a model is cast to, and that it does stay so while the model runs."""

import copy

import pytest
import torch
from torch import nn

from meristem.memory.state import flatten
from meristem.models.build import build
from zoo import VOCABULARY, ZOO, ids

CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": nn.Module.bfloat16,
    "half": nn.Module.half,
    "twice": lambda model: model.double().to(device="cpu", dtype=torch.float16),
}
STAYING = ("recall.gates.", ".initial.", ".bias_hl", ".frequency.")
"""Words in the names of what makes gates and of first memories."""


def small_model(name):
    return build(*ZOO[name], VOCABULARY, random_seed=3)


def stays(name):
    return any(word in f".{name}" for word in STAYING)


@pytest.mark.parametrize("name", ZOO)
def test_first_memories_and_gates_stay_in_float32(name):
    """Whichever way a model is cast to half precision, and to the bit; everything else follows the cast."""
    whole = small_model(name)
    for cast in CASTS.values():
        model = cast(copy.deepcopy(whole))
        for path, tensor in model.state_dict().items():
            expected = torch.float32 if stays(path) else model.embedding.weight.dtype
            assert tensor.dtype == expected, path
            assert not stays(path) or torch.equal(tensor, whole.state_dict()[path]), path
        for path, buffer in model.named_buffers():
            assert buffer.dtype == torch.float32 or not stays(path), path
    assert {tensor.dtype for tensor in copy.deepcopy(whole).double().state_dict().values()} == {torch.float64}


def test_gradients_follow_their_parameters_through_a_cast():
    model = small_model("preset-titans-mag")
    model(ids(2))[0].sum().backward()
    model.bfloat16()
    gradients = [(parameter.grad.dtype, parameter.dtype) for parameter in model.parameters()]
    assert {dtype for pair in gradients for dtype in pair} == {torch.float32, torch.bfloat16}
    assert all(one == other for one, other in gradients)


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_memories_are_float32_in_a_bfloat16_model(name, is_autocast):
    """Also those that a window leaves behind, gradients are finite, and a token read by itself fits what came before.

    What lies beside memories, as keys of attention and the tails of convolutions, is in the model's precision.
    """
    model = small_model(name).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        logits_bto, state = model(ids(2))
    logits_bto.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        one_bto, after = model(ids(2, 1), state)
    assert one_bto.isfinite().all()
    for found in (state, after):
        memories = {path: leaf for path, leaf in flatten(found).items() if is_memory(path, leaf)}
        assert {leaf.dtype for leaf in memories.values()} <= {torch.float32}, memories.keys()


def is_memory(path, leaf):
    words = path.split(".")
    return isinstance(leaf, torch.Tensor) and bool({"memory", "read", "kept", "frequency"} & set(words))
