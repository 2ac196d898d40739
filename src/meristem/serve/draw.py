"""The next tokens of many orders, drawn together; each as it would be drawn alone.

A row is drawn from one number of its own on the sums of its shares. ``models.generate.choose`` draws among as many rows
as it is given from one generator, and sorts each of them: so a row's draw depends on its place, and takes ten times as
long.
"""

from collections.abc import Sequence
from random import Random
from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from meristem.errors import NonFinite
from meristem.models.generate import Sampling

WARMEST: Final = torch.finfo(torch.float32).max
"""The largest temperature that float32 can divide by."""

LIKELIEST: Final = 256
"""So many shares are put in order at first, which is a tenth of the work of all; all where that is not enough."""


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


def choose_rows(
    logits_bo: Float[Tensor, "b o"], samplings: Sequence[Sampling], uniforms: Sequence[float]
) -> Int[Tensor, " b"]:
    """One id per row, each with settings and a number in [0, 1) of its own; what a row gives depends on no other.

    p_i = softmax((x_i - max x) / temperature), 0 where top_p or top_k leaves i out; the id is the first at which
    p_0 + ... + p_i exceeds ``uniform`` times the sum of all. A logit of -inf is never drawn; the largest
    has to be finite.
    """
    drawn = [row for row, sampling in enumerate(samplings) if not sampling.is_greedy]
    if not drawn:
        return logits_bo.argmax(-1)
    if len(drawn) == len(samplings):
        return _drawn(logits_bo, samplings, uniforms)
    chosen_b = logits_bo.argmax(-1)
    chosen_b[drawn] = _drawn(logits_bo[drawn], [samplings[row] for row in drawn], [uniforms[row] for row in drawn])
    return chosen_b


def _drawn(
    logits_bo: Float[Tensor, "b o"], samplings: Sequence[Sampling], uniforms: Sequence[float]
) -> Int[Tensor, " b"]:
    """Ids where no row takes the likeliest. Only operations whose bits are those of each row alone stand here."""
    logits_bo = logits_bo.float()
    temperatures = [[min(sampling.temperature, WARMEST)] for sampling in samplings]
    temperature_b1 = torch.tensor(temperatures, dtype=torch.float32, device=logits_bo.device)
    # The likeliest is subtracted first: a quotient of what is left may be -inf, which is a share of 0, but never inf.
    # On the CPU, since sums on a GPU come in any order.
    share_bo = ((logits_bo - logits_bo.amax(-1, keepdim=True)) / temperature_b1).softmax(-1).cpu()
    cut = [row for row, sampling in enumerate(samplings) if sampling.top_k or sampling.top_p < 1]
    if cut:
        share_bo[cut] = _cut(share_bo[cut], [samplings[row] for row in cut])
    cumulative_bo = share_bo.cumsum(-1, dtype=torch.float64)
    total_b1 = cumulative_bo[:, -1:]
    part_b1 = torch.tensor(uniforms, dtype=torch.float64)[:, None] * total_b1
    # A product that was rounded up to the total would be exceeded by none.
    part_b1 = part_b1.minimum(total_b1.nextafter(torch.zeros_like(total_b1)))
    return torch.searchsorted(cumulative_bo, part_b1, right=True)[:, 0].to(logits_bo.device)


def _cut(share_bo: Float[Tensor, "b o"], samplings: Sequence[Sampling]) -> Float[Tensor, "b o"]:
    """The shares, 0 where top_p or top_k leaves an id out; ids as likely as the last that stays, stay too."""
    n_ids = share_bo.shape[-1]
    most_b1 = torch.tensor([[min(sampling.top_k or n_ids, n_ids)] for sampling in samplings])
    held = [[sampling.top_p if sampling.top_p < 1 else float("inf")] for sampling in samplings]
    held_b1 = torch.tensor(held, dtype=torch.float64)

    def last_of(largest_bo: Tensor) -> Tensor:
        # The likeliest always stays: its place is the first, however little is to be held.
        return torch.searchsorted(largest_bo.cumsum(-1, dtype=torch.float64), held_b1).minimum(most_b1 - 1)

    largest_bo = share_bo.topk(min(n_ids, LIKELIEST)).values
    last_b1 = last_of(largest_bo)
    if int(last_b1.max()) >= largest_bo.shape[-1]:
        largest_bo = share_bo.sort(descending=True).values
        last_b1 = last_of(largest_bo)
    return share_bo.where(share_bo >= largest_bo.gather(-1, last_b1), 0)
