"""What a key takes, by its declared type: text as it is given, numbers in one grammar."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

WHOLE: Final = r"[-+]?(?:0|[1-9][0-9]*)"
"""A whole number: decimal digits, no zero before them."""

NUMBER: Final = r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
"""A number: a whole number, a fraction, a power of ten. Nothing else is one: no .inf, 0x10, 0o17, 010 or 1_000."""

_TEXT: Final = frozenset({str, Path})


def kinds(annotation: object) -> frozenset[object]:
    """The types of a union, or the one; where a validator reads text before pydantic does, text is one of them."""
    if get_origin(annotation) is Annotated:
        inner, *added = get_args(annotation)
        return kinds(inner) | ({str} if any(isinstance(each, BeforeValidator) for each in added) else frozenset())
    if get_origin(annotation) in (Union, UnionType):
        return frozenset().union(*map(kinds, get_args(annotation)))
    return frozenset({annotation})


def kinds_of(root: type[BaseModel], path: str) -> frozenset[object]:
    """The types that a dotted key of the tree takes; none where it has no such key."""
    found: frozenset[object] = frozenset({root})
    for name in path.split("."):
        sections = [each for each in found if isinstance(each, type) and issubclass(each, BaseModel)]
        fields = [each.model_fields[name] for each in sections if name in each.model_fields]
        values = [get_args(each)[1] for each in found if get_origin(each) is dict]
        found = _of_field(fields[0]) if fields else kinds(values[0]) if values else frozenset()
    return found


def takes_text(takes: frozenset[object]) -> bool:
    """Whether a key takes any text, or a path, and besides it null at most."""
    return bool(takes & _TEXT) and takes <= _TEXT | {NoneType}


def takes_texts(takes: frozenset[object]) -> bool:
    """Whether a key takes a list of texts."""
    return any(get_origin(each) in (tuple, list) and takes_text(kinds(get_args(each)[0])) for each in takes)


def require_numbers(field: FieldInfo, value: object) -> None:
    """Raise ValueError, with what is accepted, where pydantic would make a number of a truth value or of text."""
    accepted = _misread(_of_field(field), value)
    if accepted:
        raise ValueError(accepted)


def _of_field(field: FieldInfo) -> frozenset[object]:
    return kinds(Annotated[field.annotation, None, *field.metadata])


def _misread(takes: frozenset[object], value: object) -> str | None:
    """What is accepted in place of a value that only looks like a number; None for every other."""
    numbers = takes & {int, float}
    is_text = isinstance(value, str) and not (takes & _TEXT or any(get_origin(each) is Literal for each in takes))
    if numbers and (is_text or (isinstance(value, bool) and bool not in takes)):
        return "a number" if float in numbers else "a whole number"
    lists = [kinds(get_args(each)[0]) for each in takes if get_origin(each) in (tuple, list)]
    if lists and isinstance(value, tuple | list):
        # A list of texts or of numbers takes both here; pydantic then wants all items to be of one kind.
        return next(filter(None, (_misread(frozenset[object]().union(*lists), item) for item in value)), None)
    for each in takes:
        inner = get_args(each)
        if get_origin(each) is dict and isinstance(value, Mapping):
            keys = [key for key in value if inner[0] is int and not re.fullmatch(WHOLE, str(key))]
            found = ["whole numbers as keys"] if keys else [_misread(kinds(inner[1]), item) for item in value.values()]
        else:
            continue
        if any(found):
            return next(filter(None, found))
    return None
