"""Warnings that go into the result: what makes a setting work badly, why, and what would help.

Each is a function of a finished run that returns one line, `name: reason; remedy`, or None. To add one: write the
function, name it in WARNINGS, describe it in tests/test_warnings.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ...resources.facts import Fact
from ...resources.parts.section import serves_copies
from ...resources.parts.written import is_of_parts, split_parts
from ...units import bytes_words
from .amounts import parse_bytes
from .sections import ON_GPU, SHARING

if TYPE_CHECKING:
    from .inputs import Inputs

#: Given what a run was made from and its metrics, what to warn of.
Warn = Callable[["Inputs", dict[str, Any]], str | None]

#: The link, or a drive, counts as saturated from this share of the makespan on, the host as the bottleneck from that.
SATURATED, HOST_BOUND = 0.9, 1 / 3
#: A link that is used for more than this share of what it carries has not been shared (rounding apart).
OVERLOADED = 1.01
#: From this share of the makespan on, which GPUs spend waiting for each other, the pipeline is poorly filled.
BUBBLES = 0.25
#: Beyond this share of all gate weight, what is skipped is told.
SKIPPED_MASS = 0.1
#: Beyond this share of the makespan, prefill rules what is counted over the whole run.
PREFILL_DOMINATES = 0.5


def cliff_warning(budget_bytes: int, expert_bytes: Sequence[int], k: int, scope: str, eviction: str) -> str | None:
    """Warn of a global LRU too small to keep anything from one token to the next; None if it is not.

    Between two visits of a layer at batch 1, k experts of every other layer are used. A global LRU that has no room
    for these and one more has evicted every expert before its layer comes round again: its hit rate is exactly 0.
    """
    least_bytes = k * sum(expert_bytes) - (k - 1) * max(expert_bytes)
    if scope != "global" or eviction != "lru" or budget_bytes >= least_bytes:
        return None
    layers = len(expert_bytes)
    instead = "scope = per-layer, or " if budget_bytes >= layers * max(expert_bytes) else ""
    return (
        f"cliff: this global LRU evicts every expert before it is used again, because one token uses "
        f"{(layers - 1) * k} experts of other layers in between ((layers - 1) x top-k): its decode hit rate at batch 1 "
        f"is exactly 0 without prefetching; use {instead}a budget of at least {bytes_words(least_bytes)}"
    )


def _cliff(inputs: Inputs, data: dict[str, Any]) -> str | None:
    scenario, memory = inputs.scenario, inputs.scenario.memory
    compression = scenario.compression
    if scenario.workload.batch != 1 or not memory.caching or scenario.miss.policy != "fetch" or compression.mixed:
        return None
    for part in inputs.parts:
        sizes = [compression.kept_bytes(size_bytes) for size_bytes in part.model.expert_bytes]
        said = cliff_warning(part.budget_bytes, sizes, part.trace.k, memory.scope, memory.eviction)
        if said is not None:
            return said
    return None


def _over_capacity(inputs: Inputs, data: dict[str, Any]) -> str | None:
    over = [memory for memory in data["capacity"]["memories"] if memory["fits"] is False]
    if not over:
        return None
    sums = ", ".join(
        f"{memory['memory']} {bytes_words(memory['sum_bytes'])} of {bytes_words(memory['capacity_bytes'])}"
        for memory in over
    )
    return (
        f"over capacity: no such machine could run this, which memory.capacity = ignore lets pass ({sums}); lower "
        f"memory.gpu_budget, or use a smaller model.dtype"
    )


def _idle_total(inputs: Inputs, data: dict[str, Any]) -> str | None:
    memory = inputs.scenario.memory
    if memory.total_bytes is None:
        return None
    idle_bytes = min(gpu["idle_bytes"] for gpu in data["capacity"]["memories"] if gpu["kind"] == "gpu")
    room_bytes = min(part.budget_bytes for part in inputs.parts)
    short_bytes = min(part.model.total_expert_bytes for part in inputs.parts) - room_bytes
    if min(idle_bytes, short_bytes) < max(inputs.model.expert_bytes):
        return None
    return (
        f"idle memory: memory.gpu_budget = {memory.gpu_budget} leaves {bytes_words(idle_bytes)} of "
        f"{_total(memory.total_bytes)} to nobody; set memory.gpu_budget = 100% to give experts all that "
        f"is left"
    )


def _capped_budget(inputs: Inputs, data: dict[str, Any]) -> str | None:
    scenario, memory = inputs.scenario, inputs.scenario.memory
    if memory.total_bytes is None or memory.gpu_budget == "100%":
        return None
    if scenario.requests is not None or scenario.parallel.gpus > 1:
        return None  # there the budget is divided by other rules
    part = min(inputs.parts, key=lambda part: part.budget_bytes)
    model, room_bytes = part.model, min(part.budgets or (part.budget_bytes,))
    asked_bytes = min(memory.budget_bytes(model.expert_bytes, model.experts_by_layer), model.total_expert_bytes)
    if asked_bytes - room_bytes < max(model.expert_bytes):
        return None
    return (
        f"capped budget: memory.gpu_budget = {memory.gpu_budget} is more than the {bytes_words(room_bytes)} that dense "
        f"weights, KV cache and workspace leave of {_total(memory.total_bytes)}, and experts have only those; set "
        f"memory.total_bytes too, or take it out (memory.total_bytes=)"
    )


def _total(total_bytes: str) -> str:
    """Returns the key of a total with what it comes to: of a share of the GPU's memory, the bytes are known by now."""
    return f"memory.total_bytes = {bytes_words(parse_bytes(total_bytes))}"


