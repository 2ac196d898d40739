"""The rules of the house as pure functions over source: each gives the places that break it.

``test_house.py`` says which rules hold where, runs them over the package, and plants a violation for each.
"""

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from meristem import shapes

SHAPE_TYPES = {
    name: "".join(value.dim_str.split()) for name, value in vars(shapes).items() if hasattr(value, "dim_str")
}
"""Name of a type in ``shapes`` to its suffix: Keys to bthk."""

JAXTYPING = {"Float", "Float32", "Float64", "Int", "Int64", "Integer", "Bool", "Complex", "Num", "Real", "Shaped"}
FORBIDDEN_WORDS = {
    "Manager",
    "Handler",
    "Helper",
    "Helpers",
    "Service",
    "Base",
    "Util",
    "Utils",
    "Info",
    "Impl",
    "Trainer",
}
FORBIDDEN_MODULES = {"utils", "util", "common", "helpers", "helper", "misc"}
REGISTERED = {"command", "callback", "model_validator", "field_validator"}
"""Decorators that hand a function on to a library, which calls it."""
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, its text and its syntax tree, which is made when it is asked for."""

    name: str
    text: str
    is_package: bool = False

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """``memory`` for ``meristem.memory.rule``, empty for the package itself."""
        return (self.name.split(".") + [""])[1]

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.name}:{getattr(node, 'lineno', 1)}: {what}"


@functools.cache
def modules(folder: Path, prefix: str) -> list[Module]:
    """Every source file below ``folder``, which holds the package ``prefix``; read once per process."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        found.append(
            Module(".".join(parts[:-1] if is_package else parts), path.read_text(encoding="utf-8"), is_package)
        )
    return found


