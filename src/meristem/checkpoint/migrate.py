"""Versions of what is saved, section by section: how an older one becomes today's, and the refusal of a newer one.

A section is a file of a checkpoint, ``run.json``, the ``session`` header of a session file, or a ``config.yaml``.
Today's version of it is one more than the number of its migrations. To save something else from now on, add one small
function to the end of its entry in ``SECTIONS``: it makes of what the version before held what the new one holds.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

from meristem.config import ConfigSection, dump_yaml, read_yaml
from meristem.errors import CheckpointTooNew

Beside: TypeAlias = Callable[[str], Any]
"""What another section of the same checkpoint or session holds, as it was saved; None where it is absent."""

Migration: TypeAlias = Callable[[Any, Beside], Any]
"""What a section holds, in one version -> the same in the next. Neither argument is changed."""

WEIGHT_NAMES: Final[tuple[Mapping[str, str], ...]] = ()
"""Words in the names of weights, old to new, one mapping for each time that they were renamed, oldest first."""


def renamed(words: Mapping[str, str]) -> Migration:
    """Tensors under other names: each word of a name, between points and strokes, that is in ``words``."""
    return lambda tensors, beside: {_renamed(name, words): tensor for name, tensor in tensors.items()}


def moved(keys: Mapping[str, str | None]) -> Migration:
    """Nested settings under other keys: dotted old to new, each a leaf or a whole section; None: it is gone."""

    def migrate(settings: dict[str, Any], beside: Beside) -> dict[str, Any]:
        found = _copied(settings)
        for old, new in keys.items():
            *above, last = old.split(".")
            level = _level(found, above, is_made=False)
            if last in level:
                value = level.pop(last)
                if new is not None:
                    *above, last = new.split(".")
                    _level(found, above, is_made=True)[last] = value
        return found

    return migrate


def _with_integers(tensors: dict[str, Any], beside: Beside) -> dict[str, Any]:
    """Whole numbers of a memory, which had a section of their own, as tensors without axes."""
    import torch  # settings, which are migrated too, are read without it

    integers = beside("memory_integers.json") or {}
    return tensors | {name: torch.tensor(number) for name, number in integers.items()}


def _with_unnamed_fingerprint(header: dict[str, Any], beside: Beside) -> dict[str, Any]:
    """The fingerprint of the weights depended on their names, which may be others now."""
    return header | {"model": None, "named_model": header["model"]}


def _with_versions(manifest: dict[str, Any], beside: Beside) -> dict[str, Any]:
    """Before files had a version, each was of the first."""
    return manifest | {"files": [{"version": 1} | file for file in manifest["files"]]}


NEW_KEYS: Final = {
    "run.random_seed": "run.seed",
    "run.root": "run.dir",
    "device.name": "device.device",
    "device.compute": "device.dtype",
    "device.parameters": "device.param_dtype",
    "data.window": "data.seq_len",
    "data.batch": "data.batch_size",
    "model.width": "model.dim",
    "model.heads": "model.n_heads",
    "model.hidden": "model.mlp_dim",
    "model.span": "model.sliding_window",
    "model.window": "model.max_seq_len",
    "model.n_persistent": "model.n_persistent_tokens",
    "model.join": "model.aggregate",
    "memory.head_width": "memory.head_dim",
    "memory.write": "memory.write_rate",
    "memory.kept": "memory.cache",
    "optim.kind": "optim.name",
    "optim.rate": "optim.lr",
    "optim.clip": "optim.grad_clip",
    "train.accumulate": "train.grad_accum_steps",
    "train.budget": "train.max_time",
    "evaluate": "eval",
    "eval.batch": "eval.batch_size",
}
"""Keys of version 1 of the settings, and what they are called since."""

GUARD_KEYS: Final = {
    "guard.is_on": "guard.enabled",
    **dict.fromkeys(
        f"guard.{key}"
        for key in "n_least times_median floor_nats in_row severe collapse collapse_from gradient_times gradient_floor "
        "gradient_in_row update_ratio held_out_span held_out_margin held_out_in_row".split()
    ),
    **dict.fromkeys(
        f"rollback.{key}"
        for key in "fast_deadline_s full_deadline_s skip_more ease ease_steps sound_after most_in_row".split()
    ),
}
"""Keys of the guard and of going back in version 3 of the settings; most of them are constants since."""

SCANNED: Final = re.compile(r"titans_mlp|titans\(|moneta|yaad|memora|trellis|atlas|omega_net|ftrl|lattice")
"""Rules that version 1 of the settings ran token by token where ``memory.form`` was ``auto``."""

PARTS: Final = ("structure", "bias", "retention", "update", "features")


def _as_scan(settings: dict[str, Any], beside: Beside) -> dict[str, Any]:
    """``auto`` was ``scan`` for a rule without an exact form; it is the form that the rule is trained with since."""
    memory = settings.get("memory", {})
    is_scanned = SCANNED.match(str(memory.get("rule"))) or any(memory.get(part) is not None for part in PARTS)
    if memory.get("form", "auto") != "auto" or not is_scanned:
        return settings
    return settings | {"memory": memory | {"form": "scan"}}


def _key(old: str, new: str) -> Migration:
    """A value under another key; what has no keys stays as it is."""

    def migrate(values: Any, beside: Beside) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {new if key == old else key: value for key, value in values.items()}

    return migrate


SECTIONS: Final[Mapping[str, tuple[Migration, ...]]] = {
    "run.json": (),
    "config.yaml": (moved(NEW_KEYS), _as_scan, moved(GUARD_KEYS)),
    "manifest.json": (_with_versions,),
    "model.safetensors": tuple(renamed(words) for words in WEIGHT_NAMES),
    "optim.safetensors": tuple(renamed(words) for words in WEIGHT_NAMES),
    "memory.safetensors": (_with_integers,),
    "random.safetensors": (),
    "random.json": (),
    "progress.json": (_key("n_parts", "n_micro_batches"),),
    "cursor.json": (),
    "device.json": (_key("compute", "dtype"),),
    "safety.json": (),
    "probe.json": (),
    "topology.json": (),
    "garden.json": (),
    "learn.json": (),
    "session": (_with_unnamed_fingerprint,),
}
"""By section: entry n, counted from 1, leads from version n to n + 1. A section that is not here is of version 1."""


def version(section: str) -> int:
    """The version in which a section is saved today, from 1."""
    return len(SECTIONS.get(section, ())) + 1


def require_readable(section: str, found: int, place: object) -> None:
    """Refuse a section that a later meristem saved. place: the file or directory that holds it, for the message."""
    if not 1 <= found <= version(section):
        raise CheckpointTooNew(
            f"{place}: its section '{section}' is of version {found}; this meristem reads up to {version(section)}. "
            f"Update meristem, or use what an earlier one saved.",
            path=str(place),
            section=section,
            version=found,
            supported=version(section),
        )


def migrated(section: str, content: Any, found: int, place: object, beside: Beside = lambda name: None) -> Any:
    """What a section that was saved in version ``found`` holds, as today's version has it.

    beside: other sections that were saved with it. CheckpointTooNew where ``found`` is later than today's.
    """
    require_readable(section, found, place)
    for migration in SECTIONS.get(section, ())[found - 1 :]:
        content = migration(content, beside)
    return content


def first_name(name: str) -> str:
    """What a weight was called in version 1; the fingerprint in sessions of that version was made with that."""
    for words in reversed(WEIGHT_NAMES):
        name = _renamed(name, {new: old for old, new in words.items()})
    return name


FIRST_SETTINGS: Final = frozenset(
    "run device tokenizer data model memory optim schedule train distributed aggregate profile guard rollback evaluate "
    "checkpoint sinks".split()
)
"""Sections of a ``config.yaml`` of version 1, which names no version; a file that a person wrote lacks some of them."""


def settings(text: str, place: object) -> dict[str, Any]:
    """The nested settings of a YAML file; those that a run saved are brought to today's keys.

    A saved file names its version as ``version``, or is of version 1 and has all of ``FIRST_SETTINGS``. Any other was
    written by a person, and is taken as it is.
    """
    found = read_yaml(text, str(place))
    if "version" not in found and not found.keys() >= FIRST_SETTINGS:
        return found
    told = found.pop("version", 1)
    if not isinstance(told, int):
        return found | {"version": told}
    migrated_settings: dict[str, Any] = migrated("config.yaml", found, told, place)
    return migrated_settings


def settings_text(config: ConfigSection) -> str:
    """The whole tree as the YAML that a run saves."""
    return dump_yaml({"version": version("config.yaml")} | config.model_dump(mode="json"))


def schema_version(said: object, name: str) -> int | None:
    """The version in ``meristem.<name>/<version>``; None where that is not what was said."""
    match = re.fullmatch(rf"meristem\.{name}/([1-9]\d*)", str(said))
    return int(match[1]) if match else None


def _renamed(name: str, words: Mapping[str, str]) -> str:
    return "".join(words.get(word, word) for word in re.split(r"([./])", name))


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _level(tree: dict[str, Any], above: Iterable[str], *, is_made: bool) -> dict[str, Any]:
    """The mapping at a path; where it is absent an empty one, which ``is_made`` puts there."""
    for key in above:
        inner = tree.get(key)
        if not isinstance(inner, dict):
            inner = {}
            if is_made:
                tree[key] = inner
        tree = inner
    return tree
