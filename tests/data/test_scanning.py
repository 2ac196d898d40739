"""Secrets in a text to train on are counted, shown without themselves, and refused."""

import json
from pathlib import Path

import pytest

from meristem.cli import run
from meristem.config import load
from meristem.data import files, scanning
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.prepare import prepare
from meristem.errors import ConfigError, SecretsFound
from meristem.events import Event
from meristem.safety.scan import Scan, write_baseline
from safety.planted import secrets

TOKEN = secrets()["github-token/personal"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A directory of texts, two of which hold a secret."""
    place = tmp_path / "texts"
    place.mkdir()
    for number in range(20):
        (place / f"{number:02}.txt").write_text(f"a text of number {number}\n" * 20)
    (place / "03.txt").write_text(f"one\ntwo\nthe token {TOKEN}\n")
    (place / "07.txt").write_text(f"{secrets()['aws-access-key/akia']}\n" * 2)
    return place


def prepared(text: Path, **settings: object) -> list[Event]:
    """The events of a preparation."""
    events: list[Event] = []
    data = DataConfig(source=str(text), root=text.parent / "cache", **settings)
    prepare(data, TokenizerConfig(), events.append)
    return events


def test_off_reads_nothing(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "Scan", None)
    assert "data.scanned" not in [event.name for event in prepared(text)]


def test_report_counts_and_shows(text: Path) -> None:
    (event,) = (event for event in prepared(text, scan="report") if event.name == "data.scanned")
    assert event.severity == "warning"
    said = dict(event.payload)
    assert (said["n_findings"], said["n_documents"]) == (3, 20)
    assert said["rules"] == {"github-token": 1, "aws-access-key": 2}
    assert [(each["path"], each["line"]) for each in said["first"]] == [("03.txt", 3), ("07.txt", 1), ("07.txt", 2)]
    assert TOKEN[4:] not in json.dumps(said)


@pytest.mark.parametrize("piece_bytes", [7, 16, 50])
def test_a_text_in_pieces_is_searched_whole(text: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    """What a file holds does not depend on how much of it is read at once: findings, their lines, and files."""
    monkeypatch.setattr(files, "PIECE_BYTES", piece_bytes)
    test_report_counts_and_shows(text)


def test_cx_9_1_refuse_ends_before_anything_is_made(text: Path) -> None:
    """CX-9.1: and the error names places and kinds; CX-9.2: no secret, in the store neither."""
    with pytest.raises(SecretsFound, match=r"github-token in 03.txt line 3, .*data.scan_bypass") as caught:
        prepared(text, scan="refuse")
    assert TOKEN[4:] not in str(caught.value) + str(caught.value.fields)
    kept = [path for path in (text.parent / "cache").rglob("*") if path.is_file()]
    assert [path.suffix for path in kept] == [".scan"]
    assert TOKEN[4:].encode() not in kept[0].read_bytes()


def test_a_corpus_that_was_made_before_is_refused_too(text: Path) -> None:
    prepared(text)
    with pytest.raises(SecretsFound):
        prepared(text, scan="refuse")


def test_a_text_without_secrets_is_searched_once(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until one of its files changes."""
    (text / "03.txt").unlink()
    (text / "07.txt").unlink()
    first = prepared(text, scan="refuse")
    assert next(event for event in first if event.name == "data.scanned").severity == "info"
    n_scans = []
    monkeypatch.setattr(scanning, "Scan", lambda baseline: n_scans.append(1) or Scan(baseline))
    prepared(text, scan="refuse")
    assert not n_scans
    (text / "08.txt").write_text(f"changed, {TOKEN}")
    with pytest.raises(SecretsFound):
        prepared(text, scan="refuse")
    assert n_scans == [1]


def test_a_baseline_allows(text: Path, tmp_path: Path) -> None:
    job = Scan()
    write_baseline(tmp_path / "known.yaml", job.paths([text]), job.salt, None)
    (event,) = (
        event
        for event in prepared(text, scan="refuse", scan_baseline=tmp_path / "known.yaml")
        if event.name == "data.scanned"
    )
    assert (event.payload["n_findings"], event.payload["n_allowed"]) == (0, 3)


def test_a_bypass_is_recorded(text: Path) -> None:
    events = {event.name: event for event in prepared(text, scan="refuse", scan_bypass="tokens of a test server")}
    assert events["data.scanned"].payload["n_findings"] == 3
    assert events["safety.bypassed"].payload["reason"] == "tokens of a test server"
    assert events["safety.bypassed"].severity == "warning"


@pytest.mark.parametrize(
    "settings", [["scan_baseline=x.yaml"], ["scan_bypass=why"], ["scan=report", "scan_bypass=why"]]
)
def test_keys_that_nothing_would_read(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match="scan"):
        load(DataConfig, overrides=settings)


def test_exit_codes(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 for a text that is refused, in one sentence; 0 where the reason why not is given, which is said too."""
    words = ["data", "prepare", f"data.source={text}", f"data.root={text.parent / 'cache'}", "data.scan=refuse"]
    assert run(words) == 4
    assert "error: the text 'texts' holds what looks like secrets: github-token" in capsys.readouterr().err
    assert run([*words, "data.scan_bypass=a test"]) == 0
    said = capsys.readouterr()
    assert "safety.bypassed" in said.err and "reason a test" in said.err
    assert TOKEN[4:] not in said.out + said.err
