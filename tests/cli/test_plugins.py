"""``meristem plugins`` finds whatever a configuration may name, and survives what others have installed."""

import sys
import time
from pathlib import Path

import pytest

from meristem.cli import plugins, run
from meristem.errors import WrongValue
from meristem.memory.bias import biases
from meristem.memory.features import features
from meristem.memory.forms import forms
from meristem.memory.named import rules
from meristem.memory.retention import retentions
from meristem.memory.structure import structures
from meristem.memory.update import updates


@pytest.mark.parametrize("registry", [rules, structures, biases, retentions, updates, features, forms])
def test_rules_their_parts_and_forms_are_listed(answered, registry):
    """Each kind by itself, and all of it."""
    code, found = answered("plugins", "ls", "--kind", registry.kind)
    assert (code, [row["name"] for row in found]) == (0, registry.names())
    assert {row["kind"] for row in found} == {registry.kind}


def test_every_kind_is_listed(answered):
    kinds = [row["kind"] for row in answered("plugins", "ls")[1]]
    ours = "memory structure bias retention update features form model change mixer blueprint blend policy drill sink"
    ours += " task metric continual_metric"
    assert sorted(set(kinds)) == sorted(ours.split())


def test_all_of_them_load(answered):
    code, findings = answered("plugins", "check")
    assert code == 0 and all(finding["ok"] for finding in findings)


SAYS = "MERISTEM_API = 1\ndef rule(): pass\n"
FOREIGN = {
    "bad": "import nowhere_at_all\n",
    "crash": f"{SAYS}import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
    "good": f"{SAYS}print('loading', flush=True)\n",
    "hang": f"{SAYS}import time\ntime.sleep(600)\n",
    "leave": f"{SAYS}import os\nos._exit(7)\n",
}


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Distributions with one rule each: a good one and four that do harm to whoever imports them."""
    for name, source in FOREIGN.items():
        info = tmp_path / f"foreign_{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: foreign-{name}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[meristem.memory]\nforeign-{name} = foreign_{name}:rule\n")
        (tmp_path / f"foreign_{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rules, "_plugins", None)


@pytest.mark.fault
def test_ta2_a_plugin_that_hangs_or_crashes_is_a_finding(answered, foreign):
    """Each in its own way; the others are loaded all the same, in an order and with fields that do not change."""
    begun_s = time.perf_counter()
    code, findings = answered("plugins", "check", "--kind", "memory", "--load-s", "2")
    assert code == 1 and time.perf_counter() - begun_s < 60
    assert [found["name"] for found in findings] == rules.names()
    theirs = {found["name"]: found for found in findings if found["distribution"] != "meristem"}
    assert {name: found["error"] for name, found in theirs.items()} == {
        "foreign-bad": "PluginError",
        "foreign-crash": "WorkerDied",
        "foreign-good": "",
        "foreign-hang": "WorkerTimeout",
        "foreign-leave": "WorkerDied",
    }
    assert all(found["ok"] for name, found in theirs.items() if name == "foreign-good")
    assert (
        "the memory 'foreign-hang' of foreign-hang 1.5 (foreign_hang:rule) was not loaded after 2 s"
        in (theirs["foreign-hang"]["cause"])
    )
    assert "it was ended by SIGSEGV" in theirs["foreign-crash"]["cause"]
    assert "it left with exit code 7" in theirs["foreign-leave"]["cause"]
    assert set(theirs["foreign-hang"]) == set(next(found for found in findings if found["ok"]))
    assert not [name for name in sys.modules if name.startswith("foreign_")], "none of them came into this process"


def test_our_own_entries_need_no_process(monkeypatch):
    """Without plugins nothing is started."""
    monkeypatch.setattr("meristem.worker.process.Worker", None)
    assert all(not finding.error for finding in plugins.findings("memory"))


def test_a_kind_that_is_not_there_is_refused():
    with pytest.raises(WrongValue, match="nothing is registered as a 'memry'"):
        plugins.findings("memry")
    assert run(["plugins", "check", "--load-s", "0"]) == 2
