"""What a model checks before it reads."""

import inspect

import torch
from torch import Tensor, nn

from meristem.errors import CapabilityError, ShapeError


def check_tokens(tokens: Tensor, window: int | None = None) -> None:
    """Refuse what is no batch of ids, or is longer than ``window``. The ids themselves are not read back."""
    shape, dtype = tuple(tokens.shape), tokens.dtype
    if len(shape) != 2 or 0 in shape:
        raise ShapeError(
            f"tokens have the shape {shape}; a model reads (batch, time), neither of them empty. "
            f"For one text, pass tokens[None].",
            found=shape,
        )
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ShapeError(f"tokens are {dtype}; ids are integers. Convert them with tokens.long().", found=str(dtype))
    if window is not None and shape[1] > window:
        raise ShapeError(
            f"{shape[1]} tokens were given at once; this model sees at most {window}. "
            f"Pass the last {window}, or build it with a larger model.max_seq_len.",
            found=shape[1],
            expected=window,
        )


def require_resets(model: nn.Module) -> None:
    """Raises CapabilityError where a model, as one of a plugin may, cannot be told where documents begin."""
    takes = inspect.signature(model.forward).parameters
    if "reset_mask_bt" not in takes:
        raise CapabilityError(
            f"{type(model).__name__} reads ({', '.join(takes)}) and takes no reset_mask_bt, which data.order=documents "
            "hands it to say where documents begin. Give its forward that argument, or set data.order=shuffled.",
            operation="reset",
            reason="no reset_mask_bt",
        )
