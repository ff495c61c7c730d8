"""An upper bound of a run's duration, checked before it runs: times are 64-bit integers of ns, which end at 292 years.

The bound is far above what any run takes: each visit has every copy, read and kernel that it may have, one by one.
"""

from __future__ import annotations

from ..costs.costs import Costs, part_costs
from ..costs.offload_costs import CpuCosts, ShrunkCosts
from ..scenario.amounts import ScenarioError
from ..scenario.inputs import Inputs

#: So much may a run take by this bound: 9 years. What slows lanes down beside each other is at most 20 times, thrice.
MOST_NS = 2**58
_YEAR_NS = 365 * 86_400 * 10**9


def check_duration(inputs: Inputs) -> None:
    """Raise ScenarioError if a run could last so long that its times do not fit into 64 bits."""
    for part, costs in zip(inputs.parts, part_costs(inputs), strict=True):
        tokens = max((len(step.rows) for step in inputs.steps), default=1)
        visit_ns, what, longest_ns = _visit_ns(part, costs, tokens)
        if visit_ns * len(inputs.steps) * part.trace.layers > MOST_NS:
            raise ScenarioError(
                f"a run of {len(inputs.steps):,} steps over {part.trace.layers} layers could last longer than "
                f"{MOST_NS // _YEAR_NS} years, most of it for {what}, {longest_ns / 1e9:,.3g} s each: give a smaller "
                f"model, a faster machine.profile, or fewer tokens"
            )


def _visit_ns(part: Inputs, costs: Costs, tokens: int) -> tuple[int, str, int]:
    """Returns what a visit of so many tokens takes at most, what most of that is for, and what one such takes."""
    model, scenario = part.model, part.scenario
    ahead = scenario.prefetch.lookahead * min(model.experts, tokens * (scenario.prefetch.k or model.top_k))
    used = min(model.experts, tokens * model.top_k)
    each: dict[str, tuple[int, int]] = {
        "the dense part": (1, max(costs.dense(layer, tokens).ns for layer in range(model.layers))),
        "attention": (1, _attention_ns(costs, len(part.steps))),
        "the head": (1, costs.head(tokens).ns),
        "a prediction": (tokens, costs.predict_ns),
        "the kernels of an expert": (used, max(costs.expert(layer, tokens).ns for layer in range(model.layers))),
        "the copy of an expert": (used + ahead, max(copy.alone_ns + copy.host_ns for copy in costs.copies)),
    }
    if costs.reads is not None:
        read = max(read.requests * read.request_ns + read.host_ns for read in costs.reads.by_layer)
        each["the read of an expert"] = (used + ahead, read)
        if scenario.tiers.inclusion == "exclusive":
            back_ns = max(read.back_ns for read in costs.reads.by_layer)
            each["the copy of an expert back to host memory"] = (used + ahead, back_ns)
    if scenario.uses_cpu:
        cpu = CpuCosts(costs, scenario)
        each["an expert on the CPU"] = (used, max(cpu.expert(layer, tokens).ns for layer in range(model.layers)))
    if scenario.compression.where != "none":
        shrunk = ShrunkCosts(costs, scenario)
        longest_ns = max(shrunk.decompress(layer).ns for layer in range(model.layers))
        each["decompressing an expert"] = (used + ahead, longest_ns)
    times = {what: count * ns for what, (count, ns) in each.items()}
    longest = max(times, key=lambda what: times[what])
    return sum(times.values()), longest, each[longest][1]


def _attention_ns(costs: Costs, steps: int) -> int:
    """Returns what attention adds to a dense part at most; of steps that are still to be made, nothing is known."""
    if not costs.attention.counts or not steps:
        return 0
    return max(added.ns for added in costs.attention_in(costs.attention.heaviest_step()))
