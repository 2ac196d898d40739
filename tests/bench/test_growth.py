"""Whether growing pays: arms at equal cost, tuned alike, resumable, with a verdict by the rules R6 and R7."""

import json
from pathlib import Path

import pytest

from bench.growths import arms, listed
from meristem.bench.estimate import holm
from meristem.bench.growth import arm_cells, read_growth
from meristem.bench.growth_study import growth_study, results_of
from meristem.bench.growth_verdict import crossover, growth_page, is_worth_it, measured, reached, verdict, wins
from meristem.bench.picture import plot_growth
from meristem.bench.trial import Outcome
from meristem.bench.tuned import rate_trials, seed_trials
from meristem.cli import run
from meristem.errors import BadRecords, ConfigError, ConflictingKeys, UnknownKey
from meristem.growth.policy import policies

ROOT = Path(__file__).parents[2]
ONE = {"seeds": [0], "rates": [3.0e-3], "budgets": {"one": ["train.flops=1.0e7"]}}


def test_what_is_listed_in_the_documents_can_be_compared():
    """docs/growth.yaml: the arms of issue 11 at equal cost, three budgets in a series, five seeds, three rates."""
    config = read_growth(ROOT / "docs" / "growth.yaml")
    assert list(config.arms) == ["small", "large", "zero", "stack", "seeds"]
    assert len(config.seeds) >= 5 and len(config.rates) >= 3
    cells = arm_cells(config)
    first, second, third = (cell.flops for cell in cells if cell.variant == "small")
    assert second / first == pytest.approx(third / second, rel=0.05)
    for cell in cells:
        policies.get(cell.config.grow.policy.name)(cell.config.grow.policy.settings)
    tries = [one for cell in cells for one in rate_trials(config, cell).values()]
    assert len(tries) == 3 * len(cells) and {one.config.run.seed for one in tries} == {0}
    assert {one.config.train.flops for one in tries} == {config.rate_share * at for at in (first, second, third)}


def test_a_study_that_was_killed_goes_on_and_is_not_run_again(tmp_path):
    """Issue 11, 3: every arm spends its budget and ends at its size; what had ended when it was killed stays."""
    config, out, heard = listed(tmp_path, **ONE), tmp_path / "mine.md", []

    def killed(line):
        heard.append(line)
        if line.startswith("large-0"):
            raise KeyboardInterrupt

    how = {"jobs": 1, "command": "meristem bench growth"}
    with pytest.raises(KeyboardInterrupt):
        growth_study(config, out, say=killed, **how)
    (kept,) = json.loads((tmp_path / "mine.json").read_text())["outcomes"]
    assert kept["name"].startswith("small-0") and "Not measured yet." not in out.read_text()
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("small-0*/*")}
    report = growth_study(config, out, say=heard.append, **how)
    assert kept in report["outcomes"] and len(report["outcomes"]) == 5
    assert trained == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("small-0*/*")}
    figures = {one["name"].split("-")[0]: one["figures"] for one in report["outcomes"]}
    assert all(1e7 <= one["flops"] < 1.2e7 for one in figures.values())
    assert figures["small"]["tokens"] > figures["large"]["tokens"]
    size = figures["large"]["n_parameters"]
    assert (
        figures["zero"]["n_parameters"] == figures["stack"]["n_parameters"] == size > figures["small"]["n_parameters"]
    )
    assert figures["seeds"]["n_seeds"] == 1 and figures["seeds"]["probe_flops"] > 0
    text = out.read_text()
    assert "mine.png" in text and (tmp_path / "mine.png").stat().st_size > 0 and "put in 1 seeds in 1 runs" in text
    again = growth_study(config, out, say=heard.append, **how)
    assert again["outcomes"] == report["outcomes"] and heard.count("0 runs are known, 5 can go now") == 1


def results(tmp_path, bits, *, budgets=3, saved=None):
    """What is known of arms of whose ends, by budget and arm, are given the bits of each seed.

    saved: by arm, where on the way to the end its curve falls; else all fall in a straight line.
    """
    named = {f"b{at}": [f"train.flops={3.0**at * 1e12}"] for at in range(budgets)}
    config = read_growth(listed(tmp_path, seeds=[0, 1, 2], rates=[1e-3], budgets=named))
    known = {}
    for cell in (cells := arm_cells(config)):
        values = bits[list(named).index(cell.budget)].get(cell.variant, ())
        for (seed, trial), end in zip(seed_trials(config, cell, 1e-3).items(), values, strict=False):
            at = (saved or {}).get(cell.variant, 1.0)
            curve = ((0.0, 8.0), (at * cell.flops, end), (cell.flops, end))
            figures = dict.fromkeys(("tokens", "wall_s", "n_parameters"), 1000.0 + seed)
            figures |= {"bits_per_byte": end, "nats": end * 0.7, "flops": cell.flops}
            known[trial.fingerprint] = Outcome(trial.name, trial.fingerprint, figures, curve, "a chip")
    return config, results_of(config, cells, known)


def concluded(config, found):
    """The sentence on R6; before it stands only how much is known."""
    first, second, *_ = verdict(config, found)
    return second if first.startswith("**Not all is measured yet:** ") else first


def around(mean, apart=0.001):
    return [mean - apart, mean, mean + 1.5 * apart]


def test_r7_the_crossover_lies_where_the_lines_cross(tmp_path):
    """On the logarithm of the operations: halfway between 1 and 3 TFLOP at the root of 3."""
    bits = [{"small": around(2.0), "large": around(2.1)}, {"small": around(1.9), "large": around(1.8)}, {}]
    config, found = results(tmp_path, bits)
    assert crossover(config, found) == pytest.approx(3**0.5 * 1e12)
    never = results(tmp_path, [{"small": [2.0], "large": [2.1]}] * 3)
    assert crossover(*never) is None
    always = results(tmp_path, [{"small": [2.0], "large": [1.9]}] * 3)
    assert crossover(*always) == pytest.approx(1e12)


