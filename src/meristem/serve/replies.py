"""From the thread of the engine to those who wait for a reply."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from meristem.data.tokenizer import Tokenizer
from meristem.errors import MeristemError, WorkerTimeout
from meristem.models.generate import Sampling
from meristem.serve.engine import Drawn, Ended, Engine, Job, Order, Reason
from meristem.serve.stops import StopTexts

MOST_UNREAD: Final = 1024
"""Tokens that wait for a slow reader; with more of them the reply is given up."""


class Piece(NamedTuple):
    """What a token adds to a choice: often no text. token: None for text that was held back to the end."""

    choice: int
    text: str
    token: Drawn | None


class Choice(NamedTuple):
    """How a choice ended. stop: the text that ended it."""

    choice: int
    end: Ended
    stop: str | None


@dataclass(frozen=True)
class Wish:
    """How a reply is to be written. n: choices. trims: white space before the first word is no part of a reply."""

    max_tokens: int
    sampling: Sampling
    random_seed: int | None = None
    n: int = 1
    stops: tuple[str, ...] = ()
    n_top: int | None = None
    trims: bool = False


class Conversation:
    """One request at the engine, for one reader in an event loop; ``close`` ends what is left of it.

    seed: of the draws, a fresh one where none was given.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.seed = 0
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Piece | Choice]()
        self._jobs: list[Job] = []

    async def read(self, order: Order) -> Ended:
        """Read a text without a reply."""
        done = asyncio.Queue[Ended]()
        self._submit(replace(order, max_tokens=0, ended=lambda end: self._hand(done, end)))
        return _require_whole(await done.get())

    async def write(self, order: Order, wish: Wish) -> AsyncIterator[Piece | Choice]:
        """The pieces of all choices as they come, and each choice when it has ended; the text is read once."""
        self.seed = secrets.randbits(63) if wish.random_seed is None else wish.random_seed
        if wish.n > 1 and order.token_ids:
            order = replace(order, moment=(await self.read(order)).moment, token_ids=())
        for choice in range(wish.n):
            self._begin(order, wish, choice)
        n_left = wish.n
        while n_left:
            item = await self._queue.get()
            if isinstance(item, Choice):
                _require_whole(item.end)
                n_left -= 1
            yield item

    def close(self) -> None:
        """End what is still at work, before its next token."""
        for job in self._jobs:
            job.cancel()

    def _begin(self, order: Order, wish: Wish, choice: int) -> None:
        stops = StopTexts(self.tokenizer, wish.stops, is_trimmed=wish.trims)

        def drawn(token: Drawn) -> bool:
            self._hand(self._queue, Piece(choice, stops.feed(token.token_id), token))
            if self._queue.qsize() > MOST_UNREAD:
                self.close()
            return stops.found is not None

        def ended(end: Ended) -> None:
            rest = stops.finish()
            if rest:
                self._hand(self._queue, Piece(choice, rest, None))
            self._hand(self._queue, Choice(choice, end, stops.found))

        self._submit(
            replace(
                order,
                max_tokens=wish.max_tokens,
                sampling=wish.sampling,
                random_seed=self.seed,
                choice=choice,
                n_top=wish.n_top,
                drawn=drawn,
                ended=ended,
            )
        )

    def _submit(self, order: Order) -> None:
        self._jobs.append(self.engine.submit(order))

    def _hand(self, queue: asyncio.Queue, item: object) -> None:
        """Put something into a queue of the event loop, from the thread of the engine."""
        try:
            self._loop.call_soon_threadsafe(queue.put_nowait, item)
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


def finish_reason(reason: Reason) -> str:
    """As the OpenAI API says it."""
    return "stop" if reason == "stop" else "length"


def texts_of(pieces: Sequence[Piece], n: int) -> list[str]:
    """The whole texts of all choices."""
    return ["".join(piece.text for piece in pieces if piece.choice == choice) for choice in range(n)]
