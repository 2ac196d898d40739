"""One registry for every kind of thing that can be chosen by name: rules, models, sources, sinks.

Our own entries stand in the room that owns the kind. Other distributions add theirs through the entry-point group
``meristem.<kind>``, in a module that says ``MERISTEM_API = <number>``. Nothing is imported until its name is used.
"""

import ast
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from meristem.errors import PluginConflict, PluginError, PluginTooOld, WrongValue

T = TypeVar("T")

NAME = re.compile(r"[a-z0-9_.-]+")


@dataclass(frozen=True)
class Origin:
    """Where the entry called ``name`` comes from. Our own entries carry the distribution ``meristem``."""

    kind: str
    name: str
    distribution: str
    version: str
    entry_point: str

    @property
    def is_ours(self) -> bool:
        """Whether it is no plugin. Other distributions have a version."""
        return self.distribution == "meristem" and not self.version


@dataclass(frozen=True)
class Finding:
    """What ``plugins check`` says about one entry; ``error`` is empty when it is usable."""

    origin: Origin
    error: str = ""
    cause: str = ""

    def to_json(self) -> dict[str, object]:
        return asdict(self.origin) | {"ok": not self.error, "error": self.error, "cause": self.cause}


class Registry(Generic[T]):
    """Things of one kind by name; names are compared without case.

    entries: name to the thing itself, or to the text ``module:attribute`` where importing it is costly.
    api: the major version of the interface that plugins of this kind are built against.
    accepts: says whether a loaded plugin is a thing of this kind.
    """

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, T | str],
        *,
        api: int = 1,
        accepts: Callable[[object], bool] = callable,
    ) -> None:
        self.kind = kind
        self.api = api
        self._accepts = accepts
        self._entries: dict[str, T | str] = {}
        self._plugins: dict[str, list[EntryPoint]] | None = None
        for name, value in entries.items():
            self.register(name, value)

    def register(self, name: str, value: T | str) -> None:
        """Add one entry; a name is taken once."""
        key = name.casefold()
        if not NAME.fullmatch(key):
            raise WrongValue(
                f"'{name}' cannot name a {self.kind}. Use letters, digits, '_', '.' and '-' only.", value=name
            )
        if key in self._entries:
            raise PluginConflict(f"a {self.kind} called '{key}' is registered already. Choose another name.", name=key)
        self._entries[key] = value

    def names(self) -> list[str]:
        """Every name that ``get`` knows, sorted; imports none of them."""
        return sorted(self._entries.keys() | self._discovered().keys())

    def get(self, name: str) -> T:
        """The thing called ``name``: ours if we have it, else the plugin's."""
        key = name.casefold()
        if key in self._entries:
            value = self._entries[key]
            if isinstance(value, str):
                value = cast(T, _imported(value))
                self._entries[key] = value
            return value
        found = self._discovered().get(key, [])
        if not found:
            nearest = difflib.get_close_matches(key, self.names(), n=3, cutoff=0.0)
            raise WrongValue(
                f"no {self.kind} is called '{name}'. Nearest: {', '.join(nearest) or 'none, the list is empty'}.",
                value=name,
                nearest=nearest,
            )
        if len(found) > 1:
            both = " and ".join(_distribution(entry) for entry in found)
            raise PluginConflict(
                f"the {self.kind} '{key}' is offered by {both}. Uninstall one of them.",
                kind=self.kind,
                name=key,
                distributions=[_distribution(entry) for entry in found],
            )
        return self._load(found[0])

    def origins(self) -> list[Origin]:
        """Where every entry comes from, plugins hidden by ours or by each other included; imports none of them."""
        ours = [self._own(key) for key in self._entries]
        theirs = [self._origin(entry) for found in self._discovered().values() for entry in found]
        return sorted(ours + theirs, key=lambda origin: (origin.name, origin.distribution))

    def check(self, origin: Origin) -> Finding:
        """Import the entry that ``origins`` lists as ``origin`` and say whether, and why, it cannot be used."""
        try:
            if origin.is_ours or origin.name not in self._entries:
                self.get(origin.name)
            for entry in self._hidden(origin):
                self._load(entry)
        except ModuleNotFoundError as cause:
            # A library that one of our extras brings may be absent; whoever chooses the entry reads what to install.
            error = "" if origin.is_ours and not _is_of(__package__, cause.name) else type(cause).__name__
            return Finding(origin, error=error, cause=str(cause))
        except (PluginError, ImportError, AttributeError) as cause:
            return Finding(origin, error=type(cause).__name__, cause=str(cause))
        return Finding(origin)

    def _hidden(self, origin: Origin) -> list[EntryPoint]:
        """The plugin of that origin, if one of our own names stands before it."""
        found = self._discovered().get(origin.name, []) if origin.name in self._entries else []
        return [entry for entry in found if self._origin(entry) == origin]

    def _discovered(self) -> dict[str, list[EntryPoint]]:
        if self._plugins is None:
            plugins: dict[str, list[EntryPoint]] = {}
            for entry in entry_points(group=f"meristem.{self.kind}"):
                plugins.setdefault(entry.name.casefold(), []).append(entry)
            self._plugins = plugins
        return self._plugins

    def _load(self, entry: EntryPoint) -> T:
        fields = asdict(self._origin(entry))
        where = f"the {self.kind} '{entry.name}' of {_distribution(entry)} ({entry.value})"
        try:
            value = entry.load()
        except Exception as cause:  # foreign code may raise anything; it must not break other plugins
            raise PluginError(
                f"{where} cannot be loaded: {type(cause).__name__}: {cause}. Update or uninstall it.",
                **fields,
                cause=repr(cause),
            ) from cause
        declared = getattr(sys.modules[entry.module], "MERISTEM_API", None)
        if declared != self.api:
            raise PluginTooOld(
                f"{where} is built for version {declared} of the {self.kind} interface; this meristem has version "
                f"{self.api}. Install a release that says MERISTEM_API = {self.api}.",
                **fields,
                found=declared,
                expected=self.api,
            )
        if not self._accepts(value):
            raise PluginError(
                f"{where} is a {type(value).__name__}, which is no {self.kind}. Ask its author to mend it.",
                **fields,
                cause=f"wrong type {type(value).__name__}",
            )
        return cast(T, value)

    def _own(self, key: str) -> Origin:
        value = self._entries[key]
        return Origin(self.kind, key, "meristem", "", value if isinstance(value, str) else "")

    def _origin(self, entry: EntryPoint) -> Origin:
        name, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "")
        return Origin(self.kind, entry.name.casefold(), name, version, entry.value)


