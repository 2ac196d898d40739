"""A server with a small model in a thread, for tests that talk to it."""

import asyncio
import contextlib
import math
import socket
import threading
import time

import torch
import uvicorn

from meristem.data.tokenizer import byte_tokenizer
from meristem.memory.state import map_tensors, put_rows
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.generate import Sampling
from meristem.nn.config import MemoryConfig
from meristem.serve.access import Access
from meristem.serve.batch import NativeBatch
from meristem.serve.connection import WatchedProtocol
from meristem.serve.engine import Engine
from meristem.serve.http import Served, make_app
from meristem.serve.sessions import Sessions

TOKENIZER = byte_tokenizer()
MOST_BYTES = 1 << 20


def model_of(random_seed: int):
    """Small, and quick to be found exact."""
    settings = ModelConfig(dim=32, n_layers=1, n_heads=2, sliding_window=5, mlp_dim=32)
    return build(settings, MemoryConfig(rule="gated_delta", head_dim=16, chunk=16), 256, random_seed)


@contextlib.contextmanager
def serving(directory, *, most_rows=8, most_waiting=16, model=None, access=None, access_log=None, tokenizer=TOKENIZER):
    """A server in a thread; gives its address and what it serves."""
    access = access or Access(max_bytes=MOST_BYTES)
    model = model or model_of(1)
    engine = Engine(tokenizer.vocab_size, most_rows=most_rows, most_waiting=most_waiting)
    sampling = Sampling(temperature=1.0)
    served = Served("small", engine, Sessions(directory, model, tokenizer), sampling, 60, access, access_log)
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        make_app(served), http=WatchedProtocol, log_level="critical", access_log=False, timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        wait_for(lambda: served.is_ready)
        yield url, served
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def wait_for(is_so, seconds=60.0):
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.005)


def new_session(web, **settings) -> str:
    made = web.post("/v1/sessions", json=settings)
    assert made.status_code == 201, made.text
    return made.json()["id"]


def error_of(answer, status) -> dict:
    """The error of an answer, which has the shape of the API."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return error


@torch.no_grad()
def poison(engine: Engine) -> None:
    """NaN in every row that nobody owns."""
    for batch in [batch for batch in engine._batches if any(batch.taken())]:
        for at, owner in enumerate(batch.owners):
            if owner is None and isinstance(batch, NativeBatch):
                batch._rows._rows.readers.blocks[at].fill_(math.nan)
            elif owner is None:
                poisoned = map_tensors(
                    lambda leaf: leaf.fill_(math.nan) if leaf.is_floating_point() else leaf, batch.row(at)
                )
                batch.state = put_rows(batch.state, at, poisoned)