def test_r6_growth_is_worth_it_where_it_beats_the_better_of_both_far_beyond_the_crossover(tmp_path):
    """The same gain under a budget below three times the crossover, or within chance, or below 0.01 nats, is not."""
    before = {"small": around(2.0), "large": around(2.1), "zero": around(2.0), "stack": around(2.0)}
    after = {"small": around(1.9), "large": around(1.8)}
    late = {"small": around(1.7), "large": around(1.5), "zero": around(1.5005), "stack": around(1.45)}
    config, found = results(tmp_path, [before, after, late])
    assert is_worth_it(config, found)
    words = " ".join(verdict(config, found))
    assert "**Growing is worth it here:** `stack` at 9 TFLOP." in words
    assert "**Not all is measured yet:** 30 of 45 runs are known" in words
    assert "**`stack` starts to win** at 9 TFLOP" in words and "**`zero` does not win**" in words
    assert "The larger model is better on average from about 1.73 TFLOP on." in words
    assert concluded(config, found).startswith("**Growing is worth it here")
    for stack in (around(1.45, 0.5), around(1.49)):
        config, found = results(tmp_path, [before, after, late | {"stack": stack}])
        assert not is_worth_it(config, found) and "**Growing is not worth it here.**" in concluded(config, found)
    config, found = results(tmp_path, [before, before | after | {"stack": around(1.7)}, {}])
    assert not is_worth_it(config, found) and "lies below 5.2 TFLOP" in concluded(config, found)


def test_r6_or_where_it_saves_operations(tmp_path):
    """It ends as the large one does, and was there after half of the budget; a twentieth is too little."""
    early = {"small": around(2.0), "large": around(1.9)}
    late = early | {"zero": around(1.9), "stack": around(1.9)}
    config, found = results(tmp_path, [early, early, late], saved={"stack": 0.5, "zero": 0.95})
    assert is_worth_it(config, found)
    stack = next(win for win in wins(config, found)["b2"] if win.arm == "stack")
    assert (stack.saved.mean, stack.saved.half) == (pytest.approx(0.5), 0) and not stack.is_better
    assert "`stack` at 9 TFLOP" in concluded(config, found) and "`zero`" not in concluded(config, found)
    page = growth_page(config, found, title="", picture=None)
    assert "50.0% ± 0.0%" in page and "| `zero` |" in page
    plot_growth(tmp_path / "ends.png", measured(found))
    assert (tmp_path / "ends.png").stat().st_size > 0


def test_what_does_not_get_there_saves_nothing(tmp_path):
    bits = [{"small": around(2.0), "large": around(1.9), "stack": [1.8, 1.95, 1.95]}] * 3
    config, found = results(tmp_path, bits)
    page = growth_page(config, found, title="", picture=None)
    assert "not reached by 2 of 3" in page and "not reached by 3 of 3" in page
    assert not is_worth_it(config, found)


def test_a_curve_is_read_between_its_points():
    curve = ((1.0, 4.0), (2.0, 3.0), (4.0, 2.0))
    assert [reached(curve, level) for level in (5.0, 3.5, 2.5, 2.0, 1.9)] == [1.0, 1.5, 3.0, 4.0, None]
    assert reached((), 1.0) is None


def test_of_several_differences_fewer_are_clear():
    """Holm: the least of three counts three times, the next twice, and none before one that is less."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"small": "tiny"}, (), "small is 'tiny'.*there are small, large, zero, stack, seeds"),
        ({"large": "small"}, (), "small and large are both 'small'"),
        ({"seeds": []}, (), "seeds"),
        ({"arms": {"small": {"what": "a"}}}, (), "arms"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(tmp_path, changes, more, message):
    with pytest.raises(ConfigError, match=message):
        read_growth(listed(tmp_path, *more, **changes))


@pytest.mark.parametrize(
    ("settings", "budgets", "message"),
    [
        (["train.steps=9"], None, "zero differs from small in train under one; zero has another length"),
        (["data.batch_size=3"], None, "zero differs from small in data under one"),
        (["schedule.floor=0.5"], None, "zero differs from small in schedule.*does not end low"),
        ([], {"one": ["train.flops=2e7"], "two": ["train.flops=1e7"]}, "the budget two is not above one"),
        ([], {"one": ["train.tokens=99"]}, "small has another length than train.flops under one"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused_with_all_reasons(tmp_path, settings, budgets, message):
    own = arms()
    own["zero"] = {"what": "another", "settings": settings}
    with pytest.raises(ConflictingKeys, match=message):
        arm_cells(read_growth(listed(tmp_path, arms=own, **({"budgets": budgets} if budgets else {}))))


def test_a_baseline_that_grows_is_none(tmp_path):
    own = arms()
    own["large"]["settings"].append("grow.enabled=true")
    with pytest.raises(ConflictingKeys, match="large has grow.enabled=true"):
        arm_cells(read_growth(listed(tmp_path, arms=own)))


def test_a_wrong_file_is_answered_in_one_sentence(tmp_path, capsys):
    (tmp_path / "mine.json").write_text('{"schema": "meristem.evidence/1"}')
    with pytest.raises(BadRecords, match="holds no evidence.*meristem.evidence/1.*another --out"):
        growth_study(listed(tmp_path), tmp_path / "mine.md", jobs=1, command="", say=print)
    with pytest.raises(UnknownKey, match="sedes.*seeds"):
        read_growth(listed(tmp_path, sedes=[0]))
    assert run(["bench", "growth", "--config", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "a.md")]) == 2
    assert "none.yaml" in capsys.readouterr().err