def checked(entry: Mapping[str, Any]) -> dict[str, object]:
    """The finding about one entry, with arguments and result as JSON: for a process of its own.

    entry: ``registry`` as ``module:attribute``, and the ``origin`` of the entry in it.
    """
    registry = cast(Registry[object], _imported(entry["registry"]))
    return registry.check(Origin(**entry["origin"])).to_json()


def _imported(reference: str) -> object:
    """The thing that the text ``module:attribute`` names."""
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


def _is_of(package: str, module: str | None) -> bool:
    return module is None or module.partition(".")[0] == package


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unnamed distribution"


def spelled(registry: Registry[Callable[..., T]], text: str) -> T:
    """What an entry makes: ``name``, or ``name(key=value, ...)`` with plain values.

    Raises WrongValue where the text is neither, or the entry takes no such key.
    """
    name, places, chosen = read_call(registry.kind, text)
    made = registry.get(name)
    if "(" not in text:
        return made()
    taken = inspect.signature(made).replace(return_annotation=inspect.Signature.empty)
    try:
        taken.bind(*places, **chosen)
    except TypeError as cause:
        raise WrongValue(
            f"found '{text}': {cause}. The {registry.kind} '{name}' takes {taken}.",
            value=text,
        ) from cause
    return made(*places, **chosen)


def read_call(kind: str, text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """The name in ``name`` or ``name(value, key=value, ...)``, and the plain values that follow it.

    Raises WrongValue where the text is neither.
    """
    name, bracket, rest = text.partition("(")
    if not bracket:
        return text, [], {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and NAME.fullmatch(name.casefold())):
            raise ValueError("it is no call of a name")
        chosen = {key.arg: ast.literal_eval(key.value) for key in call.keywords if key.arg}
        return name, [ast.literal_eval(value) for value in call.args], chosen
    except (SyntaxError, ValueError) as cause:
        raise WrongValue(
            f"found '{text}' as a {kind} ({cause}); expected a name, or name(key=value, ...) with numbers, "
            f"texts or true and false.",
            value=text,
        ) from cause
