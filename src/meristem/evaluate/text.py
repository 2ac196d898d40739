"""Metrics of generated texts. Words are what white space separates; case and punctuation count."""

from collections import Counter
from fractions import Fraction

from meristem.errors import WrongValue
from meristem.evaluate.metric import Metric, Prediction, Tally, mean, ratio


def exact_match() -> Metric:
    """The share of texts that have the words of an answer in their order and no others."""
    return mean("exact_match", ("text", "answers"), lambda found: int(found.is_right))


def f1() -> Metric:
    """The mean of 2 common / (words of the text + words of the answer): of the harmonic mean of precision and recall.

    A word that stands in both several times is common so many times. Of several answers the best counts.
    """
    return mean("f1", ("text", "answers"), lambda found: max(_f1(found.text or "", each) for each in found.answers))


def _f1(text: str, answer: str) -> Fraction:
    found, expected = Counter(text.split()), Counter(answer.split())
    n_words = found.total() + expected.total()
    return Fraction(2 * (found & expected).total(), n_words) if n_words else Fraction(0)


def distinct(n: int = 2) -> Metric:
    """Different runs of ``n`` words, by all of them, over all texts together (Li et al. 2016)."""
    _require_words(n, "distinct")

    def count(found: Prediction) -> Tally:
        return {gram: Fraction(times) for gram, times in Counter(_grams(found, n)).items()}

    def value(sums: Tally) -> dict[str, float]:
        return {f"distinct-{n}": float(len(sums) / sum(sums.values()))}

    return Metric(f"distinct-{n}", frozenset({"text"}), "max", 0.0, 1.0, count, value)


def repetition(n: int = 4) -> Metric:
    """The share of runs of ``n`` words that stood before in the same text."""
    _require_words(n, "repetition")

    def of(found: Prediction) -> tuple[int, int]:
        grams = _grams(found, n)
        return len(grams) - len(set(grams)), len(grams)

    return ratio(f"repetition-{n}", ("text",), of, "min")


def _grams(found: Prediction, n: int) -> list[tuple[str, ...]]:
    words = (found.text or "").split()
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]


def _require_words(n: int, name: str) -> None:
    if not isinstance(n, int) or n < 1:
        raise WrongValue(f"{name} has n={n!r}; it counts runs of 1 word or more. Give a whole number from 1.", value=n)
