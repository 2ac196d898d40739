"""Every optional package goes through one door, and where one is missing its error says how to install it."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from meristem import extras
from meristem.errors import MissingExtra

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "meristem"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {
    name: libraries
    for name, libraries in PROJECT["optional-dependencies"].items()
    if name not in ("test", "ci", "lint")
}

DISTRIBUTIONS = {
    "lm_eval": "lm-eval",
    "prometheus_client": "prometheus-client",
    "fla": "fla-core",
    "mlflow": "mlflow-skinny",
}
BROUGHT_ALONG = {"huggingface_hub": "transformers brings it", "torch.utils.tensorboard": "torch's own"}

BEHIND_A_DOOR = {
    "serve": "the verbs serve and watch import it within extras.needed",
    "sinks.trackers.board": "sinks.trackers.start requires the library before",
    "sinks.trackers.flow": "sinks.trackers.start requires the library before",
    "sinks.trackers.wandb": "sinks.trackers.start requires the library before",
    "export.hub": "export.hf imports it by extras.imported",
    "export.card": "the text of a card, which is no code of ours",
    **{
        f"memory.kernels.triton_{name}": "memory.kernels.select asks whether triton is there before"
        for name in ("tiles", "forward", "backward")
    },
    "bench.peer_titans": "a program of other packages' environment, which has nothing of ours",
}
"""Modules that import optional packages as a whole, and who imports them."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The optional libraries that are imported outside of a block ``with needed``, and not for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.With) and "needed(" in ast.unparse(node.items[0]):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0], node
        yield from imports(node)


def test_cx_1_4_optional_packages_are_imported_through_one_door():
    """Elsewhere no module imports one, asks whether one is there, or catches that it is not."""
    wrong = []
    for name, tree in modules():
        if name == "extras" or any(name == door or name.startswith(f"{door}.") for door in BEHIND_A_DOOR):
            continue
        wrong += [
            f"{name}:{node.lineno} imports {library}" for library, node in imports(tree) if library in extras.EXTRA_OF
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                called = ast.unparse(node.func)
                named = (
                    node.args and isinstance(node.args[0], ast.Constant) and str(node.args[0].value).partition(".")[0]
                )
                if called == "MissingExtra" or (
                    called.endswith(("import_module", "find_spec")) and named in extras.EXTRA_OF
                ):
                    wrong.append(f"{name}:{node.lineno} calls {called}")
    assert not wrong


def test_the_law_sees_what_it_forbids():
    for text in (
        "def late():\n    import wandb",
        "from transformers import AutoModel",
        "try:\n    import optuna\nexcept: 0",
    ):
        assert [library for library, _ in imports(ast.parse(text)) if library in extras.EXTRA_OF]
    assert not list(imports(ast.parse("with needed('x'):\n    import wandb")))


@pytest.mark.parametrize("library", extras.EXTRA_OF)
def test_cx_1_4_a_missing_library_is_one_sentence_with_its_command(library, monkeypatch):
    """CX-6.4: whichever way it is asked for, from the extra of pyproject that brings it."""
    extra = extras.EXTRA_OF[library]
    brought = [text.partition(">")[0] for text in OURS[extra]]
    assert DISTRIBUTIONS.get(library, library) in brought or library in BROUGHT_ALONG
    monkeypatch.setitem(sys.modules, library, None)  # which makes every import of it fail
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    said = rf"^a figure needs {library}, which is not installed\. Run: pip install 'meristem\[{extra}\]'\. Or not\.$"
    for ask in (extras.require, extras.imported):
        with pytest.raises(MissingExtra, match=said) as raised:
            ask(library, "a figure", "Or not.")
        assert raised.value.exit_code == 3
    with pytest.raises(MissingExtra, match=said), extras.needed("a figure", "Or not."):
        __import__(library)


def test_every_extra_has_a_door():
    assert set(extras.EXTRA_OF.values()) == set(OURS)


def test_an_installation_that_is_broken_is_no_missing_one(monkeypatch):
    """What it cannot load is said; an error of our own code stays what it is."""

    def broken(name: str) -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(extras, "import_module", broken)
    monkeypatch.setattr(extras, "find_spec", lambda name: object())
    with pytest.raises(
        MissingExtra, match=r"peft is installed, and cannot be loaded: libcudart.*pip install 'meristem\[hf\]'"
    ):
        extras.imported("peft", "LoRA")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), extras.needed("serving"):
        import meristem.no_such_module  # noqa: F401
