"""What the decisions of one GPU are based on, and whether compiled code can make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...workloads.batches import Step
from ...workloads.guesses import Guesses
from ...workloads.trace import RoutingTrace
from ..policies import compiled_eviction as compiled
from ..policies import compiled_policies as policies
from ..policies import eviction, eviction_queues, prefetch
from ..policies.eviction_informed import Belady, Heat, LeastStale, Static
from ..policies.miss import Cpu, Miss
from . import decision_words as words
from .host_memory import HostMemory
from .memory_manager import MemoryManager

#: The policies that are compiled, by class: one that inherits from them may do anything.
EVICTIONS: dict[type, int] = {
    eviction.Fifo: compiled.FIFO,
    eviction.Lru: compiled.LRU,
    eviction.Lfu: compiled.LFU,
    eviction.LfuIncache: compiled.LFU_INCACHE,
    eviction.Clock: compiled.CLOCK,
    eviction.Sieve: compiled.SIEVE,
    eviction.Preloaded: compiled.PRELOADED,
    eviction.Spent: compiled.SPENT,
    eviction.Lrfu: policies.LRFU,
    eviction.Random: policies.RANDOM,
    eviction_queues.S3Fifo: compiled.S3FIFO,
    eviction_queues.Arc: policies.ARC,
    eviction_queues.TwoQ: policies.TWO_Q,
    eviction_queues.Lfru: policies.LFRU,
    Heat: policies.HEAT,
    LeastStale: policies.LEAST_STALE,
    Belady: compiled.BELADY,
    Static: compiled.STATIC,
}
PREFETCHES: dict[type, int] = {
    prefetch.NoPrefetch: words.NONE,
    prefetch.TopK: words.TOP_K,
    prefetch.MultiStep: words.MULTI_STEP,
    prefetch.Threshold: words.MULTI_STEP,
    prefetch.AdaptiveMemory: words.ADAPTIVE_MEMORY,
    prefetch.AdaptiveLink: words.ADAPTIVE_LINK,
    prefetch.NextLayer: words.NEXT_LAYER,
    prefetch.Popularity: words.POPULARITY,
    prefetch.CostAware: words.COST_AWARE,
}


@dataclass(frozen=True, eq=False)
class Source:
    """What one GPU decides by: as `dispatch.visits` takes it.

    `host_memory` is what host memory holds, where that is not every expert; `to_host`: prefetches go there alone.
    """

    trace: RoutingTrace
    steps: Sequence[Step]
    manager: MemoryManager
    prefetch: prefetch.Prefetch
    guesses: Guesses | None
    issue: str = "after_launch"
    budgets: Sequence[int] | None = None
    miss: Miss | None = None
    host_memory: HostMemory | None = None
    to_host: bool = False


def decided_in_python(source: Source) -> str | None:
    """Returns the key that has a GPU's decisions made in Python; None where compiled code makes them."""
    if any(type(pool.policy) not in EVICTIONS for pool in source.manager.pools):
        return "memory.eviction"
    if type(source.prefetch) not in PREFETCHES:
        return "prefetch.policy"
    if isinstance(source.prefetch, prefetch.NextLayer) and source.prefetch.options.by_layer:
        return "prefetch.policy"  # compiled, it takes as many experts of every layer
    if source.manager.prefetch_share is not None:
        return "memory.prefetch_limit"
    if source.miss is not None and type(source.miss) is not Cpu:
        return "miss.policy"
    if source.host_memory is not None and type(source.host_memory.manager.pools[0].policy) not in EVICTIONS:
        return "tiers.host_policy"
    if source.host_memory is not None and source.miss is not None:
        return "miss.policy"
    guesses = source.guesses
    if source.prefetch.guesses and (guesses is None or guesses.horizons != source.prefetch.horizons):
        return "prefetch.lookahead"
    return None


def stages_in_python(sources: Sequence[Source]) -> str | None:
    """Returns the key that has the decisions of a pipeline's stages made in Python; None where compiled code does."""
    why = next((key for source in sources if (key := decided_in_python(source)) is not None), None)
    if why is None and len(sources) > 1 and any(source.host_memory is not None for source in sources):
        return "tiers.host_budget"
    return why


def shared_in_python(sources: Sequence[Source], remote: str, *, spares: bool) -> str | None:
    """Returns the key that has the decisions of GPUs that share experts made in Python; None where compiled code does.

    `spares`: GPUs keep experts that another one evicts.
    """
    why = next((key for source in sources if (key := decided_in_python(source)) is not None), None)
    if why is not None:
        return why
    if remote == "cost":
        return "parallel.remote"
    if spares:
        return "parallel.spare_bytes"
    if any(type(pool.policy) in (Belady, LeastStale) for source in sources for pool in source.manager.pools):
        return "memory.eviction"
    if any(isinstance(source.prefetch, prefetch.AdaptiveMemory | prefetch.AdaptiveLink) for source in sources):
        return "prefetch.policy"
    if any(source.miss is not None for source in sources):
        return "miss.policy"
    if any(source.host_memory is not None for source in sources):
        return "tiers.host_budget"
    return "memory.scope" if any(source.manager.shared for source in sources) else None
