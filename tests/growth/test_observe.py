"""Readings, features, slot scores and contributions (growth.md 14; T4, T5, T7, TA5)."""

import json
import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import meristem.growth as grow
import zoo
from growth.catalogue import PLACES, bits, grown, host, logits
from meristem.checkpoint import atomic
from meristem.checkpoint.side_file import SideFile
from meristem.errors import (
    CheckpointCorrupt,
    MissingDependency,
    MissingMetric,
    NonFinite,
    RunError,
    ShapeError,
    WrongValue,
)
from meristem.events import Event
from meristem.growth.features import Feature, Normaliser, Observes, features, observed, symlog
from meristem.growth.observe import HeldOut, Mask, Reading, Record, SlotReading, Trial
from meristem.growth.score import slot_scores
from meristem.growth.stage import Stage
from meristem.linalg import student_t

READING = Reading(
    run_id="run-1",
    step=30,
    tokens=3000,
    flops=9e6,
    training_loss_nats=2.5,
    held_out=(HeldOut(10, 1000, 3e6, 3.0), HeldOut(20, 2000, 6e6, 2.75)),
    slots=(SlotReading("blocks.0", Stage.TRAINING, "blocks.0#0", "low_rank", 0.0, 12), SlotReading("blocks.1")),
    metrics={"gradient_norm": 0.5, "temperature_c": None},
    trials=(Trial("blocks.0", "low_rank", 18),),
)
RECORDS = [READING, *READING.slots, *READING.trials, Mask(frozenset({"blocks.1"}), True, free_parameters=5, why="x")]


@pytest.mark.parametrize("record", RECORDS, ids=lambda each: type(each).__name__)
def test_a_record_comes_back_from_json(record: Record) -> None:
    assert type(record).from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"version": 2}, "version 2"),
        ({"held_out_loss": 1.0}, "held_out_loss"),
        ({"step": "30"}, "step"),
        ({"step": True}, "step"),
        ({"flops": math.nan}, "flops"),
        ({"slots": [{"slot": "a", "stage": 12}]}, "stage"),
        ({"slots": [{"stage": 1}]}, "slot"),
        ({"metrics": {"a": "1"}}, "metrics"),
    ],
)
def test_a_record_refuses_what_it_does_not_know(changes: dict[str, object], what: str) -> None:
    with pytest.raises(WrongValue, match=what):
        Reading.from_json(READING.to_json() | changes)


def test_what_is_not_finite_was_not_measured() -> None:
    lost = Reading("r", 1, 2, 3.0, math.nan, (HeldOut(1, 2, 3.0, math.inf),), metrics={"a": math.inf})
    assert (lost.training_loss_nats, lost.held_out, lost.metrics) == (None, (), {"a": None})


def test_t7_a_missing_metric_raises() -> None:
    with pytest.raises(MissingMetric, match="temperature_c") as found:
        features(READING, ["gradient_norm", "temperature_c"])
    assert found.value.fields["name"] == "temperature_c"


def test_t7_leniently_its_presence_is_0_with_an_alert() -> None:
    heard: list[Event] = []
    found = features(READING, ["gradient_norm", "temperature_c"], is_strict=False, emit=heard.append)
    assert found["temperature_c"] == Feature(0.0, False)
    assert found["gradient_norm"] == Feature(0.5, True)
    assert (found["blocks.0/stage/TRAINING"], found["blocks.0/stage/DORMANT"]) == (Feature(1, True), Feature(0, True))
    assert (found["blocks.0/blend_weight"], found["blocks.1/blend_weight"]) == (Feature(0, True), Feature(0, False))
    assert [(each.name, each.severity) for each in heard] == [("feature.missing", "info")]
    assert heard[0].payload["names"] == ["temperature_c"]


def test_hardly_any_feature_is_critical() -> None:
    heard: list[Event] = []
    features(Reading("r", 1, 2, 3.0, None), is_strict=False, emit=heard.append)
    assert heard[0].severity == "critical"


