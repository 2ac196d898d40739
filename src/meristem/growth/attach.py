"""Slots in any model: where they can be, and the model as it was before (growth.md 5)."""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from meristem.config.mistakes import nearest_words
from meristem.errors import CapabilityError, ShapeError, WrongValue
from meristem.nn.norm import RMSNorm
from meristem.nn.slot import CHILD, Layout, Reads, Slot, put_slot, require_slottable, slot_of, unslot

WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "FSDPModule", "FullyShardedDataParallel"})
"""A part that is added inside of these is trained without the other processes, which would differ without a word."""


def attach(
    model: nn.Module,
    slots: str | Sequence[str],
    *,
    reads: Reads = "output",
    width: int | None = None,
    layout: Layout = "btd",
) -> nn.Module:
    """Give modules of any model a slot each, in place; the model itself, which computes what it did, to the bit.

    slots: names of submodules, as ``blocks.1``, or patterns in which ``*`` stands for anything but a point.
    reads: what a seed reads, the ``output`` of the module or its ``input``; it adds to the output.
    width: of both, where the module does not say it by its norms or its shape.
    layout: ``tbd`` for a model that has time first.

    Raises WrongValue where nothing has such a name, ShapeError for a width that is unknown or not the module's, and
    CapabilityError for modules that cannot have a slot; the model is untouched then.
    """
    require_unwrapped(model)
    names = _matching(model, [slots] if isinstance(slots, str) else list(slots))
    modules = {name: model.get_submodule(name) for name in names}
    for name, module in modules.items():
        require_slottable(name, module)
        _require_own(model, name, module)
        _require_layout(name, module, layout)
    made = {
        name: Slot(name, reads=reads, widths=_widths(name, module, reads, width), layout=layout)
        for name, module in modules.items()
    }
    for name, module in modules.items():
        put_slot(module, made[name])
    return model


def strip(model: nn.Module) -> nn.Module:
    """The model without slots and seeds, in place: its own classes, parameters and names, as they are now."""
    for module in [module for module in model.modules() if slot_of(module) is not None]:
        unslot(module)
    return model


def slots_in(model: nn.Module) -> dict[str, Slot]:
    """The slots of a model by the names of the modules that have them."""
    found = {name: slot_of(module) for name, module in model.named_modules()}
    return {name: slot for name, slot in found.items() if slot is not None}


def find_slot(model: nn.Module, name: str) -> Slot:
    """The slot of that name. Raises WrongValue with the nearest names."""
    found = slots_in(model)
    if name not in found:
        raise WrongValue(
            f"no slot is called '{name}'. {_nearest(name, found) or 'The model has none: attach some first.'}",
            value=name,
        )
    return found[name]


def _matching(model: nn.Module, patterns: list[str]) -> list[str]:
    names = [name for name, _ in model.named_modules() if name and f".{CHILD}." not in f".{name}."]
    found: dict[str, None] = {}
    for pattern in patterns:
        wanted = re.compile(r"[^.]*".join(map(re.escape, pattern.split("*"))))
        matches = [name for name in names if wanted.fullmatch(name)]
        if not matches:
            raise WrongValue(
                f"no module is called '{pattern}'. {_nearest(pattern, names)} A '*' stands for one part of a name.",
                value=pattern,
            )
        found |= dict.fromkeys(matches)
    return list(found)


def _nearest(name: str, names: Iterable[str]) -> str:
    nearest = nearest_words(name, names)
    return f"Nearest: {', '.join(nearest)}." if nearest else ""


def require_unwrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in WRAPPERS), None)
        if wrapper:
            raise CapabilityError(
                f"{name or 'the model'} is wrapped by {wrapper}: what is added now would be trained in each process by "
                f"itself. Take the wrapper off, change the model, and wrap it again.",
                operation="grow",
                reason=wrapper,
            )


def _require_own(model: nn.Module, name: str, module: nn.Module) -> None:
    """The module has one name, and what stands around it calls it."""
    every = list(model.named_modules(remove_duplicate=False))
    others = [other for other, each in every if each is module and other != name]
    if others:
        raise CapabilityError(
            f"'{name}' is '{others[0]}' as well: one seed would stand in two places. Name a module that has one place, "
            f"or give the model a copy of it.",
            operation="attach",
            reason="shared module",
        )
    for above, each in every:
        if _has_other_doors(each) and name.startswith(f"{above}."):
            raise CapabilityError(
                f"'{name}' stands in '{above}', of the class {type(each).__name__}, which does not always call it. "
                f"Attach to '{above}'.",
                operation="attach",
                reason="not called",
            )


def _has_other_doors(module: nn.Module) -> bool:
    """Whether a module may use what it holds without calling it: layers of torch that have a fast path, and layers of
    ours that read documents, frozen memories or a single token in ways of their own."""
    is_fast = isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    return is_fast or any(hasattr(module, name) for name in ("forward_documents", "forward_frozen", "is_writing"))


def _require_layout(name: str, module: nn.Module, layout: Layout) -> None:
    said = {each.batch_first for each in module.modules() if isinstance(getattr(each, "batch_first", None), bool)}
    if said and said != {layout == "btd"}:
        other = "tbd" if layout == "btd" else "btd"
        raise ShapeError(
            f"'{name}' has batch_first={layout != 'btd'}, and the slot the layout '{layout}': a seed would take rows "
            f"for time. Attach with layout='{other}'.",
            found=layout,
            expected=other,
        )


def _widths(name: str, module: nn.Module, reads: Reads, width: int | None) -> tuple[int, int]:
    """Widths of what is read and of what is added to."""
    last = module if isinstance(module, nn.Linear) else getattr(module, "out", None)
    if isinstance(last, nn.Linear):
        said = {last.out_features}
    else:
        said = {found for each in (module, *module.children()) if (found := _norm_width(each)) is not None}
    if len(said) != 1 and width is None:
        raise ShapeError(
            f"'{name}', of the class {type(module).__name__}, does not say how wide it is, by a norm or a last "
            f"projection. Attach it with width=, the size of the last axis of what it gives.",
            found=sorted(said),
        )
    if len(said) == 1 and width not in (None, *said):
        raise ShapeError(
            f"'{name}' has the width {said.pop()}, and {width} was given. Leave the width out.", found=width
        )
    added = width or said.pop()
    return (module.in_features if isinstance(module, nn.Linear) and reads == "input" else added), added


def _norm_width(module: nn.Module) -> int | None:
    """The width that a norm of the last axis is made for; None of any other module.

    Other libraries have norms of their own, as LlamaRMSNorm, which are known by their names and single-axis weights.
    """
    if isinstance(module, RMSNorm):
        return len(module.gain_d)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return module.normalized_shape[-1]
    shapes = {tuple(each.shape) for each in module.parameters(recurse=False)}
    is_norm = type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and len(shapes) == 1
    shape = shapes.pop() if is_norm else ()
    return shape[0] if len(shape) == 1 else None
