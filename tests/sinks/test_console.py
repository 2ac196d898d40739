"""The console shows what it is given, where it may, and never stops a run."""

import io
import math
import os
import subprocess
import sys
import termios

import pytest
import rich.console
from hypothesis import given
from hypothesis import strategies as st

from meristem.sinks import console as consoles
from meristem.sinks.console import Console, spark


def screen(**options):
    return rich.console.Console(file=io.StringIO(), width=80, highlight=False, **options)


def run_on(target, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(consoles.time, "monotonic", lambda: float(next(clock)))
    console = Console(screen=target)
    console.start("titans-mag")
    for step in range(5):
        console.update({"": f"{5 - step}.25 bits/byte", "gate": "[0.9]"}, progress=step / 5, loss=5.25 - step)
    console.note("checkpoint [step-5] saved")
    console.stop()
    return target.file.getvalue()


def test_terminal_shows_bar_curve_and_figures(monkeypatch):
    """On a terminal the last figures, the share done, the curve of the loss and the note are all there."""
    shown = run_on(screen(force_terminal=True), monkeypatch)
    for part in ("titans-mag", "1.25\xa0bits/byte · gate\xa0[0.9]", "80%", "█", "▁", "checkpoint [step-5] saved"):
        assert part in shown


def test_last_figures_stay_on_the_screen(monkeypatch):
    """However fast the updates came, the view ends with the last of them."""
    monkeypatch.setattr(consoles.time, "monotonic", lambda: 5.0)
    target = screen(force_terminal=True)
    console = Console(screen=target)
    console.start("t")
    console.update({"": "first"})
    console.update({"": "last"})
    assert "last" not in target.file.getvalue()
    console.stop()
    assert "last" in target.file.getvalue()


def test_one_view_follows_another():
    """Beginning the next piece of work ends the view of the one before, which stays on the screen."""
    target = screen(force_terminal=True)
    console = Console(screen=target)
    for title in ("first", "second"):
        console.start(title)
        console.update({"": f"figures of {title}"})
    console.stop()
    shown = target.file.getvalue().replace("\xa0", " ")
    assert shown.index("figures of first") < shown.index("figures of second")
    assert shown.count("\x1b[?25h") == 2


def test_elsewhere_one_line_in_ten_seconds(monkeypatch):
    """Without a terminal the figures are plain lines: the first, and one more for every ten seconds that pass."""
    clock = [100.0]
    monkeypatch.setattr(consoles.time, "monotonic", lambda: clock[0])
    target = screen(force_terminal=False)
    console = Console(screen=target)
    console.start("t")
    for second in range(25):
        clock[0] = 100.0 + second
        console.update({"": f"at {second}"}, progress=second / 25)
    assert target.file.getvalue() == "t · 0% · at 0\nt · 40% · at 10\nt · 80% · at 20\n"


def test_json_leaves_stdout_alone():
    """Under --json not one byte of ours goes to stdout."""
    code = "from meristem.sinks.console import Console; c = Console(json=True)"
    code += "; c.start('t'); c.update({'a': 'b'}); c.note('n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == "t · a b\nn\n"


def test_text_cannot_drive_the_terminal():
    """Escape sequences that a model writes are shown, not obeyed; line ends and tabs stay."""
    target = screen(force_terminal=False)
    Console(screen=target).note("a\x1b[2Jb\rc\x07\x9b\td\ne")
    assert target.file.getvalue().split("\n")[0].startswith(r"a\x1b[2Jb\x0dc\x07\x9b")
    assert "\x1b" not in target.file.getvalue()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("wrong", [None, 3, object(), math.nan, "\ud800", b"\xff", [], {"a": None}, {1: object()}])
def test_wrong_arguments_do_not_raise(is_terminal, wrong):
    """TR-10: Whatever is passed to any call, the run goes on."""
    console = Console(screen=screen(force_terminal=is_terminal))
    console.update({"before": "start"})
    console.start(wrong)
    console.note(wrong)
    console.update(wrong if isinstance(wrong, dict) else {"x": wrong}, progress=wrong, loss=wrong)
    console.update(wrong)
    console.stop()
    console.stop()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_lost_screen_is_said_once(is_terminal):
    """A closed terminal is one event, and no error."""
    target = screen(force_terminal=is_terminal)
    events = []
    console = Console(screen=target, emit=events.append)
    target.file.close()
    console.start("t")
    for _ in range(3):
        console.update({"a": "b"})
        console.note("n")
    console.stop()
    assert [(e.name, e.payload["sink"]) for e in events] == [("sink.failed", "console")]


def test_screen_without_our_letters():
    """An ASCII terminal gets question marks for letters it lacks, and no error."""
    raw = io.BytesIO()
    target = rich.console.Console(file=io.TextIOWrapper(raw, encoding="ascii"), force_terminal=False)
    events = []
    console = Console(screen=target, emit=events.append)
    console.start("t")
    console.update({"é": "ü"})
    target.file.flush()
    assert raw.getvalue() == b"t | ? ?\n"
    assert events == []


def test_terminal_lost_on_the_way():
    """A terminal that goes away in the middle is noticed at the next drawing, on the thread of the run."""
    target = screen(force_terminal=True)
    events = []
    console = Console(screen=target, emit=events.append)
    console.start("t")
    target.file.close()
    console.update({"a": "b"})
    console.stop()
    assert [e.name for e in events] == ["sink.failed"]


@given(values=st.lists(st.floats(-1e9, 1e9), max_size=200), width=st.integers(1, 30))
def test_spark_fits_and_spans(values, width):
    """Never wider than asked; a curve that moves touches the lowest and, with two columns, the highest bar."""
    drawn = spark(values, width)
    assert len(drawn) <= width
    if drawn and len(set(drawn)) > 1:
        assert {"▁", "█"} <= set(drawn)


def test_falling_loss_falls():
    """A falling loss is drawn from the highest bar to the lowest, however many points there are."""
    drawn = spark([1 / step for step in range(1, 1000)], 24)
    assert drawn[0] == "█"
    assert drawn[-1] == "▁"
    assert list(drawn) == sorted(drawn, reverse=True)


STUCK = """
import sys, tempfile
from functools import partial
from pathlib import Path
from meristem.sinks.console import Console
from meristem.sinks.emitter import SCREEN, Emitter
from meristem.sinks.queue import RateLimit
from meristem.sinks.records import Records

view = Console()
emitter = Emitter(Records(Path(tempfile.mkdtemp()), "r"), screen=view.show, pace=RateLimit(close_s=0.2))
view.through(partial(emitter.later, SCREEN), emitter.emit)
view.start("t")
view.update({"a": "b"})
view.stop()
(told,) = emitter.close()
view.lose("it takes no more text")
print("to nobody")
print(told.status, file=sys.stderr)
"""


def test_process_ends_though_its_screen_takes_nothing():
    """A thread that is stuck in stdout holds its lock: neither a later print nor the exit of Python may wait for it."""
    ours, terminal = os.openpty()
    # As Ctrl-S does: filling it up would leave room again once the kernel has moved what is in it.
    termios.tcflow(terminal, termios.TCOOFF)
    code = [sys.executable, "-c", STUCK]
    done = subprocess.run(code, stdout=terminal, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "hung\n")
    for descriptor in (ours, terminal):
        os.close(descriptor)


def test_lost_screen_gives_stderr_back():
    """Whenever the terminal goes, what is written to stderr afterwards is not swallowed by a view that nobody sees."""
    usual = sys.stderr
    for n_drawn in range(4):
        target = screen(force_terminal=True)
        posted = []
        console = Console(screen=target)
        console.through(posted.append)
        console.start("t")
        console.update({"a": "b"})
        console.stop()
        for draw in posted[:n_drawn]:
            draw()
        target.file.close()
        for draw in posted[n_drawn:]:
            draw()
        assert sys.stderr is usual


def test_the_error_that_ends_a_run_is_left_to_whoever_began_it():
    """It is raised and said there; other events stay as a line."""
    target = screen()
    console = Console(screen=target)
    console.show({"name": "exception", "severity": "error", "payload": {"type": "DataError", "message": "no text"}})
    console.show({"name": "sink.failed", "severity": "warning", "payload": {"sink": "mlflow"}})
    assert target.file.getvalue() == "warning: sink.failed: sink mlflow\n"
