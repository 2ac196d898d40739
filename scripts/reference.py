"""Writes docs/configuration.md from the code; the tests fail when the page is stale."""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard, get_args

from pydantic.fields import FieldInfo

from meristem.config import ConfigSection
from meristem.config.describe import first_line, type_words
from meristem.runs.config import Config

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

HEAD = """# Configuration

Written by `scripts/reference.py` from the code. Layers, lowest first: defaults, preset, files, environment
(`MERISTEM__TRAIN__GRAD_ACCUM_STEPS=4`), command line (`train.grad_accum_steps=4`). `meristem config show PRESET --why`
says which layer set each value, `meristem config explain KEY` what a key does; an unknown key is an error that
names the nearest.

**Files.** A YAML file may begin with `base:`, which names what it stands over: a preset (`base: titans-mag`,
`base: hope-340m`), a size (`base: 340m`) or another file, by a path from its own place (`base: ../team.yaml`).
Several files may be given, the last wins: `meristem train mine.yaml faster.yaml train.steps=2000`.

**Text.** What follows `=` on the command line, or stands in the environment, is the value of a key of text or of a
path (`str`, `Path`) as it is: `data.source=notes #1.txt`, `data.source=2024` and `data.source=null` name files.
Where a key also takes null, `null`, `~` and nothing at all mean that. Everything else is read as YAML 1.2, as a
file is: there a text that looks like a number, a truth value, null or a comment stands in quotes.

**Numbers.** One grammar in files, on the command line and in the environment: an optional sign; decimal digits with
no 0 before them, or a fraction (`0.5`, `.5`, `5.`); an optional power of ten (`1e-3`). A whole number may be
written with a power (`1e6`). Not numbers, and refused: `.inf`, `.nan` and what is too large to be finite (`1e400`),
`true` and `false`, text in quotes, `0x10`, `0o17`, `010`, `1_000`. Durations may add a unit: `90s`, `3m`, `1.5h`,
`2d`.
"""


def page() -> str:
    """The whole reference, one table a part."""
    sections = [HEAD]
    for name, field in Config.model_fields.items():
        part = field.annotation
        if not (isinstance(part, type) and issubclass(part, ConfigSection)):
            raise TypeError(f"{name} is {part}; every field of the tree is a part")
        rows = "\n".join(rows_of(name, part))
        sections.append(
            f"## {name}\n\n{first_line(part)}\n\n| key | default | accepts | meaning |\n|---|---|---|---|\n{rows}\n"
        )
    return "\n".join(sections)


def rows_of(name: str, config: type[ConfigSection]) -> Iterator[str]:
    """The settings of a part, those of parts inside it among them."""
    for key, field in config.model_fields.items():
        if is_part(field.annotation):
            yield from rows_of(f"{name}.{key}", field.annotation)
            continue
        yield row(name, key, field)
        for listed in filter(is_part, get_args(field.annotation)):
            yield from rows_of(f"{name}.{key}[]", listed)


def is_part(kind: object) -> TypeGuard[type[ConfigSection]]:
    return isinstance(kind, type) and issubclass(kind, ConfigSection)


def row(part: str, key: str, field: FieldInfo) -> str:
    """One setting as a line of a table."""
    if not field.description:
        raise ValueError(f"{part}.{key} has no description; say in its Field what it means")
    limits = ", ".join(str(limit) for limit in field.metadata if "(" in str(limit) and "Validator" not in str(limit))
    accepts = f"{type_words(field)}{'; ' + limits if limits else ''}".replace("typing.", "").replace("|", "\\|")
    default = "" if field.is_required() else f"`{field.get_default(call_default_factory=True)}`"
    return f"| `{part}.{key}` | {default} | {accepts} | {field.description.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
