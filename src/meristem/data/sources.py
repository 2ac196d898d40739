"""Where text comes from: a file, a directory, what Python brings along, a registered download, or a set of the hub."""

import difflib
import fnmatch
import importlib.util
import inspect
import io
import itertools
import os
import re
import stat
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Final

from meristem.data import files, hub, notebook, notebook_names, notebook_phrases, notebook_words, records
from meristem.data.config import DataConfig
from meristem.data.download import Progress, Registered, available, local, registered
from meristem.errors import DataError
from meristem.events import Emit, silent
from meristem.plugins import Registry

sources: "Final[Registry[Callable[[DataConfig], Source]]]" = Registry("source", {})
"""Texts by name that plug-ins bring: what the name gives is called with the settings of the data."""

_PYTHON: Final = ("*.py",)
_TESTS: Final = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_sysconfigdata*")


@dataclass(frozen=True)
class Document:
    """One text. ``id`` stays the same when other documents come or go; ``file`` is the file that it is a part of.

    bad: of a record that holds no text, why.
    source: which source of a mixture it is of, counted from 0.
    goes_on: whether the next document is the rest of this one, as with a file that is too long for the memory.
    """

    id: str
    text: bytes
    file: str
    bad: str | None = None
    source: int = 0
    goes_on: bool = False


@dataclass(frozen=True)
class Source:
    """A text by name: ``read`` gives its documents, in the same order every time.

    loader, args: what the manifest says about how it was read; ``args`` holds no path of this machine.
    paths: the files that hold it, which a reading opens.
    listed: where that is known without reading, the source, name and size in bytes of each document.
    """

    name: str
    loader: str
    read: Callable[[], Iterator[Document]]
    paths: Callable[[], Iterable[Path]]
    args: Mapping[str, object] = field(default_factory=dict)
    licence: str | None = None
    listed: Callable[[], Iterator[tuple[int, str, int]]] = lambda: iter(())


def documents(data: DataConfig) -> Iterator[Document]:
    """The documents of ``data.source``."""
    return resolve(data).read()


def named(data: DataConfig) -> list[DataConfig]:
    """The settings of each source that ``data.source`` joins by +, of the one where it names one.

    A file or a directory may have a + in its name; where weights are given, every + is between two sources.
    """
    name = data.source
    is_one = "+" not in name.strip("+") or os.path.lexists(os.path.expanduser(name))
    names = [name] if is_one and not data.weights else name.split("+")
    return [data.model_copy(update={"source": each, "weights": ()}) for each in names]


def fetch(data: DataConfig, emit: Emit = silent, progress: Progress | None = None) -> None:
    """Bring what ``data.source`` names and is not here, where that is permitted; DataError where it is not."""
    for part in named(data):
        if part.source in registered():
            available(part, part.source, registered()[part.source], emit, progress)
        elif part.source.startswith(hub.PREFIX):
            hub.available(part, emit, progress)


def resolve(data: DataConfig) -> Source:
    """The source that ``data.source`` names. Names come before paths: write ./stdlib for a file of that name.

    ``a+b`` is the text of a and of b, side by side (``_mixed``), or one after the other where ``data.weights`` says in
    which shares training takes them.
    """
    name = data.source
    parts = named(data)
    if len(parts) > 1:
        found = [resolve(part) for part in parts]
        return _weighted(found) if data.weights else _joined(name, found)
    if name == "stdlib":
        return _python(data, "stdlib", Path(sysconfig.get_path("stdlib")), "PSF-2.0")
    if name == "stdlib-docs":
        return Source(name, "stdlib-docs", _topics, _topic_paths, licence="PSF-2.0")
    if name == "notebook":
        if data.validation > 0.5:
            raise DataError(
                f"data.validation is {data.validation:g}; data.source=notebook holds out at most half of its text. "
                f"Set data.validation to 0.5 or less.",
                found=data.validation,
            )
        args = {**data.notebook.model_dump(), "validation": data.validation}
        return Source(name, "notebook", lambda: _notebook(data), _notebook_paths, args, licence="PSF-2.0")
    if name.startswith("installed:"):
        return _installed(data, name.removeprefix("installed:"))
    if name.startswith(hub.PREFIX):
        return _of_hub(data)
    if name in registered():
        entry = registered()[name]
        return Source(
            name,
            "registered",
            lambda: _registered(data, entry),
            lambda: [local(data, entry)],
            {"sha256": entry.sha256},
            entry.licence,
        )
    if name.casefold() in sources.names():
        return sources.get(name)(data)
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return _directory(data, _name(path.resolve().name), path)
    if not os.path.lexists(path) and os.sep not in name:
        raise _unknown(name)
    format = _format(data, [path.name])
    return (
        _file(path.name, path)
        if format == "text"
        else _records(data, path.name, path.parent, format, lambda: [path.name])
    )


