"""A folder that reads on without Python: weights in one file, the core as a library with one header, and a page."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import orjson
import torch
from torch import Tensor

from meristem import __version__
from meristem.checkpoint import migrate
from meristem.checkpoint.atomic import PARTIAL, disk_full, sha256, write_synced
from meristem.checkpoint.store import find
from meristem.data.tokenizer import Tokenizer
from meristem.errors import WrongValue
from meristem.events import Emit
from meristem.export.hf import TOKENIZER, require_new
from meristem.models.packed import NotTaken, Parts, parts_of
from meristem.native import build
from meristem.native import decoding as native
from meristem.native.library import supported
from meristem.runs.open import load_opened
from meristem.serve.moment import Identity, identity
from meristem.serve.store import sealed

SCHEMA: Final = "meristem.edge/1"
WEIGHTS: Final = "model.safetensors"
MANIFEST: Final = "manifest.json"
LIBRARY: Final = "libmeristem.so"
EXAMPLES: Final = ("example.c", "runtime.py")
PAGE: Final = ("index.html", "page.css", "page.js")
CORE_OF_PAGE: Final = "edge.wasm"

COMPILED_BY: Final = (
    "c++ -std=c++20 -O3 -march=native -fPIC -shared -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "source/edge.cpp -o libmeristem.so"
)
"""How the library is made again, for a machine that is none of this kind."""


class Exported(NamedTuple):
    """What was written. variant: what the library was compiled for, or why there is none."""

    path: Path
    n_parameters: int
    size_bytes: int
    variant: str
    has_page: bool


def export(source: Path, to: Path, *, web: bool, emit: Emit) -> Exported:
    """Write the model of a checkpoint, or of the newest of a run, as a new folder.

    web: with a page, whose core is compiled for WebAssembly where the package does not bring it. Raises WrongValue, and
    leaves nothing behind, for a model that the core does not compute, and where the page cannot be compiled. Without a
    C++ compiler there is no library, and ``variant`` is the reason.
    """
    require_new(to)
    checkpoint = find(source, emit)
    model, tokenizer = load_opened(checkpoint)
    try:
        parts = parts_of(model.float())
    except NotTaken as reason:
        raise WrongValue(
            f"the model of {checkpoint.path} cannot be exported for the edge: {reason}. Use it with meristem, or write "
            f"it with `meristem export hf`.",
            value=str(checkpoint.path),
        ) from reason
    own = identity(model, tokenizer)
    partial = to.with_name(f".{to.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_full(partial):
            partial.mkdir(parents=True)
            write_synced(partial / WEIGHTS, weights_file(parts, tokenizer, own))
            write_synced(partial / TOKENIZER, tokenizer.to_bytes())
            variant = _put_core(partial)
            if web:
                _put_page(partial)
            manifest = _manifest(partial, parts, own, variant, checkpoint.manifest)
            write_synced(partial / MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size_bytes = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    return Exported(to, sum(each.numel() for each in model.parameters()), size_bytes, variant, web)


def weights_file(parts: Parts, tokenizer: Tokenizer, own: Identity) -> bytes:
    """One safetensors file with all that the core reads: weights in float32, the bytes of each token, and in its
    header what it is, whose model it is, and the SHA-256 of the file with those 64 digits as zeros."""
    tensors: dict[str, Tensor] = dict(parts.ends)
    if tensors["head"] is tensors["embedding"]:
        del tensors["head"]
    for index, (_, weights) in enumerate(parts.layers):
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in weights.items()}
        tensors |= {f"begin.{index}.{name}": tensor.flatten() for name, tensor in parts.begin[index].items()}
    pieces = np.frombuffer(b"".join(tokenizer.tokens), dtype=np.uint8).copy()
    ends = np.cumsum(tokenizer.byte_lengths, dtype=np.int64)
    tensors |= {"pieces": torch.from_numpy(pieces), "piece_ends": torch.from_numpy(ends)}
    return sealed(tensors, {"schema": SCHEMA, "model": orjson.dumps(described(parts, own)).decode()})


def described(parts: Parts, own: Identity) -> dict[str, Any]:
    """What a weight file says of its model, besides the tensors; ``native/edge.cpp`` reads all of it."""
    shape = parts.shape
    versions = {"session": migrate.version("session"), "state": migrate.version("memory.safetensors")}
    layers = [{name: getattr(layer, name) for name in native.PLAIN} for layer, _ in parts.layers]
    return {
        **{"width": shape.width, "vocabulary": shape.vocabulary, "eps": shape.eps, "layers": layers},
        **own._asdict(),
        **versions,
        "learn_rates": parts.learn_rates,
    }


def _put_core(place: Path) -> str:
    """The sources, and the library for this machine; which it is, or why there is none."""
    sources = build.source_folder()
    (place / "source").mkdir()
    for name in ("edge.cpp", "meristem.h", "container.hpp", "elementary.hpp", "decode.hpp", "learn.hpp", "tile.hpp"):
        shutil.copy(sources / name, place / "source" / name)
    shutil.copy(sources / "meristem.h", place / "meristem.h")
    for name in EXAMPLES:
        shutil.copy(sources / "edge" / name, place / name)
    # The folder goes to other machines: what most of them run.
    if not (here := supported()[-1:]):
        return f"none: this processor is none that it is compiled for here; {COMPILED_BY}"
    packaged = build.PACKAGED / f"edge-{here[0]}.so"
    try:
        shutil.copy(packaged if packaged.is_file() else build.cached(here[0], build.EDGE), place / LIBRARY)
    except build.BuildFailed as cause:
        return f"none: {cause}; {COMPILED_BY}"
    return here[0]


def _put_page(place: Path) -> None:
    try:
        core = build.cached_wasm()
    except build.BuildFailed as cause:
        raise WrongValue(
            f"the page cannot be made: {cause}. Leave out --web for the library alone.", key="web", value=True
        ) from cause
    shutil.copy(core, place / CORE_OF_PAGE)
    for name in PAGE:
        shutil.copy(build.source_folder() / "edge" / name, place / name)


def _manifest(place: Path, parts: Parts, own: Identity, variant: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """``manifest.json``: for people and programs; the core reads the header of the weights alone."""
    files = {
        str(path.relative_to(place)): {"size_bytes": path.stat().st_size, "sha256": sha256(path.read_bytes())}
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }
    return {
        "schema": SCHEMA,
        "meristem": __version__,
        "licence": {"code": "Apache-2.0", "model": "that of its training text; see the card of the checkpoint"},
        "library": {"file": LIBRARY, "compiled_for": variant, "compiled_by": COMPILED_BY},
        "model": described(parts, own),
        "checkpoint": {key: checkpoint.get(key) for key in ("step", "tokens", "created", "metrics")},
        "files": files,
    }
