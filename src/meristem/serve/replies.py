"""From the thread of the engine to those who wait for a reply."""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

from meristem.data.chat import END_OF_REPLY, ends_of
from meristem.data.tokenizer import Tokenizer
from meristem.errors import MeristemError, WorkerTimeout
from meristem.models.generate import Sampling
from meristem.safety.policy import NO_POLICY, Policy
from meristem.serve.draw import Drawn
from meristem.serve.engine import Ended, Engine, Job, Order
from meristem.serve.stops import StopTexts

MOST_UNREAD: Final = 1024
"""Tokens that wait for a slow reader; with more of them the reply is given up."""


HELD_S: Final = 0.05
"""How long what is drawn may wait for more, so that it is sent together. Twenty times a second is fast to read."""


class Piece(NamedTuple):
    """What a token adds to a choice: often no text. token: None for text that was held back to the end."""

    choice: int
    text: str
    token: Drawn | None


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


class _Post:
    """What another thread gives to an event loop, which is handed over together.

    Every call into the loop is a system call that wakes it, and then the two threads take the interpreter from each
    other: once for every token of every row it would cost as much as a third of the tokens.
    """

    def __init__(self) -> None:
        self._given: deque[tuple[asyncio.Queue[Any], object]] = deque()
        self._is_called = self._is_urgent = self._is_looking = False
        self._next_look: asyncio.TimerHandle | None = None

    def put(self, queue: "asyncio.Queue[Any]", item: object, *, is_urgent: bool) -> None:
        """Keep something for a queue of the loop, until ``send``; what is urgent is not held."""
        self._given.append((queue, item))
        self._is_urgent |= is_urgent

    def send(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have the loop take what is there: at once, or when it looks next. RuntimeError where it has ended."""
        if self._is_called or not self._given or (self._is_looking and not self._is_urgent):
            return
        self._is_called, self._is_urgent = True, False
        loop.call_soon_threadsafe(self._deliver, loop)

    def _deliver(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand over what is there; while something comes, look again every ``HELD_S``."""
        # First: what is put after the last of it was taken is sent again.
        self._is_called = self._is_looking = False
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        has_come = bool(self._given)
        while self._given:
            queue, item = self._given.popleft()
            queue.put_nowait(item)
        if has_come:
            self._next_look = loop.call_later(HELD_S, self._deliver, loop)
            self._is_looking = True


_posts: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, _Post]] = WeakKeyDictionary()


class Conversation:
    """One request at the engine, for one reader in an event loop; ``close`` ends what is left of it.

    policy: what it makes of each reply is given. seed: of the draws, a fresh one where none was given.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, policy: Policy = NO_POLICY) -> None:
        self.engine, self.tokenizer, self.policy = engine, tokenizer, policy
        self.seed = 0
        self._queue = asyncio.Queue[Piece | Choice]()
        self._loop = asyncio.get_running_loop()
        self._post = _posts.setdefault(self._loop, _Post())
        self._jobs: list[Job] = []

    async def read(self, order: Order) -> Ended:
        """Read a text without a reply."""
        done = asyncio.Queue[Ended]()

        def ended(end: Ended) -> None:
            self._post.put(done, end, is_urgent=True)
            self._send()

        self._submit(replace(order, max_tokens=0, ended=ended))
        return _require_whole(await done.get())

    async def write(self, order: Order, wish: Wish) -> AsyncIterator[list[Piece | Choice]]:
        """What has come of all choices, pieces and each choice when it has ended; the text is read once."""
        self.seed = secrets.randbits(63) if wish.random_seed is None else wish.random_seed
        if wish.n > 1 and order.token_ids:
            order = replace(order, moment=(await self.read(order)).moment, token_ids=())
        for choice in range(wish.n):
            self._begin(order, wish, choice)
        n_left = wish.n
        while n_left:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            yield items
            for end in [item.end for item in items if isinstance(item, Choice)]:
                _require_whole(end)
                n_left -= 1

    def close(self) -> None:
        """End what is still at work, before its next token."""
        for job in self._jobs:
            job.cancel()

    def _begin(self, order: Order, wish: Wish, choice: int) -> None:
        is_laid_out = wish.is_reply and self.tokenizer.chat_template is None
        stops = StopTexts(
            self.tokenizer,
            (END_OF_REPLY, *wish.stops) if is_laid_out else wish.stops,
            is_trimmed=wish.is_reply,
            ends=ends_of(self.tokenizer),
        )
        judged = self.policy.stream("output", self.engine.emit)
        is_first = True

        def drawn(token: Drawn) -> bool:
            nonlocal is_first
            piece = Piece(choice, judged.feed(stops.feed(token.token_id)), token)
            self._post.put(self._queue, piece, is_urgent=is_first)
            is_first = False
            if self._queue.qsize() > MOST_UNREAD:
                self.close()
            return stops.found is not None or judged.blocked is not None

        def ended(end: Ended) -> None:
            rest = judged.feed(stops.finish()) + judged.finish()
            if rest:
                self._post.put(self._queue, Piece(choice, rest, None), is_urgent=True)
            is_redacted = any(hit.action == "redact" for hit in judged.hits)
            choice_of = Choice(choice, end, stops.found, judged.blocked is not None, is_redacted)
            self._post.put(self._queue, choice_of, is_urgent=True)
            self._send()

        self._submit(
            replace(
                order,
                max_tokens=wish.max_tokens,
                sampling=wish.sampling,
                random_seed=self.seed,
                choice=choice,
                n_top=wish.n_top,
                drawn=drawn,
                handed=self._send,
                ended=ended,
            )
        )

    def _submit(self, order: Order) -> None:
        self._jobs.append(self.engine.submit(order))

    def _send(self) -> None:
        try:
            self._post.send(self._loop)
        except RuntimeError:  # the loop has ended, and with it whoever waited
            self.close()


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
