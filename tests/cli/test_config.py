"""``meristem config`` shows what a run would be configured as, and who said so."""

import pytest

from meristem.cli import run
from meristem.config import fingerprint, preset_names, read_yaml
from meristem.runs.config import Config, load_config


def test_shown_settings_are_the_settings(capsys):
    """CX-4.4: The YAML that is printed is the tree."""
    assert run(["config", "show", "charformer", "train.steps=7"]) == 0
    shown = Config.model_validate(read_yaml(capsys.readouterr().out))
    assert fingerprint(shown) == fingerprint(load_config("charformer", ["train.steps=7"]).tree)


def test_why_names_the_layer(answered):
    """CX-4.1: Of every leaf."""
    code, leaves = answered("config", "show", "charformer", "train.steps=7", "--why")
    assert (code, leaves["train.steps"]) == (0, {"value": 7, "layer": "command line train.steps=7", "source": ""})
    assert leaves["model.name"] == {"value": "charformer", "layer": "preset charformer", "source": ""}
    _, leaves = answered("config", "show", "hope-340m", "--why")
    assert leaves["model.dim"]["source"].startswith("MIRAS 2504.13173")
    assert leaves["model.dim"]["layer"] == "size 340m"
    assert leaves["train.max_nonfinite"]["layer"] == "defaults"


def test_presets_are_listed(answered):
    """All of them."""
    assert answered("config", "presets") == (0, preset_names())


def test_schema_knows_every_section(answered):
    """And is JSON Schema."""
    code, schema = answered("config", "schema")
    assert (code, set(schema["properties"])) == (0, set(Config.model_fields))


@pytest.mark.parametrize(
    "words, message",
    [
        (["charforme"], "charformer"),
        (["charformer", "train.stepz=7"], "train.steps"),
        (["charformer", "train.steps=many"], "a whole number"),
        (["charformer", "train.steps"], "expected a.b=c"),
        (["nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_settings_have_code_2(words, message, capsys):
    """And a message that names what would do."""
    assert run(["config", "show", *words]) == 2
    assert message in capsys.readouterr().err


def test_key_is_explained(answered, capsys):
    """In words and as JSON."""
    code, told = answered("config", "explain", "train.grad_accum_steps")
    assert (code, told["default"], told["allowed"]) == (0, 1, ["at least 1"])
    assert run(["config", "explain", "train.grad_accum_steps"]) == 0
    assert "meristem train default train.grad_accum_steps=" in capsys.readouterr().out
    assert run(["config", "explain", "eval"]) == 0
    assert "every_s" in capsys.readouterr().out
    assert run(["config", "explain", "trin"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_why_names_the_file(answered, tmp_path):
    """That set a value, of several, and the preset below it with where its number is from."""
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("base: hope-340m\nrun: {seed: 1, name: a}\n")
    second.write_text("run: {seed: 2}\n")
    code, leaves = answered("config", "show", first, second, "run.dir=elsewhere", "--why")
    assert (code, leaves["run.seed"]["layer"], leaves["run.name"]["layer"]) == (0, f"file {second}", f"file {first}")
    assert leaves["run.dir"]["layer"] == "command line run.dir=elsewhere"
    assert leaves["model.dim"]["source"].startswith("MIRAS 2504.13173")


def test_plan_takes_several_files(answered, tmp_path):
    """As train does, whose settings come the same way."""
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("base: charformer\n")
    second.write_text("model: {dim: 31}\n")
    code, report = answered("plan", first, second)
    assert (code, report["error"]["fields"]["path"]) == (2, "model.n_heads")
