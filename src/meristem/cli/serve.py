"""`meristem serve`: a model over HTTP, with sessions that last."""

import os
import socket
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from meristem.cli.answer import Json, json_line, tell
from meristem.cli.sample import AnyCheckpoint, DeviceName, Temperature, TopK, TopP, device_called
from meristem.errors import MissingExtra, RunError, WrongValue

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


def serve(
    checkpoint: AnyCheckpoint = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at, of this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Directory of the sessions. By default $XDG_DATA_HOME/meristem or ~/.local/share/meristem.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What clients call the model. By default after the run.", show_default=False),
    ] = None,
    temperature: Temperature = 0.2,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Requests that are worked on at once.")] = 64,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Requests that wait for a place; more are refused (429).")
    ] = 256,
    deadline: Annotated[float, typer.Option("--deadline", min=0.0, help="Seconds that a reply may take.")] = 600.0,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the processor for each product.")] = 1,
    device: DeviceName = "cpu",
    as_json: Json = False,
) -> None:
    """Serve a model to OpenAI clients, each session with a memory of its own.

    \b
    Examples:
      meristem serve
      meristem serve runs/latest --port 8080 --data sessions
    """
    if host not in LOOPBACK:
        raise WrongValue(
            f"--host is {host}; without keys, which this version does not have, a server listens at {LOOPBACK[0]} "
            f"alone. Leave it out, and put a proxy with a password before it.",
            key="host",
            value=host,
        )
    try:
        import uvicorn

        from meristem.serve.http import Served, make_app
    except ModuleNotFoundError as cause:
        raise MissingExtra(
            f"serving needs the package {cause.name}, which is not installed. Run: pip install 'meristem[serve]'",
            extra="serve",
        ) from cause
    import torch

    from meristem.models.generate import Sampling
    from meristem.runs.open import load
    from meristem.serve.engine import Engine
    from meristem.serve.sessions import Sessions

    torch.set_num_threads(threads)
    place = device_called(device).device
    loaded = load(checkpoint, tell)
    directory = data or _data_home() / "meristem"
    engine = Engine(
        loaded.tokenizer.vocab_size, most_rows=max_rows, most_waiting=max_waiting, device=str(place), emit=tell
    )
    served = Served(
        name=name or _name_of(checkpoint),
        engine=engine,
        sessions=Sessions(directory, loaded.model.to(place), loaded.tokenizer),
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
        deadline_s=deadline,
        created=int(time.time()),
    )
    listening, url = _listening(host, port)
    if as_json:
        json_line({"url": url, "model": served.name, "data": str(directory)})
    else:
        typer.echo(f"{served.name} at {url}/v1, sessions in {directory}. Ctrl-C stops it.")
    config = uvicorn.Config(make_app(served), log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listening])


def _name_of(checkpoint: Path | None) -> str:
    return "meristem" if checkpoint is None else checkpoint.resolve().name


def _data_home() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()


def _listening(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that listens there, and its address for clients."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as cause:
        listening.close()
        raise RunError(f"{host}:{port} cannot be listened at: {cause.strerror}. Choose another --port.") from cause
    listening.listen(2048)
    return listening, f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
