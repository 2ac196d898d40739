"""What a policy does to a text, whole and in pieces."""

import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.config import dump_yaml
from meristem.errors import Blocked, ConfigError, MeristemError, PolicyError
from meristem.events import Event
from meristem.safety.policy import NO_POLICY, Policy, load_policy
from meristem.safety.rules import read_rules

RULES = [
    ("number", "redact", {"patterns": [r"\d{2,6}"]}, "12"),
    ("word", "redact", {"literals": ["ab ba"]}, "ab ba"),
    ("part", "flag", {"literals": ["bb"], "substring": True}, "abba"),
    ("end", "redact", {"patterns": [{"pattern": r"(?<=a)-+$", "flags": ["multiline"]}], "max_length": 3}, "a--"),
    ("begin", "redact", {"patterns": [r"\A-b"]}, "-b"),
    ("forbidden", "block", {"patterns": [r"a!{1,3}b"]}, "a!b"),
]


def written(place: Path, **changes: object) -> str:
    """A policy file; ``changes`` go over it."""
    rules = [
        {"id": name, "action": action, "match": match, "examples": {"match": [text]}}
        for name, action, match, text in RULES
    ]
    said = {
        "version": 1,
        "redaction_token": "#",
        "allow": {"literals": [], "patterns": ["1(?=2a)", "33"]},
        "rules": rules,
    }
    path = place / "policy.yaml"
    path.write_text(dump_yaml({**said, **changes}))
    return str(path)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Policy:
    return load_policy(written(tmp_path_factory.mktemp("policy")))


def in_pieces(policy: Policy, pieces: list[str]) -> tuple[str, list, object, int]:
    """What is given of a text in pieces, what was found, what blocks it, and the most that was held back."""
    stream, given, n_fed, n_held = policy.stream("output"), "", 0, 0
    for piece in pieces:
        given += stream.feed(piece)
        n_fed += len(piece)
        n_held = max(n_held, len(stream._text) - max(stream._sent - stream._offset, 0))
    return given + stream.finish(), stream.hits, stream.blocked, n_held


@settings(max_examples=300)
@given(st.text(alphabet="ab-!1 23\n", max_size=120), st.lists(st.integers(0, 120), max_size=12))
def test_a_text_is_judged_the_same_in_any_pieces(policy: Policy, text: str, cuts: list[int]) -> None:
    """Output, hits and block are those of the whole text, wherever it is cut."""
    edges = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    verdict = policy.check(text, "output")
    assert in_pieces(policy, pieces)[:3] == (verdict.text, list(verdict.hits), verdict.blocked)
    assert in_pieces(policy, list(text))[:3] == (verdict.text, list(verdict.hits), verdict.blocked)


@settings(max_examples=200)
@given(st.text(alphabet="ab-!1 23\n", max_size=60))
def test_a_whole_text_is_judged_as_written_plainly(policy: Policy, text: str) -> None:
    """Every match that no allowed text covers, by plain search, and the text made of it character by character."""
    allowed = {
        at for pattern in ("1(?=2a)", "33") for match in re.finditer(pattern, text) for at in range(*match.span())
    }
    compiled = {rule.id: [each.pattern for each in rule.patterns] for rule in policy.rules.rules}
    spans = []
    for name, action, _, _ in RULES:
        for pattern in compiled[name]:
            for match in pattern.finditer(text):
                run = []
                for at in range(*match.span()):
                    if at not in allowed:
                        run.append(at)
                    if run and (at in allowed or at == match.end() - 1):
                        spans.append((run[0], run[-1] + 1, action))
                        run = []
    first = min((start for start, _, action in spans if action == "block"), default=len(text))
    hidden = [(start, end) for start, end, action in spans if action == "redact" and start < first]
    expected = ""
    for at in range(first):
        covering = [start for start, end in hidden if start <= at < end]
        if not covering:
            expected += text[at]
        elif at in covering and not any(start < at < end for start, end in hidden):
            expected += "#"
    verdict = policy.check(text, "output")
    assert verdict.text == expected
    assert (verdict.blocked is None) == all(action != "block" for _, _, action in spans)


def test_what_is_held_back_is_bounded(policy: Policy) -> None:
    """However long the text is, and though every character might begin a match."""
    most = policy.stream("output").n_held_back
    assert in_pieces(policy, ["1"] * 5000)[3] <= most + max(6, 8)
    assert most < 40


