"""Rows of many sessions that read one token together, and which numbers of rows give each the bits it has alone.

The native core (``models.decoding``) gives a row the same bits in a batch of any size, whatever the others have read.
Where it does not take a model, torch reads rows that are alike.

A matrix product sums in another order for another number of rows: of one or two rows torch makes other bits than of
four, and of a width that is no multiple of a vector register the last elements of a batch are others. So a row never
reads alone in a batch of one: alone, it is repeated to the least size of ``exact_sizes``, and a larger batch is used
where it was found, on this machine and for this model, to give every row at every place the bits of the least.
"""

from collections.abc import Iterator, Sequence
from typing import Final, Generic, TypeVar

import torch
from torch import Tensor, nn

from meristem.device.random import stream as random_stream
from meristem.memory.state import State, alike_by, clone, flatten, join_rows, put_rows, select_rows, take_rows
from meristem.models.decoding import Decoding
from meristem.models.recorded import Reader, Steps
from meristem.serve.moment import portion
from meristem.shapes import Tokens

Owner = TypeVar("Owner")
LEAST: Final = 4
"""Rows of the smallest batch: with fewer, products become sums over a vector, which are rounded otherwise."""

CHECKED_LENGTHS: Final = (1, 29, 100)
"""Tokens that the rows of ``exact_sizes`` have read before."""

CHECKED_STEPS: Final = 2
CHECKED_TEXTS: Final = 8


class Batch(Generic[Owner]):
    """Rows that are alike but for the values of their states, stacked; a row without an owner reads token 0.

    What a row reads depends on no other row: a free one may hold anything, NaN too.
    """

    def __init__(self, reader: Reader, state: State, owners: Sequence[Owner | None]) -> None:
        """state: of as many rows as there are owners; it is changed in place from here on."""
        self.reader, self.state = reader, state
        self._steps = Steps(reader)
        self.owners: list[Owner | None] = list(owners)

    @classmethod
    def of(cls, reader: Reader, size: int, rows: Sequence[tuple[State, Owner]]) -> "Batch[Owner]":
        """A batch of rows that have the same ``alike_by``, each with its owner; what is left over repeats the first."""
        states = [state for state, _ in rows]
        n_free = size - len(rows)
        return cls(
            reader, join_rows([*states, *states[:1] * n_free]), [*(owner for _, owner in rows), *[None] * n_free]
        )

    @property
    def size(self) -> int:
        return len(self.owners)

    @property
    def key(self) -> object:
        """Rows with the same key may stand in one batch."""
        return id(self.reader), alike_by(self.state)

    def taken(self) -> Iterator[tuple[int, Owner]]:
        """The places with an owner."""
        return ((at, owner) for at, owner in enumerate(self.owners) if owner is not None)

    def put(self, state: State, owner: Owner) -> None:
        """Give a free place to a row; there must be one."""
        at = self.owners.index(None)
        self.state = put_rows(self.state, at, state)
        self.owners[at] = owner

    def row(self, at: int) -> State:
        """A copy of the state of one row."""
        return clone(take_rows(self.state, at, at + 1))

    def read(self, token_ids: Sequence[int]) -> Tensor:
        """One token for each row; the predictions of the next, ``(size, vocabulary)``."""
        logits_bo, self.state = self._steps(token_ids, self.state)
        return logits_bo


