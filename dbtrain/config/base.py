"""What settings are made of: strict, frozen sections and the kinds of values in them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Base of every section: no unknown keys, no silent conversions, no edits."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def no_number(value: Any) -> Any:
    """1 equals True, and would pass for it."""
    return str(value) if type(value) is int else value


Names = Annotated[tuple[str, ...], BeforeValidator(listed)]  # YAML has lists, frozen models want tuples
Targets = Annotated[str | tuple[str, ...], BeforeValidator(listed)]
Share = Annotated[float, Field(ge=0, lt=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Steps = Annotated[int, Field(ge=1, le=1000)]  # of a sampler: no more than a base was trained with
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
