"""`meristem grow`: the verb itself, and what it says of a run that does not grow."""

import json

import pytest

from meristem.cli import run
from meristem.recipes.pretrain import pretrain
from recipes.small import config, write_text


def test_run_may_be_left_out(capsys):
    """A first word that is no verb is a preset; a slip in it names the nearest."""
    assert run(["grow", "titans-mga"]) == 2
    assert "titans-mag" in capsys.readouterr().err
    assert run(["grow", "run", "titans-mga"]) == 2
    assert "titans-mag" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "found"),
    [("grow.boundary_evry=3", "grow.boundary_every"), ("grow.gates.pairs=1", "grow.gates.pairs")],
)
def test_ka11_unknown_keys_and_values_out_of_bounds_are_refused(setting, found, capsys):
    assert run(["grow", "titans-mag", setting]) == 2
    assert found in capsys.readouterr().err


def test_a_run_that_does_not_grow_has_no_lives(tmp_path, capsys):
    """One sentence, with what to do."""
    settings = config(write_text(tmp_path), "train.steps=2", "eval.n_samples=0", "checkpoint.every=1")
    pretrain(settings, run_dir=tmp_path / "run")
    capsys.readouterr()
    assert run(["grow", "report", str(tmp_path / "run"), "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert "no checkpoint of a run that grows" in error["message"] and "meristem grow" in error["message"]
    assert run(["grow", "request", str(tmp_path / "run"), "--json"]) == 3
    assert "is no run that grows" in json.loads(capsys.readouterr().out)["error"]["message"]
