"""One registry for all kinds: suggestions, plugins of other distributions, and what is said when they fail."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from meristem.errors import PluginConflict, PluginError, PluginTooOld, WrongValue
from meristem.plugins import Finding, Origin, Registry


def install(site: Path, distribution: str, module: str, source: str, kind: str, entries: dict[str, str]) -> None:
    """Lay a distribution with one module and its entry points into the folder ``site``, as pip would."""
    info = site / f"{distribution.replace('-', '_')}-1.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[meristem.{kind}]", *lines, ""]))
    (site / f"{module}.py").write_text(source)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_names_are_compared_without_case() -> None:
    assert Registry("rule", {"Titans": len}).get("tiTANS") is len


def test_suggestions() -> None:
    """CX-14.1: An unknown name is answered with the nearest three."""
    rules = Registry("rule", dict.fromkeys(["titans", "delta", "hebbian", "titans-mlp", "tiny"], len))
    with pytest.raises(
        WrongValue, match=r"^no rule is called 'titan'\. Nearest: titans, titans-mlp, tiny\.$"
    ) as caught:
        rules.get("titan")
    assert caught.value.fields["nearest"] == ["titans", "titans-mlp", "tiny"]


def test_text_entries_are_imported_when_asked_for() -> None:
    rules = Registry("rule", {"join": "posixpath:join"})
    assert rules.names() == ["join"]
    assert rules.get("join")("a", "b") == "a/b"


def test_a_name_is_taken_once() -> None:
    rules = Registry("rule", {"delta": len})
    with pytest.raises(PluginConflict, match="a rule called 'delta' is registered already"):
        rules.register("DELTA", max)
    assert rules.get("delta") is len


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ä"])
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(WrongValue, match="cannot name a rule"):
        Registry("rule", {name: len})


def test_plugin_is_found_and_loaded_on_first_use(site: Path) -> None:
    """CX-14.3."""
    install(site, "far", "far_away", "MERISTEM_API = 1\ndef rule(): return 7\n", "test1", {"distant": "far_away:rule"})
    rules = Registry("test1", {"near": len})
    assert rules.names() == ["distant", "near"]
    assert "far_away" not in sys.modules
    assert rules.get("Distant")() == 7


def test_ours_rank_above_plugins(site: Path) -> None:
    """CX-14.2."""
    install(site, "far2", "far_away2", "raise RuntimeError\n", "test2", {"near": "far_away2:rule"})
    assert Registry("test2", {"near": len}).get("near") is len


def test_conflict_names_both_distributions(site: Path) -> None:
    """CX-14.2."""
    for name in ("one", "two"):
        install(site, name, f"m_{name}", "MERISTEM_API = 1\n", "test3", {"same": f"m_{name}:rule"})
    with pytest.raises(
        PluginConflict, match=r"'same' is offered by (one 1\.5 and two 1\.5|two 1\.5 and one 1\.5)"
    ) as caught:
        Registry("test3", {}).get("same")
    assert sorted(caught.value.fields["distributions"]) == ["one 1.5", "two 1.5"]


def test_old_api_names_both_versions(site: Path) -> None:
    """CX-14.4."""
    install(site, "old", "m_old", "MERISTEM_API = 1\ndef rule(): pass\n", "test4", {"old": "m_old:rule"})
    with pytest.raises(PluginTooOld, match="built for version 1 of the test4 interface; this meristem has version 2"):
        Registry("test4", {}, api=2).get("old")


def test_failing_plugin_carries_all_fields(site: Path) -> None:
    """CX-14.3."""
    install(site, "bad", "m_bad", "raise ZeroDivisionError('odd')\n", "test5", {"bad": "m_bad:rule"})
    with pytest.raises(
        PluginError, match=r"the test5 'bad' of bad 1\.5 \(m_bad:rule\) cannot be loaded: ZeroDivision"
    ) as caught:
        Registry("test5", {}).get("bad")
    assert caught.value.fields == {
        "kind": "test5",
        "name": "bad",
        "distribution": "bad",
        "version": "1.5",
        "entry_point": "m_bad:rule",
        "cause": "ZeroDivisionError('odd')",
    }


def test_check_goes_through_all(site: Path) -> None:
    """CX-14.3: Good, broken, wrong and doubled plugins each get their finding; one failure hides no other."""
    kind = "test6"
    install(site, "good", "g_good", "MERISTEM_API = 1\ndef rule(): pass\n", kind, {"good": "g_good:rule"})
    install(site, "broken", "g_broken", "import nowhere_at_all\n", kind, {"broken": "g_broken:rule"})
    install(site, "number", "g_number", "MERISTEM_API = 1\nrule = 3\n", kind, {"number": "g_number:rule"})
    install(site, "silent", "g_silent", "def rule(): pass\n", kind, {"silent": "g_silent:rule"})
    install(site, "twin-a", "g_twin_a", "MERISTEM_API = 1\ndef rule(): pass\n", kind, {"twin": "g_twin_a:rule"})
    install(site, "twin-b", "g_twin_b", "MERISTEM_API = 1\ndef rule(): pass\n", kind, {"twin": "g_twin_b:rule"})
    registry = Registry(kind, {"own": len, "lost": "posixpath:nothing"})
    findings = [registry.check(origin) for origin in registry.origins()]
    assert [(found.origin.distribution, found.origin.name, found.error) for found in findings] == [
        ("broken", "broken", "PluginError"),
        ("good", "good", ""),
        ("meristem", "lost", "AttributeError"),
        ("number", "number", "PluginError"),
        ("meristem", "own", ""),
        ("silent", "silent", "PluginTooOld"),
        ("twin-a", "twin", "PluginConflict"),
        ("twin-b", "twin", "PluginConflict"),
    ]


def test_one_entry_is_checked_as_all_are(site: Path) -> None:
    """The one that ``origins`` lists, hidden behind ours or not."""
    kind = "test7"
    install(site, "late", "l_late", "MERISTEM_API = 1\nrule = 3\n", kind, {"own": "l_late:rule", "far": "l_late:no"})
    registry = Registry(kind, {"own": "posixpath:join"})
    found = {(origin.name, origin.is_ours): registry.check(origin).error for origin in registry.origins()}
    assert found == {("own", True): "", ("own", False): "PluginError", ("far", False): "PluginError"}


def test_finding_as_json() -> None:
    assert Finding(Origin("rule", "a", "d", "1", "m:a"), error="PluginError", cause="why").to_json() == {
        "kind": "rule",
        "name": "a",
        "distribution": "d",
        "version": "1",
        "entry_point": "m:a",
        "ok": False,
        "error": "PluginError",
        "cause": "why",
    }


def test_a_thousand_entries_list_fast_and_unimported() -> None:
    """CX-14.3: Listing reads names only: none of the modules exists."""
    rules = Registry("rule", {f"rule-{index}": f"nowhere_{index}:rule" for index in range(1000)})
    spent_s = []
    for _ in range(20):
        begin = time.perf_counter()
        assert len(rules.names()) == 1000
        spent_s.append(time.perf_counter() - begin)
    assert min(spent_s) < 0.05


def test_plugins_need_no_torch() -> None:
    program = "import sys, meristem.plugins; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )
