"""A value is what its key takes: text as it was given, numbers in one grammar, wherever they are said."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meristem.config import ConfigSection, load
from meristem.errors import ConfigError, WrongValue
from meristem.runs.config import Config, load_config

HARD = [
    "notes #1.txt",
    "2024",
    "true",
    "null",
    "~",
    "1e400",
    "[a, b]",
    "{a: b}",
    "'quoted'",
    "*.txt",
    "- a",
    "a: b",
    " x",
]


def said(key: str, value: str, way: str, place: Path):
    """The tree of one setting that was said on the command line, in the environment or in a file."""
    if way == "command line":
        return load(Config, overrides=[f"{key}={value}"]).tree
    if way == "environment":
        return load(Config, environment={f"MERISTEM__{key.upper().replace('.', '__')}": value}).tree
    section, name = key.split(".")
    (place / "my.yaml").write_text(f"{section}:\n  {name}: {value}\n")
    return load_config(str(place / "my.yaml"), environment={}).tree


@pytest.mark.parametrize("way", ["command line", "environment"])
@pytest.mark.parametrize("value", HARD)
def test_gr4_a_value_of_a_text_key_is_that_text(value, way, tmp_path):
    assert said("data.source", value, way, tmp_path).data.source == value
    assert said("run.dir", value, way, tmp_path).run.dir == Path(value)


@given(st.text(min_size=1).filter(lambda text: text not in ("null", "~")))
@example("null #")
def test_gr4_any_text_is_read_as_it_is(value):
    tree = load(Config, overrides=[f"data.source={value}", f"data.root={value}"]).tree
    assert (tree.data.source, tree.data.root) == (value, Path(value))


@pytest.mark.parametrize("value", ["null", "~", ""])
def test_gr4_a_text_key_that_takes_null_can_be_given_it(value):
    assert load(Config, overrides=["data.root=x", f"data.root={value}"]).tree.data.root is None


@pytest.mark.parametrize("key", ["data.source", "run.dir"])
def test_gr4_no_text_at_all_is_refused(key):
    """An empty path would be the working directory."""
    with pytest.raises(WrongValue, match=f"^{key}: found"):
        load(Config, overrides=[f"{key}="])


def test_gr4_the_items_of_a_list_of_texts_are_text():
    assert load(Config, overrides=["data.include=[2024, true, null, 1e3]"]).tree.data.include == (
        "2024",
        "true",
        "null",
        "1e3",
    )


WAYS = pytest.mark.parametrize("way", ["command line", "environment", "file"])
REFUSED = [".inf", "-.inf", ".nan", "inf", "nan", "Infinity", "1e400", "true", "False", "0x10", "0o17", "010", "1_000"]


@WAYS
@pytest.mark.parametrize("key", ["optim.lr", "train.steps", "train.max_time", "data.stride", "schedule.warmup"])
@pytest.mark.parametrize("value", [*REFUSED, "'5'", '"1e3"', "+-1", "1e", "1 2", "0b1", "1:30"])
def test_gr5_what_is_no_number_is_refused(key, value, way, tmp_path):
    """Not finite, a truth value, text, or a form of another grammar; a duration may be text."""
    if key == "train.max_time" and value.startswith(("'", '"')):
        return
    with pytest.raises(ConfigError, match=key):
        said(key, value, way, tmp_path)


@WAYS
@pytest.mark.parametrize(
    "value, number",
    [("3", 3), ("+3", 3), ("1e3", 1000), ("2.50", 2.5), (".5", 0.5), ("5.", 5), ("1E-3", 0.001), ("1e+2", 100)],
)
def test_gr5_numbers_of_the_grammar_are_read(value, number, way, tmp_path):
    assert said("train.max_time", value, way, tmp_path).train.max_time == number
    assert said("optim.lr", value, way, tmp_path).optim.lr == number
    if number == int(number):
        assert said("train.steps", value, way, tmp_path).train.steps == number


@pytest.mark.parametrize("value", ["[1, true]", "[1, 0x8]", "[1, '8']", "[1, .inf]"])
def test_gr5_numbers_in_a_list_are_numbers(value):
    with pytest.raises(WrongValue, match=r"model\.levels\.periods"):
        load(Config, overrides=["model.mlp=levels", f"model.levels.periods={value}"])


@pytest.mark.parametrize("value", ["{8: true}", "{8: .inf}", "{8: '1'}", "{1_0: 1}", "{0x8: 1}"])
def test_gr5_numbers_in_a_mapping_are_numbers(value):
    with pytest.raises(WrongValue, match=r"optim\.level_rates"):
        load(Config, overrides=[f"optim.level_rates={value}"])


@pytest.mark.parametrize("value", [True, "3", float("inf"), float("nan")])
def test_gr5_a_part_made_in_python_is_as_strict(value):
    class Rates(ConfigSection):
        rate: float = 1.0

    with pytest.raises(ValueError, match="rate"):
        Rates(rate=value)
