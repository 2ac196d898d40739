"""What happens where a device has no room left: work is split, or ends with advice."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import torch

from meristem.errors import CPU_IS_FULL, OutOfDeviceBytes

SMALLER_MODEL: Final = "Lower data.seq_len, model.dim or model.n_layers, or choose another device.device."
"""What helps where no batch can be cut."""

T = TypeVar("T")


def is_out_of_room(error: BaseException) -> bool:
    """Whether this says that the device has no room left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or CPU_IS_FULL in str(error)


def no_room(what: str, device: torch.device, cause: str, advice: str = SMALLER_MODEL) -> OutOfDeviceBytes:
    """The error that says for ``what`` there is no room on ``device``. cause: the words of the allocator."""
    reason = cause.splitlines()[0] if cause else "no reason given"
    message = f"no room is left on {device} for {what}: {reason}. {advice}"
    return OutOfDeviceBytes(message, where=what, device=str(device), reason=reason)


def empty_cache(device: torch.device) -> None:
    """Let go of what the device keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def room_for(what: str, device: torch.device, advice: str = SMALLER_MODEL) -> Iterator[None]:
    """Turn what an allocator raises inside the block into ``OutOfDeviceBytes``, as where a batch of one row is full."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_room(error):
            raise
        raise no_room(what, device, str(error), advice) from error


def cut_to_fit(
    what: str,
    act: Callable[[int], T],
    n_pieces: int,
    *,
    most: int,
    release: Callable[[], None],
    device: torch.device,
    advice: str = SMALLER_MODEL,
) -> T:
    """What ``act`` gives for ``n_pieces``, or where the device has no room for twice as many, and so on up to ``most``.

    release: lets go of what an attempt that failed has left. Raises OutOfDeviceBytes where even ``most`` do not fit.
    """
    while True:
        try:
            return act(n_pieces)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_room(error):
                raise
            cause = str(error)
        # Outside the block that caught it: the error holds on to every tensor of the attempt that failed.
        release()
        if n_pieces >= most:
            raise no_room(what, device, cause, advice)
        n_pieces *= 2
