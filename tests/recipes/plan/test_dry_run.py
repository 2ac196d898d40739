"""A plan says what a run would be: the figures of the run itself, and its refusals, before anything is there."""

import json
import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from meristem.cli.answer import columns
from meristem.data.prepare import prepare
from meristem.data.stream import Batch, Cursor, Stream
from meristem.device.resolve import resolve
from meristem.errors import DataError, OutOfDeviceBytes
from meristem.events import silent
from meristem.memory.bias import biases, squared
from meristem.memory.check import conflicts
from meristem.memory.forms import forms
from meristem.memory.named import named
from meristem.memory.retention import retentions, sphere
from meristem.memory.rule import Rule
from meristem.memory.state import size_bytes
from meristem.memory.structure import mlp, structures
from meristem.memory.update import momentum, plain, updates
from meristem.models.build import build, models
from meristem.native.library import core
from meristem.optim.groups import build as build_optimizer
from meristem.recipes.plan import measure
from meristem.recipes.plan.dry_run import PARTS, plan
from meristem.recipes.plan.report import brief, sections
from meristem.runs.config import Config, load_config
from meristem.train.config import TrainConfig
from meristem.train.loop import steps
from meristem.train.progress import Progress
from meristem.train.state import Held
from recipes.plan.small_models import profiled_peak

PRESETS = ["titans-mag", "delta-mag", "attention", "charformer", "charrnn", "chargru"]


@pytest.fixture
def load(tmp_path: Path):
    """A preset with overrides, and a store of its own for the text."""

    def make(preset: str, *overrides: str) -> Config:
        return load_config(preset, [f"data.root={tmp_path}", "data.source=stdlib-docs", *overrides], {}).tree

    return make


class Batches:
    """Random ids in the shape of the run's batches."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        data = self.config.data
        tokens_bt, targets_bt = torch.randint(0, 256, (2, data.batch_size, data.seq_len)).clone().unbind()
        n_targets = tokens_bt.numel()
        starts = data.order != "sequential"
        return Batch(tokens_bt.clone(), targets_bt.clone(), n_targets, n_targets, starts), cursor


def true_peak(config: Config) -> int:
    """What torch's profiler sees of two steps of the real loop on real tensors."""
    device = resolve(config.device, silent)
    vocabulary = 256 if config.tokenizer.kind == "byte" else config.tokenizer.vocab_size
    model = build(config.model, config.memory, vocabulary, 0).to(device.device, device.param_dtype)
    part = TrainConfig(steps=2, max_time=None, grad_accum_steps=config.train.grad_accum_steps)

    def run() -> None:
        start = Progress(cursor=Cursor(0, "", ""))
        optimizer = build_optimizer(model, config.optim)
        loop = steps(
            Held.alone(model, optimizer, start), Batches(config), lambda share: 1.0, config=part, device=device
        )
        for _ in loop:
            pass

    return profiled_peak(model, run)


@pytest.mark.parametrize("preset", PRESETS)
def test_peak_is_that_of_the_run(load, preset):
    """C5.2: The predicted peak is within 1 % of what the allocator gives out in real steps."""
    config = load(preset, "data.batch_size=3", "data.seq_len=43", "model.n_layers=2", "device.threads=1")
    assert plan(config, until="steps").training.peak_bytes == pytest.approx(true_peak(config), rel=0.01)


@pytest.mark.parametrize(
    "override",
    ["data.order=sequential", "train.grad_accum_steps=2", "device.dtype=fp32", "optim.name=muon", "optim.name=m3"],
)
def test_peak_knows_how_the_run_steps(load, override):
    """A memory that is carried on, accumulated batches and the dtype of products are in the figure."""
    config = load(
        "titans-mag", "data.batch_size=2", "data.seq_len=37", "model.n_layers=1", "device.dtype=bf16", override
    )
    assert plan(config, until="steps").training.peak_bytes == pytest.approx(true_peak(config), rel=0.01)


@pytest.mark.parametrize("preset, n", [("charformer", 858_880), ("charrnn", 197_888), ("chargru", 462_080)])
def test_parameters_are_those_of_the_definition(load, preset, n):
    """C5.4: The counts of platform.md 6.1."""
    report = plan(load(preset), until="build")
    assert (report.n_parameters, report.n_trainable) == (n, n)


