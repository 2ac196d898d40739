"""A session of a server, with the methods that a session of this process has; nothing here needs torch."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, TypeVar, cast
from urllib.parse import quote

import orjson

from meristem.checkpoint.atomic import write_atomic
from meristem.errors import (
    CheckpointError,
    MeristemError,
    NoSession,
    QueueFull,
    RunError,
    SessionBusy,
    WorkerError,
    WrongValue,
)
from meristem.extras import needed

if TYPE_CHECKING:
    import httpx2 as httpx

    from meristem.serve.session import MemoryView

T = TypeVar("T")
BUSY_S: Final = 5.0
"""How long a request waits for a reply that was stopped to let go of its session."""
SILENCE_S: Final = 600.0
"""How long a server may say nothing: a long text is read before the first token of a reply."""

KINDS: Final[Mapping[object, type[MeristemError]]] = {
    "session_not_found": NoSession,
    "session_busy": SessionBusy,
    "bad_session_file": CheckpointError,
    429: QueueFull,
    400: WrongValue,
}
"""Our error for what a server says, by its code or else by its status; WorkerError for all others."""


class ReadText(NamedTuple):
    """A text that the server read. nats: its summed surprise."""

    n_tokens: int
    nats: float
    seconds: float


@dataclass(frozen=True)
class Server:
    """Requests to one server. Errors: RunError where none answers, it is none of meristem or it wants another key;
    what it refuses, in its own words, as an error of ours."""

    url: str
    web: "httpx.Client"

    def json(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        """The answer to a request; one to a session that is busy is repeated for a while."""
        with self._explained():
            answer = _patiently(lambda: self._checked(self.web.request(method, path, **content)))
            return dict(orjson.loads(answer.content))

    def content(self, path: str) -> bytes:
        """The bytes behind a path."""
        with self._explained():
            return self._checked(self.web.get(path)).content

    @contextlib.contextmanager
    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The server-sent events of a reply; leaving the block ends it."""
        with self._explained(), self.web.stream("POST", path, json=body) as answer:
            if not answer.is_success:
                answer.read()
            yield self._parsed(self._checked(answer))

    def _parsed(self, answer: "httpx.Response") -> Iterator[dict[str, Any]]:
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):
                event = orjson.loads(line.removeprefix("data: "))
                if "error" in event:
                    self._refuse(answer, event["error"])
                yield event
        raise RunError(f"the server at {self.url} broke the reply off. It keeps nothing of it; say it again.")

    def _checked(self, answer: "httpx.Response") -> "httpx.Response":
        if answer.is_success:
            return answer
        try:
            error = dict(orjson.loads(answer.content)["error"])
        except (ValueError, TypeError, KeyError):
            error = {"message": f"{answer.status_code} {answer.reason_phrase}"}
        self._refuse(answer, error)

    def _refuse(self, answer: "httpx.Response", error: Mapping[str, Any]) -> NoReturn:
        """Raise what an answer says in the shape of the OpenAI API."""
        message, status = str(error.get("message")), answer.status_code
        if status in (401, 403):
            raise RunError(
                f"the server at {self.url} refuses the key ({status}): {message} Give --key, or set MERISTEM_KEY."
            )
        if status == 429 and (pause := answer.headers.get("Retry-After")):
            message += f" It takes requests again in {pause} s."
        kind = KINDS.get(error.get("code")) or KINDS.get(status, WorkerError)
        raise kind(f"the server at {self.url} says: {message}", status=status)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what a connection, or another kind of server, makes into an error of ours."""
        with needed("talking to a server"):
            import httpx2 as httpx

        try:
            yield
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as cause:
            raise WrongValue(f"--url is {self.url}: {cause}. Give it as http://127.0.0.1:8000.", key="url") from cause
        except httpx.TransportError as cause:
            why = str(cause) or type(cause).__name__
            raise RunError(
                f"no server answers at {self.url} ({why}). Start one with `meristem serve`, or give another --url."
            ) from cause
        except UnicodeEncodeError as cause:
            raise WrongValue("the text holds bytes that are not UTF-8, which no server takes. Convert it.") from cause
        except orjson.JSONDecodeError as cause:
            raise RunError(f"what answers at {self.url} is no server of meristem. Give another --url.") from cause


def _patiently(request: Callable[[], T]) -> T:
    """What a request gives; while a reply that was stopped has not let go of its session, it is repeated."""
    until = time.monotonic() + BUSY_S
    while True:
        try:
            return request()
        except SessionBusy:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


@dataclass
class RemoteSession:
    """A session that a server keeps; it is there after this process.

    record: what the server says of it. drawing: fields of a request that say how to draw.
    """

    server: Server
    record: dict[str, Any]
    drawing: Mapping[str, Any]

    @property
    def turn(self) -> int:
        """The last turn; 0 before the first."""
        return int(self.record["turn"])

    @property
    def n_tokens(self) -> int:
        """Tokens read so far."""
        return int(self.record["n_tokens"])

    @property
    def id(self) -> str:
        return str(self.record["id"])

    @property
    def _path(self) -> str:
        return f"/v1/sessions/{self.id}"

    def feed(self, text: str) -> ReadText:
        """Read a text."""
        answer = self.server.json("POST", f"{self._path}/feed", json={"text": text})
        self.record = answer["session"]
        return ReadText(answer["n_read"], answer["nats"], answer["seconds"])

    def reply(self, line: str, max_tokens: int) -> Generator[str, None, None]:
        """Read a line and write a reply, piece by piece. Left early, nothing of either is kept."""
        messages = [{"role": "user", "content": line}]
        body = {"session": self.id, "messages": messages, "max_tokens": max_tokens, "stream": True, **self.drawing}
        with contextlib.ExitStack() as stack:
            events = _patiently(lambda: stack.enter_context(self.server.events("/v1/chat/completions", body)))
            for event in events:
                for choice in event["choices"]:
                    if piece := choice["delta"].get("content"):
                        yield piece
        self.record = self.server.json("GET", self._path)

    def fork(self, name: str) -> "RemoteSession":
        """A second session that stands where this one stands."""
        return replace(self, record=self.server.json("POST", f"{self._path}/fork", json={"name": name}))

    def rollback(self, to: int) -> None:
        """Return to the end of turn ``to``; 0 is before the first."""
        self.record = self.server.json("POST", f"{self._path}/rollback", json={"to": to})

    def forget(self) -> None:
        """Begin afresh: memory, turns and all."""
        self.rollback(0)

    def memory(self) -> "MemoryView":
        """What is remembered now."""
        return cast("MemoryView", self.server.json("GET", f"{self._path}/memory"))

    def save(self, path: Path) -> None:
        """Write the session into one file, which ``load`` and ``Session.load`` open."""
        content = self.server.content(f"{self._path}/export")
        try:
            write_atomic(path, content)
        except OSError as cause:
            raise RunError(f"{path} could not be written: {cause.strerror}. Choose another path.") from cause

    def load(self, path: Path) -> "RemoteSession":
        """A new session of the same server, from such a file."""
        try:
            content = path.read_bytes()
        except OSError as cause:
            raise RunError(f"{path} cannot be read: {cause.strerror}. Name a file that /save wrote.") from cause
        return replace(self, record=self.server.json("POST", "/v1/sessions/import", content=content))


@contextlib.contextmanager
def open_remote(
    url: str, key: str | None, *, session_id: str | None, settings: Mapping[str, Any], drawing: Mapping[str, Any]
) -> Iterator[RemoteSession]:
    """A session of the server at ``url``: the one of that id, or a new one with ``settings``."""
    with needed("talking to a server"):
        import httpx2 as httpx

    root = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        web = httpx.Client(base_url=root, headers=headers, timeout=httpx.Timeout(SILENCE_S, connect=10.0))
    except (httpx.InvalidURL, UnicodeEncodeError) as cause:
        raise WrongValue(f"--url or --key cannot be sent: {cause}.", key="url", value=url) from cause
    with web:
        yield RemoteSession(*_opened(Server(root, web), session_id, settings), drawing)


def _opened(server: Server, session_id: str | None, settings: Mapping[str, Any]) -> tuple[Server, dict[str, Any]]:
    """The server, if it is one of meristem, and what it says of the session."""
    models = server.json("GET", "/v1/models").get("data")
    if not isinstance(models, list) or not models or models[0].get("owned_by") != "meristem":
        raise RunError(f"what answers at {server.url} is no server of meristem. Give another --url.")
    if session_id is None:
        return server, server.json("POST", "/v1/sessions", json=dict(settings))
    try:
        return server, server.json("GET", f"/v1/sessions/{quote(session_id, safe='')}")
    except NoSession as cause:
        raise NoSession(
            f"{cause} It serves '{models[0].get('id')}'; sessions of another model, or of another key, are not seen.",
            session=session_id,
        ) from cause
