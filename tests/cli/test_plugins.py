"""``meristem plugins`` finds whatever a configuration may name."""

import pytest

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
    assert sorted(set(kinds)) == sorted(
        ["memory", "structure", "bias", "retention", "update", "features", "form", "model", "mixer"]
    )


def test_all_of_them_load(answered):
    code, findings = answered("plugins", "check")
    assert code == 0 and all(finding["ok"] for finding in findings)
