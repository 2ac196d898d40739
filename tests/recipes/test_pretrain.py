"""A whole run and what it leaves behind."""

from pathlib import Path

import pytest

from meristem.checkpoint.run import read
from meristem.checkpoint.store import entries, find
from meristem.data.prepare import prepare
from meristem.data.stream import held_out
from meristem.device.config import DeviceConfig
from meristem.device.resolve import resolve
from meristem.errors import Halted, NonFinite
from meristem.evaluate.likelihood import likelihood
from meristem.events import silent
from meristem.models.config import LearnConfig
from meristem.models.load import load
from meristem.models.weights import rates_of
from meristem.recipes import pretrain as pretrain_module
from meristem.recipes.plan.dry_run import plan
from meristem.recipes.pretrain import Result, pretrain
from meristem.runs import logging, report
from meristem.runs.config import Config
from meristem.serve.session import Session
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history
from meristem.train.loss import cross_entropy
from meristem.train.progress import Progress
from recipes.small import config, write_text

SETTINGS = ("model.n_heads=2", "model.sliding_window=5", "memory.head_dim=4", "optim.lr=0.02", "train.log_every=3")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config(write_text(tmp_path_factory.mktemp("run")), *SETTINGS, preset="titans-mag")


@pytest.fixture(scope="module")
def result(settings: Config) -> Result:
    assert settings.data.root
    return pretrain(settings, run_dir=settings.data.root / "run", planned=plan(settings, until="steps"))


def test_it_learns(settings, result):
    """Thirty steps bring the loss well below that of a uniform guess, on text that was not trained on."""
    assert result.status == "finished" and result.exit_code == 0 and result.step == 30
    assert result.bits_per_byte < 5
    losses = [record["metrics"]["bits_per_byte"] for record in history(result.run_dir) if record["split"] == "train"]
    assert losses[-1] < losses[0] - 1


def test_saved_model_is_the_one_that_was_measured(settings, result):
    """Loaded from its directory, the model predicts the held-out text exactly as the result says."""
    model, _ = load(result.run_dir)
    corpus = prepare(settings.data, settings.tokenizer)
    device = resolve(DeviceConfig(device="cpu", dtype="fp32"), silent)
    batches = held_out(corpus, "val", window=17, batch=16, max_windows=7)
    found = likelihood(model, batches, device=device, loss=cross_entropy)
    assert found.bits_per_byte == result.bits_per_byte


def test_what_the_run_took_stands_beside_what_was_planned(result):
    """C5.6."""
    predicted, measured = (read(result.run_dir)["plan"][side] for side in ("predicted", "measured"))
    assert predicted["flops_per_token"] > 1000
    # The plan knows nothing of the text in memory; the process here is that of a whole test session.
    assert measured["peak_bytes"] > 0.3 * predicted["peak_bytes"]
    assert measured["tokens_per_s"] == pytest.approx(result.tokens / result.seconds_used)


def test_directory_tells_the_run(settings, result):
    run = read(result.run_dir)
    assert (run["status"], run["exit"], run["name"]) == ("finished", 0, "titans-mag")
    assert run["checkpoints"]["last"] == result.checkpoint.name == "step-00000030"
    assert run["best"]["metric"] == "val/bits_per_byte"
    found = {path.name for path in result.run_dir.iterdir()}
    assert {"config.yaml", "report.md", "loss.png", "checkpoints", "run.json"} <= found
    records = {name: list(read_records(result.run_dir / f"{name}.ndjson")) for name in ("metrics", "events", "samples")}
    assert [r["step"] for r in records["metrics"] if r["split"] == "train"] == list(range(3, 31, 3))
    assert [r["step"] for r in records["metrics"] if r["split"] == "val"] == [8, 16, 24, 30, 30]
    assert len(records["samples"]) == 1
    names = [event["name"] for event in records["events"]]
    assert names[0] == "capability.chosen" and names[-1] == "run.ended" and "run.started" in names
    seqs = sorted(record["seq"] for kind in records.values() for record in kind)
    assert len(set(seqs)) == len(seqs)