def _unknown(name: str) -> DataError:
    known = ["stdlib", "stdlib-docs", "notebook", "installed:NAME", "hf:NAME", *registered(), *sources.names()]
    here = [each for each in os.listdir() if not each.startswith(".")]
    near = difflib.get_close_matches(name, [*known, *here], n=3) or known
    return DataError(
        f"data.source '{name}' is neither a file, a directory nor a known text. Did you mean {', '.join(near)}?",
        found=name,
        accepted=known,
    )


def _joined(name: str, parts: Sequence[Source]) -> Source:
    """Several texts as one; a document keeps its name, and so its side of the split."""
    licences = {part.licence for part in parts}
    return Source(
        name,
        "joined",
        lambda: _mixed(parts),
        lambda: itertools.chain.from_iterable(part.paths() for part in parts),
        {"parts": [{"name": part.name, "loader": part.loader, **part.args} for part in parts]},
        " and ".join(sorted(filter(None, licences))) if all(licences) else None,
        _all_listed(parts, is_one=True),
    )


def _all_listed(parts: Sequence[Source], *, is_one: bool) -> Callable[[], Iterator[tuple[int, str, int]]]:
    """What is known of the documents of several sources; of none, where one is not listed and they are one text."""

    def listed() -> Iterator[tuple[int, str, int]]:
        found = [list(part.listed()) for part in parts]
        if is_one and not all(found):
            return
        for number, of_part in enumerate(found):
            yield from ((0 if is_one else number, name, size_bytes) for _, name, size_bytes in of_part)

    return listed


def _weighted(parts: Sequence[Source]) -> Source:
    """Several texts one after the other, each of whose documents knows which it is of."""
    names: list[str] = []
    for part in parts:
        n_alike = sum(other.name == part.name for other in parts[: len(names)])
        names.append(f"{part.name} ({n_alike + 1})" if n_alike else part.name)

    def read() -> Iterator[Document]:
        for number, part in enumerate(parts):
            for document in part.read():
                yield replace(document, source=number)

    described = [{"name": name, "loader": part.loader, **part.args} for name, part in zip(names, parts, strict=True)]
    listed = _all_listed(parts, is_one=False)
    joined = _joined("+".join(names), parts)
    return replace(joined, loader="mixture", read=read, args={"parts": described}, listed=listed)


def _mixed(parts: Sequence[Source]) -> Iterator[Document]:
    """The documents of several sources side by side: each stands where its source, in its own order, is as far on in
    bytes as the whole is. Sources that are not listed are read twice."""
    sizes = [
        sum(size_bytes for *_, size_bytes in part.listed()) or sum(len(document.text) for document in part.read())
        for part in parts
    ]
    readers, done = [part.read() for part in parts], [0] * len(parts)
    left = set(range(len(parts)))
    while left:
        least = min(left, key=lambda number: done[number] / max(1, sizes[number]))
        document = next(readers[least], None)
        if document is None:
            left.remove(least)
            continue
        done[least] += len(document.text)
        yield document
        while document.goes_on:
            document = next(readers[least])
            done[least] += len(document.text)
            yield document


def _directory(data: DataConfig, name: str, root: Path) -> Source:
    include, exclude = data.include, data.exclude
    args = {"include": list(include), "exclude": list(exclude)}

    def below() -> list[str]:
        return find(root, include, exclude)

    # Where the format is set, nothing has to be listed to know it.
    format = _format(data, below() if data.format == "auto" else [])
    if format != "text":
        return _records(data, name, root, format, below, args)
    return _tree(name, "directory", root, args, None)


