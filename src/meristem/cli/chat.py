"""`meristem chat`: talk to a model whose memory learns from what is said."""

import contextlib
import difflib
import math
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Protocol

import typer

from meristem.cli.answer import Json, columns, json_line, size, tell, write_text
from meristem.cli.policy import BypassPolicy, PolicyFile, policy_of
from meristem.cli.sample import (
    AnyCheckpoint,
    DeviceName,
    Learn,
    LearningRate,
    MaxTokens,
    Seed,
    Temperature,
    TopK,
    TopP,
    Which,
    learning_of,
    open_session,
)
from meristem.errors import MeristemError, WrongValue

if TYPE_CHECKING:
    from meristem.safety.policy import Policy
    from meristem.serve.session import MemoryView, Session

HELP: Final = """\
What you type is read by the model and changes its memory; then the model writes on, until a blank line or its limit.
  /memory        what the memory holds, layer by layer
  /read FILE     read a text, without a reply
  /save FILE     write this session to a file
  /load FILE     go on with a saved session
  /fork NAME     copy this session under a name and go on in the copy
  /go [NAME]     go on in another session; without a name, list them
  /rollback [N]  take back the last N exchanges (1)
  /forget        begin afresh, memory and all
  /quit          leave, as Ctrl-D does; Ctrl-C stops a reply"""


class _Read(Protocol):
    """A text that was read."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def nats(self) -> float: ...
    @property
    def seconds(self) -> float: ...


class _Session(Protocol):
    """What a chat needs of a session: ``serve.session.Session`` here, ``serve.remote.RemoteSession`` of a server."""

    @property
    def turn(self) -> int: ...
    @property
    def n_tokens(self) -> int: ...
    def feed(self, text: str) -> _Read: ...
    def reply(self, line: str, max_tokens: int) -> Generator[str, None, None]: ...
    def fork(self, name: str) -> "_Session": ...
    def rollback(self, to: int) -> None: ...
    def forget(self) -> None: ...
    def memory(self) -> "MemoryView": ...
    def save(self, path: Path) -> None: ...


@dataclass
class _Talk:
    """The sessions of one chat, and the current one; ``exchanges`` holds the turn before each exchange.

    load: opens a saved session as those here are. policy: of what is said and replied.
    """

    sessions: dict[str, _Session]
    exchanges: dict[str, list[int]]
    current: str
    load: Callable[[Path], _Session]
    policy: "Policy"

    @property
    def session(self) -> _Session:
        return self.sessions[self.current]

    def enter(self, name: str, session: _Session, exchanges: list[int]) -> None:
        self.sessions[name], self.exchanges[name], self.current = session, exchanges, name


def chat(
    checkpoint: AnyCheckpoint = None,
    max_tokens: MaxTokens = 200,
    temperature: Temperature = 0.2,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    learn: Learn = "memory",
    which: Which = "mlp",
    lr: LearningRate = None,
    device: DeviceName = "cpu",
    url: Annotated[
        str | None,
        typer.Option("--url", help="Talk to the model of this server instead.", metavar="URL", show_default=False),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", help="The key for that server.", envvar="MERISTEM_KEY", show_default=False),
    ] = None,
    session_id: Annotated[
        str | None,
        typer.Option("--session", help="The session of that server to go on with.", metavar="ID", show_default=False),
    ] = None,
    policy: PolicyFile = None,
    bypass_policy: BypassPolicy = None,
    as_json: Json = False,
) -> None:
    """Talk to a model; its memory learns from what is said. /help lists the commands.

    \b
    Examples:
      meristem chat
      meristem chat runs/latest
      meristem chat runs/latest --learn weights --which mlp --lr 1.5
      meristem chat --policy default
      meristem chat --url http://127.0.0.1:8000
      printf 'My name is Ada.\\n/memory\\n' | meristem chat runs/latest --json
    """
    learning, rules = learning_of(learn, which, lr), policy_of(policy, bypass_policy)
    if url is not None:
        from meristem.serve.remote import open_remote

        _require_default(checkpoint, device)
        settings = {"learn": learn} | ({"learning": learning.model_dump()} if learn == "weights" else {})
        drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        with open_remote(url, key, session_id=session_id, settings=settings, drawing=drawing) as session:
            typer.secho(f"session {session.id} of {session.server.url}, where it stays", dim=True, err=True)
            _converse(_Talk({"main": session}, {"main": []}, "main", session.load, rules), max_tokens, as_json)
    elif session_id is not None:
        raise WrongValue("--session names a session of a server. Add --url, or /load a file.", key="session")
    else:
        here = open_session(
            checkpoint,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            learn=learn,
            learning=learning,
            device=device,
        )
        _converse(_local(here, rules), max_tokens, as_json)


def _local(session: "Session", policy: "Policy") -> _Talk:
    def load(path: Path) -> _Session:
        return type(session).load(
            path, session.model, session.tokenizer, learn=session.learn, learning=session.learning
        )

    return _Talk({"main": session}, {"main": []}, "main", load, policy)


def _require_default(checkpoint: Path | None, device: str) -> None:
    """Refuse, beside --url, what says which model runs where: the server says that."""
    for given, name in ((checkpoint is not None, "CKPT"), (device != "cpu", "--device")):
        if given:
            raise WrongValue(
                f"{name} and --url were both given; the server has its own model. Leave one out.", key="url"
            )


def _converse(talk: _Talk, max_tokens: int, as_json: bool) -> None:
    """Answer every line until the last."""
    if not as_json and sys.stdin.isatty():
        typer.echo("The model writes on from what you say; a small one is no assistant. /help lists the commands.")
    for line in _lines():
        if line.strip() == "/quit":
            break
        try:
            if line.startswith("/"):
                _command(talk, line, as_json)
            elif line.strip():
                _exchange(talk, line, max_tokens, as_json)
        except MeristemError as error:
            _say_error(error, as_json)


def _lines() -> Iterator[str]:
    """What the user types, or what comes through a pipe, line by line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - editing and history of the prompt
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return


