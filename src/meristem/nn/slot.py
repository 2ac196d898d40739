"""A place in a module where a seed can be attached: the identity while it is empty (growth.md 5).

A module gets a slot by becoming an instance of a subclass of its own class, with the slot as a child. So names of
parameters, attributes and ``isinstance`` stay what they were, a compiler sees an explicit child and no hook, and
``unslot`` gives back what was there.
"""

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn

from meristem.errors import CapabilityError, ShapeError
from meristem.memory.state import State, map_tensors
from meristem.nn.documents import Documents

Reads: TypeAlias = Literal["output", "input"]
Layout: TypeAlias = Literal["btd", "tbd"]

CHILD: Final = "slot"
"""The name of the slot among the children of its module."""


class Growing(Protocol):
    """What a slot can hold: a module that adds to what its host gives, and is not called unless it is live."""

    is_live: bool

    def __call__(
        self, host: Tensor, read: Tensor, state: State | None, documents: Documents | None
    ) -> tuple[Tensor, State]: ...


class Tape:
    """What modules with slots gave in a pass with gradients, call by call, to be given again in the next one.

    It is in use as the ``tape`` of their slots. n_micro_batches: the pieces into which a batch is cut in that pass.
    """

    def __init__(self, n_micro_batches: int = 1) -> None:
        self.n_micro_batches = n_micro_batches
        self._given: list[tuple[str, Any]] = []
        self._left: dict[str, deque[Any]] = {}
        self._is_noting = True

    def note(self, name: str, found: Any) -> None:
        """Keep what the module of a slot gave, cut from its graph."""
        if self._is_noting and torch.is_grad_enabled():
            self._given.append((name, _cut(found)))

    def again(self, name: str) -> Any:
        """What the module of a slot gave in this call of the pass before, or None: it is to be called."""
        left = self._left.get(name)
        return left.popleft() if left else None

    @contextmanager
    def played(self, slot: str) -> Iterator[None]:
        """While it lasts the module of a slot, and those that were done before it, give what they gave.

        None does unless each was called once in every call of the model, and so before the slot in each.
        """
        self._is_noting, self._left = False, self._until(slot)
        try:
            yield
        finally:
            self._left = {}

    def _until(self, slot: str) -> dict[str, deque[Any]]:
        names = [name for name, _ in self._given]
        n_calls = names.count(slot)
        in_a_call = names[: len(names) // n_calls] if n_calls else []
        if names != in_a_call * n_calls or len(in_a_call) != len(set(in_a_call)):
            return {}
        until = in_a_call[: in_a_call.index(slot) + 1] if n_calls else []
        every = {name: [found for each, found in self._given if each == name] for name in until}
        return {name: deque(found) for name, found in every.items() if all(each is not None for each in found)}


def _cut(found: Any) -> Any:
    """What a module gave without its graph: a tensor, or one with a state; None of anything else."""
    if isinstance(found, Tensor):
        return found.detach()
    if type(found) is tuple and len(found) == 2 and isinstance(found[0], Tensor) and isinstance(found[1], dict):
        return found[0].detach(), map_tensors(torch.Tensor.detach, found[1])
    return None


class Slot(nn.Module):
    """Where a seed stands in its host: what it reads, and how wide that and what it adds to are.

    reads: ``output``, what the module gives, or ``input``, what it is given; a seed adds to the output either way.
    widths: of what is read and of what is added to. layout: the axes of both; ``tbd`` has time first.
    settled: seeds that are part of the host for good. Each adds to what comes out of those before it; the seed is last.
    tape: what its module gives is noted on it, or taken from it; None where neither is wanted.

    A module whose forward has an argument ``state`` and gives ``(hidden, state)`` with a dict carries the state of the
    seed in it, under ``entry``: ``slot_blocks`` of ``blocks.1``, ``slot_mixer`` of ``blocks.1.mixer``, whose states are
    one dict. Where seeds are settled, the n-th in the slot has the entry ``slot_blocks_n``, the first ``slot_blocks``,
    so that settling changes no state. In any other module a seed begins anew with every call.
    """

    seed: nn.Module | None
    settled: nn.ModuleList
    tape: Tape | None

    def __init__(self, name: str, *, reads: Reads, widths: tuple[int, int], layout: Layout) -> None:
        super().__init__()
        self.name, self.reads, self.widths, self.layout = name, reads, widths, layout
        # The same for all blocks of a stack, which so share what is compiled.
        self.entry = f"{CHILD}_{[part for part in ('', *name.split('.')) if not part.isdecimal()][-1]}"
        self.register_module("seed", None)
        self.settled = nn.ModuleList()
        self.tape = None  # of the slot, not of its class: a compiled block would be compiled anew at the first one

    @property
    def parts(self) -> list[tuple[str, Growing]]:
        """What is added, in order, each with its entry in a state; the seed also where it is not live."""
        seeds = [*self.settled] if self.seed is None else [*self.settled, self.seed]
        return [(f"{self.entry}_{n}" if n else self.entry, cast(Growing, each)) for n, each in enumerate(seeds)]

    @property
    def is_live(self) -> bool:
        """Whether anything is added; what is settled always is."""
        seed = cast(Growing | None, self.seed)
        return (seed is not None and seed.is_live) or len(self.settled) > 0

    def forward(
        self, given: Any, read: Any, carried: Mapping[str, State], documents: Documents | None, *, has_state: bool
    ) -> Any:
        """What the module gave, with what the seed adds to it; the same object where there is nothing to add.

        given: a tensor, or a tuple that begins with one. carried: states of seeds by entry. has_state: whether the
        second entry of the tuple is a state.
        Raises ShapeError for tensors other than the slot was made for.
        """
        if not self.is_live:
            return given
        host = given[0] if isinstance(given, tuple) else given
        self._require(host, self.widths[1], "gives")
        if self.reads == "input":
            self._require(read, self.widths[0], "is given")
        is_time_first = self.layout == "tbd"
        host = host.transpose(0, 1) if is_time_first else host
        read = read.transpose(0, 1) if is_time_first and self.reads == "input" else read
        after: State = {}
        for entry, part in self.parts:
            if part.is_live:
                seen = host if self.reads == "output" else read
                host, state = part(host, seen, carried.get(entry), documents)
                after |= {entry: state} if state else {}
        host = host.transpose(0, 1) if is_time_first else host
        if not isinstance(given, tuple):
            return host
        if has_state and len(given) == 2 and isinstance(given[1], Mapping):
            return host, {**given[1], **after}
        return type(given)._make((host, *given[1:])) if hasattr(given, "_make") else (host, *given[1:])

    def _require(self, found: Any, width: int, verb: str) -> None:
        is_tensor = isinstance(found, Tensor) and not found.is_nested and found.is_floating_point()
        if is_tensor and found.dim() == 3 and found.shape[-1] == width:
            return
        if isinstance(found, Tensor):
            seen = "a nested tensor" if found.is_nested else f"{found.dtype} of shape {tuple(found.shape)}"
        else:
            seen = f"a {type(found).__name__}"
        raise ShapeError(
            f"the module of slot '{self.name}' {verb} {seen}; the slot was made for floats {tuple(self.layout)} with "
            f"d = {width}. Attach it with the width that the module has, to a module that gives a hidden tensor first, "
            f"and call a torch.nn.TransformerEncoder with enable_nested_tensor=False.",
            found=seen,
            expected=width,
        )

    def extra_repr(self) -> str:
        return f"reads={self.reads}, widths={self.widths}, layout={self.layout}"


def require_slottable(name: str, module: nn.Module) -> None:
    """Raise CapabilityError for a module that cannot have a slot."""
    cls = type(module)
    reason = ""
    if isinstance(module, torch.jit.ScriptModule):
        reason = "it is scripted; attach before torch.jit"
    elif hasattr(cls, "unslotted"):
        reason = "it has one already; graft into that, or strip the model first"
    elif hasattr(module, CHILD):
        reason = f"it uses the name '{CHILD}' for something else; attach to a module around it or inside it"
    elif isinstance(module, nn.Sequential):
        reason = "it calls every child that it has, and the slot would be one; name its last child"
    elif cls.forward is nn.Module.forward or isinstance(module, nn.ModuleList | nn.ModuleDict):
        reason = "it is never called; name what it holds"
    elif "forward" in vars(module):
        reason = "something has replaced its forward; attach before that"
    if reason:
        raise CapabilityError(
            f"'{name}', of the class {cls.__name__}, cannot have a slot: {reason}.", operation="attach", reason=reason
        )


def put_slot(module: nn.Module, slot: Slot) -> None:
    """Give a module a slot, in place: parameters and buffers, their names and all attributes stay.

    Raises what ``require_slottable`` raises.
    """
    require_slottable(slot.name, module)
    cls: Any = type(module)
    module.__class__ = _slotted(cls)
    module.add_module(CHILD, slot)


def slot_of(module: nn.Module) -> Slot | None:
    """The slot of a module that was given one."""
    slot = getattr(module, CHILD, None) if hasattr(type(module), "unslotted") else None
    return slot if isinstance(slot, Slot) else None


def unslot(module: nn.Module) -> None:
    """Undo ``put_slot``, whatever the slot holds."""
    cls: Any = type(module)
    delattr(module, CHILD)
    module.__class__ = cls.unslotted


@functools.cache
def _slotted(cls: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name below ``cls``, whose output goes through the slot of the module."""
    names = [*inspect.signature(cls.forward).parameters][1:]
    has_state = "state" in names

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        carried: Mapping[str, State] = {}
        entry = self.slot.entry
        if has_state and isinstance(given.get("state"), Mapping) and _has(given["state"], entry):
            carried, rest = _taken(given["state"], entry)
            at = names.index("state")
            if at < len(args):
                args = (*args[:at], rest, *args[at + 1 :])
            else:
                kwargs = {**kwargs, "state": rest}
        slot = self.slot
        found = None if slot.tape is None else slot.tape.again(slot.name)
        if found is None:
            found = cls.forward(self, *args, **kwargs)
            if slot.tape is not None:
                slot.tape.note(slot.name, found)
        if not slot.is_live:
            return found
        read = args[0] if args else next(iter(kwargs.values()), None)
        packing = _packing(found, given) if has_state else None
        return slot(found, read, carried, packing, has_state=has_state)

    body: dict[str, Callable[..., Any] | type] = {"forward": forward, "unslotted": cls}
    if hasattr(cls, "forward_documents"):

        def forward_documents(self: Any, hidden_btd: Tensor, state: State | None, documents: Documents) -> Any:
            carried, rest = ({}, None) if state is None else _taken(state, self.slot.entry)
            found = cls.forward_documents(self, hidden_btd, rest, documents)
            return self.slot(found, hidden_btd, carried, documents, has_state=True)

        body["forward_documents"] = forward_documents
    return type(cls.__name__, (cls,), body)


def _has(state: State, entry: str) -> bool:
    return any(_is_of(name, entry) for name in state)


def _is_of(name: str, entry: str) -> bool:
    """Whether a name in a state is that of a seed in the slot with this entry."""
    return name == entry or (name.startswith(f"{entry}_") and name.removeprefix(f"{entry}_").isdecimal())


def _taken(state: State, entry: str) -> tuple[dict[str, State], State]:
    """The states of seeds, and that of their host without them."""
    seeds = {name: leaf for name, leaf in state.items() if _is_of(name, entry) and leaf}
    return seeds, {name: leaf for name, leaf in state.items() if not _is_of(name, entry)}


def _packing(found: Any, given: Mapping[str, Any]) -> Documents | None:
    """How the rows of a call are packed with documents, by the arguments that layers of ours take for it."""
    if given.get("documents") is not None:
        packing: Documents = given["documents"]
        return packing
    masks = {name: given.get(name.removesuffix("_bt")) for name in ("reset_mask_bt", "padding_mask_bt")}
    if not any(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks.values()):
        return None
    return Documents.packed(found[0] if isinstance(found, tuple) else found, **masks)
