"""The page of the edge in Chromium: it goes on with a session of chat, to the bit as the C core does."""

import contextlib
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from edges import Model, library
from meristem.events import silent
from meristem.export import edge
from meristem.models.config import LearnConfig
from meristem.models.generate import Sampling
from meristem.models.shipped import DIRECTORY
from meristem.native import build
from meristem.serve.session import Session

pytestmark = [pytest.mark.extras, pytest.mark.timeout(600)]
WAIT_MS = 60_000
OPTIONS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
FACT, QUESTION = "My sister Lydia likes soup.", "What does Lydia like to eat?"
MOST = 60
FLOOR_TOKENS_PER_S = 200
"""A tenth of what one old core reaches: below it the page is broken, not slow."""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    if shutil.which(build.WASM_COMPILER) is None:
        pytest.skip(f"needs {build.WASM_NEEDS}")
    to = tmp_path_factory.mktemp("edge") / "page"
    edge.export(DIRECTORY, to, web=True, emit=silent)
    return to


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
def visit(browser):
    """Opens a page that is ready; at the end nothing went wrong in it, and it spoke to nobody but its own server."""
    contexts, wrong = [], []

    def visited(url: str, **settings):
        context = browser.new_context(reduced_motion="reduce", accept_downloads=True, **settings)
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on(
            "request", lambda asked: None if asked.url.startswith((url, "blob:", "data:")) else wrong.append(asked.url)
        )
        page.goto(url)
        expect(page.locator("#send")).to_be_enabled()
        return page

    yield visited
    for context in contexts:
        context.close()
    assert wrong == []


def expect(what):
    from playwright.sync_api import expect as expected

    return expected(what)


def say(page, text: str) -> str:
    """Send a message; the reply, once it is whole."""
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#send")).to_be_enabled()
    return page.locator(".reply").last.inner_text()


def opened(page, path: Path) -> None:
    page.locator("#file").set_input_files(path)
    expect(page.locator("#turns .muted").first).to_contain_text("tokens were read in it")


def greedy(page, most: int = MOST) -> None:
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tokens at most").fill(str(most))


def logits(page) -> torch.Tensor:
    return torch.tensor(page.evaluate("Array.from(meristem.model.logits)"), dtype=torch.float64).float()


def talked(shipped) -> Session:
    session = Session(shipped.model, shipped.tokenizer, sampling=Sampling(temperature=0))
    for text in (FACT, "I work as a gardener."):
        assert "".join(session.reply(text, MOST))
    return session


def test_a_chat_goes_on_in_the_page_and_comes_back(visit, folder, shipped, tmp_path):
    """The same greedy replies in turn: in Python, in the page, and in Python again."""
    session = talked(shipped)
    session.save(tmp_path / "chat")
    with served(folder) as url:
        page = visit(url)
        opened(page, tmp_path / "chat")
        greedy(page)
        assert say(page, QUESTION) == "".join(session.reply(QUESTION, MOST)).strip()
        assert "soup" in page.locator(".reply").last.inner_text()
        with page.expect_download() as download:
            page.get_by_role("button", name="Save session").click()
        download.value.save_as(tmp_path / "back")
        page.screenshot(path=tmp_path / "page.png")
    back = Session.load(tmp_path / "back", shipped.model, shipped.tokenizer)
    assert back.n_tokens == session.n_tokens and back.id == session.id
    again = "What do I work as?"
    assert "".join(back.reply(again, MOST)) == "".join(session.reply(again, MOST))


def test_what_was_said_is_in_the_file(visit, folder, shipped, tmp_path):
    with served(folder) as url:
        page = visit(url)
        greedy(page, 12)
        replies = [say(page, text) for text in (FACT, QUESTION)]
        with page.expect_download() as download:
            page.get_by_role("button", name="Save session").click()
        download.value.save_as(tmp_path / "own")
        page.get_by_role("button", name="New").click()
        expect(page.locator(".reply")).to_have_count(0)
        opened(page, tmp_path / "own")
        assert page.locator(".said").all_inner_texts() == [FACT, QUESTION]
        assert page.locator(".reply").all_inner_texts() == replies
    from meristem.serve.sessions import Sessions

    record = Sessions(tmp_path / "server", shipped.model, shipped.tokenizer).put((tmp_path / "own").read_bytes())
    assert record.n_tokens == Session.load(tmp_path / "own", shipped.model, shipped.tokenizer).n_tokens


@pytest.mark.parametrize("which", ["head", "last_mlp"])
def test_a_session_that_learns_goes_on_in_the_page_and_comes_back(visit, folder, shipped, which, tmp_path):
    """Begun in chat: the same greedy text, in the bits of the native build; what is learned is shown, and saved."""
    how = LearnConfig(which=which, chunk=16)
    greedy_one = Sampling(temperature=0)
    session = Session(shipped.model, shipped.tokenizer, sampling=greedy_one, learn="weights", learning=how)
    "".join(session.reply(FACT, MOST))
    session.save(tmp_path / "chat")
    native = Model(library((*build.SMALL, *build.SAME_BITS)), (folder / "model.safetensors").read_bytes())
    native.load((tmp_path / "chat").read_bytes())
    with served(folder) as url:
        page = visit(url)
        opened(page, tmp_path / "chat")
        expect(page.get_by_label("Learns")).to_have_value(which)
        expect(page.get_by_label("Learns")).to_be_disabled()
        found = page.evaluate("Array.from({ length: 80 }, () => meristem.model.step())")
        assert found == [native.step() for _ in range(80)] and torch.equal(logits(page), native.logits)
        with page.expect_download() as download:
            page.get_by_role("button", name="Save session").click()
        download.value.save_as(tmp_path / "page")
        expect(page.locator("#learned")).to_have_text(re.compile(r"^\d+ steps?, rate 0\.\d+, saved -?\d+\.\d\d nats$"))
    logits_bo = session._now.logits_bo
    for token_id in found:
        assert int(logits_bo.argmax()) == token_id
        logits_bo = session._read_on(token_id)
    session._end_turn()
    back = Session.load(tmp_path / "page", shipped.model, shipped.tokenizer, learn="weights", learning=how)
    assert back.n_tokens == session.n_tokens
    assert back._now.state["learned"]["n_chunks"] == session._now.state["learned"]["n_chunks"]