def imports(source: Module) -> Iterator[tuple[ast.AST, str]]:
    """Every module that ``source`` names: imports at any depth, and registry texts ``meristem.room.file:thing``."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = source.name.split(".")[: -node.level or None] if node.level else []
            above += [source.name.split(".")[-1]] if node.level == 1 and source.is_package else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"meristem(\.\w+)+:\w+", node.value):
                yield node, node.value.partition(":")[0]


def wrong_floors(
    source: Module, floors: tuple[tuple[str, ...], ...], sideways: Mapping[tuple[str, str], str]
) -> list[str]:
    """Imports that go up or sideways. The package itself stands above all and offers others only its version."""
    floor_of = {room: number for number, rooms in enumerate(floors) for room in rooms}
    if source.room and source.room not in floor_of:
        return [source.at(source.tree, f"the room '{source.room}' stands on no floor")]
    found = []
    for node, target in imports(source):
        room = (target.split(".") + [""])[1]
        if target.split(".")[0] != "meristem" or not source.room or source.room in floors[-1]:
            continue
        if room in (source.room, "__version__") or (source.room, room) in sideways:
            continue
        if room not in floor_of:
            found.append(source.at(node, f"imports {target}, which stands on no floor"))
        elif floor_of[room] >= floor_of[source.room]:
            found.append(source.at(node, f"floor {floor_of[source.room]} imports {target} of floor {floor_of[room]}"))
    return found


def circles(sources: list[Module]) -> list[str]:
    """A way through modules that leads back to where it began; empty where there is none."""
    names = {source.name for source in sources}

    def imported(target: str) -> str:
        while target and target not in names:
            target = target.rpartition(".")[0]
        return target

    graph = {source.name: {imported(target) for _, target in imports(source)} - {source.name} for source in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def too_large(source: Module) -> dict[str, str]:
    """What goes over a ceiling: its dotted name to how far. File 600 lines, function 80, 8 arguments, nesting 4."""
    found = {}
    n_lines = len(source.text.splitlines())
    if n_lines > 600:
        found[source.name] = f"{n_lines} lines in a file, the ceiling is 600"
    for name, function in _functions(source.tree, source.name):
        arguments = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        n_arguments = len([argument for argument in arguments if argument not in ("self", "cls")])
        n_lines = (function.end_lineno or 0) - function.lineno + 1
        depth = _nesting(function.body)
        for measured, ceiling, what in (
            (n_lines, 80, "lines"),
            (n_arguments, 8, "arguments"),
            (depth, 4, "levels of nesting"),
        ):
            if measured > ceiling:
                found[f"{name}:{what}"] = f"{measured} {what}, the ceiling is {ceiling}"
    return found


def bad_names(source: Module) -> list[str]:
    """Names that say nothing: classes, modules, functions."""
    found = []
    if source.name.split(".")[-1] in FORBIDDEN_MODULES:
        found.append(source.at(source.tree, "a module named for nothing in particular"))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef):
            words = set(re.findall(r"[A-Z][a-z0-9]*", node.name)) & FORBIDDEN_WORDS
            found += [source.at(node, f"class {node.name}: the word {word} says nothing") for word in sorted(words)]
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("do_"):
            found.append(source.at(node, f"function {node.name}: say what it does"))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and re.fullmatch(r"tmp|data\d", node.id):
            found.append(source.at(node, f"variable {node.id}: say what it is"))
    return found


def unfinished(source: Module) -> list[str]:
    """Marks of work left undone."""
    pattern = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    lines = enumerate(source.text.splitlines(), start=1)
    return [f"{source.name}:{number}: {line.strip()}" for number, line in lines if pattern.search(line)]


def unpickling(source: Module) -> list[str]:
    """Ways to run code while reading a file."""
    found = []
    for node, target in imports(source):
        if target.split(".")[0] in UNPICKLERS or target in ("torch.load", "torch.save"):
            found.append(source.at(node, f"imports {target}"))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in ("load", "save") and ast.unparse(node.value) == "torch":
            found.append(source.at(node, ast.unparse(node)))
    return found


NAMES_A_GPU = frozenset(
    "synchronize memory_allocated max_memory_allocated memory_reserved max_memory_reserved memory_stats mem_get_info "
    "reset_peak_memory_stats get_device_properties get_device_name get_device_capability get_rng_state current_stream "
    "default_stream Stream device set_device".split()
)
"""Calls of ``torch.cuda`` and ``torch.accelerator`` that mean the current device where they are not told which."""

MEANS_ANOTHER = frozenset({"get_rng_state_all", "set_rng_state_all", "manual_seed_all", "seed_all", "current_device"})
"""Calls that mean every GPU, or the one that this thread happens to be at."""


def others_gpus(source: Module) -> list[str]:
    """Ways to a GPU that another process uses: ``cuda`` without a number, or a call that names no device."""
    found = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        room, _, name = called.rpartition(".")
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        of_gpu = room.removeprefix("torch.") in ("cuda", "accelerator")
        is_bare = (of_gpu and name in NAMES_A_GPU and not given) or (name == "cuda" and not given)
        # The first arguments that may be a device; an error has a field of that name.
        places = node.args[:1] if name == "to" or (called == "torch.device" and len(given) == 1) else []
        places = places + [each.value for each in node.keywords if each.arg in ("device", "map_location")]
        is_first = not name.endswith("Error") and any(ast.unparse(each) == "'cuda'" for each in places)
        if is_bare or is_first or (of_gpu and name in MEANS_ANOTHER):
            found.append(source.at(node, ast.unparse(node)))
    return found


def stand_ins(source: Module) -> list[str]:
    """Places that go on after a failed import, with something in place of what is missing or without it unsaid."""
    return [
        source.at(node, "an import that fails has to end in raise or return")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler)
        and node.type is not None
        and re.search(r"\b(ImportError|ModuleNotFoundError)\b", ast.unparse(node.type))
        and not isinstance(node.body[-1], ast.Raise | ast.Return)
    ]


def import_hooks(source: Module) -> list[str]:
    """jaxtyping's import hook and its bare decorator: both break under torch.compile (platform.md 3.2)."""
    found = []
    for node in ast.walk(source.tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.attr] if isinstance(node, ast.Attribute) else [node.id] if isinstance(node, ast.Name) else []
        if "install_import_hook" in names:
            found.append(source.at(node, "install_import_hook"))
        for decorator in getattr(node, "decorator_list", []):
            if re.match(r"(jaxtyping\.)?jaxtyped\b", ast.unparse(decorator)):
                found.append(source.at(decorator, "bare @jaxtyped"))
    return found


