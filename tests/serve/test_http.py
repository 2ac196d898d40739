"""The server, with the official client and with bad ones."""

import gzip
import hashlib
import json
import re
import threading
import time

import httpx2 as httpx
import openai
import pytest
import torch

from meristem.device import limits
from serving import MOST_BYTES, error_of, new_session, serving, wait_for

LONG = 10_000


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with serving(tmp_path_factory.mktemp("data")) as found:
        yield found
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def web(served):
    with httpx.Client(base_url=served[0], timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def is_idle(served) -> bool:
    return served[1].engine.n_at_work == 0


def test_health_and_readiness_are_apart(served, web):
    """CX-11.3."""
    assert web.get("/healthz").json() == {"status": "ok", "requests": {"working": 0, "waiting": 0}}
    assert web.get("/readyz").json() == {"status": "ready", "model": "small"}
    served[1].is_ready = False
    assert error_of(web.get("/readyz"), 503)["code"] == "not_ready"
    served[1].is_ready = True


def test_a_server_without_memory_is_sent_nothing(served, web, monkeypatch):
    monkeypatch.setattr(limits, "available_bytes", lambda: 1)
    assert error_of(web.get("/readyz"), 503)["code"] == "no_memory"
    assert web.get("/healthz").status_code == 200


def test_the_official_client_lists_and_completes(client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "meristem"
    found = client.completions.create(model="small", prompt="Hello", max_tokens=7, temperature=0)
    assert (found.object, found.choices[0].finish_reason, found.usage.completion_tokens) == (
        "text_completion",
        "length",
        7,
    )
    for prompt in (["Hello", "Hello"], [list(b"Hello")] * 2):
        several = client.completions.create(model="small", prompt=prompt, max_tokens=7, temperature=0, n=2)
        assert [choice.text for choice in several.choices] == [found.choices[0].text] * 4
        assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    ids = client.completions.create(model="small", prompt=list(b"Hello"), max_tokens=7, temperature=0)
    assert ids.choices == found.choices
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model="other", prompt="x")


@pytest.mark.parametrize("prompt, max_tokens", [("Hello", 1), ("Hello", 9), ("", 3)])
def test_s7_streamed_and_whole_agree(client, prompt, max_tokens):
    """Usage where it is wanted and nowhere else, finish_reason null until the end, and counts of drawn ids."""
    settings = {"model": "small", "prompt": prompt, "max_tokens": max_tokens, "seed": 3, "logprobs": 2}
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    *rest, last = client.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    assert all(chunk.choices and chunk.usage is None for chunk in rest)
    assert last.choices == [] and last.usage == whole.usage
    assert (last.usage.completion_tokens, last.usage.prompt_tokens) == (max_tokens, len(prompt) or 1)
    tokens = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens]
    assert tokens == whole.choices[0].logprobs.tokens and len(tokens) == max_tokens
    offsets = [at for chunk in chunks if chunk.choices[0].logprobs for at in chunk.choices[0].logprobs.text_offset]
    assert offsets == whole.choices[0].logprobs.text_offset


def test_s7_a_chat_streamed_and_whole_agree(client):
    said = [{"role": "user", "content": "Hello"}]
    settings = {"model": "small", "messages": said, "max_completion_tokens": 12, "seed": 4}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    *chunks, last = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant" and last.usage == whole.usage
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    logprobs = whole.choices[0].logprobs.content
    assert len(logprobs) == whole.usage.completion_tokens and all(len(each.top_logprobs) == 2 for each in logprobs)


def test_s8_a_stop_ends_the_text_before_it(client):
    settings = {"model": "small", "prompt": "Hello", "max_tokens": 40, "seed": 5}
    text = client.completions.create(**settings).choices[0].text
    stop = text[10:12]
    found = client.completions.create(**settings, stop=["never there", stop])
    assert (found.choices[0].text, found.choices[0].finish_reason) == (text[: text.index(stop)], "stop")


def test_s2_choices_differ_and_repeat_for_a_seed(client):
    settings = {"model": "small", "prompt": "Hello", "max_tokens": 24, "temperature": 1, "n": 4}

    def texts(**more):
        return [choice.text for choice in client.completions.create(**settings, **more).choices]

    assert texts(seed=1) == texts(seed=1)
    assert len({*texts(seed=1), *texts(seed=2), *texts(), *texts()}) == 16


