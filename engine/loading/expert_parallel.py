"""Expert parallelism from a scenario: its GPUs, who owns which experts, and the inputs of each GPU.

`[parallel] gpus` spreads every layer's experts over so many GPUs, by a `placement`; each has the expert memory that
[memory] gives to one: a share in percent is of the experts that it owns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...resources.links import Links
from ...resources.topology import TopologyError
from ...workloads.trace_limits import MAX_TOTAL_EXPERTS
from ..costs.costs import Costs
from ..decide.expert_parallel import ExpertParallel, Prices, homes, own_guesses, own_steps
from ..decide.memory_manager import MemoryManager
from ..decide.pools import BudgetError
from ..policies.placement import PLACEMENT, Request
from ..scenario.amounts import ScenarioError, parse_budget, parse_bytes
from ..scenario.inputs import Inputs
from .links import links_of


def place(whole: Inputs, make_manager: Callable[[Inputs], MemoryManager]) -> Inputs:
    """Returns inputs with those of each GPU, and how the experts lie; raise ScenarioError if they cannot run.

    `whole` has the guesses of the whole run. `make_manager` refuses what a GPU cannot hold.
    """
    scenario, model, parallel = whole.scenario, whole.model, whole.scenario.parallel
    links = links_of(whole, parallel.gpus, "parallel.gpus")
    try:
        _ = links.peers() if parallel.lends else links.routes()
    except TopologyError as error:
        raise ScenarioError(f"parallel.gpus = {parallel.gpus}: {error}") from None
    owners = PLACEMENT[parallel.placement](
        Request(
            parallel.gpus,
            whole.trace,
            model.expert_bytes,
            batch=scenario.workload.batch,
            replicas=parallel.replicas,
            replica_bytes=parse_bytes(parallel.replica_bytes),
            objective=parallel.objective,
        )
    )
    spare_experts = min(parse_bytes(parallel.spare_bytes) // max(model.expert_bytes), MAX_TOTAL_EXPERTS)
    if spare_experts and not model.uniform:
        raise ScenarioError("parallel.spare_bytes: needs experts of one size in all layers")
    lives = homes(whole.trace, whole.steps, parallel.gpus)
    layout = ExpertParallel(parallel.gpus, owners, lives, parallel.remote, spare_experts=spare_experts)
    if parallel.remote == "cost":
        layout = replace(layout, prices=prices(links, Costs(whole), model.activation_bytes(1)))
    gpus = []
    for number in range(parallel.gpus):
        budget_bytes = _budget_bytes(whole, layout, number)
        part = replace(whole, device=f"gpu{number}", expert_parallel=layout, budget_bytes=budget_bytes)
        if not layout.moves_tokens:
            own = own_steps(whole.steps, lives, number)
            part = replace(part, steps=own, guesses=own_guesses(whole.guesses, lives, number))
        try:
            make_manager(part)
        except BudgetError as error:
            raise ScenarioError(f"gpu{number} of parallel.gpus = {parallel.gpus}: {error}") from None
        gpus.append(part)
    budget_bytes = sum(part.budget_bytes for part in gpus)
    return replace(whole, gpus=tuple(gpus), expert_parallel=layout, links=links, budget_bytes=budget_bytes)


def _budget_bytes(whole: Inputs, layout: ExpertParallel, gpu: int) -> int:
    """Returns the expert memory of one GPU: a share of the experts that it owns, or so many bytes or experts."""
    budget, sizes = whole.scenario.memory.gpu_budget, whole.model.expert_bytes
    if budget.rstrip().endswith("%"):
        return parse_budget(budget, [owned_bytes(layout, sizes, gpu)], 1)
    return parse_budget(budget, sizes, whole.model.experts)


def owned_bytes(layout: ExpertParallel, expert_bytes: Sequence[int], gpu: int) -> int:
    """Returns the bytes of all experts that a GPU owns."""
    counts = layout.owned[gpu].reshape(len(expert_bytes), -1).sum(axis=1).tolist()
    return sum(size_bytes * count for size_bytes, count in zip(expert_bytes, counts, strict=True))


def prices(links: Links, costs: Costs, token_bytes: int) -> Prices:
    """Returns what `remote = "cost"` compares: a token there and back on the slowest way, and copies behind others."""
    slowest = min(route.bytes_per_second for route in links.routes().values())
    return Prices(
        2 * token_bytes * 1e9 / slowest,
        [copy.queued_ns for copy in costs.copies],
        [max(peer.queued_ns(size_bytes) for peer in links.peers().values()) for size_bytes in costs.expert_bytes],
    )
