"""The house: who may import whom, how large things may grow, which words and shortcuts are not ours."""

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

import house
from meristem.config import ConfigSection

FLOORS = (
    ("errors", "events", "config", "plugins", "extras"),
    ("shapes", "linalg", "device", "native", "worker", "checkpoint", "bus", "sinks"),
    ("memory", "optim", "data", "safety", "distributed"),
    ("nn",),
    ("models",),
    ("train", "growth", "evaluate"),
    ("adapters",),
    ("runs",),
    ("recipes", "serve", "export", "bench", "drills"),
    ("cli", "__main__"),
)
"""A room imports only from floors above it in this list, or from itself."""

SIDEWAYS = {
    ("config", "errors"): "the ground stands on one error tree",
    ("plugins", "errors"): "the ground stands on one error tree",
    ("extras", "errors"): "the ground stands on one error tree",
    ("optim", "memory"): "Newton-Schulz stands once, with the kernels",
    ("data", "safety"): "a text is searched for secrets before it is used",
    ("bench", "recipes"): "what is measured is a recipe's work",
    ("bench", "serve"): "what is measured is a server",
    ("export", "serve"): "what is exported goes on with the sessions that are served",
    ("drills", "recipes"): "a drill breaks something of a recipe",
}

EXCEPTIONS: dict[str, str] = {
    f"meristem.{module}.{name}:arguments": "an operation of torch takes its tensors one by one"
    for module in ("native.operations", "native.write", "memory.kernels.chunk_operation")
    for name in ("_forward", "_backward")
}
"""What may go over a ceiling, and why; a key ends in what is measured: ``meristem.room.file.function:lines``."""

UNCALLED = {
    "meristem.config.text.ignore_aliases": "yaml calls it",
    "meristem.native.build.has_compiler": "setup.py calls it",
    "meristem.cli.grow.resolve_command": "click calls it",
    **{
        f"meristem.export.hub.{name}": "transformers calls it"
        for name in (
            "batch_repeat_interleave",
            "crop",
            "get_max_length",
            "get_seq_length",
            "reorder_cache",
            "set_input_embeddings",
        )
    },
    **{
        f"meristem.evaluate.harness.{name}": "lm-eval calls it"
        for name in ("generate_until", "loglikelihood", "loglikelihood_rolling")
    },
    "meristem.distributed.agreement.barrier": "growth meets there before it changes the structure",
    "meristem.serve.connection.handle_events": "uvicorn calls it",
    "meristem.serve.connection.pause_writing": "asyncio calls it",
    "meristem.serve.connection.resume_writing": "asyncio calls it",
}
"""What nothing in the package names, and why it stays."""

FILLED_INITS = {
    "meristem": "the lazy names load and Session",
    "meristem.config": "the loader's public names",
    "meristem.memory": "the public names of memory",
    "meristem.nn": "the lazy names of what other models take",
    "meristem.growth": "the public names of growth",
    "meristem.growth.surgery": "its operators, which register themselves",
    "meristem.cli": "the entry point",
}

ROOT = Path(__file__).parents[1]
PACKAGE = house.modules(ROOT / "src" / "meristem", "meristem")
TESTS = house.modules(ROOT / "tests", "tests")
NUMERIC = [source for source in PACKAGE if source.room in ("shapes", "memory", "nn", "models")]
PARTS = [source.name for source in PACKAGE if source.name.endswith(".config") or source.room in FLOORS[0]]


Check = Callable[[house.Module], list[str]]


def hold(check: Check, sources: list[house.Module]) -> None:
    violations = [violation for source in sources for violation in check(source)]
    assert not violations, "\n".join(["", *violations])


def test_floors() -> None:
    """Imports go down only, at any depth of a function and in the texts of registries too."""
    hold(lambda source: house.wrong_floors(source, FLOORS, SIDEWAYS), PACKAGE)


def test_no_circles() -> None:
    """No two modules import each other, directly or through others, at any depth of a function or for types alone."""
    assert house.circles(PACKAGE) == []


def test_ceilings() -> None:
    """Nothing outgrows its ceiling without a reason, and no reason outlives what it excused."""
    found = {name: what for source in PACKAGE for name, what in house.too_large(source).items()}
    verbs = {name for name in found if name.startswith("meristem.cli.") and name.endswith(":arguments")}
    unexcused = {name: what for name, what in found.items() if name not in EXCEPTIONS and name not in verbs}
    assert unexcused == {}, "arguments of a verb are its options and may be many; everything else is to be split"
    assert EXCEPTIONS.keys() <= found.keys()


