"""The edge as a C program has it: its library by ctypes, and folders that were exported for it."""

import ctypes
from dataclasses import replace
from pathlib import Path

import torch

import zoo
from meristem.checkpoint import store
from meristem.config import dump_yaml
from meristem.data.tokenizer import Tokenizer, byte_tokenizer
from meristem.export import edge
from meristem.models.build import build as build_model
from meristem.models.config import ModelConfig
from meristem.models.packed import parts_of
from meristem.native import build
from meristem.nn.config import MemoryConfig
from meristem.serve.moment import identity

OK, NO_MEMORY, NO_FILE, DAMAGED, OTHER_VERSION, OTHER_MODEL, NOT_TAKEN, BAD_TOKEN = range(8)
NOT_FINITE, NO_VECTORS, MISUSED = 8, 9, 10


SIZES = {"dim": 12, "n_layers": 2, "n_heads": 2, "mlp_dim": 17, "sliding_window": 5}
RULES = ("hebbian", "delta", "gated_delta", "implicit_delta", "delta_descent", "titans", "momentum_delta")
COMBINES = ("gated", "normalised", "projected", "sigmoid", "additive")
MODELS = {
    **{f"memory-{rule}": ({"mixer": "memory"}, {"rule": rule}) for rule in RULES},
    **{f"mag-{combine}": ({"combine": combine}, {}) for combine in COMBINES},
    "mag-gated_delta": ({"combine": "additive"}, {"rule": "gated_delta"}),
    "mal": ({"mixer": "mal", "is_residual": False}, {"rule": "delta"}),
    "mag-persistent": ({"n_persistent_tokens": 3, "combine": "additive"}, {}),
    "mal-persistent": ({"mixer": "mal", "n_persistent_tokens": 1, "rope": False}, {"rule": "titans"}),
    "attention": ({"mixer": "attention", "rope": False, "tied": True, "mlp": "gelu"}, {}),
    "one-key": ({"sliding_window": 1}, {"conv": 1}),
    "before": ({"mixer": "memory"}, {"rule": "gated_delta", "reads": "before", "write_limit": 0.7}),
    "two-kinds": ({"layers": [{"mixer": "memory", "rule": "delta"}, {"mixer": "attention"}]}, {}),
    "wide": ({"dim": 96, "n_heads": 2, "mlp_dim": 70, "sliding_window": 37}, {"head_dim": 48, "init": "induction"}),
}


class Sampling(ctypes.Structure):
    _fields_ = (
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
    )


class Learning(ctypes.Structure):
    """which: 0 for memory alone, 1 for the head, 2 for the last feed-forward layer; rate: below 0 for the model's."""

    _fields_ = (
        ("which", ctypes.c_int32),
        ("chunk", ctypes.c_int32),
        ("rate", ctypes.c_float),
        ("grad_clip", ctypes.c_float),
    )


KINDS = {"head": 1, "last_mlp": 2}


class Learned(ctypes.Structure):
    _fields_ = (
        ("which", ctypes.c_int32),
        ("n_steps", ctypes.c_int32),
        ("n_chunks", ctypes.c_int64),
        ("rate", ctypes.c_float),
        ("saved_nats", ctypes.c_float),
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

    def learn(self, which: int, chunk: int = 64, rate: float = -1.0, grad_clip: float = 1.0) -> None:
        self._check(self.core.meristem_learn(self.at, ctypes.byref(Learning(which, chunk, rate, grad_clip))))

    @property
    def learned(self) -> Learned:
        found = Learned()
        self._check(self.core.meristem_learning_now(self.at, ctypes.byref(found)))
        return found

    def forget(self) -> None:
        self.core.meristem_forget(self.at)

    def save(self) -> bytes:
        at, size = ctypes.c_void_p(), ctypes.c_size_t()
        self._check(self.core.meristem_save_bytes(self.at, ctypes.byref(at), ctypes.byref(size)))
        return ctypes.string_at(at, size.value)

    def load(self, content: bytes) -> None:
        self._check(self.core.meristem_load_bytes(self.at, content, ctypes.c_size_t(len(content))))


def content_of(model, own: Tokenizer) -> bytes:
    """The weight file of a model."""
    return edge.weights_file(parts_of(model), own, identity(model, own))


def made(name: str):
    """One of MODELS, in float32, its weights off their first values."""
    model, memory = MODELS[name]
    reads = ModelConfig.model_validate(model).reads
    config = ModelConfig.model_validate({key: size for key, size in SIZES.items() if key in reads} | model)
    memory_config = MemoryConfig.model_validate({"head_dim": 4, "chunk": 3} | memory)
    return zoo.moved(config, memory_config, torch.float32)


def tokenizer() -> Tokenizer:
    """One that has as many ids as the models of the zoo."""
    whole = byte_tokenizer()
    return replace(whole, tokens=whole.tokens[: zoo.VOCABULARY])


def save_checkpoint(place: Path, name: str) -> None:
    """A model of the zoo as the checkpoint of a run directory."""
    config, memory = zoo.ZOO[name]
    settings = {"model": config.model_dump(mode="json"), "memory": memory.model_dump(mode="json")}
    files = {"config.yaml": dump_yaml(settings).encode(), "tokenizer.json": byte_tokenizer().to_bytes()}
    trees = {"model": build_model(config, memory, 256, random_seed=3).state_dict()}
    store.save(place / "checkpoints", step=7, trees=trees, values={}, files=files, header={})
