"""The page in Chromium, as a desktop and as a phone: a fact told, a reply that streams, and what the memory shows."""

import contextlib
import json
import re
import shutil
import threading
from pathlib import Path

import httpx2 as httpx
import pytest
import torch
from torch import nn

from meristem.models.generate import Sampling
from meristem.serve.access import Access
from meristem.serve.keys import Keys
from meristem.serve.session import KEPT_TURNS
from serving import model_of, serving, wait_for

pytestmark = [pytest.mark.extras, pytest.mark.timeout(300)]

DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
FAULTS = (Path(__file__).parent / "accessible.js").read_text(encoding="utf-8")
LETTERS = "abcdefghijklmnopqrstuvwxyz "
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WAIT_MS = 60_000


class Letters(nn.Module):
    """A small model that writes letters and spaces alone, so that a reply has text and does not end by itself."""

    def __init__(self):
        super().__init__()
        self.inner = model_of(1)
        bias_o = torch.zeros(256)
        bias_o[list(LETTERS.encode())] = 40.0
        self.register_buffer("bias_o", bias_o)

    def forward(self, tokens_bt, state=None):
        logits_bto, state = self.inner(tokens_bt, state)
        return logits_bto + self.bias_o, state


ROUNDS = 40
WRITING = re.compile("meristem: .*[a-z]{2}")
"""A reply that has text: who speaks stands before it, for screen readers."""


