"""How a run goes on, and what it refuses to go on from."""

from pathlib import Path

import pytest

from meristem.checkpoint.run import RunLock, read
from meristem.checkpoint.store import entries
from meristem.device import resolve as devices
from meristem.errors import (
    CheckpointMismatch,
    ManifestMismatch,
    MeristemError,
    NoCheckpoint,
    RunError,
    RunInUse,
    TokenizerMismatch,
)
from meristem.recipes.pretrain import Result, pretrain
from meristem.runs.directory import directory_for
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import history
from recipes.small import config, write_text

BRIEF = ("train.steps=6", "checkpoint.every=2", "checkpoint.last=9", "eval.n_samples=0")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


def run(text: Path, name: str, *settings: str, resume: str = "auto") -> Result:
    return pretrain(config(text, *BRIEF, *settings), run_dir=text.parent / name, resume=resume)


def events(place: Path, name: str) -> list[dict[str, object]]:
    return [event["payload"] for event in read_records(place / "events.ndjson") if event["name"] == name]


def losses(place: Path) -> dict[int, float]:
    return {record["step"]: record["metrics"]["nats"] for record in history(place) if record["split"] == "train"}


def damage(checkpoint: Path) -> None:
    """Flip one bit in the middle of the weights."""
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_new_directory_begins_a_run(text, resume):
    found = run(text, "a", resume=resume)
    assert [event["from"] for event in events(found.run_dir, "run.started")] == [0]
    assert events(found.run_dir, "run.resumed") == []


def test_auto_passes_over_a_damaged_checkpoint_and_says_so(text):
    """CX-7.4: The newest one has a flipped bit: the run goes on from the one before, to the same losses."""
    first = run(text, "a")
    before = losses(first.run_dir)
    damage(first.checkpoint)
    run(text, "a")
    (skipped,) = events(first.run_dir, "checkpoint.skipped")
    (resumed,) = events(first.run_dir, "run.resumed")
    assert skipped["checkpoint"] == "step-00000006"
    assert resumed["resumed_from"] == 4
    assert losses(first.run_dir) == before


def test_auto_begins_again_where_nothing_is_whole(text):
    """CX-7.4: Readers learn that all earlier steps were abandoned."""
    first = run(text, "a", "checkpoint.last=1", "checkpoint.best=0", "checkpoint.every=6")
    damage(first.checkpoint)
    run(text, "a", "checkpoint.last=1", "checkpoint.best=0", "checkpoint.every=6")
    assert [event["resumed_from"] for event in events(first.run_dir, "run.resumed")] == [0]
    assert sorted(losses(first.run_dir)) == [1, 2, 3, 4, 5, 6]


def test_must_needs_a_checkpoint(text):
    """CX-7.4."""
    with pytest.raises(NoCheckpoint, match=r"a holds no whole checkpoint to go on from. Give the directory"):
        run(text, "a", resume="must")


def test_never_refuses_a_directory_with_a_run(text):
    run(text, "a")
    with pytest.raises(RunError, match=r"already holds the run .* Go on with it"):
        run(text, "a", resume="never")


@pytest.mark.parametrize("kind", ["adamw", "m3"])
def test_path_branches_off_another_run(text, kind):
    """A new run begins where the given checkpoint stands, and meets the same losses as the run it came from."""
    first = run(text, "a", f"optim.name={kind}")
    start = next(entry.path for entry in entries(first.run_dir / "checkpoints") if entry.step == 4)
    second = run(text, "b", f"optim.name={kind}", resume=str(start))
    assert [event["from"] for event in events(second.run_dir, "run.started")] == [4]
    theirs = {
        record["step"]: record["metrics"]["nats"] for record in history(first.run_dir) if record["split"] == "train"
    }
    ours = {
        record["step"]: record["metrics"]["nats"] for record in history(second.run_dir) if record["split"] == "train"
    }
    assert ours == {step: theirs[step] for step in (5, 6)}


def test_more_steps_can_be_asked_for(text):
    """A finished run goes on when its limit is raised, and its record says what was changed."""
    run(text, "a")
    found = run(text, "a", "train.steps=8")
    assert found.step == 8
    assert events(found.run_dir, "run.resumed")[0]["changed"] == {"train.steps": [6, 8]}


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("model.dim=14", CheckpointMismatch, r"another model: model.dim was 12, is 14. Set them as they were"),
        (
            "optim.name=muon",
            CheckpointMismatch,
            r"what the optimizer 'adamw' gathered, of which 'muon'",
        ),
        ("tokenizer.kind=bpe", TokenizerMismatch, r"with a byte tokenizer of 256 .* now cut by a bpe tokenizer"),
        ("data.validation=0.3", ManifestMismatch, r"the text, its split or its tokenizer changed"),
        ("data.seq_len=19", MeristemError, r"read its text with data.seq_len=17, .* Set these as they were"),
    ],
)
def test_something_else_is_refused(text, setting, error, message):
    """Nothing is lost by it: the run keeps its settings, and with them it goes on."""
    first = run(text, "a")
    settings = (first.run_dir / "config.yaml").read_text()
    with pytest.raises(error, match=message):
        run(text, "a", setting)
    assert (first.run_dir / "config.yaml").read_text() == settings
    assert read(first.run_dir)["status"] == "failed"
    assert run(text, "a").step == 6


def test_changed_text_is_refused(text):
    """CX-8.5."""
    run(text, "a")
    text.write_text(text.read_text() + "One more line.\n")
    with pytest.raises(ManifestMismatch, match="Bring the old text back"):
        run(text, "a")


def test_second_process_is_kept_out(text):
    with RunLock(text.parent / "a"), pytest.raises(RunInUse, match="is in use by process"):
        run(text, "a")


def test_numbers_of_the_first_process_are_kept(text, monkeypatch):
    """``auto`` measures once per run: a second measurement must not change the products in the middle of it."""
    monkeypatch.setattr(devices, "bf16_gain", lambda: 9.0)
    first = run(text, "a", "device.dtype=auto")
    chosen = events(first.run_dir, "capability.chosen")[0]["dtype"]
    monkeypatch.setattr(devices, "bf16_gain", lambda: 0.1)
    monkeypatch.setattr(devices.torch.cpu, "get_capabilities", lambda: {})
    run(text, "a", "device.dtype=auto", "train.steps=7")
    assert events(first.run_dir, "capability.chosen")[1]["dtype"] == chosen


def test_directory_of_a_run_without_one(text):
    """The unfinished run that trains the same is continued; anything else gets a directory of its own."""
    settings = config(text, *BRIEF, f"run.dir={text.parent / 'runs'}", "run.name=r")
    root = settings.run.dir
    assert directory_for(settings, "auto") == root / "r"
    with pytest.raises(MeristemError):
        absent = settings.device.model_copy(update={"device": "cuda:99"})
        faster = settings.optim.model_copy(update={"lr": 0.5})
        pretrain(settings.model_copy(update={"device": absent, "optim": faster}))
    assert read(root / "r")["status"] == "failed"
    assert directory_for(settings.model_copy(update={"optim": faster}), "auto") == root / "r", "on another device"
    assert directory_for(settings, "auto") == root / "r-2", "the failed run had another configuration"
    assert pretrain(settings).run_dir == root / "r-2"
    assert (root / "latest").resolve() == (root / "r-2").resolve()
    assert directory_for(settings, "auto") == root / "r-3", "the second is finished"
