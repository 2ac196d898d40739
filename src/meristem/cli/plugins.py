"""`meristem plugins`: what can be chosen by name, and whether all of it can be loaded."""

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from meristem.cli.answer import Json, answer, columns
from meristem.errors import WrongValue

if TYPE_CHECKING:
    from meristem.plugins import Registry

app = typer.Typer(help="List what can be chosen by name, and check that it loads.")

REGISTRIES: Final = (
    "meristem.memory.named:rules",
    "meristem.memory.structure:structures",
    "meristem.memory.bias:biases",
    "meristem.memory.retention:retentions",
    "meristem.memory.update:updates",
    "meristem.memory.features:features",
    "meristem.memory.forms:forms",
    "meristem.models.build:models",
    "meristem.models.lm:mixers",
)
"""Every registry of the package, as ``module:attribute``."""
Kind = Annotated[str | None, typer.Option("--kind", help="One kind alone, such as memory.", show_default=False)]


def registries(kind: str | None = None) -> "list[Registry[Any]]":
    """The registries themselves, or the one of a kind; imports their rooms."""
    references = (reference.partition(":") for reference in REGISTRIES)
    found = [getattr(import_module(module), attribute) for module, _, attribute in references]
    if kind is None:
        return found
    kinds = [registry.kind for registry in found]
    if kind not in kinds:
        raise WrongValue(f"nothing is registered as a '{kind}'. The kinds are {', '.join(kinds)}.", value=kind)
    return [registry for registry in found if registry.kind == kind]


@app.command()
def ls(kind: Kind = None, as_json: Json = False) -> None:
    """List every entry and the distribution that offers it; imports none of them.

    \b
    Example:
      meristem plugins ls --kind memory
    """
    rows = [origin for registry in registries(kind) for origin in registry.origins()]
    titles = ("kind", "name", "distribution", "version")
    found = [{title: getattr(origin, title) for title in titles} for origin in rows]
    answer(found, as_json, lambda found: columns(titles, [list(row.values()) for row in found]))


@app.command()
def check(kind: Kind = None, as_json: Json = False) -> None:
    """Load every entry; exit code 1 names those that cannot be used.

    \b
    Example:
      meristem plugins check --json
    """
    findings = [finding.to_json() for registry in registries(kind) for finding in registry.check()]
    titles = ("kind", "name", "distribution", "ok", "cause")
    answer(findings, as_json, lambda rows: columns(titles, [[row[title] for title in titles] for row in rows]))
    if not all(finding["ok"] for finding in findings):
        raise typer.Exit(1)
