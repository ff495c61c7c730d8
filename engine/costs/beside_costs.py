"""Costs of what passes between the host thread and others: the CPU that computes experts, and other GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...resources.profile_costs import Duration, HostCosts

if TYPE_CHECKING:
    from .costs import Costs


@dataclass(frozen=True, slots=True)
class BesideCosts:
    """The host's calls, and what passes until they count, in ns.

    `to_cpu_ns` is the host's time to hand a visit's work to the CPU, `from_cpu_ns` to order that its results come back,
    and `exchange_call_ns` for a GPU's part in an exchange of tokens. `notice_ns` is from the arrival of tokens to the
    start of an expert on the CPU, `results_ns` from the end of the last to the start of the copy of their results.
    """

    to_cpu_ns: int
    from_cpu_ns: int
    exchange_call_ns: int
    notice_ns: int
    results_ns: int


def beside_costs(costs: Costs, host: HostCosts, *, free: bool) -> BesideCosts:
    """Returns what a profile's host costs say; what they leave out, or where dispatch is free, is made of others."""

    def ns(cost: Duration | None, otherwise_ns: int) -> int:
        return otherwise_ns if cost is None or free else cost.ns

    return BesideCosts(
        ns(host.cpu_hand_over, costs.enqueue_ns + costs.records_ns),
        ns(host.cpu_take_back, 0),
        ns(host.exchange_call, costs.launch_ns),
        ns(host.cpu_notice, costs.synchronize_ns),
        ns(host.cpu_results, costs.copy_lags.after_other_ns + costs.enqueue_ns),
    )
