"""A text: ``data.source=squares``."""

from collections.abc import Iterator
from pathlib import Path

from meristem.data.config import DataConfig
from meristem.data.sources import Document, Source

MERISTEM_API = 1

N_DOCUMENTS = 200


def squares(data: DataConfig) -> Source:
    """Numbers and their squares, a document for each ten."""

    def read() -> Iterator[Document]:
        for number in range(N_DOCUMENTS):
            lines = [f"{n} times {n} is {n * n}.\n" for n in range(10 * number, 10 * number + 10)]
            yield Document(f"squares-{number}", "".join(lines).encode(), f"squares-{number}")

    # The files whose change would make another text: it is prepared again only then.
    return Source("squares", "squares", read, lambda: [Path(__file__)])
