"""What pydantic found wrong with a tree, as a message: path, value, accepted, nearest, layer."""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from meristem.config.section import ConfigSection
from meristem.errors import ConfigError, UnknownKey, WrongValue

OTHER_WORDS: Final = {
    "learning_rate": "optim.lr",
    "rate": "optim.lr",
    "clip": "optim.grad_clip",
    "max_grad_norm": "optim.grad_clip",
    "batch": "data.batch_size",
    "block_size": "data.seq_len",
    "context_length": "data.seq_len",
    "window": "data.seq_len",
    "dataset": "data.source",
    "max_steps": "train.steps",
    "accumulate": "train.grad_accum_steps",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "warmup_steps": "schedule.warmup",
    "n_layer": "model.n_layers",
    "num_layers": "model.n_layers",
    "n_head": "model.n_heads",
    "heads": "model.n_heads",
    "hidden_size": "model.dim",
    "n_embd": "model.dim",
    "d_model": "model.dim",
    "width": "model.dim",
    "head_width": "memory.head_dim",
    "random_seed": "run.seed",
    "compute": "device.dtype",
}
"""What a key is called elsewhere, and here. Suggested, never accepted: each number has one name."""

ACCEPTED: Final = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "path": "a path",
    "finite": "a finite number",
    "none": "null",
}
"""First word of a pydantic error type to what would have been accepted."""

LIMITS: Final = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
"""A limit by the name that pydantic has for it."""


@dataclass(frozen=True)
class Mistake:
    """One thing wrong at one path."""

    path: str
    found: object
    accepted: list[str]
    is_unknown: bool
    is_missing: bool


def explain(error: ValidationError, root: type[ConfigSection], layer_of: Callable[[str], str]) -> ConfigError:
    """One error that names everything wrong with the tree; its fields describe the first thing."""
    sections = known_paths(root)
    mistakes = sorted(_mistakes(error, sections), key=lambda mistake: not mistake.is_unknown)
    lines = [_sentence(mistake, sections, layer_of(mistake.path)) for mistake in mistakes]
    first = mistakes[0]
    kind = UnknownKey if first.is_unknown else WrongValue
    text = (
        lines[0]
        if len(lines) == 1
        else "\n".join([f"{len(lines)} settings are wrong.", *(f"- {line}" for line in lines)])
    )
    return kind(
        text,
        path=first.path,
        value=first.found,
        accepted=first.accepted,
        nearest=nearest_key(first.path, sections) if first.is_unknown else None,
        layer=layer_of(first.path),
    )


def known_paths(root: type[ConfigSection], path: str = "") -> dict[str, list[str]]:
    """Every dotted path of the tree; a section maps to its keys, a leaf to an empty list."""
    found: dict[str, list[str]] = {path: list(root.model_fields)} if path else {}
    for name, field in root.model_fields.items():
        below = f"{path}.{name}" if path else name
        part = part_of(field.annotation)
        found |= known_paths(part, below) if part else {below: []}
    return found


def nearest_key(path: str, known: Collection[str]) -> str | None:
    """The known path that ``path`` most likely meant: alike as a whole, or alike in its last word."""
    section, _, last = path.rpartition(".")
    meant = OTHER_WORDS.get(last)
    if meant in known:
        return meant

    def likeness(candidate: str) -> tuple[float, float]:
        above, _, word = candidate.rpartition(".")
        by_word = difflib.SequenceMatcher(None, last, word).ratio()
        by_whole = difflib.SequenceMatcher(None, path, candidate).ratio() if above != section else 0.0
        return max(by_word, by_whole), difflib.SequenceMatcher(None, section, above).ratio()

    candidates = (candidate for candidate in known if not path.startswith(f"{candidate}."))
    best = max(candidates, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None


def nearest_words(word: str, known: Iterable[str]) -> list[str]:
    """Up to three known words, the most alike first; with nothing alike, the first three."""
    known = list(known)
    return difflib.get_close_matches(word, known, n=3, cutoff=0.3) or known[:3]


def part_of(annotation: object) -> type[ConfigSection] | None:
    """The section that a field holds, alone or in a list; None where it is a leaf."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, ConfigSection):
            return candidate
    return None


def _mistakes(error: ValidationError, sections: Mapping[str, list[str]]) -> list[Mistake]:
    """The errors by path; the branches of a union are one mistake with several accepted values."""
    found: dict[str, Mistake] = {}
    for detail in error.errors(include_url=False):
        is_unknown = detail["type"] == "extra_forbidden"
        path = ".".join(map(str, detail["loc"])) if is_unknown else _path(detail["loc"], sections)
        accepted = _accepted(detail, sections.get(path, []))
        before = found.get(path)
        if before:
            accepted = [*before.accepted, *(text for text in accepted if text not in before.accepted)]
        found[path] = Mistake(path, detail["input"], accepted, is_unknown, detail["type"] == "missing")
    return list(found.values())


def _path(location: tuple[int | str, ...], sections: Mapping[str, list[str]]) -> str:
    """The key that an error is about: pydantic goes on with union branches and list positions, we stop at the leaf."""
    path = ""
    for step in location:
        below = f"{path}.{step}" if path else str(step)
        if below not in sections:
            break
        path = below
    return path


def _accepted(detail: ErrorDetails, keys: list[str]) -> list[str]:
    kind, context = detail["type"], detail.get("ctx", {})
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        bound = bounds[kind]
        return [f"{LIMITS[bound]} {context[bound]}"]
    if kind in ("literal_error", "enum"):
        return [str(context["expected"])]
    if kind in ("value_error", "assertion_error"):
        return [str(context["error"])]
    if kind == "extra_forbidden":
        return []
    if keys:
        return [f"a section with the keys {', '.join(keys)}"]
    return [ACCEPTED.get(kind.split("_")[0], _lowered(detail["msg"]))]


def _sentence(mistake: Mistake, sections: Mapping[str, list[str]], layer: str) -> str:
    if mistake.is_unknown:
        return f"unknown key '{mistake.path}' ({layer}). {_hint(mistake.path, sections)}"
    if mistake.is_missing:
        return f"{mistake.path} is not set and has no default. Set it with {mistake.path}=VALUE."
    accepted = " or ".join(mistake.accepted)
    if isinstance(mistake.found, Mapping) and sections.get(mistake.path, ["root"]):
        return f"{mistake.path or 'the configuration'}: {accepted}."
    return f"{mistake.path}: found {_shown(mistake.found)} ({layer}); expected {accepted}."


def _hint(path: str, sections: Mapping[str, list[str]]) -> str:
    nearest = nearest_key(path, sections)
    if nearest:
        return f"Did you mean '{nearest}'?"
    section = path.rpartition(".")[0]
    keys = sections.get(section) or [known for known in sections if "." not in known]
    return f"{f'{section} has' if section in sections else 'There are'} the keys {', '.join(keys)}."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _lowered(message: str) -> str:
    """Pydantic's own words, for a kind of error that has none of ours."""
    return message.removeprefix("Input should be ").removeprefix("Value error, ")
