"""From logits to ids: how the next token is drawn, and the loop that draws many."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from meristem.errors import NonFinite, ShapeError, WrongValue
from meristem.memory.state import State
from meristem.models.decoding import Decoding
from meristem.models.recorded import Reader
from meristem.native.drawing import draw
from meristem.native.library import library
from meristem.shapes import Tokens

COLDEST: Final = torch.finfo(torch.float32).tiny
"""The smallest temperature that float32 can divide by on every device; below it the likeliest token is taken."""

WARMEST: Final = torch.finfo(torch.float32).max
"""The largest temperature that float32 can divide by."""

LIKELIEST: Final = 256
"""So many shares are put in order at first, which is a tenth of the work of all; all where that is not enough."""

UNDRAWN: Final = -1
"""Stands for the id of a row that has none, since its prediction is not finite."""

BEGINNING: Final = "\n"
"""What is read before a text that has nothing before it."""


@dataclass(frozen=True)
class Sampling:
    """How freely a token is drawn.

    temperature: divides the logits; 0, and what is closer to it than ``COLDEST``, takes the likeliest token.
    top_k: draw among the k likeliest; 0 among all.
    top_p: draw among the likeliest that together hold this share, the one that crosses it included.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for key, is_fine, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "a number from 0 up"),
            ("top_k", self.top_k >= 0, "a whole number from 0 up, 0 for all"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not is_fine:
                value = getattr(self, key)
                raise WrongValue(f"{key} is {value}; it must be {wanted}. Change it.", path=key, value=value)

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the likeliest token."""
        return self.temperature < COLDEST or self.top_k == 1


@dataclass(frozen=True)
class Drawn:
    """One token that was drawn.

    make_state: gives ``state``, which few ask for.
    """

    token_id: int
    make_state: Callable[[], State]

    @property
    def state(self) -> State:
        """The state of the model that has read everything before the token, as it was then."""
        return self.make_state()


class Samplings:
    """The settings of some rows, one each, as they are drawn by: made once, for as many tokens as the rows draw."""

    def __init__(self, each: Sequence[Sampling]) -> None:
        self.each = tuple(each)
        self.temperatures = array("f", [0.0 if one.is_greedy else min(one.temperature, WARMEST) for one in each])
        self.cut = [row for row, one in enumerate(each) if not one.is_greedy and (one.top_k or one.top_p < 1)]
        """Rows of which some ids are left out."""


def choose(logits_bo: Float[Tensor, "b o"], sampling: Sampling, generator: torch.Generator) -> Int[Tensor, " b"]:
    """One id per row, as ``choose_rows``. ``generator`` must live where the logits do; taking the likeliest draws
    nothing from it.

    A logit of -inf is never drawn; ``NonFinite`` where the largest is not finite.
    """
    uniforms = [0.0] * len(logits_bo)
    if not sampling.is_greedy:
        # Not every device has float64: two numbers of 24 bits are one of 48.
        pairs_b2 = torch.rand(len(logits_bo), 2, generator=generator, device=logits_bo.device)
        uniforms = [high + low * 2.0**-24 for high, low in pairs_b2.tolist()]
    found = choose_rows(logits_bo, Samplings([sampling] * len(uniforms)), uniforms)
    if UNDRAWN in found:
        raise NonFinite("the model's prediction is not finite, so no token can be drawn. Use another checkpoint.")
    return torch.tensor(found, device=logits_bo.device)


def choose_rows(logits_bo: Float[Tensor, "b o"], samplings: Samplings, uniforms: Sequence[float]) -> list[int]:
    """One id per row, each with settings and a number in [0, 1) of its own; what a row gives depends on no other.

    p_i = softmax((x_i - max x) / temperature), 0 where top_p or top_k leaves i out; the id is the first at which
    p_0 + ... + p_i exceeds ``uniform`` times the sum of all. A logit of -inf is never drawn; ``UNDRAWN`` where the
    largest is not finite. The native core, where it is there, draws rows of which no id is left out.
    """
    core = library() if logits_bo.is_cpu and logits_bo.dtype == torch.float32 else None
    if core is None:
        return _chosen(logits_bo, samplings, uniforms)
    found = draw(core, logits_bo, samplings.temperatures, uniforms)
    if cut := samplings.cut:
        own = Samplings([samplings.each[row] for row in cut])
        for row, token_id in zip(cut, _chosen(logits_bo[cut], own, [uniforms[row] for row in cut]), strict=True):
            found[row] = token_id
    return found


def _chosen(logits_bo: Float[Tensor, "b o"], samplings: Samplings, uniforms: Sequence[float]) -> list[int]:
    """``choose_rows`` by torch."""
    is_finite_b = logits_bo.amax(-1).isfinite()
    if not is_finite_b.all():
        logits_bo = logits_bo.where(is_finite_b[:, None], 0)
    drawn = [row for row, temperature in enumerate(samplings.temperatures) if temperature]
    if len(drawn) == len(samplings.each):
        chosen_b = _drawn(logits_bo, samplings.each, uniforms)
    else:
        chosen_b = logits_bo.argmax(-1)
        if drawn:
            own = [samplings.each[row] for row in drawn]
            chosen_b[drawn] = _drawn(logits_bo[drawn], own, [uniforms[row] for row in drawn])
    found: list[int] = chosen_b.where(is_finite_b, UNDRAWN).tolist()
    return found


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


def generate(
    model: nn.Module,
    tokens_bt: Tokens,
    state: State | None = None,
    *,
    max_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
) -> Iterator[Drawn]:
    """Read ``tokens_bt``, then draw ``max_tokens`` tokens, reading each by itself before the next is drawn.

    To go on from any drawn token later, call again with its state and with its id as the first token to read.
    tokens_bt: one row, at least one token. state: of what was read before; None for nothing.
    """
    if tokens_bt.dim() != 2 or tokens_bt.shape[0] != 1:
        raise ShapeError(
            f"the tokens have the shape {tuple(tokens_bt.shape)}; one text is written at a time, as (1, time). "
            f"Call generate for each row.",
            found=tuple(tokens_bt.shape),
        )
    if not max_tokens:
        return
    with torch.no_grad():
        logits_bto, begun = model(tokens_bt, state)
    decoding, logits_bo, read = Decoding(model, begun), logits_bto[:, -1], list[int]()
    while True:
        token_id = int(choose(logits_bo, sampling, generator))
        if decoding.is_in_place:
            yield Drawn(token_id, partial(_state_after, model, begun, read, len(read)))
        else:
            yield Drawn(token_id, partial(State, decoding.state))
        if len(read) + 1 == max_tokens:
            return
        logits_bo = decoding.step([token_id])
        read.append(token_id)


def _state_after(reader: Reader, begun: State, read: Sequence[int], n: int) -> State:
    """The state after the first ``n`` of the tokens read since ``begun``, read once more: to the bit what it was."""
    again = Decoding(reader, begun)
    for token_id in read[:n]:
        again.step([token_id])
    return again.state
