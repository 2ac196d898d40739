"""`meristem grow library`: blueprints and trained seeds that are kept, and what is known of them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from meristem.cli.answer import Json, answer, columns, pairs, size, tell
from meristem.cli.sample import Checkpoint

if TYPE_CHECKING:
    from meristem.growth.library import Library

app = typer.Typer(help="Keep what grew: list blueprints and trained seeds, store seeds of a run, certify them.")
Place = Annotated[Path, typer.Argument(metavar="LIBRARY", help="The directory of a library.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A name in the library.")]
SlotName = Annotated[str, typer.Option("--slot", metavar="SLOT", help="The slot, as blocks.1.")]

TABLES: Final = {
    "certificates": ("slot", "band", "score", "handling"),
    "benchmarks": ("device", "dtype", "shape", "p50_ms", "p95_ms", "tokens_per_s", "peak_bytes"),
    "reports": ("seed", "slot", "outcome", "issued_at"),
}
"""What is shown of all that is known of a name."""


@app.command()
def ls(place: Place, as_json: Json = False) -> None:
    """List the newest version of every name.

    \b
    Example:
      meristem grow library ls seeds
    """
    with _opened(place) as library:
        rows = [card.to_json() for card in library.search()]
    answer(rows, as_json, _listed)


@app.command()
def show(place: Place, name: Name, as_json: Json = False) -> None:
    """Print what is known of a name: what it is built from, its certificates, its speed, and how its seeds ended.

    \b
    Example:
      meristem grow library show seeds arithmetic
    """
    with _opened(place) as library:
        card = library.card(name)
        found = card.to_json() | {
            "certificates": [each.to_json() for each in library.certificates(name)],
            "benchmarks": library.benchmarks(name),
            "reports": [each.to_json() for each in library.reports(card.origin.blueprint)],
        }
    answer(found, as_json, _shown)


@app.command()
def put(
    place: Place,
    name: Name,
    checkpoint: Checkpoint,
    slot: SlotName,
    trust: Annotated[
        str, typer.Option("--trust", metavar="safe|experimental|high_risk", help="How far it is trusted.")
    ] = "experimental",
    as_json: Json = False,
) -> None:
    """Store the seed in a slot of a checkpoint with its weights, in a library that is made where there is none.

    \b
    Example:
      meristem grow library put seeds arithmetic runs/latest --slot blocks.1
    """
    from meristem.growth.library import Library, trusted
    from meristem.models.load import load

    model = load(checkpoint, tell).model
    with Library(place, emit=tell) as library:
        card = library.put_seed(name, model, slot, trust=trusted(trust)).to_json()
    answer(card, as_json, pairs)


@app.command()
def certify(place: Place, name: Name, checkpoint: Checkpoint, slot: SlotName, as_json: Json = False) -> None:
    """Probe a stored seed or blueprint in a copy of a slot of a checkpoint, and store the certificate.

    \b
    Example:
      meristem grow library certify seeds arithmetic runs/latest --slot blocks.1
    """
    from meristem.models.load import load

    model = load(checkpoint, tell).model
    with _opened(place) as library:
        found = library.certify(name, model, slot)
    answer(found.to_json(), as_json, lambda said: _probes(said, found.complaints))


def _opened(place: Path) -> "Library":
    from meristem.growth.library import Library

    return Library(place, is_there=True, emit=tell)


def _listed(rows: list[dict[str, Any]]) -> Iterable[str]:
    titles = ("name", "version", "blueprint", "trust", "certificate", "width", "size")
    if not rows:
        return ["nothing is stored yet"]
    return columns(titles, [_row(row) for row in rows])


def _row(row: Mapping[str, Any]) -> list[object]:
    fitting = row["fitting"]
    width, n_bytes = (fitting["widths"][1], size(row["size_bytes"])) if fitting else (None, None)
    return [row["name"], row["version"], row["origin"]["blueprint"], row["trust"], row["handling"], width, n_bytes]


def _shown(found: Mapping[str, Any]) -> Iterable[str]:
    yield from pairs({name: value for name, value in found.items() if name not in TABLES})
    for name, titles in TABLES.items():
        yield f"\n{name}: {len(found[name]) or 'none'}"
        if found[name]:
            yield from columns(titles, [[row[title] for title in titles] for row in found[name]])


def _probes(said: Mapping[str, Any], complaints: tuple[str, ...]) -> Iterable[str]:
    yield f"{said['band']}, score {said['score']:.2f}: {', '.join(complaints) or 'nothing was found'}"
    titles = ("name", "value", "bound", "outcome")
    yield from columns(titles, [[probe[title] for title in titles] for probe in said["probes"]])
