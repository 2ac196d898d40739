"""Layers of settings: which one wins, what a tree remembers, how it survives being written down."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from meristem import config
from meristem.config import ConfigSection, dump_yaml, fingerprint, leaves, load, preset_names, read_yaml
from meristem.errors import ConfigError, WrongValue


class OptimConfig(ConfigSection):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)


class TrainConfig(ConfigSection):
    grad_accum_steps: int = Field(1, ge=1)
    steps: int | None = None
    tags: dict[str, str] = {}
    include: tuple[str, ...] = ()


class Tree(ConfigSection):
    name: str = ""
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()


LAYERS = ("preset", "file", "environment", "command line")
SAID = {"preset": 2, "file": 3, "environment": 5, "command line": 7}


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package folder of presets that holds one of ours; what was read of either folder is forgotten."""
    folder = tmp_path / "package"
    (folder / "presets").mkdir(parents=True)
    (folder / "sizes").mkdir()
    monkeypatch.setattr("importlib.resources.files", lambda name: folder)
    kept = (config.layers._parsed, config.layers._all_presets)
    for each in kept:
        each.cache_clear()
    yield folder / "presets"
    for each in kept:
        each.cache_clear()


@pytest.mark.parametrize("layers", [(), *((layer,) for layer in LAYERS), *combinations(LAYERS, 2), LAYERS])
def test_precedence_matrix(layers: tuple[str, ...], presets: Path, tmp_path: Path) -> None:
    """CX-4.1: Of any layers that set a key, the highest wins, and `why` names it."""
    text = {layer: dump_yaml({"train": {"grad_accum_steps": value}}) for layer, value in SAID.items()}
    (presets / "small.yaml").write_text(text["preset"])
    (tmp_path / "my.yaml").write_text(text["file"])
    loaded = load(
        Tree,
        preset="small" if "preset" in layers else None,
        file=tmp_path / "my.yaml" if "file" in layers else None,
        environment={"MERISTEM__TRAIN__GRAD_ACCUM_STEPS": "5"} if "environment" in layers else {},
        overrides=["train.grad_accum_steps=7"] if "command line" in layers else [],
    )
    highest = layers[-1] if layers else "defaults"
    assert loaded.tree.train.grad_accum_steps == SAID.get(highest, 1)
    assert loaded.why["train.grad_accum_steps"].startswith(highest)
    assert loaded.why["optim.lr"] == "defaults"


def test_explicit_default_wins(tmp_path: Path) -> None:
    """CX-4.3: A command-line value beats the file even when it says what the default says."""
    (tmp_path / "my.yaml").write_text("train: {grad_accum_steps: 3}")
    loaded = load(Tree, file=tmp_path / "my.yaml", overrides=["train.grad_accum_steps=1"])
    assert loaded.tree.train.grad_accum_steps == 1
    assert loaded.why["train.grad_accum_steps"] == "command line train.grad_accum_steps=1"


def test_layers_merge_key_by_key(tmp_path: Path) -> None:
    """A layer that names one key of a section, or none, leaves the section's other keys as they were."""
    (tmp_path / "my.yaml").write_text("train: {grad_accum_steps: 3, tags: {a: x}}\noptim: {}")
    loaded = load(Tree, file=tmp_path / "my.yaml", overrides=["train={steps: 5, tags: {b: y}}", "train={}"])
    assert loaded.tree.train == TrainConfig(grad_accum_steps=3, steps=5, tags={"a": "x", "b": "y"})
    assert loaded.why["train.tags.a"] == f"file {tmp_path / 'my.yaml'}"
    assert loaded.why["train.tags.b"].startswith("command line")


def test_why_covers_every_leaf_and_nothing_else() -> None:
    loaded = load(Tree, overrides=["train.tags.a=x"])
    assert loaded.why.keys() == leaves(loaded.tree.model_dump(mode="json")).keys()


def test_other_variables_are_not_settings() -> None:
    assert load(Tree, environment={"MERISTEM_CACHE": "/x", "PATH": "/bin"}).tree == Tree()