@pytest.mark.parametrize("preset, refused", [("titans-mag", ""), ("charformer", "it is a CharFormer")])
def test_state_of_a_session_is_that_of_the_model(load, preset, refused):
    """The bytes a session keeps are those of the state that the real model gives back; and it is said what reads on."""
    config = load(preset, "data.batch_size=1", "data.seq_len=83", "model.n_layers=2", "device.dtype=fp32")
    session = plan(config, until="steps").session
    model = build(config.model, config.memory, 256, 0)
    _, state = model(torch.zeros(1, 82, dtype=torch.int64))
    assert session.n_prompt == 82
    assert session.state_bytes == size_bytes(state)
    reason = refused or ("" if core().library else f"there is no native core: {core().said}")
    assert session.decoded_by.startswith(f"torch: {reason}" if reason else "native core")


def test_work_of_the_whole_is_that_of_its_modules(load):
    """A transformer's products, added up by hand; twice that in the backward pass, where attention takes 2.5 times."""
    b, t, d, f, n_layers, o = 3, 37, 128, 512, 4, 256
    config = load("charformer", f"data.batch_size={b}", f"data.seq_len={t}", "train.grad_accum_steps=2")
    report = plan(config, until="modules")
    linear = n_layers * (4 * d * d + 2 * d * f) + d * o
    attention = n_layers * 2 * t * d
    assert report.training.flops_forward == 2 * 2 * b * t * (linear + attention)
    assert report.training.flops_backward == 2 * 2 * b * t * (2 * linear + 2.5 * attention)
    assert report.training.flops_6nd == 6 * (report.n_parameters - o * d) * 2 * b * t
    rows = {row.name: row for row in report.modules}
    assert rows[""].flops_forward == report.training.flops_forward
    assert rows["blocks.2.mlp.up"].flops_forward == 2 * 2 * b * t * d * f
    assert rows["blocks.2.mixer"].reads == ("b3 t37 d128",) and rows["head"].gives == ("b3 t37 256",)


def test_short_windows_stand_for_long_ones(load, monkeypatch):
    """What is continued from short windows is what the full window gives."""
    config = load("charrnn", "data.batch_size=2", "data.seq_len=71", "model.n_layers=2")
    full = plan(config, until="modules")
    monkeypatch.setattr(measure, "MOST_OPERATIONS", 0)
    fitted = plan(config, until="modules")
    assert (full.training.fitted_from, fitted.training.fitted_from) == ((), (16, 32))
    assert fitted.training.peak_bytes == pytest.approx(full.training.peak_bytes, rel=0.002)
    assert fitted.training.flops_per_step == full.training.flops_per_step
    assert fitted.session == full.session
    assert fitted.modules == full.modules


def test_what_is_not_linear_in_time_is_rehearsed_in_full(load, monkeypatch):
    """A model with dense attention is never continued from short windows."""
    monkeypatch.setattr(measure, "MOST_OPERATIONS", 0)
    assert plan(load("charformer", "model.n_layers=1", "data.seq_len=67"), until="steps").training.fitted_from == ()


def test_what_takes_too_long_is_said_to_be_uncertain(load, monkeypatch):
    """A scan over a long text is neither waited for nor passed off as exact."""
    monkeypatch.setattr(measure, "MOST_OPERATIONS", 0)
    monkeypatch.setattr(measure, "LIMIT", 0)
    report = plan(load("titans-mag", "memory.form=scan", "model.n_layers=1", "data.batch_size=1", "data.seq_len=70"))
    assert report.training.fitted_from == (8, 16)
    assert report.what_if == ()
    assert "8 and 16 tokens, where they were not yet on one line" in report.warnings[-1]


