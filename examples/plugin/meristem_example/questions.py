"""A task and a metric: ``meristem eval CKPT --task sums``, and ``metrics: [brevity]`` in a task file."""

from meristem.evaluate.metric import Metric, mean
from meristem.evaluate.tasks import Example, Task, TaskConfig

MERISTEM_API = 1


def sums(config: TaskConfig) -> Task:
    """Sums of two digits, of which the answer is written; its examples are made here and no file is read."""
    pairs = [(a, b) for a in range(1, 6) for b in range(1, 6)]
    examples = tuple(Example(f"{a}+{b}", f"{a} plus {b} is", (str(a + b),)) for a, b in pairs)
    chosen = tuple(config.metrics or ("exact_match", "brevity"))
    return Task(config.name or "sums", "generate", examples, chosen, max_tokens=4)


def brevity() -> Metric:
    """The share of texts of one word: a mean of what each text adds, so that shards merge exactly."""
    return mean("brevity", ("text",), lambda found: int(len((found.text or "").split()) == 1))
