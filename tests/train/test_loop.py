"""The loop: exact accumulation, clipping, limits, and what a bad step leaves behind."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import meristem
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.corpus import Corpus
from meristem.data.prepare import prepare
from meristem.data.stream import IGNORED, Batch, Cursor, Stream
from meristem.device.config import DeviceConfig
from meristem.device.resolve import resolve
from meristem.errors import NonFinite
from meristem.events import silent
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from meristem.optim import state
from meristem.optim.config import OptimConfig
from meristem.optim.groups import build as build_optimizer
from meristem.optim.kinds import KINDS
from meristem.optim.multi_period import MultiPeriodOptimizer
from meristem.optim.schedule import ScheduleProgress
from meristem.train import loop
from meristem.train.backward import backward
from meristem.train.config import AggregateConfig, TrainConfig
from meristem.train.loop import Step, steps
from meristem.train.progress import Progress
from meristem.train.state import Held
from zoo import ZOO

DEVICE = resolve(DeviceConfig(device="cpu", dtype="fp32", threads=1), silent)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    place: Path = tmp_path_factory.mktemp("text")
    text = place / "text.txt"
    text.write_text("".join(f"{number} squared is {number * number}, and so on.\n" for number in range(400)))
    return prepare(DataConfig(source=str(text), root=place), TokenizerConfig())


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Many documents, some shorter than a window."""
    place: Path = tmp_path_factory.mktemp("texts")
    texts = place / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number:02}.txt").write_text(f"{number} squared is {number * number}.\n" * (1 + number * 7 % 5))
    return prepare(DataConfig(source=str(texts), root=place), TokenizerConfig())


def stream_of(corpus: Corpus, *, batch: int, order: str = "shuffled") -> Stream:
    return Stream(corpus, "train", window=13, batch=batch, order=order, random_seed=5)  # type: ignore[arg-type]


def tiny() -> nn.Module:
    return build(ModelConfig(name="chargru", dim=11, n_layers=2), MemoryConfig(), 256, random_seed=1)


def run(
    model: nn.Module, stream: Stream, config: TrainConfig, *, clip: float | None = 1.0, start: Progress | None = None
) -> list[Step]:
    optimizer = build_optimizer(model, OptimConfig(lr=0.01, grad_clip=clip))
    start = start or Progress(cursor=stream.start())
    schedule: Callable[[ScheduleProgress], float] = lambda done: 1 - done.share / 2  # noqa: E731
    made = steps(Held.alone(model, optimizer, start), stream, schedule, config=config, device=DEVICE)
    return list(made)


def limit(**settings: object) -> TrainConfig:
    return TrainConfig.model_validate({"max_time": None, **settings})


class Ragged:
    """A stream whose batches predict differently many targets: only the first of each row count in some."""

    def __init__(self, stream: Stream, kept: list[int]) -> None:
        self.stream, self.kept = stream, kept

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        n_kept = self.kept[cursor.position % len(self.kept)]
        batch, after = self.stream.next(cursor)
        targets_bt = batch.targets_bt.clone()
        targets_bt[:, n_kept:] = IGNORED
        return replace(batch, targets_bt=targets_bt, n_targets=batch.targets_bt[:, :n_kept].numel()), after


