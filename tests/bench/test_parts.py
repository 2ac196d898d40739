"""Pages of figures that are measured part by part."""

import orjson
import pytest

from meristem.bench import parts, speeds
from meristem.bench.measure import Row
from meristem.bench.serving import study
from meristem.cli import run
from meristem.errors import ConfigError, WrongValue

ROWS = [
    Row("fast enough", 2.0, "x", 1.0),
    Row("too slow", 1234.5, "ms", 100.0, "<=", "a note"),
    Row("so", 3.0, "s"),
    Row("not here", None, "x", 2.0),
]
PAGES = {"serving": (study.PARTS, study.page), "speeds": (speeds.PARTS, lambda report: speeds.page(report, {}))}


def found(name: str, *rows: Row) -> dict:
    return parts.measured(name, 3, iter(rows), lambda row: None)


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_says_what_was_asked_and_missed(kind, tmp_path):
    known, page = PAGES[kind]
    name = [*known.names][0]
    report = known.report([found(name, *ROWS)], "meristem bench")
    parts.write(tmp_path / "page.md", report, page(report))
    text = (tmp_path / "page.md").read_text()
    assert "| fast enough | 2 x | >= 1 | met |  |" in text
    assert "| too slow | 1,234 ms | <= 100 | **missed** | a note |" in text
    assert "| not here | - | >= 2 |  |  |" in text
    (part,) = report["parts"]
    assert f"| {known.names[name]} | {part['date']} | {part['load_average']:.1f} | `meristem bench` |" in text
    assert known.read(tmp_path / "page.md") == report
    assert [row["is_met"] for row in part["rows"]] == [True, False, None, None]


def test_what_falls_short_has_its_reason(tmp_path):
    """Or the page says that there is none; what is met has none."""
    report = speeds.PARTS.report([found("model", *ROWS), found("hope", Row("slow too", 1.0, "x", 2.0))], "all")
    limits = "limits:\n  too s*: The disk is.\n  too slow: Later.\n  fast enough: Not said.\n"
    (tmp_path / "limits.yaml").write_text(limits)
    text = speeds.page(report, speeds.read_limits(tmp_path / "limits.yaml"))
    short = text.split("## What falls short")[1]
    assert "| too slow | 1,234 ms | <= 100 | The disk is. |" in short
    assert f"| slow too | 1 x | >= 2 | {speeds.UNEXPLAINED} |" in short
    assert "fast enough" not in short and "Not said" not in text
    (tmp_path / "limits.yaml").write_text("limit: {}\n")
    with pytest.raises(ConfigError, match="limits"):
        speeds.read_limits(tmp_path / "limits.yaml")
    assert "Nothing." in speeds.page(speeds.PARTS.report([found("model", ROWS[0])], "all"), {})


@pytest.mark.parametrize("kind", PAGES)
def test_a_part_that_is_measured_again_replaces_itself_alone(kind, tmp_path):
    known, page = PAGES[kind]
    first, second, third = [*known.names][:3]
    out = tmp_path / "page.md"
    assert known.read(out) is None
    earlier = known.report([found(name, Row(f"{name} first", 1.0, "x")) for name in (second, third)], "both")
    parts.write(out, earlier, page(earlier))
    again, new = found(third, Row("again", 2.0, "x")), found(first, Row("new", 2.0, "x"))
    report = known.report([again, new], "one", known.read(out))
    said = [(part["part"], part["command"], part["rows"][0]["name"]) for part in report["parts"]]
    assert said == [(first, "one", "new"), (second, "both", f"{second} first"), (third, "one", "again")]
    with pytest.raises(WrongValue, match="another machine"):
        known.report([again | {"torch": "1.0"}], "one", report)
    out.with_suffix(".json").write_bytes(orjson.dumps({"schema": "meristem.serve-bench/1"}))
    assert known.read(out) is None


def test_the_command_keeps_the_parts_that_it_does_not_measure(tmp_path, capsys):
    out = tmp_path / "pages" / "page.md"
    assert run(["bench", "all", "--part", "nothing", "--out", str(out)]) == 2
    assert "there are memory, rules, model" in capsys.readouterr().err and not out.parent.exists()
    for _ in range(2):
        assert run(["bench", "all", "--part", "start", "--repeats", "1", "--out", str(out)]) in (0, 1)
        earlier = speeds.PARTS.report([found("hope", *ROWS)], "both", speeds.PARTS.read(out))
        assert [part["part"] for part in earlier["parts"]] == ["hope", "start"]
        parts.write(out, earlier, speeds.page(earlier, {}))
    assert "## HOPE" in out.read_text() and "## Starting the program" in out.read_text()
