"""How a model is asked the examples of a task: the prompt is read once, and every answer from the state behind it.

What is found of an example depends on that example alone, so that shards of a task find what the whole does. Prompt and
answer are cut into tokens apart, as in a session, which has read the prompt before it writes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from meristem.data.chat import ends_of
from meristem.data.tokenizer import Tokenizer
from meristem.device.resolve import Device
from meristem.errors import NonFinite
from meristem.evaluate.likelihood import Reader
from meristem.evaluate.metric import Prediction, Scored
from meristem.evaluate.tasks import Example, Task
from meristem.memory.state import State, join_rows
from meristem.models.generate import BEGINNING, Sampling, generate


@dataclass(frozen=True)
class Reading:
    """Who is asked, and how it reads.

    batch: most texts read side by side, 1 where each changes weights. piece: most tokens read at once.
    """

    reader: Reader
    tokenizer: Tokenizer
    device: Device
    batch: int
    piece: int

    @torch.no_grad()
    def likelihoods(self, prompt: str, texts: Sequence[str]) -> list[Scored]:
        """The likelihood of each text right behind the prompt; where that is empty, behind what begins a document."""
        ids, state = self._read(prompt)
        rows = [self._following(text) for text in texts]
        found: list[Scored] = []
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            nats, n_top = self._score(ids[-1], state, part)
            found += [
                Scored(text, own_nats, len(row), int(self.tokenizer.byte_lengths[row].sum()), own_top)
                for text, row, own_nats, own_top in zip(texts[start:], part, nats, n_top, strict=False)
            ]
        return found

    @torch.no_grad()
    def continuation(self, prompt: str, max_tokens: int, stop: Sequence[str]) -> str:
        """The greedy text behind a prompt: of ``max_tokens`` at most, up to a token that ends a document or a reply, or
        until it holds one of ``stop``, which is left out."""
        ids, state = self._read(prompt)
        (last_bt,) = self.device.move(torch.tensor([ids[-1:]]))
        decoder, text, ends = self.tokenizer.decoder(), "", ends_of(self.tokenizer)
        generator = torch.Generator(self.device.device)
        with self.device.autocast():
            for drawn in generate(
                cast(nn.Module, self.reader),
                last_bt,
                state,
                max_tokens=max_tokens,
                sampling=Sampling(temperature=0.0),
                generator=generator,
            ):
                if drawn.token_id in ends:
                    break
                text += decoder.feed(drawn.token_id)
                if (end := _first_stop(text, stop)) is not None:
                    return text[:end]
        text += decoder.finish()
        end = _first_stop(text, stop)
        return text if end is None else text[:end]

    def distance(self, prompt: str, answer: str) -> int | None:
        """Tokens from the end of the last place where an answer stands in a prompt to the end of the prompt."""
        place = prompt.rfind(answer.strip())
        if place < 0 or not answer.strip():
            return None
        return len(self._following(prompt[place + len(answer.strip()) :]))

    def _following(self, text: str) -> list[int]:
        """The ids of a text that follows another: what a tokenizer puts before every text is there already."""
        return self.tokenizer.encode(text.removeprefix(self.tokenizer.prefix.decode()))

    def _read(self, prompt: str) -> tuple[list[int], State | None]:
        """The ids of a prompt, and the state after all of them but the last."""
        ids = self.tokenizer.begin(self.tokenizer.encode(prompt)) if prompt else self.tokenizer.begin([])
        ids = ids or self.tokenizer.encode(BEGINNING)
        state: State | None = None
        for start in range(0, len(ids) - 1, self.piece):
            (tokens_bt,) = self.device.move(torch.tensor([ids[:-1][start : start + self.piece]]))
            with self.device.autocast():
                _, state = self.reader(tokens_bt, state)
        return ids, state

    def _score(self, last: int, state: State | None, rows: Sequence[Sequence[int]]) -> tuple[list[float], list[int]]:
        """Nats of each row behind the token ``last``, and how many of its tokens were the likeliest."""
        longest = max(map(len, rows))
        if not longest:
            return [0.0] * len(rows), [0] * len(rows)
        padded = [[last, *row, *[last] * (longest - len(row))] for row in rows]
        (tokens_bt,) = self.device.move(torch.tensor(padded))
        state = None if state is None else join_rows([state] * len(rows))
        nats: list[Tensor] = []
        is_top: list[Tensor] = []
        for start in range(0, longest, self.piece):
            part_bt = tokens_bt[:, start : start + self.piece + 1]
            with self.device.autocast():
                logits_bto, state = self.reader(part_bt[:, :-1], state)
            shares_bto = logits_bto.float().log_softmax(-1)
            nats.append(-shares_bto.gather(-1, part_bt[:, 1:, None])[..., 0].double().cpu())
            is_top.append((logits_bto.argmax(-1) == part_bt[:, 1:]).cpu())
        nats_bt, is_top_bt = torch.cat(nats, dim=1), torch.cat(is_top, dim=1)
        return (
            [float(nats_bt[number, : len(row)].sum()) for number, row in enumerate(rows)],
            [int(is_top_bt[number, : len(row)].sum()) for number, row in enumerate(rows)],
        )


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    places = [place for each in stop if (place := text.find(each)) >= 0]
    return min(places, default=None)


def ask(reading: Reading, task: Task, numbers: Iterable[int]) -> Iterator[Prediction]:
    """What a model makes of the examples of a task with these numbers, each from a fresh memory.

    NonFinite where a likelihood is no number.
    """
    for number in numbers:
        found = _asked(reading, task, number, task.examples[number])
        if any(not 0 <= scored.nats < float("inf") for scored in found.scored):
            raise NonFinite(
                f"the model's prediction of example {number} of task '{task.name}' is not finite, so it has no "
                f"likelihood. Use another checkpoint.",
                task=task.name,
                example=number,
            )
        yield found


def _asked(reading: Reading, task: Task, number: int, example: Example) -> Prediction:
    fields = (task.name, number, example.id, example.prompt, example.answers)
    if task.kind == "generate":
        text = reading.continuation(example.prompt, task.max_tokens, task.stop)
        distances = [reading.distance(example.prompt, answer) for answer in example.answers]
        known = [distance for distance in distances if distance is not None]
        return Prediction(*fields, text=text, distance=min(known, default=None))
    delimiter = task.delimiter if example.prompt else ""
    texts = example.choices or example.answers
    scored = reading.likelihoods(example.prompt, [f"{delimiter}{text}" for text in texts])
    distance = None if example.right is None else reading.distance(example.prompt, example.answers[0])
    return Prediction(*fields, scored=tuple(scored), right=example.right, distance=distance)
