"""Tokenizers that others have made: a file, a folder of ``transformers``, a SentencePiece model, a model of the hub.

Of a folder its settings are read as well: which tokens begin and end a text, and how a chat is laid out. No code that
lies beside them is run.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from meristem.data.config import GIVEN, TokenizerConfig
from meristem.data.files import read
from meristem.data.tokenizer import (
    FILE,
    Tokenizer,
    from_library_file,
    sentencepiece_file,
    template_of,
    tokenizer_from_bytes,
    with_marks,
)
from meristem.errors import DataError, WrongValue
from meristem.extras import imported

_SETTINGS: Final = "tokenizer_config.json"
_TEMPLATE: Final = "chat_template.jinja"
_MODEL: Final = "tokenizer.model"
_FILES: Final = (FILE, _SETTINGS, _TEMPLATE, _MODEL)
PINNED: Final = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)@(?P<commit>[0-9a-f]{40})")
"""A model of the hub at one commit."""


def given(config: TokenizerConfig, *, download: bool = False) -> Tokenizer | None:
    """The tokenizer that ``config.path`` names; None where one is made here.

    download: whether a tokenizer of the hub that is not here may be fetched.
    """
    if config.kind not in GIVEN or config.path is None:
        return None
    if config.kind == "hf":
        found = of_folder(_fetched(config.path, download))
    elif config.kind == "sentencepiece":
        found = _of_model(Path(config.path).expanduser())
    else:
        path = Path(config.path).expanduser()
        found = of_folder(path) if path.is_dir() else from_library_file(read(path), str(path))
    return with_marks(found, bos=config.bos_token, eos=config.eos_token, chat_template=template_of(config))


def of_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a folder of ``transformers``, with what its settings say.

    The token that ends a text is the one that they name; the one that begins it is taken only where the tokenizer puts
    it there itself.
    """
    if (folder / FILE).is_file():
        found = from_library_file(read(folder / FILE), str(folder / FILE))
    elif (folder / _MODEL).is_file():
        found = _of_model(folder / _MODEL)
    else:
        raise DataError(
            f"{folder} holds no {FILE}, so its ids mean nothing. Save the tokenizer there with save_pretrained.",
            path=str(folder / FILE),
        )
    settings = _settings(folder / _SETTINGS)
    bos = _name(settings, "bos_token") if settings.get("add_bos_token") else None
    eos = _name(settings, "eos_token")
    return with_marks(
        found,
        bos=bos if bos in found.special else None,
        eos=eos if eos in found.special else None,
        chat_template=_template(folder, settings),
    )


def _settings(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = orjson.loads(read(path))
    except orjson.JSONDecodeError as cause:
        raise DataError(f"{path} is not JSON: {cause}. Save the tokenizer again.", path=str(path)) from cause
    if not isinstance(found, dict):
        raise DataError(f"{path} is a JSON {type(found).__name__}, expected an object.", path=str(path))
    return found


def _name(settings: Mapping[str, Any], key: str) -> str | None:
    """A token by its text, which may stand there with what else is known of it."""
    found = settings.get(key)
    name = found.get("content") if isinstance(found, dict) else found
    return name if isinstance(name, str) else None


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The layout of a chat; of several that have names, the one called default."""
    if (folder / _TEMPLATE).is_file():
        return read(folder / _TEMPLATE).decode("utf-8", "replace")
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {each["name"]: each["template"] for each in found}.get("default")
    return found if isinstance(found, str) else None


def _of_model(path: Path) -> Tokenizer:
    return tokenizer_from_bytes(sentencepiece_file(read(path)), str(path))


def _fetched(name: str, download: bool) -> Path:
    """The folder with the files of a tokenizer of the hub, from its cache, or fetched where that is allowed."""
    found = PINNED.fullmatch(name)
    if found is None:
        raise WrongValue(
            f"tokenizer.path is '{name}'; of kind=hf it is NAME@COMMIT, whose commit has 40 digits of 0-9 and a-f: a "
            f"branch or a tag may change.",
            path="tokenizer.path",
            value=name,
        )
    hub = imported("huggingface_hub", "tokenizer.kind=hf")
    try:
        folder = hub.snapshot_download(
            found["name"], revision=found["commit"], allow_patterns=list(_FILES), local_files_only=not download
        )
    except Exception as cause:
        advice = "Check the name and the network." if download else "Let it be fetched with data.download=true."
        first = str(cause).strip().partition("\n")[0]
        raise DataError(
            f"the tokenizer of {name} is not here and was not fetched: {first} {advice}", path=name
        ) from cause
    return Path(folder)
