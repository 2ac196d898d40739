"""What each level of a memory does by itself."""

import math

import pytest
import torch

from meristem.evaluate.levels import Dormancy, level_figures
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig

TOKENS_BT = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
MODEL = ModelConfig(dim=12, n_layers=2, n_heads=2, sliding_window=5)


def model_of(mixer: str = "mag", **levels: object) -> torch.nn.Module:
    part = MemoryConfig.model_validate({"head_dim": 4, "levels": {"count": 2, "periods": (1, 4)} | levels})
    return build(MODEL.model_copy(update={"mixer": mixer}), part, 256, 0)


@pytest.mark.parametrize("tokens, factor", [("pooled", 4), ("each", 1)])
def test_budgets_and_half_lives_are_per_token(tokens, factor):
    """A pooled level writes once in its period; by default every level keeps for 64 of its periods."""
    found = level_figures(model_of(tokens=tokens), TOKENS_BT)
    assert list(found) == [f"layer.{layer}.recall.level.{level}" for layer in (0, 1) for level in (0, 1)]
    fast, slow = found["layer.1.recall.level.0"], found["layer.1.recall.level.1"]
    assert fast["write_budget"] == pytest.approx(0.1 * 0.5, rel=1e-4)
    assert slow["write_budget"] == pytest.approx(0.1 * 0.5 / factor, rel=1e-4)
    assert fast["half_life"] == pytest.approx(64, rel=1e-3) and slow["half_life"] == pytest.approx(256, rel=1e-2)
    assert (fast["n_fires"], slow["n_fires"]) == (20, 5) and fast["share"] == slow["share"] == 1
    assert min(fast["memory_change"], slow["memory_change"]) > 1e-3


def test_memory_change_is_that_of_the_second_half_per_fire():
    model = model_of()
    with torch.no_grad():
        _, before = model(TOKENS_BT[:, :20])
        _, after = model(TOKENS_BT[:, 20:], before)
    then, now = (s["layer"]["0"]["recall"]["level"]["1"]["memory"]["matrix_bhkv"] for s in (before, after))
    found = level_figures(model, TOKENS_BT)["layer.0.recall.level.1"]["memory_change"]
    assert found == pytest.approx(float((now - then).norm() / then.norm()) / 5, rel=1e-5)


def test_a_level_that_did_not_fire_says_nothing_of_its_memory():
    figures = level_figures(model_of(periods=(1, 64)), TOKENS_BT)["layer.0.recall.level.1"]
    assert figures["n_fires"] == 0 and "memory_change" not in figures and "write_budget" not in figures


def test_rates_of_learned_frequencies_are_told():
    figures = level_figures(model_of(frequency="output"), TOKENS_BT)
    assert figures["layer.0.recall.level.0"]["rate"] == 1
    assert figures["layer.0.recall.level.1"]["rate"] == pytest.approx(0.25, rel=1e-3)


def test_copies_in_the_state_are_not_levels_of_their_own():
    """Memory as context carries what its memory was as the segment began."""
    assert set(level_figures(model_of("mac"), TOKENS_BT)) == set(level_figures(model_of(), TOKENS_BT))


def test_a_model_without_levels_has_no_figures():
    assert level_figures(build(MODEL, MemoryConfig(head_dim=4), 256, 0), TOKENS_BT) == {}


def test_looking_changes_nothing():
    model = model_of()
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    assert level_figures(model, TOKENS_BT) == level_figures(model, TOKENS_BT)
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())


def test_a_level_sleeps_after_twenty_still_fires():
    """6.8: a relative change below 1e-6 for 20 fires; one movement wakes it, and no fire says nothing."""
    still = {"n_fires": 5.0, "memory_change": 1e-7}
    watched = Dormancy()
    for _ in range(3):
        watched = watched.fed(still)
    assert not watched.is_dormant and watched.fed({"n_fires": 0.0}) == watched
    event = watched.fed(still).event("layer.0.recall.level.1", step=7)
    assert watched.fed(still).is_dormant and event.severity == "warning" and event.payload["fires"] == 20
    assert not watched.fed({"n_fires": 5.0, "memory_change": 1e-3}).fed(still).is_dormant
    assert not watched.fed({"n_fires": 5.0, "memory_change": math.inf}).is_dormant