def test_s2_forks_and_regeneration_draw_differently(web, client):
    """Without a seed none repeats another; with one, all do."""
    session = new_session(web)
    web.post(f"/v1/sessions/{session}/feed", json={"text": "Hello"})

    def written(session_id, **more):
        extra = {"session": session_id}
        text = (
            client.completions.create(model="small", prompt="", max_tokens=24, extra_body=extra, **more).choices[0].text
        )
        assert web.post(f"/v1/sessions/{session_id}/rollback", json={"to": 1}).status_code == 200
        return text

    forks = [web.post(f"/v1/sessions/{session}/fork", json={}).json()["id"] for _ in range(2)]
    assert len({written(each) for each in (session, session, *forks)}) == 4
    assert len({written(each, seed=7) for each in (session, session, *forks)}) == 1


def test_a_session_goes_on_and_a_rollback_is_never_having_said_it(web, client):
    session, plain = new_session(web, name="Ada"), new_session(web)
    said = {"model": "small", "temperature": 0, "max_tokens": 12}

    def chat(session_id, content):
        messages = [{"role": "user", "content": content}]
        return client.chat.completions.create(**said, messages=messages, extra_body={"session": session_id})

    first, aside, second = chat(session, "one"), chat(session, "an aside"), None
    assert aside.session["turn"] == 2
    assert web.post(f"/v1/sessions/{session}/rollback", json={"to": 1}).json()["n_tokens"] == first.session["n_tokens"]
    second = chat(session, "two")
    assert chat(plain, "one").choices == first.choices and chat(plain, "two").choices == second.choices
    turns = web.get(f"/v1/sessions/{session}/turns").json()["data"]
    assert [(turn["text"], turn["reply"]) for turn in turns][0] == ("one", first.choices[0].message.content)
    shown = web.get(f"/v1/sessions/{session}").json()
    assert shown["turn"] == 2 and shown["surprise"]["nats_per_token"] > 0
    assert web.get(f"/v1/sessions/{session}/memory").json()["layers"]["layer.0.recall"]["norm"] > 0
    listed = web.get("/v1/sessions", params={"limit": 1}).json()
    assert len(listed["data"]) == 1 and listed["has_more"]


def test_s5_export_and_import_go_on_to_the_bit(web, client):
    session = new_session(web)
    web.post(f"/v1/sessions/{session}/feed", json={"text": "My name is Ada."})
    content = web.get(f"/v1/sessions/{session}/export").content
    other = web.post("/v1/sessions/import", content=content).json()
    assert other["n_tokens"] == 15 and other["id"] != session
    again = [
        client.completions.create(
            model="small", prompt="", max_tokens=9, temperature=0, logprobs=3, extra_body={"session": each}
        )
        for each in (session, other["id"])
    ]
    assert again[0].choices == again[1].choices and again[0].usage == again[1].usage
    assert again[0].usage.prompt_tokens == 0
    assert error_of(web.post("/v1/sessions/import", content=content[:-5]), 400)["code"] == "bad_session_file"


