"""What happened in a turn: the surprise of each token, what the memory became, and what earlier text a reply drew on.

Nothing of it is stored. The turn is read once more from where the session stood before it, and again from other
memories; what differs between two readings is what the memory did. A session never changes by it.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from statistics import median
from typing import Final, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from meristem.errors import NoSession
from meristem.evaluate.memory import half_lives_of, weights_in
from meristem.memory import Gates
from meristem.memory.state import State
from meristem.models.load import numbers
from meristem.models.online import LEARNED, frozen, online_reader
from meristem.models.recorded import Reader
from meristem.models.weights import sharing_weights
from meristem.nn.gates import GateMap
from meristem.serve.moment import FRESH, Moment, portion, read
from meristem.serve.session import KEPT_TURNS, memories_in
from meristem.serve.sessions import Sessions, TurnRecord
from meristem.train.loss import cross_entropy

MOST_COMPARED: Final = 512
"""Tokens of a turn that are read from each of several memories."""

REMEMBERED: Final = frozenset({"memory", "kept"})
"""Under these names a state holds what memories learned."""

NEVER: Final = 1e9
"""Tokens; a longer half-life is as good as none."""


class TokenReadings(TypedDict):
    """The tokens of a turn in order, the first ``n_read`` read and the others written by the session.

    texts: empty where a token ends inside a character. nats: of each given all before it, None where nothing was
    before it. nats_without: the same, had the memory been empty at the beginning of the turn.
    """

    n_read: int
    texts: list[str]
    nats: list[float | None]
    nats_without: list[float | None]


class LayerTurn(TypedDict):
    """One memory over a turn. norm: at its end. change: norm of the difference to its beginning; None where the two
    have different shapes. half_life: tokens, the median of its heads with the gates of this turn; None for never."""

    norm: float
    change: float | None
    half_life: float | None


class TurnReading(TypedDict):
    """One turn. n_left_out: tokens at its end that are not shown."""

    object: Literal["turn.reading"]
    turn: int
    n_left_out: int
    tokens: TokenReadings
    layers: dict[str, LayerTurn]


class Source(TypedDict):
    """Turns ``first`` to ``last``, and by how many nats likelier the memory of them made what is measured."""

    first: int
    last: int
    nats: float


class TurnSources(TypedDict):
    """What the reply of a turn drew on; of a turn without one, the reading of its text.

    nats: of the ``n_tokens`` measured, as it was. nats_without: with an empty memory. nats_fresh: in a session that
    begins with this turn. So ``nats_fresh - nats_without`` came through what else a session carries, mostly attention
    to the last tokens, and ``nats_without - nats`` through the memory; the sources add up to the second.
    """

    object: Literal["turn.sources"]
    turn: int
    measured: Literal["reply", "text"]
    n_tokens: int
    nats: float
    nats_without: float
    nats_fresh: float
    sources: list[Source]


class TurnViews:
    """Looks into the turns of sessions; from any thread, one turn at a time.

    NoSession where the state before a turn, or the tokens of the turn, are not kept.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions, self._lock = sessions, threading.Lock()
        # Modules of its own: what is heard of their gates is of no other reading.
        self._model = sharing_weights(sessions.model)

    def reading(self, session_id: str, turn: int, owner: str = "") -> TurnReading:
        """Each token of a turn with its surprise, and each memory before and after."""
        found, before = self._begun(session_id, turn, owner)
        after = self._sessions.moment_after(session_id, turn, owner)
        with self._lock, _gates_of(self._model) as heard:
            reader = self._reader(session_id, owner)
            nats = self._nats(reader, before, found.said.ids)
            half_lives = _half_lives(heard)
            without = nats
            if before.state is not None:
                without = self._nats(reader, self._with_memory_of(before, None), found.said.ids)
        return {
            "object": "turn.reading",
            "turn": turn,
            "n_left_out": found.said.n_read + found.said.n_drawn - len(nats),
            "tokens": {
                "n_read": min(found.said.n_read, len(nats)),
                "texts": self._texts(found.said.ids),
                "nats": nats,
                "nats_without": without,
            },
            "layers": self._layers(before, after, half_lives),
        }

    def sources(self, session_id: str, turn: int, owner: str = "") -> TurnSources:
        """What earlier turns gave to the reply of a turn, each by the memory of it.

        The turn is read from its own beginning with the memory that the session had after each earlier turn in place of
        the latest. What is likelier with the memory after a turn than with the one before it, that turn gave. Turns
        whose memory is not kept count together with the next that is.
        """
        found, before = self._begun(session_id, turn, owner)
        ids = found.said.ids[:MOST_COMPARED]
        earlier = [
            each.turn for each in self._sessions.turns(session_id, owner) if each.turn < turn and each.can_return
        ]
        has_reply = found.said.n_read < len(ids)
        # The first token of all is left out: what it is predicted by was made with the memory as it was.
        begin, end = (max(found.said.n_read, 1), len(ids)) if has_reply else (1, len(ids))
        with self._lock:
            reader = self._reader(session_id, owner)

            def nats_from(moment: Moment) -> float:
                return sum(filter(None, self._nats(reader, moment, ids)[begin:end]))

            fresh, without = nats_from(FRESH), nats_from(self._with_memory_of(before, None))
            sources: list[Source] = []
            first, last_nats = 1, without
            for at in earlier[-KEPT_TURNS:]:
                memory = self._sessions.moment_after(session_id, at, owner)
                now = nats_from(before if at == turn - 1 else self._with_memory_of(before, memory))
                sources.append({"first": first, "last": at, "nats": last_nats - now})
                first, last_nats = at + 1, now
        return {
            "object": "turn.sources",
            "turn": turn,
            "measured": "reply" if has_reply else "text",
            "n_tokens": max(end - begin, 0),
            "nats": last_nats,
            "nats_without": without,
            "nats_fresh": fresh,
            "sources": sources,
        }

    def _begun(self, session_id: str, turn: int, owner: str) -> tuple[TurnRecord, Moment]:
        """A turn, and where the session stood before it."""
        turns = {each.turn: each for each in self._sessions.turns(session_id, owner)}
        if turn not in turns:
            raise NoSession(f"session '{session_id}' has no turn {turn}.", session=session_id, turn=turn)
        ids = turns[turn].said.ids
        if not ids or max(ids) >= self._sessions.tokenizer.vocab_size:
            raise NoSession(
                f"the tokens of turn {turn} are not kept, as they are of turns read since this version.",
                session=session_id,
                turn=turn,
            )
        return turns[turn], self._sessions.moment_after(session_id, turn - 1, owner)

    def _reader(self, session_id: str, owner: str) -> Reader:
        record = self._sessions.get(session_id, owner)
        return online_reader(self._model, record.learn, cross_entropy, record.learning)

    def _nats(self, reader: Reader, moment: Moment, ids: Sequence[int]) -> list[float | None]:
        """Of each token, read from a moment on; None for the first where nothing predicted it."""
        nats: list[float | None] = []
        at_once, device = portion(self._model), next(self._model.parameters()).device
        for first in range(0, len(ids), at_once):
            piece, before_bo = ids[first : first + at_once], moment.logits_bo
            moment, logits_bto = read(reader, moment, piece, device)
            earlier = [] if before_bo is None else [before_bo]
            predicted_to = torch.cat([*earlier, logits_bto[0, :-1]]).float()
            targets_t = torch.tensor(piece[len(piece) - len(predicted_to) :], dtype=torch.long, device=device)
            found = functional.cross_entropy(predicted_to, targets_t, reduction="none").tolist()
            nats += [None] * (len(piece) - len(found)) + found
        return nats

    def _with_memory_of(self, moment: Moment, other: Moment | None) -> Moment:
        """A moment with the memory of another, or of a session that has read nothing; it has no next prediction."""
        state = self._empty if other is None or other.state is None else other.state
        exchanged = None if moment.state is None else _exchanged(moment.state, state)
        return Moment(exchanged, None, moment.n_tokens)

    @cached_property
    def _empty(self) -> State:
        """A state whose memories nothing was written into."""
        device = next(self._model.parameters()).device
        with torch.no_grad():
            _, state = frozen(self._model)(torch.zeros(1, 1, dtype=torch.long, device=device), None)
        return state

    def _texts(self, ids: Sequence[int]) -> list[str]:
        characters = self._sessions.tokenizer.decoder()
        texts = [characters.feed(token_id) for token_id in ids]
        texts[-1] += characters.finish()
        return texts

    @torch.no_grad()
    def _layers(
        self, before: Moment, after: Moment, half_lives: Mapping[tuple[int, ...], float | None]
    ) -> dict[str, LayerTurn]:
        begun = dict(memories_in(self._empty if before.state is None else before.state))
        return {
            path: {
                "norm": _norm(_weights(memory)),
                "change": _difference(_weights(begun.get(path, {})), _weights(memory)),
                "half_life": half_lives.get(numbers(path)),
            }
            for path, memory in sorted(memories_in(after.state or {}), key=lambda each: numbers(each[0]))
        }


