"""Text from drawn ids, up to the first of some texts that end it."""

from collections.abc import Collection, Sequence

from meristem.data.chat import END_OF_REPLY
from meristem.data.tokenizer import Tokenizer
from meristem.errors import WrongValue


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
        self._waiting, self._ends = "", ends
        self.found: str | None = None

    def feed(self, token_id: int) -> str:
        """The text that is sure once this token has come; often none."""
        if token_id not in self._ends:
            return self._released(self._characters.feed(token_id))
        rest = self.finish()
        self.found = self.found or END_OF_REPLY
        return rest

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


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which the stop may have begun."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
