"""One token of each row after the other: on a CUDA device the step is recorded as a CUDA graph and replayed.

A token of a small model takes some hundred operations, and launching one takes longer than what it computes. A recorded
step is launched as a whole. What it reads and writes has one place for good, so it is for rows whose state keeps its
shapes: attention's once its span is full, that of memories with a matrix from the first token on. A state that counts
in integers, as that of a chunk which is not full, is read operation by operation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meristem.memory.state import State, as_tensors, flatten, unflatten
from meristem.shapes import Logits, Tokens

Reader: TypeAlias = Callable[[Tokens, State | None], tuple[Logits, State]]
"""A model, or a way to read one (``models.online.online_reader``)."""

Step: TypeAlias = Callable[[], Tensor]
Flat: TypeAlias = Mapping[str, Tensor | int]

AFTER: Final = 8
"""So many steps have to leave the shapes as they are before one is recorded, which takes as long as some of them."""


def _cuda_graph(step: Step, device: torch.device) -> tuple[Callable[[], None], Tensor]:
    # What is set up at a first call may not be recorded; another stream, since the default one cannot be.
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on meanwhile: they read texts of other sessions.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = step()
    return graph.replay, found


RECORDERS: Final[dict[str, Callable[[Step, torch.device], tuple[Callable[[], None], Tensor]]]] = {"cuda": _cuda_graph}
"""By the kind of a device: from a step, to what runs it again, and where its result then lies. A recorder may run the
step any number of times."""


class Steps:
    """Reads one token of each row, as ``reader(tokens_bt, state)`` does; on a device with a recorder by a recorded step
    once ``AFTER`` steps have kept the shapes of the state."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._n_alike = 0
        self._recorded: _Recorded | None = None
        self.refusal = ""
        """Why no step was recorded, as a clause; empty where one was, or none was tried."""

    @property
    def is_recorded(self) -> bool:
        """Whether the state that a step gives is changed in place by the next."""
        return self._recorded is not None

    @torch.no_grad()
    def __call__(self, token_ids: Sequence[int], state: State) -> tuple[Tensor, State]:
        """The predictions of the next tokens, ``(n, vocabulary)``, and the state after these.

        state: after one token or more. One that came from here may have been changed in place since.
        """
        flat = flatten(state)
        if self._recorded is not None and self._recorded.fits(flat):
            return self._recorded.run(token_ids, state)
        self._recorded = None
        # What counts for each row stays on the host.
        device = next(leaf.device for leaf in flat.values() if isinstance(leaf, Tensor) and leaf.dim() > 1)
        logits_bto, after = self._reader(torch.tensor(token_ids, device=device)[:, None], state)
        if device.type in RECORDERS and isinstance(self._reader, nn.Module) and not self.refusal:
            self._n_alike = self._n_alike + 1 if _are_alike(flat, flatten(after), device) else 0
            if self._n_alike >= AFTER:
                after = self._record(self._reader, after, len(token_ids), device)
        return logits_bto[:, -1], after

    def _record(self, model: nn.Module, state: State, n_rows: int, device: torch.device) -> State:
        """Record the step from a state on: the same state, in the places of the recorded step."""
        self._n_alike = 0
        try:
            self._recorded = _Recorded(model, state, n_rows, device)
        except RuntimeError as cause:
            self.refusal = f"a step cannot be recorded: {str(cause).splitlines()[0]}"
            return state
        return self._recorded.state


class _Recorded:
    """A step that reads its tokens and a state from fixed places, and leaves the next state there."""

    def __init__(self, reader: nn.Module, state: State, n_rows: int, device: torch.device) -> None:
        self._reader = reader
        # Each leaf in a storage of its own.
        whole = torch.contiguous_format
        self._leaves = {name: leaf.clone(memory_format=whole) for name, leaf in as_tensors(state).items()}
        self._storages = {leaf.untyped_storage().data_ptr() for leaf in self._leaves.values()}
        self.state = unflatten(self._leaves)
        self._tokens_b1 = torch.zeros(n_rows, 1, dtype=torch.int64, device=device)
        # Of what is read from elsewhere, weights and tables that a cache may forget, the record knows addresses alone.
        with _Watch() as watch:
            self._step()
        self._read = list(watch.read.values())
        self._lie_at = _places(self._read)
        self._again, self._logits_bo = RECORDERS[device.type](self._step, device)
        self._put(state)

    def fits(self, flat: Flat) -> bool:
        """Whether the step reads such a state, with the weights where they were."""
        if flat.keys() != self._leaves.keys() or _places(self._read) != self._lie_at:
            return False
        return all(
            leaf is own or (isinstance(leaf, Tensor) and leaf.shape == own.shape and leaf.dtype == own.dtype)
            for leaf, own in zip(flat.values(), map(self._leaves.__getitem__, flat), strict=True)
        )

    def run(self, token_ids: Sequence[int], state: State) -> tuple[Tensor, State]:
        """A step from a state that fits."""
        self._put(state)
        self._tokens_b1.copy_(torch.tensor(token_ids)[:, None])
        self._again()
        return self._logits_bo.clone(), self.state

    def _put(self, state: State) -> None:
        for name, leaf in as_tensors(state).items():
            if leaf is not self._leaves[name]:
                self._leaves[name].copy_(leaf)

    def _step(self) -> Tensor:
        logits_bto, after = self._reader(self._tokens_b1, self.state)
        # What is a view of a place that is written here is taken before the first is written.
        apart = {
            name: leaf.clone() if leaf.untyped_storage().data_ptr() in self._storages else leaf
            for name, leaf in as_tensors(after).items()
            if leaf is not self._leaves[name]
        }
        for name, leaf in apart.items():
            self._leaves[name].copy_(leaf)
        return logits_bto[:, -1]


class _Watch(TorchDispatchMode):
    """Hears which tensors are read that were not made meanwhile. read: by their identity."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            if tensor.untyped_storage().data_ptr() not in self._made:
                self.read[id(tensor)] = tensor
        found = function(*args, **(kwargs or {}))
        self._made.update(tensor.untyped_storage().data_ptr() for tensor in _tensors(found))
        return found


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _are_alike(before: Flat, after: Flat, device: torch.device) -> bool:
    """Whether two states have the same leaves but for what their tensors hold, all of these on the device."""
    if before.keys() != after.keys():
        return False
    return all(
        isinstance(leaf, Tensor)
        and isinstance(old, Tensor)
        and leaf.device == old.device == device
        and (leaf.shape, leaf.dtype) == (old.shape, old.dtype)
        for leaf, old in zip(after.values(), map(before.__getitem__, after), strict=True)
    )


def _places(tensors: Sequence[Tensor]) -> list[int]:
    """Where the numbers of tensors lie. What changes them there is seen by a recorded step."""
    return [tensor.data_ptr() for tensor in tensors]
