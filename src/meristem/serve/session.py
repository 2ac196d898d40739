"""A session: one reader's conversation and the memory it leaves.

A session reads text through the model's one forward and keeps the state that comes out. It keeps no tokens: what it
knows of the past is in that state, whose size does not grow, and so the time per token does not grow either.
"""

import copy
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypedDict, cast

import torch
from torch import Tensor, nn

from meristem.data.chat import END_OF_REPLY, Message, ends_of, message_ids
from meristem.data.tokenizer import Tokenizer
from meristem.device.random import stream as random_stream
from meristem.errors import CheckpointMismatch, WrongValue
from meristem.evaluate.memory import COPIES, half_lives_of, weights_in
from meristem.memory.state import State, size_bytes
from meristem.models.config import LearnConfig
from meristem.models.generate import BEGINNING, Sampling, choose
from meristem.models.load import numbers
from meristem.models.online import Learn, online_reader
from meristem.nn.neural_memory import NeuralMemory
from meristem.nn.self_reference import SelfReference
from meristem.serve import store
from meristem.serve.moment import (
    FRESH,
    Continuation,
    Moment,
    identity,
    moment_of,
    portion,
    read,
    require_same,
    surprise,
    tensors_of,
)
from meristem.train.loss import cross_entropy

KEPT_TURNS: Final = 16
"""How many turns back a session can be rolled; each keeps one state."""


@dataclass(frozen=True)
class Turn:
    """A text that was fed.

    nats: summed surprise of its tokens, each given all before it; the first token of a fresh session is not counted.
    """

    index: int
    n_tokens: int
    nats: float
    seconds: float


class LayerMemory(TypedDict):
    """One memory: the norm of what it holds, its bytes, and of each head after how many tokens its gates at rest keep
    one half."""

    norm: float
    size_bytes: int
    half_lives: list[float]


class MemoryView(TypedDict):
    """What a session remembers. ``size_bytes`` counts everything, ``layers`` holds what a rule writes."""

    n_tokens: int
    size_bytes: int
    layers: dict[str, LayerMemory]


