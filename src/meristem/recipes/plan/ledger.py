"""A ledger of one run: every storage that lives, every operation that runs, and the module it belongs to.

The run may be on fake tensors, where nothing is allocated, or on real ones, where the figures are those of the
machine's allocator less the scratch space inside kernels. Storages are followed by weak references: one that autograd
keeps counts until autograd lets go.
"""

import sys
import traceback
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from meristem.recipes.plan.flops import flops_of

aten = torch.ops.aten

SOURCES = Path(__file__).parents[3]
NOT_ASKING = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


Shapes = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Storage:
    """One block of device bytes: the operation that made it, in which module and at which stage of the run."""

    size_bytes: int
    operation: str
    shape: tuple[int, ...]
    dtype: str
    module: str
    stage: str


@dataclass(frozen=True)
class Moment:
    """A point of the run, as a number of births and deaths, and the bytes that lived then."""

    position: int
    size_bytes: int
    by_category: dict[str, int]


class Ledger(TorchDispatchMode):
    """Follows what runs inside it. Enter it inside ``FakeTensorMode``, so that it sees operations first."""

    def __init__(self, granule_bytes: int = 1) -> None:
        super().__init__()
        self.granule_bytes = granule_bytes
        self.spans = Spans()
        self.flops: Counter[tuple[str, str]] = Counter()
        self.unknown: Counter[str] = Counter()
        self.readings: Counter[str] = Counter()
        self.n_operations: Counter[str] = Counter()
        self._stage = ""
        self._storages: list[Storage] = []
        self._categories: dict[int, str] = {}
        self._alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        # Births and deaths in order: +(i + 1) when storage i is born, -(i + 1) when it dies.
        self._moves: list[int] = []

    def __torch_dispatch__(
        self, operation: OpOverload, types: object, args: Sequence[Any] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if operation is torch.ops.prim.device.default:
            # More than half of all calls on fake tensors; nothing happens in them.
            return args[0].fake_device if isinstance(args[0], FakeTensor) else operation(*args)
        kwargs = kwargs or {}
        if operation is aten._local_scalar_dense.default and not has_value(args[0]):
            return self._read(args[0])
        self.n_operations[self._stage] += 1
        out = operation(*args, **kwargs)
        flops = flops_of(operation, args, kwargs, out)
        if flops is None:
            self.unknown[str(operation)] += 1
        elif flops:
            self.flops[self._stage, self.spans.now()] += flops
        for tensor in tensors_in(out):
            self._follow(tensor, operation)
        return out

    def stage(self, name: str) -> None:
        """From here on, what happens belongs to this stage."""
        self._stage = name

    def claim(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Say what these tensors are; the first claim on a storage stands."""
        for tensor in tensors:
            entry = self._alive.get(tensor.untyped_storage()._cdata)
            if entry is not None:
                self._categories.setdefault(entry[0], category)

    def claim_rest(self, category: str, stage: str) -> None:
        """Say what everything still alive that was made in this stage is."""
        for index, _ in self._alive.values():
            if self._storages[index].stage == stage:
                self._categories.setdefault(index, category)

    def moments(self) -> dict[tuple[str, str], Moment]:
        """For each stage and module, the moment at which most bytes lived while it worked; the highest is the peak."""
        highest: dict[tuple[str, str], Moment] = {}
        by_category: Counter[str] = Counter()
        live_bytes = 0
        for position, move in enumerate(self._moves, start=1):
            storage, category = self._entry(abs(move) - 1)
            size_bytes = storage.size_bytes if move > 0 else -storage.size_bytes
            live_bytes += size_bytes
            by_category[category] += size_bytes
            place = (storage.stage, storage.module)
            if move > 0 and (place not in highest or live_bytes > highest[place].size_bytes):
                highest[place] = Moment(position, live_bytes, dict(+by_category))
        return highest

    def living(self, moment: Moment) -> list[tuple[Storage, str]]:
        """What lived at that moment, each with its category."""
        live: set[int] = set()
        for move in self._moves[: moment.position]:
            if move > 0:
                live.add(move - 1)
            else:
                live.remove(-move - 1)
        return [self._entry(index) for index in sorted(live)]

    def _entry(self, index: int) -> tuple[Storage, str]:
        return self._storages[index], self._categories.get(index, "temporaries")

    def _follow(self, tensor: Tensor, operation: OpOverload) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        index = len(self._storages)
        size_bytes = -(-storage.nbytes() // self.granule_bytes) * self.granule_bytes
        name = operation._schema.name.removeprefix("aten::")
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._storages.append(Storage(size_bytes, name, tuple(tensor.shape), dtype, self.spans.now(), self._stage))
        self._moves.append(index + 1)

        def gone(_: object) -> None:
            del self._alive[address]
            self._moves.append(-index - 1)

        self._alive[address] = (index, weakref.ref(storage, gone))

    def _read(self, tensor: Tensor) -> object:
        """Note the line that read a value that does not exist, and return True, 1 or 0.0.

        Finite, non-empty, and no flag raised: what a healthy run would read.
        """
        if self.spans.is_inside:
            self.readings[asking_line()] += 1
        return 0.0 if tensor.dtype.is_floating_point else tensor.dtype is torch.bool or 1


class Spans:
    """Which module an operation belongs to, in the forward pass and in the backward pass.

    In the forward pass it is the innermost module that runs. Autograd numbers its nodes in the order of the forward
    pass, so a list of (first number, module) finds the module of a node in the backward pass. Unlike torch's module
    tracker this holds for modules that run twice.
    """

    def __init__(self) -> None:
        self.calls: dict[str, tuple[Shapes, Shapes]] = {}
        # Outside every module, as in the model's own forward, the name is empty.
        self._open: list[str] = [""]
        self._numbers: list[int] = [0]
        self._names: list[str] = [""]

    def attach(self, model: nn.Module) -> None:
        """Watch every module of a model that is thrown away after the plan."""
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name))
            # Also when the call raises: a recomputation under checkpointing stops so when it has what it needs.
            module.register_forward_hook(partial(self._leave, name), always_call=True)

    @property
    def is_inside(self) -> bool:
        """Whether the model is at work, forward or backward, and not the code around it."""
        return len(self._open) > 1 or torch._C._current_autograd_node() is not None

    def now(self) -> str:
        """The module of the operation that is running."""
        node = torch._C._current_autograd_node()
        if node is not None and len(self._open) == 1:
            return self._names[bisect_right(self._numbers, node._sequence_nr()) - 1]
        return self._open[-1]

    def _enter(self, name: str, module: nn.Module, args: object) -> None:
        self._open.append(name)
        self._mark()

    def _leave(self, name: str, module: nn.Module, args: object, out: object) -> None:
        if name not in self.calls:
            self.calls[name] = (shapes_of(args), shapes_of(out))
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._names.append(self._open[-1])


def shapes_of(value: object) -> Shapes:
    """The tensors that are handed over as such; those inside a state are not listed."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [tuple(item.shape) for item in items if isinstance(item, Tensor)]


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def has_value(tensor: Tensor) -> bool:
    """Whether there is something to read: in a real tensor, or in a fake one made from a constant."""
    return not isinstance(tensor, FakeTensor) or tensor.constant is not None


def asking_line() -> str:
    """``file:line`` of the innermost code at work that is neither torch's nor the plan's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(NOT_ASKING):
        frame = frame.f_back
    return "unknown" if frame is None else _place(frame.f_code.co_filename, frame.f_lineno)


def failing_line(error: BaseException) -> str:
    """``file:line`` of the innermost code that the error passed through and that is neither torch's nor the plan's."""
    passed = [step for step in traceback.extract_tb(error.__traceback__) if not step.filename.startswith(NOT_ASKING)]
    return _place(passed[-1].filename, passed[-1].lineno or 0) if passed else "unknown"


def _place(file: str, line: int) -> str:
    path = Path(file)
    return f"{path.relative_to(SOURCES) if path.is_relative_to(SOURCES) else path}:{line}"
