"""Capacity: what a scenario keeps in every memory of its machine, added up before anything runs.

`memories` is the sum, `check` the one refusal, `described` what a result says of it. A memory is a GPU's, that of a
peer that holds experts for another, the host's (of all NUMA nodes together) or the drive's. Each is taken at its
fullest, which for a GPU is the step with the largest KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...units import bytes_words
from ...workloads.batches import Step
from ...workloads.model import Model
from ...workloads.trace import RoutingTrace
from ..scenario.amounts import ScenarioError, parse_budget, parse_bytes
from ..scenario.inputs import Inputs
from ..scenario.scenario import Scenario
from .deciders import make_manager, make_prefetch
from .offloading import kept_bytes, low_precision, served_experts

#: What lies in a memory, by the names that results use.
DENSE, HEAD, EMBEDDING, KV_CACHE = "dense weights", "head", "input embedding", "KV cache"
WORKSPACE, PREDICTOR, EXPERTS, LOW = "workspace", "predictor", "experts", "low-precision copies"
DRAFTER = "drafter"
TABLE = "table of the model"
SPARE, NOT_GIVEN, COMPRESSED = "spare room for other GPUs' experts", "left over of the total", "compressed experts"
#: Of these, what is there for experts.
FOR_EXPERTS = (EXPERTS, LOW, COMPRESSED, SPARE)


class CapacityError(ScenarioError):
    """A scenario that keeps more in a memory than it holds."""


@dataclass(frozen=True)
class Memory:
    """One memory: what is kept there at once at most, in bytes by name, and what it holds (None: not stated).

    `kind` is gpu, peer, host or nvme; `stated_by` is the key of the profile that says what it holds, or would.
    """

    name: str
    kind: str
    parts: dict[str, int]
    capacity_bytes: int | None
    stated_by: str

    @property
    def sum_bytes(self) -> int:
        """All that is kept there."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """Whether it holds that; None if what it holds is not stated."""
        return None if self.capacity_bytes is None else self.sum_bytes <= self.capacity_bytes

    @property
    def words(self) -> str:
        """The sum in words, the largest part first."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        return " + ".join(f"{name} {bytes_words(size_bytes)}" for name, size_bytes in parts if size_bytes)


def check(inputs: Inputs) -> None:
    """Refuse what a memory does not hold, with the sum in words, unless the scenario does not care: CapacityError."""
    if inputs.scenario.memory.capacity == "ignore":
        return
    over = [memory for memory in memories(inputs) if memory.fits is False]
    said = []
    for kind in dict.fromkeys(memory.kind for memory in over):
        alike = [memory for memory in over if memory.kind == kind]
        said.append(_refusal(inputs, max(alike, key=lambda memory: memory.sum_bytes), len(alike) - 1))
    if said:
        raise CapacityError("; ".join(said) + "; or set memory.capacity = 'ignore' to run it all the same")


def memories(inputs: Inputs) -> list[Memory]:
    """Returns what a scenario keeps in each memory of its machine: GPUs first, then a peer, the host and the drive."""
    profile, scenario = inputs.profile, inputs.scenario
    found = [
        Memory(part.device, "gpu", gpu_parts(part), *profile.capacity("gpu", part.device)) for part in inputs.parts
    ]
    if scenario.copy_.source == "peer":
        parts = {EXPERTS: _all_experts(inputs.model, scenario)}
        found.append(Memory("gpu1", "peer", parts, *profile.capacity("gpu", "gpu1")))
    host = host_parts(inputs)
    if profile.unified_memory:
        shared = {f"{name} of the host": size_bytes for name, size_bytes in host.items()}
        found[0] = replace(found[0], name=f"{found[0].name} and host", parts=found[0].parts | shared)
    elif host:
        found.append(Memory("host", "host", host, *profile.capacity("host", "host")))
    if scenario.tiers.host_budget != "all":
        parts = {_as_they_lie(scenario): _lying_bytes(inputs.model, scenario)}
        found.append(Memory("drive", "nvme", parts, *profile.capacity("nvme", "drive")))
    return found


