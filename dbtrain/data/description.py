"""What the JSON of a row in a shard has to say."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, StrictInt, StrictStr

Pair = Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=2**31)]], Field(min_length=2, max_length=2)]


class Description(BaseModel):
    """A row's description: what is read of it."""

    key: StrictStr
    source: StrictStr
    prompt: StrictInt = Field(ge=0)  # index into the prompt table
    prompts: tuple[Annotated[StrictInt, Field(ge=0)], ...] = ()  # those to draw from; `prompt` is the first
    original_size: Pair  # px
    crop: Pair  # px
