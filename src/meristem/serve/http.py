"""One model over HTTP: completions and chats in the shapes of the OpenAI API, and sessions."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Final, TypeVar

import orjson
from fastapi import FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field
from starlette.requests import ClientDisconnect

from meristem import __version__
from meristem.config import ConfigSection
from meristem.data.chat import END_OF_REPLY, Message, message_ids
from meristem.data.tokenizer import Tokenizer
from meristem.device import limits
from meristem.errors import WrongValue
from meristem.events import Event
from meristem.models.config import LearnConfig
from meristem.models.generate import BEGINNING, Sampling
from meristem.models.online import Learn
from meristem.safety.policy import NO_POLICY, Policy
from meristem.serve.access import METRICS, Access, Asking, Caller, Guard
from meristem.serve.access_log import AccessLog, Journal
from meristem.serve.connection import Outlet, outlet_of
from meristem.serve.engine import Ended, Engine, Order
from meristem.serve.failures import FAILURES, LimitBody, NoModel, answer_failures, failure, failure_of
from meristem.serve.metrics import Metrics
from meristem.serve.moment import FRESH, portion
from meristem.serve.openai import ChatRequest, CompletionRequest, Shape, Usage
from meristem.serve.replies import Choice, Conversation, Piece, Sink, Wish, texts_of
from meristem.serve.session import memory_view
from meristem.serve.sessions import LONGEST_NAME, MOST_KEPT_IDS, Said, SessionRecord, Sessions, TurnRecord
from meristem.serve.sharing import PLACE, PLACE_HEADER, SESSION_HEADER
from meristem.serve.view import add_view

Item = Piece | Choice | Usage
T = TypeVar("T")
Name = Annotated[str, Field(max_length=LONGEST_NAME)]
A_FILE: Final[dict[str, Any]] = {
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
}
"""How the published description names the bytes of a session file."""
LEAST_FREE_BYTES: Final = 128 << 20
"""Memory that a server needs to be sent requests: what the longest body and its states may take."""
Place = Annotated[str, Header(alias=PLACE_HEADER, pattern=rf"^([0-9a-f]{{{PLACE}}})?$")]
Completion = TypeVar("Completion", CompletionRequest, ChatRequest)
DONE: Final = b"data: [DONE]\n\n"


@dataclass
class Served:
    """What requests are answered with. sampling: where a request says nothing. deadline_s: for one reply.

    access: what is taken from whom. access_log: None where requests leave no line. policy: of prompts and outputs.
    is_ready: the model has been loaded and has written a token.
    """

    name: str
    engine: Engine
    sessions: Sessions
    sampling: Sampling = field(default_factory=Sampling)
    deadline_s: float = 600.0
    access: Access = field(default_factory=Access)
    access_log: AccessLog | None = None
    policy: Policy = NO_POLICY
    created: int = 0
    is_ready: bool = False

    @property
    def tokenizer(self) -> Tokenizer:
        return self.sessions.tokenizer

    def warm_up(self) -> None:
        """Have the engine prepare for the model, write one token, and be ready."""
        try:
            for learn in ("memory", "none"):
                self.engine.prepare(self.sessions.reader(learn))
            self.engine.start()
            ids = tuple(self.tokenizer.encode(BEGINNING))
            self.engine.submit(Order(self.sessions.reader(), FRESH, ids, max_tokens=1, ended=self._warmed_up))
        except Exception as error:
            self.engine.emit(Event("not_ready", {"error": type(error).__name__, "message": str(error)}, "error"))
            self.engine.close()
            raise

    def _warmed_up(self, end: Ended) -> None:
        self.is_ready = end.reason == "length"


@dataclass(frozen=True)
class _Prompt:
    """What one reply is to: its ids, told whether they are the first and whether the reply before was broken off, and
    its text for the record."""

    ids: Callable[[bool, bool], list[int]]
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
        for each in (served.access.keys, served.access_log):
            if each:
                each.close()

    app = FastAPI(
        title="meristem",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=FAILURES,
    )
    answer_failures(app)
    _add_health(app, served)
    _add_completions(app, served)
    _add_sessions(app, served)
    _add_files(app, served)
    add_view(app, served.sessions)
    _add_operations(app, served)
    return app


def _add_health(app: FastAPI, served: Served) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while the engine runs. What others do is said where there are no keys, so no others."""
        if served.engine.has_ended:
            return failure(503, "the engine has ended. Start the server again.", "server_error", code="engine_ended")
        if served.access.has_keys:
            return JSONResponse({"status": "ok"})
        requests = {"working": served.engine.n_at_work, "waiting": served.engine.n_waiting}
        return JSONResponse({"status": "ok", "requests": requests})

    @app.get("/readyz")
    async def readyz() -> Response:
        """200 once the model has written a token, while there is memory for more."""
        if not served.is_ready or served.engine.has_ended:
            return failure(503, "the model is not ready yet.", "server_error", code="not_ready")
        free = limits.available_bytes()
        if free < LEAST_FREE_BYTES:
            text = f"{free} bytes of memory are free, and {LEAST_FREE_BYTES} are wanted. Send requests elsewhere."
            return failure(503, text, "server_error", code="no_memory")
        return JSONResponse({"status": "ready", "model": served.name})

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(served)]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        _require_model(served, name)
        return JSONResponse(_model(served))


