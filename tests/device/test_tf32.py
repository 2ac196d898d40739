"""What is rounded to TF32 by choice, and the solves that never are."""

import pytest
import torch

from meristem.device import resolve as resolving
from meristem.device.config import DeviceConfig
from meristem.device.resolve import probe, resolve
from meristem.device.tf32 import allow_tf32, exact_products
from meristem.errors import CapabilityError
from meristem.events import silent
from meristem.memory.kernels.select import force_reference
from meristem.models.build import build
from zoo import VOCABULARY, ZOO, ids

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
LOOSE = {"tf32", "bf16"}


@pytest.fixture(autouse=True)
def restored():
    yield
    allow_tf32(False)


def precisions():
    return [backend.fp32_precision for backend in BACKENDS]


@pytest.mark.parametrize("outside", ["high", "medium", "highest"])
def test_products_are_exact_inside_and_as_before_afterwards(outside):
    """Also when what is inside fails."""
    torch.set_float32_matmul_precision(outside)
    before = precisions()
    with pytest.raises(ZeroDivisionError), exact_products():
        assert not LOOSE & set(precisions())
        raise ZeroDivisionError
    assert precisions() == before and torch.get_float32_matmul_precision() == outside


@pytest.mark.parametrize("name", ["preset-titans-mag", "preset-hope"])
def test_solves_are_exact_both_ways_where_tf32_is_allowed(name, monkeypatch):
    """Under autocast too: each solve, forward and backward, is one of float32 without TF32; other products are not."""
    solve, product = torch.linalg.solve_triangular, torch.nn.functional.linear
    seen, others = [], []

    def watched(system, *args, **kwargs):
        seen.append((system.dtype, *precisions()))
        return solve(system, *args, **kwargs)

    def also_watched(*args):
        others.extend(precisions())
        return product(*args)

    monkeypatch.setattr(torch.linalg, "solve_triangular", watched)
    monkeypatch.setattr(torch.nn.functional, "linear", also_watched)
    allow_tf32(True)
    model = build(*ZOO[name], VOCABULARY, random_seed=3).bfloat16()
    with force_reference(), torch.autocast("cpu", torch.bfloat16):  # the native core has no products of torch
        logits_bto, _ = model(ids(2))
        n_forward = len(seen)
        logits_bto.float().sum().backward()
    assert n_forward and {dtype for dtype, *_ in seen} == {torch.float32}
    assert name != "preset-hope" or len(seen) > n_forward, "a self-reference solves once more on the way back"
    assert not LOOSE & {each for _, *flags in seen for each in flags}
    assert "tf32" in others


@pytest.fixture
def card(monkeypatch):
    """A CUDA card as far as choosing goes; its probe is that of the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(resolving, "probe", lambda *args: None)

    def of(units):
        monkeypatch.setattr(resolving, "has_bf16", lambda device: units)

    return of


@pytest.mark.parametrize("is_allowed", [False, True])
def test_tf32_is_a_setting_of_cuda(card, is_allowed):
    card(True)
    resolve(DeviceConfig(device="cuda", tf32=is_allowed), silent)
    assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if is_allowed else "ieee")


@pytest.mark.parametrize("units, chosen", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_takes_bf16_only_where_the_card_has_it(card, units, chosen):
    card(units)
    assert resolve(DeviceConfig(device="cuda"), silent).dtype == chosen


def test_bf16_asked_of_a_card_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(resolving, "has_bf16", lambda device: False)
    with pytest.raises(CapabilityError, match=r"bf16 does not work on cuda: the card has no .* device.dtype=fp16"):
        probe(torch.device("cuda"), torch.float32, torch.bfloat16)
