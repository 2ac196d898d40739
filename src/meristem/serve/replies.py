"""From the thread of the engine to those who wait for a reply."""

import asyncio
import secrets
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from meristem.data.chat import END_OF_REPLY, ends_of
from meristem.data.tokenizer import Tokenizer
from meristem.errors import MeristemError, WorkerTimeout
from meristem.models.generate import Sampling
from meristem.safety.policy import NO_POLICY, Policy, PolicyStream
from meristem.serve.draw import Drawn
from meristem.serve.engine import Ended, Engine, Job, Order
from meristem.serve.stops import EVERY, StopTexts

MOST_UNREAD: Final = 1024
"""Tokens that wait for a slow reader; with more of them the reply is given up."""


HELD_S: Final = 0.05
"""How long what is drawn may wait for more, so that it is sent together. Twenty times a second is fast to read."""

HELD_EACH_S: Final = 0.005
"""The same for each reply that is on its way: where there are few, nothing is saved by sending them seldom."""


class Piece(NamedTuple):
    """What was added to a choice since the piece before: tokens, and the text that is sure with them, maybe none."""

    choice: int
    text: str
    tokens: tuple[Drawn, ...]


class Choice(NamedTuple):
    """How a choice ended. stop: the text that ended it. is_blocked: a policy kept it from going on.
    is_redacted: or took something out of it."""

    choice: int
    end: Ended
    stop: str | None
    is_blocked: bool = False
    is_redacted: bool = False

    @property
    def finish(self) -> str:
        """Why it ended, as the OpenAI API says it."""
        return "content_filter" if self.is_blocked else "stop" if self.end.reason == "stop" else "length"


@dataclass(frozen=True)
class Wish:
    """How a text is to be written. n: choices. is_reply: as a turn of a chat, which ends with it, and of which white
    space before the first word is no part."""

    max_tokens: int
    sampling: Sampling
    random_seed: int | None = None
    n: int = 1
    stops: tuple[str, ...] = ()
    n_top: int | None = None
    is_reply: bool = False


class _Reply:
    """A choice on its way from the thread of the engine to the loop.

    In the engine a token costs no more than to be kept. Text is made of many tokens together, by the loop when it sends
    it; by the engine only where a token may end the reply.
    """

    __slots__ = (
        *("_choice", "_stops", "_judged", "_hurry", "_deciding", "_drawn", "_has_begun", "_lock", "_text", "_tokens"),
        "_end",
    )

    def __init__(self, choice: int, stops: StopTexts, judged: PolicyStream, hurry: Callable[[], None]) -> None:
        self._choice, self._stops, self._judged, self._hurry = choice, stops, judged, hurry
        self._deciding = stops.deciding if judged.rules is None else EVERY
        self._drawn: deque[Drawn] = deque()
        self._has_begun = False
        # Under the lock: the text that is sure, the tokens that it was made of and the end.
        self._lock = threading.Lock()
        self._text, self._tokens = "", list[Drawn]()
        self._end: Ended | None = None

    @property
    def n_unread(self) -> int:
        """Tokens that nobody took yet."""
        return len(self._drawn) + len(self._tokens)

    @property
    def has_come(self) -> bool:
        """Whether there is something to take."""
        return bool(self._drawn or self._tokens or self._text or self._end)

    @property
    def has_ended(self) -> bool:
        """Whether the last that there is to take is the end."""
        return self._end is not None

    def drawn(self, token: Drawn) -> bool:
        """Keep a token; whether the reply ends with it. In the thread of the engine, as ``ended``."""
        self._drawn.append(token)
        if not self._has_begun:
            self._has_begun = True
            self._hurry()
        if token.token_id not in self._deciding:
            return False
        with self._lock:
            self._read()
            return self._stops.found is not None or self._judged.blocked is not None

    def ended(self, end: Ended) -> None:
        with self._lock:
            self._read()
            self._text += self._judged.feed(self._stops.finish()) + self._judged.finish()
            self._end = end
        self._hurry()

    def take(self) -> list[Piece | Choice]:
        """What has come; in the loop."""
        found: list[Piece | Choice] = []
        with self._lock:
            self._read()
            if self._tokens or self._text:
                found.append(Piece(self._choice, self._text, tuple(self._tokens)))
                self._text, self._tokens = "", []
            if self._end is not None:
                is_blocked = self._judged.blocked is not None
                is_redacted = any(hit.action == "redact" for hit in self._judged.hits)
                found.append(Choice(self._choice, self._end, self._stops.found, is_blocked, is_redacted))
                self._end = None
        return found

    def _read(self) -> None:
        """Make text of the tokens that were kept."""
        tokens = [self._drawn.popleft() for _ in range(len(self._drawn))]
        if tokens:
            self._text += self._judged.feed(self._stops.feed(*(token.token_id for token in tokens)))
            self._tokens += tokens


