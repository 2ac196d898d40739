"""The evidence: variants of one size on the same tokens, tuned alike, resumable, and said in plain words."""

import json
import math
from pathlib import Path

import pytest

from bench.evidences import listed, tables
from meristem.bench import trial as trials_module
from meristem.bench.estimate import estimate, paired, said
from meristem.bench.evidence import Group, cells, groups, n_parameters, of_one_size, read_evidence
from meristem.bench.picture import plot_table
from meristem.bench.reading import reading_figures
from meristem.bench.study import result_of, seed_trials, study
from meristem.bench.trial import Measures, Outcome, recall_figures, running
from meristem.bench.tuned import best_rate, rate_trials
from meristem.bench.verdict import page, sentences
from meristem.data.config import DataConfig
from meristem.data.tokenizer import byte_tokenizer
from meristem.device.resolve import resolve
from meristem.errors import BadRecords, ConfigError, ConflictingKeys, CorpusTooShort, NonFinite, UnknownKey, WrongValue
from meristem.events import silent
from meristem.models.build import build

ROOT = Path(__file__).parents[2]
MEMORY = Group("memory", "times", "tokens")


def test_all_variants_have_the_same_size(tmp_path):
    """Within a fiftieth, whatever their parts cost; the width of the feed-forward layers makes up for it."""
    found = {cell.variant: cell for cell in cells(read_evidence(listed(tmp_path)), MEMORY)}
    attention, titans = found["attention"], found["titans"]
    assert abs(attention.n_parameters / titans.n_parameters - 1) <= 0.02
    assert attention.config.model.mlp_dim > 64 and titans.config.model.mlp_dim == 0
    assert all(n_parameters(cell.config, 256) == cell.n_parameters for cell in found.values())


def test_what_is_listed_in_the_documents_can_be_compared():
    """docs/evidence.yaml: the five tables of issue 10, at least three seeds, each table of one size."""
    config = read_evidence(ROOT / "docs" / "evidence.yaml")
    assert list(config.tables) == ["rules", "combinations", "levels", "memory", "reading"]
    assert len(config.seeds) >= 3 and len(config.rates) >= 2
    assert all(len(of_one_size(config, group, 2048)) > 1 for group in groups(config))
    memory = config.tables["memory"]
    assert set(memory.budgets) == {"tokens", "time"} and {"notebook", "stdlib", "sympy"} <= set(memory.texts)
    assert config.tables["reading"].reading.marks == (1024, 4096, 16384, 65536)


@pytest.mark.slow
def test_what_stands_in_the_documents_is_known():
    """Hours of runs: none of them is a stranger to the file that lists what is compared."""
    config = read_evidence(ROOT / "docs" / "evidence.yaml")
    planned = [cell for group in groups(config) for cell in cells(config, group)]
    every = [each for cell in planned for each in rate_trials(config, cell).values()]
    every += [each for cell in planned for rate in config.rates for each in seed_trials(config, cell, rate).values()]
    written = json.loads((ROOT / "docs" / "evidence.json").read_text(encoding="utf-8"))["outcomes"]
    assert {one["fingerprint"] for one in written} <= {trial.fingerprint for trial in every}