@pytest.mark.parametrize(
    "check",
    [house.bad_names, house.unfinished, house.unpickling, house.postponed_annotations, house.others_gpus],
    ids=lambda c: c.__name__,
)
def test_package_is_free_of(check: Check) -> None:
    hold(check, PACKAGE)


def test_a_way_to_the_gpu_of_another_process_is_noticed() -> None:
    for wrong in (
        "torch.cuda.synchronize()",
        "torch.accelerator.synchronize()",
        "torch.cuda.max_memory_allocated()",
        "torch.cuda.get_rng_state_all()",
        "torch.cuda.current_device()",
        "torch.device('cuda')",
        "torch.zeros(3, device='cuda')",
        "model.to('cuda')",
        "model.cuda()",
    ):
        assert len(house.others_gpus(planted(wrong))) == 1, wrong
    right = "torch.cuda.synchronize(device)\ntorch.device('cuda', rank)\nmodel.to(device)\ntorch.cuda.empty_cache()"
    assert house.others_gpus(planted(right)) == []


def test_everything_is_called() -> None:
    """What only tests call leaves the package."""
    assert house.uncalled(PACKAGE).keys() == UNCALLED.keys()


def test_what_only_tests_call_is_noticed() -> None:
    alone = planted("def lonely():\n    return lonely()\n\n\ndef used(): pass\n\n\nused()")
    assert house.uncalled([alone]) == {"meristem.memory.planted.lonely": "nothing in the package names it"}


def test_no_import_hooks() -> None:
    """SH-3: Tests included: the shape plugin decorates by itself."""
    hold(house.import_hooks, PACKAGE + TESTS)


def test_rooms_can_be_imported_file_by_file() -> None:
    inits = [source for source in PACKAGE if source.name.count(".") < 2 and source.name not in FILLED_INITS]
    hold(house.filled_init, inits)


@pytest.mark.parametrize(
    "check", [house.unknown_letters, house.wrong_suffixes, house.untyped_tensors], ids=lambda c: c.__name__
)
def test_axes_are_named(check: Check) -> None:
    """A letter means the same axis in the type, in the suffix and in the einsum string."""
    hold(check, NUMERIC)


def test_no_two_axes_share_a_size() -> None:
    """SH-7."""
    hold(house.equal_sizes, TESTS)


def test_no_private_places() -> None:
    """No tracked file names a package registry or a folder of one machine."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".safetensors", ".bin", ".gz"):
            found += house.private_places(name, path.read_text(encoding="utf-8", errors="replace"))
    assert found == []


def test_every_model_is_a_part() -> None:
    """Unknown keys are refused and values frozen, in every pydantic model we have."""
    models = [source for source in PACKAGE if source.name != "meristem.config.section"]
    hold(house.foreign_models, models)
    for name in PARTS:
        import_module(name)
    ours = [part for part in descendants(ConfigSection) if part.__module__.startswith("meristem.")]
    assert ours and [part for part in ours if is_open(part)] == []


def test_an_open_part_is_noticed() -> None:
    class Loose(ConfigSection, extra="ignore"):
        pass

    class Soft(ConfigSection, frozen=False):
        pass

    assert is_open(Loose) and is_open(Soft)
    assert {Loose, Soft} <= set(descendants(ConfigSection))


def is_open(config: type[ConfigSection]) -> bool:
    return not (config.model_config["frozen"] and config.model_config["extra"] == "forbid")


def descendants(config: type[ConfigSection]) -> list[type[ConfigSection]]:
    below = [found for child in config.__subclasses__() for found in descendants(child)]
    return [config, *below]


def test_ground_and_parts_do_without_torch() -> None:
    """The configuration tree is checked before torch is loaded; so are the parts, the package itself and its verbs."""
    names = [*PARTS, *(name for name in ("meristem", "meristem.runs.config", "meristem.cli") if is_there(name))]
    assert first_to_load_torch(names) == ""


def test_torch_is_noticed() -> None:
    """The check above can fail."""
    assert first_to_load_torch(["json", "meristem.shapes", "csv"]) == "meristem.shapes"


def test_help_does_without_torch() -> None:
    program = """
import sys
sys.argv = ["meristem", "--help"]
from meristem.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "False\n"


def is_there(name: str) -> bool:
    return any(source.name == name for source in PACKAGE)


