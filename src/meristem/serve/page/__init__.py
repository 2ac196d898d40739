"""The pages: static files with the headers that keep them to themselves, and nothing to build.

``style.css``, ``icon.svg`` and ``chart.js`` belong to every page; each has an HTML file and scripts of its own beside
them. Nothing is loaded from another host, no script or style stands in the HTML, and text becomes text nodes, never
markup.
"""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Final

from fastapi import FastAPI, Response

HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A server that was updated is not answered from a store of the browser.
    "Cache-Control": "no-cache",
}

MEDIA: Final[Mapping[str, str]] = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


def add_page(app: FastAPI, html: str, scripts: Iterable[str]) -> None:
    """Serve a page at ``/``, and under ``/page/`` its scripts and what all pages share. Names are of files here."""
    _add(app, "/", html)
    for name in ("style.css", "icon.svg", "chart.js", *scripts):
        _add(app, f"/page/{name}", name)


def _add(app: FastAPI, path: str, name: str) -> None:
    content, media = (files(__name__) / name).read_bytes(), MEDIA[name.rpartition(".")[2]]

    @app.get(path, include_in_schema=False)
    async def static() -> Response:
        return Response(content, media_type=media, headers=dict(HEADERS))
