"""Settings of the text: where it comes from, how it is cut into tokens, and in which order it is read."""

from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from meristem.config import ConfigSection
from meristem.errors import ConflictingKeys, DeadKey, WrongValue

Order = Literal["shuffled", "curriculum", "sequential", "random", "documents"]
CARRIED: Final = frozenset({"sequential", "documents"})
"""Orders in which a row reads on, so that its memory is carried from sequence to sequence."""
MIXED_ROWS: Final = 4096
"""Rows in which every source of a mixture has exactly its share."""
MOST_SOURCES: Final = 64
"""Sources of a mixture."""
Score = Literal["none", "length", "rarity"]
Documents = Literal["join", "within", "mask", "reset"]
TokenizerKind = Literal["byte", "bpe", "unigram", "file", "sentencepiece", "hf"]
GIVEN: Final = frozenset({"file", "sentencepiece", "hf"})
"""Kinds of tokenizers that are read, not made."""
ScanText = Literal["off", "report", "refuse"]
Format = Literal["auto", "text", "jsonl", "chat", "csv", "tsv", "parquet", "arrow"]


class TokenizerConfig(ConfigSection):
    """How text becomes ids."""

    outside_identity: ClassVar = frozenset()

    kind: TokenizerKind = Field(
        default="byte",
        description="byte: 256 ids, one per byte; bpe, unigram: entries learned from the training text; file: a "
        "tokenizer.json of the tokenizers library; sentencepiece: a .model file; hf: that of a model of the hub",
    )
    vocab_size: int = Field(
        default=2048, ge=256, le=1 << 20, description="most entries that bpe or unigram may have; byte has 256"
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="of kind=file: the file, or a folder of transformers; of kind=sentencepiece: the file; "
        "of kind=hf: NAME@COMMIT",
        examples=["my-model/tokenizer.json", "gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e"],
    )
    special_tokens: tuple[str, ...] = Field(
        default=(), description="entries that stand for no text, behind those of a byte, bpe or unigram tokenizer"
    )
    bos_token: str | None = Field(
        default=None,
        description="special token before every document; null: what the files of the tokenizer say; '': none",
        examples=["<s>"],
    )
    eos_token: str | None = Field(
        default=None,
        description="special token after every document, which ends a reply; null and '' as for bos_token",
        examples=["</s>"],
    )
    chat_template: Path | None = Field(
        default=None,
        description="file with the layout of a chat, in Jinja as transformers has it; null: that of the files of the "
        "tokenizer, else lines as in data.source=notebook",
    )

    @model_validator(mode="after")
    def _path_is_read(self) -> Self:
        if self.kind not in GIVEN and self.path is not None:
            raise DeadKey(
                f"tokenizer.path is given, but tokenizer.kind={self.kind} reads none. Set tokenizer.kind to one of "
                f"{', '.join(sorted(GIVEN))}, or leave it out."
            )
        if self.kind in GIVEN and self.path is None:
            raise ConflictingKeys(
                f"tokenizer.kind={self.kind} reads a tokenizer, and tokenizer.path names none. Set it."
            )
        if self.kind in GIVEN and self.special_tokens:
            raise DeadKey(
                f"tokenizer.special_tokens is given, but tokenizer.kind={self.kind} brings its own. Leave it out."
            )
        if len(set(self.special_tokens)) < len(self.special_tokens) or "" in self.special_tokens:
            raise ConflictingKeys("tokenizer.special_tokens has an entry twice, or an empty one. Give each once.")
        if self.kind in ("bpe", "unigram") and self.vocab_size - len(self.special_tokens) < 256:
            raise ConflictingKeys(
                f"tokenizer.vocab_size={self.vocab_size} leaves no room for the 256 bytes beside "
                f"{len(self.special_tokens)} special tokens. Set it to {256 + len(self.special_tokens)} or more."
            )
        return self


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


