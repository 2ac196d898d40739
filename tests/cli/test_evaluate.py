"""`meristem eval --task`: from a file of questions to predictions and scores, in shards, after each task."""

import csv
import json
import shutil

import jsonschema
import pytest

from meristem.cli import run
from meristem.sinks.jsonl import read_records
from meristem.sinks.records import schema

CAPITALS = "kind: choice\ndata: capitals.jsonl\nprompt: '{place} is in'\nchoices: '{lands}'\nanswer: '{land}'\n"
SAY = "{name: say, kind: generate, data: capitals.jsonl, prompt: '{place} is in', answer: '{land}', max_tokens: 3}"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with two tasks of three examples."""
    monkeypatch.chdir(tmp_path)
    towns = {"Oslo": "Norway", "Paris": "France", "Kyoto": "Japan"}
    rows = [{"place": town, "land": land, "lands": list(towns.values())} for town, land in towns.items()]
    (tmp_path / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "capitals.yaml").write_text(CAPITALS)
    (tmp_path / "say.yaml").write_text(SAY)
    return tmp_path


def validate(name, record):
    jsonschema.Draft202012Validator(schema(name)).validate(record)


def test_cx5_4_every_record_of_an_evaluation_follows_its_schema(place, finished, answered):
    """Two tasks asked at once; the summary that is printed is the one in the file, complete."""
    code, summary = answered("eval", finished, "--task", "capitals.yaml", "--task", "say.yaml", "--out", "a/b")
    assert code == 0 and json.loads((place / "a/b/evaluation.json").read_text()) == summary
    validate("evaluation", summary)
    predictions = list(read_records(place / "a/b/predictions.ndjson"))
    for record in predictions:
        validate("prediction", record)
    assert [(one["task"], one["example"]) for one in predictions] == [
        (name, number) for name in ("capitals", "say") for number in range(3)
    ]
    with open(place / "a/b/scores.csv", newline="") as file:
        rows = [row | {"value": float(row["value"]), "n": int(row["n"])} for row in csv.DictReader(file)]
    for row in rows:
        validate("score", row)
    told = {
        (task["name"], name): found["value"] for task in summary["tasks"] for name, found in task["metrics"].items()
    }
    assert {(row["task"], row["metric"]): row["value"] for row in rows} == told
    assert [name for _, name in told] == ["accuracy", "accuracy_per_byte", "calibration_error", "exact_match", "f1"]


def test_cx5_1_the_summary_says_what_was_measured_how_and_on_what(place, finished, answered):
    """Every metric with its version, its direction and its range; another text is another fingerprint."""
    _, summary = answered("eval", finished, "--task", "capitals.yaml", "--max-windows", 2)
    (task,) = summary["tasks"]
    assert (task["name"], task["kind"], task["n"], task["n_examples"]) == ("capitals", "choice", 2, 2)
    assert task["measures"] == ["accuracy", "accuracy_per_byte", "calibration_error"]
    assert task["metrics"]["calibration_error"] | {"value": 0} == {
        **{"value": 0, "version": "1", "direction": "min", "range": [0.0, 1.0]}
    }
    assert summary["reading"]["learn"] == "memory" and summary["shard"] == "1/1"
    assert len(summary["checkpoint_sha256"]) == 64
    again = answered("eval", finished, "--task", "capitals.yaml", "--max-windows", 2)[1]
    assert again == summary
    frozen = answered("eval", finished, "--task", "capitals.yaml", "--max-windows", 3, "--learn", "none")[1]
    assert frozen["tasks"][0]["dataset_fingerprint"] != task["dataset_fingerprint"]


def test_cx5_2_shards_are_merged_to_one_run(place, finished, answered, capsys):
    """The three files of the whole, byte by byte."""
    words = ["eval", str(finished), "--task", "capitals.yaml", "--task", "say.yaml"]
    assert run([*words, "--out", "whole"]) == 0
    for number in (1, 2):
        assert run([*words, "--shard", f"{number}/2", "--out", f"shards/{number}"]) == 0
    assert run(["eval", "--merge", "shards/2", "shards/1", "--out", "merged"]) == 0
    assert "accuracy" in capsys.readouterr().out
    for name in ("evaluation.json", "scores.csv", "predictions.ndjson"):
        assert (place / "merged" / name).read_bytes() == (place / "whole" / name).read_bytes()
    assert answered("eval", "--merge", "shards/1")[0] == 4


def test_continual_metrics_of_evaluations_after_each_task(place, finished, answered, capsys):
    """One model and two tasks: what does not change transfers nothing and forgets nothing."""
    shutil.copy("capitals.yaml", "again.yaml")
    for number in (1, 2):
        words = ["eval", str(finished), "--task", "capitals.yaml", "--task", "again.yaml", "--out", str(number)]
        assert run(words) == 0
    capsys.readouterr()
    code, summary = answered("eval", "--continual", "1", "2")
    (task,) = summary["tasks"]
    validate("evaluation", summary)
    assert (code, summary["suite"], task["name"]) == (0, "continual", "continual/accuracy")
    scores = json.loads((place / "1" / "evaluation.json").read_text())["tasks"][0]["metrics"]["accuracy"]["value"]
    assert task["scores"] == [[scores, scores]] * 2
    assert {name: found["value"] for name, found in task["metrics"].items()} == {
        "average_accuracy": scores,
        "backward_transfer": 0.0,
        "forgetting": 0.0,
    }
    assert run(["eval", "--continual", "1"]) == 4
    assert run(["eval", "--continual", "1", "2", "--metric", "calibration_error"]) == 4
    err = capsys.readouterr().err
    assert "Evaluate every task after each" in err and "Give another with --metric: accuracy, accuracy_per_byte." in err


WRONG = [
    (["GOOD", "--task", "nowhere"], 2, "neither a task file"),
    (["GOOD", "--task", "nowhere.yaml"], 4, "cannot open"),
    (["GOOD", "--task", "capitals.yaml", "--task", "capitals.yaml"], 2, "two tasks are called 'capitals'"),
    (["GOOD", "--task", "capitals.yaml", "--shard", "3/2", "--out", "x"], 2, "is no shard"),
    (["GOOD", "--task", "capitals.yaml", "--shard", "1/2"], 2, "no --out is given"),
    (["GOOD", "--shard", "1/2"], 2, "divides the examples of --task"),
    (["GOOD", "--metric", "accuracy"], 2, "chooses the score of --continual"),
    (["GOOD", "--task", "capitals.yaml", "--picture", "a.png"], 2, "--task is given"),
    (["GOOD", "--task", "capitals.yaml", "--out", "capitals.yaml"], 3, "cannot be made"),
    (["--merge"], 2, "none is given"),
    (["--merge", "a", "a"], 2, "twice"),
    (["--merge", "a", "--continual"], 2, "two things"),
    (["--merge", "a", "--learn", "none"], 2, "no --learn"),
    (["--merge", "nowhere"], 4, "cannot open"),
    (["--continual", "GOOD"], 4, "cannot open"),
]


@pytest.mark.parametrize("words, code, said", WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_what_does_not_fit_is_said_before_the_model_is_opened(place, finished, capsys, words, code, said):
    assert run(["eval", *(str(finished) if word == "GOOD" else word for word in words)]) == code
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert not (place / "x").exists()