def test_memory_is_reported(result):
    """At the start the gates are those of the settings, and every record tells where they went."""
    told = [record["metrics"] for record in history(result.run_dir) if record["split"] == "train"]
    assert told[0]["memory/half_life"] == pytest.approx(64, rel=0.5)
    assert all(metrics["memory/norm"] > 0 for metrics in told)


def test_report_tells_the_run(result):
    report = result.report.read_text()
    assert f"**{result.bits_per_byte:.3f} bits per byte**" in report
    assert report.index("| **this model** |") > report.index("## Held-out text")
    for word in ("gzip", "bz2", "xz given the training text", "half-life", f"meristem chat {result.run_dir}"):
        assert word in report
    assert result.samples[0].text in report


def test_best_and_last_checkpoints_stay(settings, result):
    """Three last and two best, by what was measured when they were saved."""
    kept = entries(result.run_dir / "checkpoints")
    measured = {entry.step: entry.metrics["val/bits_per_byte"] for entry in kept if entry.metrics}
    by_rank = sorted(measured, key=lambda step: measured[step])
    assert {entry.step for entry in kept} == {24, 28, 30} | set(by_rank[:2])
    assert read(result.run_dir)["best"]["step"] == by_rank[0]


@pytest.mark.parametrize(
    ("is_guarded", "error", "match", "in_rows"),
    [(False, NonFinite, "4 end a run", [1, 2, 3, 4]), (True, Halted, "rolled back 3 times in a row", [1, 2, 3] * 3)],
)
def test_bad_steps_end_the_run_with_its_checkpoints_intact(settings, tmp_path, is_guarded, error, match, in_rows):
    """A rate that cannot work: each bad step is an event, the run fails with the exit code of training."""
    wild = settings.optim.model_copy(update={"lr": 1e30, "grad_clip": None})
    train = settings.train.model_copy(update={"max_nonfinite": 4})
    guard = settings.guard.model_copy(update={"enabled": is_guarded})
    changes = {"optim": wild, "train": train, "guard": guard}
    with pytest.raises(error, match=match):
        pretrain(settings.model_copy(update=changes), run_dir=tmp_path / "wild")
    run = read(tmp_path / "wild")
    assert (run["status"], run["exit"]) == ("failed", 5)
    events = list(read_records(tmp_path / "wild" / "events.ndjson"))
    assert [e["payload"]["in_row"] for e in events if e["name"] == "loss.nonfinite"] == in_rows
    assert [e["payload"]["type"] for e in events if e["name"] == "exception"] == [error.__name__]
    find(tmp_path / "wild", silent)


def test_fp16_has_a_loss_scale_that_is_saved(settings, monkeypatch, tmp_path):
    """Where the probe lets it pass, as on an accelerator."""
    part = settings.device.model_copy(update={"dtype": "fp16"})
    monkeypatch.setattr("meristem.device.resolve.probe", lambda *_: None)
    run = pretrain(settings.model_copy(update={"device": part}), run_dir=tmp_path / "run")
    assert find(run.checkpoint, silent).tree("optim")["loss_scale/scale"] == 65536.0
    told = [record["metrics"] for record in history(run.run_dir) if record["split"] == "train"]
    assert {metrics["loss_scale"] for metrics in told} == {65536.0} and told[-1]["nats"] < told[0]["nats"]


@pytest.mark.parametrize(
    ("every", "every_s", "rung"), [(2, None, [2, 4, 6]), (None, 2.5, [3, 6]), (4, 2.5, [3, 4]), (None, None, [])]
)
def test_alarm(every, every_s, rung):
    """By steps, by seconds after it was last done, by whichever comes first, or never; a step takes one second here."""
    interval = logging.Interval(every, every_s, last_s=0.0)
    cursor = None
    found = [
        step
        for step in range(1, 7)
        if interval.is_due(Progress(cursor=cursor, step=step, seconds_used=float(step)))  # type: ignore[arg-type]
    ]
    assert found == rung


