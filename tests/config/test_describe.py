"""What ``config explain`` says of a key is what the tree does with it."""

import shlex

import pytest
from pydantic import TypeAdapter

from meristem.config import identity, load, preset_names
from meristem.config.describe import describe
from meristem.config.kinds import kinds_of
from meristem.config.mistakes import known_paths, part_of
from meristem.config.text import read_value
from meristem.errors import UnknownKey
from meristem.runs.config import Config, load_config

LEAVES = sorted(key for key, inside in known_paths(Config).items() if not inside)


@pytest.mark.parametrize("key", LEAVES)
def test_example_is_a_value_of_its_key(key):
    """The word can be typed and its value is taken; every key is described."""
    told = describe(Config, key)
    (word,) = shlex.split(told.example)
    path, _, text = word.partition("=")
    assert told.description and (path == key or key.startswith(f"{path}."))
    section, _, name = path.rpartition(".")
    (kind,) = (part_of(each) for each in kinds_of(Config, section) if part_of(each))
    field = kind.model_fields[name]
    adapter = TypeAdapter(field.rebuild_annotation())
    adapter.validate_python(read_value(text, "a test", kinds_of(Config, path)))


def test_key_is_described_as_the_tree_has_it():
    """Type, default, limits, presets, environment and identity."""
    told = describe(Config, "optim.lr")
    assert (told.type, told.default, told.allowed, told.is_identity) == ("float", 0.001, ["more than 0"], True)
    assert told.set_by["preset titans-mag"] == load_config("titans-mag", (), {}).tree.optim.lr
    assert load(Config, environment={told.environment: "0.5"}).tree.optim.lr == 0.5
    assert describe(Config, "data.mirror").allowed == ["text like ^https?://"]
    assert describe(Config, "rollback.change").allowed == ["skip", "ease", "both"]


@pytest.mark.parametrize(
    "key, other",
    [
        ("train.log_every", 7),
        ("eval.batch_size", 7),
        ("optim.lr", 1),
        ("run.seed", 7),
    ],
)
def test_identity_is_that_of_the_run(key, other):
    """What is said to make another run does, and nothing else."""
    changes = identity(load(Config, overrides=[f"{key}={other}"]).tree) != identity(Config())
    assert describe(Config, key).is_identity == changes


def test_presets_that_set_a_key_are_all_named():
    """What a preset resolves to comes from one of the places that are named."""
    places = describe(Config, "memory.rule").set_by
    for name in preset_names():
        where = load_config(name, (), {}).why["memory.rule"]
        assert where in places or where == "defaults"


def test_section_lists_its_keys():
    """Each with what it means; a section outside identity is outside as a whole."""
    told = describe(Config, "eval")
    assert told.keys.keys() == type(Config().eval).model_fields.keys() and all(told.keys.values())
    assert (told.type, told.is_identity, told.example) == ("section", False, "")


def test_key_in_a_list_is_set_with_its_list():
    """There is no variable for it."""
    told = describe(Config, "model.layers.mixer")
    assert (told.environment, told.example) == ("", "'model.layers=[{mixer: attention}]'")


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("tran.steps", "train.steps"),
        ("learning_rate", "optim.lr"),
        ("dta", "data"),
    ],
)
def test_misspelt_key_gets_the_nearest(key, nearest):
    """As everywhere else that a key is typed."""
    with pytest.raises(UnknownKey, match=f"Did you mean '{nearest}'") as caught:
        describe(Config, key)
    assert caught.value.fields["nearest"] == nearest
