"""The tree that is really used: its presets, its schema, its suggestions."""

import subprocess
import sys

import jsonschema
import pytest
from pydantic import ValidationError

from meristem.config import leaves, load, preset_names, schema
from meristem.config.mistakes import OTHER_WORDS, known_paths
from meristem.errors import UnknownKey
from meristem.runs.config import Config, load_config

KEYS = {path for path, inside in known_paths(Config).items() if not inside}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_validates(name: str) -> None:
    """CX-4.6: A preset is a whole tree, and what it says is what comes out."""
    loaded = load(Config, preset=name)
    said = [path for path, layer in loaded.why.items() if layer == f"preset {name}"]
    assert said
    assert loaded.why.keys() == leaves(loaded.tree.model_dump(mode="json")).keys()


def test_schema_names_every_section() -> None:
    assert schema(Config)["properties"].keys() == Config.model_fields.keys()


@pytest.mark.parametrize("word", sorted(OTHER_WORDS))
def test_words_used_elsewhere_lead_to_a_key_of_ours(word: str) -> None:
    """What is suggested exists, and the other word is not itself one of our keys."""
    assert OTHER_WORDS[word] in KEYS
    assert word not in {key.rpartition(".")[2] for key in KEYS}
    with pytest.raises(UnknownKey) as caught:
        load(Config, overrides=[f"{word}=1"])
    assert caught.value.fields["nearest"] == OTHER_WORDS[word]


@pytest.mark.parametrize(
    "unknown, nearest",
    [
        ("lr", "optim.lr"),
        ("train.lr", "optim.lr"),
        ("batch_size", "data.batch_size"),
        ("train.grad_acum_steps", "train.grad_accum_steps"),
        ("seed", "run.seed"),
        ("window", "data.seq_len"),
        ("rate", "optim.lr"),
    ],
)
def test_suggestions_on_the_real_tree(unknown: str, nearest: str) -> None:
    with pytest.raises(UnknownKey, match=f"Did you mean '{nearest}'"):
        load(Config, overrides=[f"{unknown}=1"])


def test_the_real_tree_is_refused_without_torch() -> None:
    """CX-4.2."""
    program = """
import sys
from meristem.errors import UnknownKey
from meristem.runs.config import load_config
try:
    load_config("titans-mag", ["lr=2"])
except UnknownKey as error:
    print(error.fields["nearest"], "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["optim.lr", "False"]


@pytest.mark.parametrize("name", preset_names())
def test_la4_training_config_keeps_its_schema_and_comes_back(name: str) -> None:
    """Every preset is what the exported schema says, and reads back as the same tree."""
    tree = load_config(name, (), {}).tree
    dumped = tree.model_dump(mode="json")
    jsonschema.validate(dumped, schema(Config))
    assert Config.model_validate(dumped) == tree


@pytest.mark.parametrize("section", list(Config.model_fields))
def test_la4_unknown_key_is_refused_and_nothing_can_be_set(section: str) -> None:
    with pytest.raises(UnknownKey, match=f"{section}.nonsense"):
        load_config("titans-mag", [f"{section}.nonsense=1"], {})
    part = getattr(Config(), section)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(part, next(iter(type(part).model_fields)), None)
