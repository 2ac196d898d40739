"""Copies of the package in which one function swaps two axes of an argument, and the tests that have to notice.

Run as a program with a folder, modules and the file of tests of each: it answers with a line of JSON for each mutant.
Torch is imported once; each mutant is a fork, which reads its own copy of the changed module.
"""

import ast
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
AXES = set("btshdkvfcnlgro1")


class Mutant(NamedTuple):
    """line: of the function. text: of its module, with the swap."""

    module: str
    function: str
    argument: str
    line: int
    text: str


def mutants(module: str) -> Iterator[Mutant]:
    """One for each function with an annotated tensor of two axes or more: the first two of its first such argument."""
    path = ROOT / "src" / "meristem" / f"{module}.py"
    lines = path.read_text().splitlines(keepends=True)
    for node in ast.walk(ast.parse("".join(lines))):
        if not isinstance(node, ast.FunctionDef):
            continue
        names = [each.arg for each in (*node.args.args, *node.args.kwonlyargs) if each.annotation]
        tensors = [name for name in names if len(axes := name.rpartition("_")[2]) > 1 and set(axes) <= AXES]
        if not tensors or any("overload" in ast.unparse(each) for each in node.decorator_list):
            continue
        body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
        swap = f"{' ' * body[0].col_offset}{tensors[0]} = {tensors[0]}.transpose(0, 1)\n"
        first = body[0].lineno - 1
        yield Mutant(module, node.name, tensors[0], node.lineno, "".join([*lines[:first], swap, *lines[first:]]))


def fails(tests: str) -> bool:
    """Whether one of these tests fails in a fork."""
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        import pytest

        os._exit(int(pytest.main([tests, "-x", "-q", "-n0", "-p", "no:cacheprovider", "--tb=no", "--timeout=0"])))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, 1):
        raise RuntimeError(f"pytest {tests} ended with {code}")
    return code == 1


def main(place: Path, pairs: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "native", place / "native")  # or nothing would go through the core
    sys.path.insert(0, str(place / "src"))
    sys.dont_write_bytecode = True
    os.chdir(ROOT)
    for module, tests in zip(pairs[::2], pairs[1::2], strict=True):
        path = place / "src" / "meristem" / f"{module}.py"
        whole = path.read_text()
        if fails(tests):
            raise RuntimeError(f"{tests} fails as it is")
        for mutant in mutants(module):
            path.write_text(mutant.text)
            said = {"at": f"{module}:{mutant.line} {mutant.function}({mutant.argument})", "is_killed": fails(tests)}
            print(json.dumps(said), flush=True)
        path.write_text(whole)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
