"""Text from drawn ids, up to the first of some texts that end it."""

from collections.abc import Collection, Container, Sequence
from typing import Final

from meristem.data.chat import END_OF_REPLY
from meristem.data.tokenizer import Tokenizer
from meristem.errors import WrongValue


class _Every(Container[int]):
    """Holds every id."""

    def __contains__(self, token_id: object) -> bool:
        return True


EVERY: Final = _Every()
_UNREADABLE: Final = "\N{REPLACEMENT CHARACTER}"
"""What stands for bytes that are no character; any byte may complete it."""


class StopTexts:
    """Gives text as it comes, but for what may still become a stop.

    The first stop is the one that is complete first, and of two that end together the longer; what is given is the text
    before it, however the characters were cut into tokens. White space before the first word is passed over where
    ``is_trimmed``. An id of ``ends`` ends the text as END_OF_REPLY would.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        is_trimmed: bool = False,
        ends: Collection[int] = (),
    ) -> None:
        if "" in stops:
            raise WrongValue("a stop text is empty, which would end every reply at once. Leave it out.", key="stop")
        self._characters, self._stops, self._is_trimmed = tokenizer.decoder(), tuple(stops), is_trimmed
        self._waiting, self._ends = "", frozenset(ends)
        self.deciding = _deciding(tokenizer, self._stops, self._ends)
        self.found: str | None = None

    def feed(self, *token_ids: int) -> str:
        """The text that is sure once these tokens have come; often none.

        They may come one by one or many at once, as long as one of ``deciding`` is the last of its ``token_ids``.
        """
        if not token_ids or token_ids[-1] not in self._ends:
            return self._released(self._characters.feed(*token_ids))
        sure = self._released(self._characters.feed(*token_ids[:-1])) + self.finish()
        self.found = self.found or END_OF_REPLY
        return sure

    def finish(self) -> str:
        """What was held back, if no stop came."""
        if self.found is not None:
            return ""
        sure = self._released(self._characters.finish())
        rest, self._waiting = self._waiting, ""
        return sure if self.found is not None else sure + rest

    def _released(self, text: str) -> str:
        if self.found is not None:
            return ""
        if self._is_trimmed:
            text = text.lstrip()
            self._is_trimmed = not text
        self._waiting += text
        ends = [
            (self._waiting.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in self._waiting
        ]
        if ends:
            end, _, self.found = min(ends)
            sure, self._waiting = self._waiting[: end - len(self.found)], ""
            return sure
        n_held = max((_overlap(self._waiting, stop) for stop in self._stops), default=0)
        cut = len(self._waiting) - n_held
        sure, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return sure


def _deciding(tokenizer: Tokenizer, stops: Sequence[str], ends: frozenset[int]) -> Container[int]:
    """A stop is complete when its last byte has come, so that only an id that holds it may complete it."""
    if any(stop[-1] == _UNREADABLE for stop in stops):
        return EVERY
    return ends.union(*(tokenizer.ids_with(stop.encode()[-1]) for stop in stops))


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which the stop may have begun."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
