"""One model over HTTP: completions and chats in the shapes of the OpenAI API, and sessions."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field
from starlette.requests import ClientDisconnect

from meristem import __version__
from meristem.config import ConfigSection
from meristem.data.tokenizer import Tokenizer
from meristem.errors import WrongValue
from meristem.events import Event
from meristem.models.config import LearnConfig
from meristem.models.generate import Sampling
from meristem.models.online import Learn
from meristem.serve.engine import Ended, Engine, Order
from meristem.serve.failures import LimitBody, NoModel, answer_failures, failure, failure_of
from meristem.serve.layout import END_OF_REPLY, message_ids
from meristem.serve.moment import BEGINNING, FRESH, portion
from meristem.serve.openai import ChatRequest, CompletionRequest, Shape, Usage
from meristem.serve.replies import Choice, Conversation, Piece, Wish, texts_of
from meristem.serve.session import memory_view
from meristem.serve.sessions import LONGEST_NAME, Said, SessionRecord, Sessions, TurnRecord

Item = Piece | Choice | Usage
T = TypeVar("T")
Name = Annotated[str, Field(max_length=LONGEST_NAME)]
DONE: Final = b"data: [DONE]\n\n"


@dataclass
class Served:
    """What requests are answered with. sampling: where a request says nothing. deadline_s: for one reply.

    is_ready: the model has been loaded and has written a token.
    """

    name: str
    engine: Engine
    sessions: Sessions
    sampling: Sampling = field(default_factory=Sampling)
    deadline_s: float = 600.0
    created: int = 0
    is_ready: bool = False

    @property
    def tokenizer(self) -> Tokenizer:
        return self.sessions.tokenizer

    def warm_up(self) -> None:
        """Find the batches in which the model is exact, write one token, and be ready."""
        try:
            for learn in ("memory", "none"):
                self.engine.prepare(self.sessions.reader(learn))
            self.engine.start()
            ids = tuple(self.tokenizer.encode(BEGINNING))
            self.engine.submit(Order(self.sessions.reader(), FRESH, ids, max_tokens=1, ended=self._warmed_up))
        except Exception as error:
            self.engine.emit(Event("not_ready", {"error": type(error).__name__, "message": str(error)}, "error"))
            raise

    def _warmed_up(self, end: Ended) -> None:
        self.is_ready = end.reason == "length"


@dataclass(frozen=True)
class _Prompt:
    """What one reply is to: its ids, told whether the reply before was broken off, and its text for the record."""

    ids: Callable[[bool], list[int]]
    text: str


class CreateSession(ConfigSection):
    """learn: what changes while the session reads; learning: how weights do, where they learn."""

    name: Name | None = None
    learn: Learn = "memory"
    learning: LearnConfig | None = None


class FeedText(ConfigSection):
    """A text to be read, as it is."""

    text: Annotated[str, Field(min_length=1)]


class ForkSession(ConfigSection):
    """name: of the fork."""

    name: Name | None = None


class RollBack(ConfigSection):
    """to: the last turn that is to remain; 0 for none."""

    to: Annotated[int, Field(ge=0, lt=1 << 53)]


class SaveTurn(ConfigSection):
    """label: under which the turn is kept."""

    label: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]


def make_app(served: Served) -> FastAPI:
    """The application. It begins to warm up when it starts, and lets go of engine and sessions when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.create_task(asyncio.to_thread(served.warm_up))
        yield
        # What kept it from being ready was said; the rest is let go as ever.
        await asyncio.wait([warming])
        await asyncio.to_thread(served.engine.close)
        await asyncio.to_thread(served.sessions.close)

    app = FastAPI(title="meristem", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(LimitBody)
    answer_failures(app)
    _add_health(app, served)
    _add_completions(app, served)
    _add_sessions(app, served)
    _add_files(app, served)
    return app


def _add_health(app: FastAPI, served: Served) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while the engine runs."""
        if served.engine.has_ended:
            return failure(503, "the engine has ended. Start the server again.", "server_error", code="engine_ended")
        requests = {"working": served.engine.n_at_work, "waiting": served.engine.n_waiting}
        return JSONResponse({"status": "ok", "requests": requests})

    @app.get("/readyz")
    async def readyz() -> Response:
        """200 once the model has written a token."""
        if not served.is_ready or served.engine.has_ended:
            return failure(503, "the model is not ready yet.", "server_error", code="not_ready")
        return JSONResponse({"status": "ready", "model": served.name})

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(served)]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        _require_model(served, name)
        return JSONResponse(_model(served))


def _add_completions(app: FastAPI, served: Served) -> None:
    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Text that goes on from a prompt."""
        return await _complete(served, request, asked)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """A reply to messages."""
        messages = [each.message() for each in asked.messages]
        if not messages and asked.session is None:
            raise WrongValue("messages is empty. Give at least one, or a session to go on with.", key="messages")
        text = _readable("\n".join(message.content for message in messages))
        prompt = _Prompt(lambda is_open: message_ids(served.tokenizer, messages, is_open=is_open), text)
        return await _answer(served, request, asked, [prompt], has_logprobs=bool(asked.logprobs))


def _add_sessions(app: FastAPI, served: Served) -> None:
    sessions = served.sessions

    @app.post("/v1/sessions", status_code=201)
    async def create(asked: CreateSession) -> Response:
        name = None if asked.name is None else _readable(asked.name)
        made = await asyncio.to_thread(sessions.create, name=name, learn=asked.learn, learning=asked.learning)
        return JSONResponse(_session(made), 201)

    @app.get("/v1/sessions")
    async def listed(limit: Annotated[int, Field(ge=1, le=1000)] = 100, after: str = "") -> Response:
        found = await asyncio.to_thread(sessions.records, limit=limit + 1, after=after)
        data = [_session(each) for each in found[:limit]]
        return JSONResponse({"object": "list", "data": data, "has_more": len(found) > limit})

    @app.get("/v1/sessions/{session_id}")
    async def shown(session_id: str) -> Response:
        record = await asyncio.to_thread(sessions.get, session_id)
        turns = await asyncio.to_thread(sessions.turns, session_id)
        return JSONResponse(_session(record) | {"surprise": _surprise(turns)})

    @app.get("/v1/sessions/{session_id}/turns")
    async def turns(session_id: str) -> Response:
        found = await asyncio.to_thread(sessions.turns, session_id)
        return JSONResponse({"object": "list", "data": [_turn(each) for each in found]})

    @app.get("/v1/sessions/{session_id}/memory")
    async def memory(session_id: str) -> Response:
        record = await asyncio.to_thread(sessions.get, session_id)
        moment = await asyncio.to_thread(sessions.moment, record)
        return JSONResponse(await asyncio.to_thread(memory_view, sessions.model, moment))

    @app.post("/v1/sessions/{session_id}/feed")
    async def feed(session_id: str, asked: FeedText, request: Request) -> Response:
        """Read a text without a reply."""
        ids = served.tokenizer.encode(_readable(asked.text))
        return await _unless_gone(request, _feed(served, session_id, asked.text, ids))

    @app.post("/v1/sessions/{session_id}/generate")
    async def generate(session_id: str, asked: CompletionRequest, request: Request) -> Response:
        """Go on from where the session stands."""
        return await _complete(served, request, asked.model_copy(update={"session": session_id}))

    @app.post("/v1/sessions/{session_id}/fork", status_code=201)
    async def fork(session_id: str, asked: ForkSession) -> Response:
        name = None if asked.name is None else _readable(asked.name)
        return JSONResponse(_session(await asyncio.to_thread(sessions.fork, session_id, name=name)), 201)

    @app.post("/v1/sessions/{session_id}/rollback")
    async def roll_back(session_id: str, asked: RollBack) -> Response:
        return JSONResponse(_session(await asyncio.to_thread(sessions.roll_back, session_id, to=asked.to)))

    @app.post("/v1/sessions/{session_id}/save")
    async def save(session_id: str, asked: SaveTurn) -> Response:
        """Keep the last turn under a label."""
        found = await asyncio.to_thread(sessions.label, session_id, label=_readable(asked.label))
        return JSONResponse(_turn(found))

    @app.delete("/v1/sessions/{session_id}")
    async def delete(session_id: str) -> Response:
        await asyncio.to_thread(sessions.delete, session_id)
        return JSONResponse({"id": session_id, "object": "session", "deleted": True})


def _add_files(app: FastAPI, served: Served) -> None:
    sessions = served.sessions

    @app.get("/v1/sessions/{session_id}/export")
    async def export(session_id: str) -> Response:
        """The session as one file."""
        content = await asyncio.to_thread(sessions.export, session_id)
        head = {"Content-Disposition": f'attachment; filename="{session_id}.session"'}
        return Response(content, media_type="application/octet-stream", headers=head)

    @app.post("/v1/sessions/import", status_code=201)
    async def put(request: Request, name: Name | None = None) -> Response:
        """A session from the bytes of such a file."""
        name = None if name is None else _readable(name)
        made = await asyncio.to_thread(sessions.put, await request.body(), name=name)
        return JSONResponse(_session(made), 201)


async def _answer(
    served: Served,
    request: Request,
    asked: CompletionRequest | ChatRequest,
    prompts: Sequence[_Prompt],
    *,
    has_logprobs: bool,
) -> Response:
    """Reply to each prompt, in one piece or as a stream."""
    _require_model(served, asked.model)
    if asked.session is not None and (asked.n > 1 or len(prompts) != 1):
        raise WrongValue("a session takes one prompt and one choice (n=1) at a time. Fork it for more.", key="session")
    is_chat = isinstance(asked, ChatRequest)
    shape = Shape(served.name, served.tokenizer, is_chat=is_chat, has_logprobs=has_logprobs)
    items = _exchange(served, asked.session, prompts, asked.wish(served.sampling))
    if not asked.stream:
        found = await _unless_gone(request, _gathered(items))
        return JSONResponse(shape.whole(found))
    # Until the first token has come an error is an answer of its own; later it is the last event of the stream.
    first = await _unless_gone(request, anext(items))
    return StreamingResponse(_events(shape, first, items, asked.has_usage_chunk), media_type="text/event-stream")


async def _complete(served: Served, request: Request, asked: CompletionRequest) -> Response:
    prompts = [_plain_prompt(served.tokenizer, each) for each in asked.prompts()]
    return await _answer(served, request, asked, prompts, has_logprobs=asked.logprobs is not None)


async def _exchange(
    served: Served, session_id: str | None, prompts: Sequence[_Prompt], wish: Wish
) -> AsyncIterator[Item]:
    """The pieces of all replies, then how each choice ended, then what was read and written.

    With a session the turn is on the disk before its end is given; broken off earlier, nothing of it is.
    """
    sessions, n_read, n_drawn, after = served.sessions, 0, 0, None
    for at, prompt in enumerate(prompts):
        with contextlib.ExitStack() as stack:
            record = None if session_id is None else stack.enter_context(sessions.writing(session_id))
            moment = FRESH if record is None else await asyncio.to_thread(sessions.moment, record)
            ids = prompt.ids(record is not None and record.is_open)
            if not ids and not moment.n_tokens:
                ids = served.tokenizer.encode(BEGINNING)
            reader = sessions.reader() if record is None else sessions.reader(record.learn, record.learning)
            order = Order(reader, moment, tuple(ids), portion(sessions.model), deadline_s=served.deadline_s)
            conversation = Conversation(served.engine, served.tokenizer)
            stack.callback(conversation.close)
            choices, pieces = [], []
            async for item in conversation.write(order, wish):
                shifted = item._replace(choice=at * wish.n + item.choice)
                if isinstance(shifted, Choice):
                    choices.append(shifted)
                    continue
                pieces.append(shifted)
                yield shifted
            n_read += len(ids)
            n_drawn += sum(choice.end.n_drawn for choice in choices)
            if record is not None:
                end, stop = choices[0].end, choices[0].stop
                said = Said(
                    text=prompt.text,
                    reply=texts_of(pieces, 1)[0],
                    finish=end.reason,
                    seed=conversation.seed,
                    n_read=len(ids),
                    n_drawn=end.n_drawn,
                    nats=end.nats,
                    is_open=END_OF_REPLY in wish.stops and stop != END_OF_REPLY,
                )
                after = _session(await asyncio.to_thread(sessions.add, record, end.moment, said))
        for choice in choices:
            yield choice
    yield Usage(n_read, n_drawn, after)


async def _feed(served: Served, session_id: str, text: str, ids: Sequence[int]) -> Response:
    sessions = served.sessions
    with contextlib.ExitStack() as stack:
        record = stack.enter_context(sessions.writing(session_id))
        moment = await asyncio.to_thread(sessions.moment, record)
        reader = sessions.reader(record.learn, record.learning)
        conversation = Conversation(served.engine, served.tokenizer)
        stack.callback(conversation.close)
        order = Order(reader, moment, tuple(ids), portion(sessions.model), deadline_s=served.deadline_s)
        end = await conversation.read(order)
        said = Said(text=text, n_read=len(ids), nats=end.nats, finish=end.reason)
        record = await asyncio.to_thread(sessions.add, record, end.moment, said)
    body = {"n_read": len(ids), "nats": end.nats, "seconds": end.seconds, "session": _session(record)}
    return JSONResponse(body)


async def _gathered(items: AsyncIterator[Item]) -> list[Item]:
    return [item async for item in items]


async def _events(shape: Shape, first: Item, items: AsyncIterator[Item], has_usage: bool) -> AsyncIterator[bytes]:
    """The reply as server-sent events. Whoever stops listening ends it before its next token."""
    try:
        for chunk in shape.chunks(first, has_usage=has_usage):
            yield _event(chunk)
        async for item in items:
            for chunk in shape.chunks(item, has_usage=has_usage):
                yield _event(chunk)
    except Exception as error:  # noqa: BLE001 - the status is sent already, so that any error is an event
        yield _event(json.loads(bytes(failure_of(error).body)))
        return
    finally:
        await items.aclose()  # type: ignore[attr-defined]
    yield DONE


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What the work comes to; if the client goes first, the work is ended and so is the request."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _plain_prompt(tokenizer: Tokenizer, prompt: str | list[int]) -> _Prompt:
    if isinstance(prompt, str):
        ids = tokenizer.encode(_readable(prompt))
        return _Prompt(lambda is_open: ids, prompt)
    given = list(prompt)
    if wrong := [each for each in given if not 0 <= each < tokenizer.vocab_size]:
        raise WrongValue(f"the id {wrong[0]} is not in the vocabulary of {tokenizer.vocab_size}.", key="prompt")
    return _Prompt(lambda is_open: given, tokenizer.decode(given))


def _readable(text: str) -> str:
    """The text, if it can be said in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise WrongValue(f"the text holds a lone surrogate at character {cause.start}. Remove it.") from cause
    return text


def _require_model(served: Served, name: str | None) -> None:
    if name not in (None, served.name):
        raise NoModel(f"there is no model '{str(name)[:LONGEST_NAME]}'; this server has '{served.name}'.", key="model")


def _model(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "meristem"}


def _session(record: SessionRecord) -> dict[str, Any]:
    keys = ("id", "name", "learn", "turn", "n_tokens", "size_bytes", "created", "used")
    return {"object": "session", **{key: getattr(record, key) for key in keys}}


def _turn(turn: TurnRecord) -> dict[str, Any]:
    said = {key: getattr(turn.said, key) for key in ("text", "reply", "finish", "seed", "n_read", "n_drawn", "nats")}
    keys = ("turn", "n_tokens", "size_bytes", "created", "label", "can_return")
    # A number of 63 bits is not one of JavaScript.
    said["seed"] = None if turn.said.seed is None else str(turn.said.seed)
    return {"object": "turn", **{key: getattr(turn, key) for key in keys}, **said}


def _surprise(turns: Sequence[TurnRecord]) -> dict[str, float | None]:
    """Of the texts read, in nats for each token: over all turns, and in the last one that read anything."""
    read = [turn.said for turn in turns if turn.said.n_read]
    n_read = sum(said.n_read for said in read)
    return {
        "nats_per_token": sum(said.nats for said in read) / n_read if n_read else None,
        "last_nats_per_token": read[-1].nats / read[-1].n_read if read else None,
    }
