"""The edge as a C program has it: its library by ctypes, and folders that were exported for it."""

import ctypes
from pathlib import Path

import torch

from meristem.export import edge
from meristem.models.packed import parts_of
from meristem.native import build
from meristem.serve.moment import identity

OK, NO_MEMORY, NO_FILE, DAMAGED, OTHER_VERSION, OTHER_MODEL, NOT_TAKEN, BAD_TOKEN = range(8)
NOT_FINITE, NO_VECTORS, MISUSED = 8, 9, 10


class Sampling(ctypes.Structure):
    _fields_ = (
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
    )


class Failed(Exception):
    """code, and the sentence as the message."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(said)
        self.code = code


def library(flags: tuple[str, ...] | None = None) -> ctypes.CDLL:
    """The library of this machine; flags: compiled with these instead."""
    if flags is None:
        return typed(build.cached(edge.supported()[-1], build.EDGE))
    target = build._place("edge-test.so", flags, build.source_folder(), build.compiler())
    if not target.is_file():
        build.compile_variant(flags, build.source_folder(), target, build.EDGE)
    return typed(target)


def typed(path: Path) -> ctypes.CDLL:
    core = ctypes.CDLL(str(path))
    core.meristem_error.restype = ctypes.c_char_p
    core.meristem_logits.restype = ctypes.POINTER(ctypes.c_float)
    core.meristem_piece.restype = core.meristem_noted.restype = ctypes.c_void_p
    core.meristem_n_tokens.restype = ctypes.c_int64
    return core


class Model:
    """One handle."""

    def __init__(self, core: ctypes.CDLL, content: bytes) -> None:
        self.core, self.at = core, ctypes.c_void_p()
        self._check(core.meristem_open_bytes(content, ctypes.c_size_t(len(content)), ctypes.byref(self.at)))
        self.n_ids = core.meristem_vocabulary(self.at)

    def __del__(self) -> None:
        self.core.meristem_close(self.at)

    def _check(self, code: int) -> None:
        if code:
            raise Failed(code, self.core.meristem_error().decode())

    def read(self, token_ids) -> torch.Tensor:
        """Read tokens; the last prediction."""
        ids = (ctypes.c_int32 * len(token_ids))(*token_ids)
        self._check(self.core.meristem_read(self.at, ids, ctypes.c_size_t(len(token_ids))))
        return self.logits

    @property
    def logits(self) -> torch.Tensor:
        return torch.tensor(self.core.meristem_logits(self.at)[: self.n_ids])

    @property
    def n_tokens(self) -> int:
        return self.core.meristem_n_tokens(self.at)

    def step(self, how: Sampling | None = None) -> int:
        token = ctypes.c_int32(-1)
        self._check(self.core.meristem_step(self.at, None if how is None else ctypes.byref(how), ctypes.byref(token)))
        return token.value

    def piece(self, token_id: int) -> bytes | None:
        size = ctypes.c_size_t(7)
        at = self.core.meristem_piece(self.at, token_id, ctypes.byref(size))
        return ctypes.string_at(at, size.value) if at else None

    def note(self, name: str, content: bytes) -> None:
        self._check(self.core.meristem_note(self.at, name.encode(), content, ctypes.c_size_t(len(content))))

    def noted(self, name: str) -> bytes | None:
        size = ctypes.c_size_t(7)
        at = self.core.meristem_noted(self.at, name.encode(), ctypes.byref(size))
        return ctypes.string_at(at, size.value) if at else None

    def forget(self) -> None:
        self.core.meristem_forget(self.at)

    def save(self) -> bytes:
        at, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._check(self.core.meristem_save_bytes(self.at, ctypes.byref(at), ctypes.byref(size)))
        return ctypes.string_at(at, size.value)

    def load(self, content: bytes) -> None:
        self._check(self.core.meristem_load_bytes(self.at, content, ctypes.c_size_t(len(content))))


def content_of(model, tokenizer) -> bytes:
    """The weight file of a model."""
    return edge.weights_file(parts_of(model), tokenizer, identity(model, tokenizer))