def gpu_parts(part: Inputs) -> dict[str, int]:
    """Returns what one GPU's memory keeps when its KV cache is largest, in bytes by name."""
    scenario, model = part.scenario, part.model
    kv_bytes, budget_bytes = _fullest(part)
    low_bytes = low_precision(part)[1]
    parts = fixed_parts(scenario, model, part.predictor.gpu_memory_bytes) | {
        KV_CACHE: kv_bytes,
        EXPERTS: budget_bytes - low_bytes,
        LOW: low_bytes,
        SPARE: 0 if part.expert_parallel is None else part.expert_parallel.spare_experts * max(model.expert_bytes),
    }
    total = scenario.memory.total_bytes
    if total is not None:
        parts[NOT_GIVEN] = max(0, parse_bytes(total) - sum(parts.values()))
    return {name: size_bytes for name, size_bytes in parts.items() if size_bytes}


def _fullest(part: Inputs) -> tuple[int, int]:
    """Returns the bytes of the KV cache when it is largest, and the expert budget then."""
    pulls = part.pulls
    if pulls is not None:
        return pulls.kv_bytes, part.budget_bytes if pulls.least_bytes is None else pulls.least_bytes
    cached = cached_bytes(part)
    fullest = int(np.argmax(cached))
    return int(cached[fullest]), part.budget_bytes if part.budgets is None else part.budgets[fullest]


def cached_bytes(part: Inputs) -> npt.NDArray[np.int64]:
    """Returns the bytes of one GPU's KV cache at each step (steps,)."""
    start = part.scenario.workload.context or 0
    return kv_cache_bytes(part.model, part.trace, part.steps, start, here=_lives_here(part))


def fixed_parts(scenario: Scenario, model: Model, predictor_bytes: int) -> dict[str, int]:
    """Returns what a GPU's memory keeps besides experts and KV cache, in bytes by name."""
    return {
        DENSE: sum(model.dense_bytes),
        HEAD: model.head_bytes,
        EMBEDDING: model.embedding_beside_head_bytes,
        WORKSPACE: parse_bytes(scenario.memory.workspace_bytes),
        PREDICTOR: predictor_bytes,
        DRAFTER: _drafter_bytes(scenario, model),
    }


def _drafter_bytes(scenario: Scenario, model: Model) -> int:
    """Returns what the maker of drafts keeps on the GPU; ScenarioError for what is no number of bytes."""
    speculation = None if scenario.requests is None else scenario.requests.speculation
    if speculation is None:
        return 0
    if speculation.drafter_bytes == "layer":
        dense_bytes = max(model.dense_bytes, default=0)
        of_layer = zip(model.expert_bytes, model.experts_by_layer, strict=True)
        return dense_bytes + max(size_bytes * experts for size_bytes, experts in of_layer)
    try:
        return parse_bytes(speculation.drafter_bytes)
    except ScenarioError as error:
        raise ScenarioError(f"requests.speculation.drafter_bytes: {error}, or 'layer'") from None


def host_parts(inputs: Inputs) -> dict[str, int]:
    """Returns what host memory keeps, in bytes by name: a cache over the drive, or all experts that may be copied."""
    scenario, model = inputs.scenario, inputs.model
    parts = {TABLE: model.host_table_bytes}
    if scenario.tiers.host_budget != "all":
        scope = "shared" if scenario.memory.scope == "shared" else "global"
        sizes = [scenario.compression.copied_bytes(size_bytes) for size_bytes in model.expert_bytes]
        budget = parse_budget(scenario.tiers.host_budget, sizes, model.experts_by_layer, scope)
        parts[_as_they_lie(scenario)] = budget
    elif scenario.copy_.source == "host":
        parts[_as_they_lie(scenario)] = sum(_copied_bytes(part) for part in (inputs.stages or (inputs,)))
    predictor = inputs.predictor
    if scenario.predictor.lane == "host":
        parts[PREDICTOR] = predictor.memory_bytes
    return {name: size_bytes for name, size_bytes in parts.items() if size_bytes}