def _format(data: DataConfig, names: Sequence[str]) -> str:
    """The format of files: the one that is set, or the one format of records that the names of all of them end in."""
    if data.format != "auto":
        return data.format
    formats = {records.SUFFIXES.get(os.path.splitext(name)[1].lower(), "text") for name in names}
    return formats.pop() if len(formats) == 1 else "text"


def _records(
    data: DataConfig,
    name: str,
    root: Path,
    format: str,
    below: Callable[[], Sequence[str]],
    args: Mapping[str, object] | None = None,
) -> Source:
    """Files of records, each of which is a document: ``file#number``. below: lists the files, relative to ``root``."""
    records.require_library(format)

    def read() -> Iterator[Document]:
        for relative in below():
            own = _name(relative)
            for record in records.read(root / relative, format, data.field):
                yield Document(f"{own}#{record.number}", record.text, own, record.bad)

    where = {**(args or {}), "format": format, "field": data.field, "max_bad_fraction": data.max_bad_fraction}
    return Source(name, "records", read, lambda: (root / relative for relative in below()), where)


def _of_hub(data: DataConfig) -> Source:
    """The rows of a set, each a document."""
    wanted = hub.Set.named(data.source)

    def read() -> Iterator[Document]:
        for record in records.read(hub.available(data), "jsonl", data.field):
            yield Document(f"{wanted.title}#{record.number}", record.text, wanted.title, record.bad)

    args = {"commit": wanted.commit, "rows": data.hf.rows, "field": data.field}
    paths = [hub.local(data), *wanted.files()]
    return Source(wanted.title, "hf", read, lambda: paths, args | {"max_bad_fraction": data.max_bad_fraction})


def _file(name: str, path: Path) -> Source:
    own = _name(path.name)
    return Source(
        name, "file", lambda: _read_file(own, path), lambda: [path], listed=lambda: iter([(0, own, _size(path))])
    )


def _python(data: DataConfig, name: str, root: Path, licence: str | None) -> Source:
    include, exclude = data.include or _PYTHON, (*_TESTS, *data.exclude)
    args = {"include": list(include), "exclude": list(exclude)}
    return _tree(name, "python", root, args, licence)


def _tree(name: str, loader: str, root: Path, args: Mapping[str, list[str]], licence: str | None) -> Source:
    include, exclude = args["include"], args["exclude"]

    def listed() -> Iterator[tuple[int, str, int]]:
        return ((0, _name(relative), _size(root / relative)) for relative in find(root, include, exclude))

    read = lambda: _read_tree(root, include, exclude)  # noqa: E731
    return Source(name, loader, read, lambda: _below(root, args), args, licence, listed)


def _size(path: Path) -> int:
    return int(_status(path).st_size)


def _read_file(name: str, path: Path) -> Iterator[Document]:
    """A file as one document, in pieces where it is long."""
    for text, goes_on in files.pieces(path):
        yield Document(name, text, name, goes_on=goes_on)


def _installed(data: DataConfig, package: str) -> Source:
    """The sources of an installed package, found without importing it."""
    if not package.isidentifier():
        raise DataError(f"'{package}' is not the name of a package as one imports it: installed:numpy.", found=package)
    spec = importlib.util.find_spec(package) if package != "__main__" else None
    if spec is None or not (spec.submodule_search_locations or spec.has_location):
        raise DataError(
            f"no package '{package}' with sources is installed here. Try: pip install {package}", found=package
        )
    if spec.submodule_search_locations:
        return _python(data, f"installed:{package}", Path(next(iter(spec.submodule_search_locations))), None)
    return _file(f"installed:{package}", Path(str(spec.origin)))


