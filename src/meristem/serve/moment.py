"""A moment of a session: all that its future depends on besides model, tokenizer and settings, as a value.

How a moment reads on, and how it is put into a session file and comes back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from meristem.data.tokenizer import Tokenizer
from meristem.errors import CheckpointMismatch
from meristem.memory.state import State, as_tensors, from_tensors, size_bytes
from meristem.models.decoding import Decoding
from meristem.models.load import of_today
from meristem.models.recorded import Reader
from meristem.serve import store
from meristem.train.loss import cross_entropy

READ_AT_ONCE: Final = 512
"""Tokens per forward while reading, which bounds what a long text needs."""


@dataclass(frozen=True)
class Moment:
    """Never changed in place.

    logits_bo: the prediction of the next token, ``(1, vocabulary)``; None where nothing was read.
    """

    state: State | None
    logits_bo: Tensor | None
    n_tokens: int

    @property
    def size_bytes(self) -> int:
        """Bytes of what is remembered."""
        return size_bytes(self.state or {}) + (0 if self.logits_bo is None else self.logits_bo.nbytes)


FRESH: Final = Moment(None, None, 0)


def portion(model: nn.Module) -> int:
    """Tokens that one forward reads; what a long text leaves does not depend on more than this and the text."""
    return min(READ_AT_ONCE, getattr(model, "window", None) or READ_AT_ONCE)


def read(
    reader: Reader, moment: Moment, token_ids: Sequence[int], device: torch.device | str = "cpu"
) -> tuple[Moment, Tensor]:
    """The moment after reading some tokens, and the prediction made at each of them."""
    tokens_bt = torch.tensor([token_ids], device=device)
    with torch.no_grad():
        logits_bto, state = reader(tokens_bt, moment.state)
    return Moment(state, logits_bto[:, -1].clone(), moment.n_tokens + len(token_ids)), logits_bto


class Continuation:
    """A moment that is read on token by token.

    logits_bo, n_tokens: the prediction of the next token, and the tokens read so far.
    """

    def __init__(self, reader: Reader, moment: Moment) -> None:
        """moment: one at which something was read."""
        self._decoding = Decoding(reader, moment.state or {})
        self.logits_bo, self.n_tokens = moment.logits_bo, moment.n_tokens

    def read(self, token_id: int) -> Tensor:
        """Read a token; the prediction of the next, ``(1, vocabulary)``."""
        self.logits_bo = self._decoding.step([token_id])
        self.n_tokens += 1
        return self.logits_bo

    @property
    def moment(self) -> Moment:
        """Where it stands now."""
        logits_bo = None if self.logits_bo is None else self.logits_bo.clone()
        return Moment(self._decoding.state, logits_bo, self.n_tokens)


def surprise(before_bo: Tensor | None, logits_bto: Tensor, token_ids: Sequence[int]) -> float:
    """Nats of the tokens just read: each under the prediction made before it, as far as there was one."""
    earlier = [] if before_bo is None else [before_bo[:, None]]
    predicted_bto = torch.cat([*earlier, logits_bto[:, :-1]], dim=1)
    targets = token_ids[len(token_ids) - predicted_bto.shape[1] :]
    targets_bt = torch.tensor([targets], dtype=torch.long, device=predicted_bto.device)
    return float(cross_entropy(predicted_bto, targets_bt))


def tensors_of(moment: Moment) -> dict[str, Tensor]:
    """What a session file holds of a moment, beside the number of tokens, which is in its header."""
    tensors = {f"{store.INSIDE}{name}": leaf for name, leaf in as_tensors(moment.state or {}).items()}
    return tensors if moment.logits_bo is None else tensors | {"logits_bo": moment.logits_bo}


def moment_of(file: store.SessionFile, model: nn.Module) -> Moment:
    """The moment that a session file holds, on the device of the model."""
    device = next(model.parameters()).device
    held = {name: tensor.to(device) for name, tensor in file.tensors.items()}
    logits_bo = held.pop("logits_bo", None)
    state = from_tensors({name.removeprefix(store.INSIDE): tensor for name, tensor in held.items()})
    return Moment(of_today(model, state) or None, logits_bo, file.header.get("n_tokens", 0))


class Identity(NamedTuple):
    """What a session file must meet again: SHA-256 of the weights and of the tokenizer."""

    model: str
    tokenizer: str


def identity(model: nn.Module, tokenizer: Tokenizer) -> Identity:
    """That of a model and its tokenizer; it reads every weight."""
    return Identity(store.model_fingerprint(model), tokenizer.fingerprint)


def require_same(header: Mapping[str, Any], own: Identity, model: nn.Module, place: object) -> None:
    """Refuse, as a CheckpointMismatch, a session of another model or tokenizer; ``own`` is that of ``model``."""
    expected = own._asdict()
    if header.get("named_model"):
        header = {**header, "model": header["named_model"]}
        expected["model"] = store.named_model_fingerprint(model)
    for part, fingerprint in expected.items():
        if header[part] != fingerprint:
            raise CheckpointMismatch(
                f"the session in {place} belongs to another {part} (SHA-256 {header[part][:12]}, this one has "
                f"{fingerprint[:12]}). Open it with the checkpoint it was made with.",
                path=str(place),
                part=part,
            )
