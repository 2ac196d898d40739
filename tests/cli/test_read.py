"""What `meristem data prepare` reads is the text that was named, and it says which."""

from pathlib import Path

import pytest

from meristem.cli import run
from meristem.data.corpus import open_corpus


@pytest.mark.parametrize("name", ["notes #1.txt", "2024", "true", "null", "[a]"])
def test_gr4_the_file_that_was_named_is_read_and_shown(name, tmp_path, monkeypatch, answered):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("another file\n" * 99)
    (tmp_path / name).write_text("the right file\n" * 99)
    code, value = answered("data", "prepare", f"data.source={name}", f"data.root={tmp_path / 'cache #1'}")
    assert (code, value["name"], value["files"]) == (0, name, {"count": 1, "first": name})
    corpus = open_corpus(tmp_path / "cache #1" / "corpora" / Path(value["path"]).name)
    assert corpus.text("train").startswith(b"the right file\n")


def test_gr6_copies_are_shown(tmp_path, answered):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"text {number % 30}\n")
    code, value = answered("data", "prepare", f"data.source={text}", f"data.root={tmp_path / 'cache'}")
    assert (code, value["copies"]) == (0, 10)


def test_binary_files_are_a_line(tmp_path, answered, capsys):
    """It goes beside the answer, so that this stays one value."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"text {number}\n")
    (text / "picture.png").write_bytes(b"\x89PNG\0")
    assert run(["data", "prepare", f"data.source={text}", f"data.root={tmp_path / 'cache'}"]) == 0
    out, err = capsys.readouterr()
    assert "first picture.png" in err and "data.exclude" in err and "data.exclude" not in out