def gradient(model: nn.Module, tokens_bt: Tensor, targets_bt: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean over all kept targets, in one piece and in float64."""
    model = copy.deepcopy(model).double()
    logits_bto, _ = model(tokens_bt)
    loss = nn.functional.cross_entropy(logits_bto.flatten(0, 1), targets_bt.flatten(), ignore_index=IGNORED)
    return dict(
        zip(
            (name for name, _ in model.named_parameters()),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        )
    )


def test_accumulation_is_exact(corpus):
    """Three ragged batches of 2 rows give the gradient of their 6 rows in one piece, each target counting the same.

    CX-3.2.
    """
    stream = Ragged(stream_of(corpus, batch=2), kept=[13, 4, 1])
    model, seen = tiny(), {}
    cursor, rows = stream.stream.start(), []
    for _ in range(3):
        batch, cursor = stream.next(cursor)
        rows.append(batch)
    tokens_bt = torch.cat([batch.tokens_bt for batch in rows])
    wanted = gradient(model, tokens_bt, torch.cat([batch.targets_bt for batch in rows]))
    optimizer = build_optimizer(model, OptimConfig(grad_clip=None))
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
    )
    progress = Progress(cursor=stream.stream.start())
    part = limit(steps=1, grad_accum_steps=3)
    (step,) = steps(Held.alone(model, optimizer, progress), stream, lambda _: 1.0, config=part, device=DEVICE)
    assert step.n_targets == 2 * (13 + 4 + 1)
    for name, gradient_found in seen.items():
        torch.testing.assert_close(gradient_found.double(), wanted[name], rtol=0, atol=1e-6)


def test_norm_is_measured_before_clipping(corpus):
    """The norm told is that of the gradient, whatever it is cut to."""
    norms = [run(tiny(), stream_of(corpus, batch=3), limit(steps=1), clip=clip)[0].grad_norm for clip in (None, 1e-3)]
    assert norms[0] == norms[1] and norms[0] > 1e-2


def test_clipping_bounds_the_gradient(corpus):
    model, norms = tiny(), []
    optimizer = build_optimizer(model, OptimConfig(grad_clip=0.01))
    optimizer.parts[0].register_step_pre_hook(
        lambda *_: norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    )
    stream = stream_of(corpus, batch=3)
    start = Progress(cursor=stream.start())
    list(steps(Held.alone(model, optimizer, start), stream, lambda _: 1.0, config=limit(steps=3), device=DEVICE))
    assert max(norms) <= 0.01 * (1 + 1e-5)


@pytest.mark.parametrize("limits", [{"steps": 6}, {"tokens": 6 * 3 * 13}, {"tokens": 5 * 3 * 13 + 1}])
def test_limits_agree(corpus, limits):
    """CX-3.4: Six steps, their tokens, and one token more than five steps have: the same six losses."""
    by_steps = run(tiny(), stream_of(corpus, batch=3), limit(steps=6))
    made = run(tiny(), stream_of(corpus, batch=3), limit(**limits))
    assert [step.progress.step for step in made] == [1, 2, 3, 4, 5, 6]
    if limits != {"tokens": 5 * 3 * 13 + 1}:
        assert [step.loss_nats for step in made] == [step.loss_nats for step in by_steps]


class Slow(nn.Module):
    """A model that takes a second of its own clock for every call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.inner, self.now_s = tiny(), 100.0
        monkeypatch.setattr(loop.time, "perf_counter", lambda: self.now_s)

    def forward(self, tokens_bt, state=None):
        self.now_s += 1
        return self.inner(tokens_bt, state)


def test_budget_ends_the_run(corpus, monkeypatch):
    """The step in which the time runs out is the last; the schedule follows the share of time used before a step."""
    made = run(Slow(monkeypatch), stream_of(corpus, batch=3), TrainConfig(max_time=6.5, grad_accum_steps=2))
    assert [step.progress.seconds_used for step in made] == [2, 4, 6, 8]
    assert [step.rate for step in made] == pytest.approx([0.01 * (1 - used / 6.5 / 2) for used in (0, 2, 4, 6)])


def test_time_between_steps_is_not_charged(corpus, monkeypatch):
    """Whoever consumes the steps may take his time: evaluating and saving do not use up the budget."""
    model, stream = Slow(monkeypatch), stream_of(corpus, batch=3)
    optimizer, start = build_optimizer(model, OptimConfig()), Progress(cursor=stream.start())
    part, n_steps = TrainConfig(max_time=3.5), 0
    for _ in steps(Held.alone(model, optimizer, start), stream, lambda _: 1.0, config=part, device=DEVICE):
        model.now_s += 1000
        n_steps += 1
    assert n_steps == 4


@pytest.mark.parametrize("order", ["shuffled", "sequential", "documents"])
@pytest.mark.parametrize("n_first", [1, 4])
def test_going_on_from_progress_changes_nothing(documents, order, n_first):
    """Seven steps in one piece, or n and 7 - n with weights, moments and progress handed over: the same bits."""
    stream = stream_of(documents, batch=3, order=order)
    whole = [step.loss_nats for step in run(tiny(), stream, limit(steps=7))]
    model = tiny()
    optimizer = build_optimizer(model, OptimConfig(lr=0.01))
    progress, losses = Progress(cursor=stream.start()), []
    for n_until in (n_first, 7):
        made = steps(
            Held.alone(model, optimizer, progress),
            stream,
            lambda done: 1 - done.share / 2,
            config=limit(steps=7),
            device=DEVICE,
        )
        for step in made:
            progress = step.progress
            losses.append(step.loss_nats)
            if progress.step == n_until:
                break
    assert losses == whole


def test_memory_is_carried_only_where_batches_go_on(corpus):
    """Read in sequence, a later loss depends on what an earlier batch left; its gradient does not reach back there."""
    stream = stream_of(corpus, batch=3, order="sequential")
    carried = run(tiny(), stream, limit(steps=3))
    fresh, progress = [], Progress(cursor=stream.start())
    model = tiny()
    optimizer = build_optimizer(model, OptimConfig(lr=0.01))
    for _ in range(3):
        part = limit(steps=3)
        made = steps(
            Held.alone(model, optimizer, replace(progress, memory=None)),
            stream,
            lambda done: 1 - done.share / 2,
            config=part,
            device=DEVICE,
        )
        step = next(made)
        progress = step.progress
        fresh.append(step.loss_nats)
    assert fresh[0] == carried[0].loss_nats
    assert fresh[1] != carried[1].loss_nats


def test_packed_documents_do_not_depend_on_the_micro_batches(documents):
    """Rows of a micro-batch take along where their documents begin, and their own counts of the state."""
    stream, found = stream_of(documents, batch=4, order="documents"), []
    for n_micro_batches in (1, 3):
        model, memory, cursor = with_levels().double(), None, stream.start()
        for step in range(3):
            batch, cursor = stream.next(cursor)
            cut = {"n_micro_batches": n_micro_batches, "by": AggregateConfig(), "step": step}
            result = backward(model, [batch], memory, DEVICE, **cut)
            memory = result.memory
        found.append((result.loss, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


class Poisoned(nn.Module):
    """A model whose logits are not finite at the given calls."""

    def __init__(self, bad_calls: set[int], value: float) -> None:
        super().__init__()
        self.inner, self.bad_calls, self.value, self.n_calls = tiny(), bad_calls, value, 0

    def forward(self, tokens_bt, state=None):
        logits_bto, state = self.inner(tokens_bt, state)
        self.n_calls += 1
        return (logits_bto * self.value if self.n_calls in self.bad_calls else logits_bto), state


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_step_changes_nothing(corpus, value):
    """CX-3.3: Weights, moments and step counters are to the bit those before it; it is counted and the run goes on."""
    model = Poisoned({3}, value)
    stream = stream_of(corpus, batch=3)
    optimizer = build_optimizer(model, OptimConfig(lr=0.01))
    start, snapshots, counts = Progress(cursor=stream.start()), [], []
    for step in steps(Held.alone(model, optimizer, start), stream, lambda _: 1.0, config=limit(steps=4), device=DEVICE):
        moments = [tensor for held in optimizer.state.values() for tensor in held.values()]
        snapshots.append([tensor.detach().clone() for tensor in (*model.parameters(), *moments)])
        counts.append((step.progress.n_nonfinite, step.progress.n_nonfinite_in_row))
    assert counts == [(0, 0), (0, 0), (1, 1), (1, 0)]
    assert all(torch.equal(*pair) for pair in zip(snapshots[1], snapshots[2], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(snapshots[2], snapshots[3], strict=True))


def test_memory_of_a_bad_step_is_dropped(corpus):
    """The window after it starts afresh, so that one bad number does not spoil the rest of the run."""
    made = run(Poisoned({2}, math.nan), stream_of(corpus, batch=3, order="sequential"), limit(steps=3))
    assert [step.progress.memory is None for step in made] == [False, True, False]


def test_too_many_in_a_row_end_the_run(corpus):
    """CX-3.3."""
    with pytest.raises(NonFinite, match=r"not finite in 2 steps in a row, up to step 5; 2 end a run") as caught:
        run(Poisoned({2, 4, 5}, math.nan), stream_of(corpus, batch=3), limit(steps=9, max_nonfinite=2))
    assert caught.value.fields == {"step": 5, "count": 2}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes tensors pass for those of an accelerator, and tells every time that one is read by the host."""
    made: list[str] = []

    def watched(name: str) -> Callable[..., object]:
        original = getattr(torch.Tensor, name)

        def read(self: Tensor, *arguments: object) -> object:
            made.append(name)
            return original(self, *arguments)

        return read

    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("period", [1, 3])
def test_accelerator_is_read_only_where_a_step_logs(corpus, reads, kind, period):
    """CX-3.5: One read per record, however many steps lie between; the other steps tell no loss.

    Whatever kind of optimizer moves the model, and also where levels wait and fire.
    """
    stream, model = stream_of(corpus, batch=3), tiny()
    model.stack.period = period
    optimizer, start = build_optimizer(model, OptimConfig(name=kind)), Progress(cursor=stream.start())
    part = limit(steps=9, log_every=4, grad_accum_steps=2)
    told = []
    for step in steps(Held.alone(model, optimizer, start), stream, lambda _: 1.0, config=part, device=DEVICE):
        told.append((step.loss_nats is not None, len(reads)))
        reads.clear()
    assert told == [(number % 4 == 0, int(number % 4 == 0)) for number in range(1, 10)]


class Waits(TorchDispatchMode):
    """Names the operations for whose result the host of an accelerator would have to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        is_mask = name.startswith("index") and any(
            isinstance(leaf, Tensor) and leaf.dtype is torch.bool for leaf in pytree.tree_leaves(args[1:])
        )
        if is_mask or name in WAITING:
            self.made.append(name)
        return func(*args, **(kwargs or {}))


WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "_unique2",
    "unique_dim",
    "allclose",
)
"""Operations whose result, or its shape, the host has to know."""

UNASKED = (
    *("preset-hope", "preset-hope-attention", "preset-titans-mac", "preset-titans-mag", "preset-titans-mal"),
    *("lm-memory-3-pooled", "lm-mac-4-each", "lm-levels-pooled", "lm-self_reference-adaptive"),
    *("lm-mag-kept-soup", "lm-mag-frequency-output", "lm-mag-frequency-write"),
)
"""Models of the zoo that have every composition, level and kept memory between them."""


@pytest.mark.parametrize("name", UNASKED)
def test_no_model_makes_the_host_wait(corpus, reads, name):
    """Forward, backward and update go out without a question, whatever the memory. One read where the step logs.

    CX-3.5.
    """
    model, stream = build(*ZOO[name], 256, random_seed=1), stream_of(corpus, batch=2)
    optimizer, start = build_optimizer(model, OptimConfig()), Progress(cursor=stream.start())
    part, told = limit(steps=2, log_every=2), []
    with Waits() as waits:
        for _ in steps(Held.alone(model, optimizer, start), stream, lambda _: 1.0, config=part, device=DEVICE):
            told.append((list(reads), list(waits.made)))
            reads.clear()
            waits.made.clear()
    assert told == [([], []), (["tolist"], [])]


def test_a_question_is_noticed(reads):
    """Of the kinds that a model could ask."""
    number = torch.arange(3.0)
    with Waits() as waits:
        for ask in (torch.nonzero, lambda x: x[x > 1], lambda x: x.masked_select(x > 1), lambda x: x.max().item()):
            ask(number)
    assert reads == ["item"] and [name for name in waits.made if name != "nonzero"] == [
        "index",
        "masked_select",
        "_local_scalar_dense",
    ]


def test_accelerator_counts_bad_steps_at_the_next_record(corpus, reads):
    """What went wrong between two records is known at the second, in full; too many in a row are noticed there too."""
    made = run(Poisoned({2, 3, 7}, math.nan), stream_of(corpus, batch=3), limit(steps=8, log_every=4))
    counts = [(step.progress.n_nonfinite, step.progress.n_nonfinite_in_row) for step in made]
    assert (counts[2], counts[3], counts[7]) == ((0, 0), (2, 0), (3, 0))
    with pytest.raises(NonFinite, match="in 2 steps in a row"):
        run(Poisoned({1, 2}, math.nan), stream_of(corpus, batch=3), limit(steps=8, log_every=4, max_nonfinite=2))


@pytest.mark.parametrize("log_every", [1, 4, 8])
def test_accelerator_tells_of_skipped_steps_before_they_end_the_run(corpus, reads, log_every):
    """Issue 9, 2.6: whoever watches hears of each skipped step, however many are read together, and may go back."""
    held = Held.alone(model := Poisoned({1, 2}, math.nan), build_optimizer(model, OptimConfig()), None)
    stream = stream_of(corpus, batch=3)
    held.state = replace(held.state, progress=Progress(cursor=stream.start()))
    config, heard = limit(steps=8, log_every=log_every, max_nonfinite=2), []
    with pytest.raises(NonFinite, match="in 2 steps in a row, up to step 2"):
        for step in steps(held, stream, lambda _: 1.0, config=config, device=DEVICE):
            heard += [each.step for each in step.stats if each.is_skipped]
    assert heard == [1, 2]


def test_accelerator_drops_a_spoilt_memory_at_once(corpus, reads):
    """A memory that is carried on is worth a read per step: one bad window must not spoil the next four."""
    stream = stream_of(corpus, batch=3, order="sequential")
    made = run(Poisoned({2}, math.nan), stream, limit(steps=4, log_every=4))
    assert made[-1].progress.n_nonfinite == 1


def with_levels() -> nn.Module:
    """A model with a memory that carries momentum, its layers and a part of one at periods of their own."""
    part = MemoryConfig(head_dim=4, chunk=3, rule="titans")
    model = build(ModelConfig(mixer="memory", dim=12, n_layers=2, mlp_dim=17), part, 256, random_seed=1)
    for period, module in ((2, model.blocks[0].mlp), (3, model.blocks[1]), (5, model.blocks[1].mlp)):
        module.period = period
    return model


@pytest.mark.parametrize("order, cut", [("sequential", 4), ("sequential", 9), ("sequential", 15), ("documents", 9)])
def test_resuming_levels_changes_nothing(documents, order, cut):
    """Memory.md 12: 20 steps across fires of four levels, with AdamW, a momentum memory that is carried on, and two
    batches a step: what was saved and restored in between takes the same losses and ends at the same weights.
    """
    stream = stream_of(documents, batch=3, order=order)

    def some(model: nn.Module, optimizer: MultiPeriodOptimizer, start: Progress, n_until: int) -> list[Step]:
        part = limit(steps=n_until, grad_accum_steps=2)
        return list(steps(Held.alone(model, optimizer, start), stream, lambda _: 1.0, config=part, device=DEVICE))

    whole, first, second = (with_levels() for _ in range(3))
    optimizers = [build_optimizer(model, OptimConfig(lr=0.01)) for model in (whole, first, second)]
    assert optimizers[0].clock.periods == (1, 2, 3, 5)
    wanted = some(whole, optimizers[0], Progress(cursor=stream.start()), 20)
    before = some(first, optimizers[1], Progress(cursor=stream.start()), cut)
    second.load_state_dict(first.state_dict())
    state.restore(second, optimizers[2], state.tensors(first, optimizers[1]))
    after = some(second, optimizers[2], before[-1].progress, 20)
    assert [step.loss_nats for step in before + after] == [step.loss_nats for step in wanted]
    assert [step.grad_norm for step in before + after] == [step.grad_norm for step in wanted]
    for mine, its in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_losses_of_layers_are_taught_and_not_told(corpus):
    """S3-M5: without a budget the gate of a learned frequency hears the text alone, with one it hears that as well."""

    def trained(budget: float) -> tuple[Tensor, float | None]:
        levels = {"count": 2, "frequency": "output", "budget": budget}
        part = MemoryConfig.model_validate({"head_dim": 8, "levels": levels})
        model = build(ModelConfig(dim=16, n_layers=1, mixer="memory"), part, 256, random_seed=3)
        frequency, heard = model.get_submodule("blocks.0.mixer.recall.frequency"), []
        # On budget, as it begins, the budget's loss has no gradient.
        nn.init.zeros_(frequency.get_parameter("bias_l"))
        for parameter in frequency.parameters():
            parameter.register_hook(heard.append)
        (step,) = run(model, stream_of(corpus, batch=2), limit(steps=1))
        return torch.cat([gradient.flatten() for gradient in heard]), step.loss_nats

    (alone, told), (held, told_again) = trained(0.0), trained(100.0)
    assert told == told_again
    assert (held - alone).norm() > 0.01


def test_one_place_computes_gradients():
    """One loop serves every recipe. Benchmarks time gradients and the device probe tries one; nothing else does.

    CX-3.1.
    """
    package = Path(meristem.__file__).parent
    callers = {
        str(path.relative_to(package).parent / path.stem)
        for path in package.rglob("*.py")
        if ".backward(" in path.read_text() and "bench" not in path.parts
    }
    # Certificates train a copy of a seed on noise, which no run is made of.
    assert callers == {"train/backward", "device/resolve", "growth/certify"}


class WithSpare(nn.Module):
    """A model with a parameter that its text does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.spare_d = tiny(), nn.Parameter(torch.ones(5))

    def forward(self, tokens_bt, state=None):
        return self.inner(tokens_bt, state)


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_what_is_called_beside_a_step_meets_its_whole_gradient(corpus, order):
    """Once per step, with the memory, the batches and the loss of the step; a gradient that it puts is moved by, and
    the other weights are bit for bit those of a run without it."""
    stream, part = stream_of(corpus, batch=3, order=order), limit(steps=4, grad_accum_steps=2)
    alone, model, seen = WithSpare(), WithSpare(), []

    def beside(state, batches, memory, loss, generators):
        gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
        again = WithSpare()
        again.load_state_dict(model.state_dict())
        backward(again, batches, memory, DEVICE, n_micro_batches=1, by=AggregateConfig(), step=0)
        assert all(torch.equal(x.grad, gradients[name]) for name, x in again.inner.named_parameters("inner"))
        assert "spare_d" not in gradients and torch.equal(generators["cpu"], torch.get_rng_state())
        seen.append((state.progress.step, float(loss), memory is None))
        model.spare_d.grad = torch.full_like(model.spare_d, 1e-3)

    optimizer = build_optimizer(model, OptimConfig(lr=0.01, grad_clip=None))
    held, schedule = Held.alone(model, optimizer, Progress(cursor=stream.start())), lambda done: 1 - done.share / 2
    plain = build_optimizer(alone, OptimConfig(lr=0.01, grad_clip=None))
    first = Held.alone(alone, plain, Progress(cursor=stream.start()))
    wanted = list(steps(first, stream, schedule, config=part, device=DEVICE))
    made = list(steps(held, stream, schedule, config=part, device=DEVICE, beside=beside))
    assert seen == [(n, step.loss_nats, n == 0) for n, step in enumerate(wanted)]
    assert [step.loss_nats for step in made] == [step.loss_nats for step in wanted]
    assert all(torch.equal(x, alone.inner.get_parameter(name)) for name, x in model.inner.named_parameters())
    assert (model.spare_d < 1).all() and (alone.spare_d == 1).all()
