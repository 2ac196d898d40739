"""Every kind of secret is found in any surroundings, lookalikes are not, and the edges of windows do not matter."""

import io
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import meristem.safety.secrets as module
from meristem.safety.patterns import LONGEST_BYTES, PATTERNS
from meristem.safety.secrets import find_secrets, redact_secrets
from safety.planted import lookalikes, secrets


def found(text: bytes) -> list[tuple[str, int]]:
    return [(secret.pattern.id, secret.line) for secret in find_secrets(io.BytesIO(text))]


@pytest.mark.parametrize("form", secrets())
def test_cx_9_1_every_kind_is_found(form: str) -> None:
    """In the middle of a line of other text, and its line is counted."""
    text = f"one\ntwo and {secrets()[form]} \nlast\n".encode()
    kind, _, variant = form.partition("/")
    assert found(text) == [(kind, 3 if variant == "old" else 2)]


def test_every_pattern_is_planted() -> None:
    assert {pattern.id for pattern in PATTERNS} == {form.partition("/")[0] for form in secrets()}


def test_cx_9_1_no_lookalike_is_found() -> None:
    texts = lookalikes()
    assert len(texts) >= 200
    assert [text for text in texts if found(text.encode())] == []


@given(st.sampled_from(sorted(secrets())), st.integers(0, 40), st.integers(0, 3 * LONGEST_BYTES))
def test_a_secret_at_the_edge_of_windows_is_found_once(form: str, random_seed: int, n_before: int) -> None:
    """Wherever it stands, and however short the blocks are."""
    planted = secrets(random_seed)[form]
    lines = ("word " * 7 + "\n") * (n_before // 36)
    text = f"{lines}{'.' * (n_before % 36)} {planted} \n{'end ' * 20}".encode()
    window, module._WINDOW_BYTES = module._WINDOW_BYTES, 4099
    try:
        in_blocks = found(text)
    finally:
        module._WINDOW_BYTES = window
    assert in_blocks == found(text)
    assert [name for name, _ in in_blocks] == [form.partition("/")[0]]


def test_utf16_is_read_as_text() -> None:
    planted = secrets()["github-token/personal"]
    assert found(f"a\n{planted}".encode("utf-16")) == [("github-token", 2)]


def test_a8_9_bytes_of_pictures_and_documents_are_read() -> None:
    """A8.9: a secret in the metadata of a PNG, and in a PDF, whose other bytes are no text."""
    draw = random.Random(1)
    planted = secrets()["hugging-face-token"].encode()
    picture, page = b"\x89PNG\r\n\x1a\n%s tEXtComment\0", b"%%PDF-1.7\n%s ("
    for head in (picture % draw.randbytes(999), page % draw.randbytes(999)):
        assert [name for name, _ in found(head + planted + b"\0" + draw.randbytes(999))] == ["hugging-face-token"]


def test_redaction_leaves_the_rest() -> None:
    planted = secrets()
    one, other = planted["github-token/personal"], planted["aws-access-key/akia"]
    text = f"ä {one} and \ud800 {other}."
    assert redact_secrets(text) == "ä [secret: github-token] and \ud800 [secret: aws-access-key]."
    assert redact_secrets("nothing") == "nothing"


def test_a_secret_does_not_show_itself() -> None:
    planted = secrets()["github-token/personal"]
    (secret,) = find_secrets(io.BytesIO(planted.encode()))
    assert planted[8:20] not in repr(secret)
