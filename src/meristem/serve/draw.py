"""The next tokens of many orders, drawn together; each as it would be drawn alone.

A row is drawn from one number of its own (``models.generate.choose_rows``): so its draw does not depend on its place.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
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
    """A token that is to be drawn.

    logits_bo: its prediction, one row; None where nothing was read. random: gives one number for each token, at any
    temperature. n_top: alternatives of ``Drawn``; None without logarithms of probabilities.
    """

    logits_bo: Tensor | None
    sampling: Sampling
    random: Random
    n_top: int | None


def draw(wanted: Sequence[Wanted]) -> list[Drawn | NonFinite]:
    """A token for each, or why it has none: nothing was read, or its prediction is not finite."""
    found: list[Drawn | NonFinite] = [
        NonFinite("nothing was read, so there is no prediction. Give a text to begin with.") for _ in wanted
    ]
    predicted = [(at, each, each.logits_bo) for at, each in enumerate(wanted) if each.logits_bo is not None]
    if not predicted:
        return found
    logits_bo = torch.cat([row_bo for _, _, row_bo in predicted])
    is_finite = logits_bo.amax(-1).isfinite().tolist()
    # The places of rows that are not finite are drawn as well, from zeros, and passed over.
    drawable_bo = logits_bo if all(is_finite) else logits_bo.where(logits_bo.amax(-1, keepdim=True).isfinite(), 0)
    samplings, uniforms = (
        [each.sampling for _, each, _ in predicted],
        [each.random.random() for _, each, _ in predicted],
    )
    token_ids = choose_rows(drawable_bo, samplings, uniforms).tolist()
    for (at, each, row_bo), is_fine, token_id in zip(predicted, is_finite, token_ids, strict=True):
        if is_fine:
            found[at] = _told(token_id, row_bo, each.n_top)
        else:
            found[at] = NonFinite(
                "the model's prediction is not finite, so no token can be drawn. Use another checkpoint."
            )
    return found


def _told(token_id: int, logits_bo: Tensor, n_top: int | None) -> Drawn:
    """A token with what is wanted of its probability."""
    if n_top is None:
        return Drawn(token_id)
    logprob_o = logits_bo[0].float().log_softmax(-1)
    top = logprob_o.topk(min(n_top, len(logprob_o)))
    return Drawn(
        token_id, float(logprob_o[token_id]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    )