def _exchange(talk: _Talk, line: str, max_tokens: int, as_json: bool) -> None:
    """Read one line, then write a reply; Ctrl-C ends the reply where it is.

    A reply that the policy blocks ends where the rule begins, and the session is as it was before the line.
    """
    line = talk.policy.require(line, "prompt", tell)
    session, before, written, stopped = talk.session, talk.session.turn, "", False
    judged = talk.policy.stream("output", tell)
    try:
        with contextlib.closing(session.reply(line, max_tokens)) as pieces:
            for piece in judged.over(pieces):
                written += piece
                if not as_json:
                    write_text(piece)
    except KeyboardInterrupt:
        stopped = True
        written += (rest := judged.finish())
        if not as_json:
            write_text(rest)
    if judged.blocked is not None:
        if not as_json:
            typer.echo()
        session.rollback(to=before)
        raise talk.policy.refusal(judged.blocked, "output")
    if session.turn > before:
        talk.exchanges[talk.current].append(before)
    if as_json:
        json_line({"reply": written, "stopped": stopped, "session": talk.current, "n_tokens": session.n_tokens})
    elif stopped:
        typer.secho(" (stopped)", dim=True)
    elif not written.endswith("\n"):
        typer.echo()


def _say_error(error: MeristemError, as_json: bool) -> None:
    if as_json:
        json_line({"error": {"type": type(error).__name__, "message": str(error), "fields": error.fields}})
    else:
        typer.secho(f"error: {error}", fg="red", err=True)


def _command(talk: _Talk, line: str, as_json: bool) -> None:
    name, _, argument = line.strip().partition(" ")
    if name not in _COMMANDS:
        nearest = difflib.get_close_matches(name, _COMMANDS, n=1, cutoff=0.0)[0]
        raise WrongValue(f"there is no command {name}; the nearest is {nearest}. /help lists them all.", value=name)
    result, words = _COMMANDS[name](talk, argument.strip())
    if as_json:
        json_line({"command": name, **result})
    else:
        typer.echo("\n".join(words))


_Said = tuple[dict[str, object], list[str]]


def _needs(argument: str, usage: str) -> str:
    if not argument:
        raise WrongValue(f"something is missing: {usage}.")
    return argument


def _help(talk: _Talk, argument: str) -> _Said:
    return {"help": HELP}, [HELP]