def _saturated_link(inputs: Inputs, data: dict[str, Any]) -> str | None:
    busy, moved = data["link_utilization"], data["bytes"]
    if busy is None or busy < SATURATED or not data["counts"]["prefetch"]:
        return None
    unused = moved["prefetch_not_used"] / (moved["demand"] + moved["prefetch"])
    orders_by_need = inputs.scenario.copy_.discipline == "priority"
    instead = "" if orders_by_need else ", or copy.discipline = priority with chunk_bytes and drop_stale"
    return (
        f"saturated link: copies keep it busy for {busy:.0%} of the run and {unused:.0%} of their bytes are prefetched "
        f"and never used, so that demand waits behind guesses; lower prefetch.k or lookahead, or use a larger "
        f"budget{instead}"
    )


def _saturated_drive(inputs: Inputs, data: dict[str, Any]) -> str | None:
    tiers = data["tiers"]
    if tiers is None or (tiers["read_utilization"] or 0.0) < SATURATED:
        return None
    copies = tiers["host_hits"] + tiers["host_misses"]
    return (
        f"saturated drive: its I/O lanes ({tiers['io_lanes']}) read for {tiers['read_utilization']:.0%} of the run, "
        f"because {tiers['host_misses'] / copies:.0%} of the copies to the GPU find their expert not in host memory; "
        f"use a larger tiers.host_budget or memory.gpu_budget, a smaller dtype, or lower prefetch.k or lookahead"
    )


