"""All processes of a run do one thing at one step, or none does (growth.md 25, KA7).

Everything goes through the store that all processes see, not through tensors: who does not answer costs the others
their timeout and is named, and those who are left can still talk. The first process decides, so that no two can come to
different ends.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import orjson
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from meristem.errors import AgreementFailed

KEPT_MEETINGS: Final = 2
"""Older ones leave the store: nobody who is still waited for can be further behind, and a long run makes many."""

_CARRIER: Final = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


@dataclass(frozen=True)
class Outcome:
    """What came of an order. Where it was not applied, nobody applied it, and ``against`` says why."""

    is_applied: bool
    order: bytes
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Change:
    """What an order means in one process.

    plan: from the order to the hash of what would be done; touches nothing, and raises where it cannot be done here.
    apply: do it; gives the hash of what came out.
    undo: put back what was before ``apply``, also after half of it.
    """

    plan: Callable[[bytes], str]
    apply: Callable[[bytes], str]
    undo: Callable[[], None]


class Agreement:
    """The meetings of the processes of a run. All must come to the same ones in the same order.

    store: a table that all see; alone, none is needed. timeout_s: how long one waits for the others. clock: seconds,
        which only go on.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store | None = None,
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank, self._size, self._timeout_s, self._clock = rank, size, timeout_s, clock
        self._store = store or dist.HashStore()  # type: ignore[attr-defined]
        self._number, self._what = 0, ""
        self._sent: dict[int, list[str]] = {}

    def commit(self, order: bytes, change: Change) -> Outcome:
        """Apply the order of the first process in all of them, or in none.

        The order goes out, and each process answers with the hash of what it would do. On the word of the first all
        apply, and tell what came out. Where an answer is missing, unwilling or another one, nobody applies, and the
        outcome says so: the run can go on as it was. Raises AgreementFailed, with everything undone, where the results
        differ or somebody was lost on the way: these processes stand at different places.

        order: what any but the first process gives is ignored.
        """
        self._begin("an order")
        if self._rank == 0:
            self._send("order", {"order": order.hex()})
        else:
            order = bytes.fromhex(self._receive("order", self._timeout_s)["order"])
        self._send_own("plan", _tried(change.plan, order))
        against = self._verdict("plan")
        if against:
            return Outcome(False, order, against)
        try:
            self._send_own("result", _tried(change.apply, order))
            against = self._verdict("result")
        except AgreementFailed:
            change.undo()
            raise
        if against:
            change.undo()
            raise AgreementFailed(
                f"the {self._size} processes did not come out alike, and what they did was undone: "
                f"{'; '.join(against)}. Start all of them again: they go on from the last checkpoint.",
                rank=self._rank,
                against=against,
            )
        return Outcome(True, order)

    def broadcast(self, what: str, text: str) -> str:
        """The text of the first process; what the others give is ignored.

        Raises AgreementFailed, in the first one, with those that have not received it within the timeout: it may not
        run ahead of them, since what it sent is deleted after some meetings.
        """
        self._begin(what)
        if self._rank == 0:
            self._send("text", {"text": text})
        else:
            text = str(self._receive("text", self._timeout_s)["text"])
        self._send_own("received", {"found": ""})
        against = self._differences("received") if self._rank == 0 else ()
        if against:
            raise AgreementFailed(
                f"not all of {self._size} processes received '{what}': {'; '.join(against)}. Start all of them "
                f"again; they go on from the last checkpoint.",
                rank=self._rank,
                against=against,
            )
        return text

    def require_same(self, what: str, found: str) -> None:
        """Raises AgreementFailed, in every process, unless ``found`` is the same in all of them."""
        self._begin(what)
        self._send_own(what, {"found": found})
        against = self._differences(what)
        if against:
            raise AgreementFailed(
                f"the {self._size} processes do not agree on '{what}': {'; '.join(against)}. Start all of them "
                f"with the same command, settings and code; they go on from the last checkpoint.",
                rank=self._rank,
                against=against,
            )

    def barrier(self, place: str) -> None:
        """Wait until every process is here. Raises AgreementFailed with those that are not within the timeout."""
        self.require_same(place, "here")

    def _begin(self, what: str) -> None:
        self._number, self._what = self._number + 1, what
        with lost_process(f"the meeting for '{what}'", self._rank, self._size):
            for key in self._sent.pop(self._number - KEPT_MEETINGS, []):
                self._store.delete_key(key)

    def _send_own(self, word: str, values: Mapping[str, str]) -> None:
        """Send something of one's own."""
        self._send(f"{word}/{self._rank}", values)

    def _send(self, word: str, values: Mapping[str, Any]) -> None:
        """Send something to all. A word is sent once in a meeting."""
        key = self._key(word)
        self._sent.setdefault(self._number, []).append(key)
        with lost_process(f"the meeting for '{self._what}'", self._rank, self._size):
            self._store.set(key, orjson.dumps(values).decode())

    def _verdict(self, word: str) -> tuple[str, ...]:
        """What the first process makes of all answers: the reasons against, none if all is well."""
        if self._rank == 0:
            against = self._differences(word)
            self._send(f"{word}/verdict", {"against": against})
            return against
        # The first may have begun to wait as late as this one's own patience allows.
        return tuple(self._receive(f"{word}/verdict", 2 * self._timeout_s)["against"])

    def _receive(self, word: str, timeout_s: float) -> dict[str, Any]:
        """What the first process sends. Without it nobody knows how to go on."""
        received = self._read(word, self._clock() + timeout_s)
        if received is None:
            raise AgreementFailed(
                f"process {self._rank} of {self._size} waited {timeout_s:g} s for '{word}' of process 0 "
                f"at meeting {self._number} ('{self._what}'). It ended, hangs or is at another place. Start all of "
                f"them again: they go on from the last checkpoint.",
                rank=self._rank,
            )
        return received

    def _differences(self, word: str) -> tuple[str, ...]:
        """What prevents going on, from the replies of all; the wait for them ends together."""
        deadline = self._clock() + self._timeout_s
        answers = {rank: self._read(f"{word}/{rank}", deadline) for rank in range(self._size)}
        against, first = [], answers[0]
        for rank, answer in answers.items():
            if answer is None:
                against.append(f"process {rank} did not answer within {self._timeout_s:g} s")
            elif "refused" in answer:
                against.append(f"process {rank} refused: {answer['refused']}")
            elif first is not None and "found" in first and answer["found"] != first["found"]:
                against.append(f"process {rank} has {answer['found'][:40]}, process 0 has {first['found'][:40]}")
        return tuple(against)

    def _read(self, word: str, deadline: float) -> dict[str, Any] | None:
        """What somebody sent; None if it is not sent by then."""
        left_s = max(deadline - self._clock(), 0.001)
        with lost_process(f"the meeting for '{self._what}'", self._rank, self._size):
            try:
                self._store.wait([self._key(word)], timedelta(seconds=left_s))
            except dist.DistStoreError:
                return None
            received: dict[str, Any] = orjson.loads(self._store.get(self._key(word)))
        return received

    def _key(self, word: str) -> str:
        return f"meeting/{self._number}/{word}"


