"""The one place where logits become a loss."""

import torch
from torch.nn import functional

from meristem.data.stream import IGNORED
from meristem.shapes import Logits, Targets


def cross_entropy(logits_bto: Logits, targets_bt: Targets) -> torch.Tensor:
    """Nats of all targets together, in float32 whatever the logits are; ignored targets cost nothing.

    The sum and not the mean: parts of a step are added and divided once, by the number of targets of the whole step.
    """
    logits_no = logits_bto.flatten(0, 1).float()
    return functional.cross_entropy(logits_no, targets_bt.flatten(), ignore_index=IGNORED, reduction="sum")
