"""The presets of papers: every number says where it is from, and every size has the size that it is called by."""

from itertools import product

import pytest
import torch

from meristem.config import size_names, sized, sources
from meristem.errors import WrongValue
from meristem.models.build import build
from meristem.runs.config import load_config

PAPERS = (
    *("default", "titans-mac", "titans-mag", "titans-mal", "lmm", "moneta", "yaad", "memora", "lattice", "trellis"),
    *("atlas-mag", "hope", "hope-attention", "gated-delta", "tnt-titans"),
)
MILLIONS = {"60m": 60, "340m": 340, "760m": 760, "1.3b": 1300}


def test_every_preset_of_a_paper_comes_in_every_size():
    assert set(sized()) == set(PAPERS)
    assert size_names() == ["1.3b", "340m", "60m", "760m", "micro", "small"]


@pytest.mark.parametrize("name, size", [*product(PAPERS, ["", *size_names()])])
def test_every_number_of_a_paper_preset_has_a_source(name, size):
    """S4-M13: a missing note fails."""
    preset = f"{name}-{size}" if size else name
    loaded, told = load_config(preset, environment={}), sources(preset)
    set_here = {path for path, place in loaded.why.items() if place != "defaults"}
    asked = {path for path in set_here if path.split(".")[0] in ("model", "memory", "optim")}
    assert asked - told.keys() == set(), f"{preset} sets these without saying where they are from"
    assert told.keys() - set_here == set(), f"{preset} gives a source for what it does not set"
    assert all(told.values())


@pytest.mark.parametrize("name, size", [*product(PAPERS, MILLIONS)])
def test_a_size_is_what_it_is_called(name, size):
    """S4-M13: within a tenth, on the meta device, where nothing is allocated."""
    config = load_config(f"{name}-{size}", environment={}).tree
    with torch.device("meta"):
        model = build(config.model, config.memory, config.tokenizer.vocab_size, random_seed=0)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert abs(millions / MILLIONS[size] - 1) < 0.1, f"{millions:.1f} M"


def test_small_is_the_preset_itself():
    assert load_config("hope-small", environment={}).tree == load_config("hope", environment={}).tree


@pytest.mark.parametrize("asked, nearest", [("hope-smal", "hope-small"), ("titans-mac-340", "titans-mac-340m")])
def test_an_unknown_size_is_answered_with_the_nearest(asked, nearest):
    with pytest.raises(WrongValue, match=f"no preset is called '{asked}'. Nearest: .*{nearest}"):
        load_config(asked, environment={})


def test_a_preset_without_sources_has_no_sizes():
    with pytest.raises(WrongValue, match="no preset is called 'charrnn-340m'"):
        load_config("charrnn-340m", environment={})