def kv_cache_bytes(
    model: Model,
    trace: RoutingTrace,
    steps: Sequence[Step],
    start: int = 0,
    *,
    here: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.int64]:
    """Returns the bytes of the KV cache at each step (steps,), with the states of linear attention.

    It holds every position of the sequences that run, and the `start` positions that each had before; a sequence leaves
    it with its last step. `here` says which of all steps' rows count (None: all).
    """
    rows = np.concatenate([step.rows for step in steps])
    step_of = np.repeat(np.arange(len(steps)), [len(step.rows) for step in steps])
    if here is not None:
        rows, step_of = rows[here], step_of[here]
    sequence, tokens = trace.sequence[rows], trace.position[rows].astype(np.int64) + start + 1
    order = np.argsort(sequence, kind="stable")  # within a sequence, by step
    sequence, step_of, tokens = sequence[order], step_of[order], tokens[order]
    # The last row of a sequence in a step says how much of it is cached from then on.
    last = np.ones(len(rows), dtype=bool)
    last[:-1] = (sequence[1:] != sequence[:-1]) | (step_of[1:] != step_of[:-1])
    sequence, step_of, kept = sequence[last], step_of[last], model.cached_bytes(tokens[last])
    change = np.zeros(len(steps) + 1, dtype=np.int64)
    begins = np.ones(len(sequence), dtype=bool)
    begins[1:] = sequence[1:] != sequence[:-1]
    np.add.at(change, step_of, kept - np.where(begins, 0, np.roll(kept, 1)))
    ends = np.roll(begins, -1)
    np.add.at(change, step_of[ends] + 1, -kept[ends])
    return np.cumsum(change[:-1])


def described(inputs: Inputs) -> dict[str, Any]:
    """Returns the sums as plain data for JSON; `resident` is a GPU if it held every expert it serves (the fullest one).

    `fits` is None where no capacity is stated. Shares are of the capacity: `share` of all that is kept there,
    `experts_share` of the room for experts. `idle_bytes` of `memory.total_bytes` are left to nobody.
    """
    found = memories(inputs)
    resident = [_resident(part, memory) for part, memory in zip(inputs.parts, found, strict=False)]
    fullest = max(resident, key=lambda memory: memory.sum_bytes)
    return {
        "rule": inputs.scenario.memory.capacity,
        "memories": [
            {
                **_plain(memory),
                "share": _of(memory.sum_bytes, memory.capacity_bytes),
                "experts_share": _of(_for_experts(memory), memory.capacity_bytes),
                "idle_bytes": memory.parts.get(NOT_GIVEN, 0),
                "parts": memory.parts,
            }
            for memory in found
        ],
        "resident": _plain(fullest),
    }


def _plain(memory: Memory) -> dict[str, Any]:
    return {
        "memory": memory.name,
        "kind": memory.kind,
        "sum_bytes": memory.sum_bytes,
        "capacity_bytes": memory.capacity_bytes,
        "stated_by": memory.stated_by,
        "fits": memory.fits,
    }


def _of(size_bytes: int, capacity_bytes: int | None) -> float | None:
    return None if capacity_bytes is None else size_bytes / capacity_bytes


def _for_experts(memory: Memory) -> int:
    return sum(memory.parts.get(name, 0) for name in FOR_EXPERTS)


def _resident(part: Inputs, memory: Memory) -> Memory:
    """Returns a GPU's memory with all experts that it serves in place of its room for experts."""
    model = part.model
    layer = np.fromiter(served_experts(part), dtype=np.int64) // model.experts
    held_bytes = int(np.array(model.expert_bytes, dtype=np.int64)[layer].sum())
    if part.scenario.memory.scope == "shared":
        held_bytes = _all_experts(model, part.scenario)
    rest = {name: size for name, size in memory.parts.items() if name not in (*FOR_EXPERTS, NOT_GIVEN)}
    return replace(memory, parts=rest | {EXPERTS: held_bytes})


def _lives_here(part: Inputs) -> npt.NDArray[np.bool_] | None:
    """Returns which rows of a GPU's steps are of sequences whose KV cache it keeps; None if all are."""
    if part.expert_parallel is None or not part.expert_parallel.moves_tokens:
        return None
    here: npt.NDArray[np.bool_] = np.concatenate(part.expert_parallel.homes) == part.gpu_number
    return here


def _lying_bytes(model: Model, scenario: Scenario) -> int:
    """Returns the bytes of all experts where they are copied from; of one layer's where all layers use these."""
    copied = [scenario.compression.copied_bytes(size_bytes) for size_bytes in model.expert_bytes]
    if scenario.memory.scope == "shared":
        return model.experts * copied[0]
    return sum(size * count for size, count in zip(copied, model.experts_by_layer, strict=True))


def _as_they_lie(scenario: Scenario) -> str:
    """Returns the name of the experts that lie where they are copied from."""
    return EXPERTS if scenario.compression.where == "none" else COMPRESSED


