"""`meristem keys`: who may use a server."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meristem.cli.answer import Json, answer, columns, pairs
from meristem.cli.serve import Data, data_directory

if TYPE_CHECKING:
    from meristem.serve.keys import Keys

app = typer.Typer(help="Make, list and revoke the keys of a server. The first one closes it to whoever has none.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")]


@app.command()
def add(
    name: Name,
    data: Data = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="It opens /metrics, and nothing else.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="In place of the key that NAME has or had; it opens the same sessions.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a key and print it, once: it is stored as a hash. A running server takes it from the next request on.

    \b
    Examples:
      meristem keys add ada
      meristem keys add prometheus --metrics
    """
    with _opened(data) as keys:
        key = keys.add(name, opens="metrics" if metrics else "sessions", replaces=replace)
        where = str(keys.path)
    answer({"name": name, "key": key, "file": where}, as_json, lambda made: [made["key"]])


@app.command()
def ls(data: Data = None, as_json: Json = False) -> None:
    """List all keys that were ever made, without their secrets.

    \b
    Example:
      meristem keys ls
    """
    from meristem.serve.keys import FILE

    found = []
    if (data_directory(data) / FILE).exists():
        with _opened(data) as keys:
            found = [asdict(record) for record in keys.records()]
    answer(found, as_json, _listed)


@app.command()
def revoke(name: Name, data: Data = None, as_json: Json = False) -> None:
    """Let a key open nothing any more. Its sessions stay; `keys add NAME --replace` gives them to a new key.

    \b
    Example:
      meristem keys revoke ada
    """
    with _opened(data) as keys:
        keys.revoke(name)
    answer({"name": name, "revoked": True}, as_json, pairs)


@contextlib.contextmanager
def _opened(data: Path | None) -> "Iterator[Keys]":
    from meristem.serve.keys import Keys

    keys = Keys(data_directory(data))
    try:
        yield keys
    finally:
        keys.close()


def _listed(rows: list[dict[str, Any]]) -> Iterable[str]:
    if not rows:
        return ["there are no keys: the server is open to this machine, and to no other"]
    titles = ("name", "opens", "created", "revoked")
    return columns(titles, [[row["name"], row["opens"], _day(row["created"]), _day(row["revoked"])] for row in rows])


def _day(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
