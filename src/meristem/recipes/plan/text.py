"""What is known about the text without reading it: the figures of a corpus that was prepared before."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from meristem.data import hub, sources
from meristem.data import manifest as manifests
from meristem.data.config import DataConfig, TokenizerConfig
from meristem.data.corpus import open_corpus
from meristem.data.download import available, registered
from meristem.data.files import opened, store
from meristem.data.given import given
from meristem.data.split import ratios_for
from meristem.data.stream import Stream
from meristem.data.tokenizer import Tokenizer, load_tokenizer
from meristem.errors import DataError, TokenizerMismatch
from meristem.recipes.plan.report import DataFigures
from meristem.runs.config import Config


def look(config: Config) -> DataFigures | None:
    """The text in units of training; None when it was not prepared yet. A text that is not there is refused.

    Sizes are compared with the manifest, bytes are not read: that is what preparing and training do.
    """
    place = prepared(config.data, config.tokenizer)
    if place is None:
        return None
    corpus = open_corpus(place, verify=False).for_training(config.data)
    vocabulary = corpus.tokenizer.vocab_size
    max_token_id = int(corpus.manifest["max_token_id"])
    if max_token_id >= vocabulary:
        raise TokenizerMismatch(
            f"corpus '{corpus.name}' holds the id {max_token_id}; the model has {vocabulary} entries, so ids up to "
            f"{vocabulary - 1}. Remove {place} and prepare the text again.",
            found=max_token_id,
            expected=vocabulary,
        )
    data, train = config.data, config.train
    stream = Stream(
        corpus,
        "train",
        window=data.seq_len,
        stride=data.stride,
        batch=data.batch_size,
        order=data.order,
        documents=data.documents,
        random_seed=config.run.seed,
    )
    stride = data.stride or (1 if data.order == "random" else data.seq_len)
    n_covered = stream.n_windows * min(stride, data.seq_len) + max(0, data.seq_len - stride) + 1
    n_tokens = len(corpus.tokens("train"))
    reads_all = data.order == "documents" and data.difficulty.cap == 1
    n_covered = n_tokens if reads_all else n_covered
    per_step = data.seq_len * data.batch_size * train.grad_accum_steps
    steps = train.steps if train.steps is not None else (train.tokens or 0) / per_step
    return DataFigures(
        vocabulary=vocabulary,
        n_tokens=n_tokens,
        n_windows=stream.n_windows,
        n_batches=stream.batches_per_epoch,
        unused_tokens=max(0, n_tokens - n_covered),
        epochs=steps * train.grad_accum_steps / stream.batches_per_epoch if steps else None,
        max_token_id=max_token_id,
    )


def prepared(data: DataConfig, tokenizer: TokenizerConfig) -> Path | None:
    """The newest prepared corpus of this source with this tokenizer and split, by its manifest; None if there is none.

    The text itself is not read, only its file sizes are compared: whether it changed is found when training starts.
    """
    source = sources.resolve(data)
    sizes = _sizes(data, source)
    read = given(tokenizer, download=data.download)
    wanted = (source.name, source.loader, dict(source.args), list(ratios_for(data.validation)))
    fitting = [
        (manifest["created"], place)
        for place, manifest in _manifests(store(data, "corpora"))
        if _described(manifest) == wanted
        and (_is_made_so(place, manifest, tokenizer) if read is None else _is_of(manifest, read))
        and sizes in (None, {entry["uri"]: entry["size_bytes"] for entry in manifest["sources"]})
    ]
    return max(fitting)[-1] if fitting else None


def _is_of(manifest: Mapping[str, Any], tokenizer: Tokenizer) -> bool:
    return bool(manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint)


def _is_made_so(place: Path, manifest: Mapping[str, Any], tokenizer: TokenizerConfig) -> bool:
    """Whether a corpus has a tokenizer that was made from these settings."""
    if manifest["tokenizer"]["name"] != tokenizer.kind:
        return False
    if tokenizer.kind != "byte" and _asked(manifest) != tokenizer.vocab_size:
        return False
    found = load_tokenizer(place)
    marks = [found.special.get(name) if name else None for name in (tokenizer.bos_token, tokenizer.eos_token)]
    return set(found.special) == set(tokenizer.special_tokens) and marks == [found.bos_id, found.eos_id]


def _asked(manifest: Mapping[str, Any]) -> int:
    """The vocabulary in the settings; manifests from before it was written down say what was learned."""
    described = manifest["tokenizer"]
    return int(described.get("asked_vocab_size", described["vocab_size"]))


def _sizes(data: DataConfig, source: sources.Source) -> dict[str, int] | None:
    """The files of a text that the user named, with their sizes; None for texts that are known by their name alone.

    What is missing is refused here, as preparing would refuse it.
    """
    path = Path(data.source).expanduser()
    if source.loader == "hf":
        hub.require_permitted(data)
    if source.loader == "registered":
        if not data.download:
            available(data, data.source, registered()[data.source])
        return None
    if source.loader == "records":  # the manifest says how much text each file holds, not how long it is
        for file in source.paths():
            with opened(file):
                pass
        return None
    if source.loader == "directory":
        return {name: (path / name).stat().st_size for name in sources.find(path, data.include, data.exclude)}
    if source.loader == "file" and not data.source.startswith("installed:"):
        with opened(path) as (_, status):
            return {path.name: status.st_size}
    return None


def _manifests(corpora: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(corpora.glob(f"*/{manifests.FILE}")):
        # A broken corpus of another text must not stop this run; of this text, it is refused when training opens it.
        with suppress(DataError):
            yield path.parent, manifests.load(path.parent)


def _described(manifest: Mapping[str, Any]) -> tuple[object, ...]:
    loader = manifest["loader"]
    return manifest["name"], loader["name"], loader["args"], manifest["split"]["ratios"]
