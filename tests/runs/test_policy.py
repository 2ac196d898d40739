"""What a run writes down keeps to its policy, and its manifest says which that was and whether it was passed by."""

from pathlib import Path

import pytest
import yaml

from meristem.checkpoint.run import read
from meristem.errors import DeadKey, PolicyError
from meristem.recipes.pretrain import pretrain
from meristem.runs.config import load_config
from meristem.runs.directory import opened
from meristem.safety.policy import load_policy
from meristem.sinks.console import Console
from meristem.sinks.jsonl import read_records
from recipes.small import config, write_text

QUICK = ("train.steps=2", "eval.n_samples=2", "eval.learn_rate=false", "eval.reading_tokens=0")


def written(place: Path, **rule: object) -> Path:
    path = place / "mine.yaml"
    rule = {
        "id": "word",
        "action": "redact",
        "match": {"literals": ["times"]},
        "examples": {"match": ["3 times 4"]},
    } | rule
    path.write_text(yaml.safe_dump({"version": 1, "rules": [rule]}))
    return path


def test_cx_9_4_samples_keep_to_the_policy_of_the_run(tmp_path: Path) -> None:
    """CX-9.4: prompts are redacted before the model reads them; ``run.json`` holds the fingerprint; without it nothing
    is redacted, and the bypass and its reason are recorded.
    """
    path, text = written(tmp_path), write_text(tmp_path)
    judged = pretrain(
        config(text, *QUICK, f"safety.policy={path}"), run_dir=tmp_path / "judged", view=Console(json=True)
    )
    assert [sample.prompt.count("[redacted]") for sample in judged.samples] == [2, 2]
    samples = list(read_records(tmp_path / "judged" / "samples.ndjson"))
    assert [each["prompt"] for each in samples] == [sample.prompt for sample in judged.samples]
    assert "452 times" not in (tmp_path / "judged" / "report.md").read_text()
    manifest = read(tmp_path / "judged")
    assert manifest["policy_fingerprint"] == load_policy(str(path)).fingerprint and manifest["bypass"] is False


def test_cx_9_4_a_bypass_is_recorded(tmp_path: Path) -> None:
    """CX-9.4: in ``run.json`` and, with its reason, as an event; a run that goes on without one still had it."""
    path = written(tmp_path)
    words = [f"run.dir={tmp_path}", f"safety.policy={path}"]
    bypassed = load_config("default", [*words, "safety.bypass=a drill on Monday"]).tree
    for is_new, tree in ((True, bypassed), (False, load_config("default", words).tree)):
        with opened(tree, tmp_path / "run", Console(json=True), is_new=is_new) as run:
            assert run.policy.reads("output") is not is_new
        assert read(tmp_path / "run")["bypass"] is True
    (event,) = [each for each in read_records(tmp_path / "run" / "events.ndjson") if each["name"] == "safety.bypassed"]
    assert event["payload"]["reason"] == "a drill on Monday"
    assert event["payload"]["fingerprint"] == read(tmp_path / "run")["policy_fingerprint"]


def test_a_policy_that_is_none_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    path = written(tmp_path, examples={"match": ["3 and 4"]})
    tree = load_config("default", [f"safety.policy={path}"]).tree
    with pytest.raises(PolicyError, match="rule 'word'"), opened(tree, tmp_path / "run", Console(), is_new=True):
        pass
    assert not (tmp_path / "run").exists()
    with pytest.raises(DeadKey, match=r"no safety\.policy"):
        load_config("default", ["safety.bypass=why"])
