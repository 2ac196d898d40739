"""Metrics of the likelihood of given texts, of choices among them, and of what is recalled from how far."""

import math
from collections.abc import Callable
from fractions import Fraction

from meristem.errors import NonFinite, WrongValue
from meristem.evaluate.likelihood import Likelihood
from meristem.evaluate.metric import Metric, Prediction, Tally, mean, ratio

_LARGEST_NATS = math.log(1.7e308)


def _of_likelihood(name: str, value: Callable[[Likelihood], float]) -> Metric:
    """A metric that is read from the sums over all texts that should have been predicted."""

    def count(found: Prediction) -> Tally:
        target = found.target
        return {
            "nats": Fraction(target.nats),
            "whole": Fraction(target.n_tokens),
            "n_bytes": Fraction(target.n_bytes),
        }

    def of_sums(sums: Tally) -> dict[str, float]:
        return {name: value(Likelihood(float(sums["nats"]), int(sums["whole"]), int(sums["n_bytes"])))}

    return Metric(name, frozenset({"scored"}), "min", 1.0 if name == "perplexity" else 0.0, math.inf, count, of_sums)


def nats() -> Metric:
    """Nats per token of the texts that should have been predicted."""
    return _of_likelihood("nats", lambda sums: sums.nats)


def perplexity() -> Metric:
    """exp of the nats per token; NonFinite where no number is so large."""

    def value(sums: Likelihood) -> float:
        if sums.nats > _LARGEST_NATS:
            raise NonFinite(
                f"the perplexity of {sums.nats:.6g} nats per token is larger than any number. Measure nats instead."
            )
        return sums.perplexity

    return _of_likelihood("perplexity", value)


def bits_per_byte() -> Metric:
    """Bits per byte of these texts, which compares across tokenizers."""
    return _of_likelihood("bits_per_byte", lambda sums: sums.bits_per_byte)


def token_accuracy() -> Metric:
    """The share of tokens of these texts that were the likeliest where they stand."""
    return ratio("token_accuracy", ("scored",), lambda found: (found.target.n_top, found.target.n_tokens))


def sequence_accuracy() -> Metric:
    """The share of texts each of whose tokens was the likeliest."""
    return mean("sequence_accuracy", ("scored",), lambda found: int(found.target.n_top == found.target.n_tokens))


def accuracy() -> Metric:
    """The share of examples whose right choice is the likeliest as a whole."""
    return mean("accuracy", ("right",), lambda found: int(found.chosen == found.right))


def accuracy_per_byte() -> Metric:
    """The share of examples whose right choice has the fewest nats per byte, which does not favour short choices."""

    def is_right(found: Prediction) -> int:
        per_byte = [choice.nats / choice.n_bytes for choice in found.scored]
        return int(per_byte.index(min(per_byte)) == found.right)

    return mean("accuracy_per_byte", ("right",), is_right)


def calibration_error(bins: int = 15) -> Metric:
    """The mean over examples of how far accuracy and confidence are apart in the bin of the example (ECE, Guo 2017).

    sum over bins of (n_bin / n) |accuracy - confidence|. The confidence is the share of the likeliest choice in the
    likelihood of all; bin k of ``bins`` has those above k / bins, and up to (k + 1) / bins.
    """
    if not isinstance(bins, int) or bins < 1:
        raise WrongValue(f"calibration_error has bins={bins!r}. Give a whole number from 1.", value=bins)

    def count(found: Prediction) -> Tally:
        confidence = Fraction(confidence_of(found))
        number = max(math.ceil(confidence * bins) - 1, 0)
        return {
            "whole": Fraction(1),
            ("right", number): Fraction(int(found.chosen == found.right)),
            ("confidence", number): confidence,
        }

    def value(sums: Tally) -> dict[str, float]:
        none = Fraction(0)
        apart = (
            abs(sums.get(("right", number), none) - sums.get(("confidence", number), none)) for number in range(bins)
        )
        return {"calibration_error": float(sum(apart, none) / sums["whole"])}

    return Metric("calibration_error", frozenset({"right"}), "min", 0.0, 1.0, count, value)


def confidence_of(found: Prediction) -> float:
    """The likelihood of the likeliest choice by that of all: 1 / sum exp(least nats - nats)."""
    least = found.scored[found.chosen].nats
    return 1 / math.fsum(math.exp(least - choice.nats) for choice in found.scored)


def recall_by_distance() -> Metric:
    """The share of answers that are recalled, by how far back in the prompt they stand.

    The distances are powers of two in tokens: at d those above d / 2 and up to d. An example whose answer does not
    stand in its prompt does not count.
    """

    def count(found: Prediction) -> Tally:
        if found.distance is None:
            return {}
        bucket = 1 << (max(found.distance, 1) - 1).bit_length()
        return {("n", bucket): Fraction(1), ("right", bucket): Fraction(int(found.is_right))}

    def value(sums: Tally) -> dict[str, float]:
        buckets = sorted(key[1] for key in sums if isinstance(key, tuple) and key[0] == "n")
        return {f"recall_by_distance/{at}": float(sums["right", at] / sums["n", at]) for at in buckets}

    return Metric("recall_by_distance", frozenset({"distance"}), "max", 0.0, 1.0, count, value)
