"""What a model checks before it reads."""

import inspect

import torch
from torch import Tensor, nn

from meristem.errors import CapabilityError, ShapeError
from meristem.nn.attention import Attention
from meristem.nn.documents import ReadsDocuments


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
    """Raises CapabilityError where a model, as one of a plug-in may, cannot be told where documents begin."""
    takes = inspect.signature(model.forward).parameters
    if "reset_mask_bt" not in takes:
        raise CapabilityError(
            f"{type(model).__name__} reads ({', '.join(takes)}) and takes no reset_mask_bt, which data.order=documents "
            "and data.documents=reset hand it to say where documents begin. Give its forward that argument, or set "
            "data.order=shuffled and data.documents=join.",
            operation="reset",
            reason="no reset_mask_bt",
        )


def require_masks(model: nn.Module) -> None:
    """Raises CapabilityError where a model cannot keep attention within a document while its memories read on."""
    reason, mixers = None, [block.mixer for block in getattr(model, "blocks", ())]
    attending = [mixer for mixer in mixers if any(isinstance(each, Attention) for each in mixer.modules())]
    apart = [mixer for mixer in mixers if isinstance(mixer, ReadsDocuments)]
    if "attend_mask_bt" not in inspect.signature(model.forward).parameters:
        reason = f"{type(model).__name__} takes no attend_mask_bt"
    elif not attending:
        reason = f"{type(model).__name__} has no attention"
    for mixer in mixers:
        is_ours = type(mixer).__module__.startswith("meristem.")
        if reason is None and mixer not in apart and (mixer in attending or not is_ours):
            reason = f"the mixer {type(mixer).__name__} does not read packed documents in a way of its own"
    if reason is not None:
        raise CapabilityError(
            f"data.documents=mask keeps attention within a document while memories read on: {reason}. "
            f"Set data.documents=reset, which begins each document afresh, or join.",
            operation="mask",
            reason=reason,
        )