@pytest.mark.parametrize("name", ["seed", "blueprint"])
def test_t4_a_slot_with_a_seed_names_it_and_its_blueprint(name: str) -> None:
    named = {"seed": "a#0", "blueprint": "low_rank"} | {name: None}
    with pytest.raises(MissingDependency, match=name):
        features(Reading("r", 1, 2, 3.0, 1.0, (HeldOut(1, 2, 3.0, 1.0),), (SlotReading("a", Stage.TRAINING, **named),)))


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), max_size=30))
def test_the_normaliser_is_the_recurrence_and_a_value(values: list[float | None]) -> None:
    normaliser, mean, variance, is_begun = Normaliser(), 0.0, 0.0, False
    for value in values:
        before = normaliser
        normaliser, scaled = before.scale({"x": Feature.of(value)})
        if value is None:
            assert (scaled["x"], normaliser) == (Feature(0.0, False), before)
            continue
        mean, is_begun = mean if is_begun else value, True
        error = value - mean
        mean, variance = mean + 0.1 * error, 0.9 * (variance + 0.1 * error**2)
        assert scaled["x"] == Feature((value - mean) / math.sqrt(variance + 1e-8), True)
    assert Normaliser.from_json(json.loads(json.dumps(normaliser.to_json()))) == normaliser


@given(n_slots=st.integers(0, 12), most=st.integers(1, 12))
def test_t6_what_is_left_out_is_left_out_of_edges_too(n_slots: int, most: int) -> None:
    """No edge leads to a slot that is not there, and the coverage is what was kept."""
    slots = tuple(SlotReading(f"blocks.{n}", age_steps=n) for n in range(n_slots))
    _, after = observed(replace(READING, slots=slots), Observes(most_slots=most), Normaliser())
    found = after.observation
    assert found is not None and after.slots == slots
    assert found.slots == tuple(each.slot for each in slots[:most])
    assert all(0 <= one < other < len(found.slots) for one, other in found.edges)
    assert len(found.edges) == max(0, len(found.slots) - 1)
    assert found.coverage == (len(found.slots) / n_slots if n_slots else 1.0)
    seen = {name.partition("/")[0] for name in found.features if "/" in name}
    assert seen == set(found.slots)
    assert Reading.from_json(json.loads(json.dumps(after.to_json()))) == after


def test_numbers_are_made_small_before_they_are_scaled() -> None:
    reading = replace(READING, metrics={"large": 1e6})
    normaliser, _ = observed(reading, Observes(("large",), is_log=True), Normaliser())
    assert normaliser.moments["large"][0] == pytest.approx(math.log1p(1e6))


def test_symlog_is_odd_and_small() -> None:
    assert symlog(-math.expm1(3)) == pytest.approx(-3)


def test_ta5_a_file_is_written_at_its_cadence(tmp_path: Path) -> None:
    kept = SideFile(tmp_path / "normaliser.json", "normaliser_flush_failed", every=100)
    kept = kept.flush({"n": 1}, now=0)
    assert kept.flush({"n": 2}, now=99) == kept
    assert (kept.read(), kept.age(99)) == ({"n": 1}, 99)
    assert kept.flush({"n": 3}, now=100).written_at == 100
    assert kept.read() == {"n": 3}


def test_ta5_a_crash_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = SideFile(tmp_path / "normaliser.json", "normaliser_flush_failed").flush({"n": 1}, now=0)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        kept.flush({"n": 2}, now=1)
    assert kept.read() == {"n": 1}


def test_t5_a_write_that_fails_is_heard_and_strictly_raised(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    heard: list[Event] = []
    kept = SideFile(tmp_path / "a-file" / "normaliser.json", "normaliser_flush_failed", written_at=3)
    assert kept.flush({"n": 1}, now=10, emit=heard.append) == kept
    assert (heard[0].name, heard[0].payload["age"]) == ("normaliser_flush_failed", 7)
    with pytest.raises(RunError, match="cannot be written"):
        kept.flush({"n": 1}, now=10, is_strict=True)


def test_a_side_file_that_is_broken_is_refused(tmp_path: Path) -> None:
    kept = SideFile(tmp_path / "x.json", "x")
    assert kept.read() is None
    for text in ("{", "[]"):
        kept.path.write_text(text)
        with pytest.raises(CheckpointCorrupt, match=r"x\.json"):
            kept.read()


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.out = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_btd: Tensor) -> Tensor:
        return hidden_btd + self.out(F.gelu(self.up(self.norm(hidden_btd))))


