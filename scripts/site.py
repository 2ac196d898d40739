"""Lays out the pages of the site in build/pages, from README.md, docs/ and the public names; zensical.toml builds it.

A link to another page of the site is turned to where that page is laid; one to anything else of this repository is an
error. What is public is what ``__all__`` of the packages in ``ROOMS`` names; docstrings are read by mkdocstrings.
"""

import ast
import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")

ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "dev/LOG.md": "log.md",
    "src/meristem/models/shipped/card.md": "card.md",
    "examples/plugin/README.md": "plugin.md",
    "examples/rule.ipynb": "rule.ipynb",
    "examples/reading.ipynb": "reading.ipynb",
}
"""Pages and files that do not lie in docs/, and where they are laid."""

ROOMS = ("meristem", "meristem.memory", "meristem.nn", "meristem.growth")
"""The packages whose ``__all__`` is what other programs use."""


def laid() -> dict[Path, str]:
    """Each file of the site, from the root of the repository, and where it is laid."""
    docs = {path.relative_to(ROOT): path.name for path in (ROOT / "docs").iterdir() if path.is_file()}
    return docs | {Path(path): name for path, name in ELSEWHERE.items()}


def with_links(text: str, source: Path, places: dict[Path, str]) -> str:
    """The text of the page ``source`` with its links as they are on the site; LookupError names one that leads away."""

    def link(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / match[1]))
        if target not in places:
            raise LookupError(f"{source} links to {match[1]}, which is no page of the site; name it in ELSEWHERE")
        return places[target]

    return LINK.sub(link, text)


def public(package: str) -> list[str]:
    """The full names of what ``__all__`` of ``package`` names, where it is defined, in the order of that list."""
    path = ROOT / "src" / Path(*package.split(".")) / "__init__.py"
    found: dict[str, str] = {}
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("meristem"):
            found |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in found:
            found[ast.unparse(node.targets[0])] = found[node.value.id]
    return [found[name] for name in names if not name.startswith("_")]


def reference(package: str) -> str:
    """The page of one package: its docstrings, for mkdocstrings to fill in."""
    entries = "\n".join(f"::: {name}\n" for name in public(package))
    options = "    options:\n      members: false\n      show_root_heading: false\n"
    return f"# `{package}`\n\n::: {package}\n{options}\n{entries}"


def main() -> None:
    places = laid()
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    for source, name in places.items():
        if source.suffix == ".md":
            (PAGES / name).write_text(with_links((ROOT / source).read_text(encoding="utf-8"), source, places))
        else:
            shutil.copy(ROOT / source, PAGES / name)
    for package in ROOMS:
        (PAGES / f"api-{package}.md").write_text(reference(package))


if __name__ == "__main__":
    main()
