"""What a key of the settings is: said once, for the reference page and for `meristem config explain`."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args, get_origin

from pydantic.fields import FieldInfo

from meristem.config.kinds import kinds
from meristem.config.layers import PREFIX, told_by_presets
from meristem.config.mistakes import LIMITS, known_paths, nearest_key, part_of
from meristem.config.section import ConfigSection
from meristem.errors import UnknownKey

STANDS_FOR: Final[Mapping[object, object]] = {
    int: 100,
    float: 0.5,
    Path: "place",
    tuple[str, ...]: ["*.py"],
    tuple[int, ...]: [1, 8],
    dict[str, str]: {"name": "place"},
    dict[int, float]: {8: 0.5},
    dict[int, tuple[float, float]]: {8: [0.9, 0.99]},
}
"""By type, the value of an example where neither a default nor a preset has one."""


class Key(NamedTuple):
    """One key, or a section of them.

    keys: what stands in a section, with its description; none in a leaf. allowed: choices and limits, in words.
    is_identity: another value makes another run, which does not go on from the checkpoints of this one.
    set_by: preset or size to the value it gives. example: a word of the command line.
    """

    key: str
    description: str
    type: str
    default: Any
    allowed: list[str]
    is_identity: bool
    environment: str
    set_by: dict[str, Any]
    example: str
    keys: dict[str, str]


def describe(root: type[ConfigSection], key: str) -> Key:
    """A key of the tree by its dotted name; UnknownKey, with the nearest, where there is none."""
    steps = list(_steps(root, key))
    field = steps[-1][1]
    section = part_of(field.annotation)
    is_listed = any(get_origin(kind) is tuple for _, above, _ in steps[:-1] for kind in kinds(above.annotation))
    set_by = {} if section else told_by_presets(key)
    return Key(
        key=key,
        description=_meaning(field),
        type="section" if section else type_words(field),
        default=None if section else field.get_default(call_default_factory=True),
        allowed=[] if section else allowed(field),
        is_identity=not any(name in part.outside_identity for part, _, name in steps),
        environment="" if is_listed else PREFIX + key.upper().replace(".", "__"),
        set_by=set_by,
        example="" if section else _example(key, field, set_by, is_listed=is_listed),
        keys={name: _meaning(inner) for name, inner in section.model_fields.items()} if section else {},
    )


def type_words(field: FieldInfo) -> str:
    """The type of a key. What a validator reads first, as in a duration, is said by the description."""
    kind = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    return re.sub(r"Annotated\[(\w+), BeforeValidator\(.*?\)\]", r"\1", kind).replace("typing.", "")


def allowed(field: FieldInfo) -> list[str]:
    """The choices of a key, or its limits."""
    limits = LIMITS | {"pattern": "text like"}
    found = [
        f"{words} {limit}"
        for each in field.metadata
        for name, words in limits.items()
        if (limit := getattr(each, name, None)) is not None
    ]
    return [*map(str, _choices(field)), *found]


def first_line(section: type[ConfigSection]) -> str:
    """What a section is for."""
    return (section.__doc__ or "").strip().splitlines()[0]


def _meaning(field: FieldInfo) -> str:
    section = part_of(field.annotation)
    return field.description or (first_line(section) if section else "")


def _choices(field: FieldInfo) -> list[Any]:
    return [each for kind in kinds(field.annotation) if get_origin(kind) is Literal for each in get_args(kind)]


def _steps(root: type[ConfigSection], key: str) -> Iterator[tuple[type[ConfigSection], FieldInfo, str]]:
    """The sections on the way to a key, each with the field in it that is next."""
    section: type[ConfigSection] | None = root
    for name in key.split("."):
        if section is None or name not in section.model_fields:
            nearest = nearest_key(key, known_paths(root))
            hint = f"Did you mean '{nearest}'?" if nearest else f"Sections: {', '.join(root.model_fields)}."
            raise UnknownKey(f"there is no key '{key}'. {hint}", path=key, nearest=nearest)
        field = section.model_fields[name]
        yield section, field, name
        section = part_of(field.annotation)


def _example(key: str, field: FieldInfo, set_by: Mapping[str, object], *, is_listed: bool) -> str:
    """A word of the command line that sets the key, to something else than its default where that is known."""
    default = field.get_default(call_default_factory=True)
    known = [*(field.examples or ()), *set_by.values(), *_choices(field)]
    known += [not default] if isinstance(default, bool) else []
    stands = [default, *(value for kind, value in STANDS_FOR.items() if kind in kinds(field.annotation))]
    others = [each for each in known if each not in (None, default)]
    text = _word([*others, *(each for each in stands if each not in (None, (), {}))][0])
    section, _, name = key.rpartition(".")
    return shlex.quote(f"{section}=[{{{name}: {text}}}]" if is_listed else f"{key}={text}")


def _word(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_word(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(json.dumps(each) if isinstance(each, str) else _word(each) for each in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
