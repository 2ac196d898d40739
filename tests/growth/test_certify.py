"""Certificates: of the very seed, in a copy of the very slot, with everything else as it was."""

import random
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import meristem.growth as grow
import zoo
from growth.catalogue import PLACES, SEEDS, bits, grown, host
from growth.site import TinySite, evaluated, loose
from growth.test_gardener import order
from meristem.errors import CheckpointMismatch, WrongValue
from meristem.growth.certifier import Certifier
from meristem.growth.certify import Certificate, certify
from meristem.growth.gardener import act_on
from meristem.growth.stage import Stage
from meristem.growth.surgery import plan_fossilize

certifying = import_module("meristem.growth.certify")
PLACE = PLACES["foreign"]
WEIGHT = certifying.WEIGHTS


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same probes, with fewer steps on noise and fewer calls."""
    monkeypatch.setattr(certifying, "N_STEPS", 8)
    monkeypatch.setattr(certifying, "N_MEASURED", 3)


def generators() -> list[object]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_of_ours_is_certified_and_nothing_is_touched(seed: str) -> None:
    """The band is low, and model, gradients, training mode and generators are what they were, to the bit."""
    model, made = grown("foreign", seed)
    grow.set_blend(model, PLACE, 0.25)
    grow.set_blend(model, PLACE, 0.75, steps=7)
    for each in made.parameters():
        each.grad = torch.ones_like(each)
    before, drawn, modes = bits(model), generators(), [each.training for each in model.modules()]
    with torch.no_grad():
        found = certify(model, PLACE, n_batch=2, n_time=8)
    assert (found.band, found.complaints, found.score) == ("low", (), 0.0)
    assert bits(model) == before and generators() == drawn and [x.training for x in model.modules()] == modes
    assert all(torch.equal(each.grad, torch.ones_like(each)) for each in made.parameters())
    assert found.origin == made.origin and found.slot == PLACE and found.handling == "standard"
    assert Certificate.from_json(found.to_json()) == found


class Odd(nn.Module):
    """A layer that does one thing wrong; ``weight`` makes it one that learns."""

    def __init__(self, work: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.work = nn.Parameter(torch.ones(())), work

    def forward(self, x_btd: Tensor) -> Tensor:
        return self.work(x_btd, self.weight)


def certified(work: Callable[[Tensor, Tensor], Tensor], **settings: object) -> Certificate:
    model, made = grown("foreign", "norm", is_moved=False)
    made.layer = Odd(work).double()
    return certify(model, PLACE, **settings)


BAD = {
    "nonfinite-output": (lambda x, w: w * x.float().pow(20).to(x), {"nonfinite"}, WEIGHT["nonfinite"]),
    "nonfinite-gradient": (lambda x, w: w * (x - x).sqrt(), {"nonfinite"}, WEIGHT["nonfinite"]),
    "exploding": (lambda x, w: x * (w - 1) * 1e5, {"exploding"}, WEIGHT["exploding"]),
    "vanishing": (lambda x, w: x * w * 1e-12, {"vanishing"}, WEIGHT["vanishing"]),
    "bf16": (lambda x, w: w * ((x + 1e4) - 1e4), {"bf16"}, WEIGHT["bf16"]),
    "oscillation": (lambda x, w: x * (1e4 * w).sin(), {"oscillation"}, WEIGHT["oscillation"]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_found_and_weighed(name: str) -> None:
    work, complaints, least = BAD[name]
    found = certified(work)
    assert complaints <= set(found.complaints) and found.score >= least
    assert not set(found.complaints) & set(certifying.REFUSED)


@pytest.mark.parametrize(
    "name, work",
    [
        ("causal", lambda x, w: w * x.flip(1)),
        ("causal", lambda x, w: w * x.mean(1, keepdim=True).expand_as(x)),
        ("causal", lambda x, w: w * x.square().amax(1, keepdim=True).expand_as(x)),
        ("deterministic", lambda x, w: w * torch.rand_like(x)),
        ("batch", lambda x, w: w * (x - x.mean(0, keepdim=True))),
        ("batch", lambda x, w: w * x.roll(1, 0)),
    ],
)
def test_what_no_score_can_mend_is_refused(name: str, work: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = certified(work)
    assert name in found.complaints and (found.band, found.handling) == ("refused", "quarantine")


def test_more_bytes_than_allowed_are_found() -> None:
    """The peak is what is held at once, and not the sum of all that was made."""
    found = certified(
        lambda x, w: w * torch.cat([x] * 50, dim=-1).unflatten(-1, (50, -1)).sum(-2), watermark_bytes=1000
    )
    assert "watermark" in found.complaints and found.benchmark.peak_bytes > 50 * 3 * 24 * 12 * 8

    def many(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(200):
            x.detach() + 1
        return w * x

    assert certified(many).benchmark.peak_bytes < 20 * 3 * 24 * 12 * 8


def test_without_room_nothing_more_is_measured_and_nothing_passes() -> None:
    """Unmeasured is not passed, and never 0."""

    def full(x: Tensor, w: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    found = certified(full)
    assert found.score == 1.0 and found.band == "refused" and found.benchmark is None
    by_name = {each.name: each for each in found.probes}
    assert by_name["memory"].outcome == "failed"
    assert all(each.outcome == "unmeasured" and each.value is None for each in found.probes if each.name != "memory")


@pytest.mark.parametrize(
    "score, band", [(0.0, "low"), (0.29, "low"), (0.3, "medium"), (0.6, "high"), (0.85, "critical")]
)
def test_bands(score: float, band: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = certified(lambda x, w: w * x)
    monkeypatch.setattr(certifying, "WEIGHTS", {"bf16": score})
    failed = tuple(replace(each, outcome="failed") if each.name == "bf16" else each for each in found.probes)
    assert replace(found, probes=failed).band == band


def test_the_speed_is_taken_from_the_clock() -> None:
    """Half of the calls are as fast as p50; warm-up is not counted."""
    times = iter(range(1000))
    found = certified(lambda x, w: w * x, clock=lambda: float(next(times)), n_batch=2, n_time=5)
    assert (found.benchmark.p50_ms, found.benchmark.p95_ms) == (1000.0, 1000.0)
    assert found.benchmark.tokens_per_s == 10.0 and found.benchmark.shape == (2, 5, 12)
    assert found.benchmark.dtype == "float64" and next(times) == 2 * (certifying.N_WARM_UP + 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout, reads", [("btd", "input"), ("tbd", "output")])
def test_any_slot_can_be_certified(dtype: torch.dtype, layout: str, reads: str) -> None:
    """What a slot reads, its layout and its dtype are those of the model; nothing has to be in it yet."""
    model = grow.attach(nn.Sequential(nn.Linear(20, 12)), "0", reads=reads, layout=layout).to(dtype)
    grow.graft(model, "0", "low_rank", rank=3)
    found = certify(model, "0", grow.remove(model, "0"))
    assert found.band == "low" and found.benchmark.dtype == str(dtype)[6:] and not grow.seeds_in(model)


def test_a_certificate_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(WrongValue, match="is empty"):
        certify(grow.attach(host("foreign"), PLACE), PLACE)
    saved = certified(lambda x, w: w * x).to_json()
    with pytest.raises(CheckpointMismatch, match="format 2"):
        Certificate.from_json(saved | {"format": 2})


@pytest.mark.parametrize("name", ["ours", "not causal", "none"])
def test_a_seed_that_is_certified_before_it_learns_is_culled_where_it_is_not_trusted(name: str) -> None:
    """G1 asks for it where the run does so; one that could not be had is no pass."""
    site, config, heard = TinySite.of("blocks.0"), loose(certify=True), []
    garden = act_on(replace(evaluated(), queue=(order(),)), site, config, run_id="run", step=1)
    if name != "ours":
        found = None if name == "none" else certified(lambda x, w: w * x.flip(1))
        site.certificate = lambda slot: found
    garden = replace(garden, queue=(order("start_training", step=2),))
    garden = act_on(garden, site, config, run_id="run", step=2, emit=heard.append)
    (result,) = [event.payload for event in heard if event.name in ("gate.result", "gate.failed")]
    (check,) = [check for check in result["checks"] if check["name"] == "is_certified"]
    assert result["gate"] == "G1"
    assert check["status"] == {"ours": "pass", "not causal": "fail", "none": "unmeasured"}[name]
    assert garden.lives[0].stage is (Stage.TRAINING if name == "ours" else Stage.CULLED)


@pytest.mark.slow
@pytest.mark.parametrize("blend", ["residual", "confidence"])
def test_a_certificate_from_another_process_is_that_of_this_one(blend: str) -> None:
    """The seed that is in the slot by then, beside what is settled there; its benchmark apart."""
    model = grow.attach(host("preset-default", torch.float32), "blocks.1")
    grow.graft(model, "blocks.1", "conv")
    grow.transaction(model, None, plan_fossilize(model, "blocks.1"), zoo.ids(1))
    grow.graft(model, "blocks.1", "norm", blend=blend)
    heard = []
    with Certifier(emit=heard.append) as certifier:
        certifier.begin(model, "blocks.1")
        grow.remove(model, "blocks.1")  # as a run does that is rolled back
        made = grow.graft(model, "blocks.1", "bottleneck", hidden=5, blend=blend)
        expected = certify(model, "blocks.1")
        found = certifier.result(model, "blocks.1")
    assert found is not None and found.band == "low" and heard[-1].name == "certificate.issued"
    assert (found.weights_sha256, found.origin, found.slot) == (expected.weights_sha256, made.origin, "blocks.1")
    assert [(each.name, each.outcome) for each in found.probes] == [
        (each.name, each.outcome) for each in expected.probes
    ]