def postponed_annotations(source: Module) -> list[str]:
    """Postponed annotations beside tensors: the shape checks would see text instead of types."""
    targets = {target for _, target in imports(source)}
    has_tensors = any(
        target.split(".")[0] in ("torch", "jaxtyping") or target.startswith("meristem.shapes") for target in targets
    )
    return (
        [f"{source.name}: from __future__ import annotations"]
        if has_tensors and "__future__.annotations" in targets
        else []
    )


def foreign_models(source: Module) -> list[str]:
    """Pydantic models that do not build on Part, and so may be open or unfrozen."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("BaseModel") for base in node.bases):
            found.append(source.at(node, f"class {node.name} builds on BaseModel, not on Part"))
    return found


def filled_init(source: Module) -> list[str]:
    """Code in a room's ``__init__``: importing one file of a room must not import the others."""
    if not source.is_package:
        return []
    code = [
        node for node in source.tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    return [source.at(code[0], "code in __init__")] if code else []


def unknown_letters(source: Module) -> list[str]:
    """Letters in shape types and einsum strings that the legend does not hold."""
    found = []
    for node, letters in [*_shape_strings(source.tree), *_einsums(source.tree)]:
        wrong = sorted(set(letters) - shapes.LEGEND.keys())
        if wrong:
            found.append(source.at(node, f"'{' '.join(wrong)}' in '{' '.join(letters)}' is not in the legend"))
    return found


def wrong_suffixes(source: Module) -> list[str]:
    """Names whose suffix is not the shape they are given: by a type of ``shapes``, or by the einsum that makes them."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            suffixes = {SHAPE_TYPES[part] for part in _type_names(node.annotation) if part in SHAPE_TYPES}
            suffixes |= {suffix.replace("t", "s") for suffix in suffixes}
            if suffixes and not any(name.endswith(f"_{suffix}") for suffix in suffixes):
                found.append(source.at(node, f"{name} has the axes {' or '.join(sorted(suffixes))}"))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            made = _einsum_result(node.value)
            if made and not node.targets[0].id.endswith(f"_{made}"):
                found.append(source.at(node, f"{node.targets[0].id} has the axes {made}"))
    return found


def untyped_tensors(source: Module) -> list[str]:
    """Public functions with an argument that carries axes in its name and a bare Tensor, or nothing, as its type."""
    found = []
    suffix = re.compile(f"_[{''.join(shapes.LEGEND)}]+$")
    for function in _public(source.tree):
        for argument in (*function.args.args, *function.args.kwonlyargs):
            is_bare = argument.annotation is None or "Tensor" in _type_names(argument.annotation)
            if suffix.search(argument.arg) and is_bare:
                found.append(source.at(argument, f"{function.name}: {argument.arg} needs a type of shapes"))
    return found


def equal_sizes(source: Module) -> list[str]:
    """Tensors made with one literal size for two axes: swapped axes would pass unseen."""
    makers = {"randn", "rand", "zeros", "ones", "empty", "full", "randint"}
    found = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in makers:
            continue
        given = list(node.args)
        if node.func.attr in ("full", "randint"):
            given = [argument for argument in given if isinstance(argument, ast.Tuple | ast.List)]
        if given and isinstance(given[0], ast.Tuple | ast.List):
            given = list(given[0].elts)
        sizes = [size.value for size in given if isinstance(size, ast.Constant) and isinstance(size.value, int)]
        large = [size for size in sizes if size > 1]
        if len(set(large)) < len(large):
            found.append(source.at(node, f"{ast.unparse(node)}: give each axis its own size"))
    return found


def private_places(name: str, text: str) -> list[str]:
    """Hosts of package registries and paths of one machine: pip is told elsewhere where to look."""
    pattern = re.compile(
        r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|/opt/whee[l]s|/roo[t]/|(?<![\w.])/wor[k]/\w"
    )
    lines = enumerate(text.splitlines(), start=1)
    return [f"{name}:{number}: {line.strip()[:100]}" for number, line in lines if pattern.search(line)]


def uncalled(sources: Iterable[Module]) -> dict[str, str]:
    """Public functions, methods and classes that nothing outside their own definition names, by module and name."""
    sources = list(sources)
    words = Counter(word for source in sources for word in re.findall(r"\w+", source.text))
    found = {}
    for source in sources:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name[0] == "_":
                continue
            used_by = {
                part.attr if isinstance(part, ast.Attribute) else part.id
                for decorator in node.decorator_list
                for part in ast.walk(decorator)
                if isinstance(part, ast.Attribute | ast.Name)
            }
            inside = re.findall(rf"\b{node.name}\b", ast.get_source_segment(source.text, node) or "")
            if words[node.name] <= len(inside) and not used_by & REGISTERED:
                found[f"{source.name}.{node.name}"] = "nothing in the package names it"
    return found


def _functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        name = (
            f"{prefix}.{node.name}"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            else prefix
        )
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, node
        yield from _functions(node, name)


def _public(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """The functions and methods that others may call; those of an autograd.Function only torch calls."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if not any(ast.unparse(base).endswith("Function") for base in node.bases):
                yield from _public(node)
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name.endswith("__")):
            yield node


