"""Metrics against definitions written out plainly, cases counted by hand, and the law that order does not matter."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.errors import DataError, NonFinite, WrongValue
from meristem.evaluate.continual import measure_continual
from meristem.evaluate.metric import Prediction, Scored, measure
from meristem.evaluate.metrics import metrics
from meristem.plugins import spelled


def value_of(name: str, predictions: list[Prediction]) -> dict[str, float]:
    return measure(spelled(metrics, name), predictions, "t")


def written(text: str, *answers: str, distance: int | None = None) -> Prediction:
    return Prediction("t", 0, "1", "", answers, text=text, distance=distance)


def chosen(nats: list[float], right: int, n_bytes: list[int] | None = None, distance: int | None = None) -> Prediction:
    sizes = n_bytes or [4] * len(nats)
    scored = tuple(Scored("x", each, 2, size, 1) for each, size in zip(nats, sizes, strict=True))
    return Prediction("t", 0, "1", "", ("x",), scored=scored, right=right, distance=distance)


GOLDEN = [
    # Ten pairs each; by hand.
    ("exact_match", [("a b", "a  b\n"), ("a b", "b a"), ("", "a"), ("a", "A")], 0.25),
    ("f1", [("a b c", "b c d e"), ("a a", "a"), ("x", "y"), ("", "y")], (4 / 7 + 2 / 3) / 4),
    ("distinct(n=1)", [("a b a",), ("b c",)], 3 / 5),
    ("distinct", [("a b a b",), ("b a",)], 2 / 4),
    ("repetition(n=2)", [("a b a b a",), ("c d",)], 2 / 5),
    ("repetition", [("a b c d e f g",)], 0.0),
]


@pytest.mark.parametrize("name, pairs, expected", GOLDEN, ids=[case[0] for case in GOLDEN])
def test_cx5_3_texts_by_hand(name, pairs, expected):
    """What a reader counts with a pencil."""
    found = value_of(name, [written(*pair) for pair in pairs])
    assert list(found.values()) == [pytest.approx(expected, rel=1e-12)]


def test_of_several_answers_the_best_counts():
    assert value_of("exact_match", [written("b", "a", "b")]) == {"exact_match": 1.0}
    assert value_of("f1", [written("b c", "a", "b")]) == {"f1": pytest.approx(2 / 3)}


def test_cx5_3_likelihood_by_hand():
    """Sums over tokens and bytes of the right texts, and never a mean of means."""
    found = [
        Prediction("t", 0, "1", "", ("x",), scored=(Scored("x", 6.0, 2, 3, 1),)),
        Prediction("t", 1, "2", "", ("x",), scored=(Scored("x", 1.0, 8, 5, 8),)),
        chosen([9.0, 5.0], right=1),
    ]
    assert value_of("nats", found) == {"nats": 1.0}
    assert value_of("perplexity", found) == {"perplexity": math.e}
    assert value_of("bits_per_byte", found) == {"bits_per_byte": pytest.approx(12 / math.log(2) / 12, rel=1e-15)}
    assert value_of("token_accuracy", found) == {"token_accuracy": 10 / 12}
    assert value_of("sequence_accuracy", found) == {"sequence_accuracy": 1 / 3}


def test_a_perplexity_beyond_all_numbers_is_said():
    with pytest.raises(NonFinite, match="Measure nats instead"):
        value_of("perplexity", [Prediction("t", 0, "1", "", (), scored=(Scored("x", 2000.0, 2, 3, 1),))])


def test_choices_by_hand():
    """The likeliest as a whole, and the likeliest per byte, which may be another."""
    found = [chosen([1.0, 2.0], right=0), chosen([3.0, 4.0], right=1, n_bytes=[1, 8]), chosen([2.0, 2.0], right=1)]
    assert value_of("accuracy", found) == {"accuracy": 1 / 3}
    assert value_of("accuracy_per_byte", found) == {"accuracy_per_byte": 2 / 3}


def test_calibration_error_by_hand():
    """Two examples of confidence 0.8 of which one is right are 0.3 off, one of 0.5 that is right 0.5."""
    sure = [-math.log(0.8), -math.log(0.2)]
    found = [chosen(sure, right=0), chosen(sure, right=1), chosen([1.0, 1.0], right=0)]
    assert value_of("calibration_error", found)["calibration_error"] == pytest.approx((2 * 0.3 + 0.5) / 3, rel=1e-9)
    assert value_of("calibration_error(bins=1)", found)["calibration_error"] == pytest.approx(abs(2 - 2.1) / 3)


def naive_calibration_error(found: list[Prediction], bins: int = 15) -> float:
    """The definition, bin by bin: members with confidence in (k / bins, (k + 1) / bins]."""
    shares = []
    for one in found:
        weights = [math.exp(-choice.nats) for choice in one.scored]
        shares.append((max(weights) / sum(weights), weights.index(max(weights)) == one.right))
    total = 0.0
    for number in range(bins):
        inside = [(share, hit) for share, hit in shares if number / bins < share <= (number + 1) / bins]
        if inside:
            accuracy = sum(hit for _, hit in inside) / len(inside)
            confidence = sum(share for share, _ in inside) / len(inside)
            total += len(inside) / len(found) * abs(accuracy - confidence)
    return total


def naive_f1(text: str, answer: str) -> float:
    """Harmonic mean of the precision and the recall of words."""
    found, expected = text.split(), answer.split()
    common = sum((Counter(found) & Counter(expected)).values())
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(expected)
    return 2 * precision * recall / (precision + recall)


NATS = st.floats(0.015625, 20.0)
CHOICES = st.lists(NATS, min_size=2, max_size=4, unique=True).flatmap(
    lambda nats: st.builds(
        chosen, st.just(nats), st.integers(0, len(nats) - 1), distance=st.none() | st.integers(0, 99)
    )
)
WORDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=9).map(" ".join)
TEXTS = st.builds(written, WORDS, WORDS, distance=st.none() | st.integers(0, 99))


@settings(max_examples=30, deadline=None)
@given(st.lists(CHOICES, min_size=1, max_size=12))
def test_calibration_error_is_its_definition(found):
    assert value_of("calibration_error", found)["calibration_error"] == pytest.approx(
        naive_calibration_error(found), abs=1e-9
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=9))
def test_f1_and_repetition_are_their_definitions(found):
    f1 = sum(naive_f1(one.text, one.answers[0]) for one in found) / len(found)
    assert value_of("f1", found)["f1"] == pytest.approx(f1, abs=1e-12)
    n_grams = n_before = 0
    for one in found:
        words = one.text.split()
        for at in range(len(words)):
            n_grams += 1
            n_before += words[at] in words[:at]
    assert value_of("repetition(n=1)", found) == {"repetition-1": n_before / n_grams}


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_cx5_2_order_and_grouping_change_no_bit(data):
    """Every metric, on predictions in any order: sums are exact."""
    choices, texts = data.draw(st.lists(CHOICES, min_size=1)), data.draw(st.lists(TEXTS, min_size=1))
    for name in metrics.names():
        metric = spelled(metrics, name)
        found = choices if metric.needs <= {"scored", "right", "distance"} and "scored" in metric.needs else texts
        if "right" in metric.needs:
            found = choices
        mixed = data.draw(st.permutations(found))
        try:
            expected = measure(metric, found, "t")
        except DataError:
            continue
        assert measure(metric, mixed, "t") == expected
        assert all(metric.low <= value <= metric.high for value in expected.values())


def test_recall_by_distance_in_powers_of_two():
    """At d those above d / 2 and up to d."""
    found = [
        chosen([1.0, 2.0], right, distance=at) for right, at in ((0, 1), (1, 2), (0, 3), (0, 4), (1, 5), (0, None))
    ]
    assert value_of("recall_by_distance", found) == {
        "recall_by_distance/1": 1.0,
        "recall_by_distance/2": 0.0,
        "recall_by_distance/4": 1.0,
        "recall_by_distance/8": 0.0,
    }


@pytest.mark.parametrize("name", metrics.names())
def test_cx5_6_an_empty_set_has_no_value(name):
    """No stand-in 0 and no None."""
    with pytest.raises(DataError, match=r"found nothing to count .* Leave it out"):
        value_of(name, [])


def test_cx5_6_nothing_to_count_has_no_value():
    """Texts without so many words, and answers that do not stand in their prompts."""
    for name in ("distinct(n=3)", "repetition", "recall_by_distance"):
        with pytest.raises(DataError, match="found nothing to count"):
            value_of(name, [written("a b", "a")])


def test_cx5_1_unknown_and_odd_metrics_are_refused():
    with pytest.raises(WrongValue, match=r"no metric is called 'acuracy'\. Nearest: accuracy"):
        spelled(metrics, "acuracy")
    with pytest.raises(WrongValue, match="takes"):
        spelled(metrics, "distinct(m=2)")
    for name in ("distinct(n=0)", "repetition(n='a')", "calibration_error(bins=0)"):
        with pytest.raises(WrongValue, match="Give a whole number from 1"):
            spelled(metrics, name)


def test_continual_metrics_by_hand():
    """Three tasks; the first row is before any."""
    rows = [[0.1, 0.2, 0.3], [0.9, 0.4, 0.3], [0.7, 0.8, 0.5], [0.6, 0.9, 1.0]]
    found = {metric.name: value for metric, value in measure_continual(rows)}
    assert found == {
        "average_accuracy": pytest.approx(2.5 / 3),
        "backward_transfer": pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2),
        "forgetting": pytest.approx(((0.9 - 0.6) + (0.8 - 0.9)) / 2),
        "forward_transfer": pytest.approx(((0.4 - 0.2) + (0.5 - 0.3)) / 2),
    }
    assert [metric.name for metric, _ in measure_continual(rows[1:])] == [
        "average_accuracy",
        "backward_transfer",
        "forgetting",
    ]
    assert [(metric.name, value) for metric, value in measure_continual([[0.5]])] == [("average_accuracy", 0.5)]


@pytest.mark.parametrize("rows", [[], [[]], [[1.0, 2.0]], [[1.0, 2.0], [1.0]], [[1.0]] * 3])
def test_cx5_6_unequal_lengths_are_refused(rows):
    with pytest.raises(DataError, match="Evaluate every task after each"):
        measure_continual(rows)
