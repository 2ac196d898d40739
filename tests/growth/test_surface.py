"""What the room shows, and where its docstrings send a reader (K6, K7, T8, T9, T10)."""

import re
from pathlib import Path

import pytest

import house
import meristem.growth as grow

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
ROOMS = {"k6": "", "t8": "policy heuristic schedule proposal", "t10": "report"}


@pytest.mark.parametrize("room", ROOMS)
def test_k6_t8_t10_docstrings_send_a_reader_to_pages_that_are_there(room: str) -> None:
    """Every page that a module of growth names is in docs, and what that says of the room is true of the code."""
    wanted = ROOMS[room].split()
    sources = house.modules(ROOT / "src/meristem/growth", "meristem.growth")
    sources = [each for each in sources if not wanted or each.name.rpartition(".")[2] in wanted]
    assert len(sources) >= max(1, len(wanted))
    for source in sources:
        named = set(re.findall(r"([\w-]+\.md)\b", source.text))
        assert named <= PAGES.keys() | {"memory.md", "platform.md"}, source.name


def test_k7_public_names_are_an_explicit_short_list() -> None:
    """Each once, each there, each on the page, and nothing more comes with a star."""
    assert len(set(grow.__all__)) == len(grow.__all__) <= 50
    found: dict[str, object] = {}
    exec("from meristem.growth import *", found)
    assert found.keys() - {"__builtins__"} == set(grow.__all__)
    text = (ROOT / "src/meristem/growth/__init__.py").read_text(encoding="utf-8")
    assert set(re.findall(r"import (\w+) as \1", text)) == set(grow.__all__)
    assert [name for name in grow.__all__ if not re.search(rf"\b{name}\b", PAGES["growth.md"])] == []
