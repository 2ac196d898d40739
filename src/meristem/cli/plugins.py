"""`meristem plugins`: what can be chosen by name, and whether all of it can be loaded."""

from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from meristem.cli.answer import Json, answer, columns, tell
from meristem.errors import WorkerDied, WorkerError, WorkerTimeout, WrongValue

if TYPE_CHECKING:
    from meristem.plugins import Finding, Origin, Registry
    from meristem.worker.process import Worker

app = typer.Typer(help="List what can be chosen by name, and check that it loads.")

REGISTRIES: Final = (
    "meristem.data.sources:sources",
    "meristem.memory.named:rules",
    "meristem.memory.structure:structures",
    "meristem.memory.bias:biases",
    "meristem.memory.retention:retentions",
    "meristem.memory.update:updates",
    "meristem.memory.features:features",
    "meristem.memory.forms:forms",
    "meristem.models.build:models",
    "meristem.models.topology:changes",
    "meristem.models.lm:mixers",
    "meristem.evaluate.tasks:tasks",
    "meristem.evaluate.metrics:metrics",
    "meristem.evaluate.continual:continual_metrics",
    "meristem.growth.blueprint:blueprints",
    "meristem.growth.blend:blends",
    "meristem.growth.policy:policies",
    "meristem.drills.catalogue:drills",
    "meristem.sinks.trackers.start:trackers",
)
"""Every registry of the package, as ``module:attribute``."""
CHECKED: Final = "meristem.plugins:checked"
START_S: Final = 120.0
"""How long a process may take to import our own rooms, before a plugin has its turn."""
LOAD_S: Final = 30.0
"""How long a plugin may take to load."""
LoadS = Annotated[float, typer.Option("--load-s", min=0.1, help="Seconds that each plugin may take to load.")]
Kind = Annotated[str | None, typer.Option("--kind", help="One kind alone, such as memory.", show_default=False)]


def registries(kind: str | None = None) -> "dict[str, Registry[Any]]":
    """The registries by reference, or the one of a kind; imports their rooms."""
    references = {reference: reference.partition(":") for reference in REGISTRIES}
    found = {text: getattr(import_module(module), name) for text, (module, _, name) in references.items()}
    kinds = [registry.kind for registry in found.values()]
    if kind is not None and kind not in kinds:
        raise WrongValue(f"nothing is registered as a '{kind}'. The kinds are {', '.join(kinds)}.", value=kind)
    return {text: registry for text, registry in found.items() if kind in (None, registry.kind)}


def findings(kind: str | None = None, load_s: float = LOAD_S) -> "list[Finding]":
    """What loading every entry shows: ours here, each plugin in another process, where it may hang or crash."""
    found = registries(kind)
    entries = [(text, registry, origin) for text, registry in found.items() for origin in registry.origins()]
    theirs = [text for text, _, origin in entries if not origin.is_ours]
    if not theirs:
        return [registry.check(origin) for _, registry, origin in entries]
    from meristem.worker.process import Worker

    rooms = sorted({text.partition(":")[0] for text in theirs})
    with Worker("plugins", imports=rooms, n_spare=0, emit=tell) as worker:
        return [
            registry.check(origin) if origin.is_ours else _checked_apart(worker, text, origin, load_s)
            for text, registry, origin in entries
        ]


def _checked_apart(worker: "Worker", reference: str, origin: "Origin", load_s: float) -> "Finding":
    """What loading a plugin in another process shows."""
    from meristem.plugins import Finding

    where = f"the {origin.kind} '{origin.name}' of {origin.distribution} {origin.version} ({origin.entry_point})"
    worker.ready(START_S)
    try:
        found = worker.call(CHECKED, {"registry": reference, "origin": asdict(origin)}, load_s, expects=dict)
    except WorkerDied as error:
        cause = f"{where} ends the process that loads it: {error.fields['cause']}. Update or uninstall it."
        return Finding(origin, error="WorkerDied", cause=cause)
    except WorkerTimeout:
        cause = f"{where} was not loaded after {load_s:g} s. Update or uninstall it, or raise --load-s."
        return Finding(origin, error="WorkerTimeout", cause=cause)
    except WorkerError as error:
        return Finding(origin, error=type(error).__name__, cause=str(error))
    return Finding(origin, error=found["error"], cause=found["cause"])


@app.command()
def ls(kind: Kind = None, as_json: Json = False) -> None:
    """List every entry and the distribution that offers it; imports none of them.

    \b
    Example:
      meristem plugins ls --kind memory
    """
    rows = [origin for registry in registries(kind).values() for origin in registry.origins()]
    titles = ("kind", "name", "distribution", "version")
    found = [{title: getattr(origin, title) for title in titles} for origin in rows]
    answer(found, as_json, lambda found: columns(titles, [list(row.values()) for row in found]))


@app.command()
def check(
    kind: Kind = None,
    load_s: LoadS = LOAD_S,
    as_json: Json = False,
) -> None:
    """Load every entry; exit code 1 names those that cannot be used. Plugins load in another process.

    \b
    Example:
      meristem plugins check --json
    """
    found = [finding.to_json() for finding in findings(kind, load_s)]
    titles = ("kind", "name", "distribution", "ok", "cause")
    answer(found, as_json, lambda rows: columns(titles, [[row[title] for title in titles] for row in rows]))
    if not all(finding["ok"] for finding in found):
        raise typer.Exit(1)