def _add_operations(app: FastAPI, served: Served) -> None:
    """What stands before every route: what is added last is met first, so that nothing is added after this."""
    metrics = Metrics(served.engine, served.sessions, lambda: served.is_ready)
    served.engine.tally = metrics

    @app.get(METRICS)
    async def measured(request: Request) -> Response:
        """The numbers of this server for Prometheus; with keys, for those of metrics alone."""
        content, media_type = await asyncio.to_thread(metrics.page, request.headers.get("accept", ""))
        return Response(content, media_type=media_type)

    app.add_middleware(LimitBody, most_bytes=served.access.max_bytes)
    app.add_middleware(Guard, access=served.access)
    app.add_middleware(Journal, metrics=metrics, log=served.access_log)


def _add_completions(app: FastAPI, served: Served) -> None:
    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request, caller: Asking) -> Response:
        """Text that goes on from a prompt."""
        return await _complete(served, request, _with_session(asked, request), caller)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request, caller: Asking) -> Response:
        """A reply to messages."""
        asked = _with_session(asked, request)
        said = [each.message() for each in asked.messages]
        messages = [each._replace(content=await _prompted(served, each.content)) for each in said]
        if not messages and asked.session is None:
            raise WrongValue("messages is empty. Give at least one, or a session to go on with.", key="messages")
        text = "\n".join(message.content for message in messages)
        prompt = _Prompt(partial(_message_ids, served.tokenizer, messages), text)
        return await _answer(served, request, asked, [prompt], caller, has_logprobs=bool(asked.logprobs))


