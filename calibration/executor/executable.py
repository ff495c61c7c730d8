"""What can be executed: each thing that has no counterpart among the calls that are made is refused, by its key."""

from __future__ import annotations

from ...engine.loading.deciders import make_prefetch
from ...engine.policies.copy_order import COPY_ORDERS, ByRank, Fifo, Priority, TwoStreams
from ...engine.scenario.inputs import Inputs
from ...engine.scenario.scenario import Scenario
from ...workloads.model import Model
from ..device.cuda import without_kernels
from .attending import without_attention
from .entries import ExecutionError
from .unpack import packed_bytes

#: The copy orders that are executed: streams of the GPU's, and the queue that the host thread keeps.
EXECUTED_ORDERS = (Fifo, TwoStreams, Priority)
#: What becomes of misses in an execution.
EXECUTED_MISSES = ("fetch", "cpu", "cost", "balanced")
#: Element types of experts that the CPU computes, and those of them that no GPU kernel here does.
CPU_DTYPES, CPU_ONLY = ("float32", "bfloat16", "int8", "int4"), ("int8", "int4")


def check_executable(inputs: Inputs) -> None:
    """Refuse what depends on the clock or has no counterpart among the calls that are made, all of it at once."""
    wrongs = [text for wrong, text in (*_of_dispatch(inputs), *_of_memory(inputs), *_of_several(inputs)) if wrong]
    wrongs += _of_kernels(inputs.scenario, inputs.model) + without_attention(inputs)
    if wrongs:
        raise ExecutionError(f"{'; '.join(wrongs)} (execution on a GPU)")


def _of_dispatch(inputs: Inputs) -> list[tuple[bool, str]]:
    """Returns what is wrong with how the host dispatches and predicts, as (whether, why)."""
    scenario = inputs.scenario
    dispatch, lane = scenario.dispatch, scenario.predictor.lane
    predicts = inputs.guesses is not None and inputs.predictor.latency_us > 0 and lane != "free"
    by_clock = make_prefetch(scenario, inputs.model).uses_clock
    grouped = dispatch.expert_kernel == "grouped"
    return [
        (dispatch.mode == "free", "dispatch.mode = 'free': a real host is not free: choose eager or graph"),
        (
            grouped and dispatch.mode != "graph",
            "dispatch.expert_kernel = 'grouped': only as a graph: choose separate, or dispatch.mode = 'graph'",
        ),
        (
            predicts and lane == "host",
            "predictor.lane = 'host': no predictor runs on the host: choose gpu, compute or free",
        ),
        (
            scenario.prefetch.issued_by == "gpu",
            "prefetch.issued_by = 'gpu': the host issues copies; set it to host",
        ),
        (scenario.copy_.drop_stale, "copy.drop_stale = true: it decides by the clock; set it to false"),
        (by_clock, f"prefetch.policy = {scenario.prefetch.policy!r} decides by the clock: choose another"),
        (inputs.pulls is not None, "[requests]: a scheduler decides by the clock; leave it out"),
        (
            inputs.runtime.name != "prestage",
            f"runtime.name = {inputs.runtime.name!r}: the executor makes its own calls; leave it out",
        ),
    ]