@contextlib.contextmanager
def lost_process(what: str, rank: int, size: int) -> Iterator[None]:
    """Raise AgreementFailed where an exchange inside the block breaks, as it does when another process ends."""
    try:
        yield
    except RuntimeError as cause:
        # The carriers raise no type of their own, also where torch has one; anything else is not theirs.
        if not isinstance(cause, dist.DistError) and not _CARRIER.search(str(cause)):
            raise
        raise AgreementFailed(
            f"{what} over {size} processes broke in process {rank}: {cause}. Another process ended or "
            f"hangs; its own output says why. Start all of them again: they go on from the last checkpoint.",
            rank=rank,
        ) from cause


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and every bit of named tensors, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checksum(tensors: Iterable[Tensor]) -> float:
    """A whole number below 2^52 that is another one where any single bit of them is: cheap enough to ask for often."""
    total = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().reshape(-1).view(_OF_SIZE[tensor.element_size()])
        total += int(bits.sum(dtype=torch.int64))
    return float(total % 2**52)


_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _tried(call: Callable[[bytes], str], order: bytes) -> dict[str, str]:
    """The reply to an order: what was found, or why it cannot be done."""
    try:
        return {"found": call(order)}
    except Exception as error:  # noqa: BLE001 - whatever stops this process, the others must hear of it
        return {"refused": f"{type(error).__name__}: {error}"}