def _add_sessions(app: FastAPI, served: Served) -> None:
    sessions = served.sessions

    @app.post("/v1/sessions", status_code=201)
    async def create(asked: CreateSession, caller: Asking, place: Place = "") -> Response:
        name = None if asked.name is None else _readable(asked.name)
        made = await asyncio.to_thread(
            sessions.create,
            name=name,
            owner=caller.owner,
            learn=asked.learn,
            learning=asked.learning,
            place=place,
        )
        return JSONResponse(_session(made), 201)

    @app.get("/v1/sessions")
    async def listed(caller: Asking, limit: Annotated[int, Field(ge=1, le=1000)] = 100, after: str = "") -> Response:
        found = await asyncio.to_thread(sessions.records, caller.owner, limit=limit + 1, after=after)
        data = [_session(each) for each in found[:limit]]
        return JSONResponse({"object": "list", "data": data, "has_more": len(found) > limit})

    @app.get("/v1/sessions/{session_id}")
    async def shown(session_id: str, caller: Asking) -> Response:
        record = await asyncio.to_thread(sessions.get, session_id, caller.owner)
        turns = await asyncio.to_thread(sessions.turns, session_id, caller.owner)
        return JSONResponse(_session(record) | {"surprise": _surprise(turns)})

    @app.get("/v1/sessions/{session_id}/turns")
    async def turns(session_id: str, caller: Asking) -> Response:
        found = await asyncio.to_thread(sessions.turns, session_id, caller.owner)
        return JSONResponse({"object": "list", "data": [_turn(each) for each in found]})

    @app.get("/v1/sessions/{session_id}/memory")
    async def memory(session_id: str, caller: Asking) -> Response:
        record = await asyncio.to_thread(sessions.get, session_id, caller.owner)
        moment = await asyncio.to_thread(sessions.moment, record)
        return JSONResponse(await asyncio.to_thread(memory_view, sessions.model, moment))

    @app.post("/v1/sessions/{session_id}/feed")
    async def feed(session_id: str, asked: FeedText, request: Request, caller: Asking) -> Response:
        """Read a text without a reply."""
        text = await _prompted(served, asked.text)
        ids = served.tokenizer.encode(text)
        return await _unless_gone(request, _feed(served, session_id, text, ids, caller))

    @app.post("/v1/sessions/{session_id}/generate")
    async def generate(session_id: str, asked: CompletionRequest, request: Request, caller: Asking) -> Response:
        """Go on from where the session stands."""
        return await _complete(served, request, asked.model_copy(update={"session": session_id}), caller)

    @app.post("/v1/sessions/{session_id}/fork", status_code=201)
    async def fork(session_id: str, asked: ForkSession, caller: Asking) -> Response:
        name = None if asked.name is None else _readable(asked.name)
        made = await asyncio.to_thread(sessions.fork, session_id, caller.owner, name=name)
        return JSONResponse(_session(made), 201)

    @app.post("/v1/sessions/{session_id}/rollback")
    async def roll_back(session_id: str, asked: RollBack, caller: Asking) -> Response:
        stands = await asyncio.to_thread(sessions.roll_back, session_id, caller.owner, to=asked.to)
        return JSONResponse(_session(stands))

    @app.post("/v1/sessions/{session_id}/save")
    async def save(session_id: str, asked: SaveTurn, caller: Asking) -> Response:
        """Keep the last turn under a label."""
        found = await asyncio.to_thread(sessions.label, session_id, caller.owner, label=_readable(asked.label))
        return JSONResponse(_turn(found))

    @app.delete("/v1/sessions/{session_id}")
    async def delete(session_id: str, caller: Asking) -> Response:
        await asyncio.to_thread(sessions.delete, session_id, caller.owner)
        return JSONResponse({"id": session_id, "object": "session", "deleted": True})


def _add_files(app: FastAPI, served: Served) -> None:
    sessions = served.sessions

    @app.get("/v1/sessions/{session_id}/export", response_class=Response, responses={200: A_FILE})
    async def export(session_id: str, caller: Asking) -> Response:
        """The session as one file."""
        content = await asyncio.to_thread(sessions.export, session_id, caller.owner)
        head = {"Content-Disposition": f'attachment; filename="{session_id}.session"'}
        return Response(content, media_type="application/octet-stream", headers=head)

    @app.post("/v1/sessions/import", status_code=201, openapi_extra={"requestBody": {"required": True, **A_FILE}})
    async def put(request: Request, caller: Asking, name: Name | None = None, place: Place = "") -> Response:
        """A session from the bytes of such a file."""
        name = None if name is None else _readable(name)
        made = await asyncio.to_thread(sessions.put, await request.body(), caller.owner, name=name, place=place)
        return JSONResponse(_session(made), 201)