def first_to_load_torch(names: list[str]) -> str:
    program = f"""
import sys
from importlib import import_module
for name in {names!r}:
    import_module(name)
    if "torch" in sys.modules:
        sys.exit(print(name, end=""))
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def planted(text: str, name: str = "meristem.memory.planted", is_package: bool = False) -> house.Module:
    return house.Module(name, text, is_package)


@pytest.mark.parametrize(
    "text, name, message",
    [
        ("import meristem.nn.mlp", "meristem.memory.rule", "floor 2 imports meristem.nn.mlp of floor 3"),
        ("from meristem import nn", "meristem.memory.rule", "floor 2 imports meristem.nn of floor 3"),
        ("from ..nn import mlp", "meristem.memory.rule", "floor 2 imports meristem.nn.mlp of floor 3"),
        ("from .. import nn", "meristem.memory.rule", "floor 2 imports meristem.nn of floor 3"),
        ("def late():\n    from meristem.nn import mlp", "meristem.memory.rule", "rule:2: floor 2 imports meristem.nn"),
        ("entries = {'a': 'meristem.nn.mlp:GELU'}", "meristem.memory.rule", "floor 2 imports meristem.nn.mlp"),
        (
            "from meristem.optim import groups",
            "meristem.memory.rule",
            "floor 2 imports meristem.optim.groups of floor 2",
        ),
        ("from meristem.errors import DataError", "meristem.events", "floor 0 imports meristem.errors"),
        ("from meristem import load", "meristem.data.corpus", "imports meristem.load, which stands on no floor"),
        ("", "meristem.cellar.wine", "the room 'cellar' stands on no floor"),
    ],
)
def test_planted_import_is_found(text: str, name: str, message: str) -> None:
    assert message in "\n".join(house.wrong_floors(planted(text, name), FLOORS, SIDEWAYS))


@pytest.mark.parametrize(
    "text, name, is_package",
    [
        ("from meristem.shapes import Keys", "meristem.memory.rule", False),
        ("from .gates import Gates", "meristem.memory.rule", False),
        ("from . import gates", "meristem.memory", True),
        ("from meristem.errors import ConfigError", "meristem.config.layers", False),
        ("from meristem import __version__", "meristem.device.describe", False),
        ("import meristem", "meristem.cli.doctor", False),
        ("from meristem.serve.session import Session", "meristem", True),
    ],
)
def test_downward_import_is_allowed(text: str, name: str, is_package: bool) -> None:
    assert house.wrong_floors(planted(text, name, is_package), FLOORS, SIDEWAYS) == []


@pytest.mark.parametrize(
    "text, is_found",
    [
        ("from meristem.memory.second import x", True),
        ("from . import second", True),
        ("def late():\n    from meristem.memory.third import x", True),
        ("if TYPE_CHECKING:\n    from meristem.memory.third import X", True),
        ("from meristem.memory.fourth import x", False),
    ],
)
def test_planted_circle_is_found(text: str, is_found: bool) -> None:
    others = {
        "second": "from meristem.memory.third import x",
        "third": "from meristem.memory.first import x",
        "fourth": "",
    }
    sources = [planted(text, f"meristem.memory.{name}") for name, text in ({"first": text} | others).items()]
    assert bool(house.circles(sources)) is is_found


DEEP = """
def deep(x):
    for a in x:
        if a:
            pass
        elif x:
            while a:
                try:
                    pass
                except KeyError:
                    {inner}
