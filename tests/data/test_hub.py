"""Sets of the library datasets are read once, written down, and read from there; nothing is fetched unless told."""

import os
import sys

import orjson
import pytest

from meristem.data import hub, sources
from meristem.data.config import DataConfig, HubConfig, TokenizerConfig
from meristem.data.prepare import prepare
from meristem.errors import DataError, FileChanged, MissingExtra
from meristem.recipes.plan.text import prepared

pytestmark = pytest.mark.extras

TEXTS = [f"Row {number} says \u2028 something.\n" for number in range(40)]


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    """The library; whatever it keeps, it keeps here."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "library"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    return datasets


@pytest.fixture
def saved(tmp_path, datasets):
    """Two splits as ``save_to_disk`` writes them, with a column that is no text."""
    columns = {"text": TEXTS, "number": list(range(40))}
    whole = datasets.Dataset.from_dict(columns)
    places = datasets.DatasetDict({"train": whole, "test": whole.select(range(3))})
    places.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def files(tmp_path, datasets):
    """A directory of Parquet files, as a set of the hub is."""
    (tmp_path / "files").mkdir()
    for number in range(2):
        part = datasets.Dataset.from_dict({"text": TEXTS[20 * number : 20 * number + 20]})
        part.to_parquet(tmp_path / "files" / f"train-{number}.parquet")
    return tmp_path / "files"


def settings(tmp_path, source, **more):
    hf = {name: more.pop(name) for name in ("streaming", "rows") if name in more}
    data = {"source": f"hf:{source}", "root": tmp_path / "cache", "hf": HubConfig(**hf), "validation": 0.25}
    return DataConfig(**data | more)


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize("kind", ["saved", "files"])
def test_cx_8_a_set_is_read_once_and_every_row_is_a_document(tmp_path, request, kind, streaming, monkeypatch):
    """CX-8: map-style and streaming alike; a second preparation opens no set."""
    place, events = request.getfixturevalue(kind), []
    corpus = prepare(settings(tmp_path, place, streaming=streaming), TokenizerConfig(), events.append)
    assert [event.name for event in events] == ["data.import", "data.prepared"]
    assert corpus.name == f"hf:{kind}:train"
    assert sum(len(corpus.documents(split)) - 1 for split in corpus.splits) == 40
    found = corpus.text("train").decode() + corpus.text("val").decode()
    assert sorted(found.splitlines(keepends=True)) == sorted("".join(TEXTS).splitlines(keepends=True))
    assert str(tmp_path) not in (corpus.path / "manifest.json").read_text()
    monkeypatch.setattr(hub, "_library", lambda source: pytest.fail("the set was opened again"))
    again = prepare(settings(tmp_path, place, streaming=not streaming), TokenizerConfig(kind="bpe", vocab_size=300))
    assert again.text("val") == corpus.text("val")


def test_a_split_and_a_number_of_rows_are_taken(tmp_path, saved):
    texts = [each.text.decode() for each in sources.documents(settings(tmp_path, f"{saved}:test"))]
    assert texts == TEXTS[:3]
    documents = list(sources.documents(settings(tmp_path, saved, rows=7)))
    assert [each.text.decode() for each in documents] == TEXTS[:7]
    assert (documents[6].id, documents[6].file) == ("hf:saved:train#7", "hf:saved:train")


def test_a_directory_that_changed_is_read_anew_and_a_changed_record_refused(tmp_path, files, datasets):
    data, events = settings(tmp_path, files), []
    path = hub.available(data, events.append)
    said = orjson.loads(path.with_suffix(".json").read_bytes())
    assert (said["rows"], said["size_bytes"]) == (40, path.stat().st_size)
    assert hub.available(data, events.append) == path and len(events) == 1
    datasets.Dataset.from_dict({"text": ["New.\n"]}).to_parquet(files / "train-1.parquet")
    hub.available(data, events.append)
    assert (len(events), len(path.read_bytes().splitlines())) == (2, 21)
    text = path.read_bytes()
    path.write_bytes(text.replace(b"New", b"Old"))
    with pytest.raises(FileChanged, match=r"has SHA-256 .* when the set .* was written there. Remove the file"):
        hub.available(data)


def test_nothing_is_fetched_unless_told(tmp_path, monkeypatch):
    """By preparing and by planning; what was fetched before is used."""
    monkeypatch.setattr(hub, "_library", lambda source: pytest.fail("the library was loaded"))
    data = settings(tmp_path, "owner/name#part")
    for refused in (lambda: prepare(data, TokenizerConfig()), lambda: prepared(data, TokenizerConfig())):
        with pytest.raises(
            DataError, match=r"'hf:owner/name#part' is not here. Let it be fetched: .*data.download=true"
        ):
            refused()


def test_a_set_of_the_hub_is_of_one_commit(tmp_path, datasets, monkeypatch):
    """Told to fetch, the library is asked for the commit at which the set is; a given one is taken."""
    asked = []

    def load_dataset(place, subset, **given):
        asked.append((place, subset, given["split"], given["revision"], given["streaming"]))
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda api, name: type("Described", (), {"sha": "a" * 40})
    )
    hub.available(settings(tmp_path, "owner/name#part:test", download=True))
    hub.available(settings(tmp_path, f"owner/name@{'b' * 40}", download=True, streaming=True))
    assert asked == [
        ("owner/name", "part", "test", "a" * 40, False),
        ("owner/name", None, "train", "b" * 40, True),
    ]
    assert len(list(sources.documents(settings(tmp_path, "owner/name#part:test")))) == 40


def test_rows_without_text_are_bad_records(tmp_path, datasets):
    datasets.Dataset.from_dict({"text": ["One.\n", None, "Three.\n"]}).save_to_disk(tmp_path / "holes")
    with pytest.raises(DataError, match=r"hf:holes:train#2: 'text' is null, no text"):
        prepare(settings(tmp_path, tmp_path / "holes"), TokenizerConfig())
    corpus = prepare(settings(tmp_path, tmp_path / "holes", max_bad_fraction=0.4), TokenizerConfig())
    assert corpus.manifest["quality"]["bad"] == 1


@pytest.mark.parametrize(
    "suffix, more, match",
    [
        ("", {"field": "body"}, r"has no column 'body'. Set data.field to one of 'text', 'number'"),
        ("", {"field": "number"}, r"column 'number' .* holds a int in row 1, no text"),
        (":tset", {}, r"has no split 'tset'; it has train, test"),
    ],
)
def test_what_cannot_be_read_is_named_and_leaves_nothing(tmp_path, saved, suffix, more, match):
    data = settings(tmp_path, f"{saved}{suffix}", **more)
    with pytest.raises(DataError, match=match):
        hub.available(data)
    assert not any(name.endswith((".json", ".jsonl")) for name in os.listdir(tmp_path / "cache" / "imports"))


def test_what_the_library_refuses_is_told(tmp_path, files):
    with pytest.raises(DataError, match=r"datasets could not read 'hf:.*:missing'.*Check the name, the subset"):
        hub.available(settings(tmp_path, f"{files}:missing"))


@pytest.mark.parametrize("name", ["owner/name@main", "owner/name@", "#part", ""])
def test_a_name_that_means_no_set_is_refused(name):
    """A branch may be another text tomorrow."""
    with pytest.raises(DataError, match="names no set; expected hf:NAME, then @ and a commit of 40"):
        sources.resolve(DataConfig(source=f"hf:{name}"))


def test_without_the_library_the_extra_is_named(tmp_path, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # which makes its import fail
    monkeypatch.setattr("meristem.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"needs datasets.* not installed. Run: pip install 'meristem\[data\]'"):
        hub.available(settings(tmp_path, saved))
