"""S3 to S5 of the cases of serving, over HTTP: answers, states and files do not depend on what else the server does."""

import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest
import torch

from meristem.serve import store
from meristem.serve.moment import FRESH, READ_AT_ONCE, portion, read, tensors_of
from serving import model_of, new_session, poison, serving

WINDOW, CHUNK = 5, 16
"""Of the model that is served."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server whose free rows hold NaN after every round, and whose sessions leave memory at once."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, serving(tmp_path_factory.mktemp("data"), most_waiting=128) as found:
        engine, step = found[1].engine, found[1].engine.step

        def poisoned() -> None:
            step()
            poison(engine)

        patch.setattr(engine, "step", poisoned)
        patch.setattr("meristem.serve.sessions.MOST_LIVE_BYTES", 1)
        yield found
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def web(served):
    with httpx.Client(base_url=served[0], timeout=600) as client:
        yield client


def said(web: httpx.Client, session: str, prompt: str, n_tokens: int) -> tuple[object, ...]:
    """A reply at temperature 0, with the logarithms of its probabilities, and what was counted."""
    asked = {"prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "logprobs": 3}
    found = web.post(f"/v1/sessions/{session}/generate", json=asked)
    assert found.status_code == 200, found.text
    body = found.json()
    return body["choices"], body["usage"], body["session"]["n_tokens"]


def state(web: httpx.Client, session: str) -> dict[str, torch.Tensor]:
    return store.unpack(web.get(f"/v1/sessions/{session}/export").content, session).tensors


def assert_same(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> None:
    assert found.keys() == true.keys()
    for name, leaf in true.items():
        assert torch.equal(found[name], leaf) and not leaf.isnan().any(), name


def beside(web: httpx.Client, draw: random.Random, works: list[Callable[[], object]], n_others: int) -> list[object]:
    """What each of some works comes to, in a random order among others that draw, in eight clients at once."""

    def other() -> None:
        asked = {"prompt": "x" * draw.randint(1, 20), "max_tokens": draw.randint(1, 12), "temperature": 2}
        assert web.post("/v1/completions", json=asked).status_code == 200

    order = draw.sample(range(len(works) + n_others), len(works) + n_others)
    with ThreadPoolExecutor(8) as clients:
        asked = {at: clients.submit(works[at] if at < len(works) else other) for at in order}
        return [asked[at].result() for at in range(len(works))]


@pytest.mark.parametrize(
    "n_times, n_sessions", [(1, 10), pytest.param(10, 64, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_s3_answers_alone_and_under_random_load_are_equal_to_the_bit(web, n_times, n_sessions):
    """At temperature 0: replies, probabilities and the states that they leave."""
    draw = random.Random(3)
    prompts = [("Name " * draw.randint(1, 9))[: draw.randint(3, 40)] for _ in range(n_sessions)]
    n_tokens = [draw.randint(2, 14) for _ in prompts]
    alone = []
    for prompt, n in zip(prompts, n_tokens, strict=True):
        session = new_session(web)
        alone.append((said(web, session, prompt, n), state(web, session)))
    for _ in range(n_times):
        sessions = [new_session(web) for _ in prompts]
        works = [
            lambda at=at, session=session: said(web, session, prompts[at], n_tokens[at])
            for at, session in enumerate(sessions)
        ]
        for found, session, (answer, left) in zip(beside(web, draw, works, n_sessions), sessions, alone, strict=True):
            assert found == answer
            assert_same(state(web, session), left)


def test_s4_a_state_is_that_of_the_tokens_it_says(web):
    """For numbers of tokens around windows, chunks and portions, while others come, go and are poisoned; every session
    was out of memory in between, and none shows a NaN."""
    model, draw = model_of(1), random.Random(4)
    text = "".join(draw.choice("abcdefgh ") for _ in range(READ_AT_ONCE + 3))
    lengths = [border + off for border in (WINDOW, CHUNK, 2 * CHUNK, READ_AT_ONCE) for off in (-1, 0, 1)]
    true = []
    for n in lengths:
        moment = FRESH
        for first in range(0, n, portion(model)):
            moment, _ = read(model, moment, list(text[first : min(n, first + portion(model))].encode()))
        alone = new_session(web)
        assert web.post(f"/v1/sessions/{alone}/feed", json={"text": text[:n]}).json()["n_read"] == n
        true.append((tensors_of(moment), said(web, alone, "", 6), state(web, alone)))
    sessions = [new_session(web) for _ in lengths]

    def fed(session: str, n: int) -> dict[str, torch.Tensor]:
        answer = web.post(f"/v1/sessions/{session}/feed", json={"text": text[:n]}).json()
        assert answer["session"]["n_tokens"] == n
        return state(web, session)

    pairs = list(zip(sessions, lengths, strict=True))
    read_states = beside(web, draw, [lambda pair=pair: fed(*pair) for pair in pairs], 12)
    answers = beside(web, draw, [lambda session=session: said(web, session, "", 6) for session in sessions], 12)
    for session, after, answer, (moment, reply, left) in zip(sessions, read_states, answers, true, strict=True):
        assert_same(after, moment)
        assert answer == reply
        assert_same(state(web, session), left)


OTHER = """
import sys
from pathlib import Path
import torch
from serving import serving
torch.set_num_threads(1)
with serving(Path(sys.argv[1])) as (url, served):
    print(url, flush=True)
    sys.stdin.read()
"""
"""A server of the same model in another process, until its input ends."""


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_s5_an_import_into_another_process_goes_on_to_the_bit(web, tmp_path):
    """Tokens read, probabilities of the next token, the reply, and the state behind it; what is read is counted once,
    and a reply written again, with nothing new to read, is the same."""
    session = new_session(web, name="Ada")
    web.post(f"/v1/sessions/{session}/feed", json={"text": "My name is Ada. " * 40})
    said(web, session, "So", 5)
    content = web.get(f"/v1/sessions/{session}/export").content
    here = str(Path(__file__).parents[1])
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r})\n{OTHER}", str(tmp_path)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        with httpx.Client(base_url=process.stdout.readline().strip(), timeout=600) as there:
            made = there.post("/v1/sessions/import", content=content, params={"name": "Ada again"})
            assert made.status_code == 201, made.text
            other = made.json()
            assert (other["n_tokens"], other["turn"]) == (647, 1)
            written = []
            for prompt in ("", " And now"):
                answers = [said(web, session, prompt, 9), said(there, other["id"], prompt, 9)]
                assert answers[0] == answers[1]
                written.append(answers[1])
                assert answers[0][1]["prompt_tokens"] == len(prompt)
                assert_same(state(there, other["id"]), state(web, session))
            turn = there.get(f"/v1/sessions/{other['id']}").json()["turn"]
            assert there.post(f"/v1/sessions/{other['id']}/rollback", json={"to": turn - 2}).status_code == 200
            assert said(there, other["id"], "", 9) == written[0]
            assert written[0][1]["total_tokens"] == 9 and written[0][2] == 647 + 9
    finally:
        process.communicate()
