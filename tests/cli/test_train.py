"""From a text to a reply with the program as it is installed: train, look, go on, measure, talk."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meristem.cli import run

PROGRAM = [sys.executable, "-c", "from meristem.cli import main; main()"]
SMALL = (
    "model.dim=16",
    "model.n_layers=1",
    "model.n_heads=2",
    "memory.head_dim=8",
    "memory.chunk=8",
    "data.seq_len=24",
    "data.batch_size=3",
    "device.dtype=fp32",
    "device.threads=1",
    "eval.n_windows=4",
    "tokenizer.kind=byte",
    "eval.n_windows_end=4",
    "eval.n_samples=1",
    "eval.sample_tokens=9",
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory: a text, and a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "book.txt").write_text("To be, or not to be, that is the question.\n\n" * 400)
    return tmp_path


def words(run_dir: str, n_steps: int, *more: str) -> list[str]:
    """The command line of a small run."""
    limits = (f"train.steps={n_steps}", "train.max_time=null")
    return ["train", "titans-mag", "data.source=book.txt", *SMALL, *limits, "--run-dir", run_dir, *more]


def test_what_was_trained_is_measured_and_talked_to(place, answered, capsys):
    """train prints one value; eval finds on the same windows what training found; sample and another text work."""
    code, trained = answered(*words("runs/ada", 6))
    assert (code, trained["status"], trained["step"], trained["run_dir"]) == (0, "finished", 6, "runs/ada")
    code, summary = answered("eval", "runs/ada", "--suite", "likelihood", "--max-windows", 4)
    task, carried = summary["tasks"]
    assert (carried["name"], carried["n"] <= task["n"]) == ("likelihood/documents", True)
    assert (code, summary["schema"]) == (0, "meristem.evaluation/1")
    assert task["metrics"]["bits_per_byte"]["value"] == pytest.approx(trained["bits_per_byte"], rel=1e-6)
    (place / "other.txt").write_text("All the world's a stage.\n" * 200)
    code, summary = answered("eval", "runs/ada", "data.source=other.txt", "data.validation=0.5")
    assert (code, summary["tasks"][0]["n"]) == (0, pytest.approx(2500, abs=100))
    assert len(answered("sample", "runs/ada", "--max-tokens", 5)[1]["text"]) > 0
    assert run(["eval", "runs/ada", "--max-windows", "2"]) == 0
    assert "bits_per_byte" in capsys.readouterr().out


def test_recall_asks_for_ids_of_the_checkpoint(place, answered, capsys):
    """One task of each kind fits a window of 24; a wider window brings more. The same questions every time."""
    assert answered(*words("runs/eve", 2))[0] == 0
    code, summary = answered("eval", "runs/eve", "--suite", "recall", "--max-windows", 5)
    assert (code, summary["schema"], summary["suite"]) == (0, "meristem.evaluation/1", "recall")
    assert [(task["name"], task["n"]) for task in summary["tasks"]] == [
        ("associative/4", 20),
        ("copying/8", 40),
        ("needle/8", 5),
    ]
    for task in summary["tasks"]:
        accuracy, nats = task["metrics"]["accuracy"], task["metrics"]["nats"]
        assert (accuracy["direction"], nats["direction"]) == ("max", "min")
        assert 0 <= accuracy["value"] < 0.3 and nats["value"] > 3
    assert answered("eval", "runs/eve", "--suite", "recall", "--max-windows", 5)[1] == summary
    assert run(["eval", "runs/eve", "--suite", "recall", "--max-windows", "3", "data.seq_len=33"]) == 0
    assert "needle/32" in capsys.readouterr().out
    assert run(["eval", "runs/eve", "--suite", "recall", "data.seq_len=9"]) == 2
    assert "Set data.seq_len to 16 or more" in capsys.readouterr().err


def test_adaptation_reads_long_documents_with_and_without_a_memory(place, answered, capsys):
    """Four windows of each; the same sums on every call, and a memory that stands still keeps nothing."""
    assert answered(*words("runs/fay", 3))[0] == 0
    code, summary = answered("eval", "runs/fay", "--suite", "adaptation", "--max-windows", 2)
    names = [task["name"] for task in summary["tasks"]]
    assert code == 0 and names[:2] == ["adaptation/none", "adaptation/memory"]
    off, memory = ({name: m["value"] for name, m in task["metrics"].items()} for task in summary["tasks"][:2])
    n = summary["tasks"][3]["n"]
    assert names[2:] == [f"reading/{way}/{at}" for way in ("none", "memory") for at in (1024, n)] and n < 2048
    assert summary["tasks"][0]["n"] == summary["tasks"][1]["n"] and summary["tasks"][0]["n"] % 96 == 0
    assert summary["tasks"][0]["dataset_fingerprint"] == summary["tasks"][1]["dataset_fingerprint"]
    assert memory != off and memory["gain_nats"] == memory["first_half_nats"] - memory["second_half_nats"]
    directions = {name: metric["direction"] for name, metric in summary["tasks"][0]["metrics"].items()}
    assert directions["gain_nats"] == "max" and directions["again_kept_bits_per_byte"] == "min"
    assert answered("eval", "runs/fay", "--suite", "adaptation", "--max-windows", 2)[1] == summary
    weights = ["--learn", "weights", "--picture", "read.png", "learn.which=head", "learn.chunk=8", "learn.lr=0.1"]
    code, learnt = answered("eval", "runs/fay", "--suite", "adaptation", "--max-windows", 2, *weights)
    assert code == 0 and [task["name"] for task in learnt["tasks"]][3:] == [
        f"reading/{way}/{at}" for way in ("none", "memory", "weights") for at in (1024, n)
    ]
    assert learnt["tasks"][:2] == summary["tasks"][:2]
    assert learnt["tasks"][2]["metrics"] != learnt["tasks"][1]["metrics"]
    assert Path("read.png").read_bytes().startswith(b"\x89PNG")
    assert run(["eval", "runs/fay", "--suite", "adaptation", "--learn", "levels"]) != 0
    assert "no feed-forward levels" in capsys.readouterr().err
    assert run(["eval", "runs/fay", "--suite", "adaptation", "data.seq_len=100000"]) != 0
    assert "Add longer documents" in capsys.readouterr().err


def test_facts_are_asked_after_spans_of_attention(place, answered):
    """Four ways to remember, four distances; a model that was hardly trained says no value."""
    assert answered(*words("runs/ivy", 2))[0] == 0
    drawn = ("--picture", "remembered.png", "learn.which=head")
    code, summary = answered("eval", "runs/ivy", "--suite", "remember", "--max-windows", 1, *drawn)
    assert (place / "remembered.png").read_bytes().startswith(b"\x89PNG")
    told = [task for task in summary["tasks"] if task["name"].startswith("remember/")]
    assert code == 0 and [task["name"] for task in told] == [
        f"remember/{mode}/{times}" for mode in ("memory", "frozen", "reset", "weights") for times in (1, 5, 10, 50)
    ]
    others = [task["name"] for task in summary["tasks"] if task not in told]
    assert {name.rpartition("/")[0] for name in others} == {
        *(f"mentions/{mode}" for mode in ("memory", "frozen", "weights")),
        *(f"remember-known/{mode}" for mode in ("memory", "frozen", "reset")),
    }
    for task in told:
        figures = {name: metric["value"] for name, metric in task["metrics"].items()}
        assert task["n"] == 8 and figures["chance"] == 0.125 and figures["greedy"] < 0.3
        assert figures["choice_low"] <= figures["choice"] <= figures["choice_high"] and figures["choice"] < 0.7


def test_what_learns_while_it_reads_is_chosen(place, answered):
    """Likelihood and recall are read with the memory unless off is asked for."""
    assert answered(*words("runs/gus", 3))[0] == 0
    for suite in ("likelihood", "recall"):
        asked = ("eval", "runs/gus", "--suite", suite, "--max-windows", 3)
        usual, memory, off = (
            answered(*asked, *more)[1]["tasks"] for more in ((), ("--learn", "memory"), ("--learn", "none"))
        )
        assert usual == memory != off


def test_a_run_that_cannot_fit_is_refused_before_anything_is_made(place, capsys):
    """The plan says so in a moment; nothing is written, and the text is not even read."""
    assert run(words("runs/huge", 3, "data.batch_size=100000000")) == 5
    assert "data.batch_size" in capsys.readouterr().err
    assert not (place / "runs").exists()


def test_the_plan_is_kept_beside_what_the_run_took(place, answered):
    answered(*words("runs/cy", 2))
    answered(*words("runs/dan", 2, "--no-plan"))
    with_plan, without = (json.loads((place / f"runs/{name}/run.json").read_text())["plan"] for name in ("cy", "dan"))
    assert with_plan["predicted"]["peak_bytes"] > 0 and with_plan["measured"]["tokens_per_s"] > 0
    assert without["predicted"] is None and without["measured"]["tokens_per_s"] > 0


@pytest.mark.fault
def test_interrupted_training_goes_on(place, answered):
    """Ctrl-C ends with 130 and a checkpoint; --resume must goes on from it to the end."""
    process = subprocess.Popen(
        [*PROGRAM, *words("runs/bob", 100_000, "--json")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        metrics, until = place / "runs/bob/metrics.ndjson", time.monotonic() + 100
        while not metrics.exists() or not metrics.stat().st_size:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    interrupted = json.loads(out)
    assert (process.returncode, interrupted["status"]) == (130, "interrupted")
    n_steps = interrupted["step"] + 3
    code, resumed = answered(*words("runs/bob", n_steps, "--resume", "must"))
    assert (code, resumed["status"], resumed["step"]) == (0, "finished", n_steps)


def test_resume_must_needs_a_checkpoint(place, capsys):
    """And says so, with the code for checkpoints."""
    assert run(words("runs/none", 6, "--resume", "must")) == 4
    out, err = capsys.readouterr()
    assert "no whole checkpoint" in err and "Traceback" not in err


def test_dry_run_plans_and_makes_no_run(place, answered):
    """The report of `meristem plan`; nothing is prepared, nothing is written."""
    small = [word for word in SMALL if not word.startswith("memory.")]
    code, report = answered("train", "attention", "data.source=book.txt", *small, "--dry-run")
    outcomes = {part["name"]: part["outcome"] for part in report["parts"]}
    assert (code, outcomes["steps"], outcomes["data"]) == (0, "ok", "not prepared")
    assert report["n_parameters"] > 0
    assert not (place / "runs").exists()


def test_plan_refuses_what_cannot_work(place, capsys):
    """A text that is not there, before anything is made, with the code for data."""
    assert run(["plan", "titans-mag", "data.source=./nowhere.txt"]) == 4
    assert "nowhere.txt" in capsys.readouterr().err
