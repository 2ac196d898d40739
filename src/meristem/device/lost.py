"""What a run says when its device stops responding."""

import contextlib
from collections.abc import Iterator

import torch

from meristem.errors import DeviceLost


@contextlib.contextmanager
def answering(device: torch.device) -> Iterator[None]:
    """Turn what an accelerator raises when it has failed inside the block into ``DeviceLost``.

    After such an error nothing on the device can be trusted, and mostly nothing there can be read any more: this
    process is done with it. A device that is merely full is another error (``torch.OutOfMemoryError``) and passes.
    """
    try:
        yield
    except torch.AcceleratorError as cause:
        reason = str(cause).splitlines()[0] if str(cause) else "no reason given"
        raise DeviceLost(
            f"{device} stopped responding: {reason}. What was saved before is whole: see that the device works "
            "(`meristem doctor`), then give the same command again, or choose another device.device; the run goes on "
            "from its last checkpoint.",
            device=str(device),
            reason=reason,
        ) from cause