class NativeBatch(Generic[Owner]):
    """Rows of one reader that the native core reads, whatever each has read; as many as there are owners.

    A row that has lost its owner is read once more at most, and then has no place.
    """

    def __init__(self, reader: Reader, rows: Sequence[tuple[Decoding, Owner]]) -> None:
        """rows: one each, which the core takes."""
        (self._rows, first), *others = rows
        self.reader = reader
        self.owners: list[Owner | None] = [first]
        self.add(others)

    @property
    def size(self) -> int:
        return len(self.owners)

    def taken(self) -> Iterator[tuple[int, Owner]]:
        """The places with an owner."""
        return ((at, owner) for at, owner in enumerate(self.owners) if owner is not None)

    def add(self, rows: Sequence[tuple[Decoding, Owner]]) -> None:
        """Give places to more rows, each with its owner."""
        if rows:
            self._rows.extend([row for row, _ in rows])
            self.owners += [owner for _, owner in rows]

    def close_up(self) -> None:
        """Leave no place without an owner; there must be one with."""
        if None in self.owners:
            places = [at for at, _ in self.taken()]
            self._rows.select(places)
            self.owners = [self.owners[at] for at in places]

    def row(self, at: int) -> State:
        """A copy of the state of one row."""
        return self._rows.row(at)

    def read(self, token_ids: Sequence[int]) -> Tensor:
        """One token for each row; the predictions of the next, ``(size, vocabulary)``."""
        return self._rows.step(token_ids)


def exact_sizes(reader: Reader, n_ids: int, most: int, device: torch.device | str = "cpu") -> tuple[int, ...]:
    """The numbers of rows, ascending, in which a batch gives each row the bits that it has in a batch of the least.

    (1,) where there are none, or the reader takes one row at a time: then rows read one by one. Random texts are read
    to several lengths, and then on, each row with tokens of its own, in batches of every size, at every place of the
    least batch and of the larger ones. A size that differs anywhere in a logit or a state is left out.

    n_ids: of the vocabulary. most: rows of the largest batch, at least ``LEAST``.
    """
    if not isinstance(reader, nn.Module):
        return (1,)
    sizes = [LEAST]
    while sizes[-1] * 2 <= most:
        sizes.append(sizes[-1] * 2)
    generator = random_stream(0, "serve.exact_sizes")
    for n_read in CHECKED_LENGTHS:
        texts_bt = torch.randint(n_ids, (min(CHECKED_TEXTS, sizes[-1]), n_read), generator=generator)
        of_text = [row % len(texts_bt) for row in range(sizes[-1])]
        begun = select_rows(_prefilled(reader, texts_bt.to(device)), of_text)
        later_bt = torch.randint(n_ids, (sizes[-1], CHECKED_STEPS), generator=generator)
        sizes = _exact_for(reader, begun, later_bt, sizes, torch.randperm(sizes[-1], generator=generator).tolist())
        if LEAST not in sizes:
            return (1,)
    return tuple(sizes)


def _exact_for(
    reader: nn.Module, begun: State, later_bt: Tokens, sizes: Sequence[int], places: Sequence[int]
) -> list[int]:
    """The sizes in which rows, put into other places, are read on as in batches of the least in their own order."""
    truth = _read_on(reader, begun, later_bt, LEAST, range(len(later_bt)))
    exact = []
    for size in sizes:
        rows = places if size == LEAST else places[:size]
        if _is_same(select_rows(truth, rows), _read_on(reader, begun, later_bt, size, rows)):
            exact.append(size)
    return exact


def _prefilled(reader: nn.Module, tokens_bt: Tokens) -> State:
    """The state after some texts of one length."""
    state, at_once = None, portion(reader)
    with torch.no_grad():
        for first in range(0, tokens_bt.shape[1], at_once):
            _, state = reader(tokens_bt[:, first : first + at_once], state)
    return state or {}


def _read_on(reader: Reader, state: State, later_bt: Tokens, size: int, rows: Sequence[int]) -> State:
    """What some rows, read on in batches of one size in the order given, come to: their state, and all predictions."""
    after = []
    for first in range(0, len(rows), size):
        here = rows[first : first + size]
        batch = Batch(reader, select_rows(state, here), here)
        logits = [batch.read(later_bt[list(here), step].tolist()) for step in range(later_bt.shape[1])]
        after.append(batch.state | {f"step_{step}_bo": logits_bo for step, logits_bo in enumerate(logits)})
    return join_rows(after)


def _is_same(truth: State, found: State) -> bool:
    leaves = flatten(found)
    return all(
        torch.equal(leaf, leaves[name]) if isinstance(leaf, Tensor) else leaf == leaves[name]  # type: ignore[arg-type]
        for name, leaf in flatten(truth).items()
    )
