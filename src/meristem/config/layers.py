"""Layers of settings, merged into one validated tree that knows where each leaf came from."""

import copy
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

from pydantic import ValidationError

from meristem.config.kinds import kinds_of
from meristem.config.mistakes import explain, nearest_words
from meristem.config.section import ConfigSection
from meristem.config.text import leaves, read_value, read_yaml
from meristem.errors import ConfigError, WrongValue

P = TypeVar("P", bound=ConfigSection)

PREFIX: Final = "MERISTEM__"
DEFAULTS: Final = "defaults"


class Loaded(NamedTuple, Generic[P]):
    """The resolved tree, and for each dotted leaf the layer that set it."""

    tree: P
    why: dict[str, str]


class Layer(NamedTuple):
    """What one place says: dotted leaf to value. ``where`` maps a leaf to the words that name the place in messages."""

    settings: dict[str, object]
    where: dict[str, str]


def load(
    root: type[P],
    preset: str | None = None,
    file: Path | Sequence[Path] | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Iterable[str] = (),
    *,
    text: str | None = None,
    read: Callable[[str, str], dict[str, Any]] = read_yaml,
) -> Loaded[P]:
    """Merge the layers, lowest first: defaults, preset, file, environment, overrides; then validate once.

    A file stands over what its line ``base:`` names: a preset, a size, or another file, by a path from its own place.

    file: or several, each over those before it.
    environment: variables such as MERISTEM__TRAIN__GRAD_ACCUM_STEPS=4 (pass ``os.environ``); None reads none.
    overrides: texts ``a.b=c``, the value read as its key takes it (``read_value``). One wins even when it says what the
    default says.
    text: what the first file says, where it was read already.
    read: the settings in the text of ``file``, given with the words that name it.
    """
    layers = []
    if preset is not None:
        layers += [_whole(told.settings, told.place) for told in _lineage(preset)]
    for n, each in enumerate([file] if isinstance(file, Path) else file or ()):
        layers += [_whole(told.settings, told.place) for told in _file_lineage(each, None if n else text, read)]
    layers.append(_environment(root, environment or {}))
    layers.append(_overrides(root, overrides))
    merged: dict[str, Any] = {}
    for layer in layers:
        _replace(root, layer)
        for path, value in layer.settings.items():
            _put(merged, path, value)
    try:
        tree = root.model_validate(merged)
    except ValidationError as cause:
        raise explain(cause, root, lambda path: _winner(path, layers)) from None
    resolved = leaves(tree.model_dump(mode="json"))
    return Loaded(tree, {path: _winner(path, layers) for path in resolved})


def preset_names() -> list[str]:
    """The presets in the package, sorted. ``sized`` says which of them also come as ``<preset>-<size>``."""
    return _names("presets")


def size_names() -> list[str]:
    """The sizes that presets of papers come in, sorted."""
    return _names("sizes")


def sized() -> list[str]:
    """The presets that come in every size: those that say where their numbers are from."""
    return [name for name in preset_names() if "sources" in _read("presets", name)]


def is_preset(preset_or_file: str) -> bool:
    """Whether the text names a preset and no file."""
    return Path(preset_or_file).suffix not in (".yaml", ".yml") and os.sep not in preset_or_file


def sources(preset_or_file: str) -> dict[str, str]:
    """Where the settings of a preset, or of those that a file builds on, are from: leaf to equation or "ours"."""
    found: dict[str, str] = {}
    for layer in _lineage(preset_or_file) if is_preset(preset_or_file) else _file_lineage(Path(preset_or_file)):
        found |= layer.sources
    return found


def told_by_presets(key: str) -> dict[str, object]:
    """What presets and sizes say of a dotted key, by their names."""
    return {place: settings[key] for place, settings in _all_presets().items() if key in settings}


@functools.cache
def _all_presets() -> dict[str, dict[str, object]]:
    """What every preset and size says itself, without what it builds on."""
    sizes = [f"{name}-{size}" for name in sized() for size in size_names()]
    told = (each for preset in (*preset_names(), *sizes) for each in _lineage(preset))
    return {each.place: leaves(each.settings) for each in told}


