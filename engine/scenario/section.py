"""What sections of a scenario are made of: the base of all, checks against tables, amounts with units."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
)

from ...errors import InputError
from ...units import gb_per_s, whole_bytes, written_bytes
from ...words import unknown_name

#: Bounds of what a scenario may say that something takes: nothing that is guessed or moved takes longer than 1,000 s
#: or is slower than 1 kB/s, and nothing is faster than 10^9 GB/s.
MOST_US, LEAST_GB_PER_S, MOST_GB_PER_S = 1e9, 1e-6, 1e9
#: A number of bytes, or one with a unit; kept as a number.
Bytes = Annotated[int, BeforeValidator(whole_bytes)]
#: The same, kept as it was written.
WrittenBytes = Annotated[str, BeforeValidator(written_bytes)]
GbPerS = Annotated[float, BeforeValidator(gb_per_s)]


def one_of(names: Collection[str]) -> AfterValidator:
    """Returns a check that admits the members of a table only, also one added later, and says who they are."""

    def check(value: str) -> str:
        if value not in names:
            raise InputError(unknown_name("value", value, names).removeprefix("value = "))
        return value

    return AfterValidator(check)


def budget_text(value: object, how: str) -> object:
    """Returns a budget that is a text; a number by itself could be of bytes, of experts or a share."""
    if not isinstance(value, str):
        raise InputError(f"must be a valid string with its unit: write it as {how}")
    return value


class Section(BaseModel):
    """A table of a scenario: unknown keys are refused, and nothing in it changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)
