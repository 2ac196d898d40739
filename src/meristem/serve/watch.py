"""The page of runs: what their files say, while they train and afterwards. It only reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Response

from meristem import __version__
from meristem.serve.access import Access, Guard
from meristem.serve.failures import answer_failures, failure
from meristem.serve.page import HEADERS, add_page
from meristem.serve.watched import Place, WatchedRun


def make_watch(watched: Sequence[WatchedRun], access: Access) -> FastAPI:
    """The application: the page at ``/``, the runs at ``/runs``, and what is new of each at ``/runs/NUMBER``.

    access: the names under which it may be opened.
    """
    app = FastAPI(title="meristem watch", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, access=access)
    answer_failures(app)
    add_page(app, "watch.html", ["watch.css", "watch.js", "runs.js", "plots.js", "timeline.js"])

    @app.get("/runs")
    def runs() -> Response:
        """Number, name and directory of each."""
        return _json(
            {
                "runs": [
                    {"number": number, "name": each.name, "path": str(each.directory)}
                    for number, each in enumerate(watched)
                ]
            }
        )

    @app.get("/runs/{number}")
    def news(number: int, after: str = "") -> Response:
        """What is new behind the place ``after``; without one, from the beginning."""
        if not 0 <= number < len(watched):
            text = f"there is no run {number}; there are {len(watched)}, from 0."
            return failure(404, text, "invalid_request_error", code="run_not_found")
        return _json(watched[number].news(Place.of(after)))

    return app


def _json(value: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(value), media_type="application/json", headers=dict(HEADERS))