def test_parts_in_order(load):
    """Every part is gone through and says how it ended; the whole can be read as JSON, as tables and in three lines.

    C5.1.
    """
    report = plan(load("titans-mag", "data.batch_size=2", "data.seq_len=33", "model.n_layers=1"))
    assert [part.name for part in report.parts] == list(PARTS)
    assert [part.outcome for part in report.parts] == ["ok", "not prepared", *["ok"] * 5]
    assert report.exit_code == 0 and report.warnings == ()
    assert [row.change for row in report.what_if] == [
        "data.batch_size x2",
        f"device.dtype={_other()}",
        "data.seq_len x2",
    ]
    assert report.what_if[0].flops_per_step == 2 * report.training.flops_per_step
    read = json.loads(report.to_json())
    assert read["training"]["flops_per_token"] * 2 * 33 == report.training.flops_per_step
    assert (read["exit_code"], read["n_parameters"]) == (0, report.n_parameters)
    assert "| 1 | blocks.*.mixer | MemoryAsGate | b2 t33 d128 | b2 t33 d128 |" in report.to_markdown()
    assert len(brief(report)) == 3
    report.refuse()


def _other() -> str:
    chosen = resolve(Config().device, silent).dtype
    return "bf16" if chosen == torch.float32 else "fp32"


def test_prepared_text_is_counted(load):
    """A text that was prepared before is known in units of training; another source is not mistaken for it."""
    config = load(
        "charformer",
        "data.batch_size=5",
        "data.seq_len=61",
        "data.order=shuffled",
        "train.steps=7",
        "train.grad_accum_steps=3",
    )
    corpus = prepare(config.data, config.tokenizer)
    stream = Stream(corpus, "train", window=61, batch=5, random_seed=0)
    found = plan(config, until="data").data
    assert (found.n_tokens, found.n_windows) == (len(corpus.tokens("train")), stream.n_windows)
    assert found.unused_tokens == found.n_tokens - 61 * found.n_windows - 1
    assert found.epochs == 7 * 3 / stream.batches_per_epoch
    assert (found.vocabulary, found.max_token_id) == (256, corpus.manifest["max_token_id"])
    other = plan(load("charformer", "data.validation=0.2"), until="data")
    assert other.data is None and other.parts[1].outcome == "not prepared"


@pytest.mark.parametrize(
    "override, part, exit_code, message",
    [
        ("device.device=cuda:7", "config", 3, "there is no device 'cuda:7'"),
        ("data.source=nowhere/at/all.txt", "data", 4, "nowhere/at/all.txt"),
        ("memory.rule=hopfield", "build", 2, "hopfield"),
        ("memory.form=magic", "build", 2, "magic"),
    ],
)
def test_refusals(load, override, part, exit_code, message):
    """C5.1: What cannot work is refused in its part, with the exit code and the words of the error itself."""
    report = plan(load("titans-mag", "data.batch_size=1", "data.seq_len=9", "model.n_layers=1", override))
    outcomes = {outcome.name: outcome for outcome in report.parts}
    assert outcomes[part].outcome == "failed" and message in outcomes[part].message
    assert report.exit_code == exit_code
    assert [p.outcome for p in report.parts][list(PARTS).index(part) + 1 :] == ["not reached"] * (
        6 - list(PARTS).index(part)
    )


def test_a_refused_plan_raises_the_error_of_its_part(load):
    """Whoever starts a run gets the typed error back."""
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        plan(load("charrnn", "data.source=./nowhere.txt")).refuse()


def test_a_model_of_ten_terabytes_is_planned_in_little_memory(load):
    """C5.7: Nothing is allocated for a model that no machine holds; the figures are there and the run is refused."""
    size = ("model.dim=262144", "model.n_heads=2048", "model.n_layers=3", "memory.head_dim=128", "data.seq_len=48")
    before = psutil.Process(os.getpid()).memory_info().rss
    report = plan(load("titans-mag", *size), until="steps")
    grown = psutil.Process(os.getpid()).memory_info().rss - before
    assert report.n_parameters * 4 > 10e12 and grown < 2**28
    assert report.exit_code == 5 and not report.fits(1024)
    with pytest.raises(OutOfDeviceBytes, match="Lower data.batch_size"):
        report.refuse()


class Careless(nn.Module):
    """A model with everything that a plan warns of."""

    window = None

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 6)
        self.idle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 256)

    def forward(self, tokens_bt, state=None):
        hidden_btd = self.embedding(tokens_bt)
        if hidden_btd.sum() > 0:
            hidden_btd = hidden_btd * 2
        hidden_btd = hidden_btd + torch.linalg.cholesky_ex(torch.eye(6)).L[0]
        return self.head(hidden_btd), {}


