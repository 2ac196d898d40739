"""The settings of the memory inside a layer."""

from typing import Annotated

from pydantic import Field

from meristem.config import Part


class MemoryPart(Part):
    """Which rule a memory follows, how it is run, and how its gates begin."""

    rule: Annotated[str, Field(description="A name of the catalogue: `meristem plugins ls --kind memory`.")] = "titans"
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
    momentum: Annotated[float, Field(gt=0, lt=1, description="Momentum at the start, for rules that carry it.")] = 0.5
    conv: Annotated[
        int, Field(ge=1, description="Tokens that the short convolution of keys, values and queries sees.")
    ] = 4
