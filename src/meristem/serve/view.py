"""The page at ``/``, and what it asks of a session beside what every client may."""

import asyncio
from typing import Annotated

from fastapi import FastAPI, Path, Response
from fastapi.responses import JSONResponse

from meristem.serve.access import Asking
from meristem.serve.page import add_page
from meristem.serve.reading import TurnViews
from meristem.serve.sessions import Sessions

TurnNumber = Annotated[int, Path(ge=1, lt=1 << 53)]


def add_view(app: FastAPI, sessions: Sessions) -> None:
    """Add the page and its routes to an application."""
    views = TurnViews(sessions)
    # Each may take a second of the processor: they come one by one, and those that wait take no thread.
    one_by_one = asyncio.Lock()
    add_page(app, "index.html", ["chat.js", "memory.js", "api.js"])

    @app.get("/v1/sessions/{session_id}/turns/{turn}/reading")
    async def reading(session_id: str, turn: TurnNumber, caller: Asking) -> Response:
        """Each token of a turn with its surprise, and each memory before and after."""
        async with one_by_one:
            return JSONResponse(await asyncio.to_thread(views.reading, session_id, turn, caller.owner))

    @app.get("/v1/sessions/{session_id}/turns/{turn}/sources")
    async def sources(session_id: str, turn: TurnNumber, caller: Asking) -> Response:
        """What earlier turns gave to the reply of a turn."""
        async with one_by_one:
            return JSONResponse(await asyncio.to_thread(views.sources, session_id, turn, caller.owner))
