"""How a verb prints: words and tables on a terminal, JSON under ``--json``, errors in one place.

stdout has the result and nothing else; all messages go to stderr.
"""

import contextlib
import difflib
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Final, TypeVar

import typer

from meristem import __version__
from meristem.cli import complete
from meristem.errors import UNEXPECTED, MeristemError, exit_code
from meristem.events import Event

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE|KEY=VALUE]...",
        autocompletion=complete.settings,
        help="More YAML files, the last wins; settings, as data.seq_len=256.",
        show_default=False,
    ),
]
Preset = Annotated[
    str,
    typer.Argument(
        metavar="PRESET_OR_FILE",
        autocompletion=complete.presets,
        help="A preset (see `config presets`) or a YAML file.",
    ),
]
T = TypeVar("T")

NOBODY_READS: Final = 141
"""The exit code where stdout was closed before all was written, as by `head`: that of SIGPIPE in a shell."""
_LONGEST: Final = 300

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def json_line(value: object) -> None:
    """Print one JSON value on its own line, at once."""
    import orjson

    options = orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    try:
        line = orjson.dumps(value, default=_plain, option=options).decode()
    except orjson.JSONEncodeError:  # text that holds bytes which are no UTF-8, as a prompt or a file name may
        escaped = json.dumps(value, default=_plain, ensure_ascii=False)
        line = escaped.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)


def answer(value: T, as_json: bool, words: Callable[[T], Iterable[str]]) -> None:
    """Print ``value`` as JSON, or the lines that ``words`` makes of it."""
    if as_json:
        json_line(value)
    else:
        for line in words(value):
            typer.echo(line)


def write_text(text: str) -> None:
    """Print what a model wrote, as it is made. On a terminal, characters that would drive it are made visible."""
    if sys.stdout.isatty():
        text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
    typer.echo(text, nl=False)


def columns(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table whose columns are as wide as their widest cell."""
    cells = [[str(title) for title in titles], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items()) or "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def pairs(values: Mapping[str, object]) -> list[str]:
    """Lines ``name  value``; what nests is shown under dotted names."""
    from meristem.config import leaves

    flat = leaves(values)
    width = max((len(name) for name in flat), default=0)
    return [f"{name.ljust(width)}  {_cell(value)}" for name, value in flat.items()]


def size(n_bytes: float) -> str:
    """Bytes for a reader: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


@contextlib.contextmanager
def progress_bytes(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for work that counts bytes; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True)
    shape = (TextColumn(what), BarColumn(), DownloadColumn())
    with Progress(*shape, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def tell(event: Event) -> None:
    """An ``Emit`` for verbs without a run: warnings and errors become one line on stderr."""
    if event.severity in ("debug", "info"):
        return
    details = ", ".join(f"{name} {value}" for name, value in event.payload.items())
    typer.secho(f"{event.severity}: {event.name}: {details}", fg="yellow", err=True)


def report_error(error: MeristemError | typer.TyperException, as_json: bool, debug: bool) -> int:
    """Say what went wrong and give the exit code that belongs to it."""
    is_usage = isinstance(error, typer.TyperException)
    message = _worded(error.format_message()) if isinstance(error, typer.TyperException) else str(error)
    kind = "UsageError" if is_usage else type(error).__name__
    _say(error, kind, message, getattr(error, "fields", {}), as_json=as_json, debug=debug)
    command = getattr(getattr(error, "ctx", None), "command_path", None)
    if command and not as_json:
        typer.echo(f"`{command} --help` shows what it takes.", err=True)
    return error.exit_code


def _worded(message: str) -> str:
    """What the library of the command line says, and of a value that is none of a list, the nearest that is."""
    message = message.replace("Value error, ", "")
    found = re.search(r"'([^']*)' is not one of (.*)\.$", message)
    near = found and difflib.get_close_matches(found[1], re.findall(r"'([^']*)'", found[2]), n=1)
    return f"{message} Did you mean '{near[0]}'?" if near else message


def report_unexpected(error: Exception, as_json: bool, debug: bool) -> int:
    """Say in one sentence what nobody foresaw, and give its exit code.

    What the system refused is a matter of the environment. Anything else is a fault of ours, whose traceback is written
    into a file.
    """
    code, kind = exit_code(error), type(error).__name__
    fields: dict[str, object] = {}
    if isinstance(error, OSError) and error.filename is not None:
        fields = {"path": os.fsdecode(error.filename), "errno": error.errno}
        message = f"{fields['path']}: {error.strerror}. Check the path, and what may be done there."
    elif code != UNEXPECTED:
        message = f"{' '.join(str(error).split()) or kind}. This machine did not allow it; --debug shows where."
    else:
        fields = {"traceback": _kept(error)}
        said = " ".join(str(error).split())[:_LONGEST]
        message = f"{kind}: {said}. This is a fault of meristem. Its traceback is in {fields['traceback']}; report it."
    _say(error, kind, message, fields, as_json=as_json, debug=debug)
    return code


def _kept(error: Exception) -> str:
    """The path of a file with the traceback, the versions and the command; on stderr where no file can be made."""
    lines = [f"meristem {__version__}, Python {sys.version}", " ".join(sys.argv), *traceback.format_exception(error)]
    try:
        descriptor, path = tempfile.mkstemp(prefix="meristem-", suffix=".traceback")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError:
        typer.echo("\n".join(lines), err=True)
        return "the lines above"
    return path


def _say(
    error: Exception, kind: str, message: str, fields: Mapping[str, object], *, as_json: bool, debug: bool
) -> None:
    if debug:
        traceback.print_exception(error)
    # Neither stream need take it: it may be what stdout refused that is said here.
    with contextlib.suppress(OSError):
        if as_json:
            json_line({"error": {"type": kind, "message": message, "fields": fields}})
            return
    with contextlib.suppress(OSError):
        typer.secho(f"error: {message}", fg="red", err=True)
