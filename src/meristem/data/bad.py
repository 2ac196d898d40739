"""Records that hold no text, counted while a text is read."""

from dataclasses import dataclass, field
from typing import Final

from meristem.data.sources import Document
from meristem.errors import DataError

_EXAMPLES: Final = 5
"""How many bad records the manifest shows."""


@dataclass
class BadRecords:
    """Records that hold no text: how many of how many, and the first few with the reason."""

    most: float
    n: int = 0
    n_records: int = 0
    examples: list[str] = field(default_factory=list)

    def count(self, document: Document) -> None:
        """Raises DataError at the first bad record where none is allowed."""
        self.n_records += 1
        if document.bad is None:
            return
        self.n += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{document.id}: {document.bad}")
        if self.most == 0:
            self.refuse()

    def require_few(self) -> None:
        """Raises DataError where more records are bad than may be."""
        if self.n > self.most * self.n_records:
            self.refuse()

    def refuse(self) -> None:
        shown = "; ".join(self.examples)
        is_first = self.n_records == 1
        what = "the first record holds" if is_first else f"{self.n} of the first {self.n_records} records hold"
        raise DataError(
            f"{what} no text, and data.max_bad_fraction is {self.most:g}: {shown}. Mend them, set data.field, or "
            f"allow more.",
            found=self.n / self.n_records,
            accepted=self.most,
        )
