"""`meristem watch`: a page that shows runs while they train."""

import os
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from meristem.cli import complete
from meristem.cli.answer import Json, json_line
from meristem.cli.serve import hosts_of, listen_at
from meristem.errors import WrongValue
from meristem.extras import needed


def watch(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR...", autocompletion=complete.run_directories, help="Run directories, of one run each."
        ),
    ],
    host: Annotated[str, typer.Option("--host", help="Address to listen at, of this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8001,
    is_to_open: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host", help="Name by which the page may be opened; may be repeated.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show runs on a page: losses, speed, memory, growth, events and samples, as they are written.

    \b
    Examples:
      meristem watch runs/latest
      meristem watch runs/a runs/b --port 0 --open
    """
    with needed("watching"):
        import uvicorn

        from meristem.serve.access import LOOPBACK, Access
        from meristem.serve.watch import make_watch
    if host not in LOOPBACK:
        raise WrongValue(
            f"--host is {host}; the page shows a run to whoever reaches it, so that it listens at {LOOPBACK[0]} alone. "
            f"Leave it out; from another machine, `ssh -L {port}:127.0.0.1:{port}` leads here.",
            key="host",
            value=host,
        )
    from meristem.serve.watched import WatchedRun

    found = {os.path.realpath(each.directory): each for each in map(WatchedRun, runs)}
    watched = list(found.values())
    socket, url = listen_at(host, port)
    if as_json:
        json_line({"url": url, "runs": [str(each.directory) for each in watched]})
    else:
        typer.echo(f"{', '.join(each.name for each in watched)} at {url}. Ctrl-C stops it.")
    if is_to_open:
        webbrowser.open(url)
    app = make_watch(watched, Access(hosts=hosts_of(host, allowed_host, has_key=False)))
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[socket])
