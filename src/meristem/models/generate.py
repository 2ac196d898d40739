"""From logits to ids: how the next token is drawn, and the loop that draws many."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from meristem.errors import NonFinite, ShapeError, WrongValue
from meristem.memory.state import State
from meristem.models.decoding import Decoding, Reader
from meristem.shapes import Tokens

COLDEST: Final = torch.finfo(torch.float32).tiny
"""The smallest temperature that float32 can divide by on every device; below it the likeliest token is taken."""

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


def choose(logits_bo: Float[Tensor, "b o"], sampling: Sampling, generator: torch.Generator) -> Int[Tensor, " b"]:
    """One id per row. ``generator`` must live where the logits do; taking the likeliest draws nothing from it.

    p_i = softmax((x_i - max x) / temperature), cut by top_p, then top_k. A logit of -inf is never drawn; ``NonFinite``
    where the largest is not finite.
    """
    if not logits_bo.amax(-1).isfinite().all():
        raise NonFinite("the model's prediction is not finite, so no token can be drawn. Use another checkpoint.")
    if sampling.is_greedy:
        return logits_bo.argmax(-1)
    sorted_bo, ids_bo = logits_bo.float().sort(-1, descending=True)
    # The likeliest is subtracted first: a quotient of what is left may be -inf, which is a share of 0, but never inf.
    share_bo = ((sorted_bo - sorted_bo[:, :1]) / sampling.temperature).softmax(-1)
    is_kept_bo = share_bo.cumsum(-1) - share_bo < sampling.top_p
    is_kept_bo[:, :1] = True
    if sampling.top_k:
        is_kept_bo[:, sampling.top_k :] = False
    place_b1 = torch.multinomial(share_bo * is_kept_bo, 1, generator=generator)
    return ids_bo.gather(-1, place_b1)[:, 0]


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
        if decoding.refusal:
            yield Drawn(token_id, partial(State, decoding.state))
        else:
            yield Drawn(token_id, partial(_state_after, model, begun, read, len(read)))
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
