"""The tree as a whole: its presets, the rules between its parts, and that each setting means something."""

import ast
from pathlib import Path

import pytest

import meristem
from meristem.config import ConfigSection, dump_yaml, leaves, preset_names, read_yaml
from meristem.errors import ConflictingKeys, DeadKey, WrongValue
from meristem.runs.config import Config, load_config

PACKAGE = Path(meristem.__file__).parent


@pytest.mark.parametrize("preset", preset_names())
def test_preset_is_valid_and_reads_back(preset):
    tree = load_config(preset, (), {}).tree
    assert tree.run.name == preset
    assert Config.model_validate(read_yaml(dump_yaml(tree))) == tree


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("charformer", ["data.seq_len=300"], r"data.seq_len is 300, .*'charformer' sees at most model.max_seq_len=256"),
        ("titans-mag", ["memory.head_dim=24"], r"model.dim 128 does not divide into memories of .* 24"),
        ("titans-mag", ["data.validation=0"], r"no text is left to evaluate on"),
        ("titans-mag", ["checkpoint.metric=val/loss"], r"is 'val/loss', but training measures val/bits_per_byte and"),
        ("charformer", ["distributed.shard=true", "data.order=documents"], r"they would wait for each other for ever"),
        ("titans-mag", ["model.n_heads=3"], r"128 does not divide into 3 heads"),
    ],
)
def test_keys_that_do_not_go_together(preset, overrides, message):
    with pytest.raises(ConflictingKeys, match=message):
        load_config(preset, overrides, {})


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [("charrnn", ["data.seq_len=300"]), ("charformer", ["data.seq_len=255"]), ("hope", ["memory.conv=2"])],
)
def test_rules_hold_only_for_whom_they_concern(preset, overrides):
    key, _, value = overrides[0].partition("=")
    section, name = key.split(".")
    assert getattr(getattr(load_config(preset, overrides, {}).tree, section), name) == int(value)


@pytest.mark.parametrize(
    ("preset", "override", "message"),
    [
        ("attention", "memory.rule=yaad", "memory.rule given, but no layer .* they read nothing of memory"),
        ("charrnn", "memory.head_dim=16", "memory.head_dim given"),
        ("hope", "memory.rule=yaad", "they read memory.conv, memory.head_dim, memory.self_reference. Remove"),
        ("titans-mag", "memory.self_reference.setting=static", "memory.self_reference given"),
    ],
)
def test_settings_of_memories_that_no_layer_reads_are_refused(preset, override, message):
    with pytest.raises(DeadKey, match=message):
        load_config(preset, [override], {})


def test_file_is_told_from_preset(tmp_path):
    """By its ending; an unknown name is taken for a misspelt preset."""
    (tmp_path / "mine.yaml").write_text("optim: {lr: 0.5}\n")
    loaded = load_config(str(tmp_path / "mine.yaml"), (), {})
    assert loaded.tree.optim.lr == 0.5
    assert loaded.why["optim.lr"].startswith("file ")
    with pytest.raises(WrongValue, match="no preset is called 'titan-mag'. Nearest: titans-mag"):
        load_config("titan-mag", (), {})


def test_every_setting_is_read_by_code():
    """A8.13: Each leaf is asked for outside the part that defines it, or by a method of the part that is."""
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    asked = {name for path, tree in trees.items() if path.name != "part.py" for name in attributes(tree)}
    methods = [
        node
        for path, tree in trees.items()
        if path.name == "part.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    asked |= {name for method in methods if method.name in asked for name in attributes(method)}
    unread = [key for key in leaves(Config().model_dump()) if key.rsplit(".", 1)[-1] not in asked]
    assert unread == []


def attributes(tree: ast.AST) -> set[str]:
    """The names of all attributes that are read in it."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if isinstance(node.ctx, ast.Load)}


def test_every_setting_is_described():
    """The reference is made from these words."""

    def undescribed(config: type[ConfigSection], path: str) -> list[str]:
        found = []
        for name, field in config.model_fields.items():
            annotation = field.annotation
            if isinstance(annotation, type) and issubclass(annotation, ConfigSection):
                found += undescribed(annotation, f"{path}{name}.")
            elif not field.description:
                found.append(f"{path}{name}")
        return found

    assert undescribed(Config, "") == []
