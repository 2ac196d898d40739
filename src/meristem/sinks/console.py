"""What a person sees while a run goes on: a live view on a terminal, a line now and then anywhere else."""

import contextlib
import errno
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import IO, Any, TypeGuard

import rich.console
from rich.console import Group, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from meristem.events import Emit, Event, silent

LINE_EVERY_S = 10.0
DRAW_EVERY_S = 0.25
_BARS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 24
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _at_once(draw: Callable[[], None]) -> None:
    draw()


class Console:
    """Shows the progress of a run. It never raises: a screen that is gone is the event ``sink.failed``, once.

    With ``json`` every word goes to stderr, since stdout belongs to the program that reads it.
    """

    def __init__(self, json: bool = False, *, emit: Emit = silent, screen: rich.console.Console | None = None) -> None:
        self._screen = screen or rich.console.Console(stderr=json, highlight=False)
        self._encoding = self._screen.encoding or "utf-8"
        self._is_unicode = self._encoding.lower().startswith("utf")
        # What rich does by itself is to end the process.
        self._screen.on_broken_pipe = _raise_on  # type: ignore[method-assign]
        self._emit = emit
        self._post: Callable[[Callable[[], None]], None] = _at_once
        self._cause: str | None = None
        self._is_drawing = False
        self._live: Live | None = None
        self._title = ""
        self._texts: list[str] = []
        self._done: float | None = None
        self._losses: list[float] = []
        self._next_s = 0.0

    def through(self, post: Callable[[Callable[[], None]], None] = _at_once, emit: Emit = silent) -> None:
        """From now on hand every drawing to ``post``, which may make it later on another thread, but in its order.

        emit: notified of a screen that is gone, also where it went before.
        """
        self._post, self._emit = post, emit
        if self._cause is not None:
            self._tell()

    def show(self, record: Mapping[str, Any]) -> None:
        """One line that stays for the record of an event, drawn now: the console as a sink.

        Not of the error that ends the run, which is raised to whoever began it and said there.
        """
        if record["name"] == "exception":
            return
        details = ", ".join(f"{name} {value}" for name, value in record["payload"].items())
        text = Text(self._clean(f"{record['severity']}: {record['name']}: {details}"))
        self._safely(lambda: self._screen.print(text, soft_wrap=True))

    def lose(self, cause: str) -> None:
        """Give up a screen on which a thread is stuck, as the caller has found: nothing is drawn any more."""
        if self._cause is None:
            self._cause, self._live = cause, None
            _abandon(self._screen.file)

    def start(self, title: str) -> None:
        """Begin the view of one piece of work; one that is still shown ends."""
        self.stop()
        self._title, self._texts, self._done, self._losses, self._next_s = self._clean(title), [], None, [], 0.0
        if self._screen.is_terminal:
            # No thread draws, so that a lost terminal is noticed here. stdout is not redirected: under --json it
            # carries records, and they must stay there.
            self._live = Live(console=self._screen, auto_refresh=False, redirect_stdout=False)
            self._safely_later(self._live.start)

    def update(self, fields: Mapping[str, str], *, progress: float | None = None, loss: float | None = None) -> None:
        """Show the newest figures.

        fields: name to text, shown in this order; an empty name shows the text alone.
        progress: share of the work that is done, in [0, 1]. loss: the next point of the curve.
        """
        self._losses += [float(loss)] if _is_number(loss) else []
        if len(self._losses) > 64 * _SPARK_WIDTH:
            self._losses = _halved(self._losses)
        items = fields.items() if isinstance(fields, Mapping) else [("", fields)]
        self._texts = [self._clean(f"{name} {text}".strip()) for name, text in items]
        self._done = min(max(float(progress), 0.0), 1.0) if _is_number(progress) else None
        if time.monotonic() >= self._next_s and not self._is_drawing:
            self._next_s = time.monotonic() + (LINE_EVERY_S if self._live is None else DRAW_EVERY_S)
            self._draw()

    def note(self, text: str) -> None:
        """One line that stays."""
        self._print(self._clean(text))

    def stop(self) -> None:
        """End the view; the newest figures stay on the screen."""
        if self._live is not None:
            self._draw()
        live, self._live = self._live, None
        if live is not None:
            self._post(lambda: self._end(live))

    def _draw(self) -> None:
        """Draw the figures as they are now; until that is done, newer ones wait for their turn."""
        share = [] if self._done is None else [f"{100 * self._done:.0f}%"]
        live = self._live
        self._is_drawing = True
        if live is None:
            text = Text(self._joined([self._title, *share, *self._texts]))
            self._post(lambda: self._drawn(lambda: self._screen.print(text, soft_wrap=True)))
        else:
            view = self._view(share)
            self._post(lambda: self._drawn(lambda: live.update(view, refresh=True)))

    def _drawn(self, draw: Callable[[], None]) -> None:
        self._safely(draw)
        self._is_drawing = False

    def _view(self, share: list[str]) -> Group:
        """One line with bar and curve, and under it the figures, none of them broken over two lines."""
        cells: list[RenderableType] = [Text(self._title, style="bold")]
        if share:
            cells += [ProgressBar(total=1.0, completed=self._done or 0.0, width=_SPARK_WIDTH), Text(share[0])]
        if self._is_unicode:
            cells += [Text(spark(self._losses, _SPARK_WIDTH), style="cyan")]
        head = Table.grid(padding=(0, 1))
        head.add_row(*cells)
        space = "\N{NO-BREAK SPACE}" if self._is_unicode else " "
        return Group(head, Text(self._joined([text.replace(" ", space) for text in self._texts])))

    def _joined(self, texts: list[str]) -> str:
        return (" · " if self._is_unicode else " | ").join(texts)

    def _clean(self, text: object) -> str:
        """Text that the screen can show and that cannot drive it: control characters of a model become visible."""
        visible = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", str(text))
        return visible.encode(self._encoding, "replace").decode(self._encoding)

    def _print(self, text: str) -> None:
        self._safely_later(lambda: self._screen.print(Text(text), soft_wrap=True))

    def _safely_later(self, draw: Callable[[], None]) -> None:
        if self._cause is None:
            self._post(lambda: self._safely(draw))

    def _safely(self, draw: Callable[[], None]) -> None:
        """Draw unless the screen has failed before. A broken pipe or a closed file may not stop a run."""
        if self._cause is not None:
            return
        try:
            draw()
        except (OSError, ValueError) as error:
            live, self._live = self._live, None
            self._cause = repr(error)
            self._screen.quiet = True
            if live is not None:
                self._end(live)
            if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO):
                _leave(self._screen.file)
            self._tell()

    def _end(self, live: Live) -> None:
        """End a view, also that of a screen which is gone: until then it draws what is written to stderr."""
        self._safely(live.stop)
        # One that failed while it began ends with an IndexError.
        with contextlib.suppress(OSError, ValueError, IndexError):
            live.stop()

    def _tell(self) -> None:
        self._emit(Event("sink.failed", {"sink": "console", "cause": self._cause}, "warning"))


