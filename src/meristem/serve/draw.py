"""The next tokens of many orders, drawn together; each as it would be drawn alone.

A row is drawn from one number of its own (``models.generate.choose_rows``): so its draw does not depend on its place.
"""

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Final, NamedTuple

from jaxtyping import Float
from torch import Tensor

from meristem.errors import NonFinite
from meristem.models.generate import UNDRAWN, Sampling, Samplings, choose_rows


class Drawn(NamedTuple):
    """One token of a reply, which is read as well.

    logprob: of the token, natural; top: the likeliest ids and theirs, as many as were wanted. None and () without.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Wanted(NamedTuple):
    """How a token is to be drawn.

    random: gives one number for each token, at any temperature. n_top: alternatives of ``Drawn``; None without
    logarithms of probabilities.
    """

    sampling: Sampling
    random: Random
    n_top: int | None


# One for each id: of a new one for every token collections of garbage would walk through all that replies hold.
_plain: Final = cache(Drawn)


class Draws:
    """How the rows of a batch are drawn, made once for as long as they are the same."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self._samplings = Samplings([each.sampling for each in wanted])
        self._numbers = [each.random.random for each in wanted]
        self._tops = [each.n_top for each in wanted]
        self._is_plain = all(n_top is None for n_top in self._tops)

    def draw(self, logits_bo: Float[Tensor, "b o"]) -> list[Drawn | NonFinite]:
        """A token for each row of predictions, or why it has none: its prediction is not finite."""
        token_ids = choose_rows(logits_bo, self._samplings, [number() for number in self._numbers])
        if self._is_plain and UNDRAWN not in token_ids:
            return [*map(_plain, token_ids)]
        rows = zip(token_ids, logits_bo, self._tops, strict=True)
        return [_undrawn() if token_id == UNDRAWN else _told(token_id, *row) for token_id, *row in rows]


def _undrawn() -> NonFinite:
    return NonFinite("the model's prediction is not finite, so no token can be drawn. Use another checkpoint.")


def _told(token_id: int, logits_o: Tensor, n_top: int | None) -> Drawn:
    """A token with what is wanted of its probability."""
    if n_top is None:
        return _plain(token_id)
    logprob_o = logits_o.float().log_softmax(-1)
    top = logprob_o.topk(min(n_top, len(logprob_o)))
    return Drawn(
        token_id, float(logprob_o[token_id]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    )
