"""`meristem serve`: a model over HTTP, with sessions that last."""

import asyncio
import contextlib
import functools
import gc
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from meristem.cli.answer import Json, json_line, report_error, tell
from meristem.cli.policy import BypassPolicy, PolicyFile, policy_of
from meristem.cli.sample import AnyCheckpoint, DeviceName, Temperature, TopK, TopP, device_called
from meristem.errors import MeristemError, RunError, WorkerDied, WrongValue
from meristem.extras import needed

if TYPE_CHECKING:
    from meristem.safety.policy import Policy
    from meristem.serve.access_log import AccessLog
    from meristem.serve.http import Served

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Directory of the sessions and keys. By default $XDG_DATA_HOME/meristem or ~/.local/share/meristem.",
        show_default=False,
    ),
]
Host = Annotated[
    str, typer.Option("--host", help="Address to listen at; without a key (see `keys add`), of this machine alone.")
]
ModelName = Annotated[
    str | None,
    typer.Option("--name", help="What clients call the model. By default after the run.", show_default=False),
]
MaxWaiting = Annotated[
    int, typer.Option("--max-waiting", min=1, help="Requests that wait for a place; more are refused (429).")
]
Rate = Annotated[
    float | None,
    typer.Option(
        "--rate", min=1.0, help="Requests a minute for each key, or address without keys.", show_default="no limit"
    ),
]
MaxSessions = Annotated[int, typer.Option("--max-sessions", min=1, help="Sessions for each key, or without keys.")]
AllowedHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        help="Name by which clients call this server; may be repeated. With a key, any by default.",
        show_default=False,
    ),
]
AccessLogPlace = Annotated[
    str | None,
    typer.Option(
        "--access-log",
        metavar="FILE",
        help="Where a JSON line for each request goes, without texts and keys; - is stderr.",
        show_default="none",
    ),
]
Grace = Annotated[
    float, typer.Option("--grace", min=0.0, help="Seconds that replies have to end after SIGTERM or Ctrl-C.")
]

Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Threads of the processor for each batch. By default one for products of torch, and all processors for "
        "the sessions that the native core reads.",
        show_default=False,
    ),
]
Workers = Annotated[
    int, typer.Option("--workers", min=1, help="Processes that serve; each session belongs to one of them.")
]


@dataclass(frozen=True)
class Options:
    """What a process that serves has to know, whether alone or one of ``n_workers``.

    hosts: as ``Access`` has them. access_log: a file, - for stderr, or None.
    """

    checkpoint: Path | None
    directory: Path
    name: str
    temperature: float
    top_k: int
    top_p: float
    max_rows: int
    max_waiting: int
    deadline_s: float
    rate: float | None
    hosts: frozenset[str] | None
    max_bytes: int
    max_sessions: int
    access_log: str | None
    grace_s: float
    threads: int | None
    device: str
    n_workers: int
    policy: "Policy"


def serve(
    checkpoint: AnyCheckpoint = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    data: Data = None,
    name: ModelName = None,
    temperature: Temperature = 0.2,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Requests that are worked on at once.")] = 64,
    max_waiting: MaxWaiting = 256,
    deadline: Annotated[float, typer.Option("--deadline", min=0.0, help="Seconds that a reply may take.")] = 600.0,
    rate: Rate = None,
    max_bytes: Annotated[int, typer.Option("--max-bytes", min=1, help="Bytes that a request may send.")] = 64 << 20,
    max_sessions: MaxSessions = 100_000,
    allowed_host: AllowedHost = None,
    access_log: AccessLogPlace = None,
    grace: Grace = 20.0,
    threads: Threads = None,
    device: DeviceName = "cpu",
    workers: Workers = 1,
    policy: PolicyFile = None,
    bypass_policy: BypassPolicy = None,
    as_json: Json = False,
) -> None:
    """Serve a model to OpenAI clients, each session with a memory of its own.

    \b
    Examples:
      meristem serve
      meristem serve runs/latest --port 8080 --data sessions
      meristem serve runs/latest --workers 4
      meristem serve --policy default
    """
    _require_extra()
    directory = data_directory(data)
    options = Options(
        checkpoint=checkpoint,
        directory=directory,
        name=name or _name_of(checkpoint),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_rows=max_rows,
        max_waiting=max_waiting,
        deadline_s=deadline,
        rate=rate,
        hosts=hosts_of(host, allowed_host, _has_key(directory, host)),
        max_bytes=max_bytes,
        max_sessions=max_sessions,
        access_log=access_log,
        grace_s=grace,
        threads=threads,
        device=device,
        n_workers=workers,
        policy=policy_of(policy, bypass_policy),
    )
    listening, url = listen_at(host, port)

    def started() -> None:
        if as_json:
            json_line({"url": url, "model": options.name, "data": str(directory)})
        else:
            typer.echo(f"{options.name} at {url}/v1, sessions in {directory}. Ctrl-C stops it.")

    with listening:
        (run_server if workers == 1 else run_workers)(options, listening, started)


