"""``meristem policy``: a policy is tried before it is used."""

import io
import json
from pathlib import Path

import pytest
import yaml

from meristem.cli import run


def test_the_shipped_policy_passes_its_examples(answered) -> None:
    code, result = answered("policy", "test", "default", "--text", "my ssn is 123-45-6789")
    assert code == 0
    assert (result["text"], result["is_blocked"], len(result["rules"])) == ("my ssn is [redacted]", False, 8)
    assert [hit["rule_id"] for hit in result["hits"]] == ["us-social-security-number"]
    assert 0 < result["held_back"] < 1000


def test_a_blocked_text_is_a_negative_result(capsys) -> None:
    assert run(["policy", "test", "default", "--text", "then rm -rf / now", "--place", "output"]) == 1
    out = capsys.readouterr().out
    assert "block: destructive-command at 5 to 13" in out and "then  (the rest is blocked)" in out
    assert run(["policy", "test", "default", "--text", "then rm -rf / now"]) == 0


def test_a_copy_that_is_changed_is_tried(tmp_path, capsys) -> None:
    """What `show` prints is a policy; with an example that fails it is refused, and names the rule."""
    assert run(["policy", "show"]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert run(["policy", "test", str(path)]) == 0
    path.write_text(text.replace("my ssn is 123-45-6789", "my ssn is secret"))
    assert run(["policy", "test", str(path)]) == 2
    assert "rule 'us-social-security-number'" in capsys.readouterr().err


def test_show_as_json(answered) -> None:
    code, config = answered("policy", "show")
    assert code == 0 and config["version"] == 1 and len(config["rules"]) == 8


@pytest.mark.parametrize("words", [["--place", "both"], ["--text"]])
def test_wrong_words(words, capsys) -> None:
    assert run(["policy", "test", "default", *words]) == 2


def test_a_bypass_needs_a_policy(capsys) -> None:
    assert run(["serve", "--bypass-policy", "a drill"]) == 2
    assert "no --policy that it would bypass" in capsys.readouterr().err


def test_the_file_is_yaml_for_everybody(capsys) -> None:
    assert run(["policy", "show"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["rules"][0]["id"] == "destructive-command"


@pytest.fixture
def forbidding(tmp_path) -> str:
    """A policy by which a model may say nothing."""
    rule = {
        "id": "all",
        "action": "block",
        "applies_to": "output",
        "reason": "Be silent.",
        "match": {"patterns": ["[^~]"]},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "rules": [rule | {"examples": {"match": ["a"]}}]}))
    return str(path)


SSN, REDACTED = "my ssn is 123-45-6789", "my ssn is [redacted]"


def test_cx_9_4_sample_keeps_to_a_policy(finished, forbidding, answered, capsys) -> None:
    """CX-9.4: the model reads the prompt as it may be read; a text that is blocked is a negative result."""
    words = ["sample", finished, "--max-tokens", 9]
    _, plain = answered(*words, "--prompt", REDACTED)
    code, judged = answered(*words, "--prompt", SSN, "--policy", "default")
    assert code == 0 and judged["prompt"] == REDACTED
    assert (judged["text"], judged["n_read"]) == (plain["text"], plain["n_read"])
    assert run(["sample", str(finished), "--prompt", "a", "--policy", forbidding]) == 1
    said = capsys.readouterr()
    assert (
        said.out == "\n" and "the output is not allowed: rule 'all' of policy" in said.err and "Be silent" in said.err
    )
    bypassed = [*words, "--prompt", SSN, "--policy", forbidding, "--bypass-policy", "a drill"]
    assert answered(*bypassed)[1]["prompt"] == SSN


def test_cx_9_4_chat_keeps_to_a_policy(finished, forbidding, capsys, monkeypatch) -> None:
    """CX-9.4: lines and files are read as they may be read; after a reply that is blocked the session is as before."""

    def chatted(*lines: str, policy: str = "default") -> list[dict]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert run(["chat", str(finished), "--max-tokens", "9", "--json", "--policy", policy]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    path = Path(forbidding).with_name("read.txt")
    path.write_text(SSN)
    assert chatted(SSN, f"/read {path}")[0]["reply"] == chatted(REDACTED)[0]["reply"]
    assert chatted(f"/read {path}")[0]["n_tokens"] == len(REDACTED)
    *_, refused, where = chatted("hello", "/go", policy=forbidding)
    assert refused["error"]["type"] == "Blocked" and refused["error"]["fields"]["rule_id"] == "all"
    assert where["sessions"] == {"main": 0}
