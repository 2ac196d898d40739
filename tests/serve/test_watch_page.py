"""The page of runs in a browser: runs that train, return to an earlier step, grow, end, and are deleted."""

import contextlib
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from meristem.checkpoint.run import RunManifest
from meristem.events import Event
from meristem.recipes.grow import grow
from meristem.recipes.pretrain import pretrain
from meristem.serve.access import Access
from meristem.serve.watch import make_watch
from meristem.serve.watched import WatchedRun
from meristem.sinks.records import Records, history
from recipes.forks import Runs
from recipes.growing import growing
from recipes.small import config, overrides, write_text
from serve.chromium import DESKTOP, PHONE, Server, opened, visited

pytestmark = [pytest.mark.extras, pytest.mark.timeout(300)]

FAULTS = (Path(__file__).parent / "accessible.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    with opened() as found:
        yield found


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A run of forty steps in which a seed lives a whole life."""
    place = tmp_path_factory.mktemp("grown")
    grow(growing(write_text(place), "eval.n_samples=2", "train.steps=40"), run_dir=place / "grown")
    return place / "grown"


@pytest.fixture
def page_of(browser):
    """Opens a page of these runs."""

    @contextlib.contextmanager
    def open_page(*directories, **settings):
        with Server(make_watch([WatchedRun(each) for each in directories], Access())) as server:
            with visited(browser, server.url, **settings) as page:
                yield page

    return open_page


class Run:
    """A run whose records a test writes."""

    def __init__(self, directory):
        self.directory = directory
        self.manifest = RunManifest.create(directory, name=directory.name)
        self.manifest.update(status="running")
        self.records = Records(directory, self.manifest.content["id"])

    def steps(self, first, last, bits):
        for step in range(first, last + 1):
            self.records.metrics(step, 10 * step, 0.0, "train", {"bits_per_byte": bits, "rate": 0.5})


def card(page, name):
    return page.locator(".run").filter(has_text=name)


def plot(page, title):
    """A chart, drawn."""
    return page.locator("figure.chart").filter(has=page.locator("figcaption", has_text=re.compile(f"^{title}$")))


def rows(page, title):
    """The numbers of a chart, row by row."""
    figure = plot(page, title)
    if figure.locator("details").get_attribute("open") is None:
        figure.locator("summary").click()
    return [row.split("\t") for row in figure.locator("tbody").inner_text().splitlines()]


def figure(page, name, term):
    """What a card shows under a term."""
    return (
        card(page, name)
        .locator("dl div")
        .filter(has=page.locator("dt", has_text=re.compile(f"^{term}$")))
        .locator("dd")
    )


def test_a_run_is_shown_while_it_trains_and_when_it_has_ended(page_of, tmp_path) -> None:
    """The figures move while it writes; at the end the numbers are those of its files."""
    from playwright.sync_api import expect

    runs = Runs()
    try:
        settings = overrides(write_text(tmp_path), "train.steps=100000", "checkpoint.every=50", "eval.every=50")
        pid = runs.start("charrnn", settings, tmp_path / "ada")
        while not (tmp_path / "ada" / "metrics.ndjson").exists():
            os.sched_yield()
        with page_of(tmp_path / "ada") as page:
            expect(card(page, "ada").locator(".status")).to_have_text("running")
            step = figure(page, "ada", "step")
            first = step.inner_text()
            expect(step).not_to_have_text(first)
            os.kill(pid, signal.SIGINT)
            assert runs.wait(pid) == 130
            expect(card(page, "ada").locator(".status")).to_have_text("interrupted")
            last = [record for record in history(tmp_path / "ada") if record["split"] == "train"][-1]
            expect(step).to_have_text(f"{last['step']:,}")
            expect(page.locator("#state")).to_have_text("No run is training now.")
            x, *_, shown = rows(page, "Learning rate")[-1]
            assert (x, float(shown)) == (f"{last['step']}", pytest.approx(last["metrics"]["rate"], rel=1e-3))
    finally:
        runs.close()


def test_a_finished_run_shows_all_that_it_wrote(page_of, grown) -> None:
    from playwright.sync_api import expect

    with page_of(grown) as page:
        expect(card(page, "grown").locator(".status")).to_have_text("finished")
        shown = {row[0]: row[1:] for row in rows(page, "Loss")}
        for record in history(grown):
            column = {"train": 0, "val": 1}[record["split"]]
            if record["task"] is None:
                bits = record["metrics"]["bits_per_byte"]
                assert float(shown[str(record["step"])][column]) == pytest.approx(bits, rel=1e-3)
        for title in ("Learning rate", "Speed", "Gradient norm", "Write rate", "Half-lives of the heads", "Momentum"):
            expect(plot(page, title).locator("path.line").first).to_be_visible()
        stages = [title.split(": ")[1] for title in page.locator("#timeline rect title").all_text_contents()]
        assert [stage.split(",")[0] for stage in stages] == [
            event["payload"]["to"].lower()
            for event in history(grown, "events")
            if event["name"] == "slot.stage_changed"
        ]
        expect(page.locator("#timeline")).to_contain_text("blocks.1#0 · bottleneck · fossilized since step 26")
        samples = history(grown, "samples")
        expect(page.locator("#samples .text")).to_have_count(len(samples))
        assert page.locator("#samples .text").all_text_contents() == [each["prompt"] + each["text"] for each in samples]
        expect(page.locator("#events > li").first).to_contain_text("run.ended")
        page.locator("#events > li").first.locator("summary").click()
        expect(page.locator("#events pre").first).to_contain_text('"status": "finished"')


def test_levels_stand_side_by_side(page_of, tmp_path) -> None:
    """Each figure of the levels of a memory is a chart with a line for each level."""
    from playwright.sync_api import expect

    settings = (
        "model.n_heads=2",
        "model.sliding_window=5",
        "memory.head_dim=4",
        "memory.levels.count=2",
        "train.steps=3",
    )
    more = ("memory.levels.periods=[1, 4]", "eval.n_samples=0")
    pretrain(config(write_text(tmp_path), *settings, *more, preset="titans-mag"), run_dir=tmp_path / "ada")
    with page_of(tmp_path / "ada") as page:
        group = page.locator("details.group").filter(has_text="Levels of layer.0.recall")
        expect(group.locator("figcaption").filter(has_text="Half-life")).to_be_visible()
        expect(group.locator("figure").first.locator(".legend li")).to_have_text(["level 0", "level 1"])


def test_a_return_leaves_one_value_per_step(page_of, tmp_path) -> None:
    """Steps that are made again replace those of the abandoned branch, in a page that has shown them already."""
    from playwright.sync_api import expect

    run = Run(tmp_path / "ada")
    run.steps(1, 6, bits=4)
    run.records.event(
        Event("slot.stage_changed", {"slot": "a", "seed": "a#0", "step": 6, "from": "DORMANT", "to": "GERMINATED"})
    )
    with page_of(run.directory) as page:
        expect(figure(page, "ada", "step")).to_have_text("6")
        expect(page.locator("#growth")).to_be_visible()
        run.records.event(Event("rollback.done", {"resumed_from": 3}, "warning"))
        run.steps(4, 5, bits=2)
        expect(figure(page, "ada", "step")).to_have_text("5")
        assert [row[1] for row in rows(page, "Loss")] == ["4", "4", "4", "2", "2"]
        expect(page.locator("#growth")).to_be_hidden()
        page.locator("#severity").select_option("warnings and errors")
        expect(page.locator("#events > li")).to_have_count(1)
        expect(page.locator("#events .severity.warning")).to_have_text("warning")


def test_a_run_has_one_colour_in_every_chart(page_of, grown, tmp_path) -> None:
    from playwright.sync_api import expect

    run = Run(tmp_path / "ada")
    run.steps(1, 3, bits=4)
    with page_of(grown, run.directory) as page:
        for title in ("Loss", "Learning rate"):
            expect(plot(page, title).locator(".legend li").filter(has_text="ada").locator("line")).to_have_class(
                re.compile("series-2")
            )
            lines = plot(page, title).locator("path.line")
            expect(plot(page, title).locator("path.line.series-2")).to_have_count(1)
            n_lines = lines.count()
            card(page, "grown").locator("input").uncheck()
            expect(lines).to_have_count(1)
            expect(lines).to_have_class(re.compile("series-2"))
            card(page, "grown").locator("input").check()
            expect(lines).to_have_count(n_lines)
        expect(card(page, "ada").locator(".name line")).to_have_class(re.compile("series-2"))


def test_values_are_read_with_the_mouse_and_with_keys(page_of, tmp_path) -> None:
    from playwright.sync_api import expect

    run = Run(tmp_path / "ada")
    for step, bits in enumerate((4, 3, 2), start=1):
        run.steps(step, step, bits)
    with page_of(run.directory) as page:
        loss = plot(page, "Loss")
        loss.locator("svg.plot").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(loss.locator(".readout")).to_contain_text(re.compile(r"2.*3$"))
        loss.locator("svg.plot").blur()
        box = loss.locator("svg.plot").bounding_box()
        page.mouse.move(box["x"] + box["width"] - 20, box["y"] + box["height"] / 2)
        expect(loss.locator(".readout")).to_contain_text(re.compile(r"3.*2$"))
        page.locator("#across").select_option("tokens")
        expect(loss.locator("svg.plot")).to_contain_text("tokens")  # drawn anew a little later
        assert [row[0] for row in rows(page, "Loss")] == ["10", "20", "30"]
        page.locator("#log").check()
        # One tick of the tokens, and one of a decade.
        expect(loss.locator("svg.plot .tick").filter(has_text=re.compile("^10$"))).to_have_count(2)


def test_texts_of_a_run_stay_texts(page_of, tmp_path) -> None:
    """What a model writes can hold no markup that the page would follow."""
    from playwright.sync_api import expect

    evil = "<img src=http://evil.example/x onerror=alert(1)><script>alert(2)</script>"
    run = Run(tmp_path / "a<b>")
    run.steps(1, 1, bits=4)
    run.records.sample(1, evil, evil, {})
    run.records.event(Event("degraded", {"what": evil}, "error"))
    with page_of(run.directory) as page:
        expect(page.locator("#samples .text")).to_have_text(evil + evil)
        expect(page.locator("#events .what")).to_contain_text(evil)
        expect(card(page, "a<b>")).to_be_visible()
        assert page.locator("#samples img, #events img, .run img").count() == 0


def test_samples_are_drawn_again_only_when_they_changed(page_of, tmp_path) -> None:
    from playwright.sync_api import expect

    run = Run(tmp_path / "ada")
    run.steps(1, 1, bits=4)
    run.records.sample(1, "Once", " upon", {})
    with page_of(run.directory) as page:
        first = page.locator("#samples .text")
        expect(first).to_have_text("Once upon")
        page.evaluate("() => { window.kept = document.querySelector('#samples .text'); }")
        run.steps(2, 3, bits=4)
        expect(figure(page, "ada", "step")).to_have_text("3")
        assert page.evaluate("() => window.kept === document.querySelector('#samples .text')")
        run.records.sample(3, "Once", " more", {})
        expect(first).to_have_text("Once more")
        page.locator("#moment").select_option("step 1")
        expect(first).to_have_text("Once upon")


def test_what_is_empty_or_gone_is_one_sentence(page_of, tmp_path) -> None:
    from playwright.sync_api import expect

    empty, gone = Run(tmp_path / "empty"), Run(tmp_path / "gone")
    gone.steps(1, 4, bits=4)
    with page_of(empty.directory, gone.directory) as page:
        expect(card(page, "empty").locator(".notice")).to_have_text("Nothing is recorded yet.")
        expect(figure(page, "gone", "step")).to_have_text("4")
        shutil.rmtree(gone.directory)
        sentence = f"{gone.directory} is gone: it was deleted or moved. Shown is what was read before."
        expect(card(page, "gone").locator(".notice")).to_have_text(sentence)
        expect(figure(page, "gone", "step")).to_have_text("4")


def test_a_server_that_ends_is_one_sentence_and_may_come_back(browser, tmp_path) -> None:
    from playwright.sync_api import expect

    run = Run(tmp_path / "ada")
    run.steps(1, 2, bits=4)
    app = make_watch([WatchedRun(run.directory)], Access())
    first = Server(app)
    context = browser.new_context(viewport=DESKTOP)
    page = context.new_page()
    try:
        page.goto(first.url)
        expect(figure(page, "ada", "step")).to_have_text("2")
        first.close()
        expect(page.locator("#state")).to_contain_text("The server does not answer")
        run.steps(3, 3, bits=4)
        with Server(app, first.port):
            expect(figure(page, "ada", "step")).to_have_text("3")
            expect(page.locator("#state")).to_have_text("Live, as it is written.")
    finally:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_by_all(page_of, grown, scheme, tmp_path) -> None:
    """No text with too little contrast, nothing without a name, nothing too small, nothing out of the page."""
    from playwright.sync_api import expect

    run = Run(tmp_path / "ada")
    run.records.event(Event("degraded", {"what": "nothing"}, "warning"))
    run.records.event(Event("exception", {"type": "ValueError"}, "error"))
    with page_of(grown, run.directory, viewport=PHONE, color_scheme=scheme) as page:
        expect(plot(page, "Loss").locator("path.line").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        widths = page.evaluate("[...document.querySelectorAll('svg.plot')].map((each) => each.clientWidth)")
        assert widths and min(widths[:8]) > 250
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        expect(page.locator("#events pre").first).to_be_visible()
        assert page.evaluate(FAULTS) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
