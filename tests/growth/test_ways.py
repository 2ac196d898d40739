"""Ways in which a seed learns: in shadow, where its host stays what it is without it to the bit; jointly; and alone."""

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import meristem.growth as grow
import zoo
from growth.catalogue import SEEDS, bits
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.corpus import Corpus
from meristem.data.prepare import prepare
from meristem.data.stream import Stream
from meristem.device.config import DeviceConfig
from meristem.device.resolve import resolve
from meristem.errors import OwnershipRefused, WrongValue
from meristem.events import Event, silent
from meristem.growth.isolation import Isolation, Pair, Read, ShadowPass, enter, leave, shadow_gradients
from meristem.growth.optimizer import carry_on
from meristem.growth.seed import _capped
from meristem.growth.stage import Way
from meristem.models.build import build as build_model
from meristem.nn.slot import Reads
from meristem.optim import state as optim_state
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build
from meristem.optim.origins import HOST, SeedSettings, origin_of
from meristem.train.backward import read_again
from meristem.train.config import AggregateConfig, TrainConfig
from meristem.train.loop import Step, steps
from meristem.train.loss import Teacher
from meristem.train.progress import Progress
from meristem.train.state import Held, TrainingState

DEVICE = resolve(DeviceConfig(device="cpu", dtype="fp32", threads=1), silent)
PLACE = "blocks.1"
READ: Read = partial(read_again, device=DEVICE, by=AggregateConfig())
CONFIG = OptimConfig(lr=3e-3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    place: Path = tmp_path_factory.mktemp("text")
    texts = place / "texts"
    texts.mkdir()
    for first in range(0, 400, 40):
        lines = [f"{number} squared is {number * number}, and so on.\n" for number in range(first, first + 40)]
        (texts / f"{first:03}.txt").write_text("".join(lines))
    return prepare(DataConfig(source=str(texts), root=place), TokenizerConfig())


class Noisy(nn.Module):
    """A layer with dropout after it, which counts its calls in a buffer."""

    n_calls: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("n_calls", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        self.n_calls.add_(1)
        return nn.functional.dropout(self.layer(hidden), 0.1)


def model_of(name: str, *, is_noisy: bool = False) -> nn.Module:
    model = build_model(*zoo.ZOO[name], 256, random_seed=3)
    if is_noisy:
        model.blocks[0].mlp = Noisy(model.blocks[0].mlp)
    return grow.attach(model, PLACE)


def training(model: nn.Module, stream: Stream, config: OptimConfig = CONFIG) -> Held:
    return Held.alone(model, build(model, config), Progress(cursor=stream.start()))


def stream_of(corpus: Corpus, order: str) -> Stream:
    return Stream(corpus, "train", window=17, batch=2, order=order, random_seed=5)  # type: ignore[arg-type]


def train(held: Held, stream: Stream, n_steps: int, beside: Any = None) -> list[Step]:
    torch.manual_seed(1)
    config = TrainConfig.model_validate({"max_time": None, "steps": n_steps})
    return list(steps(held, stream, lambda _: 1.0, config=config, device=DEVICE, beside=beside))


def of_host(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    own = {name: x for name, x in tensors.items() if origin_of(name) == HOST and not name.startswith("seed:")}
    return {name: x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, x in own.items()}


def all_of_host(state: TrainingState) -> tuple[dict[str, bytes], ...]:
    """Weights, buffers, moments, memory and generator of a run, without what is a seed's."""
    memory = {"/".join(path): x for path, x in leaves(state.progress.memory or {})}
    generator = {"cpu": torch.get_rng_state()}
    tensors = state.model.state_dict(), optim_state.tensors(state.model, state.optimizer), memory, generator
    return tuple(of_host(dict(each)) for each in tensors)


def leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Tensor]]:
    if isinstance(tree, Tensor):
        return [(path, tree)]
    return [found for name, each in dict(tree).items() for found in leaves(each, (*path, str(name)))]


@pytest.mark.parametrize(
    "name, is_noisy, order, n_steps",
    [
        ("preset-titans-mag", False, "sequential", 20),
        ("preset-default", True, "shuffled", 20),
        pytest.param("preset-titans-mag", False, "sequential", 200, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_v10_a_host_is_what_it_is_without_its_shadow(
    corpus: Corpus, name: str, is_noisy: bool, order: str, n_steps: int
) -> None:
    """Weights, buffers, moments, memory and generator are bitwise those of a run without a seed, whose loss falls."""
    stream, pairs, events, slow = stream_of(corpus, order), [], list[Event](), OptimConfig(lr=2e-4)
    alone = training(model_of(name, is_noisy=is_noisy), stream, slow)
    wanted = train(alone, stream, n_steps)
    without = all_of_host(alone.state)

    model = model_of(name, is_noisy=is_noisy)
    held = training(model, stream, slow)
    seed = grow.graft(model, PLACE, "bottleneck", hidden=8)
    enter(model, PLACE, "shadow")
    fast = SeedSettings(warmup_steps=0, rate_scale=100.0)
    held.state = replace(held.state, optimizer=carry_on(held.state.optimizer, model, slow, settings=fast))
    shadow = ShadowPass(READ, (PLACE,), pairs.append, every=4, emit=events.append)
    first = bits(seed)
    made = train(held, stream, n_steps, shadow)
    assert all_of_host(held.state) == without
    assert [step.loss_nats for step in made] == [step.loss_nats for step in wanted]
    assert bits(seed) != first and not seed.is_live and float(seed.blend_weight) == 0
    checks = [each for each in pairs if isinstance(each, Isolation)]
    assert [each.step for each in checks] == [0] and checks[0].is_isolated
    differences = [each.difference() for each in pairs if isinstance(each, Pair)]
    assert [each.step for each in pairs if isinstance(each, Pair)] == list(range(0, n_steps, 4))
    assert differences[0] == 0 and sum(differences[-4:]) < 4 * (-0.1 if n_steps > 100 else 0)
    assert (
        optim_state.tensors(model, held.state.optimizer)[f"{PLACE}.slot.seed.layer.layer.out.weight/step"]
        == n_steps / 4
    )


@pytest.mark.parametrize(
    "name, place, order, reads",
    [
        ("preset-titans-mag", "blocks.0", "sequential", "output"),
        ("preset-titans-mag", "blocks.1", "documents", "input"),
        ("preset-default", "blocks.1.mixer", "shuffled", "input"),
    ],
)
def test_a_pass_may_begin_where_its_seed_is(corpus: Corpus, name: str, place: str, order: str, reads: Reads) -> None:
    """With what the step itself computed before the seed, losses, seed and host are the same bits, with fewer calls."""
    found = []
    for is_watched in (False, True):
        stream, pairs, calls = stream_of(corpus, order), [], list[int]()
        model = grow.attach(build_model(*zoo.ZOO[name], 256, random_seed=3), ["blocks.0", place], reads=reads)
        held = training(model, stream)
        grow.graft(model, place, "bottleneck", hidden=8)
        enter(model, place, "shadow")
        config = TrainConfig.model_validate({"max_time": None, "steps": 3, "grad_accum_steps": 2})
        held.state = replace(
            held.state,
            optimizer=carry_on(held.state.optimizer, model, CONFIG, settings=SeedSettings(warmup_steps=0)),
            progress=replace(held.state.progress, n_micro_batches=2),
        )
        shadow = ShadowPass(READ, (place,), pairs.append, every=2, check_every=0)
        norm = model.blocks[0].mixer_norm
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if is_watched:
            shadow.watch(held.state)
        for _ in steps(held, stream, lambda _: 1.0, config=config, device=DEVICE, beside=shadow):
            if is_watched:
                shadow.watch(held.state)
        losses = [(float(each.without), float(each.with_seed)) for each in pairs]
        assert len(losses) == 2 and losses[-1][0] != losses[-1][1]
        found.append((losses, bits(model), len(calls)))
    assert found[0][:2] == found[1][:2]
    # Three steps of two batches in two pieces, and two passes.
    assert found[0][2] * 3 == found[1][2] * 5


def test_a_step_that_draws_is_read_again_from_its_beginning(corpus: Corpus) -> None:
    """What dropout draws before the seed it draws in the pass as well, so that what comes after it is a pair."""
    told, model, stream = [], model_of("preset-default", is_noisy=True), stream_of(corpus, "shuffled")
    held = training(model, stream)
    grow.graft(model, PLACE, "bottleneck", hidden=8)
    enter(model, PLACE, "shadow")
    shadow = ShadowPass(READ, (PLACE,), told.append, check_every=0)
    shadow.watch(held.state)
    train(held, stream, 1, shadow)
    assert told[0].difference() == 0.0


@pytest.mark.parametrize("seed", [name for name in SEEDS if "-" not in name])
def test_pass_b_gives_the_gradients_of_a_model_with_the_seed_live(corpus: Corpus, seed: str) -> None:
    """Those of the seed are the ones that a live seed has in a plain backward; no other parameter has any."""
    stream = stream_of(corpus, "shuffled")
    model = model_of("preset-default")
    blueprint, settings = SEEDS[seed]
    made = grow.graft(model, PLACE, blueprint, **settings)
    with torch.no_grad():
        for each in made.parameters():
            each.add_(0.1 * torch.randn(each.shape, generator=torch.Generator().manual_seed(1)))
    batch, _ = stream.next(stream.start())
    other = copy.deepcopy(model)
    grow.set_blend(model, PLACE, 0.0)
    held = training(model, stream)
    generators = {"cpu": torch.get_rng_state()}
    loss = shadow_gradients(held.state, [batch], None, generators, read=READ, slot=PLACE)
    found, _ = other(batch.tokens_bt)
    wanted = nn.functional.cross_entropy(found.flatten(0, 1), batch.targets_bt.flatten())
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())
    for name, each in model.named_parameters():
        gradient = other.get_parameter(name).grad if origin_of(name) != HOST else None
        assert (each.grad is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(each.grad, gradient, rtol=1e-4, atol=1e-6)


def test_two_seeds_learn_each_without_the_other(corpus: Corpus) -> None:
    """One pass B per seed: what one learns is what it learns alone, to the bit."""
    stream, places = stream_of(corpus, "shuffled"), ("blocks.0", PLACE)
    found = []
    for own in (places, places[:1], places[1:]):
        model = grow.attach(model_of("preset-default"), places[0])
        for place in own:
            grow.graft(model, place, "low_rank", rank=2)
            enter(model, place, "shadow")
        train(training(model, stream), stream, 9, ShadowPass(READ, own, lambda _: None, every=4, check_every=0))
        found.append({place: bits(seed) for place, seed in grow.seeds_in(model).items()})
    assert found[0] == found[1] | found[2]


def test_a_pass_of_several_micro_batches_is_that_of_one(corpus: Corpus) -> None:
    stream = stream_of(corpus, "sequential")
    batches = [stream.next(stream.start())[0]]
    batches.append(stream.next(stream.next(stream.start())[1])[0])
    found = []
    for n_micro_batches in (1, 2):
        model = model_of("preset-titans-mag")
        seed = grow.graft(model, PLACE, "norm")
        enter(model, PLACE, "shadow")
        start = Progress(cursor=stream.start(), n_micro_batches=n_micro_batches)
        held = Held.alone(model, build(model, CONFIG), start)
        shadow_gradients(held.state, batches, None, {"cpu": torch.get_rng_state()}, read=READ, slot=PLACE)
        found.append(seed.layer.gain_d.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_a_seed_that_takes_part_in_the_step_has_no_shadow(corpus: Corpus) -> None:
    stream, model = stream_of(corpus, "shuffled"), model_of("preset-default")
    grow.graft(model, PLACE, "norm")
    with pytest.raises(WrongValue, match="has the blend weight 1, and takes part in the step; expected 0"):
        train(training(model, stream), stream, 1, ShadowPass(READ, (PLACE,), lambda _: None, check_every=0))
    with pytest.raises(WrongValue, match="a pass every 0 steps and a check every 400 were found"):
        ShadowPass(READ, (PLACE,), lambda _: None, every=0)
    with pytest.raises(WrongValue, match="a seed cannot learn 'alone'; ways are joint, shadow, frozen_host, capped"):
        enter(model, PLACE, "alone")  # type: ignore[arg-type]


def test_no_room_for_a_pass_costs_that_pass_alone(corpus: Corpus) -> None:
    stream, model, events = stream_of(corpus, "shuffled"), model_of("preset-default"), list[Event]()
    seed = grow.graft(model, PLACE, "norm")
    enter(model, PLACE, "shadow")

    def full(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    first = bits(seed)
    train(
        training(model, stream),
        stream,
        2,
        ShadowPass(full, (PLACE,), lambda _: None, check_every=0, emit=events.append),
    )
    assert [event.name for event in events] == ["shadow.skipped"] and bits(seed) == first


@pytest.mark.parametrize(
    "name, is_noisy, order", [("preset-titans-mag", False, "sequential"), ("preset-default", True, "shuffled")]
)
def test_a_capped_seed_learns_beside_a_host_that_is_what_it_is_without_it(
    corpus: Corpus, name: str, is_noisy: bool, order: str
) -> None:
    """Weights, buffers, moments, memory, generator and losses are bitwise those of a run without it, and it helps once
    it is live: after each step it would have added a tenth of the hidden vector at most."""
    stream, slow, n_steps = stream_of(corpus, order), OptimConfig(lr=2e-4), 24
    alone = training(model_of(name, is_noisy=is_noisy), stream, slow)
    wanted = train(alone, stream, n_steps)
    model = model_of(name, is_noisy=is_noisy)
    held = training(model, stream, slow)
    seed = grow.graft(model, PLACE, "bottleneck", hidden=8)
    assert enter(model, PLACE, "capped") == frozenset() and seed.is_live and float(seed.blend_weight) == 0
    fast = SeedSettings(warmup_steps=0, rate_scale=30.0)
    held.state = replace(held.state, optimizer=carry_on(held.state.optimizer, model, slow, settings=fast))
    first = bits(seed)
    made = train(held, stream, n_steps)
    assert all_of_host(held.state) == all_of_host(alone.state) and bits(seed) != first
    assert [step.loss_nats for step in made] == [step.loss_nats for step in wanted]
    batch = stream.next(stream.start())[0]

    def losses(model: nn.Module) -> list[float]:
        torch.manual_seed(2)
        return [float(read_again(held.state, [batch], None, lambda _: None, device=DEVICE, by=AggregateConfig()))]

    assert grow.ablate(model, [PLACE], losses).mean > 0.01
    seed.layer.layer.out.weight.data.fill_(math.nan)
    assert losses(model) == losses(alone.state.model), "what it holds cannot reach what comes out"


def test_what_a_capped_seed_would_add_is_a_tenth_of_what_it_adds_to_at_most() -> None:
    """Token by token, and its gradient is that of the capped addition; a smaller one is left alone."""
    added = torch.tensor([[[3.0, 4.0], [0.03, 0.04], [0.0, 0.0]]], requires_grad=True)
    host = torch.tensor([[[6.0, 8.0], [6.0, 8.0], [6.0, 8.0]]])
    capped = _capped(added, host)
    torch.testing.assert_close(capped, torch.tensor([[[0.6, 0.8], [0.03, 0.04], [0.0, 0.0]]]))
    (found,) = torch.autograd.grad(capped.sum(), added)
    torch.testing.assert_close(found[0, 1:], torch.ones_like(found[0, 1:]))
    assert float((found[0, 0] * added[0, 0].detach()).sum()) == pytest.approx(0, abs=1e-6), "along it nothing is gained"


@pytest.mark.parametrize("way, moves_host", [("joint", True), ("frozen_host", False)])
def test_a_live_seed_learns_with_its_host_or_without_it(corpus: Corpus, way: Way, moves_host: bool) -> None:
    """A frozen host, and what was gathered for it, is the same bits after; then it learns on as if nothing had been."""
    stream, model = stream_of(corpus, "shuffled"), model_of("preset-titans-mag")
    held = training(model, stream)
    train(held, stream, 4)
    before = all_of_host(held.state)
    seed = grow.graft(model, PLACE, "bottleneck", hidden=8)
    frozen = enter(model, PLACE, way)
    optimizer = carry_on(held.state.optimizer, model, CONFIG, settings=SeedSettings(warmup_steps=0, rate_scale=3.0))
    alone = Held.alone(model, optimizer, held.state.progress)
    first = bits(seed)
    made = train(alone, stream, 24)
    assert bits(seed) != first and made[-1].grad_norm
    assert sum(step.loss_nats for step in made[-5:]) < sum(step.loss_nats for step in made[:5])
    after = all_of_host(alone.state)
    assert (after[0] != before[0]) == moves_host
    if not moves_host:
        assert {name: x for name, x in after[1].items() if not name.startswith("clock")} == {
            name: x for name, x in before[1].items() if not name.startswith("clock")
        }
    leave(model, frozen)
    assert all(each.requires_grad for each in model.parameters())
    saved = optim_state.tensors(model, optimizer)
    optim_state.restore(model, build(model, CONFIG), saved)
    train(alone, stream, 25)
    assert all_of_host(alone.state)[0] != after[0]


def test_a_host_that_never_learned_can_be_saved_while_it_is_frozen(corpus: Corpus) -> None:
    """A frozen host without moments is resumed as one without moments."""
    stream, model = stream_of(corpus, "shuffled"), model_of("preset-default")
    grow.graft(model, PLACE, "norm")
    held = training(model, stream)
    frozen = enter(model, PLACE, "frozen_host")
    train(held, stream, 2)
    saved = optim_state.tensors(model, held.state.optimizer)
    leave(model, frozen)
    other = build(model, CONFIG)
    optim_state.restore(model, other, saved)
    assert set(other.state) == set(grow.seeds_in(model)[PLACE].parameters())


def test_ka5_a_seed_learns_from_a_teacher(corpus: Corpus) -> None:
    """In shadow, with the teacher in place of the text: its gradient reaches the seed, pairs are those of the text."""
    stream, teacher = stream_of(corpus, "shuffled"), build_model(*zoo.ZOO["preset-default"], 256, random_seed=9)
    found = {}
    for weight in (None, 0.0, 1.0):
        model, pairs = model_of("preset-default"), []
        seed = grow.graft(model, PLACE, "bottleneck", hidden=8)
        enter(model, PLACE, "shadow", teacher=teacher)
        read = READ if weight is None else partial(READ, teacher=Teacher(teacher, weight=weight))
        train(training(model, stream), stream, 5, ShadowPass(read, (PLACE,), pairs.append, every=2, check_every=0))
        found[weight] = bits(seed), [each.difference() for each in pairs]
    assert found[None] == found[0.0] and found[None][0] != found[1.0][0]
    assert found[1.0][1][0] == 0 and all(each.grad is None for each in teacher.parameters())


def test_what_teaches_does_not_learn_meanwhile() -> None:
    """A host may teach its seed only where it is frozen, and a seed is never its own teacher."""
    model = model_of("preset-default")
    seed = grow.graft(model, PLACE, "norm")
    before = bits(model)
    for way, teacher in (("joint", model.blocks[0]), ("shadow", model.blocks[0]), ("frozen_host", seed)):
        with pytest.raises(OwnershipRefused) as caught:
            enter(model, PLACE, way, teacher=teacher)  # type: ignore[arg-type]
        assert caught.value.fields["code"] == ("other_seed" if teacher is seed else "teacher_clash")
    assert bits(model) == before and all(each.requires_grad for each in model.parameters())
    assert enter(model, PLACE, "frozen_host", teacher=model.blocks[0])


@pytest.mark.slow
@pytest.mark.compiled
def test_a_pass_of_compiled_blocks_compiles_them_once(corpus: Corpus) -> None:
    """The graphs of a seed that is off and of one that is live are made in the first step; pairs are those without."""
    stream, found = stream_of(corpus, "shuffled"), []
    for is_compiled in (False, True):
        model, pairs, n_graphs = model_of("preset-default"), [], []
        grow.graft(model, PLACE, "bottleneck", hidden=8)
        enter(model, PLACE, "shadow")
        for block in model.blocks if is_compiled else ():
            block.compile(backend="aot_eager")
        held, shadow = training(model, stream), ShadowPass(READ, (PLACE,), pairs.append, every=1, check_every=0)
        for n_steps in (1, 2, 4):
            train(held, stream, n_steps, shadow)
            n_graphs.append(counters["stats"]["unique_graphs"])
        assert len(set(n_graphs)) == 1
        found.append([each.difference() for each in pairs])
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0][-1] != 0
