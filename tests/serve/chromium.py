"""A page in headless Chromium, which may do nothing wrong: no error, nothing refused by its policy, no other host."""

import asyncio
import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
TIMEOUT_MS = 60_000
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


@contextlib.contextmanager
def opened() -> Iterator["Browser"]:
    """The system's Chromium."""
    from playwright.sync_api import expect, sync_playwright

    place = shutil.which("chromium") or shutil.which("chromium-browser")
    assert place, "there is no Chromium here. Install it: apt-get install -y chromium"
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=place, args=OPTIONS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def visited(browser: "Browser", url: str, **settings: Any) -> Iterator["Page"]:
    """A page of its own; at its end, what it did wrong is an error of the test."""
    context = browser.new_context(viewport=settings.pop("viewport", DESKTOP), **settings)
    wrong: list[str] = []
    context.on("request", lambda request: request.url.startswith(url) or wrong.append(f"asks {request.url}"))
    page = context.new_page()
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.set_default_timeout(TIMEOUT_MS)
    try:
        page.goto(url)
        yield page
        assert wrong == []
    finally:
        context.close()


class Server:
    """An application at a free port of this machine, in a thread."""

    def __init__(self, app: Any, port: int = 0) -> None:
        self._listening = socket.create_server(("127.0.0.1", port))
        self.port = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[self._listening])))
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listening.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
