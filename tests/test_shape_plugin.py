"""The shape checks of the test run: present where promised, absent in compiled code and in the product run."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import ModuleType

import pytest
import torch
from jaxtyping import TypeCheckError

import shape_plugin
from meristem import shapes

ROOT = Path(__file__).parents[1]

HEADER = """
import torch
from jaxtyping import Float
from torch import Tensor
from meristem.shapes import Gate, Keys, Tokens, Values
"""

ADD = """
def add(left_bthk: Keys, right_bthk: Keys) -> Keys:
    return left_bthk + right_bthk
REGISTRY = {"add": add}
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Imports source text as a package of its own, under the finder of the plugin."""
    finders = []

    def load(text: str, is_strict: bool = False) -> ModuleType:
        name = f"planted_{abs(hash((text, is_strict, tmp_path)))}"
        (tmp_path / f"{name}.py").write_text(HEADER + text)
        invalidate_caches()
        finders.append(shape_plugin.install(name, is_strict))
        return import_module(name)

    monkeypatch.syspath_prepend(str(tmp_path))
    yield load
    for finder in finders:
        sys.meta_path.remove(finder)


def is_wrapped(function: object) -> bool:
    return hasattr(function, "__wrapped__")


def test_the_package_is_checked(pytestconfig: pytest.Config) -> None:
    """In this very run, in the workers of xdist too, the package's own functions carry their checks."""
    scan = import_module("meristem.memory.rule").scan
    assert is_wrapped(scan) == (pytestconfig.getoption("shape_checks") != "off")


def test_a_fitting_call_passes(planted: Callable[..., ModuleType]) -> None:
    keys_bthk = torch.randn(2, 3, 5, 7)
    assert torch.equal(planted(ADD).add(keys_bthk, keys_bthk), keys_bthk + keys_bthk)


@pytest.mark.parametrize(
    "right_bthk, message",
    [
        (torch.randn(2, 11, 5, 7), "right_bthk"),
        (torch.randn(2, 3, 5), "right_bthk"),
        (torch.ones(2, 3, 5, 7, dtype=torch.int64), "right_bthk"),
        (None, "right_bthk"),
    ],
)
def test_mismatch_raises_in_eager(planted: Callable[..., ModuleType], right_bthk: object, message: str) -> None:
    """Another size under the same letter, another rank, another dtype, no tensor at all."""
    with pytest.raises(TypeCheckError, match=message):
        planted(ADD).add(torch.randn(2, 3, 5, 7), right_bthk)


def test_captured_reference_checked(planted: Callable[..., ModuleType]) -> None:
    """SH-2: A function that went into a registry at import is checked there as well."""
    with pytest.raises(TypeCheckError):
        planted(ADD).REGISTRY["add"](torch.randn(2, 3, 5, 7), torch.randn(2, 5, 3, 7))


def test_the_result_is_checked(planted: Callable[..., ModuleType]) -> None:
    module = planted("def swap(keys_bthk: Keys) -> Keys:\n    return keys_bthk.transpose(1, 2)")
    with pytest.raises(TypeCheckError, match="return value"):
        module.swap(torch.randn(2, 3, 5, 7))


@pytest.mark.parametrize(
    "hint, value",
    [
        ("Gate | None", torch.randn(2, 3)),
        ("tuple[Gate, int]", (torch.randn(2, 3), 1)),
        ("dict[str, Gate]", {"a": torch.randn(2, 3)}),
        ("Float[Tensor, 'b t 4']", torch.randn(2, 3, 5)),
    ],
)
def test_shapes_inside_other_types_are_checked(planted: Callable[..., ModuleType], hint: str, value: object) -> None:
    with pytest.raises(TypeCheckError):
        planted(f"def take(value: {hint}) -> None: pass").take(value)


def test_methods_of_every_kind_are_checked(planted: Callable[..., ModuleType]) -> None:
    module = planted(
        """
class Layer(torch.nn.Module):
    def forward(self, keys_bthk: Keys) -> Keys: return keys_bthk
    @staticmethod
    def static(keys_bthk: Keys) -> Keys: return keys_bthk
    @classmethod
    def of_class(cls, keys_bthk: Keys) -> Keys: return keys_bthk
    @property
    def value(self) -> Keys: return torch.zeros(3, 2)
"""
    )
    layer = module.Layer()
    for method in (layer, layer.static, module.Layer.of_class):
        method(torch.randn(2, 3, 5, 7))
        with pytest.raises(TypeCheckError):
            method(torch.randn(2, 3))
    with pytest.raises(TypeCheckError):
        layer.value  # noqa: B018 - reading it is the call


def test_what_names_no_shape_is_its_own_object(planted: Callable[..., ModuleType]) -> None:
    """Functions without shapes and generators are left as they are."""
    module = planted(
        """
def plain(x: int, like: Tensor) -> "str": return x
def each(keys_bthk: Keys): yield keys_bthk
"""
    )
    assert not is_wrapped(module.plain)
    assert not is_wrapped(module.each)


