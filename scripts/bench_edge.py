"""How fast the edge reads, on one thread: the C library, WebAssembly in Chromium, and NumPy. Prints a table; medians.

    python scripts/bench_edge.py                # the reference sizes, and the model in the box
    python scripts/bench_edge.py --no-browser

``layer`` is a memory layer alone: one layer of width d under the delta rule with heads of 16, behind a feed-forward
layer of one unit and a vocabulary of two. ``model`` is one layer of MAG with that memory, attention to 16 tokens and a
vocabulary of 256. Every token is read and written by itself, as in a session.
"""

import argparse
import ctypes
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from meristem.data.tokenizer import byte_tokenizer
from meristem.events import silent
from meristem.export import edge
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.packed import parts_of
from meristem.models.shipped import DIRECTORY
from meristem.native.build import EDGE, cached
from meristem.native.library import supported
from meristem.nn.config import MemoryConfig
from meristem.serve.moment import identity

SECONDS = 0.2
"""Of one measurement."""


def reference(width: int, *, alone: bool) -> bytes:
    """The weight file of a reference size (docs/edge.md)."""
    settings: dict[str, object] = {"dim": width, "n_layers": 1}
    if alone:
        settings |= {"mixer": "memory", "mlp_dim": 1}
    else:
        settings |= {"mixer": "mag", "n_heads": width // 16, "sliding_window": 16}
    config = ModelConfig.model_validate(settings)
    n_ids = 2 if alone else 256
    model = build(config, MemoryConfig(rule="delta", head_dim=16), n_ids, random_seed=0).requires_grad_(False)
    whole = byte_tokenizer()
    tokenizer = replace(whole, tokens=whole.tokens[:n_ids])
    return edge.weights_file(parts_of(model), tokenizer, identity(model, tokenizer))


class Way(Protocol):
    """What opens a model, in milliseconds, and reads it, in tokens per second."""

    def open(self, content: bytes) -> float: ...
    def rate(self) -> float: ...


class Native:
    """The C library by ctypes."""

    def __init__(self, path: Path) -> None:
        self.core, self.at = ctypes.CDLL(str(path)), ctypes.c_void_p()
        self.core.meristem_error.restype = ctypes.c_void_p

    def open(self, content: bytes) -> float:
        """Milliseconds to open a model."""
        self.core.meristem_close(self.at)
        begun = time.process_time()
        code = self.core.meristem_open_bytes(content, ctypes.c_size_t(len(content)), ctypes.byref(self.at))
        spent = time.process_time() - begun
        if code:
            raise RuntimeError(ctypes.string_at(self.core.meristem_error()).decode())
        return 1000 * spent

    def rate(self) -> float:
        """Tokens per second of processor time."""
        n = 256
        ids = (ctypes.c_int32 * n)(*(i % 2 for i in range(n)))
        done, begun = 0, time.process_time()
        while (spent := time.process_time() - begun) < SECONDS:
            self.core.meristem_read(self.at, ids, ctypes.c_size_t(n))
            done += n
        return done / spent


class Browser:
    """The page in Chromium, on one core of whatever else runs there: by the clock of the page."""

    def __init__(self, playwright: Any, folder: Path) -> None:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        options = ["--no-sandbox", "--disable-gpu"]
        self.opened = playwright.chromium.launch(executable_path=path, args=options)

        class Quiet(SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.folder = folder
        self.page = self.opened.new_page()

    def open(self, content: bytes) -> float:
        (self.folder / "model.safetensors").write_bytes(content)
        self.page.close()
        self.page = self.opened.new_page()
        self.page.goto(f"http://127.0.0.1:{self.server.server_port}/")
        self.page.wait_for_selector("#send:enabled")
        return float(self.page.evaluate("document.documentElement.dataset.openMs"))

    def rate(self) -> float:
        return float(
            self.page.evaluate(
                "(ms) => { const ids = Array.from({ length: 256 }, (_, i) => i % 2); const from = performance.now();"
                "let n = 0; while (performance.now() - from < ms) { meristem.model.read(ids); n += 256; }"
                "return 1000 * n / (performance.now() - from); }",
                1000 * SECONDS,
            )
        )


class Plain:
    """``runtime.py``, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, content: bytes) -> float:
        self.path = self.folder / "plain.safetensors"
        self.path.write_bytes(content)
        return 0.0

    def rate(self) -> float:
        code = (
            "import json, sys, time; import runtime; m = runtime.Model(sys.argv[1]); m.read([0, 1] * 20);"
            "b = time.process_time(); m.read([0, 1] * 100); print(json.dumps(200 / (time.process_time() - b)))"
        )
        words = [sys.executable, "-c", code, str(self.path)]
        done = subprocess.run(words, cwd=self.folder, check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-browser", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "edge"
        edge.export(DIRECTORY, folder, web=not asked.no_browser, emit=silent)
        models = {"the model in the box": (folder / "model.safetensors").read_bytes()}
        for width in (64, 128, 256):
            models[f"layer, d = {width}"] = reference(width, alone=True)
            models[f"model, d = {width}"] = reference(width, alone=False)
        ways: dict[str, Way] = {name: Native(cached(name, EDGE)) for name in supported()}
        ways["NumPy"] = Plain(folder)
        if asked.no_browser:
            print_table(models, ways, asked.repeats)
            return
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            print_table(models, ways | {"Chromium": Browser(playwright, folder)}, asked.repeats)


def print_table(models: dict[str, bytes], ways: dict[str, Way], repeats: int) -> None:
    """Tokens per second, each way in turn; and how long the model in the box takes to open."""
    print("| tokens/s | " + " | ".join(ways) + " |\n|---|" + "---|" * len(ways))
    for name, content in models.items():
        opened = {way: statistics.median(each.open(content) for _ in range(3)) for way, each in ways.items()}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, each in ways.items():
                rates[way].append(each.rate())
        print(f"| {name} | " + " | ".join(f"{statistics.median(rates[way]):,.0f}" for way in ways) + " |", flush=True)
        if name == "the model in the box":
            said = "; ".join(f"{way} {ms:.0f} ms" for way, ms in opened.items() if ms)
            print(f"| opened in | {said} |", flush=True)


if __name__ == "__main__":
    main()
