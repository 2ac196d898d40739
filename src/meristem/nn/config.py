"""The settings of the memory inside a layer."""

from typing import Annotated, ClassVar, Final, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from meristem.config import ConfigSection
from meristem.errors import ConflictingKeys


class MemoryCacheConfig(ConfigSection):
    """Whether the memories of earlier segments are cached, and how a token reads them beside the running one."""

    outside_identity: ClassVar = frozenset()

    read: Annotated[
        Literal["none", "sum", "gated", "soup", "sparse"],
        Field(
            description="How cached memories are read: no cache; summed; weighed; as one mixed memory; a few of them."
        ),
    ] = "none"
    segments: Annotated[
        Literal["constant", "logarithmic"],
        Field(description="One memory for each segment, or neighbours of one size joined: about log2 of their number."),
    ] = "constant"
    length: Annotated[int, Field(ge=1, description="Tokens of a segment, at whose end the memory is cached.")] = 256
    top: Annotated[int, Field(ge=1, description="Cached memories that a token of `sparse` reads.")] = 4
    limit: Annotated[int, Field(ge=1, description="Most memories cached; the oldest is dropped first.")] = 16
    write: Annotated[
        Literal["continue", "fresh"],
        Field(description="Whether a segment goes on with the memory of the one before, or begins with a fresh one."),
    ] = "continue"

    @property
    def reads(self) -> frozenset[str]:
        """The keys that mean something to this choice."""
        keys = frozenset(type(self).model_fields) if self.read != "none" else frozenset({"read"})
        return keys if self.read == "sparse" else keys - {"top"}

    @model_validator(mode="after")
    def _has_no_dead_key(self) -> Self:
        why = f"nothing reads it with memory.cache.read={self.read}"
        self.refuse_dead("memory.cache", self.reads, why, "memory.cache.read")
        return self

    @model_validator(mode="after")
    def _segments_can_be_joined(self) -> Self:
        if self.segments == "logarithmic" and self.write == "fresh":
            raise ConflictingKeys(
                "memory.cache.segments is 'logarithmic' and memory.cache.write 'fresh': of two segments the memory of "
                "the later stands for both, and one that began afresh holds nothing of the earlier. Set "
                "memory.cache.write=continue, or memory.cache.segments=constant.",
                path="memory.cache.write",
                value=self.write,
            )
        return self


PERIODS: Final = 8
"""How much slower than the one before a level is, where no periods are given."""