def _exchanged(state: State, other: State) -> State:
    """A state with the memories of another; what levels or weights learned is no memory, and stays."""
    after: State = {}
    for name, inner in state.items():
        if name in REMEMBERED and name in other:
            after[name] = other[name]
        elif isinstance(inner, dict) and name != LEARNED:
            after[name] = _exchanged(inner, other.get(name, {}))
        else:
            after[name] = inner
    return after


@contextmanager
def _gates_of(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """The retain factors that each gate map, by its path, gives while this lasts."""
    heard: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if isinstance(module, GateMap):
                hooks.enter_context(module.register_forward_hook(partial(_hear, heard, path)))
        yield heard


def _hear(heard: dict[str, list[Tensor]], path: str, module: nn.Module, inputs: object, gates: Gates) -> None:
    heard.setdefault(path, []).append(gates.retain_bth.detach().flatten(0, -2))


def _half_lives(heard: Mapping[str, Sequence[Tensor]]) -> dict[tuple[int, ...], float | None]:
    """Of each layer the median over heads, each with the mean of what its gates gave; None for never."""
    found: dict[tuple[int, ...], list[float]] = {}
    for path, retains in heard.items():
        found.setdefault(numbers(path), []).extend(half_lives_of(torch.cat(list(retains))))
    return {layer: middle if (middle := median(each)) < NEVER else None for layer, each in found.items()}


def _weights(memory: State) -> list[Tensor]:
    return [weight.double() for weight in weights_in({"memory": memory})]


def _norm(weights: Sequence[Tensor]) -> float:
    return float(sum(weight.square().sum() for weight in weights)) ** 0.5


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    if [each.shape for each in before] != [each.shape for each in after]:
        return None
    return _norm([now - then for then, now in zip(before, after, strict=True)])
