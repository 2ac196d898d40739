"""The one place where logits become a loss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from meristem.data.stream import IGNORED
from meristem.errors import ShapeError, WrongValue
from meristem.memory.kernels.select import fuses
from meristem.native import layers as native
from meristem.shapes import Logits, Targets


def cross_entropy(logits_bto: Logits, targets_bt: Targets) -> torch.Tensor:
    """Nats of all targets together, in float32 whatever the logits are; ignored targets cost nothing.

    The sum and not the mean: parts of a step are added and divided once, by the number of targets of the whole step.

    targets_bt: ids as int64, moved to where the logits are. Raises ShapeError for what is no target for each row of
    logits; the ids themselves are not read back.
    """
    _require_fit(logits_bto, targets_bt)
    logits_no = logits_bto.flatten(0, 1)
    targets_n = targets_bt.flatten().to(logits_bto.device, non_blocking=True)
    if logits_no.dtype != torch.float64 and fuses(logits_no, width=0):
        nats: torch.Tensor = native.cross_entropy(logits_no, targets_n, IGNORED)[0]
        return nats
    logits_no = logits_no.float()
    return functional.cross_entropy(logits_no, targets_n, ignore_index=IGNORED, reduction="sum")


@dataclass(frozen=True)
class Teacher:
    """A model whose logits another one learns from; it is read without gradients, and nothing of it is moved.

    weight: the share of what it says in the loss, 0 for none. temperature: by how much both distributions are softened.
    most_bytes: how large its parameters may be together. It begins every text anew, without the memory of the run; put
    it into evaluation mode if it has dropout. Raises WrongValue for values out of bounds.
    """

    model: nn.Module
    weight: float = 0.3
    temperature: float = 4.0
    most_bytes: int = 7_000_000_000

    def __post_init__(self) -> None:
        size_bytes = sum(each.numel() * each.element_size() for each in self.model.parameters())
        wrong = [
            *([] if 0 <= self.weight <= 1 else [f"weight is {self.weight}; expected 0 to 1"]),
            *([] if self.temperature > 0 else [f"temperature is {self.temperature}; expected more than 0"]),
            *([] if size_bytes <= self.most_bytes else [f"it takes {size_bytes} bytes; expected {self.most_bytes}"]),
        ]
        if wrong:
            raise WrongValue(
                f"this is no teacher: {'; '.join(wrong)}. Change that, or take a smaller one.", value=wrong
            )

    @torch.no_grad()
    def logits(self, tokens_bt: torch.Tensor, **settings: Any) -> torch.Tensor:
        """What it says of each token. settings: what its forward takes beside the tokens."""
        found = self.model(tokens_bt, **settings)
        logits_bto: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return logits_bto


def distillation(
    logits_bto: Logits, targets_bt: Targets, teacher_bto: torch.Tensor, *, weight: float = 0.3, temperature: float = 4.0
) -> torch.Tensor:
    """Nats of all targets together, of what the text says and of what a teacher says of each.

    ``(1 - w) CE + w T^2 KL(softmax(z_teacher / T) | softmax(z / T))``, in float32, of targets that are not ignored; the
    gradient goes to ``logits_bto`` alone. T^2 keeps that of the second term at the size of the first (Hinton et al.
    2015, 1503.02531). At weight 0 it is ``cross_entropy`` to the bit. Raises ShapeError where the two do not fit.
    """
    nats = cross_entropy(logits_bto, targets_bt)
    if weight == 0:
        return nats
    if teacher_bto.shape != logits_bto.shape:
        raise ShapeError(
            f"the logits of the teacher have the shape {tuple(teacher_bto.shape)}, those of the model "
            f"{tuple(logits_bto.shape)}; expected the same. Take a teacher with the same tokenizer.",
            found=tuple(teacher_bto.shape),
            expected=tuple(logits_bto.shape),
        )
    log_student_bto = functional.log_softmax(logits_bto.float() / temperature, dim=-1)
    log_teacher_bto = functional.log_softmax(teacher_bto.detach().to(logits_bto.device).float() / temperature, dim=-1)
    divergence_bt = functional.kl_div(log_student_bto, log_teacher_bto, reduction="none", log_target=True).sum(-1)
    is_counted_bt = targets_bt.to(logits_bto.device, non_blocking=True) != IGNORED
    divergence = torch.where(is_counted_bt, divergence_bt, 0).sum()
    return (1 - weight) * nats + weight * temperature**2 * divergence


def _require_fit(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Refuse shapes and dtypes that do not belong together; only what is known of a tensor without waiting for it."""
    found, wanted = tuple(targets.shape), tuple(logits.shape[:-1])
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ShapeError(
            f"logits are {logits.dtype} of the shape {tuple(logits.shape)}; expected floating-point numbers by "
            "(batch, time, vocabulary). Pass what the model gave, for one text logits[None].",
            found=(tuple(logits.shape), str(logits.dtype)),
            expected=("batch", "time", "vocabulary"),
        )
    if found != wanted:
        raise ShapeError(
            f"targets have the shape {found}, logits one row for each of {wanted}; expected one target for each row. "
            "Cut both to the same batch and time.",
            found=found,
            expected=wanted,
        )
    if targets.dtype != torch.int64:
        raise ShapeError(
            f"targets are {targets.dtype}; expected ids as torch.int64. Convert them with targets.long().",
            found=str(targets.dtype),
            expected=str(torch.int64),
        )
