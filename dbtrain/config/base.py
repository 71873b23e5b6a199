"""Building blocks of the config: the section base class and the value types."""

from __future__ import annotations

import os
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

T = TypeVar("T")


class Section(BaseModel):
    """Base class of all sections: no unknown keys, no silent conversions, immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def path_text(value: Any) -> Any:
    """A `Path` as text."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def listed(value: Any) -> Any:
    """A list as a tuple, as YAML has lists and frozen models need tuples."""
    return tuple(value) if isinstance(value, list) else value


def one_or_listed(value: Any) -> Any:
    """A list, or a single text, as a tuple."""
    return (value,) if isinstance(value, str) else listed(value)


def split_or_listed(value: Any) -> Any:
    """A list, or words with commas between them, as a tuple."""
    return tuple(word.strip() for word in value.split(",")) if isinstance(value, str) else listed(value)


def nothing_or_table(value: Any) -> Any:
    """`null` as an empty table."""
    return {} if value is None else value


def no_number(value: Any) -> Any:
    """An int as text: 1 == True, so pydantic would accept it for a boolean literal."""
    return str(value) if type(value) is int else value


Names = Annotated[tuple[str, ...], BeforeValidator(one_or_listed)]
Targets = Annotated[str | tuple[str, ...], BeforeValidator(listed)]
Patterns = Annotated[dict[str, T], BeforeValidator(nothing_or_table)]
Share = Annotated[float, Field(ge=0, lt=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, BeforeValidator(path_text), Field(min_length=1, pattern=r"^[^\x00]*$")]
Count = Annotated[int, Field(ge=1, le=10**6)]  # bounded, as lists are as long as some of them
MOST_REPEATS = 1000  # of a photo in an epoch, which lists each of them
Repeats = Annotated[int, Field(ge=1, le=MOST_REPEATS)]
Rank = Annotated[int, Field(ge=1, le=2**14)]  # of an adapter; more than the widest layer of any base
Side = Annotated[int, Field(ge=1, le=2**14)]  # px
SizeText = Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")]  # width x height, px
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Steps = Annotated[int, Field(ge=1, le=1000)]  # of a sampler; base models have 1000 training timesteps
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