async def _answer(
    served: Served,
    request: Request,
    asked: CompletionRequest | ChatRequest,
    prompts: Sequence[_Prompt],
    caller: Caller,
    *,
    has_logprobs: bool,
) -> Response:
    """Reply to each prompt, in one piece or as a stream."""
    _require_model(served, asked.model)
    if asked.session is not None and (asked.n > 1 or len(prompts) != 1):
        raise WrongValue("a session takes one prompt and one choice (n=1) at a time. Fork it for more.", key="session")
    if has_logprobs and served.policy.reads("output"):
        raise WrongValue(
            "logprobs would show tokens that the policy takes out of replies. Leave it out.", key="logprobs"
        )
    is_chat = isinstance(asked, ChatRequest)
    shape = Shape(served.name, served.tokenizer, is_chat=is_chat, has_logprobs=has_logprobs)
    outlet = outlet_of(request.scope) if asked.stream else None
    short = None if outlet is None else _Short(outlet, shape, has_usage=asked.has_usage_chunk)
    come = _exchange(served, asked.session, caller, prompts, asked.wish(served.sampling), short)
    if not asked.stream:
        found = await _unless_gone(request, _gathered(come))
        return JSONResponse(shape.whole(found))
    # Until the first token has come an error is an answer of its own; later it is the last event of the stream.
    first = await _unless_gone(request, anext(come))
    events = _events(shape, first, come, asked.has_usage_chunk, short)
    return StreamingResponse(events, media_type="text/event-stream")


async def _complete(served: Served, request: Request, asked: CompletionRequest, caller: Caller) -> Response:
    prompts = [await _plain_prompt(served, each) for each in asked.prompts()]
    return await _answer(served, request, asked, prompts, caller, has_logprobs=asked.logprobs is not None)


async def _exchange(
    served: Served,
    session_id: str | None,
    caller: Caller,
    prompts: Sequence[_Prompt],
    wish: Wish,
    sink: Sink | None,
) -> AsyncGenerator[list[Item], None]:
    """What has come: the pieces of all replies but for those that a sink takes, then how each choice ended, then what
    was read and written.

    With a session the turn is on the disk before its end is given; broken off earlier, nothing of it is. Of a reply
    that the policy blocks nothing is either: the session stays as it was.
    """
    sessions, n_read, n_drawn, after = served.sessions, 0, 0, None
    for at, prompt in enumerate(prompts):
        with contextlib.ExitStack() as stack:
            record = None if session_id is None else stack.enter_context(sessions.writing(session_id, caller.owner))
            moment = FRESH if record is None else await asyncio.to_thread(sessions.moment, record)
            ids = prompt.ids(not moment.n_tokens, record is not None and record.is_open)
            if not ids and not moment.n_tokens:
                ids = served.tokenizer.begin(ids) or served.tokenizer.encode(BEGINNING)
            reader = sessions.reader() if record is None else sessions.reader(record.learn, record.learning)
            order = Order(reader, moment, tuple(ids), portion(sessions.model), deadline_s=served.deadline_s)
            conversation = Conversation(served.engine, served.tokenizer, served.policy, sink=sink, n_before=at * wish.n)
            stack.callback(conversation.close)
            choices = []
            async for items in conversation.write(order, wish):
                choices += [item for item in items if isinstance(item, Choice)]
                yield [item for item in items if isinstance(item, Piece)]
            pieces = conversation.pieces
            n_read += len(ids)
            n_drawn += sum(choice.end.n_drawn for choice in choices)
            if record is not None and choices[0].is_blocked:
                after = _session(record)
            elif record is not None:
                end, stop = choices[0].end, choices[0].stop
                # Of a reply that is not given as it was drawn, no view of its tokens is given either.
                drawn = () if choices[0].is_redacted else [token.token_id for piece in pieces for token in piece.tokens]
                said = Said(
                    text=prompt.text,
                    reply=texts_of(pieces, 1)[0],
                    finish=end.reason,
                    seed=conversation.seed,
                    n_read=len(ids),
                    n_drawn=end.n_drawn,
                    nats=end.nats,
                    is_open=wish.is_reply and stop != END_OF_REPLY,
                    ids=(*ids, *drawn)[:MOST_KEPT_IDS],
                )
                after = _session(await asyncio.to_thread(sessions.add, record, end.moment, said))
        yield list(choices)
    yield [Usage(n_read, n_drawn, after)]


