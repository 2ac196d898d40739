"""Files that build on presets, on sizes and on each other, and several of them at once."""

import os

import pytest

from meristem.config import sources
from meristem.errors import ConfigError, WrongValue
from meristem.runs.config import load_config


@pytest.fixture
def write(tmp_path):
    """Writes a file below a directory of our own and gives its path as text."""

    def file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return file


def test_file_stands_over_its_base(write):
    """What the file does not say is the preset's, down to what that builds on."""
    path = write("mine.yaml", "base: titans-mag\nmodel: {dim: 64}\n")
    tree, why = load_config(path, ["train.steps=7"], {})
    assert tree == load_config("titans-mag", ["model.dim=64", "train.steps=7"], {}).tree
    assert why["model.dim"] == f"file {path}"
    assert why["optim.lr"] == load_config("titans-mag", (), {}).why["optim.lr"]


def test_base_may_be_sized_or_a_size(write):
    """Both of the names that `config presets` lists; where a number is from is known as for the preset."""
    sized = write("a.yaml", "base: hope-340m\n")
    assert load_config(sized, (), {}).tree == load_config("hope-340m", (), {}).tree
    assert sources(sized) == sources("hope-340m")
    size = write("b.yaml", "base: 340m\n")
    assert load_config(size, (), {}).why["model.dim"] == "size 340m"


def test_base_is_found_from_the_file_that_names_it(write, tmp_path, monkeypatch):
    """From whatever directory meristem runs in; and bases go on."""
    write("team.yaml", "base: lmm\ndata: {seq_len: 48}\nmodel: {dim: 96}\n")
    path = write("mine/here.yaml", "base: ../team.yaml\nmodel: {dim: 64}\n")
    monkeypatch.chdir("/")
    tree, why = load_config(os.path.relpath(path), (), {})
    assert (tree.data.seq_len, tree.model.dim) == (48, 64)
    assert why["data.seq_len"].endswith("team.yaml") and why["model.dim"].endswith("here.yaml")


def test_later_files_win(write):
    """Over earlier ones and their bases; the environment and the command line win over all of them."""
    first = write("a.yaml", "base: titans-mag\nmodel: {dim: 64}\noptim: {lr: 0.25}\nrun: {seed: 1}\n")
    second = write("b.yaml", "optim: {lr: 0.5}\nrun: {seed: 2}\n")
    tree, why = load_config(first, [second, "run.seed=4"], {"MERISTEM__RUN__SEED": "3"})
    assert (tree.model.dim, tree.optim.lr, tree.run.seed) == (64, 0.5, 4)
    assert (why["model.dim"], why["optim.lr"]) == (f"file {first}", f"file {second}")
    assert load_config("lmm", [second], {}).tree.optim.lr == 0.5


def test_files_and_settings_come_in_any_order(write):
    """A setting on the command line wins over a file that stands behind it."""
    path = write("a.yaml", "run: {seed: 2}\n")
    assert load_config("lmm", ["run.seed=4", path], {}).tree.run.seed == 4


def test_file_that_was_read_already_is_laid_under_more(write):
    """``text`` is that of the first file alone."""
    more = write("more.yaml", "run: {seed: 5}\n")
    tree = load_config("gone/config.yaml", [more], {}, text="run: {seed: 2, name: saved}\n").tree
    assert (tree.run.seed, tree.run.name) == (5, "saved")


def test_unknown_base_names_the_nearest(write):
    """With the file that names it, and what a base may be."""
    path = write("mine.yaml", "base: titan-mag\n")
    told = r"base \(file .*mine.yaml\): no preset is called 'titan-mag'.*titans-mag.*ends in .yaml"
    with pytest.raises(WrongValue, match=told):
        load_config(path, (), {})


@pytest.mark.parametrize("base", ["3", "[lmm, lattice]", "{a: b}", "''"])
def test_base_is_a_name(base, write):
    """One, and text."""
    with pytest.raises(WrongValue, match="expected a preset, a size, or the path of a YAML file"):
        load_config(write("mine.yaml", f"base: {base}\n"), (), {})


def test_absent_base_is_named_with_its_file(write):
    """And from where its path counts."""
    path = write("mine.yaml", "base: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"base \(file .*mine.yaml\): there is no file .*nowhere.yaml"):
        load_config(path, (), {})


def test_files_that_build_on_each_other_are_refused(write):
    """Whatever their paths look like; the way round is shown."""
    write("a.yaml", "base: sub/../b.yaml\n")
    write("sub/keep", "")
    path = write("b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"build on each other: .*b.yaml -> .*a.yaml -> .*b.yaml. Remove 'base:'"):
        load_config(path, (), {})
    with pytest.raises(ConfigError, match="build on each other"):
        load_config(write("self.yaml", "base: self.yaml\n"), (), {})