def _nesting(body: Iterable[ast.AST]) -> int:
    """How deep blocks stand in blocks; an elif is no deeper than its if, and a function inside starts afresh."""
    deepest = 0
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody", "handlers", "cases")]
        if not isinstance(node, ast.stmt) or not any(blocks):
            continue
        is_chain = isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)
        inside = 1 + max(_nesting(_statements(block)) for block in blocks if not (is_chain and block is blocks[1]))
        deepest = max(deepest, inside, _nesting(blocks[1]) if is_chain else 0)
    return deepest


def _statements(block: list[ast.AST]) -> list[ast.AST]:
    """The statements of a block; those of exception handlers and match cases stand one list deeper."""
    return [
        inner
        for node in block
        for inner in (node.body if isinstance(node, ast.ExceptHandler | ast.match_case) else [node])
    ]


def _shape_strings(tree: ast.AST) -> Iterator[tuple[ast.AST, list[str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).split(".")[-1] in JAXTYPING:
            if isinstance(node.slice, ast.Tuple) and isinstance(node.slice.elts[-1], ast.Constant):
                words = str(node.slice.elts[-1].value).split()
                yield node, [word for word in words if word != "..." and not word.isdigit()]


def _einsums(tree: ast.AST) -> Iterator[tuple[ast.AST, list[str]]]:
    for node in ast.walk(tree):
        pattern = _einsum_pattern(node)
        if pattern:
            yield node, re.findall(r"\w", pattern)


def _einsum_pattern(node: ast.AST) -> str:
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "einsum":
        if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            return node.args[0].value
    return ""


def _einsum_result(node: ast.AST) -> str:
    """The letters that come out of an einsum; empty when they are not all written."""
    result = _einsum_pattern(node).partition("->")[2].strip()
    return result if result.isalpha() else ""


def _type_names(annotation: ast.AST) -> set[str]:
    """The type names of an annotation, through unions."""
    if isinstance(annotation, ast.BinOp):
        return _type_names(annotation.left) | _type_names(annotation.right)
    if isinstance(annotation, ast.Name | ast.Attribute):
        return {ast.unparse(annotation).split(".")[-1]}
    return set()