"""


@pytest.mark.parametrize(
    "text, found",
    [
        ("x = 1\n" * 601, {"meristem.memory.planted": "601 lines in a file, the ceiling is 600"}),
        ("x = 1\n" * 600, {}),
        ("def f():\n" + "    x = 1\n" * 80, {"meristem.memory.planted.f:lines": "81 lines, the ceiling is 80"}),
        ("def f():\n" + "    x = 1\n" * 79, {}),
        (
            "class A:\n    def f(self, a, b, c, d, e, f, *, g, h, i): pass",
            {"meristem.memory.planted.A.f:arguments": "9 arguments, the ceiling is 8"},
        ),
        ("class A:\n    def f(self, a, b, c, d, e, f, *, g, h): pass", {}),
        (
            DEEP.format(inner="with x: pass"),
            {"meristem.memory.planted.deep:levels of nesting": "5 levels of nesting, the ceiling is 4"},
        ),
        (DEEP.format(inner="pass"), {}),
    ],
)
def test_planted_size_is_found(text: str, found: dict[str, str]) -> None:
    assert house.too_large(planted(text)) == found


@pytest.mark.parametrize(
    "check, text, is_found",
    [
        (house.bad_names, "class StateManager: pass", True),
        (house.bad_names, "class Informed: pass", False),
        (house.bad_names, "def do_write(): pass", True),
        (house.bad_names, "data2 = 1", True),
        (house.unfinished, "x = 1  # TODO later", True),
        (house.unfinished, "def f():\n    raise NotImplementedError", True),
        (house.unpickling, "import pickle", True),
        (house.unpickling, "import torch\nx = torch.load('a')", True),
        (house.unpickling, "def f():\n    from torch import save", True),
        (house.unpickling, "x = torch.randn(3).save", False),
        (house.import_hooks, "from jaxtyping import install_import_hook", True),
        (house.import_hooks, "import jaxtyping\njaxtyping.install_import_hook('meristem', None)", True),
        (house.import_hooks, "@jaxtyped(typechecker=beartype)\ndef f(): pass", True),
        (house.import_hooks, "@jaxtyping.jaxtyped\nclass A: pass", True),
        (house.import_hooks, "checked = jaxtyped(f, typechecker=beartype)", False),
        (house.postponed_annotations, "from __future__ import annotations\nimport torch", True),
        (house.postponed_annotations, "from __future__ import annotations\nfrom meristem.shapes import Keys", True),
        (house.postponed_annotations, "from __future__ import annotations\nimport json", False),
        (house.foreign_models, "class Settings(pydantic.BaseModel): pass", True),
        (house.foreign_models, "class Settings(Part): pass", False),
        (house.unknown_letters, "def f(x: Float[Tensor, 'b t q']): pass", True),
        (house.unknown_letters, "def f(x: Float[Tensor, 'b {self.d}']): pass", True),
        (house.unknown_letters, "def f(x: Float[Tensor, '... t d 2']): pass", False),
        (house.unknown_letters, "y_bt = torch.einsum('bti,bti->bt', x_bti, x_bti)", True),
        (house.wrong_suffixes, "def f(keys: Keys): pass", True),
        (house.wrong_suffixes, "def f(keys_btk: Keys | None): pass", True),
        (house.wrong_suffixes, "class A:\n    gate_bthk: Gate", True),
        (house.wrong_suffixes, "def f(keys_bthk: Keys, looked_at_bshk: Keys): pass", False),
        (house.wrong_suffixes, "score_btk = torch.einsum('bthk,bshk->bhts', a_bthk, b_bshk)", True),
        (house.wrong_suffixes, "score_bhts = torch.einsum('bthk,bshk->bhts', a_bthk, b_bshk)", False),
        (house.untyped_tensors, "def f(keys_bthk: torch.Tensor): pass", True),
        (house.untyped_tensors, "class A:\n    def __init__(self, keys_bthk: Tensor | None): pass", True),
        (house.untyped_tensors, "def f(keys_bthk): pass", True),
        (house.untyped_tensors, "def _f(keys_bthk: Tensor): pass", False),
        (house.untyped_tensors, "class A(torch.autograd.Function):\n    def forward(keys_bthk: Tensor): pass", False),
        (house.untyped_tensors, "def f(keys_bthk: Float[Tensor, 'b t h k'], top_k: int): pass", False),
        (house.equal_sizes, "x = torch.randn(2, 5, 5)", True),
        (house.equal_sizes, "x = torch.zeros((3, 3))", True),
        (house.equal_sizes, "x = torch.randint(0, 7, (4, 4))", True),
        (house.equal_sizes, "x = torch.randint(5, 5, (1, 1, 3))", False),
    ],
)
def test_planted_violation_is_found(check: Check, text: str, is_found: bool) -> None:
    assert bool(check(planted(text))) is is_found


def test_planted_init_is_found() -> None:
    assert house.filled_init(planted('"""Docstring."""\nimport torch', is_package=True))
    assert not house.filled_init(planted('"""Docstring."""', is_package=True))
    assert not house.filled_init(planted("import torch"))


@pytest.mark.parametrize("place", ["https://{}.org/simple", "index = files.{}hosted.org", "/{}/main/x"])
def test_planted_place_is_found(place: str) -> None:
    word = {"h": "pypi", "i": "python", "/": "work"}[place[0]]
    assert house.private_places("README.md", f"fine\n{place.format(word)}") == [f"README.md:2: {place.format(word)}"]


def test_a8_12_nothing_stands_in_for_what_is_not_installed() -> None:
    """A8.12: a library that is missing is an error or a choice that is said, never a value of ours in its place."""
    hold(house.stand_ins, PACKAGE)
    planted = "try:\n    import torch\nexcept ImportError:\n    torch = None\n"
    assert house.stand_ins(house.Module("meristem.planted", planted)) != []