def test_a_rule_over_two_pieces_is_redacted_before_anything_of_it_is_given(policy: Policy) -> None:
    stream = policy.stream("output")
    given = [stream.feed(piece) for piece in ("the number is 4", "5", "67 and more text than is held back")]
    assert not any(digit in "".join(given) for digit in "4567")
    assert "".join(given) + stream.finish() == "the number is # and more text than is held back"


def test_a_place_without_rules_gives_text_at_once(tmp_path: Path) -> None:
    rule = {
        "id": "a",
        "action": "block",
        "applies_to": "prompt",
        "match": {"literals": ["x"]},
        "examples": {"match": ["x"]},
    }
    policy = load_policy(written(tmp_path, rules=[rule]))
    assert policy.reads("prompt") and not policy.reads("output")
    assert policy.stream("output").feed("x") == "x"
    assert NO_POLICY.check("x", "prompt").text == "x"


def test_a8_8_an_allowed_text_frees_no_more_than_itself(tmp_path: Path) -> None:
    """A8.8: one allowed number beside one that is not, and a block beside an allowed text."""
    policy = load_policy("default")
    mixed = "test card 4111 1111 1111 1111, mine 4012 8888 8888 1881; rm -rf build && rm -rf / now"
    verdict = policy.check(mixed, "output")
    assert verdict.text == "test card 4111 1111 1111 1111, mine [redacted]; rm -rf build && "
    assert verdict.blocked is not None and verdict.blocked.rule_id == "destructive-command"


def test_blocked_names_the_rule_and_never_the_text(policy: Policy) -> None:
    with pytest.raises(Blocked, match="rule 'forbidden'.*characters 4 to 7") as caught:
        policy.require("ha! a!b", "prompt")
    assert caught.value.fields == {"rule_id": "forbidden", "place": "prompt", "start": 4, "end": 7}
    assert "a!b" not in str(caught.value)


def test_events_hold_no_text(policy: Policy) -> None:
    """One for each rule, with its spans; in a stream too."""
    events: list[Event] = []
    policy.check("the numbers 4567 and 89", "output", events.append)
    (event,) = events
    assert event == Event(
        "safety.hit",
        {
            "rule_id": "number",
            "action": "redact",
            "severity": "warning",
            "place": "output",
            "n_hits": 2,
            "spans": [[12, 16], [21, 23]],
        },
        "warning",
    )


def test_a_bypass_is_recorded_with_its_reason(tmp_path: Path) -> None:
    events: list[Event] = []
    policy = load_policy(written(tmp_path), "a drill on Monday", events.append)
    assert policy.require("a!b 123", "prompt") == "a!b 123"
    (event,) = events
    assert (event.name, event.severity, event.payload["reason"]) == ("safety.bypassed", "warning", "a drill on Monday")
    assert event.payload["fingerprint"] == read_rules(written(tmp_path)).fingerprint
    in_file = load_policy(written(tmp_path, enabled=False, bypass="being rewritten"), emit=events.append)
    assert not in_file.reads("prompt") and events[-1].payload["reason"] == "being rewritten"
    with pytest.raises(PolicyError, match="bypassed for a reason"):
        load_policy(written(tmp_path), "  ")


def test_a8_6_the_shipped_policy_is_whole() -> None:
    """A8.6: as many rules as the file has, each with examples of both kinds, and the allowed texts."""
    policy = load_policy("default")
    assert policy.rules is not None
    assert len(policy.rules.rules) == policy.rules.config.model_dump()["rules"].__len__() == 8
    assert all(rule.examples.match and rule.examples.no_match for rule in policy.rules.config.rules)
    assert len(policy.rules.allowed) == 3


def test_a8_7_patterns_are_what_the_file_says() -> None:
    """A8.7: nothing is escaped twice."""
    assert load_policy("default").check("my ssn is 123-45-6789", "prompt").text == "my ssn is [redacted]"


def test_cx_9_4_words_are_whole(tmp_path: Path) -> None:
    """CX-9.4: a literal is found as a word, in any case, with any white space, unless it may be a part of one."""
    match = {"literals": ["ssn", "drop table"]}
    rule = {"id": "a", "action": "redact", "match": match, "examples": {"match": ["SSN"], "no_match": ["className"]}}
    policy = load_policy(written(tmp_path, rules=[rule]))
    assert policy.check("className, ssn; Drop\n TABLE x", "prompt").text == "className, #; # x"
    with pytest.raises(PolicyError, match="example 1 of no_match is hit"):
        load_policy(written(tmp_path, rules=[rule | {"match": match | {"substring": True}}]))


