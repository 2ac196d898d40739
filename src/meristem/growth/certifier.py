"""Certificates beside a run: the very seed, in a copy of the very slot, probed in another process (growth.md 8, 23)."""

import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import torch
from safetensors import torch as safetensors
from torch import nn

from meristem.checkpoint.atomic import sha256, write_atomic
from meristem.device.resolve import DTYPES
from meristem.errors import WorkerError
from meristem.events import Emit, Event, silent
from meristem.growth.attach import find_slot
from meristem.growth.blend import Confidence
from meristem.growth.certify import Certificate, certify, certify_in
from meristem.growth.graft import find_seed
from meristem.growth.seed import Origin, Seed
from meristem.growth.weights import packed
from meristem.nn.slot import Slot
from meristem.worker.process import Worker

WITHIN_S: Final = 300.0
"""How long a certificate may take, the start of the process included."""
CERTIFY: Final = f"{__name__}:certify_in_child"


class Certifier:
    """Certifies seeds one after the other in a process of its own, while the run goes on.

    A certificate is that of the seed that is in the slot when ``result`` is called, so that it does not depend on when
    it is ready, nor on a run that was rolled back meanwhile. The process works on the CPU, with one thread.
    """

    def __init__(self, *, emit: Emit = silent) -> None:
        self._worker = Worker("certify", imports=[__name__], n_spare=0, emit=emit)
        self._threads = ThreadPoolExecutor(1, "certify")
        self._folder = tempfile.TemporaryDirectory(prefix="meristem-certify-")
        self._begun: dict[str, Future[Certificate]] = {}
        self._emit = emit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._worker.stop()
        self._threads.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def begin(self, model: nn.Module, slot: str) -> None:
        """Begin to certify the seed in a slot; it returns at once. One whose blend reads the model out is certified
        here and now, for the process has no model."""
        place, seed = find_slot(model, slot), find_seed(model, slot)
        if any(isinstance(cast(Seed, part).blend, Confidence) for _, part in place.parts):
            self._begun[slot] = Future()
            self._begun[slot].set_result(certify(model, slot))
            return
        path = Path(self._folder.name) / f"{len(list(Path(self._folder.name).iterdir()))}.safetensors"
        held = {name: each.detach().cpu().contiguous().clone() for name, each in place.state_dict().items()}
        write_atomic(path, safetensors.save(held))
        payload = {
            "slot": [slot, place.reads, [*place.widths], place.layout],
            "origins": [_origin(cast(Seed, part)) for _, part in place.parts],
            "dtype": str(next(seed.parameters()).dtype),
            "path": str(path),
        }
        self._begun[slot] = self._threads.submit(self._certified, payload)

    def _certified(self, payload: Mapping[str, Any]) -> Certificate:
        return Certificate.from_json(self._worker.call(CERTIFY, payload, WITHIN_S, expects=dict))

    def result(self, model: nn.Module, slot: str) -> Certificate | None:
        """The certificate that was begun, or is begun now, once it is there; None where it could not be had, which
        fails every gate that needs it. The events are ``certificate.issued`` and ``certificate.failed``."""
        seed = find_seed(model, slot)
        try:
            found = self._begun.pop(slot).result() if slot in self._begun else None
            if found is None or (found.origin, found.weights_sha256) != (seed.origin, sha256(packed(seed))):
                self.begin(model, slot)
                found = self._begun.pop(slot).result()
        except WorkerError as cause:
            self._emit(Event("certificate.failed", {"slot": slot, "why": str(cause)}, "error"))
            return None
        self._emit(Event("certificate.issued", found.to_json(), "info" if found.handling == "standard" else "warning"))
        return found


def _origin(seed: Seed) -> dict[str, Any]:
    return {**vars(seed.origin), "settings": dict(seed.origin.settings)}


def certify_in_child(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Build a copy of a slot with all that is in it, and certify its seed."""
    torch.set_num_threads(1)
    name, reads, widths, layout = payload["slot"]
    place = Slot(name, reads=reads, widths=(widths[0], widths[1]), layout=layout)
    *settled, seed = [Seed(Origin(**each), place.widths, name) for each in payload["origins"]]
    place.settled.extend(settled)
    place.seed = seed
    place.to(next(dtype for dtype in DTYPES.values() if str(dtype) == payload["dtype"]))
    place.load_state_dict(safetensors.load_file(payload["path"]))
    return certify_in(place, seed).to_json()
