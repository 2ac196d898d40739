"""The next tokens of many orders, drawn together; each as it would be drawn alone.

A row is drawn from one number of its own (``models.generate.choose_rows``): so its draw does not depend on its place.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from meristem.errors import NonFinite
from meristem.models.generate import Sampling, choose_rows


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


def draw(logits_bo: Float[Tensor, "b o"], wanted: Sequence[Wanted]) -> list[Drawn | NonFinite]:
    """A token for each row of predictions, or why it has none: its prediction is not finite."""
    is_finite = logits_bo.amax(-1).isfinite().tolist()
    # The places of rows that are not finite are drawn as well, from zeros, and passed over.
    drawable_bo = logits_bo if all(is_finite) else logits_bo.where(logits_bo.amax(-1, keepdim=True).isfinite(), 0)
    samplings, uniforms = [each.sampling for each in wanted], [each.random.random() for each in wanted]
    token_ids = choose_rows(drawable_bo, samplings, uniforms).tolist()
    rows = zip(is_finite, token_ids, logits_bo.split(1), wanted, strict=True)
    return [_told(token_id, row_bo, each.n_top) if is_fine else _undrawn() for is_fine, token_id, row_bo, each in rows]


def _undrawn() -> NonFinite:
    return NonFinite("the model's prediction is not finite, so no token can be drawn. Use another checkpoint.")


def _told(token_id: int, logits_bo: Tensor, n_top: int | None) -> Drawn:
    """A token with what is wanted of its probability."""
    if n_top is None:
        return Drawn(token_id)
    logprob_o = logits_bo[0].float().log_softmax(-1)
    top = logprob_o.topk(min(n_top, len(logprob_o)))
    return Drawn(
        token_id, float(logprob_o[token_id]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    )
