"""``meristem data`` prepares, lists, checks and counts; its tokenizer gives texts back."""

from pathlib import Path

import pytest

from meristem.cli import run

TEXT = "To be, or not to be.\n\n" * 300


@pytest.fixture
def corpus(tmp_path, monkeypatch, answered):
    """A prepared corpus in a store of its own."""
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "book.txt").write_text(TEXT)
    code, found = answered("data", "prepare", "charformer", f"data.source={tmp_path / 'book.txt'}")
    assert code == 0
    return found


def test_prepared_twice_is_one_corpus(corpus, tmp_path, answered):
    """With a preset or without one, as long as data and tokenizer are the same."""
    assert sum(count["size_bytes"] for count in corpus["counts"].values()) == len(TEXT)
    again = answered("data", "prepare", f"data.source={tmp_path / 'book.txt'}")[1]
    assert again == corpus
    listed = answered("data", "ls")[1]
    assert listed["corpora"] == [corpus]
    assert "shakespeare" in listed["downloads"]


def test_stats_count_the_text(corpus, tmp_path, answered):
    """Bytes are tokens of the byte tokenizer; the one document that was cut is near itself."""
    picture = tmp_path / "text.png"
    code, report = answered("data", "stats", corpus["path"], "--picture", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (code, report["train"]["tokens"]) == (0, corpus["counts"]["train"]["size_bytes"])
    assert report["train"]["bytes_per_token"] == 1
    assert report["train"]["ids_used"] == len(set(TEXT))
    assert report["train"]["tokens_per_document"]["longest"] == report["train"]["tokens"]
    assert (report["near_duplicates"]["n_documents"], report["near_duplicates"]["n_held_out"]) == (2, 1)
    assert "near_duplicates" not in answered("data", "stats", corpus["path"], "--near", "0")[1]


@pytest.mark.parametrize("verb", ["stats", "verify"])
def test_what_is_no_corpus_is_said_to_be_none(verb, tmp_path, capsys):
    assert run(["data", verb, str(tmp_path / "nothere")]) == 4
    assert "nothere is no prepared corpus: it holds no manifest.json. `meristem data ls`" in capsys.readouterr().err


def test_verify_finds_an_altered_file(corpus, answered):
    """And names it, with the code of a negative result."""
    assert answered("data", "verify", corpus["path"])[0] == 0
    path = next(Path(corpus["path"]).glob("tokens.train.*"))
    path.write_bytes(path.read_bytes().replace(b"b", b"c"))
    code, report = answered("data", "verify", corpus["path"])
    assert (code, report["intact"], path.name in report["fault"]) == (1, False, True)


@pytest.mark.parametrize("place", ["corpus", "checkpoint"])
def test_tokenizer_gives_a_text_back(place, corpus, finished, answered):
    """Whether it stands in a corpus or in a checkpoint."""
    path = corpus["path"] if place == "corpus" else finished
    ids = answered("data", "tokenizer", "encode", path, "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve")[1]
    assert answered("data", "tokenizer", "decode", path, *ids)[1] == "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve"
    assert answered("data", "tokenizer", "inspect", path)[1]["vocab_size"] == 256


def test_a_missing_text_is_named(capsys, tmp_path, monkeypatch):
    """An error of the data kind, with what could stand there."""
    monkeypatch.setenv("MERISTEM_CACHE", str(tmp_path))
    assert run(["data", "prepare", "data.source=stdlob"]) == 4
    assert "stdlib" in capsys.readouterr().err