class _Post:
    """Has an event loop look for what another thread has made, for all who wait in it together.

    Every call into the loop is a system call that wakes it, and then the two threads take the interpreter from each
    other: once for every token of every row it would cost as much as a third of the tokens.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # Weak: of every loop there is one of these, for as long as there is the loop.
        self._loop = weakref.ref(loop)
        self._readers: set[Conversation] = set()
        self._is_called = self._is_urgent = self._is_looking = False
        self._next_look: asyncio.TimerHandle | None = None

    def enter(self, reader: "Conversation") -> None:
        """Look for what has come for it, too; in the loop."""
        self._readers.add(reader)

    def leave(self, reader: "Conversation") -> None:
        """Look no longer for it; in the loop."""
        self._readers.discard(reader)

    def hurry(self) -> None:
        """What there is now is not to wait for more: the next ``send`` wakes the loop."""
        self._is_urgent = True

    def send(self) -> None:
        """Have the loop look: at once, or when it does next. In the thread that made what there is."""
        loop = self._loop()
        if loop is None or self._is_called or (self._is_looking and not self._is_urgent):
            return
        self._is_called, self._is_urgent = True, False
        try:
            loop.call_soon_threadsafe(self._look)
        except RuntimeError:  # the loop has ended, and with it whoever waited
            for reader in list(self._readers):
                reader.give_up()

    def _look(self) -> None:
        """Wake those for whom something has come; while something comes, look again."""
        # First: what is made after this has looked is sent again.
        self._is_called = self._is_looking = self._is_urgent = False
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        n_woken, loop = sum(reader.wake() for reader in self._readers), self._loop()
        if n_woken and loop is not None:
            self._next_look = loop.call_later(min(HELD_S, HELD_EACH_S * n_woken), self._look)
            self._is_looking = True


_posts: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, _Post]] = WeakKeyDictionary()


class Sink(Protocol):
    """Takes pieces at once, in the loop, where their reader would have to be woken for them."""

    @property
    def is_open(self) -> bool:
        """Whether it takes any now."""

    def take(self, pieces: Sequence[Piece]) -> None:
        """Takes them all."""


class Conversation:
    """One request at the engine, for one reader in an event loop; ``close`` ends what is left of it.

    policy: what it makes of each reply is given. sink: takes pieces instead of the reader, while it is open. n_before:
    choices that the reader was given before. seed: of the draws, a fresh one where none was given. pieces: all that
    were given.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        policy: Policy = NO_POLICY,
        *,
        sink: Sink | None = None,
        n_before: int = 0,
    ) -> None:
        self.engine, self.tokenizer, self.policy = engine, tokenizer, policy
        self.seed, self.pieces = 0, list[Piece]()
        self._sink, self._n_before = sink, n_before
        loop = asyncio.get_running_loop()
        self._post = _posts.setdefault(loop, _Post(loop))
        self._jobs: list[Job] = []
        self._replies: list[_Reply] = []
        self._has_come = asyncio.Event()

    async def read(self, order: Order) -> Ended:
        """Read a text without a reply."""
        only_read = Wish(max_tokens=0, sampling=order.sampling)
        (end,) = [item.end async for items in self._all(order, only_read) for item in items if isinstance(item, Choice)]
        return end

    async def write(self, order: Order, wish: Wish) -> AsyncIterator[list[Piece | Choice]]:
        """What has come of all choices, pieces and each choice when it has ended; the text is read once."""
        self.seed = secrets.randbits(63) if wish.random_seed is None else wish.random_seed
        if wish.n > 1 and order.token_ids:
            order = replace(order, moment=(await self.read(order)).moment, token_ids=())
        async for items in self._all(order, wish):
            yield items

    def close(self) -> None:
        """End what is still at work, before its next token."""
        self.give_up()
        self._post.leave(self)

    def give_up(self) -> None:
        """The same, and stay to hear of the end; from any thread."""
        for job in self._jobs:
            job.cancel()

    def wake(self) -> bool:
        """Have what has come be taken; whether there was something. Whoever takes too little is given up."""
        if not any(reply.has_come for reply in self._replies):
            return False
        if self._sink and self._sink.is_open and not any(reply.has_ended for reply in self._replies):
            self._sink.take([item for item in self._take() if isinstance(item, Piece)])
            return True
        self._has_come.set()
        if sum(reply.n_unread for reply in self._replies) > MOST_UNREAD:
            self.give_up()
        return True

    def _take(self) -> list[Piece | Choice]:
        found = [item for reply in self._replies for item in reply.take()]
        self.pieces += [item for item in found if isinstance(item, Piece)]
        return found

    async def _all(self, order: Order, wish: Wish) -> AsyncIterator[list[Piece | Choice]]:
        """What has come of all choices, until each has ended."""
        self._replies = [self._reply(wish, choice) for choice in range(wish.n)]
        self._post.enter(self)
        for choice, reply in enumerate(self._replies):
            self._submit(order, wish, choice, reply)
        n_left = wish.n
        while n_left:
            await self._has_come.wait()
            self._has_come.clear()
            yield (items := self._take())
            for end in [item.end for item in items if isinstance(item, Choice)]:
                _require_whole(end)
                n_left -= 1

    def _reply(self, wish: Wish, choice: int) -> _Reply:
        is_laid_out = wish.is_reply and self.tokenizer.chat_template is None
        stops = StopTexts(
            self.tokenizer,
            (END_OF_REPLY, *wish.stops) if is_laid_out else wish.stops,
            is_trimmed=wish.is_reply,
            ends=ends_of(self.tokenizer),
        )
        return _Reply(self._n_before + choice, stops, self.policy.stream("output", self.engine.emit), self._post.hurry)

    def _submit(self, order: Order, wish: Wish, choice: int, reply: _Reply) -> None:
        def ended(end: Ended) -> None:
            reply.ended(end)
            self._post.send()

        self._jobs.append(
            self.engine.submit(
                replace(
                    order,
                    max_tokens=wish.max_tokens,
                    sampling=wish.sampling,
                    random_seed=self.seed,
                    choice=choice,
                    n_top=wish.n_top,
                    drawn=reply.drawn,
                    handed=self._post.send,
                    ended=ended,
                )
            )
        )


def _require_whole(end: Ended) -> Ended:
    """Raise what kept an order from its end."""
    if end.reason == "error":
        raise end.error or MeristemError("the reply failed")
    if end.reason == "deadline":
        raise WorkerTimeout(f"the reply was not done after {end.seconds:.0f} s, the most it may take. Ask for less.")
    if end.reason == "cancelled":
        raise WorkerTimeout("the reply was given up: its reader was too slow, or the server is stopping.")
    return end


def texts_of(pieces: Sequence[Piece], n: int) -> list[str]:
    """The whole texts of all choices."""
    return ["".join(piece.text for piece in pieces if piece.choice == choice) for choice in range(n)]
