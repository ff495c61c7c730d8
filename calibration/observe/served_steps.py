"""What `calibrate decode --requests` served, as observations: the steps of about as many rows are one setting.

Those with rows of a prompt are another. Each is predicted by a simulation of the very steps of its repeat. What copies
took between the repeats says how much of the link's rate they reach: that is measured, and not fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ...engine.costs.costs import part_costs
from ...engine.scenario.inputs import Inputs
from ...resources.runtime import OwnShare
from ...workloads.requests.request import is_decode
from ..decode.served import parts_of, took_ns

#: Fewer steps have no median worth the name.
_LEAST_STEPS = 3


@dataclass(frozen=True)
class ServedSteps:
    """Steps of a repeat of served.json, by their numbers."""

    repeat: Mapping[str, Any]
    numbers: tuple[int, ...]

    @property
    def ns(self) -> float:
        """What they took, in the median."""
        return self.median_of(took_ns(self.repeat))

    def median_of(self, each_ns: Sequence[int]) -> float:
        """Returns the median of theirs among what each step of the repeat takes."""
        return float(median(each_ns[number] for number in self.numbers))


def steps_by_rows(repeat: Mapping[str, Any]) -> dict[str, ServedSteps]:
    """Returns the steps of a repeat: those that decode, by their rows (1, 2, 3 to 4, …), and those with prompts."""
    numbers: dict[str, list[int]] = {}
    for number, step in enumerate(repeat["steps"]):
        rows = len(step["rows"])
        most = 1 << (rows - 1).bit_length()
        decoding = f"{most // 2 + 1}-{most}rows" if most > 2 else f"{most}rows"
        numbers.setdefault(decoding if is_decode(parts_of(step)) else "prompts", []).append(number)
    return {name: ServedSteps(repeat, tuple(own)) for name, own in sorted(numbers.items()) if len(own) >= _LEAST_STEPS}


def link_share(repeats: Iterable[tuple[Mapping[str, Any], Inputs]]) -> OwnShare | None:
    """Returns the share of the link's rate that copies reached beside repeats; None if nobody looked, or all of it."""
    shares = []
    for repeat, inputs in repeats:
        (costs, *_), (size_bytes, *_) = part_costs(inputs), inputs.model.expert_bytes
        start_ns = costs.h2d.queued.ns(0)
        taken = [ns - costs.h2d.gap.ns - start_ns for ns in repeat.get("copy_ns", ())]
        shares += [(costs.h2d.queued.ns(size_bytes) - start_ns) / max(ns, 1) for ns in taken]
    if not shares or median(shares) >= 1:
        return None
    return OwnShare(share=round(median(shares), 4), source="measured", note="copies between what was served")
