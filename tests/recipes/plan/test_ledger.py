"""The ledger on fake tensors tells what the machine's allocator does, and whose work it is."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meristem.recipes.plan.ledger import Ledger
from recipes.plan.small_models import MODELS, blocks, profiled_peak, shared, train


def fake_run(make, batch, window):
    with FakeTensorMode(), Ledger() as ledger:
        ledger.stage("build")
        model = make()
        ledger.claim("parameters", model.parameters())
        ledger.spans.attach(model)
        train(model, batch, window, ledger.stage)
    return ledger, model


def highest(ledger, stage=None):
    found = [moment for place, moment in ledger.moments().items() if stage in (None, place[0])]
    return max(found, key=lambda moment: moment.size_bytes)


@pytest.mark.parametrize("make", MODELS)
def test_peak_is_that_of_the_allocator(make):
    """C5.5: The predicted peak is the profiler's, to the byte, shared layers and loops over time included."""
    ledger, _ = fake_run(make, batch=3, window=37)
    model = make()
    truth = profiled_peak(model, lambda: train(model, 3, 37))
    assert highest(ledger).size_bytes == truth


def test_categories_add_up():
    """Every byte of a moment stands in one category and belongs to one living storage; the parameters are all there."""
    ledger, model = fake_run(blocks, batch=2, window=17)
    parameters = sum(parameter.numel() * 4 for parameter in model.parameters())
    for moment in ledger.moments().values():
        assert sum(moment.by_category.values()) == moment.size_bytes
        assert sum(storage.size_bytes for storage, _ in ledger.living(moment)) == moment.size_bytes
    assert highest(ledger, "optimizer").by_category["parameters"] == parameters


def test_storages_die():
    """What nothing refers to any more no longer counts; a view keeps the whole storage."""
    with FakeTensorMode(), Ledger() as ledger:
        first = torch.ones(1000)
        del first
        ledger.stage("later")
        second = torch.ones(1500)
        view = second[:7]
        del second
        ledger.stage("last")
        third = torch.ones(1)
    assert highest(ledger, "later").size_bytes == 6000
    assert highest(ledger, "last").size_bytes == 6004 and len(view) == 7 and len(third) == 1


def test_granule_rounds_each_storage_up():
    """An allocator that hands out blocks of 512 bytes is followed exactly."""
    with FakeTensorMode(), Ledger(granule_bytes=512) as ledger:
        kept = [torch.ones(1), torch.ones(128), torch.ones(129)]
    assert highest(ledger).size_bytes == 512 + 512 + 1024 and len(kept) == 3


@pytest.mark.parametrize("make", [blocks, shared])
def test_backward_work_belongs_to_the_module_of_the_forward(make):
    """A linear layer does twice its forward work in the backward pass, also when it runs several times."""
    ledger, _ = fake_run(make, batch=3, window=11)
    n_runs = 3 if make is shared else 1
    forward = 2 * 3 * 11 * 60 * 180 * n_runs
    assert ledger.flops["forward", "layers.0.joined"] == 2 * forward
    assert ledger.flops["backward", "layers.0.joined"] == 2 * 2 * forward
    assert ledger.flops["backward", "layers.0.mlp.3"] == 2 * 2 * forward


def test_recomputed_work_counts_where_it_runs():
    """A checkpointed layer does its forward work once more in the backward pass, as far as the recomputation goes.

    C5.5.
    """

    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(31, 37), nn.GELU(), nn.Linear(37, 31))

        def forward(self, hidden):
            return torch.utils.checkpoint.checkpoint(self.inner, hidden, use_reentrant=False)

    with FakeTensorMode(), Ledger() as ledger:
        ledger.stage("forward")
        model = Again()
        ledger.spans.attach(model)
        out = model(torch.ones(5, 31, requires_grad=True))
        ledger.stage("backward")
        out.sum().backward()
        ledger.stage("after")
        torch.ones(3, 5) @ torch.ones(5, 7)
    assert ledger.flops["backward", "inner.0"] == 3 * ledger.flops["forward", "inner.0"]
    assert ledger.flops["backward", "inner.2"] == 2 * ledger.flops["forward", "inner.2"]
    assert ledger.flops["after", ""] == 2 * 3 * 5 * 7


def test_host_reads_of_a_model_are_noted_with_their_line():
    """Reading a value that does not exist goes on as a healthy run would; the line is named when the model asked."""

    class Curious(nn.Module):
        def forward(self, hidden):
            assert bool(torch.isfinite(hidden).all())
            return hidden * hidden.argmax().item()

    with FakeTensorMode(), Ledger() as ledger:
        model = Curious()
        ledger.spans.attach(model)
        assert model(torch.randn(3)).sum().item() == 0.0
    lines = [place.rsplit(":", 1) for place in ledger.readings]
    assert [path.rsplit("/", 1)[-1] for path, _ in lines] == ["test_ledger.py"] * 2
    assert int(lines[1][1]) == int(lines[0][1]) + 1