def _of_memory(inputs: Inputs) -> list[tuple[bool, str]]:
    """Returns what is wrong with where experts lie and how they come, as (whether, why)."""
    scenario, model = inputs.scenario, inputs.model
    copy, compression, miss = scenario.copy_, scenario.compression, scenario.miss.policy
    tiers, packed = scenario.tiers.host_budget != "all", compression.where != "none"
    on_cpu, aside = scenario.uses_cpu, packed and compression.lane == "side"
    other_copies = copy.source == "peer" or copy.by_rank or copy.order.prefetch_stream
    fits = not packed or all(packed_bytes(size) <= compression.copied_bytes(size) for size in model.expert_bytes)
    least = max((packed_bytes(size) / size for size in model.expert_bytes), default=0)
    return [
        (bool(model.by_layer), f"model {model.name}: experts differ in width or number by layer: no kernels"),
        (
            copy.order not in EXECUTED_ORDERS,
            f"copy.discipline = {copy.discipline!r}: choose {_executed()}",
        ),
        (miss not in EXECUTED_MISSES, f"miss.policy = {miss!r}: choose {', '.join(EXECUTED_MISSES)}"),
        (scenario.miss.deferred_experts > 0, "miss.deferred_experts: leave it out"),
        (
            len({each.expert_ff for each in model.by_layer}) > 1,
            f"model {model.name}: kernels of one width are made, and its layers' experts have several",
        ),
        (compression.mixed is not None, "[compression] mixed: no kernels in several precisions here; leave it out"),
        (not fits, f"compression.ratio = {compression.ratio:g}: a byte a weight and scales: at least {least:.5g}"),
        (
            packed and model.expert_dtype != "bfloat16",
            f"[compression] of {model.expert_dtype} experts: only bfloat16 ones are decompressed",
        ),
        (
            (tiers or on_cpu or packed) and other_copies,
            "tiers.host_budget, [miss] on the CPU and [compression]: copies from the host in one stream: set "
            "copy.discipline = 'fifo' and copy.source = 'host'",
        ),
        (scenario.tiers.inclusion == "exclusive", "tiers.inclusion = 'exclusive': set it to 'inclusive'"),
        ((tiers or on_cpu) and copy.host_memory == "pageable", "copy.host_memory = 'pageable': set it to 'pinned'"),
        (packed and (on_cpu or tiers), "[compression] with [miss] on the CPU or [tiers]: executed one at a time"),
        (
            packed and scenario.dispatch.expert_kernel == "grouped",
            "[compression]: decompressed for one expert at a time: set dispatch.expert_kernel = 'separate'",
        ),
        (
            aside and compression.where == "gpu" and not scenario.dispatch.router_readback,
            "compression.where = 'gpu' aside: how far the GPU is decides what is overwritten: set "
            "dispatch.router_readback = true, or compression.lane = 'compute'",
        ),
    ]  # fmt: skip


def _of_several(inputs: Inputs) -> list[tuple[bool, str]]:
    """Returns what is wrong with how a run is spread over GPUs, as (whether, why)."""
    scenario = inputs.scenario
    parallel, copy = scenario.parallel, scenario.copy_
    together, staged = parallel.gpus > 1, parallel.stages > 1
    beside = scenario.uses_cpu or scenario.tiers.host_budget != "all" or scenario.compression.where != "none"
    return [
        (
            copy.by_rank and (staged or together),
            f"copy.discipline = {copy.discipline!r} and parallel.{'stages' if staged else 'gpus'}: choose "
            f"{_executed(in_stages=True)}",
        ),
        (parallel.gpus > 2, f"parallel.gpus = {parallel.gpus}: tokens are exchanged between two: set it to 2"),
        (
            together and parallel.dispatch_threads != "one",
            "parallel.gpus with parallel.dispatch_threads = 'per-gpu': one thread dispatches to GPUs that share "
            "experts: set it to 'one'",
        ),
        (
            (staged or together) and beside,
            "[miss] on the CPU, [tiers] and [compression]: executed on one GPU: leave [parallel] out",
        ),
        (
            (staged or together) and scenario.memory.preload != "none",
            "memory.preload on several GPUs: slots begin empty; set it to none",
        ),
    ]  # fmt: skip


def _of_kernels(scenario: Scenario, model: Model) -> list[str]:
    """Returns what is wrong with a model's types: kernels exist for some on the GPU, and for others on the CPU."""
    if not scenario.uses_cpu:
        return without_kernels(model)
    if model.expert_dtype not in CPU_DTYPES:
        return [f"model {model.name}: expert_dtype = {model.expert_dtype!r}: on the CPU only {', '.join(CPU_DTYPES)}"]
    if model.expert_dtype not in CPU_ONLY:
        return without_kernels(model)
    miss = scenario.miss
    fetches = miss.policy != "cpu" or miss.cpu_max_tokens is not None or miss.fetch_from is not None
    if fetches or scenario.prefetch.lookahead or scenario.memory.preload != "none":
        return [
            f"model {model.name}: experts of {model.expert_dtype} are computed on the CPU alone: set miss.policy = "
            f"'cpu' without cpu_max_tokens and fetch_from, prefetch.lookahead = 0 and memory.preload = 'none'"
        ]
    return without_kernels(model, experts=False)


def _executed(*, in_stages: bool = False) -> str:
    """Returns the names of the copy orders that are executed; on several GPUs, those of streams alone."""
    names = [
        name
        for name, order in COPY_ORDERS.items()
        if order in EXECUTED_ORDERS and not (in_stages and issubclass(order, ByRank))
    ]
    return " or ".join([", ".join(names[:-1]), names[-1]])