def _require_extra() -> None:
    """MissingExtra where a package is not installed that serving needs."""
    with needed("serving"):
        import uvicorn  # noqa: F401

        import meristem.serve.http  # noqa: F401


def _has_key(directory: Path, host: str) -> bool:
    """Whether there is a key in force. WrongValue where there is none and others could reach this server."""
    from meristem.serve.access import LOOPBACK
    from meristem.serve.keys import Keys

    with contextlib.closing(Keys(directory)) as keys:
        has_key = any(each.revoked is None for each in keys.records())
    if host not in LOOPBACK and not has_key:
        raise WrongValue(
            f"--host is {host}, and there is no key in {keys.path}; without one a server listens at {LOOPBACK[0]} "
            f"alone. Make one with `meristem keys add NAME`, or leave --host out.",
            key="host",
            value=host,
        )
    return has_key


def run_server(options: Options, listening: socket.socket, started: Callable[[], None], worker: int = 0) -> None:
    """Load the model and serve it, until a signal comes. started: called when the model is loaded.

    worker: the number of this process of ``options.n_workers``.
    """
    import torch

    from meristem.device.limits import n_cpus
    from meristem.models.generate import Sampling
    from meristem.native.decoding import share_readers
    from meristem.runs.open import load
    from meristem.serve.access import Access, Rates
    from meristem.serve.engine import Engine
    from meristem.serve.http import Served
    from meristem.serve.keys import Keys
    from meristem.serve.sessions import Sessions
    from meristem.serve.sharing import Share

    # More threads for a product of torch give rows of some models other bits in a batch than alone; the core's never.
    torch.set_num_threads(options.threads or 1)
    share_readers(options.threads or max(1, n_cpus() // options.n_workers))
    place = device_called(options.device).device
    loaded = load(options.checkpoint, tell)
    n_ids = loaded.tokenizer.vocab_size
    share = Share(worker, options.n_workers)
    rates = Rates(options.rate) if options.rate else None
    served = Served(
        name=options.name,
        engine=Engine(
            n_ids, most_rows=options.max_rows, most_waiting=options.max_waiting, device=str(place), emit=tell
        ),
        sessions=Sessions(
            options.directory, loaded.model.to(place), loaded.tokenizer, share, most_sessions=options.max_sessions
        ),
        sampling=Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p),
        deadline_s=options.deadline_s,
        access=Access(Keys(options.directory), rates, options.hosts, options.max_bytes),
        access_log=_access_log(options, worker),
        policy=options.policy,
        created=int(time.time()),
    )
    # A full collection walks through every object of Python, a fifth of a second, and all replies would wait for it.
    gc.collect()
    gc.freeze()
    started()
    _run(served, listening, options.grace_s)


def _access_log(options: Options, worker: int) -> "AccessLog | None":
    """The log of one process: of several each has a file of its own, since each sets its file aside when it is full."""
    from meristem.serve.access_log import AccessLog

    if options.access_log is None:
        return None
    place = options.access_log
    if place != "-" and options.n_workers > 1:
        place = str(Path(place).with_name(f"{Path(place).stem}-{worker}{Path(place).suffix}"))
    return AccessLog(place, tell)


def _run(served: "Served", listening: socket.socket, grace_s: float) -> None:
    """Serve until a signal comes, and then until replies have ended: after SIGTERM that is the end of this verb."""
    with needed("serving"):
        import uvicorn

        from meristem.serve.connection import WatchedProtocol
        from meristem.serve.http import make_app

    # Replies that do not end in time are given up; their clients read so before uvicorn closes the connections.
    config = uvicorn.Config(
        make_app(served),
        http=WatchedProtocol,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(grace_s) + 5,
        # At a socket of this machine is only what stands before the workers; it says where a request is from.
        forwarded_allow_ips="*" if listening.family == socket.AF_UNIX else None,
    )
    server = uvicorn.Server(config)
    giving_up = threading.Timer(grace_s, served.engine.stop)
    giving_up.daemon = True
    signals: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        # uvicorn's own would end this process by the signal, whatever went well.
        signals.append(number)
        if server.should_exit:
            served.engine.stop()
            return
        server.should_exit = True
        giving_up.start()

    server.handle_exit = stop  # type: ignore[method-assign, assignment]
    server.run(sockets=[listening])
    giving_up.cancel()
    if signal.SIGINT in signals:
        raise KeyboardInterrupt


def run_workers(options: Options, listening: socket.socket, started: Callable[[], None]) -> None:
    """Serve in ``options.n_workers`` processes until a signal comes. started: called when requests are taken."""
    from meristem.serve.front import Front
    from meristem.serve.sharing import hold_for_workers
    from meristem.serve.workers import Workers, serve_together

    with (
        contextlib.closing(hold_for_workers(options.directory)),
        tempfile.TemporaryDirectory(prefix="meristem-") as place,
    ):
        sockets = [Path(place) / str(index) for index in range(options.n_workers)]
        workers = Workers(functools.partial(work, options), sockets, grace_s=options.grace_s + 10, emit=tell)
        front = Front(sockets, most_bytes=options.max_bytes)
        try:
            caught = asyncio.run(serve_together(listening, front, workers, started))
        except WorkerDied as died:
            exit_code = died.fields.get("exit_code")
            if isinstance(exit_code, int) and exit_code > 0:  # it has said what is wrong
                raise typer.Exit(exit_code) from died
            raise
    if caught == signal.SIGINT:
        raise KeyboardInterrupt


def work(options: Options, worker: int, place: Path) -> None:
    """Be one of the workers, which listens at the socket ``place``."""
    place.unlink(missing_ok=True)  # of the worker that was there before
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(place))
        try:
            run_server(options, listening, lambda: None, worker)
        except MeristemError as error:
            sys.exit(report_error(error, as_json=False, debug=False))


def _name_of(checkpoint: Path | None) -> str:
    # Of what a link such as runs/latest leads to; one that leads to itself is refused when it is opened.
    return "meristem" if checkpoint is None else os.path.basename(os.path.realpath(checkpoint))


def hosts_of(host: str, allowed: list[str] | None, has_key: bool) -> frozenset[str] | None:
    """The names by which this server may be called; None for any."""
    from meristem.serve.access import LOOPBACK

    if has_key and not allowed:
        return None
    return frozenset(each.lower().rstrip(".") for each in (*LOOPBACK, host, *(allowed or ())))


def data_directory(data: Path | None) -> Path:
    """Where sessions and keys are, as given or by default."""
    return data or Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "meristem"


def listen_at(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that listens there, and its address for clients."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Asyncio looks whether the protocol is named before it turns off that small pieces wait for the answer to the last
    # one (TCP_NODELAY): an answer in two pieces, as from a second request on, would wait 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as cause:
        listening.close()
        raise RunError(f"{host}:{port} cannot be listened at: {cause.strerror}. Choose another --port.") from cause
    listening.listen(2048)
    return listening, f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