def test_a_study_runs_writes_and_is_not_run_again(tmp_path):
    """S4-M10: rates are tried, every variant runs from every seed, a page, JSON and pictures stand; nothing is left."""
    config, out, heard = listed(tmp_path), tmp_path / "evidence.md", []
    how = {"jobs": 1, "command": "meristem bench evidence", "say": heard.append}
    only = study(config, out, only=["memory"], **how)
    assert "Not measured yet." in out.read_text() and len(only["outcomes"]) == 4 + 4
    trained = sorted((tmp_path / "runs" / "evidence").iterdir())
    report = study(config, out, only=(), **how)
    assert json.loads((tmp_path / "evidence.json").read_text()) == report
    outcomes = {one["fingerprint"]: one for one in report["outcomes"]}
    assert len(outcomes) == 8 + 2, "titans is tried and trained once for both tables, and measured for each"
    assert sorted((tmp_path / "runs" / "evidence").iterdir()) == trained
    tree = read_evidence(config)
    for table, name in (("memory", "attention"), ("memory", "titans"), ("reading", "titans")):
        (cell,) = (cell for cell in cells(tree, Group(table, "times", "tokens")) if cell.variant == name)
        tried = [outcomes[one.fingerprint]["figures"] for one in rate_trials(tree, cell).values()]
        assert [figures["tokens"] for figures in tried] == [64, 64]
        known = {key: Outcome.from_json(values) for key, values in outcomes.items()}
        rate = best_rate(tree, cell, known)
        assert tried[tree.rates.index(rate)]["bits_per_byte"] == min(figures["bits_per_byte"] for figures in tried)
        for one in seed_trials(tree, cell, rate).values():
            figures, curve = (outcomes[one.fingerprint][key] for key in ("figures", "curve"))
            assert 0 < figures["bits_per_byte"] < 12 and figures["state_bytes"] > 0 and figures["tokens"] == 128
            assert [tokens for tokens, _ in curve[:2]] == [64, 128]
            assert (figures["documents/memory"] != figures["documents/frozen"]) is (name == "titans")
            assert ("reading/memory/again" in figures) is (table == "reading")
    assert sorted(report["tokens_per_s"]) == ["memory/attention", "memory/titans", "reading/titans"]
    assert all(speed > 0 for speed in report["tokens_per_s"].values()) and "tokens_per_s" in only
    assert "reading/titans" not in only["tokens_per_s"]
    text = out.read_text()
    assert "`attention` against `titans`" in text and "elsewhere, 12 against 13" in text and "`prose`" in text
    assert all(
        (tmp_path / f"evidence-{table}.png").stat().st_size > 0 and f"evidence-{table}" in text for table in tree.tables
    )
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    again = study(config, out, only=(), **how)
    assert (
        again["outcomes"] == report["outcomes"]
        and "10 runs are known, none is missing; 0 of other settings are left out" in heard
    )
    assert logs == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}


def test_other_settings_are_other_runs(tmp_path):
    """What was measured with other numbers of steps, or of what, is neither shown nor overwritten in its directory."""

    def planned(*more, **changes):
        tree = read_evidence(listed(tmp_path, *more, **changes))
        return [one for cell in cells(tree, MEMORY) for one in seed_trials(tree, cell, 1e-3).values()]

    first, longer, other = planned(), planned("model.dim=32"), planned(n_documents=2)
    assert not {one.fingerprint for one in first} & {one.fingerprint for one in (*longer, *other)}
    assert not {one.directory for one in first} & {one.directory for one in longer}
    assert {one.directory for one in first} == {one.directory for one in other}


def test_a_rate_is_tried_for_a_share_of_tokens_steps_or_time(tmp_path):
    """At equal time the share is of the time."""
    for budget, key, value in (
        ("steps=9", "steps", 4),
        ("tokens=640", "tokens", 320),
        ("max_time=3s", "max_time", 1.5),
    ):
        table = {"memory": tables(tmp_path)["memory"] | {"budgets": {"tokens": [f"train.{budget}"]}}}
        tree = read_evidence(listed(tmp_path, tables=table))
        tries = [one for cell in cells(tree, MEMORY) for one in rate_trials(tree, cell).values()]
        assert {getattr(one.config.train, key) for one in tries} == {value} and len(tries) == 4


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    def measured(jobs):
        tree = read_evidence(listed(tmp_path, f"run.dir={tmp_path / str(jobs)}"))
        trials = [seed_trials(tree, cell, 1e-3)[0] for cell in cells(tree, MEMORY)]
        with running(jobs) as run:
            return {one.name: (one.figures["bits_per_byte"], one.curve) for one in run(trials)}

    assert measured(1) == measured(2)