def test_prompts_begin_held_out_documents(settings):
    from meristem.runs.report import prompts

    corpus = prepare(settings.data, settings.tokenizer)
    held_out = corpus.text("val").decode()
    found = list(prompts(corpus, 3))
    assert len(set(found)) == 3
    assert all(prompt in held_out and 0 < len(prompt) <= 60 for prompt in found)


def test_directory_may_be_read_while_it_is_written(settings, result):
    """The configuration in the directory is the one of the run."""
    assert Path(result.run_dir / "config.yaml").read_text().count("titans-mag") >= 1


def test_a_memory_that_diverges_is_told_once(tmp_path, settings):
    """Frozen chunks far beyond their limit: an event that says what to do, not one at every record."""
    part = {"rule": "delta", "form": "frozen_chunk", "write_rate": 0.9, "chunk": 16, "half_life": 1e6}
    memory = settings.memory.model_copy(update=part)
    train = settings.train.model_copy(update={"steps": 9})
    data = settings.data.model_copy(update={"seq_len": 33})
    wild = settings.model_copy(update={"memory": memory, "train": train, "data": data})
    result = pretrain(wild, run_dir=tmp_path / "wild")
    told = [r for r in read_records(result.run_dir / "events.ndjson") if "advice" in r["payload"]]
    assert [event["name"] for event in told] == ["memory.overshoots", "memory.unstable"]
    assert all("write_limit" in event["payload"]["advice"] for event in told)


def test_learning_rates_are_found_at_the_end_and_stored(tmp_path, monkeypatch):
    """A session of the checkpoint learns at them; after so short a training nobody looks for them otherwise."""
    monkeypatch.setattr(pretrain_module, "LENGTH", 40)
    monkeypatch.setattr(pretrain_module, "n_documents", lambda n_tokens: 1)
    words = ("train.steps=2", "eval.n_samples=0", "learn.chunk=8", f"run.dir={tmp_path}")
    found = pretrain(config(write_text(tmp_path), *words))
    model, tokenizer = load(found.run_dir)
    (told,) = [e for e in read_records(found.run_dir / "events.ndjson") if e["name"] == "learn_rates.found"]
    assert rates_of(model) == told["payload"]["rates"] and list(rates_of(model)) == ["head"]
    session = Session(model, tokenizer, learn="weights", learning=LearnConfig(which="head"))
    session.feed("3")
    assert float(session._now.state["learned"]["rate_b"]) == rates_of(model)["head"]


@pytest.mark.parametrize(
    ("words", "ways"),
    [
        (("model.n_layers=1",), ["static", "with weights that learn as well"]),
        (
            ("model.name=lm", "model.dim=8", "model.n_layers=1", "model.n_heads=2", "memory.head_dim=4"),
            ["static", "with a memory that learns", "with weights that learn as well"],
        ),
    ],
)
def test_a_text_that_it_never_saw_is_read_at_the_end(tmp_path, monkeypatch, words, ways):
    """Three ways for a model with a memory, two without; after a short training it is not read otherwise."""
    for name, number in (("READING_SHARE", 1), ("LEAST_READ", 20), ("FIRST_READ", 8)):
        monkeypatch.setattr(report, name, number)
    shared = ("train.steps=2", "eval.n_samples=0", "learn.chunk=8", "learn.which=head", "eval.reading_tokens=30")
    found = pretrain(config(write_text(tmp_path), *shared, *words, f"run.dir={tmp_path}"))
    text = found.report.read_text()
    section = text[text.index("## A text that it never saw") :]
    assert [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines()[4 : 4 + len(ways)]] == ways
    assert (found.run_dir / "reading.png").read_bytes().startswith(b"\x89PNG")