def _memory(talk: _Talk, argument: str) -> _Said:
    memory = talk.session.memory()
    titles = ("layer", "norm", "size", "half-lives at rest, tokens")
    rows = [
        (name, m["norm"], size(m["size_bytes"]), ", ".join(f"{each:,.0f}" for each in m["half_lives"]))
        for name, m in memory["layers"].items()
    ]
    total = f"{memory['n_tokens']} tokens read, {size(memory['size_bytes'])} remembered"
    table = columns(titles, rows) if rows else ["No rule has written a memory here."]
    return {"memory": memory}, [total, *table]


def _read(talk: _Talk, argument: str) -> _Said:
    from meristem.data import files

    text = files.read(Path(_needs(argument, "/read FILE")).expanduser())
    before = talk.session.turn
    turn = talk.session.feed(talk.policy.require(text.decode("utf-8", "surrogateescape"), "prompt", tell))
    talk.exchanges[talk.current].append(before)
    bits_per_byte = turn.nats / math.log(2) / max(1, len(text))
    result = {"path": argument, "n_tokens": turn.n_tokens, "bits_per_byte": bits_per_byte, "seconds": turn.seconds}
    words = f"{turn.n_tokens:,} tokens read in {turn.seconds:.1f} s, {bits_per_byte:.3f} bits per byte"
    return result, [words]


def _save(talk: _Talk, argument: str) -> _Said:
    path = Path(_needs(argument, "/save FILE")).expanduser()
    talk.session.save(path)
    n_bytes = path.stat().st_size
    return {"path": str(path), "size_bytes": n_bytes}, [f"saved to {path} ({size(n_bytes)})"]


def _load(talk: _Talk, argument: str) -> _Said:
    path = Path(_needs(argument, "/load FILE")).expanduser()
    session = talk.load(path)
    name = path.stem
    while name in talk.sessions:
        name += "+"
    talk.enter(name, session, [])
    return _where(talk)


def _fork(talk: _Talk, argument: str) -> _Said:
    name = _needs(argument, "/fork NAME")
    if name in talk.sessions:
        raise WrongValue(f"there is a session '{name}' already. Choose another name, or /go {name}.", value=name)
    talk.enter(name, talk.session.fork(name), list(talk.exchanges[talk.current]))
    return _where(talk)


def _go(talk: _Talk, argument: str) -> _Said:
    if argument and argument not in talk.sessions:
        raise WrongValue(f"there is no session '{argument}'; there are {', '.join(talk.sessions)}.", value=argument)
    talk.current = argument or talk.current
    return _where(talk)


def _where(talk: _Talk) -> _Said:
    rows = [(("* " if name == talk.current else "  ") + name, s.n_tokens) for name, s in talk.sessions.items()]
    sessions = {name: session.n_tokens for name, session in talk.sessions.items()}
    return {"session": talk.current, "sessions": sessions}, columns(("  session", "tokens read"), rows)


def _rollback(talk: _Talk, argument: str) -> _Said:
    exchanges = talk.exchanges[talk.current]
    n_back = int(argument) if argument.isdecimal() else 0 if argument else 1
    if not 1 <= n_back <= len(exchanges):
        raise WrongValue(
            f"'{argument or 1}' exchanges cannot be taken back; there were {len(exchanges)}. Give a number up to that.",
            value=argument,
        )
    talk.session.rollback(to=exchanges[-n_back])
    del exchanges[-n_back:]
    n_tokens = talk.session.n_tokens
    return {"taken_back": n_back, "n_tokens": n_tokens}, [f"{n_back} taken back; {n_tokens} tokens are read"]


def _forget(talk: _Talk, argument: str) -> _Said:
    talk.session.forget()
    talk.exchanges[talk.current].clear()
    return {"forgotten": True}, ["everything is forgotten"]


_COMMANDS: Final[dict[str, Callable[[_Talk, str], _Said]]] = {
    "/help": _help,
    "/memory": _memory,
    "/read": _read,
    "/save": _save,
    "/load": _load,
    "/fork": _fork,
    "/go": _go,
    "/rollback": _rollback,
    "/forget": _forget,
}