def _topics() -> Iterator[Document]:
    """The prose of Python's reference manual, as ``help()`` shows it."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(name, text.encode(), name)


def _notebook(data: DataConfig) -> Iterator[Document]:
    """Generated text; every document is a file of its own."""
    for made in notebook.documents(data.notebook, data.validation):
        yield Document(made.id, made.text, made.id)


def _topic_paths() -> list[Path]:
    spec = importlib.util.find_spec("pydoc_data.topics")
    return [Path(str(spec.origin))] if spec else []


def _notebook_paths() -> list[Path]:
    """Its prose, and the modules that make it: another version of them makes another text."""
    made_by = (notebook, notebook_names, notebook_phrases, notebook_words)
    return [*_topic_paths(), *(Path(inspect.getfile(each)) for each in made_by)]


def _registered(data: DataConfig, entry: Registered) -> Iterator[Document]:
    path = available(data, data.source, entry)
    if not entry.members:
        with open(path, "rb") as file:
            yield from _divided(file, entry.file, entry.starts)
        return
    with zipfile.ZipFile(path) as archive:
        for member in entry.members:
            with archive.open(member) as file:
                yield from _divided(file, member, entry.starts)


def _divided(file: IO[bytes], name: str, starts: str | None) -> Iterator[Document]:
    """A file as documents that, joined, are the file. Lines end at a line feed and nowhere else."""
    if starts is None:
        yield Document(name, file.read(), name)
        return
    begins, text, n_documents = re.compile(starts.encode()), io.BytesIO(), 0
    for line in file:
        if text.tell() and begins.match(line):
            yield Document(f"{name}#{n_documents}", text.getvalue(), name)
            text, n_documents = io.BytesIO(), n_documents + 1
        text.write(line)
    if text.tell():
        yield Document(f"{name}#{n_documents}", text.getvalue(), name)


def _read_tree(root: Path, include: Sequence[str], exclude: Sequence[str]) -> Iterator[Document]:
    found = find(root, include, exclude)
    if not found:
        raise DataError(
            f"{root} holds no usable file: none outside hidden and excluded names"
            f"{' matches ' + ', '.join(include) if include else ''}. Add text files, or change data.include.",
            path=str(root),
        )
    for relative in found:
        yield from _read_file(_name(relative), root / relative)


def _below(root: Path, args: Mapping[str, Sequence[str]]) -> Iterator[Path]:
    return (root / relative for relative in find(root, args["include"], args["exclude"]))


def find(root: Path, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The files below ``root`` to use, relative to it and sorted.

    A glob without a slash is matched against names, one with a slash against the path below ``root``. Hidden names are
    passed over unless a glob of ``include`` names a hidden thing (``.*``). Links are followed; one that leads back to
    where it stands is an error, as is a pipe, a socket or a device among the files.
    """
    show_hidden = any(glob.startswith(".") or "/." in glob for glob in include)

    base = os.fspath(root)

    def walk(directory: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        for name in _names(root / directory):
            relative = f"{directory}{name}"
            if (name.startswith(".") and not show_hidden) or _matches(relative, exclude):
                continue
            status = _status(f"{base}/{relative}")
            if stat.S_ISDIR(status.st_mode):
                place = (status.st_dev, status.st_ino)
                if place in above:
                    raise DataError(
                        f"{root / relative} leads back to a directory above it. Remove the link, or add "
                        f"'{name}' to data.exclude.",
                        path=str(root / relative),
                    )
                yield from walk(f"{relative}/", above | {place})
            elif not include or _matches(relative, include):
                if not stat.S_ISREG(status.st_mode):
                    raise DataError(
                        f"{root / relative} is no regular file. Add '{name}' to data.exclude.",
                        path=str(root / relative),
                    )
                yield relative

    status = _status(root)
    return sorted(walk("", frozenset([(status.st_dev, status.st_ino)])))


def _names(directory: Path) -> Iterable[str]:
    try:
        return os.listdir(directory)
    except OSError as cause:
        raise files.refused("list", directory, cause) from cause


def _status(path: Path | str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as cause:
        raise files.refused("open", path, cause) from cause


def _matches(relative: str, globs: Sequence[str]) -> bool:
    if not globs:
        return False
    name = relative.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(relative if "/" in glob else name, glob) for glob in globs)


def _name(path: str) -> str:
    """A file name as text that UTF-8 can say, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
