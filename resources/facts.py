"""What every number of a profile carries: where it came from, and a note that says how."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Source = Literal["measured", "published", "datasheet", "fitted", "assumed"]


class Part(BaseModel):
    """A part of a profile: no key that is not known, no number that is not finite, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Fact(Part):
    """A part that holds numbers."""

    source: Source
    note: str = ""
