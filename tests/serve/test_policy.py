"""A policy between the model and those who talk to it: whole, streamed, and in sessions."""

import re

import httpx2 as httpx
import openai
import pytest
import torch

from meristem.config import dump_yaml
from meristem.safety.policy import NO_POLICY, load_policy
from serving import error_of, new_session, serving

PROMPT = {"model": "small", "prompt": "Hello", "max_tokens": 90, "seed": 3}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with serving(tmp_path_factory.mktemp("data")) as found:
        yield found
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def web(served):
    with httpx.Client(base_url=served[0], timeout=60) as made:
        yield made


@pytest.fixture
def with_rule(served, tmp_path):
    """Makes the server have a policy of one rule, and gives the events of it."""
    events = []

    def use(action: str, place: str, text: str) -> list:
        rule = {"id": "a", "action": action, "applies_to": place, "reason": "it is a test"}
        rule |= {"match": {"patterns": [re.escape(text)]}, "examples": {"match": [text]}}
        path = tmp_path / "policy.yaml"
        path.write_text(dump_yaml({"version": 1, "redaction_token": "#", "rules": [rule]}))
        served[1].policy = load_policy(str(path))
        return events

    emit, served[1].engine.emit = served[1].engine.emit, events.append
    yield use
    served[1].policy, served[1].engine.emit = NO_POLICY, emit


@pytest.fixture(scope="module")
def reply(client):
    """What the model writes, and a few characters of its middle."""
    text = client.completions.create(**PROMPT).choices[0].text
    return text, text[len(text) // 2 :][:4]


def streamed(client, **settings) -> tuple[str, str | None]:
    chunks = list(client.completions.create(**PROMPT, stream=True, **settings))
    return "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason


def test_a_reply_is_redacted_whole_and_streamed(client, with_rule, reply) -> None:
    """The same text, and no chunk of the stream has a part of what is taken out."""
    text, secret = reply
    events = with_rule("redact", "output", secret)
    expected = text.replace(secret, "#")
    assert expected != text
    assert client.completions.create(**PROMPT).choices[0].text == expected
    assert streamed(client) == (expected, "length")
    assert [event.payload["rule_id"] for event in events if event.name == "safety.hit"] == ["a", "a"]
    assert secret not in str(events)


def test_a_blocked_reply_ends_where_the_rule_begins(client, with_rule, reply) -> None:
    text, secret = reply
    with_rule("block", "output", secret)
    found = client.completions.create(**PROMPT)
    before = text[: text.index(secret)]
    assert (found.choices[0].text, found.choices[0].finish_reason) == (before, "content_filter")
    assert streamed(client) == (before, "content_filter")
    assert found.usage.completion_tokens < PROMPT["max_tokens"]


def test_a_session_knows_nothing_of_a_blocked_reply(client, web, with_rule) -> None:
    """It goes on as if the turn had never been; a redacted one is recorded as it was given."""
    session = new_session(web)
    body = {"prompt": "Hello", "max_tokens": 40, "seed": 5}
    forked = web.post(f"/v1/sessions/{session}/fork", json={}).json()["id"]
    text = web.post(f"/v1/sessions/{forked}/generate", json=body).json()["choices"][0]["text"]
    secret = text[len(text) // 2 :][:4]
    with_rule("block", "output", secret)
    found = web.post(f"/v1/sessions/{session}/generate", json=body).json()
    assert (found["choices"][0]["finish_reason"], found["session"]["turn"]) == ("content_filter", 0)
    assert web.get(f"/v1/sessions/{session}/turns").json()["data"] == []
    with_rule("redact", "output", secret)
    found = web.post(f"/v1/sessions/{session}/generate", json=body).json()
    assert found["choices"][0]["text"] == text.replace(secret, "#")
    (turn,) = web.get(f"/v1/sessions/{session}/turns").json()["data"]
    assert turn["reply"] == text.replace(secret, "#")
    shown = web.get(f"/v1/sessions/{session}/turns/1/reading").json()
    assert (shown["tokens"]["texts"], shown["n_left_out"]) == (list("Hello"), turn["n_drawn"])


def test_a_prompt_is_blocked_or_redacted(client, web, with_rule) -> None:
    """In a completion, as ids, in a chat, and fed to a session; the model never reads what is taken out."""
    with_rule("block", "prompt", "secret")
    session = new_session(web)
    for path, body in (
        ("/v1/completions", {"prompt": "a secret"}),
        ("/v1/completions", {"prompt": list(b"a secret")}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a secret"}]}),
        (f"/v1/sessions/{session}/feed", {"text": "a secret"}),
        ("/v1/completions", {"prompt": ["a", "a secret"], "stream": True}),
    ):
        error = error_of(web.post(path, json=body), 400)
        assert error["code"] == "content_filter"
        assert "rule 'a'" in error["message"] and "it is a test" in error["message"]
        assert "a secret" not in error["message"]
    with_rule("redact", "prompt", "secret")
    for prompt in ("my secret is", list(b"my secret is")):
        hidden = client.completions.create(**PROMPT | {"prompt": prompt}).choices[0].text
        assert hidden == client.completions.create(**PROMPT | {"prompt": "my # is"}).choices[0].text
    web.post(f"/v1/sessions/{session}/feed", json={"text": "my secret is"})
    (turn,) = web.get(f"/v1/sessions/{session}/turns").json()["data"]
    assert turn["text"] == "my # is"


def test_logprobs_would_show_what_is_taken_out(client, with_rule) -> None:
    with_rule("redact", "output", "secret")
    with pytest.raises(openai.BadRequestError, match="logprobs would show tokens"):
        client.completions.create(**PROMPT, logprobs=1)
    with_rule("redact", "prompt", "secret")
    assert client.completions.create(**PROMPT, logprobs=1).choices[0].logprobs is not None