def _periods(given: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    return tuple(PERIODS**level for level in range(count)) if given is None else given


def _period_mistakes(periods: tuple[int, ...], count: int) -> list[str]:
    """Why these cannot be the periods of so many levels."""
    mistakes = []
    if len(periods) != count:
        mistakes.append(f"there are {len(periods)} periods for a count of {count}")
    if periods and periods[0] != 1:
        mistakes.append(f"the first period is {periods[0]}, and the fastest level has period 1")
    if any(later <= earlier for earlier, later in zip(periods, periods[1:], strict=False)):
        mistakes.append("a period is not greater than the one before")
    return mistakes


def _refuse(section: str, found: ConfigSection, mistakes: list[str]) -> None:
    if mistakes:
        raise ConflictingKeys(
            f"{section} cannot be used: {'; '.join(mistakes)}. Found {found!r}. As periods take increasing numbers "
            f"from 1 on, one for each level, such as [1, 8, 64].",
            path=section,
            reasons=mistakes,
        )


class LevelsConfig(ConfigSection):
    """Memories side by side that learn at different speeds; one level is the plain memory."""

    outside_identity: ClassVar = frozenset()

    count: Annotated[int, Field(ge=1, description="How many levels.")] = 1
    periods: Annotated[
        tuple[int, ...] | None, Field(description="Tokens between two writes of each level; null for 1, 8, 64, ...")
    ] = None
    tokens: Annotated[
        Literal["pooled", "each"],
        Field(
            description="Slow levels write one mean per period; or every token, and are read as the last period ended."
        ),
    ] = "pooled"
    mix: Annotated[
        Literal["auto", "sum", "inv_sqrt", "softmax"],
        Field(
            description="How outputs are combined; auto adds two levels and divides more by the root of their number."
        ),
    ] = "auto"
    reset_after: Annotated[
        tuple[int, ...] | None,
        Field(description="Periods after which each level begins afresh from its learned start; null for never."),
    ] = None
    frequency: Annotated[
        Literal["fixed", "output", "write"],
        Field(description="Slow levels are always on; or a learned gate says when they are read; or when they write."),
    ] = "fixed"
    anneal: Annotated[int, Field(ge=0, description="Tokens of a text before its learned gates begin to act.")] = 0
    budget: Annotated[float, Field(ge=0, description="Weight of the loss that holds learned gates at 1 / period.")] = (
        0.01
    )

    @property
    def all_periods(self) -> tuple[int, ...]:
        """The period of every level, the fastest first."""
        return _periods(self.periods, self.count)

    @property
    def joined_by(self) -> str:
        """``mix``, with ``auto`` decided."""
        return ("sum" if self.count <= 2 else "inv_sqrt") if self.mix == "auto" else self.mix

    @model_validator(mode="after")
    def _levels_go_together(self) -> Self:
        mistakes = _period_mistakes(self.all_periods, self.count)
        resets = self.reset_after or ()
        if self.reset_after is not None and len(resets) != self.count:
            mistakes.append(f"reset_after has {len(resets)} numbers for a count of {self.count}")
        if any(n_periods < 1 for n_periods in resets):
            mistakes.append("reset_after has a number below 1")
        if self.mix == "sum" and self.count > 2:
            mistakes.append(f"mix 'sum' is for at most 2 levels and would grow with {self.count}; take inv_sqrt")
        if self.frequency == "write" and self.tokens == "pooled":
            mistakes.append("frequency 'write' needs tokens 'each', for a pooled level writes once per period already")
        _refuse("memory.levels", self, mistakes)
        return self

    @model_validator(mode="after")
    def _has_no_dead_key(self) -> Self:
        alone = frozenset({"count", "periods", "reset_after"})
        keys = alone if self.count == 1 else frozenset(type(self).model_fields)
        keys = keys - {"anneal", "budget"} if self.frequency == "fixed" else keys
        why = f"nothing reads it with a count of {self.count} and frequency '{self.frequency}'"
        self.refuse_dead(
            "memory.levels", keys, why, "memory.levels.count or memory.levels.frequency", who="such a memory"
        )
        return self


class CMSConfig(ConfigSection):
    """Feed-forward layers on each other whose weights are stepped at different speeds."""

    outside_identity: ClassVar = frozenset()

    count: Annotated[int, Field(ge=1, description="How many levels.")] = 2
    periods: Annotated[
        tuple[int, ...] | None,
        Field(description="Optimizer steps between two updates of each level; null for 1, 8, 64, ..."),
    ] = None
    order: Annotated[
        Literal["fastest", "slowest"], Field(description="Which level the hidden vector goes through first.")
    ] = "fastest"
    variant: Annotated[
        Literal["chained", "independent"],
        Field(description="Each level reads what the one before gives; or all read the same, and a learned sum joins."),
    ] = "chained"
    tokens: Annotated[
        Literal["each", "pooled"],
        Field(description="Levels read every token; or slow ones the mean of each period, counted in tokens."),
    ] = "each"

    @property
    def all_periods(self) -> tuple[int, ...]:
        """The period of every level, the fastest first."""
        return _periods(self.periods, self.count)

    @model_validator(mode="after")
    def _levels_go_together(self) -> Self:
        mistakes = _period_mistakes(self.all_periods, self.count)
        if self.variant == "independent" and self.order != "fastest":
            mistakes.append("order 'slowest' means nothing to the variant 'independent', whose levels read the same")
        if self.count == 1 and (self.variant, self.order, self.tokens) != ("chained", "fastest", "each"):
            mistakes.append("variant, order and tokens mean nothing to a single level")
        _refuse("model.levels", self, mistakes)
        return self


class SelfReferenceConfig(ConfigSection):
    """Memories that make the keys, values, write rates and retain factors of a memory (memory.md 7)."""

    outside_identity: ClassVar = frozenset()

    setting: Annotated[
        Literal["static", "adaptive", "self_generated"],
        Field(description="What makes keys and gates is not written; is written; and makes its own values for it."),
    ] = "self_generated"
    structure: Annotated[
        Literal["matrix", "mlp"], Field(description="One matrix per memory, solved exactly, or two layers.")
    ] = "matrix"
    loss: Annotated[Literal["dot", "squared"], Field(description="The loss that all memories minimise.")] = "dot"
    adaptive_query: Annotated[bool, Field(description="Queries are made by a memory as well.")] = False
    chunk_memory: Annotated[
        int, Field(ge=1, le=128, description="Tokens for which the memory makes its values at one value of its own.")
    ] = 8
    chunk_other: Annotated[
        int, Field(ge=1, le=128, description="Tokens for which all else is made by the memories that began them.")
    ] = 64
    eta_scale: Annotated[float, Field(gt=0, le=1, description="Write rate at the start; it is learned.")] = 1e-3
    half_life: Annotated[
        float, Field(gt=0, description="Tokens after which what was there at the start, keys included, is one half.")
    ] = 32768.0
    unit_value: Annotated[
        bool,
        Field(description="Values of length one: without, memories that generate their own values grow without bound."),
    ] = True

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        reasons = []
        small, large = sorted((self.chunk_memory, self.chunk_other))
        if large % small:
            reasons.append(
                f"chunk_memory {self.chunk_memory} and chunk_other {self.chunk_other} do not nest; make one a multiple "
                f"of the other"
            )
        if self.setting == "static" and self.adaptive_query:
            reasons.append(
                "adaptive_query is true and setting 'static' lets nothing adapt; set it to false, or setting=adaptive"
            )
        if reasons:
            raise ConflictingKeys(f"memory.self_reference: {'; '.join(reasons)}.", reasons=reasons)
        return self


HalfLife: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class MemoryConfig(ConfigSection):
    """Which rule a memory follows, how it is run, and how its gates begin."""

    outside_identity: ClassVar = frozenset()

    rule: Annotated[
        str,
        Field(description="A name of the catalogue (`meristem plugins ls --kind memory`), such as titans(n_layers=2)."),
    ] = "titans"
    structure: Annotated[
        str | None, Field(description="What stores it, instead of the rule's own structure.", examples=["mlp"])
    ] = None
    bias: Annotated[
        str | None, Field(description="What it is trained to do, as power(p=3).", examples=["power(p=3)"])
    ] = None
    retention: Annotated[
        str | None, Field(description="What becomes of old memory, as elastic(alpha=5).", examples=["elastic(alpha=5)"])
    ] = None
    update: Annotated[
        str | None, Field(description="How surprises become change, as implicit.", examples=["implicit"])
    ] = None
    features: Annotated[
        str | None, Field(description="What is made of keys and queries first.", examples=["polynomial"])
    ] = None
    reads: Annotated[
        Literal["after", "before"] | None, Field(description="Whether a token reads after or before it is written.")
    ] = None
    probe: Annotated[
        Literal["cold", "warm"] | None, Field(description="Whether surprises are measured at old or retained memory.")
    ] = None
    form: Annotated[
        str,
        Field(
            description="How a sequence is run; `auto` takes the fast exact form, else the one that the rule declares."
        ),
    ] = "auto"
    chunk: Annotated[int, Field(ge=1, le=128, description="Tokens that a chunk form takes together.")] = 32
    head_dim: Annotated[
        int, Field(ge=1, description="Key and value width of one memory; the model width is cut into such heads.")
    ] = 32
    half_life: Annotated[
        HalfLife | Annotated[tuple[HalfLife, ...], Field(min_length=1)],
        Field(
            description="Tokens after which a fresh memory has faded to one half; of a list, such as [16, 65536], the "
            "first and the last head have its ends, and those between are spaced along it by equal factors."
        ),
    ] = 64.0
    retain_lr: Annotated[
        float,
        Field(
            gt=0,
            description="Factor on the learning rate of the retain gate alone: its logit is this times the map of a "
            "token. Small, half-lives stay near where they begin while all else learns.",
        ),
    ] = 1.0
    write_rate: Annotated[
        float, Field(gt=0, lt=1, description="Write rate at the start, before the factor 1 - momentum.")
    ] = 0.1
    write_limit: Annotated[
        float,
        Field(gt=0, le=1, description="Greatest write rate; 2 / chunk keeps any frozen chunk from diverging."),
    ] = 1.0
    momentum: Annotated[float, Field(gt=0, lt=1, description="Momentum at the start, for rules that carry it.")] = 0.5
    gates: Annotated[
        Literal["head", "channel"],
        Field(description="One gate for a head, or one for each of its value channels: slower, for a matrix only."),
    ] = "head"
    init: Annotated[
        Literal["random", "induction"],
        Field(
            description="How keys begin: drawn; or made as queries are, of the token before, so that a token finds "
            "what came after the last one like it."
        ),
    ] = "random"
    gate_rank: Annotated[
        int | None, Field(ge=1, description="Gates are mapped through so few numbers; null for a full map.")
    ] = None
    conv: Annotated[
        int, Field(ge=1, description="Tokens that the short convolution of keys, values and queries sees.")
    ] = 4
    cache: MemoryCacheConfig = MemoryCacheConfig()
    levels: LevelsConfig = LevelsConfig()
    self_reference: SelfReferenceConfig = SelfReferenceConfig()

    def n_heads_in(self, width: int) -> int:
        """How many heads a width is cut into. Raises ConflictingKeys where they do not fill it."""
        if width % self.head_dim:
            raise ConflictingKeys(
                f"model.dim {width} is not a multiple of memory.head_dim {self.head_dim}. "
                f"Set memory.head_dim to a divisor of {width}."
            )
        return width // self.head_dim

    def half_lives(self, n_heads: int) -> list[float]:
        """The first half-life of each head, in tokens."""
        given = self.half_life if isinstance(self.half_life, tuple) else (self.half_life,)
        if len(given) == 1:
            return [given[0]] * n_heads
        found = []
        for head in range(n_heads):
            place = (head / (n_heads - 1) if n_heads > 1 else 0.5) * (len(given) - 1)
            low = min(int(place), len(given) - 2)
            found.append(given[low] * (given[low + 1] / given[low]) ** (place - low))
        return found

    @model_validator(mode="after")
    def _keeps_or_has_levels(self) -> Self:
        if self.cache.read != "none" and self.levels != LevelsConfig():
            raise ConflictingKeys(
                f"memory.cache.read is '{self.cache.read}' and memory.levels has a count of {self.levels.count}: what "
                f"is kept is of one memory, never begun afresh. Set memory.cache.read=none, or remove memory.levels.",
                path="memory.levels",
            )
        return self