RULE = {"id": "a", "action": "block", "match": {"literals": ["x"]}, "examples": {"match": ["x"]}}


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"rules": []}, "has no rules"),
        ({"rules": "a"}, "has no rules"),
        ({"rules": [RULE, RULE]}, "has the rule 'a' twice"),
        ({"rules": [RULE | {"actions": "block"}]}, "unknown key 'actions' .rule 1 of policy .* 'a'.*action"),
        ({"rules": [RULE | {"match": {"literal": ["x"]}}]}, "unknown key 'match.literal'.*literals"),
        ({"rules": [RULE | {"match": {}}]}, "at least one of literals and patterns"),
        ({"rules": [RULE | {"match": {"patterns": ["("]}}]}, "rule 'a' of policy .*no regular expression"),
        ({"rules": [RULE | {"match": {"patterns": ["x+"]}}]}, "set max_length"),
        ({"rules": [RULE | {"examples": {"match": []}}]}, "examples.match"),
        ({"rules": [RULE | {"examples": {"match": ["y"]}}]}, "example 1 of match is passed"),
        ({"rules": [RULE | {"examples": {"match": ["x"], "no_match": ["y", "an x"]}}]}, "example 2 of no_match is hit"),
        ({"rules": [RULE | {"action": "delete"}]}, "action.*block"),
        ({"rules": [7]}, "rule 1 of policy .* is 7; expected a mapping"),
        ({"version": 2}, "version"),
        ({"rule": []}, "unknown key 'rule'"),
        ({"enabled": False}, "says not why"),
        ({"classifier": {"entry": "meristem.nowhere:judge"}}, "meristem.nowhere:judge is not there"),
    ],
)
def test_cx_9_4_a_policy_that_cannot_be_used(tmp_path: Path, changes: dict, why: str) -> None:
    """CX-9.4: an error with the code of settings, which names file and rule."""
    with pytest.raises(MeristemError, match=why) as caught:
        load_policy(written(tmp_path, **({"rules": [RULE]} | changes)))
    assert isinstance(caught.value, PolicyError | ConfigError) and caught.value.exit_code == 2


def judged_by(text: str, place: str) -> str | None:
    if "raise" in text:
        raise ValueError(text)
    return "not kind" if "unkind" in text else None


def test_cx_9_4_a_classifier_judges_whole_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CX-9.4, A8.8: one that fails blocks, unless it is to fail open; nothing is given before it has judged."""
    import meristem.safety.rules as rules

    monkeypatch.setattr(rules, "judged", judged_by, raising=False)
    entry = {"entry": "meristem.safety.rules:judged"}
    events: list[Event] = []
    policy = load_policy(written(tmp_path, rules=[RULE], classifier=entry))
    stream = policy.stream("output", events.append)
    assert stream.feed("kind words " * 20) == ""
    assert stream.finish() == "kind words " * 20
    assert policy.check("unkind words", "output").text == ""
    verdict = policy.check("raise it", "prompt", events.append)
    assert verdict.text == "" and verdict.blocked is not None
    assert [event.name for event in events] == ["safety.classifier_failed", "safety.hit"]
    assert "raise it" not in str(events)
    is_open = load_policy(written(tmp_path, rules=[RULE], classifier=entry | {"fail_open": True}))
    assert is_open.check("raise it", "prompt", events.append).text == "raise it"


@pytest.mark.parametrize(
    "text",
    [
        "1" * 200_000,
        " -" * 100_000,
        "password=" * 20_000,
        "rm -rf " * 30_000,
        "4012 8888 8888 188 " * 10_000,
        "".join(random.Random(0).choices("ab 12-:=/\n'", k=200_000)),
    ],
    ids=["digits", "dashes", "passwords", "removals", "cards", "drawn"],
)
def test_cx_9_4_no_text_makes_the_shipped_rules_slow(text: str) -> None:
    """CX-9.4: a megabyte takes the processor less than 100 ms for each rule; ten times that on a slow machine."""
    policy = load_policy("default")
    assert policy.rules is not None
    started = time.process_time()
    policy.check(text, "output")
    assert time.process_time() - started < 10 * len(policy.rules.rules) * 0.1 * len(text) / 1e6
