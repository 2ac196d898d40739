"""Requests and answers in the shapes of the OpenAI API, with the extra field ``session``."""

import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import Field

from meristem.config import ConfigSection
from meristem.data.chat import Message, Role
from meristem.data.tokenizer import Tokenizer
from meristem.errors import WrongValue
from meristem.models.generate import Sampling
from meristem.serve.draw import Drawn
from meristem.serve.replies import Choice, Piece, Wish

MOST_TOKENS: Final = 1 << 20
LEAST_LOGPROB: Final = -9999.0
"""What stands for minus infinity, which JSON has not."""

Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]
Stops: TypeAlias = Stop | Annotated[list[Stop], Field(max_length=4)] | None


class StreamOptions(ConfigSection):
    """include_usage: a last chunk without choices says what was read and written."""

    include_usage: bool = False


class _Asked(ConfigSection):
    """What both kinds of completion take. session: the id of the session that reads and writes. user: not used."""

    model: str | None = None
    session: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stop: Stops = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, default: Sampling) -> Sampling:
        """As wished, and where nothing is said as the server has it."""
        return Sampling(
            temperature=default.temperature if self.temperature is None else self.temperature,
            top_k=default.top_k if self.top_k is None else self.top_k,
            top_p=default.top_p if self.top_p is None else self.top_p,
        )

    @property
    def has_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Asked):
    """``/v1/completions``: a text, several, or their ids."""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def prompts(self) -> "list[str | list[int]]":
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token_id for token_id in self.prompt if isinstance(token_id, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]

    def wish(self, default: Sampling) -> Wish:
        return Wish(
            max_tokens=self.max_tokens or 16,
            sampling=self.sampling(default),
            random_seed=self.seed,
            n=self.n,
            stops=self.stops(),
            n_top=self.logprobs,
        )


class TextPart(ConfigSection):
    """Text as a part of a message, the only kind there is."""

    type: Literal["text"]
    text: str


class ChatMessage(ConfigSection):
    """What somebody said."""

    role: Role
    content: str | list[TextPart]

    def message(self) -> Message:
        whole = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(self.role, whole)


class ChatRequest(_Asked):
    """``/v1/chat/completions``: with a session, the messages that are new to it."""

    messages: Annotated[list[ChatMessage], Field(max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def wish(self, default: Sampling) -> Wish:
        if self.top_logprobs is not None and not self.logprobs:
            raise WrongValue("top_logprobs is given without logprobs. Set logprobs to true.", key="top_logprobs")
        return Wish(
            max_tokens=self.max_completion_tokens or self.max_tokens or 256,
            sampling=self.sampling(default),
            random_seed=self.seed,
            n=self.n,
            stops=self.stops(),
            n_top=(self.top_logprobs or 0) if self.logprobs else None,
            is_reply=True,
        )


@dataclass(frozen=True)
class Usage:
    """Tokens read of the prompt, each once however many choices there are, and tokens drawn; and where a session now
    stands."""

    n_read: int
    n_drawn: int
    session: Mapping[str, Any] | None = None

    def body(self) -> dict[str, int]:
        total = self.n_read + self.n_drawn
        return {"prompt_tokens": self.n_read, "completion_tokens": self.n_drawn, "total_tokens": total}


class Shape:
    """The bodies for one request. is_chat: of a chat, or else of plain text."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, is_chat: bool, has_logprobs: bool) -> None:
        self.tokenizer, self.is_chat, self.has_logprobs = tokenizer, is_chat, has_logprobs
        self._offsets: dict[int, int] = {}
        kind = ("chatcmpl", "chat.completion") if is_chat else ("cmpl", "text_completion")
        self._object = kind[1]
        self._head = {"id": f"{kind[0]}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, items: Sequence[Piece | Choice | Usage]) -> dict[str, Any]:
        """The answer in one piece."""
        pieces: dict[int, list[Piece]] = {}
        for piece in items:
            if isinstance(piece, Piece):
                pieces.setdefault(piece.choice, []).append(piece)
        choices, usage = [], Usage(0, 0)
        for item in items:
            if isinstance(item, Choice):
                own = pieces.get(item.choice, [])
                text = "".join(piece.text for piece in own)
                said = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
                logprobs = self._logprobs(item.choice, own)
                choices.append({"index": item.choice, **said, "logprobs": logprobs, "finish_reason": item.finish})
            elif isinstance(item, Usage):
                usage = item
        choices.sort(key=lambda choice: int(str(choice["index"])))
        body = {**self._head, "object": self._object, "choices": choices, "usage": usage.body()}
        return body if usage.session is None else body | {"session": usage.session}

    def chunks(self, item: Piece | Choice | Usage, *, has_usage: bool) -> Iterator[dict[str, Any]]:
        """What an item adds to a stream. has_usage: the last chunk says what was read and written."""
        name = f"{self._object}.chunk" if self.is_chat else self._object
        head = {**self._head, "object": name} | ({"usage": None} if has_usage else {})
        if isinstance(item, Usage):
            if has_usage:
                yield {**head, "choices": [], "usage": item.body()}
            return
        if self.is_chat and item.choice not in self._offsets:
            yield {**head, "choices": [self._chunk(item.choice, {"role": "assistant", "content": ""})]}
        self._offsets.setdefault(item.choice, 0)
        if isinstance(item, Choice):
            said = {} if self.is_chat else {"text": ""}
            yield {**head, "choices": [self._chunk(item.choice, said, reason=item.finish)]}
        elif item.text or (self.has_logprobs and item.tokens):
            said = {"content": item.text} if self.is_chat else {"text": item.text}
            yield {**head, "choices": [self._chunk(item.choice, said, [item])]}

    def _chunk(
        self, choice: int, said: Mapping[str, str], pieces: Sequence[Piece] = (), reason: str | None = None
    ) -> dict[str, Any]:
        body = {"delta": said} if self.is_chat else dict(said)
        return {"index": choice, **body, "logprobs": self._logprobs(choice, pieces), "finish_reason": reason}

    def _logprobs(self, choice: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        tokens = [token for piece in pieces for token in piece.tokens]
        if not self.has_logprobs or not tokens:
            return None
        if self.is_chat:
            each = [
                {**self._entry(token.token_id, token.logprob), "top_logprobs": [self._entry(*one) for one in token.top]}
                for token in tokens
            ]
            return {"content": each, "refusal": None}
        offsets, at = [], self._offsets.get(choice, 0)
        for token in tokens:
            offsets.append(at)
            at += len(self._text(token.token_id))
        self._offsets[choice] = at
        return {
            "tokens": [self._text(token.token_id) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Drawn) -> dict[str, float]:
        return {self._text(token_id): _finite(logprob) for token_id, logprob in token.top}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = self.tokenizer.decode_bytes([token_id])
        return {"token": self._text(token_id), "logprob": _finite(logprob), "bytes": list(raw)}

    def _text(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id])


def _finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None or not math.isfinite(logprob) else logprob