def _all_experts(model: Model, scenario: Scenario) -> int:
    """Returns the bytes of all experts; of one layer's where all layers use these."""
    return model.experts * model.expert_bytes[0] if scenario.memory.scope == "shared" else model.total_expert_bytes


def _copied_bytes(part: Inputs) -> int:
    """Returns the bytes, as they lie in host memory, of the experts that may be copied to one GPU, or computed there.

    These are all, but those that lie on the GPU from before the run to its end.
    """
    compression, model = part.scenario.compression, part.model
    if part.scenario.memory.scope == "shared":
        return compression.copied_bytes(model.expert_bytes[0]) * model.experts
    sizes = kept_bytes(part)[1]
    if sizes is not None:
        return sum(sizes[expert] for expert in model.ids) - sum(sizes[expert] for expert in _staying(part))
    copied = [compression.copied_bytes(size) for size in model.expert_bytes]
    total_bytes = sum(size * count for size, count in zip(copied, model.experts_by_layer, strict=True))
    return total_bytes - sum(copied[expert // model.experts] for expert in _staying(part))


def _staying(part: Inputs) -> Sequence[int]:
    """Returns the experts that never leave a GPU: those preloaded, where nothing is copied or all have room.

    Of several GPUs that share the experts, those that stay with all who may serve them.
    """
    scenario, model = part.scenario, part.model
    if part.expert_parallel is not None and part.gpus:
        kept = [set(_staying(gpu)) for gpu in part.gpus]
        if part.expert_parallel.remote != "tokens" or not any(kept):
            return ()
        owners = enumerate(gpus for of_layer in part.expert_parallel.owners for gpus in of_layer)
        return [expert for expert, gpus in owners if all(expert in kept[gpu] for gpu in gpus)]
    if scenario.memory.preload == "none":
        return ()
    room = part.budget_bytes if part.budgets is None else min(part.budgets)
    if part.pulls is not None and part.pulls.least_bytes is not None:
        room = part.pulls.least_bytes
    only_cpu = scenario.miss.policy == "cpu" and scenario.miss.cpu_max_tokens is None
    needed_bytes = sum(model.expert_bytes[expert // model.experts] for expert in served_experts(part))
    if room < needed_bytes and not (only_cpu and not make_prefetch(scenario, model).horizons):
        return ()
    return list(make_manager(part).assigned)


def _refusal(inputs: Inputs, memory: Memory, more: int) -> str:
    """Say what a memory does not hold, by which key of the scenario, and what would do."""
    assert memory.capacity_bytes is not None
    key, remedy = _key_and_remedy(inputs.scenario, memory)
    others = f" (and {more} more)" if more else ""
    return (
        f"{key}: {memory.name}{others} would keep {bytes_words(memory.sum_bytes)}, "
        f"{bytes_words(memory.sum_bytes - memory.capacity_bytes)} more than the {bytes_words(memory.capacity_bytes)} "
        f"that it holds (profile {inputs.profile.name}, {memory.stated_by}): {memory.words}; {remedy}"
    )


def _key_and_remedy(scenario: Scenario, memory: Memory) -> tuple[str, str]:
    assert memory.capacity_bytes is not None
    model = f"model.preset = {scenario.model.preset!r}"
    if memory.kind == "peer":
        return "copy.source = 'peer'", "use a smaller model.dtype, or keep the experts in host memory"
    if memory.kind == "host":
        remedy = "use a smaller model.dtype, or a host_budget on a machine with a drive"
        return f"tiers.host_budget = {scenario.tiers.host_budget!r}", remedy
    if memory.kind == "nvme":
        return model, "use a smaller model.dtype"
    rest_bytes = memory.sum_bytes - _for_experts(memory) - memory.parts.get(NOT_GIVEN, 0)
    if scenario.memory.total_bytes is not None:
        return f"memory.total_bytes = {scenario.memory.total_bytes!r}", "lower it"
    if rest_bytes >= memory.capacity_bytes:
        return model, "even without experts it does not fit: use more GPUs, shorter sequences or a smaller batch"
    room_bytes = memory.capacity_bytes - rest_bytes
    budget = scenario.memory.gpu_budget
    of_what = " of the experts" if budget.rstrip().endswith("%") else ""
    return f"memory.gpu_budget = {budget!r}{of_what}", f"there is room for {bytes_words(room_bytes)} of them"
