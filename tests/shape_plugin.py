"""Checks the shapes that signatures promise, while the tests run. Loaded by ``-p shape_plugin`` before the package is.

A finder in front of ``sys.meta_path`` puts ``checked`` innermost on every function of the package, in the syntax tree,
so that functions captured at import (entries of a registry, parts of a rule) are reached as well. The product run
knows nothing of it. jaxtyping's own import hook will not do: under torch.compile it fails, and after a graph break it
refuses correct inputs.

--shape-checks=on      signatures (the default)
--shape-checks=strict  and after each assignment to a local with an axis suffix, that its rank is the suffix's length
--shape-checks=off     no finder, no wrapper, no beartype
"""

import ast
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args

import pytest

PACKAGE = "meristem"
SUFFIX = re.compile(r"_([btsdhkvfcnlgro]+)$")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shape-checks", choices=("on", "off", "strict"), default="on", help="check shapes of signatures")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Put the finder in place before any conftest or test can import the package."""
    checks = early_config.known_args_namespace.shape_checks
    if checks != "off":
        install(PACKAGE, is_strict=checks == "strict")
        # The workers of xdist load -p plugins after their first conftests; the variable makes them load it before.
        os.environ["PYTEST_PLUGINS"] = __name__


def install(package: str, is_strict: bool) -> "Finder":
    """A finder for ``package`` in front of all others; too late is an error."""
    late = sorted(name for name in sys.modules if name.split(".")[0] == package)
    if late:
        raise pytest.UsageError(f"shape_plugin came too late: {', '.join(late[:3])} imported already. Load it with -p.")
    finder = Finder(package, is_strict)
    sys.meta_path.insert(0, finder)
    return finder


class Finder(MetaPathFinder):
    """Finds the modules of one package where the others find them, and has them loaded with checks."""

    def __init__(self, package: str, is_strict: bool) -> None:
        self.package = package
        self.is_strict = is_strict

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] != self.package:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target) if finder is not self else None
            if spec is not None:
                if isinstance(spec.loader, SourceFileLoader):
                    spec.loader = Loader(fullname, spec.loader.path, self.is_strict)
                return spec
        return None


class Loader(SourceFileLoader):
    """Compiles a source file with ``checked`` on its functions; the bytecode cache is neither read nor written."""

    def __init__(self, fullname: str, path: str, is_strict: bool) -> None:
        super().__init__(fullname, path)
        self.is_strict = is_strict

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = decorated(ast.parse(self.get_data(path), path), self.is_strict)
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(__checked__=checked, __ranked__=ranked)
        super().exec_module(module)


def decorated(tree: ast.Module, is_strict: bool) -> ast.Module:
    """The tree with ``__checked__`` innermost on each function, and rank checks after assignments when strict."""
    return _Decorator(is_strict).visit(tree)


class _Decorator(ast.NodeTransformer):
    def __init__(self, is_strict: bool) -> None:
        self.is_strict = is_strict
        self.depth = 0

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """No expression holds a function or an assignment to decorate."""
        return node if isinstance(node, ast.expr) else super().generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1
        mark = ast.Name("__checked__", ast.Load(), lineno=node.lineno, col_offset=node.col_offset)
        node.decorator_list.append(mark)
        return node

    def visit_Assign(self, node: ast.Assign) -> Any:
        return self._with_ranks(node, node.targets)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        return self._with_ranks(node, [node.target] if node.value else [])

    def _with_ranks(self, node: ast.stmt, targets: list[ast.expr]) -> Any:
        if not (self.is_strict and self.depth):
            return node
        names = [name.id for target in targets for name in ast.walk(target) if _is_stored(name)]
        marks = [ast.parse(f"__ranked__({name!r}, {name})").body[0] for name in names if SUFFIX.search(name)]
        return [node, *(ast.copy_location(mark, node) for mark in marks)]


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def ranked(name: str, value: object) -> None:
    """Refuse a tensor whose rank is not the length of the suffix of ``name``."""
    import torch

    letters = SUFFIX.search(name)
    if letters and isinstance(value, torch.Tensor) and value.dim() != len(letters[1]):
        raise TypeError(f"{name} has the shape {tuple(value.shape)}; its suffix promises {len(letters[1])} axes")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its shapes checked in eager runs; itself where no annotation names a shape."""
    hints = function.__annotations__
    hidden = [f"{name}: {hint!r}" for name, hint in hints.items() if _hides_shape(hint, function)]
    if hidden:
        raise TypeError(
            f"{function.__qualname__} hides shapes in text ({', '.join(hidden)}). Write the types themselves."
        )
    if not any(map(_is_shaped, hints.values())) or inspect.isgeneratorfunction(function):
        return function
    import torch

    inner: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not inner:
            inner.append(_typechecked(function))
        _require_one_device(function, (*args, *kwargs.values()))
        return inner[0](*args, **kwargs)

    return wrapper


def _typechecked(function: Callable[..., Any]) -> Callable[..., Any]:
    import beartype
    import jaxtyping

    return jaxtyping.jaxtyped(function, typechecker=beartype.beartype)


def _is_shaped(hint: object) -> bool:
    """A jaxtyping type, or a generic or union that holds one. Only they have an array type and axes."""
    return hasattr(hint, "array_type") and hasattr(hint, "dim_str") or any(map(_is_shaped, get_args(hint)))


def _hides_shape(hint: object, function: Callable[..., Any]) -> bool:
    """Annotations written or postponed as text say nothing to the checks."""
    words = re.findall(r"\w+", hint) if isinstance(hint, str) else []
    return "Tensor" in words or any(_is_shaped(function.__globals__.get(word)) for word in words)


def _require_one_device(function: Callable[..., Any], values: Sequence[object]) -> None:
    import torch

    devices = {str(value.device) for value in values if isinstance(value, torch.Tensor)}
    if len(devices) > 1:
        raise TypeError(f"{function.__qualname__} was given tensors on {' and '.join(sorted(devices))}")