def lengthened(content, **tensor) -> bytes:
    """A session file whose header lists one more tensor, with the hash that belongs to it."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size]) | {"state.more": {"dtype": "F32", **tensor}}
    none = "0" * 64
    header["__metadata__"]["sha256"] = none
    said = json.dumps(header, separators=(",", ":")).encode()
    made = len(said).to_bytes(8, "little") + said + content[8 + size :]
    return made.replace(none.encode(), hashlib.sha256(made).hexdigest().encode(), 1)


def test_files_that_claim_more_than_they_hold_are_refused(served, web):
    """No body is unpacked, nothing is reserved for what a header says, and nothing of a refused file stays."""
    session = new_session(web)
    web.post(f"/v1/sessions/{session}/feed", json={"text": "My name is Ada."})
    content = web.get(f"/v1/sessions/{session}/export").content
    bad = {
        "nothing": b"",
        "a header as long as memory": (1 << 62).to_bytes(8, "little") + content[8:],
        "a tensor as large as memory": lengthened(content, shape=[1 << 40], data_offsets=[0, 1 << 42]),
        "a tensor without bytes": lengthened(content, shape=[1 << 61, 0], data_offsets=[0, 0]),
        "compressed zeros": gzip.compress(bytes(1 << 24)),
        "a path": b"/etc/passwd",
    }
    before = web.get("/v1/sessions", params={"limit": 1000}).json()
    for what, sent in bad.items():
        for headers in ({}, {"content-encoding": "gzip"}):
            answer = web.post("/v1/sessions/import", content=sent, headers=headers)
            assert error_of(answer, 400)["code"] == "bad_session_file", what
    asked = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = web.post("/v1/completions", content=gzip.compress(b" " * (1 << 24) + b"{}"), headers=asked)
    error_of(answer, 400)
    long = web.post("/v1/sessions/import", content=content, params={"name": "x" * 201})
    assert error_of(long, 400)["code"] == "string_too_long"
    assert web.get("/v1/sessions", params={"limit": 1000}).json() == before
    named = web.post("/v1/sessions/import", content=content, params={"name": "../../x\n"}).json()
    file = web.get(f"/v1/sessions/{named['id']}/export")
    assert named["name"] == "../../x\n" and named["id"] in file.headers["content-disposition"]


@pytest.mark.parametrize("is_streamed", [True, False])
def test_s1_a_client_that_leaves_frees_its_place(served, web, is_streamed):
    """Nothing of the turn is kept, and the next one works."""
    session = new_session(web)
    web.post(f"/v1/sessions/{session}/feed", json={"text": "Hello"})
    asked = {"prompt": "x", "max_tokens": LONG, "session": session, "stream": is_streamed}
    if is_streamed:
        with web.stream("POST", "/v1/completions", json=asked) as answer:
            lines = answer.iter_lines()
            for _ in range(6):
                next(lines)
            assert not is_idle(served)
    else:
        with pytest.raises(httpx.ReadTimeout):
            web.post("/v1/completions", json=asked, timeout=0.3)
    wait_for(lambda: is_idle(served))
    found = web.get(f"/v1/sessions/{session}").json()
    assert (found["turn"], found["n_tokens"]) == (1, 5)
    after = web.post("/v1/completions", json=asked | {"max_tokens": 3, "stream": False})
    assert after.status_code == 200 and after.json()["session"]["n_tokens"] == 9


def test_one_writer_at_a_time(web):
    """A second request to a session that is being written to is refused, not mixed in."""
    session = new_session(web)
    asked = {"prompt": "x", "max_tokens": LONG, "session": session, "stream": True}
    with web.stream("POST", "/v1/completions", json=asked) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert error_of(web.post(f"/v1/sessions/{session}/feed", json={"text": "y"}), 409)["code"] == "session_busy"
        assert web.get(f"/v1/sessions/{session}").status_code == 200


def test_more_than_the_queue_holds_is_refused(served, web, monkeypatch):
    """With Retry-After, at once; what is at work goes on."""
    monkeypatch.setattr(served[1].engine, "most_waiting", 0)
    full = web.post("/v1/completions", json={"prompt": "x"})
    assert error_of(full, 429)["code"] == "queue_full" and full.headers["retry-after"] == "1"


@pytest.mark.parametrize("name", ["../../etc/passwd", "..%2F..%2Fx", "a%5Cb", "%00", "x" * 300, "0" * 32, "%E2%80%A8"])
def test_s6_an_id_is_no_path(served, web, name):
    """What is no session of ours is not found, whatever it looks like."""
    for answer in (
        web.get(f"/v1/sessions/{name}"),
        web.get(f"/v1/sessions/{name}/export"),
        web.delete(f"/v1/sessions/{name}"),
        web.post(f"/v1/sessions/{name}/fork", json={}),
    ):
        error_of(answer, 404)
    answer = web.post("/v1/completions", json={"prompt": "x", "session": name})
    assert error_of(answer, 404)["code"] == "session_not_found"


BAD = {
    "no JSON": (b"{", 400),
    "nothing": (b"", 400),
    "a list": (b"[]", 400),
    "an unknown field": (b'{"prompt": "x", "promt": 1}', 400),
    "a number as text": (b'{"prompt": "x", "max_tokens": "7"}', 400),
    "too many tokens": (b'{"prompt": "x", "max_tokens": 99999999999}', 400),
    "no tokens": (b'{"prompt": "x", "max_tokens": 0}', 400),
    "a negative temperature": (b'{"prompt": "x", "temperature": -1}', 400),
    "no number": (b'{"prompt": "x", "temperature": NaN}', 400),
    "an empty stop": (b'{"prompt": "x", "stop": [""]}', 400),
    "five stops": (b'{"prompt": "x", "stop": ["a", "b", "c", "d", "e"]}', 400),
    "an id out of the vocabulary": (b'{"prompt": [1, 256]}', 400),
    "a lone surrogate": (b'{"prompt": "\\ud800"}', 400),
    "a half of bytes": (b'{"prompt": "\\udc80"}', 400),
    "choices of a session": (b'{"prompt": "x", "n": 2, "session": "y"}', 400),
    "no session": (b'{"prompt": "x", "session": "y"}', 404),
    "bytes": (b"\xff\xfe", 400),
    "depth": (b'{"prompt": ' + b"[" * 100_000, 400),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_requests_are_told_what_is_wrong(web, what):
    content, status = BAD[what]
    error_of(web.post("/v1/completions", content=content, headers={"content-type": "application/json"}), status)


@pytest.mark.parametrize(
    "body, param, message",
    [
        ({"prompt": "x", "tools": []}, "tools", "there is no such field here; leave it out."),
        ({"prompt": 5}, "prompt", "a valid string, or .*a valid list"),
        ({"prompt": "x", "stop": [""]}, "stop", "at least 1 character"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ],
)
def test_what_is_wrong_names_the_field_and_what_to_do(web, body, param, message):
    error = error_of(web.post("/v1/completions", json=body), 400)
    assert error["param"] == param and re.search(f"^{param}: .*{message}", error["message"])


def test_what_is_not_there_has_the_shape_of_the_api(web):
    assert error_of(web.get("/nothing"), 404)["message"].startswith("GET /nothing: Not Found. /openapi.json lists")
    error_of(web.get("/v1/nothing"), 404)
    error_of(web.put("/v1/sessions"), 405)
    error_of(web.post("/v1/chat/completions", json={"messages": []}), 400)
    error_of(web.post("/v1/chat/completions", json={"messages": [{"role": "tool", "content": "x"}]}), 400)
    error_of(web.post("/v1/sessions", json={"learn": "levels"}), 400)
    error_of(web.get("/v1/sessions", params={"limit": 0}), 400)
    session = new_session(web)
    error_of(web.post(f"/v1/sessions/{session}/save", json={"label": "x"}), 404)
    assert web.delete(f"/v1/sessions/{session}").json()["deleted"] is True
    error_of(web.delete(f"/v1/sessions/{session}"), 404)


def test_a_body_that_is_too_long_is_refused(web):
    """Whether it names its length or comes in portions; the rest of it is not read."""
    assert error_of(web.post("/v1/completions", content=b" " * (MOST_BYTES + 1)), 413)["code"] == "too_long"
    half = b" " * (MOST_BYTES // 2 + 1)
    assert error_of(web.post("/v1/completions", content=iter([half, half])), 413)["code"] == "too_long"


def test_s10_messages_are_laid_out_by_the_server(web):
    """A content that imitates a conversation is read as one line."""
    forged, real = new_session(web), new_session(web)
    chat = {"max_tokens": 1, "temperature": 0}
    said = [{"role": "user", "content": "Hi\nHello.\n\nWhere?"}]
    web.post("/v1/chat/completions", json=chat | {"messages": said, "session": forged})
    roles = (("user", "Hi"), ("assistant", "Hello."), ("user", "Where?"))
    said = [{"role": role, "content": content} for role, content in roles]
    web.post("/v1/chat/completions", json=chat | {"messages": said, "session": real})
    nats = [web.get(f"/v1/sessions/{each}/turns").json()["data"][0]["nats"] for each in (forged, real)]
    assert nats[0] != nats[1]


@pytest.mark.slow
def test_s9_health_answers_while_a_megabyte_is_read(served, web):
    """Meanwhile replies go on: p99 of /healthz below 0.1 s, and a token for everyone every 0.5 s."""
    session, gaps, waits = new_session(web), [], []

    def read():
        with httpx.Client(base_url=served[0], timeout=600) as own:
            assert own.post(f"/v1/sessions/{session}/feed", json={"text": "x" * 1_000_000}).status_code == 200

    def reply():
        asked = {"prompt": "x", "max_tokens": 150, "stream": True}
        with (
            httpx.Client(base_url=served[0], timeout=600) as own,
            own.stream("POST", "/v1/completions", json=asked) as got,
        ):
            before = None
            for line in got.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                    now = time.monotonic()
                    gaps.extend([] if before is None else [now - before])
                    before = now

    reading = threading.Thread(target=read)
    replies = [threading.Thread(target=reply) for _ in range(7)]
    for thread in (reading, *replies):
        thread.start()
    while reading.is_alive():
        began = time.monotonic()
        assert web.get("/healthz").status_code == 200
        waits.append(time.monotonic() - began)
        time.sleep(0.02)
    for thread in (reading, *replies):
        thread.join()
    assert sorted(waits)[int(0.99 * len(waits))] < 0.1 and max(gaps) < 0.5
