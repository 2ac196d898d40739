"""The processes of a run as one of them sees them: what it tells, asks and decides with the others.

Alone, every question is answered by the one who asks, and nothing is sent.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from meristem.distributed.agreement import Agreement, Change, checksum
from meristem.distributed.mesh import Ranks
from meristem.distributed.sync import Sync
from meristem.errors import AgreementFailed


@dataclass(frozen=True)
class Team:
    """This process and the others. All of them must ask the same questions in the same order.

    ranks: which of them this is. sync: sums of tensors and numbers. agreement: where they settle what all do, or none.
    """

    ranks: Ranks
    sync: Sync
    agreement: Agreement

    @classmethod
    def of(cls, ranks: Ranks, *, timeout_s: float = 300.0) -> Self:
        """timeout_s: how long one waits for the words of the others."""
        return cls(ranks, Sync(ranks), Agreement(ranks, timeout_s=timeout_s))

    def any(self, is_so: bool) -> bool:
        """Whether it is so in one of them."""
        return any(told for (told,) in self.sync.gather([is_so]))

    def first(self, number: float) -> float:
        """That of the first process: what differs between them, as a time, and from which all must decide alike."""
        return self.sync.gather([number])[0][0]

    def told(self, what: str, text: str) -> str:
        """The text of the first process; what any other gives is not looked at."""
        return text if self.ranks.size == 1 else self.agreement.told(what, text)

    def require_same(self, what: Mapping[str, Callable[[], str]]) -> None:
        """Raises AgreementFailed, in every process, unless each of these is the same in all; alone it is not asked."""
        if self.ranks.size > 1:
            for name, find in what.items():
                self.agreement.require_same(name, find())

    def require_alike(self, tensors: Iterable[Tensor]) -> None:
        """Raises AgreementFailed, in every process, unless these have the same bits in all; alone it is not asked.

        It costs one reading of them and one small exchange, and so is done again and again.
        """
        if self.ranks.size == 1:
            return
        every = [told for (told,) in self.sync.gather([checksum(tensors)])]
        if len(set(every)) > 1:
            raise AgreementFailed(
                f"the {self.ranks.size} processes have gone apart: checksums by rank {', '.join(map(repr, every))}. A "
                f"machine of theirs computes wrongly, or one was disturbed. Start all of them again: they go on from "
                f"the last checkpoint, with the same weights.",
                rank=self.ranks.rank,
                found=every,
            )

    def clock(self) -> float:
        """Seconds, which only go on: those of the first process, so that a deadline passes in all or in none."""
        return self.first(time.monotonic())

    def act(self, what: str, act: Callable[[], str]) -> None:
        """Do something in all processes, or in none; alone, just do it.

        act: gives what came out, which must be the same in all of them.
        Raises AgreementFailed where one of them could not, or came to another end.
        """
        if self.ranks.size == 1:
            act()
            return
        # What all did is not undone where one fails: whoever asked goes back farther, or ends.
        change = Change(plan=bytes.decode, apply=lambda order: act(), undo=lambda: None)
        outcome = self.agreement.together(what.encode(), change)
        if not outcome.is_applied:
            raise AgreementFailed(
                f"'{what}' was done by none of the {self.ranks.size} processes: {'; '.join(outcome.against)}.",
                rank=self.ranks.rank,
                against=outcome.against,
            )
