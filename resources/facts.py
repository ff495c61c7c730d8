"""What every number of a profile carries: where it came from, and a note that says how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..dtypes import dtype_of
from ..errors import InputError
from ..units import whole_bytes, whole_flops, whole_rate

Source = Literal["measured", "published", "datasheet", "fitted", "assumed"]
#: No duration of a profile is longer, 1,000 s, and no number larger: simulated times are 64-bit numbers of ns.
_LONGEST_NS, _LARGEST = 10**12, 2**63 - 1
Dtype = Annotated[str, AfterValidator(dtype_of)]
Bytes = Annotated[int, BeforeValidator(whole_bytes)]
BytesPerSecond = Annotated[int, BeforeValidator(whole_rate)]
FlopsPerSecond = Annotated[int, BeforeValidator(whole_flops)]


class Part(BaseModel):
    """A part of a profile: no key that is not known, no number that is not finite, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_of_this_world(self) -> Self:
        for name, value in vars(self).items():
            most = _LONGEST_NS if name == "ns" or name.endswith("_ns") else _LARGEST
            if isinstance(value, int | float) and abs(value) > most:
                digits = f"{value:.3g}" if abs(value) < 1e300 else "a number of over 300 digits"
                raise InputError(f"{name} = {digits}: must be at most {most:.3g}")
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Returns a copy as pydantic's, without what was worked out of the old values (cached properties)."""
        copied = super().model_copy(update=update, deep=deep)
        for name in vars(copied).keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied


class Fact(Part):
    """A part that holds numbers. `device` is what they are of, where that is another device than the profile's."""

    source: Source
    note: str = ""
    device: str | None = None

    @property
    def provenance(self) -> str:
        """The source and, if it is not the profile's own, the device, in words."""
        return self.source if self.device is None else f"{self.source}, of {self.device}"


class Samples(Part):
    """What a measured number was made from: how many samples, their median and interquartile range."""

    n: int = Field(gt=0)
    median_ns: float = Field(ge=0)
    iqr_ns: float = Field(ge=0)


class Uncertainty(Part):
    """How far a cost can be off, as relative standard deviations.

    `run_spread`: of the medians of whole runs; `scatter`: of single events about their run's median;
    `held_back_error`: how far the fit was off, root mean square, on samples that it was not made from.
    """

    run_spread: float = Field(ge=0)
    scatter: float = Field(ge=0)
    held_back_error: float = Field(ge=0)

    @property
    def sigma(self) -> float:
        """How far the cost itself can be off, whatever single events do."""
        return math.hypot(self.run_spread, self.held_back_error)


class Cost(Fact):
    """A fact that says what it was made from and how far it can be off, where that is known."""

    samples: Samples | None = None
    uncertainty: Uncertainty | None = None
