"""One model that reads and writes for many sessions at once: continuous batching over states.

Work comes as orders: a moment to begin at, text to read, tokens to write. A round reads portions of long texts, up to
``READ_PER_ROUND`` tokens and each order in its turn, and then writes one token for every order that is writing, many
rows together (``serve.batch``). Orders come and go between rounds. What an order gives depends on no other:
its portions are cut by its own text, and its row has the same bits in every batch.
"""

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from meristem.device.random import key as random_key
from meristem.errors import NonFinite, QueueFull, WorkerDied
from meristem.events import Emit, Event, silent
from meristem.memory.state import State, alike_by
from meristem.models.decoding import Decoding, refusal
from meristem.models.generate import Sampling
from meristem.models.recorded import Reader
from meristem.serve.batch import Batch, NativeBatch, exact_sizes
from meristem.serve.draw import Drawn, Draws, Wanted
from meristem.serve.moment import READ_AT_ONCE, Moment, read, surprise

READ_PER_ROUND: Final = READ_AT_ONCE
"""Tokens of texts that a round reads at most: by this much reading holds up those that write."""

Reason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True)
class Ended:
    """How an order ended, and the moment that it came to, which has read every token drawn.

    nats: surprise of the text that was read. seconds: since the order was given. error: where the reason is "error".
    """

    reason: Reason
    moment: Moment
    n_drawn: int
    nats: float
    seconds: float
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be read and written from a moment on.

    portion: tokens read at once, at most. max_tokens: to write; 0 reads only. choice: draws of different choices have
    nothing to do with each other. n_top: alternatives of ``Drawn``; None without logarithms of probabilities.
    drawn: is given every token, in the thread of the engine, and returns True to end the reply there.
    handed: is called when all rows of a batch were given theirs, once for all that have the same. ended: is given the
    end, once. None of them may wait.
    deadline_s: seconds until the order is given up.
    """

    reader: Reader
    moment: Moment
    token_ids: tuple[int, ...] = ()
    portion: int = READ_AT_ONCE
    max_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    random_seed: int = 0
    choice: int = 0
    n_top: int | None = None
    deadline_s: float | None = None
    drawn: Callable[[Drawn], bool] = lambda drawn: False
    handed: Callable[[], None] = lambda: None
    ended: Callable[[Ended], None] = lambda ended: None


class Job:
    """An order on its way: at ``moment`` while it reads, then a row of a batch.

    logits_bo: while it writes, the prediction of its next token, as far as its ``_Rows`` have not gone on without it.
    wanted, drawn: of the order. until: when it is late, in ``time.monotonic``.
    """

    # Every job is read for every token: without a dictionary it takes half of the time.
    __slots__ = (
        *("order", "moment", "n_read", "n_drawn", "nats", "begun_at", "until", "is_cancelled"),
        *("logits_bo", "wanted", "drawn", "max_tokens"),
    )

    def __init__(self, order: Order) -> None:
        self.order, self.moment = order, order.moment
        self.n_read, self.n_drawn, self.nats = 0, 0, 0.0
        self.begun_at = time.monotonic()
        self.until = math.inf if order.deadline_s is None else self.begun_at + order.deadline_s
        self.is_cancelled = False
        self.logits_bo: Tensor | None = None
        self.wanted = Wanted(order.sampling, random.Random(), order.n_top)
        self.drawn, self.max_tokens = order.drawn, order.max_tokens

    def cancel(self) -> None:
        """End before the next token; from any thread."""
        self.is_cancelled = True

    @property
    def is_reading(self) -> bool:
        return self.n_read < len(self.order.token_ids)

    def broken_off(self, now: float) -> Reason | None:
        """Why it ends here, where it does not end by itself. now: of ``time.monotonic``."""
        return "cancelled" if self.is_cancelled else "deadline" if now > self.until else None


class Tally(Protocol):
    """Counts what the engine does, in its thread; nothing of it may wait. Times are those of ``time.monotonic``."""

    def has_read(self, n_tokens: int, nats: float) -> None:
        """A portion of a text was read, with this surprise in all."""

    def drew(self, n_tokens: int, gap_s: float, firsts_s: Sequence[float]) -> None:
        """So many tokens were drawn, one of each order. firsts_s: of those that are the first of theirs, the time since
        the order; gap_s: of the others, since the token before."""

    def ended(self, reason: Reason, seconds: float) -> None:
        """An order ended."""


Row: TypeAlias = tuple[State, Job]


@dataclass
class _Rows:
    """The rows of a batch that write, as long as none joins or leaves.

    logits_bo: the predictions of their next tokens, in their order. drawn_at: when the last were drawn, None before.
    """

    rows: list[tuple[int, Job]]
    draws: Draws
    handed: set[Callable[[], None]]
    logits_bo: Tensor
    drawn_at: float | None = None


class Engine:
    """Rounds of reading and writing. ``step`` is one of them; ``start`` runs them in a thread of its own.

    most_rows: orders at work at once. most_waiting: orders that wait for a place; one more is refused. tally: set
    before the start.
    """

    def __init__(
        self, n_ids: int, *, most_rows: int = 64, most_waiting: int = 256, device: str = "cpu", emit: Emit = silent
    ) -> None:
        self.n_ids, self.most_rows, self.most_waiting = n_ids, most_rows, most_waiting
        self.device, self.emit = device, emit
        self.n_at_work = 0
        self.tally: Tally | None = None
        self._new: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self._joining: list[Job] = []
        self._batches: list[Batch[Job] | NativeBatch[Job]] = []
        self._rows: dict[int, _Rows] = {}
        self._has_left, self._wrote_at = False, time.monotonic()
        self._sizes: dict[int, tuple[Reader, tuple[int, ...]]] = {}
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def prepare(self, reader: Reader) -> None:
        """Pack its weights for the native core, or find the batches in which this reader is exact, which takes seconds;
        else its first order has to wait."""
        if refusal(reader):
            self._exact_sizes(reader)

    def _exact_sizes(self, reader: Reader) -> tuple[int, ...]:
        if id(reader) not in self._sizes:
            sizes = exact_sizes(reader, self.n_ids, self.most_rows, self.device)
            if sizes == (1,) and isinstance(reader, nn.Module):
                payload = {"what": "batches", "reason": "rows depend on their batch, so they are read one by one"}
                self.emit(Event("degraded", payload, "warning"))
            # The reader is kept, so that no other can come to have its id.
            self._sizes[id(reader)] = reader, sizes
        return self._sizes[id(reader)][1]

    def submit(self, order: Order) -> Job:
        """Take an order; from any thread. QueueFull where too many wait, WorkerDied where the engine has ended."""
        job = Job(order)
        with self._changed:
            if self._is_closing:
                raise WorkerDied("the engine is closed and takes no more work. Start the server again.")
            if len(self._new) >= self.most_waiting:
                raise QueueFull(
                    f"{len(self._new)} requests wait already, which is the most. Try again later.",
                    waiting=len(self._new),
                    limit=self.most_waiting,
                )
            self._new.append(job)
            self._changed.notify()
        return job

    @property
    def n_waiting(self) -> int:
        """Orders that have no place yet."""
        return len(self._new)

    @property
    def has_ended(self) -> bool:
        """Whether it was stopped, or failed, and does no more."""
        return self._is_closing and not (self._thread and self._thread.is_alive())

    def start(self) -> None:
        """Run rounds in a thread, until ``close``."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Have every order end where it is, and then the thread; from any thread, or a signal."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def close(self) -> None:
        """Stop, and wait for it."""
        self.stop()
        if self._thread is None:
            self._end_all()
        else:
            self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not (self._new or self.n_at_work or self._is_closing):
                        self._changed.wait()
                    if self._is_closing:
                        break
                self.step()
        finally:
            with self._changed:
                self._is_closing = True
            self._end_all()

    @torch.no_grad()
    def step(self) -> None:
        """One round."""
        self._break_off()
        self._take_in()
        self._read_portions()
        self._join()
        for batch in self._batches:
            self._write(batch)

    @torch.no_grad()
    def _end_all(self) -> None:
        with self._changed:
            waiting, self._new = list(self._new), deque()
        for job in waiting:
            self._end(job, "cancelled")
        for job in [*self._reading, *self._joining]:
            self._finish(job, "cancelled")
        self._settle()
        for batch in self._batches:
            for at, job in batch.taken():
                self._leave(batch, at, job, "cancelled")

    def _break_off(self) -> None:
        """End what was cancelled or is late, also what still waits."""
        now = time.monotonic()
        with self._changed:
            waiting = [job for job in self._new if job.broken_off(now)]
            for job in waiting:
                self._new.remove(job)
        for job in waiting:
            self._end(job, job.broken_off(now) or "cancelled")
        for job in [job for job in self._reading if job.broken_off(now)]:
            self._reading.remove(job)
            self._finish(job, job.broken_off(now) or "cancelled")
        broken_off = [
            (batch, at, job)
            for batch in self._batches
            for at, job in batch.taken()
            if job.is_cancelled or now > job.until
        ]
        if broken_off:
            self._settle()
        for batch, at, job in broken_off:
            self._leave(batch, at, job, job.broken_off(now) or "cancelled")

    def _take_in(self) -> None:
        with self._changed:
            n_taken = min(len(self._new), self.most_rows - self.n_at_work)
            taken = [self._new.popleft() for _ in range(n_taken)]
        self.n_at_work += n_taken
        for job in taken:
            if job.is_reading:
                self._reading.append(job)
            else:
                self._has_read(job)

    def _read_portions(self) -> None:
        """Each order in its turn, one portion, until the round has read enough."""
        n_left = READ_PER_ROUND
        while self._reading and n_left > 0:
            job = self._reading.popleft()
            ids = job.order.token_ids[job.n_read : job.n_read + job.order.portion]
            before = job.moment
            try:
                job.moment, logits_bto = read(job.order.reader, before, ids, self.device)
                nats = surprise(before.logits_bo, logits_bto, ids)
            except Exception as error:  # noqa: BLE001 - one order may fail, not the engine
                self._finish(job, "error", error)
                continue
            if self.tally:
                self.tally.has_read(len(ids), nats)
            job.nats += nats
            job.n_read += len(ids)
            n_left -= len(ids)
            if job.is_reading:
                self._reading.append(job)
            else:
                self._has_read(job)

    def _has_read(self, job: Job) -> None:
        order, moment = job.order, job.moment
        if not order.max_tokens:
            self._finish(job, "length")
            return
        if moment.logits_bo is None:
            why = NonFinite("nothing was read, so there is no prediction. Give a text to begin with.")
            self._finish(job, "error", why)
            return
        job.logits_bo = moment.logits_bo
        job.wanted.random.seed(random_key(order.random_seed, "serve.sample", moment.n_tokens, order.choice))
        self._joining.append(job)

    def _join(self) -> None:
        """Give rows to the orders that begin to write; put batches together that have become alike."""
        if not (self._joining or self._has_left or any(isinstance(batch, Batch) for batch in self._batches)):
            return
        self._settle()
        self._has_left = False
        # An empty batch may be of one row, whose tensors are not its own: a place in it is no place.
        self._batches = [batch for batch in self._batches if any(batch.taken())]
        native = [batch for batch in self._batches if isinstance(batch, NativeBatch)]
        others = [batch for batch in self._batches if isinstance(batch, Batch)]
        rows = [(Decoding(job.order.reader, job.moment.state or {}), job) for job in self._joining]
        self._joining.clear()
        self._batches = [
            *_native_joined(native, [(row, job) for row, job in rows if not row.refusal]),
            *self._joined(others, [job for row, job in rows if row.refusal]),
        ]

    def _joined(self, batches: list[Batch[Job]], joining: Sequence[Job]) -> list[Batch[Job]]:
        """The batches that torch reads, with those who join them."""
        begun: dict[object, list[Row]] = {}
        for job in joining:
            reader, state = job.order.reader, job.moment.state or {}
            try:
                key = id(reader), alike_by(state)
            except ValueError as error:  # a state that names no rows
                self._finish(job, "error", error)
                continue
            batch = next((each for each in batches if None in each.owners and each.key == key), None)
            if batch is None:
                begun.setdefault(key, []).append((state, job))
            else:
                batch.put(state, job)
        for rows in begun.values():
            batches += self._stacked(rows)
        groups: dict[object, list[Batch[Job]]] = {}
        for batch in batches:
            groups.setdefault(batch.key, []).append(batch)
        return [batch for group in groups.values() for batch in self._packed(group)]

    def _packed(self, batches: list[Batch[Job]]) -> list[Batch[Job]]:
        """Batches of one key, in fewer of them or in half of the rows where that holds their orders."""
        n_rows = sum(1 for batch in batches for _ in batch.taken())
        sizes = _cut(n_rows, self._exact_sizes(batches[0].reader))
        if len(sizes) == len(batches) and 2 * sum(sizes) > sum(batch.size for batch in batches):
            return batches
        return self._stacked([(batch.row(at), job) for batch in batches for at, job in batch.taken()])

    def _stacked(self, rows: list[Row]) -> list[Batch[Job]]:
        """Rows with one key in batches of exact sizes."""
        made, first = [], 0
        reader = rows[0][1].order.reader
        for size in _cut(len(rows), self._exact_sizes(reader)):
            made.append(Batch.of(reader, size, rows[first : first + size]))
            first += size
        return made

    def _settle(self) -> None:
        """Give every row that writes its own prediction, so that rows may join, leave and change places."""
        for rows in self._rows.values():
            for (_, job), row_bo in zip(rows.rows, rows.logits_bo.split(1), strict=True):
                job.logits_bo = row_bo
        self._rows.clear()

    def _rows_of(self, batch: Batch[Job] | NativeBatch[Job]) -> _Rows:
        found = self._rows.get(id(batch))
        if found is None:
            rows = list(batch.taken())
            draws, handed = Draws([job.wanted for _, job in rows]), {job.order.handed for _, job in rows}
            logits_bo = torch.cat([job.logits_bo for _, job in rows if job.logits_bo is not None])
            found = self._rows[id(batch)] = _Rows(rows, draws, handed, logits_bo)
        return found

    def _write(self, batch: Batch[Job] | NativeBatch[Job]) -> None:
        """Draw a token for every row of a batch, read it, and hand it out."""
        writing = self._rows_of(batch)
        found = writing.draws.draw(writing.logits_bo)
        tokens = [token for token in found if not isinstance(token, NonFinite)]
        if len(tokens) < len(found):
            self._settle()
            for (at, job), why in zip(writing.rows, found, strict=True):
                if isinstance(why, NonFinite):
                    self._leave(batch, at, job, "error", why)
            if not tokens:
                return
            writing = self._rows_of(batch)
        token_ids = [0] * batch.size
        for (at, _), token in zip(writing.rows, tokens, strict=True):
            token_ids[at] = token.token_id
        try:
            logits_bo = batch.read(token_ids)
        except Exception as error:  # noqa: BLE001 - its rows fail, not the engine
            self._settle()
            for at, job in writing.rows:
                self._leave(batch, at, job, "error", error)
            return
        is_full = len(tokens) == batch.size
        writing.logits_bo = logits_bo if is_full else logits_bo[[at for at, _ in writing.rows]]
        self._hand_out(batch, writing, tokens)

    def _hand_out(self, batch: Batch[Job] | NativeBatch[Job], writing: _Rows, tokens: Sequence[Drawn]) -> None:
        """Give every row the token that it has drawn and read; those for which it is the last leave."""
        now = time.monotonic()
        if self.tally:
            firsts_s = [now - job.begun_at for _, job in writing.rows if not job.n_drawn]
            self.tally.drew(len(tokens), now - (writing.drawn_at or self._wrote_at), firsts_s)
        self._wrote_at = writing.drawn_at = now
        leaving: list[tuple[int, Job, Reason, Exception | None]] = []
        for (at, job), token in zip(writing.rows, tokens, strict=True):
            job.n_drawn += 1
            try:
                is_over = job.drawn(token)
            except Exception as error:  # noqa: BLE001 - who listens may fail, not the engine
                leaving.append((at, job, "error", error))
                continue
            if is_over or job.n_drawn == job.max_tokens:
                leaving.append((at, job, "stop" if is_over else "length", None))
        if leaving:
            self._settle()
            for each in leaving:
                self._leave(batch, *each)
        for handed in writing.handed:
            handed()

    def _leave(
        self, batch: Batch[Job] | NativeBatch[Job], at: int, job: Job, reason: Reason, error: Exception | None = None
    ) -> None:
        """End an order that has a row, and free the row; after ``_settle``."""
        logits_bo = None if job.logits_bo is None else job.logits_bo.clone()
        job.moment = Moment(batch.row(at), logits_bo, job.moment.n_tokens + job.n_drawn)
        batch.owners[at] = None
        self._has_left = True
        self._finish(job, reason, error)

    def _finish(self, job: Job, reason: Reason, error: Exception | None = None) -> None:
        """End an order that has a place."""
        self.n_at_work -= 1
        self._end(job, reason, error)

    def _end(self, job: Job, reason: Reason, error: Exception | None = None) -> None:
        if error is not None:
            payload = {"error": type(error).__name__, "message": str(error)}
            self.emit(Event("order_failed", payload, "error"))
        seconds = time.monotonic() - job.begun_at
        if self.tally:
            self.tally.ended(reason, seconds)
        job.order.ended(Ended(reason, job.moment, job.n_drawn, job.nats, seconds, error))


def _native_joined(
    batches: list[NativeBatch[Job]], joining: Sequence[tuple[Decoding, Job]]
) -> Iterable[NativeBatch[Job]]:
    """The batches that the native core reads, one for each reader, with those who join them and no free place."""
    of_reader = {id(batch.reader): batch for batch in batches}
    begun: dict[int, list[tuple[Decoding, Job]]] = {}
    for row, job in joining:
        begun.setdefault(id(job.order.reader), []).append((row, job))
    for batch in batches:
        batch.close_up()
    for reader_id, rows in begun.items():
        if reader_id in of_reader:
            of_reader[reader_id].add(rows)
        else:
            of_reader[reader_id] = NativeBatch(rows[0][1].order.reader, rows)
    return of_reader.values()


def _cut(n_rows: int, sizes: tuple[int, ...]) -> list[int]:
    """Batches for some rows: the largest there are, and the least that holds the rest."""
    whole, rest = divmod(n_rows, sizes[-1])
    return [sizes[-1]] * whole + [min(size for size in sizes if size >= rest)] * bool(rest)
