"""An ablation: variants of one size on the same tokens, resumable, and said in plain words."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from bench.ablations import listed
from meristem.bench import trial as trials_module
from meristem.bench.ablation import finished, n_parameters, read_ablation, run_trials, trials
from meristem.bench.study import study
from meristem.bench.trial import Figures, Outcome
from meristem.bench.verdict import paired, sentences, table, unpaired
from meristem.errors import BadRecords, ConfigError, ConflictingKeys, NonFinite, UnknownKey

ROOT = Path(__file__).parents[2]


def test_all_variants_have_the_same_size(tmp_path):
    """Within a fiftieth, whatever their parts cost; the width of the feed-forward layers makes up for it."""
    planned = trials(read_ablation(listed(tmp_path)))
    counts = {trial.variant: trial.n_parameters for trial in planned}
    assert [trial.name for trial in planned] == ["attention-0", "titans-0", "attention-1", "titans-1"]
    assert abs(counts["attention"] / counts["titans"] - 1) <= 0.02
    attention, titans = (next(t.config for t in planned if t.variant == name) for name in ("attention", "titans"))
    assert attention.model.mlp_dim > 64 and titans.model.mlp_dim == 0
    assert all(n_parameters(trial.config, 256) == trial.n_parameters for trial in planned)
    assert {trial.config.run.seed for trial in planned} == {0, 1}


def test_what_is_listed_in_the_documents_can_be_compared():
    """docs/ablation.yaml: the variants that issue 4 asks for, of one size."""
    part = read_ablation(ROOT / "docs" / "ablation.yaml")
    assert len(part.seeds) == 3
    asked = {"attention", "gated-delta", "titans", "mlp-memory", "hope", "hope-gelu", "titans-levels"}
    assert asked | {"delta-descent", "gradient-descent"} <= part.variants.keys()
    assert part.variants["delta-descent"].against == ("gradient-descent",)


def test_a_study_runs_writes_and_is_not_run_again(tmp_path):
    """S4-M10: every variant from every seed, a page, the JSON beside it and a picture; then nothing is left."""
    config, out, said = listed(tmp_path), tmp_path / "results.md", []
    report = study(config, out, jobs=1, say=said.append)
    assert [o["name"] for o in report["outcomes"]] == ["attention-0", "titans-0", "attention-1", "titans-1"]
    assert json.loads((tmp_path / "results.json").read_text()) == report
    text = out.read_text()
    assert "| `titans` | 2 |" in text and "`titans` against `attention`" in text and "elsewhere, 12 against 13" in text
    assert "![" in text and (tmp_path / "results.png").stat().st_size > 0
    for outcome in report["outcomes"]:
        figures = outcome["figures"]
        assert 0 < figures["bits_per_byte"] < 12 and figures["state_bytes"] > 0 and figures["tokens_per_s"] > 0
        assert [tokens for tokens, _ in figures["curve"]] == [64, 128]
    attention, titans = report["outcomes"][0]["figures"], report["outcomes"][1]["figures"]
    assert attention["on"] == attention["off"] and titans["on"] != titans["off"]
    runs = sorted(path.name for path in (tmp_path / "runs" / "ablation").iterdir())
    began = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "ablation").rglob("*.ndjson")}
    again, heard = study(config, out, jobs=1, say=said.append), said[-1]
    assert again["outcomes"] == report["outcomes"] and heard
    assert began == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "ablation").rglob("*.ndjson")}
    assert runs == sorted(path.name for path in (tmp_path / "runs" / "ablation").iterdir())


def test_other_settings_are_other_runs(tmp_path):
    """What was measured with other numbers of steps is neither shown nor overwritten in its directory."""
    planned = trials(read_ablation(listed(tmp_path)))
    known = [outcome_of(trial.name, 2.0, fingerprint=trial.fingerprint) for trial in planned]
    assert finished(planned, known).keys() == {trial.name for trial in planned}
    longer = trials(read_ablation(listed(tmp_path, "train.steps=5")))
    assert finished(longer, known) == {}
    assert not {trial.directory for trial in planned} & {trial.directory for trial in longer}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    planned = trials(read_ablation(listed(tmp_path, f"run.dir={tmp_path / 'one'}")))[:2]
    alone = {o.name: o.figures for o in run_trials(planned, jobs=1)}
    elsewhere = [
        replace(
            t, config=t.config.model_copy(update={"run": t.config.run.model_copy(update={"dir": tmp_path / "two"})})
        )
        for t in planned
    ]
    both = {o.name: o.figures for o in run_trials(elsewhere, jobs=2)}
    assert {name: replace(f, tokens_per_s=0.0) for name, f in both.items()} == {
        name: replace(f, tokens_per_s=0.0) for name, f in alone.items()
    }


def test_a_run_that_cannot_be_trained_is_a_result(tmp_path, monkeypatch):
    """It stands below the table; the other runs go on."""

    def fails(config, **rest):
        raise NonFinite("loss was not finite in 10 steps in a row", step=7)

    monkeypatch.setattr(trials_module, "pretrain", fails)
    part = read_ablation(listed(tmp_path))
    outcomes = list(run_trials(trials(part)[:2], jobs=1))
    assert [o.figures for o in outcomes] == [None, None]
    assert "`titans` from seed 0 ended before it was trained: loss was not finite" in "\n".join(
        sentences(part, outcomes)
    )
    assert Outcome.from_json(outcomes[0].to_json()) == outcomes[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"same_size_as": "titan"}, "same_size_as names 'titan'.*there are attention, titans"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        read_ablation(listed(tmp_path, **change))


def test_an_unknown_key_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UnknownKey, match="sedes.*seeds"):
        read_ablation(listed(tmp_path, sedes=[0]))


def test_variants_that_read_other_tokens_are_refused_with_all_reasons(tmp_path):
    variants = {
        "titans": {"preset": "titans-mag", "settings": ["model.n_heads=2", "memory.head_dim=8"]},
        "long": {"preset": "titans-mag", "settings": ["model.n_heads=2", "memory.head_dim=8", "train.steps=9"]},
    }
    path = listed(tmp_path, "train.max_time=3s", variants=variants)
    with pytest.raises(ConflictingKeys, match="long differs from titans in train; train.max_time is 3 s"):
        trials(read_ablation(path))


def test_a_variant_that_cannot_have_the_size_is_refused(tmp_path):
    small = {"preset": "attention", "settings": ["model.n_heads=2", "model.n_layers=8"]}
    titans = {"preset": "titans-mag", "settings": ["model.n_heads=2", "memory.head_dim=8"]}
    with pytest.raises(ConflictingKeys, match="'titans' has [0-9,]+ parameters.*deep has [0-9,]+ with model.mlp_dim=1"):
        trials(read_ablation(listed(tmp_path, variants={"deep": small, "titans": titans})))


def test_a_file_of_other_results_is_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text('{"schema": "meristem.bench/1"}')
    with pytest.raises(BadRecords, match="holds no results of an ablation.*meristem.bench/1.*another --out"):
        study(listed(tmp_path), tmp_path / "results.md", jobs=1, say=print)


def outcome_of(name, bits, on=0.1, off=0.1, fingerprint=""):
    variant, _, seed = name.rpartition("-")
    gains = [
        {"gain_bits_per_byte": v, "again_reset_bits_per_byte": 2.0, "again_kept_bits_per_byte": 1.9} for v in (on, off)
    ]
    figures = Figures(
        bits_per_byte=bits,
        recall=0.004,
        chance=0.003,
        on=gains[0],
        off=gains[1],
        tokens_per_s=1000.0,
        state_bytes=4096,
        curve=((10, 3.0), (20, bits)),
    )
    return Outcome(name, variant, int(seed), fingerprint, 1000, 8, figures)


def said_of(tmp_path, ours, theirs, **more):
    part = read_ablation(listed(tmp_path))
    outcomes = [outcome_of(f"titans-{seed}", bits, **more) for seed, bits in enumerate(ours)]
    outcomes += [outcome_of(f"attention-{seed}", bits) for seed, bits in enumerate(theirs)]
    return list(sentences(part, outcomes)), table(part, outcomes)


def test_what_has_no_effect_is_said_as_plainly_as_what_has(tmp_path):
    """S4-M10. Two standard errors are the bound: 0.1 apart with a deviation of 0.1 is nothing, with 0.01 it is much."""
    nothing, _ = said_of(tmp_path, [2.0, 2.2], [2.1, 2.3])
    assert nothing[0].startswith("`titans` against `attention`: **no effect** on bits per byte (-0.1000 ± 0.1414)")
    better, _ = said_of(tmp_path, [2.00, 2.02], [2.10, 2.12])
    assert better[0].startswith("`titans` against `attention`: better by 0.1000 bits per byte (± 0.0141)")
    assert better[0].endswith("Published: elsewhere, 12 against 13.")
    worse, lines = said_of(tmp_path, [2.10, 2.12], [2.00, 2.02])
    assert "worse by 0.1000" in worse[0]
    assert any(line.startswith("| `titans` | 2 | 1,000 | 2.1100 ± 0.0141 | 0.4% (0.3%) |") for line in lines)


def test_one_start_says_nothing(tmp_path):
    said, _ = said_of(tmp_path, [2.0], [2.5])
    assert "-0.5000 bits per byte, of a single start; whether that is an effect cannot be said" in said[0]


def test_what_a_memory_does_while_it_reads_is_said(tmp_path):
    """Reading with it on against off by the same weights; a model that reads the same both ways is named."""
    said, _ = said_of(tmp_path, [2.0, 2.1], [2.0, 2.1], on=0.3)
    assert "`titans`: what its memory adds to the gain in the second half of a document: +0.2000" in "\n".join(said)
    assert "`attention`: it reads the same whether its memory is on or off" not in said[0]
    assert any("+0.1000 bits per byte less than one with it reset" in sentence for sentence in said)


def test_recall_near_chance_is_said_plainly(tmp_path):
    said, _ = said_of(tmp_path, [2.0, 2.1], [2.0, 2.1])
    assert any(sentence.startswith("Recall: **no variant**") for sentence in said)


def test_standard_errors_are_those_of_the_book():
    assert unpaired([1.0, 3.0], [0.0, 0.0, 0.0]).error == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert paired([1.0, 2.0], [0.0, 1.5]).error == pytest.approx(0.25)
    assert not unpaired([1.0, 1.0], [1.0, 1.0]).is_clear and unpaired([1.0, 1.0], [2.0, 2.0]).is_clear
