"""How large a trace, and the model that it is of, may be."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from ..errors import InputError

Array = npt.NDArray[Any]

#: More experts than this do not fit the widest type of `experts`.
MAX_EXPERTS = 1 << 16
#: No model comes near either; a file that says more is damaged. Much is kept for every expert of every layer.
MAX_LAYERS, MAX_TOP_K, MAX_TOTAL_EXPERTS = 1 << 16, 512, 1 << 18


class TraceError(InputError):
    """A trace that cannot be right: one line naming file, array, row and what would be right."""


def check_num_experts(where: str, num_experts: object) -> None:
    """Refuse what is no number of experts of a layer."""
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or not 1 <= num_experts <= MAX_EXPERTS:
        raise TraceError(f"{where}: num_experts = {num_experts!r}: must be an integer 1..{MAX_EXPERTS}")


def check_total_experts(where: str, layers: int, experts: int, error: type[InputError] = TraceError) -> None:
    """Refuse more layers, or more experts in all of them, than any model has."""
    if layers > MAX_LAYERS or layers * experts > MAX_TOTAL_EXPERTS:
        raise error(
            f"{where}: {layers:,} layers of {experts:,} experts: must be at most {MAX_LAYERS:,} layers, and "
            f"{MAX_TOTAL_EXPERTS:,} experts in all of them"
        )