def test_mixed_device_is_refused(planted: Callable[..., ModuleType]) -> None:
    with pytest.raises(TypeError, match="add was given tensors on cpu and meta"):
        planted(ADD).add(torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7, device="meta"))


@pytest.mark.parametrize("text", ["def f(a_bt: 'Tokens'): pass", "def f(a_bt: 'Tensor | None'): pass"])
def test_shapes_in_text_are_refused(planted: Callable[..., ModuleType], text: str) -> None:
    with pytest.raises(TypeError, match=r"f hides shapes in text \(a_bt: "):
        planted(text)


LOCALS = """
def shorten(keys_bthk):
    {line}
    return keys_bthk
"""


@pytest.mark.parametrize(
    "line",
    [
        "sum_bth = keys_bthk",
        "sum_bth: object = keys_bthk",
        "sum_bth, other = keys_bthk, 1",
        "if True: sum_bth = keys_bthk",
    ],
)
def test_strict_checks_locals(planted: Callable[..., ModuleType], line: str) -> None:
    """A local whose suffix names three axes cannot hold four; without strict it can."""
    text = LOCALS.format(line=line)
    planted(text).shorten(torch.randn(2, 3, 5, 7))
    with pytest.raises(TypeError, match=r"sum_bth has the shape \(2, 3, 5, 7\); its suffix promises 3 axes"):
        planted(text, is_strict=True).shorten(torch.randn(2, 3, 5, 7))


def test_strict_passes_what_fits(planted: Callable[..., ModuleType]) -> None:
    text = LOCALS.format(line="copy_bthk = keys_bthk; last_t = 4; cold = keys_bthk")
    planted(text, is_strict=True).shorten(torch.randn(2, 3, 5, 7))


def test_suffix_letters_are_the_legend() -> None:
    """The plugin must not import the package to learn the letters, so it repeats them."""
    assert set(shape_plugin.SUFFIX.pattern) & set("abcdefghijklmnopqrstuvwxyz") == shapes.LEGEND.keys()


@pytest.mark.compiled
@pytest.mark.parametrize("is_strict", [False, True])
def test_compiled_code_is_untouched(planted: Callable[..., ModuleType], is_strict: bool) -> None:
    """SH-2: One graph without a break holds the raw functions; forward and backward agree with eager."""
    text = """
def add(left_bthk: Keys, right_bthk: Keys) -> Keys:
    sum_bthk = left_bthk + right_bthk
    return sum_bthk
def twice(keys_bthk: Keys) -> Keys:
    return add(keys_bthk, keys_bthk.sin())
"""
    module = planted(text, is_strict)
    compiled = torch.compile(module.twice, backend="aot_eager", fullgraph=True, dynamic=True)
    for n_time in (3, 11):
        eager_bthk = torch.randn(2, n_time, 5, 7, requires_grad=True)
        fast_bthk = eager_bthk.detach().clone().requires_grad_()
        module.twice(eager_bthk).square().sum().backward()
        compiled(fast_bthk).square().sum().backward()
        torch.testing.assert_close(fast_bthk.grad, eager_bthk.grad)
    assert torch._dynamo.explain(module.twice)(torch.randn(2, 3, 5, 7)).graph_count == 1


def test_transforms_pass_through(planted: Callable[..., ModuleType]) -> None:
    """vmap over grad, functional_call and meta tensors see the axes that the signature names."""
    module = planted(
        ADD
        + """
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain_hk = torch.nn.Parameter(torch.ones(5, 7))
    def forward(self, keys_bthk: Keys) -> Keys:
        return keys_bthk * self.gain_hk
"""
    )
    many = torch.randn(11, 2, 3, 5, 7)
    gradients = torch.func.vmap(torch.func.grad(lambda keys_bthk: module.add(keys_bthk, keys_bthk).sum()))(many)
    torch.testing.assert_close(gradients, torch.full_like(many, 2.0))
    doubled = torch.func.functional_call(module.Layer(), {"gain_hk": torch.full((5, 7), 2.0)}, (many[0],))
    torch.testing.assert_close(doubled, 2 * many[0])
    assert module.add(many[0].to("meta"), many[0].to("meta")).is_meta


def run_pytest(test: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    return subprocess.run([*command, *options, str(test)], cwd=ROOT, capture_output=True, text=True, check=False)


def test_off_is_identity(tmp_path: Path) -> None:
    """SH-2: Switched off, as in the product run: no wrapper, no beartype."""
    test = tmp_path / "test_off.py"
    test.write_text(
        """
import sys
from meristem.memory.rule import scan
def test_raw():
    assert scan.__code__.co_name == "scan" and not hasattr(scan, "__wrapped__")
    assert "beartype" not in sys.modules
"""
    )
    done = run_pytest(test, "--shape-checks=off")
    assert done.returncode == 0, done.stdout


def test_too_late_is_an_error() -> None:
    program = "import meristem.errors, pytest; pytest.main(['--collect-only'])"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "shape_plugin came too late: meristem, meristem.errors imported already. Load it with -p." in done.stderr
