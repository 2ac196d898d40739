"""Sessions and the server lay a chat out as the template of the tokenizer says, and stop at its end of a turn."""

import httpx2 as httpx
import pytest
import torch

from meristem.data.chat import Message, message_ids
from meristem.data.tokenizer import byte_tokenizer, with_marks, with_special
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig
from meristem.serve import session as sessions
from meristem.serve.session import Session
from serving import new_session, serving

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TALKS = with_marks(
    with_special(byte_tokenizer(), ["<|start|>", "<|end|>"]), bos=None, eos="<|end|>", chat_template=TEMPLATE
)
END = TALKS.special["<|end|>"]
MODEL = build(
    ModelConfig(dim=16, n_layers=1, n_heads=2, sliding_window=5, mlp_dim=16),
    MemoryConfig(rule="delta", head_dim=8, chunk=16),
    TALKS.vocab_size,
    1,
)
HI = [Message("user", "Hi <|end|>")]


def n_first() -> int:
    return len(message_ids(TALKS, HI))


def n_more(*, is_open: bool) -> int:
    return len(message_ids(TALKS, HI, is_first=False, is_open=is_open))


def test_a_session_ends_a_reply_at_the_token_of_its_template(monkeypatch, tmp_path):
    """What was broken off is ended before the next message, in a session that was saved as well."""
    session = Session(MODEL, TALKS)
    monkeypatch.setattr(sessions, "choose", lambda *_: torch.tensor(65))
    assert "".join(session.reply("Hi <|end|>", 3)) == "AAA" and session.n_tokens == n_first() + 3
    session.save(tmp_path / "session")
    session = Session.load(tmp_path / "session", MODEL, TALKS)
    n_tokens = session.n_tokens
    drawn = iter([65, END, 66])
    monkeypatch.setattr(sessions, "choose", lambda *_: torch.tensor(next(drawn)))
    assert "".join(session.reply("Hi <|end|>", 9)) == "A" and session.n_tokens == n_tokens + n_more(is_open=True) + 2
    n_tokens, drawn = session.n_tokens, iter([END])
    assert "".join(session.reply("Hi <|end|>", 9)) == "" and session.n_tokens == n_tokens + n_more(is_open=False) + 1
    session.forget()
    drawn = iter([END])
    assert "".join(session.reply("Hi <|end|>", 9)) == "" and session.n_tokens == n_first() + 1


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    with (
        serving(tmp_path_factory.mktemp("data"), model=MODEL, tokenizer=TALKS) as (url, _),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def test_the_server_reads_messages_as_the_template_has_them(web):
    """The first ones whole, later ones as what stands between a reply that was broken off and the next."""
    asked = {"model": "small", "messages": [HI[0]._asdict()], "max_tokens": 4, "session": new_session(web), "seed": 1}
    first = web.post("/v1/chat/completions", json=asked).json()
    assert first["choices"][0]["finish_reason"] == "length" and first["usage"]["prompt_tokens"] == n_first()
    again = web.post("/v1/chat/completions", json=asked).json()
    assert again["usage"]["prompt_tokens"] == n_more(is_open=True)
