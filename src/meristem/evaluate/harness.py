"""Tasks of ``lm-eval`` (EleutherAI's lm-evaluation-harness): files of its own format, or its public suites.

The library reads the task, makes its requests and computes its metrics; a model of ours answers them.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

from meristem.checkpoint.atomic import sha256
from meristem.errors import CapabilityError, DataError, MeristemError, NonFinite, WrongValue
from meristem.evaluate.asking import Reading
from meristem.evaluate.results import figure
from meristem.extras import needed, require

_N_RESAMPLED = 1000
"""Draws for the standard error of a metric that has no formula for it."""


class Request(Protocol):
    """What the library gives a model: the arguments of one question (``lm_eval.api.instance.Instance``)."""

    args: tuple[Any, ...]


class Answers:
    """The three kinds of requests that the library makes of a model. Each is answered from a fresh memory."""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self._reading = reading

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Of (context, continuation): the log-likelihood of the continuation, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = []
        # Choices of one question come one after the other, and its context is read once.
        for context, group in itertools.groupby((request.args for request in requests), key=lambda args: args[0]):
            # As with the library's own models, white space at the end of a context is the continuation's.
            prompt = context.rstrip()
            texts = [f"{context[len(prompt) :]}{continuation}" for _, continuation in group]
            for scored in self._reading.likelihoods(prompt, texts):
                found.append((-_finite(scored.nats), scored.n_top == scored.n_tokens))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Of (text,): the log-likelihood of the whole, which is read from its beginning to its end."""
        return [-_finite(self._reading.likelihoods("", [request.args[0]])[0].nats) for request in requests]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Of (context, settings): the greedy text up to one of ``until``, of ``max_gen_toks`` tokens at most."""
        return [self._written(*request.args) for request in requests]

    def _written(self, context: str, settings: Mapping[str, Any]) -> str:
        if settings.get("do_sample"):
            raise CapabilityError(
                "the task draws its texts (do_sample), and evaluation takes the likeliest token, so that it finds the "
                "same each time. Set do_sample: false in its generation_kwargs.",
                operation="do_sample",
            )
        until = settings.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        return self._reading.continuation(
            context, int(settings.get("max_gen_toks", 256)), [each for each in stop if each]
        )


def _finite(nats: float) -> float:
    if not 0 <= nats < float("inf"):
        raise NonFinite("the model's prediction is not finite, so a text has no likelihood. Use another checkpoint.")
    return nats


def require_library(places: Iterable[str]) -> None:
    """MissingExtra where the library is not here, WrongValue for a task file that is not."""
    require("lm_eval", "--lm-eval")
    for place in places:
        if _is_file(place) and not Path(place).is_file():
            raise WrongValue(f"there is no task file {place}. Give one, or the name of a task of lm-eval.", value=place)


def _is_file(place: str) -> bool:
    return place.endswith((".yaml", ".yml"))


def examine(reading: Reading, places: Sequence[str], most: int | None) -> list[dict[str, Any]]:
    """What the summary says of tasks of the library: files of its format by path, public ones by name.

    A public one downloads its data. most: examples of each task. DataError where the library cannot go on.
    """
    with needed("--lm-eval"):
        from lm_eval.api.model import LM
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

    model = type("Model", (Answers, LM), {})(reading)
    try:
        # What the library prints is no result of ours.
        with contextlib.redirect_stdout(sys.stderr):
            found = simple_evaluate(
                model=model,
                tasks=list(places),
                limit=most,
                bootstrap_iters=_N_RESAMPLED,
                task_manager=TaskManager(include_defaults=not all(map(_is_file, places))),
            )
    except MeristemError:
        raise
    except Exception as cause:  # the library may raise anything
        raise DataError(
            f"lm-eval cannot evaluate {', '.join(places)}: {type(cause).__name__}: {cause}. Correct the task.",
            tasks=list(places),
        ) from cause
    return entries(found)


def entries(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the library found, as tasks of a summary: its numbers, and the hashes of its examples as one."""
    tasks = []
    for name, values in sorted(found["results"].items()):
        if name not in found["n-samples"]:
            continue  # a group: the mean of tasks that stand beside it
        version = str(found["versions"].get(name, ""))
        is_better = found["higher_is_better"].get(name, {})
        hashes = [[one["doc_hash"], one["prompt_hash"], one["target_hash"]] for one in found["samples"][name]]
        metrics = {}
        for key, value in values.items():
            metric, comma, of_filter = key.partition(",")
            if not comma or isinstance(value, str):
                continue  # a name, or no number, as a standard error of one example
            direction = "max" if is_better.get(metric) else "min"
            metrics[metric if of_filter == "none" else f"{metric}/{of_filter}"] = figure(
                float(value), version, direction
            )
        tasks.append(
            {
                "name": f"lm-eval/{name}",
                "dataset_fingerprint": sha256(orjson.dumps(hashes)),
                "n": int(found["n-samples"][name]["effective"]),
                "metrics": metrics,
            }
        )
    return tasks
