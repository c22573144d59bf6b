"""What settings are made of: the frozen, strict table, and the kinds of its values."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Name = Annotated[str, StringConstraints(min_length=1)]
Label = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]  # given by the user; part of names
Geometry = dict[str, int | float | list[int]]
Keywords = dict[str, int | float | bool | str | list[int]]  # of timm's, beside our own students' numbers


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("two ascending positive numbers")
    return pair


def _ascending_fractions(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1] <= 1:
        raise ValueError("two ascending fractions above 0 and up to 1")
    return pair


def _rising(numbers: tuple[float, ...]) -> tuple[float, ...]:
    if list(numbers) != sorted(set(numbers)):
        raise ValueError("rising numbers, each once")
    return numbers


# strict=False on pairs only: TOML has arrays, no tuples
Ratios = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_ascending)]
Fractions = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_ascending_fractions)]
Betas = Annotated[tuple[Rate, Rate], Field(strict=False)]
Milestones = Annotated[tuple[Rate, ...], Field(strict=False), AfterValidator(_rising)]
Layers = Annotated[tuple[Count, Count, Count, Count], Field(strict=False), AfterValidator(_rising)]
Scales = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False, min_length=1), AfterValidator(_rising)
]


class Settings(BaseModel):
    """Frozen, refuses unknown keys, wrong types (an int is a float, nothing else is coerced), inf and nan."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