def test_the_switch_says_what_learns(visit, folder):
    """It is open until something was read; New opens it again, and forgets what was learned."""
    with served(folder) as url:
        page = visit(url)
        greedy(page, 40)
        expect(page.locator("#learned")).to_have_text("")
        page.get_by_label("Learns").select_option("head")
        expect(page.locator("#learned")).to_have_text("0 steps, rate 0.25, saved 0.00 nats")
        say(page, (FACT + " ") * 20)
        expect(page.get_by_label("Learns")).to_be_disabled()
        assert page.evaluate("meristem.model.learned.nSteps") > 0
        expect(page.locator("#learned")).not_to_have_text(re.compile("^0 steps"))
        page.get_by_role("button", name="New").click()
        expect(page.get_by_label("Learns")).to_be_enabled()
        expect(page.locator("#learned")).to_have_text("0 steps, rate 0.25, saved 0.00 nats")
        page.get_by_label("Learns").select_option("memory")
        say(page, FACT)
        expect(page.locator("#learned")).to_have_text("")
        assert page.evaluate("meristem.model.learned.which") == "memory"


def test_the_bits_are_those_of_the_native_build(visit, folder, shipped, tmp_path):
    """With vectors and without, in the browser and as a library that keeps the same order of sums."""
    session = talked(shipped)
    session.save(tmp_path / "chat")
    native = Model(library((*build.SMALL, *build.SAME_BITS)), (folder / "model.safetensors").read_bytes())
    native.load((tmp_path / "chat").read_bytes())
    true = [native.step() for _ in range(150)]
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    shutil.copy(build.cached_wasm(vectors=()), plain / "edge.wasm")
    for place in (folder, plain):
        with served(place) as url:
            page = visit(url)
            opened(page, tmp_path / "chat")
            assert page.evaluate("Array.from({ length: 150 }, () => meristem.model.step())") == true
            assert torch.equal(logits(page), native.logits)


def test_the_ids_of_a_text_are_those_of_the_tokenizer(visit, folder, shipped):
    odd = (
        "It's  Ada's\tcode:\n\n  'l 'll \u00e9\u4e2d\u00b2x9 \u2028 \U0001f600 end \x85 we've 12,5 \xa0\xa0z \ufeff a  "
    )
    with served(folder) as url:
        page = visit(url)
        for text in (FACT, odd, "", " ", "\n", "''s", "a'", " 's"):
            assert page.evaluate("text => meristem.tokenizer.encode(text)", text) == shipped.tokenizer.encode(text)


def test_it_is_small_starts_at_once_and_keeps_pace(visit, folder):
    files = ["index.html", "page.css", "page.js", "edge.wasm", "tokenizer.json"]
    assert sum((folder / name).stat().st_size for name in files) < 300_000
    with served(folder) as url:
        page = visit(url)
        n = page.evaluate(
            "() => { const m = meristem.model; m.read([5]); const from = performance.now(); let n = 0;"
            "while (performance.now() - from < 300) { m.step(); ++n; } return n / 0.3; }"
        )
        assert n > FLOOR_TOKENS_PER_S
        assert int(page.evaluate("document.documentElement.dataset.openMs")) < 5_000


def test_what_is_no_session_is_said(visit, folder, shipped, tmp_path):
    """And the page goes on with what it had."""
    session = talked(shipped)
    session.save(tmp_path / "chat")
    content = (tmp_path / "chat").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-100])
    (tmp_path / "none").write_bytes(b"no session")
    with served(folder) as url:
        page = visit(url)
        opened(page, tmp_path / "chat")
        for name, said in (("cut", "the session is damaged"), ("none", "the session is damaged: it is cut off")):
            page.locator("#file").set_input_files(tmp_path / name)
            expect(page.locator("#error")).to_contain_text(said)
        assert page.evaluate("meristem.model.nTokens") == session.n_tokens


STOP_AT_ONCE = """() => {
  const stop = document.getElementById("stop");
  globalThis.stopped = 0;
  new MutationObserver(() => {
    if (globalThis.stopped || !document.querySelector(".reply")?.textContent) return;
    const box = stop.getBoundingClientRect();
    if (document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) !== stop) return;
    globalThis.stopped = meristem.model.nTokens;
    stop.click();
  }).observe(document.getElementById("turns"), { subtree: true, childList: true, characterData: true });
}"""
"""Presses the button once a piece of the reply stands there, before the next: a reply may end by itself at any time."""


def test_a_reply_can_be_stopped(visit, folder):
    with served(folder) as url:
        page = visit(url, viewport={"width": 390, "height": 844})
        page.get_by_label("Tokens at most").fill("2000")
        page.get_by_label("Temperature").fill("2")
        page.evaluate(STOP_AT_ONCE)
        assert say(page, QUESTION)
        assert page.evaluate("stopped") > 0
        assert page.evaluate("meristem.model.nTokens - stopped") <= 1  # the one that was being drawn
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