class Hopeless(Careless):
    def forward(self, tokens_bt, state=None):
        chosen = tokens_bt[tokens_bt > 0]
        return self.head(self.embedding(chosen[None])), {}


@pytest.fixture
def careless(load):
    """A configuration of a registered model of that class."""

    def make(kind: type[nn.Module]) -> Config:
        models.register(f"test-{kind.__name__.lower()}", lambda *parts: kind())
        return load("charrnn", "data.batch_size=2", "data.seq_len=11", f"model.name=test-{kind.__name__.lower()}")

    return make


def test_warnings(careless):
    """C5.7: Idle modules, missing gradients, uncounted work and reads from the device are named, with their line."""
    idle, *no_gradient, uncounted, reading = plan(careless(Careless)).warnings
    assert idle == "idle is never called"
    assert no_gradient == ["idle.weight gets no gradient", "idle.bias gets no gradient"]
    assert uncounted.startswith("aten.linalg_cholesky_ex.default has no FLOP formula")
    assert "test_dry_run.py:" in reading and reading.endswith("reads a value back from the device")


def test_shapes_that_depend_on_values_are_refused_with_their_line(careless):
    """A model whose shapes hang on the text cannot be planned; the message says where."""
    report = plan(careless(Hopeless))
    assert report.exit_code == 70 and "test_dry_run.py:" in report.parts[3].message


def test_a_plan_leaves_nothing_behind(load):
    """Random state, and every value that modules keep between calls, are as if no plan had been made."""
    config = load("titans-mag", "data.batch_size=1", "data.seq_len=39", "model.n_layers=1")
    before = torch.get_rng_state()
    plan(config, until="steps")
    assert torch.equal(torch.get_rng_state(), before)
    logits_bto, _ = build(config.model, config.memory, 256, 0)(torch.zeros(1, 39, dtype=torch.int64))
    assert torch.isfinite(logits_bto).all()


def test_the_memory_that_runs_is_told(load):
    """The parts of the rule, what auto chose, and why the other forms refuse: in the words of their registries."""
    memory = plan(load("lmm-yaad", "memory.update=momentum", "data.seq_len=7"), until="build").memory
    assert (memory.rule, memory.structure, memory.bias) == ("yaad", "mlp", "huber_switch")
    assert (memory.retention, memory.update, memory.form, memory.runs) == ("local", "momentum", "auto", "frozen_chunk")
    rule = replace(named("yaad"), update=momentum())
    assert {row.name: list(row.refusals) for row in memory.forms} == {
        name: forms.get(name).refusals(rule) for name in forms.names()
    }
    assert plan(load("lmm-delta"), until="build").memory.runs == "exact_chunk"
    assert plan(load("attention"), until="build").memory is None


def test_the_table_of_parts_is_that_of_the_check(load):
    """Every pair of parts is there; a pair fits where no reason is given against a rule with the two in it."""
    fits = plan(load("lmm-delta"), until="build").memory.fits
    sizes = [len(registry.names()) for registry in (structures, biases, retentions, updates)]
    assert len(fits) == (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2
    against = {fit.parts: fit.reasons for fit in fits}
    assert against["mlp", "sphere"] == tuple(conflicts(Rule(mlp(), squared(), sphere(), plain())))
    assert against["mlp", "sphere"] and not against["matrix", "sphere"]
    assert against["squared", "implicit"] == () and "exact step" in against["dot", "implicit"][0]


def test_the_memory_is_short_on_a_terminal(load):
    """Every number in the table is a reason below it; no line is wider than a page."""
    report = plan(load("lmm-lattice"), until="build")
    memory, *tables, reasons = [s for s in sections(report) if s.title not in ("Plan", "Totals")]
    assert [row for row in memory.rows if row[0] == "form exact_chunk"] == [
        ("form exact_chunk", "; ".join(forms.get("exact_chunk").refusals(named("lattice"))))
    ]
    assert [table.title.split()[1] for table in tables] == ["bias", "retention", "update"]
    numbers = {number for table in tables for row in table.rows for cell in row[1:] for number in cell.split()}
    assert numbers - {"yes"} <= {row[0] for row in reasons.rows}
    assert max(len(line) for s in (memory, *tables, reasons) for line in columns(s.columns, s.rows)) <= 120
    assert sum(len(s.rows) for s in (memory, *tables, reasons)) < 50