def _names(folder: str) -> list[str]:
    entries = (resources.files("meristem.config") / folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def _read(folder: str, name: str) -> dict[str, Any]:
    return copy.deepcopy(_parsed(folder, name))


@functools.cache
def _parsed(folder: str, name: str) -> dict[str, Any]:
    text = (resources.files("meristem.config") / folder / f"{name}.yaml").read_text(encoding="utf-8")
    return read_yaml(text, f"{folder.removesuffix('s')} {name}")


def schema(root: type[ConfigSection]) -> dict[str, Any]:
    """The tree as JSON Schema, for editors and other programs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | root.model_json_schema()


class FileSettings(NamedTuple):
    """What one file of a preset, or of a user, says."""

    place: str
    settings: dict[str, Any]
    sources: dict[str, str]


def _lineage(preset: str) -> list[FileSettings]:
    """A preset after the one that its first line ``base: name`` builds on, and so on down.

    ``<preset>-<size>`` adds the file of the size, and on top what the preset's ``sizes:`` says of it.
    """
    name, size = _split(preset)
    tree = _read("presets", name)
    below = _lineage(tree.pop("base")) if "base" in tree else []
    of_size = tree.pop("sizes", {}).get(size, {})
    told = [*below, FileSettings(f"preset {name}", tree, tree.pop("sources", {}))]
    if size:
        told.append(_size(size))
        told.append(FileSettings(f"size {size} of preset {name}", of_size, of_size.pop("sources", {})))
    return told


def _size(name: str) -> FileSettings:
    settings = _read("sizes", name)
    return FileSettings(f"size {name}", settings, settings.pop("sources", {}))


def _file_lineage(
    path: Path,
    text: str | None = None,
    read: Callable[[str, str], dict[str, Any]] = read_yaml,
    above: tuple[Path, ...] = (),
) -> list[FileSettings]:
    """A file after what its line ``base:`` names. above: the files that build on this one, the first of them first."""
    if os.path.realpath(path) in map(os.path.realpath, above):
        way = " -> ".join(map(str, (*above, path)))
        raise ConfigError(f"config files build on each other: {way}. Remove 'base:' from one.", path=str(path))
    if above and not path.is_file():
        raise ConfigError(
            f"base (file {above[-1]}): there is no file {path}. A path counts from the file that names it.",
            path="base",
            value=str(path),
        )
    settings = _file(path, text, read)
    base, place = settings.pop("base", None), f"file {path}"
    own = FileSettings(place, settings, {})
    if base is None:
        return [own]
    if not isinstance(base, str) or not base:
        raise WrongValue(
            f"base: found {base!r} ({place}); expected a preset, a size, or the path of a YAML file.",
            path="base",
            value=base,
        )
    if not is_preset(base):
        return [*_file_lineage(path.parent / base, None, read, (*above, path)), own]
    if base in size_names():
        return [_size(base), own]
    try:
        return [*_lineage(base), own]
    except WrongValue as error:
        raise WrongValue(
            f"base ({place}): {error} Name a preset, a size ({', '.join(size_names())}), or a file that ends in .yaml.",
            **error.fields | {"path": "base"},
        ) from None


def _split(preset: str) -> tuple[str, str]:
    """The name of a preset and its size, "" where it has none."""
    names = preset_names()
    for size in size_names():
        name = preset.removesuffix(f"-{size}")
        if name != preset and name in names and "sources" in _read("presets", name):
            return name, size
    if preset in names:
        return preset, ""
    if "=" in preset:
        raise WrongValue(
            f"'{preset}' is a setting, and a preset or a YAML file stands before all settings. Write default {preset}.",
            value=preset,
            accepted=names,
        )
    known = [*names, *(f"{name}-{size}" for name in sized() for size in size_names())]
    raise WrongValue(
        f"no preset is called '{preset}'. Nearest: {', '.join(nearest_words(preset, known)) or 'none'}.",
        value=preset,
        accepted=names,
    )


def _file(path: Path, text: str | None, read: Callable[[str, str], dict[str, Any]]) -> dict[str, Any]:
    try:
        text = text if text is not None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"the config file {path} cannot be read: {reason}. Give a YAML file.", path=str(path)
        ) from cause
    return read(text, f"file {path}")


def _whole(mapping: dict[str, Any], place: str) -> Layer:
    settings = leaves(mapping)
    return Layer(settings, dict.fromkeys(settings, place))


def _environment(root: type[ConfigSection], variables: Mapping[str, str]) -> Layer:
    layer = Layer({}, {})
    for name in sorted(variables):
        if name.startswith(PREFIX):
            path = name.removeprefix(PREFIX).lower().replace("__", ".")
            _say(layer, root, path, variables[name], f"environment {name}")
    return layer


def _overrides(root: type[ConfigSection], texts: Iterable[str]) -> Layer:
    layer = Layer({}, {})
    for text in texts:
        path, equals, value = text.partition("=")
        if not equals or not all(path.split(".")):
            raise ConfigError(
                f"found '{text}' on the command line; expected a.b=c, such as train.grad_accum_steps=4.",
                value=text,
            )
        _say(layer, root, path, value, f"command line {text}")
    return layer


def _say(layer: Layer, root: type[ConfigSection], path: str, text: str, where: str) -> None:
    """Put into a layer what a text says of a key."""
    for leaf, value in leaves(read_value(text, where, kinds_of(root, path)), path).items():
        layer.settings[leaf] = value
        layer.where[leaf] = where


def _replace(root: type[ConfigSection], layer: Layer) -> None:
    """Make null in a layer what its keys stand in for (``ConfigSection.replaces``) and it does not set itself."""
    for path, value in list(layer.settings.items()):
        section, _, name = path.rpartition(".")
        parts = [kind for kind in kinds_of(root, section) if isinstance(kind, type) and issubclass(kind, ConfigSection)]
        for other in parts[0].replaces.get(name, ()) if parts and value is not None else ():
            layer.settings.setdefault(f"{section}.{other}", None)
            layer.where.setdefault(f"{section}.{other}", layer.where[path])


def _put(tree: dict[str, Any], path: str, value: object) -> None:
    """Set one leaf. What stood there or above it is replaced; an empty section changes nothing."""
    *above, last = path.split(".")
    for key in above:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    if value != {}:
        tree[last] = value
    else:
        tree.setdefault(last, {})


def _winner(path: str, layers: list[Layer]) -> str:
    """The highest place that set ``path``, something above it or, for a section, something in it."""
    for layer in reversed(layers):
        for said, value in reversed(layer.settings.items()):
            is_above = path.startswith(f"{said}.") and value != {}
            if path == said or is_above or said.startswith(f"{path}."):
                return layer.where[said]
    return DEFAULTS