def _turnover(inputs: Inputs, data: dict[str, Any]) -> str | None:
    alone = data["hit_rate_without_prefetch"]
    if alone is None or data["hit_rate"] >= alone:
        return None
    model, scenario = inputs.model, inputs.scenario
    tokens = -(-scenario.workload.batch // scenario.parallel.micro_batches)
    ranks = scenario.prefetch.k or model.top_k
    ahead = scenario.prefetch.lookahead * min(model.experts, ranks * tokens)
    wanted = ahead + min(model.experts, model.top_k * tokens)
    room = min(part.budget_bytes // max(part.model.expert_bytes) for part in inputs.parts)
    if wanted <= room:
        return None
    return (
        f"turnover: prefetching evicts what the cache would have kept: the experts of one layer and {ahead} guessed "
        f"ahead need room for {wanted} and there is room for {room}, so the hit rate falls from {alone:.1%} without "
        f"prefetch to {data['hit_rate']:.1%}; lower prefetch.k or lookahead, or give more budget"
    )


def _host_bound(inputs: Inputs, data: dict[str, Any]) -> str | None:
    busy_ms = data["time"]["host_ms"] + data["host_held_ms"]
    share = busy_ms / data["makespan_ms"] if data["makespan_ms"] else 0.0
    if share < HOST_BOUND:
        return None
    if data["host_held_ms"]:
        return (
            f"host-bound: the GPU waits for the host for {share:.0%} of the run, because a pageable copy holds the "
            f"host's thread throughout, so that a prefetch delays the launches behind it; use copy.host_memory = pinned"
        )
    if inputs.links is not None and inputs.scenario.parallel.dispatch_threads == "one":
        return (
            f"host-bound: the GPUs wait for the host for {share:.0%} of the run, because one thread serves them all in "
            f"turn; use parallel.dispatch_threads = per-gpu"
        )
    dispatch = inputs.scenario.dispatch
    remedies = [
        "dispatch.mode = graph" if dispatch.mode == "eager" else "",
        "dispatch.expert_kernel = grouped" if dispatch.expert_kernel == "separate" else "",
        "a larger batch",
    ]
    return (
        f"host-bound: the GPU waits for the host's launches and read-backs for {share:.0%} of the run, which no cache "
        f"or prefetch shortens; use {' or '.join(filter(None, remedies))}"
    )


def _gpus_there(inputs: Inputs) -> int:
    """Returns how many GPUs the machine has; 0 where its profile does not say."""
    topology = inputs.profile.topology
    return 0 if topology is None else sum(node.kind == "gpu" for node in topology.nodes)


def _idle_gpus(inputs: Inputs, data: dict[str, Any]) -> str | None:
    scenario, there = inputs.scenario, _gpus_there(inputs)
    replicas = 1 if scenario.requests is None else scenario.requests.replicas
    used = max(scenario.parallel.stages, scenario.parallel.gpus, replicas) + (scenario.copy_.source == "peer")
    if used >= there:
        return None
    keys = ["parallel.stages", "parallel.gpus"] if scenario.requests is None else ["requests.replicas"]
    ways = " or ".join(f"{key} = {there}" for key in keys)
    at_work = "one of them is" if used == 1 else f"{used} of them are"
    return f"idle GPUs: the machine has {there}, and {at_work} at work; set {ways} to use all"


def _unused_sharing(inputs: Inputs, data: dict[str, Any]) -> str | None:
    parallel = inputs.scenario.parallel
    keys = [key for key in SHARING if getattr(parallel, key) != type(parallel).model_fields[key].default]
    if parallel.gpus > 1 or not keys:
        return None
    said = ", ".join(f"parallel.{key} = {getattr(parallel, key)}" for key in keys)
    there = _gpus_there(inputs)
    count = f"parallel.gpus = {there}" if there > 1 else "parallel.gpus, of a machine with several,"
    instead = " in place of parallel.stages" if parallel.stages > 1 else ""
    return f"unused keys: no GPUs share experts, so that nothing comes of {said}; set {count}{instead} to share them"


def _idle_drive(inputs: Inputs, data: dict[str, Any]) -> str | None:
    if "drive" not in _parts(inputs) or inputs.scenario.tiers.host_budget != "all":
        return None
    return (
        "idle drive: nothing is read from machine.drive, because all experts lie in host memory; set tiers.host_budget "
        "= 50%, or less, to read some from it"
    )


def _idle_cpu(inputs: Inputs, data: dict[str, Any]) -> str | None:
    profile = inputs.scenario.machine.profile
    if "cpu" not in _parts(inputs) or inputs.scenario.uses_cpu or serves_copies(profile, "cpu"):
        return None
    return (
        f"idle CPU: machine.cpu makes nothing faster or slower, because no expert is computed on it (miss.policy = "
        f"{inputs.scenario.miss.policy}); set miss.policy = cpu to compute misses on it"
    )


def _parts(inputs: Inputs) -> dict[str, str]:
    """Returns the parts that the machine was put together from; none of a profile that was measured or written."""
    profile = inputs.scenario.machine.profile
    return split_parts(profile) if is_of_parts(profile) else {}


def _bubbles(inputs: Inputs, data: dict[str, Any]) -> str | None:
    parallel = inputs.scenario.parallel
    share = data["time"]["bubble_ms"] / data["makespan_ms"] if data["makespan_ms"] else 0.0
    if share < BUBBLES:
        return None
    why, remedy = "their stages take unequal times", "use another parallel.split or more micro_batches"
    if parallel.gpus > 1:
        why = "the one with most to copy or to compute holds up the others at every layer"
        remedy = "use another parallel.placement, or a larger memory.gpu_budget"
    elif parallel.micro_batches < parallel.stages:
        batches = "one micro-batch" if parallel.micro_batches == 1 else f"{parallel.micro_batches} micro-batches"
        why = f"{batches} cannot keep {parallel.stages} stages busy"
        remedy = f"use parallel.micro_batches = {parallel.stages} or more, with as large a batch"
    return f"bubbles: GPUs wait for each other for {share:.0%} of the run, because {why}; {remedy}"


def _overloaded_link(inputs: Inputs, data: dict[str, Any]) -> str | None:
    used = {link["link"]: link["utilization"] or 0.0 for link in data.get("links") or ()}
    worst = max(used, key=lambda link: used[link], default=None)
    if worst is None or used[worst] <= OVERLOADED:
        return None
    return (
        f"overloaded link: copies move {used[worst]:.0%} of what {worst} carries, because with copy.contention = false "
        "they do not share links; set it to true"
    )


def _prefill_dominates(inputs: Inputs, data: dict[str, Any]) -> str | None:
    if inputs.scenario.requests is not None or not (data["tokens_per_second"] and data["prefill_tokens"]):
        return None  # requests bring their prompts, and a server is also idle
    decode_ms = data["decode_tokens"] / (data["cold"] or data)["tokens_per_second"] * 1e3
    share = 1 - decode_ms / data["makespan_ms"]
    if share <= PREFILL_DOMINATES:
        return None
    return (
        f"prefill dominates: {share:.0%} of the run is prefill, so hit rates and stall say little of decoding; "
        f"set workload.prefill = skip, or run more decode tokens"
    )


def _below_break_even(inputs: Inputs, data: dict[str, Any]) -> str | None:
    without_ms = data.get("no_prefetch_ms")
    if without_ms is None or data["makespan_ms"] <= without_ms:
        return None
    name, scenario = inputs.scenario.predictor.name, inputs.scenario
    guesses = f"recall {scenario.predictor.recall:g}" if name == "oracle" else f"predictor {name}"
    return (
        f"recall below break-even: with {guesses} prefetching takes {data['makespan_ms']:,.3f} ms and the same cache "
        f"without it {without_ms:,.3f} ms, because wrong and late guesses cost more link time than right ones save; "
        f"set prefetch.policy = none, or see `prestage breakeven` for the recall that pays"
    )


def _slower_on_cpu(inputs: Inputs, data: dict[str, Any]) -> str | None:
    on_cpu = data.get("miss", {}).get("cpu")
    if on_cpu is None or on_cpu["fetch_is_shorter"] < data["miss"]["ways"]["cpu"] or data["miss"]["policy"] != "cpu":
        return None
    return (
        f"slower on the CPU: every expert that the CPU computed would have been copied and computed on the GPU sooner "
        f"({on_cpu['cpu_ms']:,.0f} ms against {on_cpu['fetch_ms']:,.0f} ms, each by itself); set miss.policy = cost or "
        f"balanced, or fetch"
    )


def _empty_memory(inputs: Inputs, data: dict[str, Any]) -> str | None:
    if inputs.scenario.miss.policy == "fetch" or data["memory_utilization"]:
        return None
    return (
        "empty memory: nothing is ever brought to the GPU, because nothing is preloaded and no miss is fetched; set "
        "memory.preload = popular, or prefetch"
    )


def _much_skipped(inputs: Inputs, data: dict[str, Any]) -> str | None:
    mass = (data.get("miss", {}).get("gate_mass") or {}).get("skipped", 0.0)
    if mass <= SKIPPED_MASS:
        return None
    return (
        f"much is skipped: experts of {mass:.0%} of all gate weight are left out, and nothing here says what that does "
        f"to the model's answers; lower miss.threshold, or give more budget"
    )


def _estimated(inputs: Inputs, data: dict[str, Any]) -> str | None:
    if not data["estimates"]:
        return None
    return (
        f"estimated cost in use: {', '.join(data['estimates'])}, of which nothing was measured for this shape on this "
        f"machine; calibrate it, or see estimates in result.json"
    )


def _uncalibrated(inputs: Inputs, data: dict[str, Any]) -> str | None:
    used = [(place, cost) for place, cost in _not_measured(inputs.profile) if _in_use(place, inputs)]
    if not used:
        return None
    said = [f"{place} ({cost.source})" for place, cost in used if cost.device is None]
    for device in dict.fromkeys(cost.device for _, cost in used if cost.device is not None):
        families = dict.fromkeys(_family(place) for place, cost in used if cost.device == device)
        said.append(f"{', '.join(families)} (of {device})")
    return (
        f"uncalibrated cost in use: {', '.join(said)} of profile {inputs.profile.name}; trust comparisons more than "
        f"absolute times"
    )


def _free_prediction(inputs: Inputs, data: dict[str, Any]) -> str | None:
    if all(part.guesses is None for part in inputs.parts) or (
        data["predictor"]["latency_us"] and inputs.scenario.predictor.lane != "free"
    ):
        return None
    return "prediction is free: its time is not charged; set predictor.latency_us to what yours takes"


def _latency_of_a_cpu(inputs: Inputs, data: dict[str, Any]) -> str | None:
    predictor, lane = data["predictor"], inputs.scenario.predictor.lane
    if lane not in ON_GPU or predictor["latency_source"] != "measured on cpu":
        return None
    return (
        f"latency of a CPU: the {predictor['latency_us']:.0f} us of a guess were measured on a CPU, but its lane is on "
        f"the GPU; run `prestage predictor measure` where there is one, or set predictor.latency_us"
    )


def _not_measured(part: BaseModel, place: str = "") -> Iterator[tuple[str, Fact]]:
    """Yields (place, cost) of every cost within a part of a profile that was neither measured on it nor fitted."""
    # A duration of 0 is no cost: a profile has it within others.
    if isinstance(part, Fact) and getattr(part, "ns", None) != 0 and not _is_own_measurement(part):
        yield place, part
    for name in type(part).model_fields:
        value = getattr(part, name)
        inside = value.items() if isinstance(value, dict) else [("", value)]
        for key, entry in inside:
            if isinstance(entry, BaseModel):
                yield from _not_measured(entry, ".".join(filter(None, (place, name, key))))


def _is_own_measurement(cost: Fact) -> bool:
    return cost.device is None and cost.source in ("measured", "fitted")


def _family(place: str) -> str:
    """Returns what a cost is one of: copies by memory, the compute stream's lags one by one, the host, contention, …"""
    parts = place.split(".")
    return ".".join(parts[: 2 if parts[0] in ("h2d", "compute") else 1])


def _in_use(place: str, inputs: Inputs) -> bool:
    """Whether a run pays this cost of its profile; kernels, by the rule or by points, are told as estimates."""
    scenario = inputs.scenario
    mode, peer = scenario.dispatch.mode, scenario.copy_.source == "peer"
    used = ["peer."] if peer else [f"h2d.{_host_memory(inputs)}."]
    used += ["peer."] if inputs.links is not None else []
    guesses_come = (
        inputs.predictor.latency_us and scenario.predictor.lane in ON_GPU and scenario.prefetch.issued_by == "host"
    )
    if scenario.dispatch.router_readback or guesses_come:
        used += ["d2h.alone"] if inputs.profile.host.readback is None else ["host.readback"]
    used += ["nvme."] if scenario.tiers.host_budget != "all" else []
    used += ["d2h."] if scenario.tiers.inclusion == "exclusive" else []
    used += ["contention.copy_beside_compute"] if scenario.copy_.contention else []
    if scenario.miss.policy in ("cpu", "cost", "balanced"):
        used += ["d2h.alone", *(["contention.copy_beside_cpu_experts"] if scenario.copy_.contention else [])]
    if mode != "free":
        used += ["host.copy_enqueue", "host.synchronize", "host.event_", "host.resume", "host.copy_resume"]
        used += [f"compute.{mode}_gap", "compute.event_wait_gap", "compute.launch_latency"]
        eager = ["host.launch", "host.product_launches.", "host.further_", "host.attention_"]
        used += ["host.graph_launch"] if mode == "graph" else eager
    return place.startswith(tuple(used))


def _host_memory(inputs: Inputs) -> str:
    """Returns the kind of host memory that experts are copied from."""
    return inputs.profile.copied_from(inputs.scenario.copy_.host_memory)


def _short_trace(inputs: Inputs, data: dict[str, Any]) -> str | None:
    asked, there = inputs.scenario.workload.tokens, data["decode_tokens"]
    if asked is None or asked <= there:
        return None
    return (
        f"short trace: workload.tokens = {asked:,}, and the trace has {there:,} tokens to decode, all of which were "
        f"run; use a longer trace, or set workload.synthetic.tokens"
    )


def _empty_places(inputs: Inputs, data: dict[str, Any]) -> str | None:
    batch, sequences = inputs.scenario.workload.batch, len(set(inputs.trace.sequence.tolist()))
    if batch <= sequences:
        return None
    return (
        f"empty places: workload.batch = {batch:,}, and the trace has {sequences:,} sequences, so that never "
        f"more decode together; use a trace of more sequences, or set workload.synthetic.sequences"
    )


#: In the order in which they are told: first what makes the setting bad, then what makes the numbers doubtful.
WARNINGS: tuple[Warn, ...] = (
    _over_capacity,
    _idle_total,
    _capped_budget,
    _short_trace,
    _empty_places,
    _cliff,
    _turnover,
    _saturated_link,
    _saturated_drive,
    _overloaded_link,
    _below_break_even,
    _host_bound,
    _idle_gpus,
    _unused_sharing,
    _bubbles,
    _prefill_dominates,
    _slower_on_cpu,
    _empty_memory,
    _much_skipped,
    _estimated,
    _uncalibrated,
    _free_prediction,
    _latency_of_a_cpu,
    _idle_drive,
    _idle_cpu,
)
#: Those that need no run: of its metrics they look at `capacity` at most.
_BEFORE = (
    *(_over_capacity, _idle_total, _capped_budget, _empty_places, _cliff),
    *(_idle_gpus, _unused_sharing, _idle_drive, _idle_cpu),
)


def warnings_of(inputs: Inputs, data: dict[str, Any]) -> list[str]:
    """Returns the warnings of one run, given its metrics."""
    return [said for warning in WARNINGS if (said := warning(inputs, data)) is not None]


def warnings_before(inputs: Inputs, capacity: dict[str, Any]) -> list[str]:
    """Returns the warnings of one run that can be told before it runs, given what its memories keep."""
    return [said for warning in _BEFORE if (said := warning(inputs, {"capacity": capacity})) is not None]
