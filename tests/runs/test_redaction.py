"""No secret reaches the directory of a run, whoever says it."""

import sys
from pathlib import Path

import pytest

from meristem.events import Event
from meristem.runs.config import load_config
from meristem.runs.directory import opened
from meristem.sinks.console import Console
from safety.planted import secrets


def test_cx_9_2_a8_10_a_run_directory_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CX-9.2, A8.10: in samples and their prompts, events, the words of an error, and the command in the manifest."""
    planted = secrets()
    token, other = planted["github-token/personal"], planted["url-password/https"]
    monkeypatch.setattr(sys, "argv", ["meristem", "train", f"data.mirror={other}"])
    config = load_config("default", [f"run.dir={tmp_path}"]).tree
    with pytest.raises(ValueError), opened(config, tmp_path / "run", Console(json=True), is_new=True) as run:
        run.records.sample(1, f"the token is {token}", f"{token}!", {"temperature": 0.5, "stop": [token]})
        run.emit(Event("degraded", {"what": {"text": token}}))
        raise ValueError(token)
    written = {path.name: path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert [name for name, text in written.items() if token in text or other[-20:] in text] == []
    assert written["samples.ndjson"].count("[secret: github-token]") == 3
    assert written["events.ndjson"].count("[secret: github-token]") == 2
    assert "data.mirror=https://deploy:[secret: url-password]@" in written["run.json"]
