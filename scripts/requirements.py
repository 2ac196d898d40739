"""Lists requirement ids of specification pages with the tests that name them.

    python scripts/requirements.py PAGE.md ... [--missing] [--only CX,F,TR,A8]

A page holds tables whose first column is ``id``; a row may have several ids, parted by commas (``CX-9.1, F9``), and
counts as tested when one of them is named. A test names an id in its function's name (``test_cx_9_1_...``) or in a
docstring: its own, its class's, or its file's.
"""

import argparse
import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
CELLS = re.compile(r"(?<!\\)\|")


@dataclass(frozen=True)
class Requirement:
    """One row of a table: its ids, and the first words of what must be true."""

    ids: tuple[str, ...]
    text: str

    def is_named_in(self, words: str) -> bool:
        """Whether ``words`` hold one of the ids, written as in the page or as in the name of a function."""
        return any(pattern(each).search(words) for each in self.ids)


def pattern(identifier: str) -> re.Pattern[str]:
    """CX-9.1 also as cx_9_1, cx9_1 and CX9.1; never as the beginning of CX-9.10 or of CX-9.1.2.

    An id of one letter, such as F9, is found in capitals or at the beginning of a test's name, behind other ids, alone:
    f1 is a metric as well.
    """
    letters, *numbers = re.findall(r"[A-Za-z]+|\d+", identifier)
    body = "[-_]?" + "[._]".join(numbers) + r"(?![0-9]|[._][0-9])"
    low = rf"\btest(?:_[a-z]+\d+)*_{letters.lower()}" if len(letters) == 1 else rf"(?<![a-z0-9]){letters.lower()}"
    return re.compile(rf"(?:(?<![A-Za-z0-9]){letters}|{low}){body}")


def requirements(page: str) -> Iterator[Requirement]:
    """The rows of all tables of ``page`` whose first column is ``id``."""
    is_inside = False
    for line in page.splitlines():
        if not line.startswith("|"):
            is_inside = False
            continue
        cells = [cell.strip() for cell in CELLS.split(line)[1:-1]]
        if cells[0] == "id":
            is_inside = True
        elif is_inside and re.match(r"[A-Z]+-?\d", cells[0]):
            yield Requirement(tuple(re.split(r",\s*", cells[0])), cells[1])


def named(folder: Path) -> Iterator[tuple[str, str]]:
    """Each test of ``folder`` as ``file::name``, and the words in which it may name an id."""
    for path in sorted(folder.rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = str(path.relative_to(folder))
        yield where, ast.get_docstring(tree) or ""
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) or (isinstance(node, ast.FunctionDef) and node.name.startswith("test")):
                yield f"{where}::{node.name}", f"{node.name} {ast.get_docstring(node) or ''}"


def tested(wanted: Iterable[Requirement], folder: Path = TESTS) -> dict[Requirement, list[str]]:
    """For each requirement the tests that name it; a file is listed when its first words do."""
    words = list(named(folder))
    return {each: [test for test, said in words if each.is_named_in(said)] for each in wanted}


def main() -> None:
    parser = argparse.ArgumentParser(description="Which requirement ids are named by which tests.")
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--missing", action="store_true", help="only those that no test names")
    parser.add_argument("--only", default="", help="only ids that begin with one of these, parted by commas")
    options = parser.parse_args()
    heads = tuple(options.only.split(",")) if options.only else ("",)
    rows = [row for page in options.pages for row in requirements(page.read_text(encoding="utf-8"))]
    rows = [row for row in rows if any(each.startswith(heads) for each in row.ids)]
    print("| id | what must be true | tests |\n|---|---|---|")
    found = tested(rows)
    for row, tests in found.items():
        if not (options.missing and tests):
            print(f"| {', '.join(row.ids)} | {row.text[:100]} | {', '.join(tests)} |")
    print(f"\n{sum(map(bool, found.values()))} of {len(found)} rows are named by a test.")


if __name__ == "__main__":
    main()