texts = st.text(max_size=12)
trees = st.builds(
    Tree,
    name=texts,
    optim=st.builds(OptimConfig, name=st.sampled_from(["adamw", "sgd"]), lr=st.floats(1e-300, 1e300)),
    train=st.builds(
        TrainConfig,
        grad_accum_steps=st.integers(1, 2**70),
        steps=st.none() | st.integers(),
        tags=st.dictionaries(texts, texts, max_size=3),
        include=st.lists(texts, max_size=3).map(tuple),
    ),
)


@given(trees)
def test_round_trip(tree: Tree) -> None:
    """CX-4.4: A tree written as YAML and read again is the same tree, with the same fingerprint."""
    again = Tree.model_validate(read_yaml(dump_yaml(tree)))
    assert again == tree
    assert fingerprint(again) == fingerprint(tree)


@pytest.mark.parametrize(
    "text", ["1e-3", "off", "1:00", "null", "0x1f", "2026-11-21", "-", "~", "=", "<<", "010", " x", "#"]
)
def test_text_stays_text(text: str) -> None:
    """Whatever a text looks like to one reading of YAML or another, it comes back as that text."""
    assert read_yaml(dump_yaml({"name": text})) == {"name": text}


@pytest.mark.parametrize(
    "text, value", [("1e-3", 0.001), ("off", "off"), ("1:30", "1:30"), ("true", True), ("[1, a]", [1, "a"])]
)
def test_plain_scalars_are_typed_as_yaml_1_2(text: str, value: object) -> None:
    assert read_yaml(f"key: {text}") == {"key": value}


def test_preset_names_are_files_of_the_package(presets: Path) -> None:
    (presets / "large.yaml").touch()
    (presets / "small.yaml").touch()
    (presets / "README.md").touch()
    assert preset_names() == ["large", "small"]


def test_unknown_preset_names_the_nearest(presets: Path) -> None:
    (presets / "titans-mag.yaml").touch()
    with pytest.raises(WrongValue, match=r"no preset is called 'titan-mag'\. Nearest: titans-mag"):
        load(Tree, preset="titan-mag")


def test_absent_file_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml cannot be read: No such file"):
        load(Tree, file=tmp_path / "my.yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", r"^my\.yaml, line 4: the key 'c' stands on line 3 already; keep one\.$"),
        ("a: [1\nb: 2", r"^my\.yaml, line 2: expected ',' or ']'"),
        ("- a", r"^my\.yaml holds a list at its top level; expected lines like 'key: value'"),
        ("a: !!python/object:os.system x", r"line 1: could not determine a constructor"),
        ("a: &x {b: *x}", r"line 1: found unconstructable recursive node"),
        ("? [a]\n: b", r"line 1: a key must be plain text"),
        ("a: \x00", r"my\.yaml is not YAML"),
    ],
)
def test_bad_yaml_names_source_and_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_yaml(text, "my.yaml")


def test_canonical_is_rfc_8785() -> None:
    """Numbers, key order and large integers as the RFC and our conventions say, where sorted json.dumps differs."""
    value = {"\ufb33": 1e-7, "\U0001f600": 1.0, "b": 1e16, "a": 2**53}
    assert (
        config.canonical(value)
        == '{"a":"9007199254740992","b":10000000000000000,"\U0001f600":1,"\ufb33":1e-7}'.encode()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_canonical_refuses_what_json_cannot_hold(value: float) -> None:
    with pytest.raises(WrongValue, match="canonical JSON cannot hold"):
        config.canonical({"loss": value})


def test_equal_trees_have_one_fingerprint() -> None:
    """CX-4.4: The fingerprint depends on the tree, not on the layers that made it."""
    by_default = load(Tree).tree
    by_hand = load(Tree, overrides=["optim.lr=0.001"]).tree
    assert fingerprint(by_default) == fingerprint(by_hand) == fingerprint(by_default.model_dump(mode="json"))
    assert fingerprint(by_default) != fingerprint(load(Tree, overrides=["optim.lr=0.002"]).tree)


def test_schema_describes_every_key() -> None:
    """CX-4.6."""
    described = config.schema(Tree)
    assert described["properties"].keys() == Tree.model_fields.keys()
    assert described["$defs"]["OptimConfig"]["additionalProperties"] is False