def _raise_on() -> None:
    """Let the broken pipe that is being handled go on to who called for the drawing."""
    raise


def _leave(stream: IO[str]) -> None:
    """Point a lost standard stream to nowhere: Python writes at its exit what is left, and would fail for it."""
    if stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def _abandon(stream: IO[str]) -> None:
    """Lead to nowhere what is written to a standard stream from now on, also by Python at its exit.

    A thread that is stuck in the stream holds its lock for ever. A view is no longer drawn for stderr either.
    """
    for name in ("stdout", "stderr"):
        current = getattr(sys, name)
        if isinstance(current, FileProxy):
            setattr(sys, name, current.rich_proxied_file)
    for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
        if getattr(sys, name) is stream:
            setattr(sys, name, open(os.devnull, "w"))


def spark(values: list[float], width: int) -> str:
    """A curve one line high: the means of at most ``width`` equal sections, from the lowest bar to the highest."""
    if len(values) < 2:
        return ""
    n_columns = min(width, len(values))
    edges = [len(values) * column // n_columns for column in range(n_columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    height = high - low or 1.0
    return "".join(_BARS[round((mean - low) / height * (len(_BARS) - 1))] for mean in means)


def _halved(values: list[float]) -> list[float]:
    """Every two neighbours as their mean."""
    return [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=False)]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)