def test_a_run_that_cannot_be_trained_is_a_result(tmp_path, monkeypatch):
    """It stands below the table; the other runs go on."""

    def fails(config, **rest):
        raise NonFinite("loss was not finite in 10 steps in a row", step=7)

    monkeypatch.setattr(trials_module, "pretrain", fails)
    tree = read_evidence(listed(tmp_path, rates=[1e-3]))
    _, cell = cells(tree, MEMORY)
    with running(1) as run:
        outcomes = list(run(list(seed_trials(tree, cell, 1e-3).values())))
    assert [dict(one.figures) for one in outcomes] == [{}, {}]
    assert Outcome.from_json(outcomes[0].to_json()) == outcomes[0]
    results = [result_of(tree, cell, {one.fingerprint: one for one in outcomes})]
    assert "`titans` from seed 0 ended before it was trained: loss was" in " ".join(sentences(tree, "memory", results))
    assert "Not measured yet." in page(tree, {"memory": results}, title="", pictures={}, speeds={})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seeds": []}, "seeds"),
        ({"same_size_as": "titan"}, "same_size_as names 'titan'.*there are attention, titans"),
        ({"tables": {"memory": {"variants": ["titan"]}}}, "tables.memory.variants names 'titan'.*there are attention"),
        ({"tables": {"reading": {"against": ["attention"]}}}, "tables.reading.against names 'attention'"),
        ({"tables": {"reading": {"reading": {"learn": ["none"], "texts": {"a": "a"}, "marks": [8, 4]}}}}, "ascending"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(tmp_path, change, message):
    whole = tables(tmp_path)
    changed = {name: whole[name] | one for name, one in change.get("tables", {}).items()}
    with pytest.raises(ConfigError, match=message):
        read_evidence(listed(tmp_path, **change | ({"tables": whole | changed} if changed else {})))


def test_an_unknown_key_or_table_is_answered_with_what_there_is(tmp_path):
    with pytest.raises(UnknownKey, match="sedes.*seeds"):
        read_evidence(listed(tmp_path, sedes=[0]))
    with pytest.raises(WrongValue, match="no table 'rule'; there are memory, reading"):
        list(groups(read_evidence(listed(tmp_path)), ["rule"]))


def test_variants_that_read_other_tokens_are_refused_with_all_reasons(tmp_path):
    variants = {
        "titans": {"preset": "titans-mag", "settings": ["memory.head_dim=8"]},
        "attention": {"preset": "attention", "settings": ["train.steps=9"]},
    }
    path = listed(tmp_path, "train.max_time=3s", variants=variants)
    with pytest.raises(ConflictingKeys, match="titans differs from attention in train; train.max_time is 3 s beside"):
        cells(read_evidence(path), MEMORY)


def test_a_variant_that_cannot_have_the_size_is_refused(tmp_path):
    variants = {
        "titans": {"preset": "titans-mag", "settings": ["memory.head_dim=8"]},
        "attention": {"preset": "attention", "settings": ["model.n_layers=8"]},
    }
    with pytest.raises(ConflictingKeys, match="'titans' has [0-9,]+ par.*attention has [0-9,]+ with model.mlp_dim=1"):
        cells(read_evidence(listed(tmp_path, variants=variants)), MEMORY)


def test_a_file_of_other_results_is_not_overwritten(tmp_path):
    (tmp_path / "evidence.json").write_text('{"schema": "meristem.bench/1"}')
    with pytest.raises(BadRecords, match="holds no evidence.*meristem.bench/1.*another --out"):
        study(listed(tmp_path), tmp_path / "evidence.md", only=(), jobs=1, command="", say=print)


def test_recall_is_measured_by_distance(tmp_path):
    """Of a model that was never trained: nothing is predicted, whether its memory is written or not."""
    tree = read_evidence(listed(tmp_path, "data.notebook.size_bytes=1000000"))
    config = cells(tree, MEMORY)[0].config
    model = build(config.model, config.memory, 256, random_seed=0)
    device = resolve(config.device, silent)
    found = recall_figures(model, byte_tokenizer(), config, Measures.of(tree, "memory"), device)
    assert {found[f"remember/{mode}/{spans}/greedy"] for mode in ("memory", "frozen") for spans in (1, 5, 10, 50)} == {
        0
    }
    assert found["mentions/memory/32"] == found["mentions/frozen/far"] == 0 < found["mentions/memory/32/n"]


def test_reading_counts_from_mark_to_mark(tmp_path):
    """The whole is the mean over its stretches by bytes; a model without a memory reads alike whatever learns."""
    tree = read_evidence(listed(tmp_path))
    config, reading = cells(tree, MEMORY)[0].config, tree.tables["reading"].reading
    model = build(config.model, config.memory, 256, random_seed=0)
    device = resolve(config.device, silent)
    found = reading_figures(model, byte_tokenizer(), reading, config.data, device)
    for text in reading.texts:
        first, last = found[f"none/{text}/16"], found[f"none/{text}/64"]
        assert found[f"none/{text}/64/whole"] == pytest.approx((16 * first + 48 * last) / 64)
        assert found[f"memory/{text}/64"] == last
    assert found["none/first"] == found["none/prose/64/whole"]
    long = reading.model_copy(update={"marks": (100_000,)})
    with pytest.raises(CorpusTooShort, match="prose.txt' has 208 tokens; 100,001 are read"):
        reading_figures(model, byte_tokenizer(), long, DataConfig(), device)


def results_of(tmp_path, figures):
    """Results of both variants; of each figure its values by seed, by variant."""
    tree, results = read_evidence(listed(tmp_path, rates=[1e-3])), []
    for cell in cells(tree, MEMORY):
        known = {}
        for seed, one in seed_trials(tree, cell, 1e-3).items():
            own = {key: values[cell.variant][seed : seed + 1] for key, values in figures.items()}
            found = {key: value for key, values in own.items() for value in values}
            known[one.fingerprint] = Outcome(one.name, one.fingerprint, found, (), "a chip")
        results.append(result_of(tree, cell, known))
    return tree, results


def test_what_has_no_effect_is_said_as_plainly_as_what_has(tmp_path):
    """S4-M10. By pairs of seeds: 0.1 apart with a deviation of 0.02 is nothing of two seeds, with 0.0001 it is much."""
    for ours, word in (
        ([2.09, 2.31], r"**no effect** (-0.1000 ± 0.1271 bits per byte)"),
        ([2.10, 2.3002], "better by 0.0999 ± 0.0013 bits per byte"),
        ([2.30, 2.5002], "worse by 0.1001 ± 0.0013 bits per byte"),
        ([2.10], "-0.1000 bits per byte (a single seed, so no interval)"),
    ):
        tree, results = results_of(tmp_path, {"bits_per_byte": {"attention": ours, "titans": [2.2, 2.4]}})
        first = next(sentences(tree, "memory", results))
        assert first == f"times, tokens: `attention` against `titans`: {word}. Published: elsewhere, 12 against 13."


def test_recall_is_said_beside_the_likelihood(tmp_path):
    """In words, in the tables by distance and by spans, and in a panel of the picture."""
    alike = {"attention": [2.0, 2.1], "titans": [2.0, 2.1]}
    figures = dict.fromkeys(("bits_per_byte", "documents/memory", "tokens", "tokens_per_s", "state_bytes"), alike)
    figures["documents/frozen"] = {"attention": [2.0, 2.1], "titans": [2.2, 2.3]}
    shares = {"attention": [0.1, 0.1], "titans": [0.5, 0.5]}
    for mode in ("memory", "frozen"):
        figures |= {f"mentions/{mode}/{place}": shares for place in ("64", "1024", "far")}
        figures |= {f"mentions/{mode}/{place}/n": alike for place in ("64", "1024")}
        figures |= {f"remember/{mode}/{spans}{tail}": shares for spans in (1, 5, 10, 50) for tail in ("", "/greedy")}
    tree, results = results_of(tmp_path, figures)
    assert "recalled far: worse by 0.4000 ± 0.0000 of the values." in next(sentences(tree, "memory", results))
    lines = page(tree, {"memory": results}, title="", pictures={}, speeds={"memory/titans": 5432.1}).splitlines()
    assert any(line.startswith("| `titans` | ") and "| 5,432 |" in line for line in lines)
    assert "| variant | memory | 64 | 1,024 | far |" in lines
    assert "| `titans` | frozen | 0.50 | 0.50 | 0.50 ± 0.00 |" in lines
    assert "| `attention` | memory | 0.10 ± 0.00 (0.10) |" in "\n".join(lines)
    assert not any(line.startswith("| `attention` | frozen") for line in lines), "it reads alike"
    plot_table(tmp_path / "recall.png", tree.tables["memory"], results)
    assert (tmp_path / "recall.png").stat().st_size > 0


def test_intervals_are_those_of_the_book():
    """Student's t of one and of two degrees of freedom; differences are of pairs."""
    assert estimate([1.0, 3.0]).half == pytest.approx(12.706)
    assert estimate([1.0, 2.0, 3.0]).half == pytest.approx(4.303 / math.sqrt(3))
    assert paired({0: 1.0, 1: 2.0, 7: 0.0}, {0: 0.0, 1: 1.5}).mean == pytest.approx(0.75)
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert "no effect" in said(estimate([1.0, -1.0]), "bits") and "worse" in said(estimate([0.5, 0.5]), "bits")
