"""`meristem data`: prepare texts, list what is prepared, try a tokenizer."""

import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meristem.cli import complete
from meristem.cli.answer import Json, answer, columns, pairs, progress_bytes, size, tell
from meristem.errors import DataError, ManifestMismatch

if TYPE_CHECKING:
    from meristem.data.tokenizer import Tokenizer

app = typer.Typer(help="Prepare texts, list what is prepared, try a tokenizer.")
tokenizer_app = typer.Typer(help="Show a tokenizer and try it.")
app.add_typer(tokenizer_app, name="tokenizer")

CorpusPath = Annotated[Path, typer.Argument(metavar="CORPUS", help="A prepared corpus, as `data ls` shows it.")]
Place = Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, a run or a prepared corpus.")]


@app.command()
def prepare(
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="[PRESET_OR_FILE] KEY=VALUE",
            autocompletion=complete.presets_and_settings,
            help="As for `meristem train`; the data and tokenizer keys.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Read a text, divide it, tokenize it; what `meristem train` with the same words would read.

    \b
    Examples:
      meristem data prepare default data.source=book.txt
      meristem data prepare data.source=shakespeare data.download=true
    """
    from meristem.config import load
    from meristem.data.prepare import prepare as prepared
    from meristem.runs.config import Config, load_config

    if "=" in settings[0]:
        tree = load(Config, environment=os.environ, overrides=settings).tree
    else:
        tree = load_config(settings[0], settings[1:]).tree
    with progress_bytes("preparing") as progress:
        corpus = prepared(tree.data, tree.tokenizer, tell, progress)
    answer(_described(corpus.path, corpus.manifest), as_json, pairs)


def _described(path: Path, manifest: Any) -> dict[str, Any]:
    """What matters about a corpus, from its manifest."""
    return {
        "name": manifest["name"],
        "path": str(path),
        "files": {"count": len(manifest["sources"]), "first": manifest["sources"][0]["uri"]},
        "copies": manifest["quality"]["duplicates"],
        "fingerprint": manifest["fingerprint"],
        "tokenizer": {name: manifest["tokenizer"][name] for name in ("name", "vocab_size")},
        "split": manifest["split"]["method"],
        "counts": manifest["counts"],
    }


@app.command()
def ls(
    root: Annotated[
        Path | None, typer.Option("--root", help="The store; by default $MERISTEM_CACHE or ~/.cache/meristem.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the prepared corpora and the texts that can be named as data.source.

    \b
    Example:
      meristem data ls
    """
    from meristem.data import manifest as manifests
    from meristem.data.config import DataConfig
    from meristem.data.download import registered
    from meristem.data.files import store

    if root is not None and not os.path.isdir(root):
        raise DataError(f"there is no directory {root}. Give one that texts were prepared in.", path=str(root))
    folder = store(DataConfig(root=root), "corpora")
    places = sorted(path.parent for path in folder.glob(f"[!.]*/{manifests.FILE}"))
    sources = {name: {"size_bytes": entry.size_bytes, "licence": entry.licence} for name, entry in registered().items()}
    found = {"corpora": [_described(place, manifests.load(place)) for place in places], "downloads": sources}
    answer(found, as_json, _listed)


def _listed(found: dict[str, Any]) -> Iterable[str]:
    rows = [
        (
            each["name"],
            each["tokenizer"]["name"],
            sum(count["tokens"] for count in each["counts"].values()),
            each["path"],
        )
        for each in found["corpora"]
    ]
    yield from columns(("prepared", "tokenizer", "tokens", "path"), rows)
    yield ""
    own = [
        ("stdlib", None, "PSF-2.0"),
        ("stdlib-docs", None, "PSF-2.0"),
        ("notebook", None, "PSF-2.0"),
        ("installed:NAME", None, None),
    ]
    fetched = [(name, size(each["size_bytes"]), each["licence"]) for name, each in found["downloads"].items()]
    yield from columns(("data.source", "download", "licence"), [*own, *fetched])


@app.command()
def verify(corpus: CorpusPath, as_json: Json = False) -> None:
    """Compare every file of a corpus with its manifest; exit code 1 when one differs.

    \b
    Example:
      meristem data verify ~/.cache/meristem/corpora/0f3c
    """
    from meristem.data import manifest as manifests

    fault = None
    try:
        manifests.verify(corpus, manifests.load(corpus))
    except ManifestMismatch as error:
        fault = str(error)
    answer({"path": str(corpus), "intact": fault is None, "fault": fault}, as_json, pairs)
    if fault:
        raise typer.Exit(1)


@app.command()
def stats(
    corpus: CorpusPath,
    near: Annotated[
        int,
        typer.Option("--near", min=0, help="Documents to compare for near-duplicates, evenly spread; 0 compares none."),
    ] = 20_000,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", help="PNG to draw the lengths of documents and the use of ids in.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count documents, tokens and bytes of each split of a corpus, and find documents that are nearly the same.

    \b
    Examples:
      meristem data stats ~/.cache/meristem/corpora/0f3c
      meristem data stats ~/.cache/meristem/corpora/0f3c --picture text.png
    """
    from meristem.checkpoint.atomic import require_replaceable
    from meristem.data.corpus import open_corpus
    from meristem.data.near import near_duplicates
    from meristem.data.statistics import count
    from meristem.evaluate.picture import draw_text

    if picture is not None:
        require_replaceable(picture)
    opened = open_corpus(corpus)
    counts = count(opened)
    quality = {name: opened.manifest["quality"][name] for name in ("bad", "empty", "duplicates")}
    report: dict[str, object] = {"name": opened.name, **quality}
    report |= {split: counted.to_json() for split, counted in counts.items()}
    if near:
        report["near_duplicates"] = asdict(near_duplicates(opened, near))
    answer(report, as_json, _counted)
    if picture is not None:
        draw_text(picture, {split: (counted.lengths, counted.ids) for split, counted in counts.items()})


def _counted(report: dict[str, Any]) -> Iterable[str]:
    """The figures, and under them a line for each group of documents that are near each other."""
    near = report.get("near_duplicates", {})
    shown = {name: value for name, value in near.items() if name != "groups"}
    yield from pairs(report | ({"near_duplicates": shown} if near else {}))
    if groups := near.get("groups"):
        yield ""
        rows = [(each["count"], each["begins"], ", ".join(each["documents"])) for each in groups]
        yield from columns(("near", "begins", "some of them"), rows)


def _tokenizer(place: Path) -> "Tokenizer":
    """The tokenizer in a corpus, a checkpoint or a run."""
    from meristem.data import manifest as manifests
    from meristem.data.tokenizer import FILE, load_tokenizer, tokenizer_from_bytes

    if (place / FILE).exists() and (place / manifests.FILE).exists():
        return load_tokenizer(place)
    from meristem.checkpoint.store import find

    return tokenizer_from_bytes(find(place, tell).file(FILE), str(place))


@tokenizer_app.command()
def inspect(
    place: Place,
    longest: Annotated[int, typer.Option("--longest", min=0, help="How many of the longest entries to show.")] = 20,
    as_json: Json = False,
) -> None:
    """Describe a tokenizer: kind, size, longest entries.

    \b
    Example:
      meristem data tokenizer inspect runs/latest
    """
    tokenizer = _tokenizer(place)
    entries = sorted(tokenizer.tokens, key=len, reverse=True)[:longest]
    report = {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "mean_bytes": float(tokenizer.byte_lengths.mean()),
        "longest": [entry.decode(errors="backslashreplace") for entry in entries],
    }
    answer(report, as_json, pairs)


@tokenizer_app.command()
def encode(
    place: Place,
    text: Annotated[str | None, typer.Argument(help="The text; stdin when left out.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Encode a text as ids.

    \b
    Example:
      meristem data tokenizer encode runs/latest "Call me Ishmael."
    """
    ids = _tokenizer(place).encode(sys.stdin.read() if text is None else text)
    answer(ids, as_json, lambda ids: [" ".join(map(str, ids))])


@tokenizer_app.command()
def decode(
    place: Place,
    ids: Annotated[list[int], typer.Argument(metavar="ID", help="The ids.")],
    as_json: Json = False,
) -> None:
    """Decode ids into a text.

    \b
    Example:
      meristem data tokenizer decode runs/latest 72 105
    """
    answer(_tokenizer(place).decode(ids), as_json, lambda text: [text])