class HubConfig(ConfigSection):
    """How a set of the library datasets is read, data.source=hf:NAME (``data.hf``)."""

    outside_identity: ClassVar = frozenset({"streaming"})

    streaming: bool = Field(default=False, description="read it while it comes, instead of fetching all of it before")
    rows: int | None = Field(default=None, ge=1, description="take so many of its rows, the first ones; null takes all")


class DifficultyConfig(ConfigSection):
    """Which documents are read when, the easiest first (``data.difficulty``)."""

    outside_identity: ClassVar = frozenset()

    score: Score = Field(
        default="none",
        description="what makes a document difficult; none: all are read from the beginning on; length: its tokens; "
        "rarity: bits per token, by how often each id is in the text",
    )
    start: float = Field(default=0.1, gt=0, le=1, description="share of each source that is read first, the easiest")
    cap: float = Field(
        default=1.0, gt=0, le=1, description="share that is read in the end; the most difficult rest is never read"
    )
    epochs: float = Field(
        default=1.0, gt=0, description="times through what is read of a source in the end, until its share is at cap"
    )

    @property
    def is_outside_identity(self) -> bool:
        """Runs without it are those of before there was any."""
        return self.score == "none"

    @property
    def layout(self) -> str:
        """All of it, as a cursor names the order that it counts in."""
        return f"{self.score},{self.start},{self.cap},{self.epochs}"

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.score == "none":
            self.refuse_dead(
                "data.difficulty",
                frozenset({"score"}),
                "data.difficulty.score=none orders nothing",
                "data.difficulty.score",
            )
        if self.start > self.cap:
            raise ConflictingKeys(
                f"data.difficulty.start={self.start:g} is more than data.difficulty.cap={self.cap:g}, and the share "
                f"that is read only rises. Lower start, or raise cap."
            )
        return self


