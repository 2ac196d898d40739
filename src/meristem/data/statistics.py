"""What a corpus holds, counted."""

from dataclasses import dataclass

import numpy as np

from meristem.data.corpus import Corpus

_PORTION = 1 << 22


@dataclass(frozen=True)
class SplitCounts:
    """Of one split: the tokens of each document, how often each id stands there, and the bytes of its text.

    n_of: documents and tokens by source, in the order of the corpus.
    """

    lengths: np.ndarray
    ids: np.ndarray
    size_bytes: int
    n_of: dict[str, tuple[int, int]]

    def to_json(self) -> dict[str, object]:
        """Figures; of a corpus of one source nothing by source."""
        n_tokens = int(self.lengths.sum())
        least, tenth, median, ninth, longest = np.quantile(self.lengths, (0, 0.1, 0.5, 0.9, 1)).tolist()
        figures: dict[str, object] = {
            "documents": len(self.lengths),
            "tokens": n_tokens,
            "size_bytes": self.size_bytes,
            "bytes_per_token": self.size_bytes / n_tokens,
            "tokens_per_document": {
                "shortest": int(least),
                "10 %": tenth,
                "median": median,
                "90 %": ninth,
                "longest": int(longest),
            },
            "ids_used": int(np.count_nonzero(self.ids)),
        }
        if len(self.n_of) > 1:
            figures["sources"] = {
                name: {"documents": documents, "tokens": tokens} for name, (documents, tokens) in self.n_of.items()
            }
        return figures


def count(corpus: Corpus) -> dict[str, SplitCounts]:
    """The counts of every split; tokens are read in portions."""
    found = {}
    for split in corpus.splits:
        tokens, edges = corpus.tokens(split), corpus.documents(split).astype(np.int64)
        ids = np.zeros(corpus.tokenizer.vocab_size, dtype=np.int64)
        for start in range(0, len(tokens), _PORTION):
            ids += np.bincount(tokens[start : start + _PORTION], minlength=len(ids))
        n_of = {
            name: (own.stop - own.start, int(edges[own.stop] - edges[own.start]))
            for name, own in corpus.sources(split).items()
        }
        found[split] = SplitCounts(np.diff(edges), ids, corpus.size_bytes(split), n_of)
    return found
