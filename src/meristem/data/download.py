"""Registered texts: fetched only on request, and never used unless their hash is the registered one."""

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import BinaryIO, Final

from pydantic import Field

from meristem.checkpoint.atomic import replacing, sha256_file
from meristem.config import ConfigSection, read_yaml
from meristem.data.config import DataConfig
from meristem.data.files import opened, store
from meristem.errors import DataError, FileChanged
from meristem.events import Emit, Event, silent

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes there are."""

_PORTION: Final = 1 << 18
_TIMEOUT_S: Final = 30.0


class Registered(ConfigSection):
    """A text that can be fetched by name."""

    url: str = Field(pattern=r"^https?://", description="where it is served")
    file: str = Field(pattern=r"^[\w.-]+$", description="its name here and on a mirror")
    size_bytes: int = Field(gt=0, description="size of the file as served")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="hash of the file as served")
    licence: str = Field(description="under which the text may be used")
    members: tuple[str, ...] = Field(default=(), description="the files of a zip archive that hold the text")
    starts: str | None = Field(default=None, description="a line that matches begins a new document")


@cache
def registered() -> Mapping[str, Registered]:
    """Every text that can be fetched, by name."""
    text = resources.files("meristem.data").joinpath("registered.yaml").read_text("utf-8")
    return {name: Registered(**entry) for name, entry in read_yaml(text, "registered.yaml").items()}


def local(data: DataConfig, entry: Registered) -> Path:
    """Where the file of a registered text is, or would be."""
    return store(data, "downloads") / entry.file


def available(
    data: DataConfig, name: str, entry: Registered, emit: Emit = silent, progress: Progress | None = None
) -> Path:
    """The local file of a registered text, its hash checked; fetched first when it is missing and may be."""
    path = local(data, entry)
    if path.exists():
        with opened(path):
            found = sha256_file(path)
        if found != entry.sha256:
            raise FileChanged(
                f"{path} has SHA-256 {found}, the registered text '{name}' has {entry.sha256}. "
                f"Remove the file and fetch it again.",
                path=str(path),
                found=found,
                expected=entry.sha256,
            )
        return path
    if not data.download:
        raise DataError(
            f"the text '{name}' ({entry.size_bytes} bytes, {entry.licence}) is not at {path}. Put it there, or let it "
            f"be fetched: meristem data prepare data.source={name} data.download=true",
            path=str(path),
        )
    url = f"{data.mirror.rstrip('/')}/{entry.file}" if data.mirror else entry.url
    emit(Event("data.download", {"name": name, "url": url, "size_bytes": entry.size_bytes}))
    _fetch(url, path, entry, progress or (lambda done, total: None))
    return path


def _fetch(url: str, path: Path, entry: Registered, progress: Progress) -> None:
    """Bring ``url`` to ``path``: under another name until size and hash are right."""
    with replacing(path) as descriptor, open(descriptor, "wb", closefd=False) as file:
        _receive(url, file, entry, progress)


def _receive(url: str, file: BinaryIO, entry: Registered, progress: Progress) -> None:
    """Write what comes, and refuse it unless it is the registered text."""
    digest, n_received = hashlib.sha256(), 0
    for portion in _portions(url, entry):
        digest.update(portion)
        n_received += len(portion)
        file.write(portion)
        progress(n_received, entry.size_bytes)
        if n_received > entry.size_bytes:
            break
    if n_received != entry.size_bytes:
        raise _not_fetched(url, f"{n_received} bytes came, {entry.size_bytes} were expected", entry)
    if digest.hexdigest() != entry.sha256:
        raise _not_fetched(url, f"its SHA-256 is {digest.hexdigest()}, registered is {entry.sha256}", entry)


def _portions(url: str, entry: Registered) -> Iterator[bytes]:
    try:
        # Registered addresses and data.mirror are http or https.
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # nosec B310
            while portion := answer.read(_PORTION):
                yield portion
    except urllib.error.HTTPError as cause:
        raise _not_fetched(url, f"the server returned {cause.code} {cause.reason}", entry) from cause
    except (OSError, http.client.HTTPException) as cause:
        raise _not_fetched(url, f"{getattr(cause, 'reason', None) or cause}", entry) from cause


def _not_fetched(url: str, found: str, entry: Registered) -> DataError:
    return DataError(
        f"cannot fetch {url}: {found}. Nothing was saved. Retry, set data.mirror to a server that has {entry.file}, "
        f"or put the file in place yourself.",
        url=url,
        found=found,
    )
