"""The settings of the memory inside a layer."""

from typing import Annotated, Literal

from pydantic import Field

from meristem.config import Part


class MemoryPart(Part):
    """Which rule a memory follows, how it is run, and how its gates begin."""

    rule: Annotated[
        str,
        Field(description="A name of the catalogue (`meristem plugins ls --kind memory`), such as titans(n_layers=2)."),
    ] = "titans"
    structure: Annotated[str | None, Field(description="Where it is kept, in the place of the rule's own.")] = None
    bias: Annotated[str | None, Field(description="What it is trained to do, as power(p=3).")] = None
    retention: Annotated[str | None, Field(description="What becomes of old memory, as elastic(alpha=5).")] = None
    update: Annotated[str | None, Field(description="How surprises become change, as implicit.")] = None
    features: Annotated[str | None, Field(description="What is made of keys and queries first.")] = None
    reads: Annotated[
        Literal["after", "before"] | None, Field(description="Whether a token reads after or before it is written.")
    ] = None
    probe: Annotated[
        Literal["cold", "warm"] | None, Field(description="Whether surprises are measured at old or retained memory.")
    ] = None
    form: Annotated[str, Field(description="How a window is run; `auto` takes the fastest exact form.")] = "auto"
    chunk: Annotated[int, Field(ge=1, le=128, description="Tokens that a chunk form takes together.")] = 32
    head_width: Annotated[
        int, Field(ge=1, description="Key and value width of one memory; the model width is cut into such heads.")
    ] = 32
    half_life: Annotated[float, Field(gt=0, description="Tokens after which a fresh memory has faded to one half.")] = (
        64.0
    )
    write: Annotated[
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
    gate_rank: Annotated[
        int | None, Field(ge=1, description="Gates are mapped through so few numbers; null for a full map.")
    ] = None
    conv: Annotated[
        int, Field(ge=1, description="Tokens that the short convolution of keys, values and queries sees.")
    ] = 4