class DataConfig(ConfigSection):
    """The text, its division, and the order in which sequences are read."""

    outside_identity: ClassVar = frozenset(
        {"root", "download", "mirror", "scan", "scan_baseline", "scan_bypass", "prefetch_bytes"}
    )

    source: str = Field(
        default="stdlib",
        min_length=1,
        description="stdlib, stdlib-docs, notebook, installed:NAME, a registered download, hf:NAME, a file or a "
        "directory, or several joined by +",
    )
    weights: tuple[float, ...] = Field(
        default=(),
        description="shares in which the rows of a batch are taken from the sources that data.source joins by +, in "
        "their order; [3, 1] is three quarters and one. Empty: their documents stand side by side",
        examples=[[0.9, 0.1]],
    )
    root: Path | None = Field(
        default=None,
        description="directory of prepared corpora and downloads; default $MERISTEM_CACHE or ~/.cache/meristem",
    )
    include: tuple[str, ...] = Field(default=(), description="globs of the files of a directory to use; none means all")
    exclude: tuple[str, ...] = Field(default=(), description="globs of files and directories to leave out")
    format: Format = Field(
        default="auto",
        description="how files hold text; auto: by their names, where all files of a source are of one format of "
        "records (.jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, .feather), else each file is a text; chat: JSON lines "
        "whose field holds messages, laid out by tokenizer.chat_template",
    )
    field: str = Field(default="text", min_length=1, description="key or column of a record that holds its text")
    max_bad_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="share of the records that may hold no text; more are refused"
    )
    download: bool = Field(default=False, description="fetch a registered text, or a set of hf:, that is not here yet")
    mirror: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="base address that registered texts are fetched from instead",
        examples=["https://example.org/texts"],
    )
    hf: HubConfig = Field(default=HubConfig(), description="of a set of the library datasets")
    notebook: NotebookConfig = Field(default=NotebookConfig(), description="of the generated text")
    scan: ScanText = Field(
        default="off",
        description="look for secrets in the text before it is used; report: record what was found; refuse: end there",
    )
    scan_baseline: Path | None = Field(
        default=None,
        description="YAML file of findings that are allowed, as `meristem scan --write-baseline` writes it",
    )
    scan_bypass: str | None = Field(
        default=None,
        min_length=3,
        description="reason to train on a text that scan=refuse would end at; it is recorded",
        examples=["tokens of a test server"],
    )
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
        default="join",
        description="join: sequences run on over the ends of documents; within: they never do; mask: they do, and "
        "attention does not look back over them, while memories read on; reset: they do, and each document begins as "
        "if it stood alone",
    )
    difficulty: DifficultyConfig = Field(default=DifficultyConfig(), description="of a curriculum over documents")
    prefetch_bytes: int = Field(
        default=1 << 26, ge=0, description="batches read ahead beside the training hold at most so many bytes; 0: none"
    )

    @property
    def resets(self) -> bool:
        """Whether a document within a sequence begins with a fresh memory."""
        return self.order == "documents" or self.documents == "reset"

    @model_validator(mode="after")
    def _scan_is_on(self) -> Self:
        if self.scan == "off" and self.scan_baseline is not None:
            raise DeadKey("data.scan_baseline is given, but data.scan=off reads none. Set data.scan=refuse or report.")
        if self.scan != "refuse" and self.scan_bypass is not None:
            raise DeadKey(f"data.scan_bypass is given, but data.scan={self.scan} refuses nothing. Leave it out.")
        return self

    @model_validator(mode="after")
    def _weighs_each(self) -> Self:
        if not self.weights:
            return self
        names = self.source.split("+")
        if len(names) != len(self.weights) or not all(names):
            raise ConflictingKeys(
                f"data.weights has {len(self.weights)} numbers, and data.source joins {len(names)} sources by +: "
                f"{', '.join(names)}. Give one weight for each, or leave data.weights out."
            )
        if min(self.weights) <= 0:
            raise WrongValue(
                f"data.weights is {list(self.weights)}; each has to be a number above 0. Leave a source that is not to "
                f"be read out of data.source.",
                path="data.weights",
                value=list(self.weights),
            )
        if len(set(names)) < len(names) or len(names) > MOST_SOURCES:
            raise ConflictingKeys(
                f"data.source={self.source} names a source twice, or more than {MOST_SOURCES}. Name each once, with "
                f"the sum of its data.weights."
            )
        if min(self.weights) * MIXED_ROWS < sum(self.weights):
            raise ConflictingKeys(
                f"data.weights gives a source {min(self.weights) / sum(self.weights):.2g} of the rows, less than one "
                f"in {MIXED_ROWS}. Raise it, or leave that source out of data.source."
            )
        if self.order == "sequential":
            raise ConflictingKeys(
                "data.order=sequential lets each row read on through one text; data.weights mixes several. Leave "
                "data.weights out, or set data.order=documents, whose rows read on as well."
            )
        return self

    @model_validator(mode="after")
    def _orders_once(self) -> Self:
        if self.difficulty.score != "none" and self.order not in ("shuffled", "documents"):
            raise ConflictingKeys(
                f"data.order={self.order} has an order of its own, and data.difficulty.score={self.difficulty.score} "
                f"another. Set data.order to shuffled or documents, or leave data.difficulty out."
            )
        return self

    @model_validator(mode="after")
    def _reads_on(self) -> Self:
        if self.order == "sequential" and self.documents == "within":
            raise ConflictingKeys(
                "data.order=sequential carries a memory on from sequence to sequence, also over the end of a document; "
                "data.documents=within forbids that. Set data.documents=join, or data.order=shuffled."
            )
        if self.order == "documents" and self.documents != "join":
            raise ConflictingKeys(
                "data.order=documents reads whole documents, several in one sequence where they are short, and begins "
                f"each afresh; data.documents={self.documents} is for other orders. Leave it out, or set "
                "data.order=shuffled."
            )
        if self.order in CARRIED and self.stride not in (None, self.seq_len):
            raise ConflictingKeys(
                f"data.order={self.order} reads every token once: its stride is data.seq_len, {self.seq_len}, "
                f"not {self.stride}. Leave data.stride out, or set data.order=shuffled."
            )
        return self
