"""A tree as text: YAML for people, canonical JSON for fingerprints."""

import hashlib
import math
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, Final

import rfc8785
import yaml

from meristem.config.kinds import NUMBER, WHOLE, takes_text, takes_texts
from meristem.config.section import ConfigSection
from meristem.errors import ConfigError, WrongValue

LARGEST_EXACT: Final = 2**53 - 1
"""The largest integer that every JSON reader keeps; larger ones are written as decimal text."""


def canonical(value: object) -> bytes:
    """RFC 8785 JSON: the one byte string that all equal values share."""
    return rfc8785.dumps(_plain(value))


def fingerprint(value: object) -> str:
    """Lower-case hex SHA-256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical(value)).hexdigest()


def identity(settings: ConfigSection) -> str:
    """The fingerprint of all settings that change what is trained: the same command goes on where it is the same."""
    return fingerprint(_inside(settings))


def identity_of_choices(settings: ConfigSection) -> str:
    """The same of those settings alone that are not their defaults: keys that a later version adds do not change it.

    A default that a later version changes does not either; whoever keeps results by it has to number such changes.
    """
    return fingerprint(_inside(settings, has_defaults=False))


def leaves(tree: object, path: str = "") -> dict[str, object]:
    """Dotted path to value for everything in nested mappings that is not itself a filled mapping."""
    if not isinstance(tree, Mapping) or (path and not tree):
        return {path: tree}
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{path}.{key}" if path else str(key))
    return found


def read_yaml(text: str, source: str = "the text") -> dict[str, Any]:
    """The mapping that ``text`` holds; ``source`` names it in errors. Empty text is an empty mapping."""
    value = _parsed(text, source)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{source} holds a {type(value).__name__} at its top level; expected lines like 'key: value'.",
            source=source,
        )
    return value


def read_value(text: str, source: str, takes: frozenset[object] = frozenset()) -> Any:
    """One value as its key takes it.

    A key of text is given the text itself; only empty text, and null where the key takes it, are no text. The items of
    a list of texts are text. Else YAML types it: ``4`` a number, ``[a, b]`` a list, ``adamw`` text.
    """
    if takes_text(takes):
        is_null = not text or (NoneType in takes and text in ("null", "~"))
        return None if is_null else text
    return _parsed(text, source, _TextReader if takes_texts(takes) else _Reader)


def dump_yaml(mapping: Mapping[str, object] | ConfigSection) -> str:
    """YAML that ``read_yaml`` gives back unchanged, keys in the order given."""
    plain = mapping.model_dump(mode="json") if isinstance(mapping, ConfigSection) else dict(mapping)
    return yaml.dump(plain, Dumper=_Writer, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100)


class _Reader(yaml.SafeLoader):
    """Safe YAML that types plain scalars as YAML 1.2 does, decimal and finite numbers only, and refuses a double key.

    YAML 1.1, PyYAML's own reading, makes text of 1e-3, a truth value of off and sixty times one of 1:00.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands on line {lines[key]} already; keep one", key_node.start_mark
                )
            lines[key] = line
        values = [self.construct_object(value, deep=True) for _, value in node.value]
        return dict(zip(lines, values, strict=True))


class _Writer(yaml.SafeDumper):
    """Safe YAML that quotes every text which either reading of plain scalars would take for something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def text(self, text: str) -> yaml.ScalarNode:
        """PyYAML writes some line separators bare and then reads them as spaces; quoted, it escapes them."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_PLAIN: Final = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", WHOLE, list("-+0123456789")),
    ("float", NUMBER, list("-+.0123456789")),
)
for _tag, _pattern, _first in _PLAIN:
    for _class in (_Reader, _Writer):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Writer.add_representer(str, _Writer.text)
_Reader.add_constructor("tag:yaml.org,2002:map", _Reader.mapping)


class _TextReader(_Reader):
    """The same, but every plain scalar is text."""

    yaml_implicit_resolvers: dict[str, Any] = {}


def _inside(settings: ConfigSection, *, has_defaults: bool = True) -> dict[str, Any]:
    plain = settings.model_dump(mode="json")
    left_out = settings.outside_identity | {key for key in settings.outside_while_null if plain[key] is None}
    if not has_defaults:
        fields = type(settings).model_fields.items()
        left_out |= {key for key, one in fields if getattr(settings, key) == one.get_default(call_default_factory=True)}
    kept = {key: getattr(settings, key) for key in plain if key not in left_out}
    return {
        key: _inside(value, has_defaults=has_defaults) if isinstance(value, ConfigSection) else plain[key]
        for key, value in kept.items()
        if not (isinstance(value, ConfigSection) and value.is_outside_identity)
    }


def _parsed(text: str, source: str, reader: type[_Reader] = _Reader) -> Any:
    try:
        # A reader is a SafeLoader.
        return yaml.load(text, Loader=reader)  # nosec B506
    except yaml.MarkedYAMLError as cause:
        mark = cause.problem_mark or cause.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(
            f"{source}, line {line}: {cause.problem or cause.context}.", source=source, line=line
        ) from cause
    except RecursionError as cause:
        raise ConfigError(f"{source} nests deeper than can be read.", source=source) from cause
    except (yaml.YAMLError, ValueError) as cause:
        raise ConfigError(f"{source} is not YAML: {cause}.", source=source) from cause


def _plain(value: object) -> Any:
    if isinstance(value, ConfigSection):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise WrongValue(f"canonical JSON cannot hold {value}. Write null and name it beside.", value=value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_EXACT:
        return str(value)
    return value