class Tower(nn.Module):
    """Four layers in float64, of which only the tokens so far are seen."""

    def __init__(self, random_seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_seed)
            self.embedding = nn.Embedding(zoo.VOCABULARY, 12)
            self.layers = nn.ModuleList(Layer(12) for _ in range(4))
            self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, zoo.VOCABULARY)
        self.double()

    def forward(self, tokens_bt: Tensor) -> Tensor:
        n_seen_t1 = torch.arange(1, tokens_bt.shape[1] + 1)[:, None]
        hidden_btd = self.embedding(tokens_bt).cumsum(1) / n_seen_t1.sqrt()
        for layer in self.layers:
            hidden_btd = layer(hidden_btd)
        return self.head(self.norm(hidden_btd))


def texts(*random_seeds: int) -> list[Tensor]:
    return [
        torch.randint(zoo.VOCABULARY, (8, 33), generator=torch.Generator().manual_seed(each)) for each in random_seeds
    ]


def next_token(model: nn.Module, tokens_bt: Tensor) -> Tensor:
    found_bto = logits(model, tokens_bt[:, :-1])
    return F.cross_entropy(found_bto.flatten(0, 1), tokens_bt[:, 1:].flatten())


def distance(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """From what a whole model says to what this one does."""
    tokens_bt, whole_bto = batch
    apart_bto = F.kl_div(model(tokens_bt).log_softmax(-1), whole_bto, log_target=True, reduction="none")
    return apart_bto.sum(-1).mean()


def read_in(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """What a slot that reads the output of its module reads of these batches, tokens in rows."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *call: found.append(_first(call[-1]).flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            logits(model, batch[:, :-1])
    handle.remove()
    return torch.cat(found)


def _first(found: Tensor | tuple[Tensor, object]) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", PLACES)
def test_the_projection_is_whitened(name: str) -> None:
    """``A C A^T = 1`` for the moments of what the slot reads, with their ridge."""
    place, batches = PLACES[name], texts(1, 2)
    model = grow.attach(host(name), place).eval()
    found = slot_scores(model, batches, next_token, [place], 3)[place]
    x_td = read_in(model, place, batches)
    moments = x_td.T @ x_td / len(x_td)
    moments += 1e-3 * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    a_rd = found.projection
    assert a_rd is not None and found.n_tokens == len(x_td)
    torch.testing.assert_close(a_rd @ moments @ a_rd.T, torch.eye(3, dtype=a_rd.dtype), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PLACES)
def test_the_score_is_the_first_decrease_of_the_loss(name: str) -> None:
    """The derivative of the loss along the best addition of unit size, and along no drawn one is it larger."""
    place, batches = PLACES[name], texts(1, 2)
    model = grow.attach(host(name), place).eval()
    found = slot_scores(model, batches, next_token, [place], 2)[place]
    seed = grow.graft(model, place, "low_rank", rank=2, first_weights=found.first_weights)
    loss = sum(next_token(model, batch) for batch in batches) / len(batches)
    (slope_dr,) = torch.autograd.grad(loss, [seed.layer.out.weight])
    best_dr = -torch.linalg.svd(slope_dr, full_matrices=False)[0] @ torch.linalg.svd(slope_dr, full_matrices=False)[2]
    assert found.score == pytest.approx(-float((slope_dr * best_dr).sum()), rel=1e-9)
    x_td = read_in(model, place, batches)
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        drawn_rd = torch.randn(2, 12, generator=generator, dtype=torch.float64)
        size, axes = torch.linalg.eigh(drawn_rd @ (x_td.T @ x_td / len(x_td)) @ drawn_rd.T)
        grow.remove(model, place)
        other = {"down.weight": axes * size.rsqrt() @ axes.T @ drawn_rd}
        seed = grow.graft(model, place, "low_rank", rank=2, first_weights=other)
        loss = sum(next_token(model, batch) for batch in batches) / len(batches)
        (slope_dr,) = torch.autograd.grad(loss, [seed.layer.out.weight])
        assert float(torch.linalg.svdvals(slope_dr).sum()) < found.score


def test_the_slot_of_a_planted_deficit_ranks_first() -> None:
    """A host that lacks what another has in one of four layers is correlated with its loss there most of all: in four
    of five cases at least, as it is to be with trained hosts (growth.md 29.3, E7)."""
    hits, (tokens_bt,) = [], texts(3)
    for random_seed in range(2, 7):
        model = grow.attach(Tower(random_seed), "layers.*.out", reads="input")
        for lacking in (slots := list(grow.slots_in(model))):
            seed = grow.graft(model, lacking, "low_rank", rank=2)
            with torch.no_grad():
                seed.layer.out.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(4))
                whole_bto = model(tokens_bt).log_softmax(-1)
            grow.remove(model, lacking)
            found = slot_scores(model, [(tokens_bt, whole_bto)], distance, slots, 2)
            assert all(0 <= each.correlation <= 2 for each in found.values())
            hits.append(max(found, key=lambda slot: found[slot].correlation) == lacking)
    assert sum(hits) >= 0.8 * len(hits)


def test_scoring_is_one_pass_to_a_batch_and_leaves_no_trace() -> None:
    model = grow.attach(host("preset-default"), "blocks.*").train()
    (parameter, *_) = model.parameters()
    parameter.grad = torch.ones_like(parameter)
    before, drawn, calls = bits(model), torch.get_rng_state(), []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with torch.no_grad():
        found = slot_scores(model, texts(1, 2, 3), next_token, ["blocks.0", "blocks.1"], 2)
    assert calls == [True] * 3
    assert all(each.score > 0 for each in found.values())
    assert bits(model) == before and torch.equal(torch.get_rng_state(), drawn)
    assert all(module.training for module in model.modules())
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(slot.seed is None for slot in grow.slots_in(model).values())


def test_a_score_that_could_not_be_measured_is_none() -> None:
    model = grow.attach(Tower(1), "layers.*")
    found = slot_scores(model, texts(1), lambda each, batch: next_token(each, batch) * math.nan, ["layers.0"], 2)
    assert (found["layers.0"].score, found["layers.0"].projection) == (None, None)
    assert dict(found["layers.0"].first_weights) == {}
    unread = slot_scores(model, [], next_token, ["layers.0"], 2)["layers.0"]
    assert (unread.score, unread.correlation, unread.n_tokens) == (None, None, 0)


def test_a_slot_that_the_loss_does_not_depend_on_scores_0() -> None:
    model = grow.attach(Tower(1), "layers.*")
    found = slot_scores(model, texts(1), lambda each, batch: each(batch).sum() * 0, ["layers.0"], 2)["layers.0"]
    assert (found.score, found.correlation) == (0, 0)


def test_a_slot_that_cannot_be_scored_is_refused() -> None:
    model, _ = grown("foreign", "low_rank")
    before = bits(model)
    for name, k, what in ((PLACES["foreign"], 2, "holds a seed"), ("body.layer", 2, "no slot")):
        with pytest.raises(WrongValue, match=what):
            slot_scores(model, texts(1), next_token, [name], k)
    grow.remove(model, PLACES["foreign"])
    with pytest.raises(WrongValue, match="rank from 1 to 12"):
        slot_scores(model, texts(1), next_token, [PLACES["foreign"]], 13)
    assert before.keys() >= bits(model).keys()


def test_first_weights_begin_a_seed_and_keep_the_function() -> None:
    place, (tokens_bt,) = PLACES["preset-default"], texts(1)
    model = grow.attach(host("preset-default"), place)
    before = logits(model, tokens_bt)
    found = slot_scores(model, [tokens_bt], next_token, [place], 2)[place]
    seed = grow.graft(model, place, "low_rank", rank=2, first_weights=found.first_weights)
    assert torch.equal(logits(model, tokens_bt), before)
    assert torch.equal(seed.layer.down.weight, found.projection)


def test_first_weights_that_do_not_fit_are_refused() -> None:
    model = grow.attach(Tower(1), "layers.*")
    for weights, error, what in (
        ({"up.weight": torch.ones(2, 12)}, WrongValue, "down.weight"),
        ({"down.weight": torch.ones(3, 12)}, ShapeError, r"\(2, 12\)"),
        ({"down.weight": torch.full((2, 12), math.nan)}, NonFinite, "adds nan"),
        ({"out.weight": torch.ones(12, 2)}, NonFinite, "expected zero"),
    ):
        with pytest.raises(error, match=what):
            grow.graft(model, "layers.0", "low_rank", rank=2, first_weights=weights)
    assert grow.seeds_in(model) == {}


def planted(n: int, weights: dict[int, float] | None = None) -> tuple[nn.Module, list[str]]:
    """A tower with a seed in each of its first n slots, with weights off their first values."""
    model = grow.attach(Tower(5), ["layers.*", "layers.*.out"])
    slots = list(grow.slots_in(model))[:n]
    generator = torch.Generator().manual_seed(6)
    for place, slot in enumerate(slots):
        seed = grow.graft(model, slot, "low_rank", rank=2)
        with torch.no_grad():
            seed.layer.out.weight.normal_(std=0.3, generator=generator)
        grow.set_blend(model, slot, (weights or {}).get(place, 1.0))
    return model, slots


def measure(model: nn.Module) -> list[float]:
    with torch.no_grad():
        return [float(next_token(model, batch)) for batch in texts(11, 12, 13)]


def test_ablation_is_loss_without_less_loss_with_them() -> None:
    model, slots = planted(3, {0: 0.7, 1: 0.0})
    before = bits(model)
    found = grow.ablate(model, slots[:2], measure)
    assert bits(model) == before
    grow.set_blend(model, slots[1], 1.0)
    live = measure(model)
    for slot in slots[:2]:
        grow.set_blend(model, slot, 0.0)
    expected = [off - on for off, on in zip(measure(model), live, strict=True)]
    assert found.recent == tuple(expected) and found.n == 3


def test_an_ablation_that_fails_puts_the_seeds_back() -> None:
    model, slots = planted(1, {0: 0.5})
    before = bits(model)
    with pytest.raises(MissingMetric, match="not finite"):
        grow.ablate(model, slots, lambda _: [1.0, math.nan])
    with pytest.raises(ZeroDivisionError):
        grow.ablate(model, slots, lambda _: [1 / 0])
    with pytest.raises(WrongValue, match="empty"):
        grow.ablate(model, ["layers.3"], measure)
    assert bits(model) == before


def game(slots: list[str], model: nn.Module) -> list[float]:
    """Losses that depend on which seeds are on as a game would: own gains, and one of a pair."""
    is_on = [grow.seeds_in(model)[slot].is_live for slot in slots]
    gain = sum(0.1 * (place + 1) * each for place, each in enumerate(is_on))
    return [3 - gain - 0.5 * (is_on[0] and is_on[-1]), 2 - is_on[1]]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_contributions_are_shapley_values(n: int) -> None:
    """Each set is measured once; the values are the means over all orders and sum to the gain of all."""
    model, slots = planted(n)
    calls: list[frozenset[str]] = []

    def value(each: nn.Module) -> list[float]:
        calls.append(frozenset(slot for slot in slots if grow.seeds_in(each)[slot].is_live))
        return measure(each)

    found = grow.contributions(model, slots, value)
    assert len(calls) == len(set(calls)) == 2**n
    losses = {}
    for present in set(calls):
        for slot in slots:
            grow.set_blend(model, slot, float(slot in present))
        losses[present] = measure(model)
    for slot in slots:
        gains = [
            [losses[before][at] - losses[before | {slot}][at] for at in range(3)]
            for order in permutations(slots)
            for before in [frozenset(order[: order.index(slot)])]
        ]
        expected = [sum(column) / len(gains) for column in zip(*gains, strict=True)]
        assert found[slot].recent == pytest.approx(expected, abs=1e-12)
    total = [sum(each.recent[at] for each in found.values()) for at in range(3)]
    everything = [losses[frozenset()][at] - losses[frozenset(slots)][at] for at in range(3)]
    assert total == pytest.approx(everything, abs=1e-12)


def test_contributions_of_many_are_means_over_orders_and_their_reverses() -> None:
    """Of games in which only pairs matter they are exact, whatever was drawn; and the same seed draws the same."""
    model, slots = planted(6)
    before = bits(model)
    found = grow.contributions(model, slots, lambda each: game(slots, each), n_permutations=4, random_seed=3)
    expected = [0.1 * (place + 1) + 0.25 * (place in (0, 5)) for place in range(6)]
    assert [found[slot].recent[0] for slot in slots] == pytest.approx(expected)
    assert [found[slot].recent[1] for slot in slots] == pytest.approx([0, 1, 0, 0, 0, 0])
    assert found == grow.contributions(model, slots, lambda each: game(slots, each), n_permutations=4, random_seed=3)
    assert bits(model) == before


def test_contributions_refuse_what_they_cannot_count() -> None:
    model, slots = planted(2)
    with pytest.raises(WrongValue, match="even number"):
        grow.contributions(model, slots, measure, n_permutations=5)
    with pytest.raises(WrongValue, match="every slot once"):
        grow.contributions(model, [slots[0], slots[0]], measure)


def test_students_t_is_that_of_tables() -> None:
    assert (student_t(1), student_t(10), student_t(20)) == (12.706, 2.228, 2.086)
    assert student_t(500) == student_t(20)
