"""``meristem scan``: its exit codes, what it prints, and its baseline."""

import json

import pytest

from meristem.cli import run
from safety.planted import secrets

TOKEN = secrets()["github-token/personal"]


def test_cx_9_3_exit_codes(tmp_path, capsys) -> None:
    """CX-9.3: 0 clean, 1 findings, 3 where the scan itself fails. A8.9: no line of a file is printed."""
    (tmp_path / "clean.txt").write_text("nothing\n")
    assert run(["scan", str(tmp_path)]) == 0
    (tmp_path / "a.txt").write_text(f"before {TOKEN} after\n")
    assert run(["scan", str(tmp_path)]) == 1
    assert run(["scan", str(tmp_path / "nowhere")]) == 3
    assert run(["scan", str(tmp_path), "--diff", "HEAD"]) == 3
    assert run(["scan", str(tmp_path), "--diff", "HEAD", "--exclude", "x"]) == 2
    said = capsys.readouterr()
    assert "1 findings in 2 files" in said.out
    assert "github-token" in said.out
    assert "before" not in said.out and TOKEN[4:] not in said.out + said.err


def test_json(tmp_path, answered) -> None:
    (tmp_path / "a.txt").write_text(f"\n{TOKEN}\n")
    code, report = answered("scan", tmp_path)
    assert code == 1
    assert report["schema"] == "meristem.scan/1"
    assert report["n_findings"] == 1
    (finding,) = report["findings"]
    assert (finding["rule"], finding["line"], finding["length"]) == ("github-token", 2, 40)


def test_the_documents_of_a_source(tmp_path, answered) -> None:
    """Each record by its number."""
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": f"a\n{text}"}) + "\n" for text in ("none", TOKEN)))
    code, report = answered("scan", "--data", path)
    assert (code, report["n_files"], len(report["findings"])) == (1, 2, 1)
    assert (report["findings"][0]["path"], report["findings"][0]["line"]) == ("notes.jsonl#2", 2)
    assert answered("scan", "--data", path, tmp_path)[0] == 2


def test_a_baseline_is_written_and_read(tmp_path, capsys) -> None:
    text, known = tmp_path / "a.txt", tmp_path / "known.yaml"
    text.write_text(TOKEN)
    assert run(["scan", str(text), "--write-baseline", str(known)]) == 0
    assert run(["scan", str(text), "--baseline", str(known)]) == 0
    assert "1 more are allowed" in capsys.readouterr().out
    text.write_text(secrets(1)["github-token/personal"])
    assert run(["scan", str(text), "--baseline", str(known)]) == 1


@pytest.mark.parametrize("content", ["salt: short", "salts: 1", "allowed: [{fingerprint: x}]"])
def test_a_baseline_that_is_none(tmp_path, content, capsys) -> None:
    known = tmp_path / "known.yaml"
    known.write_text(content)
    assert run(["scan", str(tmp_path), "--baseline", str(known), "--json"]) == 2
    assert "message" in json.loads(capsys.readouterr().out)["error"]
