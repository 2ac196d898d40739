"""The one place where logits become a loss."""

import torch
from torch.nn import functional

from meristem.data.stream import IGNORED
from meristem.errors import ShapeError
from meristem.shapes import Logits, Targets


def cross_entropy(logits_bto: Logits, targets_bt: Targets) -> torch.Tensor:
    """Nats of all targets together, in float32 whatever the logits are; ignored targets cost nothing.

    The sum and not the mean: parts of a step are added and divided once, by the number of targets of the whole step.

    targets_bt: ids as int64, moved to where the logits are. Raises ShapeError for what is no target for each row of
    logits; the ids themselves are not read back.
    """
    _require_fit(logits_bto, targets_bt)
    logits_no = logits_bto.flatten(0, 1).float()
    targets_n = targets_bt.flatten().to(logits_bto.device, non_blocking=True)
    return functional.cross_entropy(logits_no, targets_n, ignore_index=IGNORED, reduction="sum")


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
