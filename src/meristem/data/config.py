"""Settings of the text: where it comes from, how it is cut into tokens, and in which order it is read."""

from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from meristem.config import ConfigSection
from meristem.errors import ConflictingKeys

Order = Literal["shuffled", "curriculum", "sequential", "random", "documents"]
CARRIED: Final = frozenset({"sequential", "documents"})
"""Orders in which a row reads on, so that its memory is carried from sequence to sequence."""
Documents = Literal["join", "within"]


class TokenizerConfig(ConfigSection):
    """How text becomes ids."""

    outside_identity: ClassVar = frozenset()

    kind: Literal["byte", "bpe"] = Field(
        default="byte", description="byte: 256 ids, one per byte; bpe: byte pairs learned from the training text"
    )
    vocab_size: int = Field(default=2048, ge=256, le=1 << 20, description="most entries a bpe may have; byte has 256")


class NotebookConfig(ConfigSection):
    """The text of data.source=notebook (``data.notebook``)."""

    outside_identity: ClassVar = frozenset()

    size_bytes: int = Field(default=16_000_000, ge=1_000_000, description="bytes of text, the last document complete")
    seed: int = Field(default=0, ge=0, description="another one makes another text")
    first_share: float = Field(
        default=0.9, gt=0, le=1, description="share of the bytes of the first document that are about facts"
    )
    last_share: float = Field(
        default=0.1, gt=0, le=1, description="the same of the last document; in between it changes geometrically"
    )


class DataConfig(ConfigSection):
    """The text, its division, and the order in which sequences are read."""

    outside_identity: ClassVar = frozenset({"root", "download", "mirror"})

    source: str = Field(
        default="stdlib",
        min_length=1,
        description="stdlib, stdlib-docs, notebook, installed:NAME, a registered download, a file or a directory, or "
        "several joined by +",
    )
    root: Path | None = Field(
        default=None,
        description="directory of prepared corpora and downloads; default $MERISTEM_CACHE or ~/.cache/meristem",
    )
    include: tuple[str, ...] = Field(default=(), description="globs of the files of a directory to use; none means all")
    exclude: tuple[str, ...] = Field(default=(), description="globs of files and directories to leave out")
    download: bool = Field(default=False, description="fetch a registered text that is not here yet")
    mirror: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="base address that registered texts are fetched from instead",
        examples=["https://example.org/texts"],
    )
    notebook: NotebookConfig = Field(default=NotebookConfig(), description="of the generated text")
    validation: float = Field(default=0.1, ge=0, lt=1, description="share of the documents held out")
    seq_len: int = Field(default=512, ge=1, description="tokens of one batch row")
    stride: int | None = Field(
        default=None, ge=1, description="tokens between sequence starts; null: data.seq_len, or 1 when order is random"
    )
    batch_size: int = Field(default=8, ge=1, description="rows of a batch")
    order: Order = Field(
        default="shuffled",
        description="shuffled: each sequence once per epoch; curriculum: the same, but one twentieth of the text after "
        "the other; sequential: each row reads on; random: with replacement; "
        "documents: each row reads whole documents in shuffled order, with a fresh memory for each",
    )
    documents: Documents = Field(
        default="join", description="join: sequences run on over the ends of documents; within: they never do"
    )

    @model_validator(mode="after")
    def _reads_on(self) -> Self:
        if self.order == "sequential" and self.documents == "within":
            raise ConflictingKeys(
                "data.order=sequential carries a memory on from sequence to sequence, also over the end of a document; "
                "data.documents=within forbids that. Set data.documents=join, or data.order=shuffled."
            )
        if self.order == "documents" and self.documents == "within":
            raise ConflictingKeys(
                "data.order=documents reads whole documents, several in one sequence where they are short; "
                "data.documents=within has one in each. Leave data.documents out, or set data.order=shuffled."
            )
        if self.order in CARRIED and self.stride not in (None, self.seq_len):
            raise ConflictingKeys(
                f"data.order={self.order} reads every token once: its stride is data.seq_len, {self.seq_len}, "
                f"not {self.stride}. Leave data.stride out, or set data.order=shuffled."
            )
        return self