async def _feed(served: Served, session_id: str, text: str, ids: Sequence[int], caller: Caller) -> Response:
    sessions = served.sessions
    with contextlib.ExitStack() as stack:
        record = stack.enter_context(sessions.writing(session_id, caller.owner))
        moment = await asyncio.to_thread(sessions.moment, record)
        ids = ids if moment.n_tokens else served.tokenizer.begin(ids)
        reader = sessions.reader(record.learn, record.learning)
        conversation = Conversation(served.engine, served.tokenizer)
        stack.callback(conversation.close)
        order = Order(reader, moment, tuple(ids), portion(sessions.model), deadline_s=served.deadline_s)
        end = await conversation.read(order)
        kept = tuple(ids[:MOST_KEPT_IDS])
        said = Said(text=text, n_read=len(ids), nats=end.nats, finish=end.reason, ids=kept)
        record = await asyncio.to_thread(sessions.add, record, end.moment, said)
    body = {"n_read": len(ids), "nats": end.nats, "seconds": end.seconds, "session": _session(record)}
    return JSONResponse(body)


async def _gathered(come: AsyncIterator[list[Item]]) -> list[Item]:
    return [item async for items in come for item in items]


async def _events(
    shape: Shape, first: list[Item], come: AsyncGenerator[list[Item], None], has_usage: bool, short: "_Short | None"
) -> AsyncIterator[bytes]:
    """The reply as server-sent events, what has come together in one piece. Whoever stops listening ends it before its
    next token."""
    try:
        items: list[Item] | None = first
        while items is not None:
            # A token that completes no character has no event.
            if found := _event_bytes(shape, items, has_usage):
                yield found
            # What was yielded has been written: until more is, the short way is free.
            if short is not None:
                short.is_free = True
            items = await anext(come, None)
            if short is not None:
                short.is_free = False
    except Exception as error:  # noqa: BLE001 - the status is sent already, so that any error is an event
        yield _event(json.loads(bytes(failure_of(error).body)))
        return
    finally:
        await come.aclose()
    yield DONE


@dataclass
class _Short:
    """The short way of the events of a reply. is_free: nothing is on its way on the long one, which would be
    overtaken."""

    outlet: Outlet
    shape: Shape
    has_usage: bool
    is_free: bool = False

    @property
    def is_open(self) -> bool:
        return self.is_free and self.outlet.is_open

    def take(self, pieces: Sequence[Piece]) -> None:
        if found := _event_bytes(self.shape, pieces, self.has_usage):
            self.outlet.write(found)


def _event_bytes(shape: Shape, items: Sequence[Item], has_usage: bool) -> bytes:
    return b"".join([_event(chunk) for item in items for chunk in shape.chunks(item, has_usage=has_usage)])


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


def _message_ids(tokenizer: Tokenizer, messages: Sequence[Message], is_first: bool, is_open: bool) -> list[int]:
    return message_ids(tokenizer, messages, is_first=is_first, is_open=is_open)


async def _plain_prompt(served: Served, prompt: str | list[int]) -> _Prompt:
    if isinstance(prompt, str):
        text = await _prompted(served, prompt)
        ids = served.tokenizer.encode(text)
        return _Prompt(lambda is_first, is_open: served.tokenizer.begin(ids) if is_first else ids, text)
    given, tokenizer = list(prompt), served.tokenizer
    if wrong := [each for each in given if not 0 <= each < tokenizer.vocab_size]:
        raise WrongValue(f"the id {wrong[0]} is not in the vocabulary of {tokenizer.vocab_size}.", key="prompt")
    said = tokenizer.decode(given)
    text = await _prompted(served, said)
    kept = given if text == said else tokenizer.encode(text)
    return _Prompt(lambda is_first, is_open: kept, text)


async def _prompted(served: Served, text: str) -> str:
    """The text of a prompt as the policy lets it through; other requests are worked on meanwhile."""
    text = _readable(text)
    if not served.policy.reads("prompt"):
        return text
    return await asyncio.to_thread(served.policy.require, text, "prompt", served.engine.emit)


def _with_session(asked: Completion, request: Request) -> Completion:
    """The request with the session that its header names, for balancers, which see no bodies."""
    named = request.headers.get(SESSION_HEADER)
    if named is None or asked.session == named:
        return asked
    if asked.session is not None:
        raise WrongValue(f"{SESSION_HEADER} names another session than the body. Send one of them.", key="session")
    return asked.model_copy(update={"session": named})


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