@contextlib.contextmanager
def held(engine):
    """The engine stops after some rounds of the next reply, in the middle of it, until the block ends."""
    step, is_open, n_rounds = engine.step, threading.Event(), 0

    def counted():
        nonlocal n_rounds
        n_rounds += 1
        if n_rounds > ROUNDS:
            is_open.wait(WAIT_MS / 1000)
        step()

    engine.step = counted
    try:
        yield
    finally:
        engine.step = step
        is_open.set()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data"), model=Letters().requires_grad_(False)) as (url, served):
        served.sampling = Sampling(temperature=1.0)
        yield url, served


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    sync_api.expect.set_options(timeout=WAIT_MS)
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=list(OPTIONS))
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page in a browser of its own; at the end nothing went wrong in it, and it spoke to nobody else."""
    contexts, wrong = [], []

    def visited(url=server[0], *, allowed=(), **settings):
        # Without transitions a colour is what it will be.
        context = browser.new_context(reduced_motion="reduce", **settings)
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        opened = context.new_page()
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.on(
            "request", lambda asked: None if asked.url.startswith(url.partition("/#")[0]) else wrong.append(asked.url)
        )

        def heard(message):
            is_allowed = any(re.search(each, message.text) for each in allowed)
            if message.type in ("error", "warning") and not is_allowed:
                wrong.append(message.text)

        opened.on("console", heard)
        opened.goto(url)
        return opened

    yield visited
    for context in contexts:
        context.close()
    assert wrong == []


def expect(what):
    from playwright.sync_api import expect as expected

    return expected(what)


def say(page, text: str) -> None:
    """Send a message and wait until its reply is complete."""
    n_turns = page.locator("#turns > .turn").count()
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")
    expect(page.locator("#turns .below")).to_have_count(n_turns + 1)


def seen(page, what: str) -> None:
    """On a phone, go to one of the three parts."""
    button = page.get_by_role("navigation", name="Views").get_by_role("button", name=what)
    if button.is_visible():
        button.click()


def measured(page) -> None:
    """Wait until the memory view is complete."""
    expect(page.locator("#memory-parts[aria-busy]")).to_have_count(0)


@pytest.mark.parametrize("settings", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_fact_is_told_and_the_memory_shows_it(visit, settings):
    page = visit(**settings)
    say(page, "Ada lives in Oslo.")
    say(page, "Where does Ada live?")
    expect(page.locator("#turns .text").nth(1)).to_have_text("You: Where does Ada live?")
    expect(page.locator("#turns .reply").nth(1)).to_contain_text(re.compile("[a-z]{3}"))
    expect(page.locator("#session-state")).to_contain_text("tokens read")
    seen(page, "Memory")
    measured(page)
    expect(page.locator("#turn")).to_have_value("2")
    shades = page.locator("#tokens .token").evaluate_all("all => all.map(each => each.className)")
    assert len(shades) == len("\n\nWhere does Ada live?\n") + 256
    assert len({each for each in shades if each.startswith("token shade-")}) > 1
    page.get_by_label("What the memory gave").check()
    assert page.locator("#tokens .token").first.get_attribute("class").startswith("token unknown")
    expect(page.locator("#tokens .scale")).to_contain_text("likelier")
    names = page.locator("#sources .bars .name").all_inner_texts()
    assert names == ["Turn 1", "Attention"]
    expect(page.locator("#sources .bars .text").first).to_have_text("Ada lives in Oslo.")
    expect(page.locator("#changed tbody tr")).to_have_count(1)
    for name in ("norms", "half-lives"):
        expect(page.locator(f"#{name} svg.plot .dot")).to_have_count(2)
    page.locator("#turn").select_option("1")
    measured(page)
    expect(page.locator("#sources .bars .name")).to_have_text(["Attention"])
    assert page.evaluate("document.documentElement.scrollWidth") == settings["viewport"]["width"]
    seen(page, "Sessions")
    expect(page.locator("#list [aria-current] .name")).to_have_text("Ada lives in Oslo.")


def test_a_reply_comes_in_pieces_and_can_be_stopped(visit, server):
    page = visit(**DESKTOP)
    say(page, "Ada lives in Oslo.")
    with held(server[1].engine):
        page.get_by_label("Message", exact=True).fill("And where?")
        page.get_by_role("button", name="Send").click()
        reply = page.locator("#turns .reply.writing")
        expect(reply).to_contain_text(WRITING)
        # What is here came before the end: the engine is held.
        assert len(reply.inner_text()) < 256 and server[1].engine.n_at_work == 1
        page.get_by_role("button", name="Stop").click()
    expect(page.locator("#turns .notice")).to_contain_text("Nothing of this turn was kept")
    expect(page.get_by_label("Message", exact=True)).to_have_value("And where?")
    expect(page.locator("#turns .below")).to_have_count(1)
    wait_for(lambda: server[1].engine.n_at_work == 0)
    say(page, "And where?")
    expect(page.locator("#turns .below")).to_have_count(2)


def confirm(page, button: str, *, value: str | None = None) -> None:
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    if value is not None:
        dialog.get_by_label("Name").fill(value)
    dialog.get_by_role("button", name=button).click()
    expect(dialog).to_be_hidden()


def test_save_fork_roll_back_forget_and_delete(visit, server):
    page, sessions = visit(**DESKTOP), server[1].sessions
    for text in ("one fact", "two facts", "three facts"):
        say(page, text)
    first = page.url.partition("#")[2]
    page.get_by_role("button", name="Save").click()
    confirm(page, "Save", value="kept")
    expect(page.locator("#turns .label")).to_have_text("saved: kept")
    page.get_by_role("button", name="Fork").click()
    confirm(page, "Fork", value="the other")
    expect(page.locator("#session-name")).to_have_text("the other")
    second = page.url.partition("#")[2]
    assert second != first and sessions.get(second).turn == 3
    page.get_by_role("button", name="Roll back to turn 1").click()
    confirm(page, "Roll back")
    expect(page.locator("#turns .below")).to_have_count(1)
    assert (sessions.get(first).turn, sessions.get(second).turn) == (3, 1)
    page.get_by_role("button", name="Forget").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert sessions.get(second).turn == 1
    page.get_by_role("button", name="Forget").click()
    confirm(page, "Forget")
    expect(page.locator("#memory-empty")).to_be_visible()
    assert (sessions.get(second).turn, sessions.get(second).n_tokens) == (0, 0)
    page.get_by_role("button", name="Delete").click()
    confirm(page, "Delete")
    expect(page.locator("#session-name")).to_have_text("New session")
    assert second not in {each.id for each in sessions.records()}
    page.locator("#list").get_by_role("button", name="one fact").click()
    expect(page.locator("#turns .below")).to_have_count(3)
    page.reload()
    expect(page.locator("#session-name")).to_have_text("one fact")
    assert page.url.endswith(first)


def held_back(page, path: str):
    """Holds the first request of the page for a path; gives what lets it go, once it was made."""
    held = []
    page.route(f"**{path}", lambda route: held.append(route), times=1)

    def let_go():
        while not held:
            page.wait_for_timeout(10)
        held.pop().continue_()

    return let_go


def test_what_is_sent_before_the_page_has_begun_is_sent_when_it_has(visit):
    """A slow network must not swallow Enter: the first message waits until the list of sessions has come."""
    page = visit(**DESKTOP)
    expect(page.get_by_role("button", name="New", exact=True)).to_be_enabled()
    let_go = held_back(page, "/v1/sessions?*")
    page.reload()
    field = page.get_by_label("Message", exact=True)
    field.fill("Ada lives in Oslo.")
    field.press("Enter")
    field.press("Enter")
    expect(page.locator("#waiting")).to_contain_text("will be sent")
    let_go()
    expect(page.locator("#turns .below")).to_have_count(1)
    expect(page.locator("#turns .text")).to_have_text("You: Ada lives in Oslo.")
    expect(field).to_have_value("")
    expect(page.locator("#waiting")).to_have_text("")


def test_what_is_sent_beside_a_reply_is_sent_behind_it(visit, server):
    page = visit(**DESKTOP)
    field = page.get_by_label("Message", exact=True)
    with held(server[1].engine):
        field.fill("Ada lives in Oslo.")
        field.press("Enter")
        expect(page.locator("#turns .reply.writing")).to_contain_text(WRITING)
        field.fill("And where?")
        field.press("Enter")
        expect(page.locator("#waiting")).to_contain_text("will be sent")
    expect(page.locator("#turns .below")).to_have_count(2)
    expect(page.locator("#turns .text")).to_have_text(["You: Ada lives in Oslo.", "You: And where?"])


def test_what_is_typed_beside_a_reply_outlives_its_end(visit, server):
    """Stop gives the message back, and takes nothing of what was typed since; what waited is not sent by itself."""
    page = visit(**DESKTOP)
    field = page.get_by_label("Message", exact=True)
    with held(server[1].engine):
        field.fill("Ada lives in Oslo.")
        field.press("Enter")
        expect(page.locator("#turns .reply.writing")).to_contain_text(WRITING)
        field.fill("And where?")
        field.press("Enter")
        page.get_by_role("button", name="Stop").click()
    expect(page.locator("#turns .notice")).to_contain_text("Nothing of this turn was kept")
    expect(field).to_have_value("Ada lives in Oslo.\nAnd where?")
    expect(page.locator("#turns .below")).to_have_count(0)


def test_a_text_is_read_without_a_reply(visit):
    page = visit(**DESKTOP)
    page.get_by_label("Only read, no reply").check()
    say(page, "A text.\nOf two lines.")
    expect(page.locator("#turns .reply")).to_have_count(0)
    measured(page)
    expect(page.locator("#tokens h4")).to_have_text(["Read"])
    expect(page.locator("#tokens .tokens")).to_contain_text("A text.↵")


def test_of_a_long_session_what_is_kept_is_shown(visit, server):
    """No request is made for the rest, which would be refused."""
    url, session = server[0], server[1].sessions.create(name="long").id
    with httpx.Client(base_url=url, timeout=60) as web:
        for _ in range(KEPT_TURNS + 2):
            web.post(f"/v1/sessions/{session}/feed", json={"text": "Ada."}).raise_for_status()
    page = visit(f"{url}/#{session}", **DESKTOP)
    expect(page.locator("#turns .below")).to_have_count(KEPT_TURNS + 2)
    measured(page)
    expect(page.locator("#norms svg.plot .dot")).to_have_count(KEPT_TURNS - 1)
    expect(page.locator("#sources .bars .name").first).to_have_text("Turns 1–3")
    page.locator("#turn").select_option("1")
    expect(page.locator("#memory-note")).to_contain_text("are not kept any more")
    expect(page.locator("#tokens-card")).to_be_hidden()


def test_what_is_said_is_text(visit):
    page = visit(**DESKTOP)
    text = "<img src=/nothing onerror=alert(1)><b>bold</b> &amp;"
    say(page, text)
    expect(page.locator("#turns .text")).to_have_text(f"You: {text}")
    measured(page)
    assert page.locator("#turns img, #turns b, #memory-parts img, #list img").count() == 0


def focused(page) -> str:
    """What has the focus, after checking that it is seen to have it."""
    found = page.evaluate(
        """() => {
          const at = document.activeElement;
          const ring = at.matches("#message") ? document.getElementById("composer") : at;
          const style = getComputedStyle(ring);
          const isSeen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
          return [at.id || at.getAttribute("aria-label") || at.textContent.trim(), isSeen];
        }"""
    )
    assert found[1], f"{found[0]} has the focus and does not show it"
    return found[0]


def test_the_keyboard_is_enough(visit):
    page = visit(**DESKTOP)
    expect(page.locator("#list-note")).to_have_text(re.compile("|There is none yet."))
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the message"
    page.keyboard.press("Enter")
    assert focused(page) == "message"
    page.keyboard.type("Ada lives in Oslo.")
    page.keyboard.press("Enter")
    expect(page.locator("#turns .below")).to_have_count(1)
    measured(page)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    order = []
    while "values" not in order and len(order) < 60:
        page.keyboard.press("Tab")
        order.append(focused(page))
        if order[-1].startswith("Tokens"):
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowRight")
            expect(page.locator("#tokens .readout")).to_contain_text("“d”")
        if order[-1] == "Half-life of what each holds":
            page.keyboard.press("ArrowLeft")
            expect(page.locator("#half-lives .readout")).to_contain_text("turn 1")
            break
    assert order[:3] == ["only-read", "send", "turn"]
    page.get_by_role("button", name="Fork").focus()
    page.keyboard.press("Enter")
    assert focused(page) == "ask-value"
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert focused(page) == "fork"


@pytest.mark.parametrize("settings", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_contrast(visit, settings, scheme):
    page = visit(**settings, color_scheme=scheme)
    assert page.evaluate(FAULTS) == []
    say(page, "Ada lives in Oslo.")
    say(page, "Where?")
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert ground == {"light": "rgb(244, 245, 241)", "dark": "rgb(16, 20, 18)"}[scheme]
    for part in ("Sessions", "Chat", "Memory"):
        seen(page, part)
        measured(page)
        assert page.evaluate(FAULTS) == []
    page.get_by_label("What the memory gave").check()
    for summary in page.locator("details > summary").all():
        summary.click()
    assert page.evaluate(FAULTS) == []
    seen(page, "Chat")
    page.get_by_role("button", name="Fork").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert page.evaluate(FAULTS) == []


def test_a_server_with_keys_asks_for_one(visit, tmp_path):
    keys = Keys(tmp_path)
    key = keys.add("ada")
    model = Letters().requires_grad_(False)
    with serving(tmp_path, model=model, access=Access(keys, hosts=None, max_bytes=1 << 20)) as (url, served):
        page = visit(url, allowed=["status of 401"], **DESKTOP)
        field = page.get_by_label("Key of this server")
        expect(field).to_be_focused()
        expect(page.locator("#wrong")).to_be_hidden()
        field.fill("wrong")
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#wrong")).to_contain_text("key")
        field.fill(key)
        field.press("Enter")
        expect(field).to_be_hidden()
        expect(page.locator("#wrong")).to_be_hidden()
        say(page, "Ada lives in Oslo.")
        measured(page)
        expect(page.locator("#sources .bars li")).to_have_count(1)
        assert [each.name for each in served.sessions.records("ada")] == ["Ada lives in Oslo."]
        kept = json.loads(page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}, document.cookie])"))
        assert kept == [{"meristem.key": key}, {}, ""]
        assert key not in page.url


def test_what_the_server_refuses_is_said(visit, server):
    page = visit(**DESKTOP, allowed=["status of 4"])
    say(page, "Ada lives in Oslo.")
    session = page.url.partition("#")[2]
    with server[1].sessions.writing(session):
        page.get_by_label("Message", exact=True).fill("And?")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("alert")).to_contain_text("is being written to")
        expect(page.get_by_label("Message", exact=True)).to_have_value("And?")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#turns .below")).to_have_count(2)
    expect(page.get_by_role("alert")).to_be_hidden()