class Session:
    """Reads, writes and remembers. The weights are shared with other sessions and never change.

    learn: what changes while it reads. "none": nothing, and its memory reads as the model's initial one; "memory"; or
    "levels", feed-forward levels as well, in a copy of its own (``models.online``); or "weights", those that
    ``learning`` names as well, in a change that belongs to the session (``models.weights``).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling | None = None,
        random_seed: int = 0,
        name: str | None = None,
        learn: Learn = "memory",
        learning: LearnConfig | None = None,
    ) -> None:
        self.model = model
        self.learn, self.learning = learn, learning or LearnConfig()
        self._reader = online_reader(model, learn, cross_entropy, self.learning)
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.random_seed = random_seed
        self.id = uuid.uuid4().hex
        self.name = name or self.id[:8]
        self._now = FRESH
        self._turns = {0: FRESH}
        self._broken_off = frozenset[int]()

    @property
    def _now(self) -> Moment:
        """The moment at which the session stands; while it writes, with every token that it wrote."""
        return self._moment if self._writing is None else self._writing.moment

    @_now.setter
    def _now(self, moment: Moment) -> None:
        self._moment, self._writing = moment, cast(Continuation | None, None)

    @property
    def turn(self) -> int:
        """Index of the last turn, a text fed or a reply written; 0 before the first."""
        return max(self._turns)

    @property
    def n_tokens(self) -> int:
        """Tokens read so far, those the session wrote itself included."""
        return self._moment.n_tokens if self._writing is None else self._writing.n_tokens

    @property
    def size_bytes(self) -> int:
        """Bytes of what the session remembers, without the turns saved for ``rollback``."""
        return self._now.size_bytes

    def feed(self, text: str) -> Turn:
        """Read a text: the memory learns from it. Interrupted, it leaves the session as it was."""
        ids = self.tokenizer.encode(text)
        return self._feed(ids if self.n_tokens else self.tokenizer.begin(ids))

    def _feed(self, token_ids: Sequence[int]) -> Turn:
        started = time.perf_counter()
        at_once = portion(self.model)
        moment, nats = self._now, 0.0
        for first in range(0, len(token_ids), at_once):
            ids, before = token_ids[first : first + at_once], moment
            moment, logits_bto = self._read(before, ids)
            nats += surprise(before.logits_bo, logits_bto, ids)
        self._now = moment
        self._end_turn()
        return Turn(self.turn, len(token_ids), nats, time.perf_counter() - started)

    def generate(self, max_tokens: int = 64, *, until: str | None = None) -> str:
        """Write a continuation and remember it; see ``stream``."""
        return "".join(self.stream(max_tokens, until=until))

    def stream(self, max_tokens: int = 64, *, until: str | None = None) -> Generator[str, None, None]:
        """The continuation, piece by piece, in whole characters.

        The session reads what it writes. Leaving the iterator early ends the turn there; what was written stays read.
        A session that has read nothing begins by reading a line end. Draws depend on the random seed and the number of
        tokens read alone.

        until: a text, such as a blank line, that ends the reply; white space before the first word does not count.
        """
        yield from self._write(max_tokens, until)

    def _write(self, max_tokens: int, until: str | None) -> Generator[str, None, bool]:
        """The continuation; in the end, whether a token came that ends it."""
        if max_tokens < 1:
            raise WrongValue(
                f"max_tokens is {max_tokens}; a reply needs at least 1.", key="max_tokens", value=max_tokens
            )
        logits_bo, ends = self._prediction(), ends_of(self.tokenizer)
        generator = random_stream(self.random_seed, "session.sample", self._now.n_tokens, device=logits_bo.device)
        characters, written, has_ended = self.tokenizer.decoder(), "", False
        try:
            for _ in range(max_tokens):
                token_id = int(choose(logits_bo, self.sampling, generator))
                logits_bo = self._read_on(token_id)
                piece = characters.feed(token_id)
                written += piece
                if piece:
                    yield piece
                has_ended = token_id in ends
                if has_ended or (until and until in written.lstrip()):
                    break
            rest = characters.finish()
            if rest:
                yield rest
            return has_ended
        finally:
            self._end_turn()

    def reply(self, line: str, max_tokens: int) -> Generator[str, None, None]:
        """One exchange of a chat, piece by piece: read a line with its end, then write until a blank line, or both as
        the template of the tokenizer has it."""
        if self.tokenizer.chat_template is None:
            self.feed(line + "\n")
            yield from self.stream(max_tokens, until=END_OF_REPLY)
            return
        is_open, has_ended = self.turn in self._broken_off, False
        said = [Message("user", line)]
        self._feed(message_ids(self.tokenizer, said, is_first=not self.n_tokens, is_open=is_open))
        try:
            has_ended = yield from self._write(max_tokens, None)
        finally:
            if not has_ended:
                self._broken_off |= {self.turn}

    def fork(self, name: str | None = None) -> "Session":
        """A second session that stands where this one stands; from here on neither knows of the other."""
        other = copy.copy(self)
        other._now = self._now
        other._reader = online_reader(self.model, self.learn, cross_entropy, self.learning)
        other.id = uuid.uuid4().hex
        other.name = name or other.id[:8]
        other._turns = dict(self._turns)
        return other

    def rollback(self, to: Turn | int) -> None:
        """Return to the end of turn ``to``, as if nothing had been said since; 0 is before the first turn.

        The last ``KEPT_TURNS`` turns can be returned to.
        """
        index = to.index if isinstance(to, Turn) else to
        if index not in self._turns:
            raise WrongValue(
                f"turn {index} is not saved; this session can return to the turns {min(self._turns)} to {self.turn}.",
                key="to",
                value=index,
            )
        self._now = self._turns[index]
        self._turns = {kept: moment for kept, moment in self._turns.items() if kept <= index}

    def forget(self) -> None:
        """Begin afresh: memory, turns and all."""
        self._now, self._turns, self._broken_off = FRESH, {0: FRESH}, frozenset()

    def memory(self) -> MemoryView:
        """What is remembered now; nothing changes."""
        return memory_view(self.model, self._now)

    def save(self, path: Path | str) -> None:
        """Write all that the future of this session depends on into one file, whole or not at all.

        The turns saved for ``rollback`` are not in it: a loaded session can return to the moment of saving and later.
        """
        header = {
            "id": self.id,
            "name": self.name,
            **identity(self.model, self.tokenizer)._asdict(),
            "turn": self.turn,
            "is_open": self.turn in self._broken_off,
            "n_tokens": self._now.n_tokens,
            "sampling": asdict(self.sampling),
            "random_seed": self.random_seed,
            "learn": self.learn,
            "learning": self.learning.model_dump(),
        }
        store.write(Path(path), tensors_of(self._now), header)

    @classmethod
    def load(
        cls,
        path: Path | str,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        learn: Learn | None = None,
        learning: LearnConfig | None = None,
    ) -> "Session":
        """The session that ``save`` wrote, for the same weights and the same tokenizer.

        What an earlier meristem did not save is as in a session that begins.
        learn, learning: what has to learn in it; by default whatever does. CheckpointMismatch where it is something
            else.
        """
        file = store.read(Path(path))
        header = file.header
        _require_learning(header, Path(path), learn, learning)
        session = cls(
            model,
            tokenizer,
            sampling=Sampling(**header.get("sampling", {})),
            random_seed=int(header.get("random_seed", 0)),
            name=header.get("name"),
            learn=header.get("learn", "memory"),
            learning=LearnConfig.model_validate(header.get("learning", {})),
        )
        require_same(header, identity(model, tokenizer), model, path)
        session.id = header.get("id", session.id)
        session._now = moment_of(file, model)
        session._turns = {header.get("turn", 0): session._now}
        session._broken_off = frozenset(session._turns if header.get("is_open") else ())
        return session

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _end_turn(self) -> None:
        self._now = self._now  # a reply ends here
        turns = {**self._turns, self.turn + 1: self._now}
        self._turns = {index: turns[index] for index in sorted(turns)[-KEPT_TURNS - 1 :]}

    def _prediction(self) -> Tensor:
        """What may come next; a session that has read nothing reads a line end first."""
        if self._now.logits_bo is None:
            first = self.tokenizer.begin([]) or self.tokenizer.encode(BEGINNING)
            self._now, logits_bto = self._read(self._now, first)
            return logits_bto[:, -1]
        return self._now.logits_bo

    def _read_on(self, token_id: int) -> Tensor:
        """Read one token of a reply; the prediction of the next."""
        if self._writing is None:
            self._writing = Continuation(self._reader, self._moment)
        return self._writing.read(token_id)

    def _read(self, moment: Moment, token_ids: Sequence[int]) -> tuple[Moment, Tensor]:
        """The moment after reading some tokens, and the prediction made at each of them."""
        return read(self._reader, moment, token_ids, self._device)


def memory_view(model: nn.Module, moment: Moment) -> MemoryView:
    """What is remembered at a moment; nothing changes."""
    modules = {
        numbers(path): module
        for path, module in model.named_modules()
        if isinstance(module, NeuralMemory | SelfReference)
    }
    held = dict(memories_in(moment.state or {}))
    layers = {path: _looked_at(modules[numbers(path)], memory) for path, memory in held.items()}
    return {"n_tokens": moment.n_tokens, "size_bytes": moment.size_bytes, "layers": layers}


def _require_learning(header: Mapping[str, Any], path: Path, learn: Learn | None, learning: LearnConfig | None) -> None:
    """Refuse a saved session in which something else learns than is wanted."""
    found = (header.get("learn", "memory"), LearnConfig.model_validate(header.get("learning", {})))
    wanted = (learn or found[0], learning or found[1])
    are_weights = "weights" in (found[0], wanted[0])
    if found[0] != wanted[0] or (are_weights and found[1] != wanted[1]):
        said = [f"{what} ({', '.join(f'{key} {value}' for key, value in how)})" for what, how in (found, wanted)]
        raise CheckpointMismatch(
            f"the session in {path} was saved with learn={said[0]}, and is to go on with learn={said[1]}. Open it as "
            f"it was saved, or begin another.",
            path=str(path),
            part="learn",
        )


def memories_in(state: State, path: str = "") -> Iterator[tuple[str, State]]:
    """Every memory inside a state, by where it stands; copies of earlier moments are none."""
    for name, inner in state.items():
        if name == "memory":
            yield path, inner
        elif isinstance(inner, dict) and name not in COPIES:
            yield from memories_in(inner, f"{path}.{name}".removeprefix("."))


@torch.no_grad()
def _looked_at(module: NeuralMemory | SelfReference, memory: State) -> LayerMemory:
    return {
        "norm": float(sum(weight.double().square().sum() for weight in weights_in({"memory": memory}))) ** 0.5,
        "size_bytes": size_bytes(memory),
        "half_lives": half_lives_of(module.retain_at_rest()),
    }
