"""What there is by name: scenarios, models, machines, traces, and the members of every table of policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..engine.policies.copy_order import COPY_ORDERS
from ..engine.policies.eviction import EVICTION
from ..engine.policies.miss import MISS
from ..engine.policies.placement import PLACEMENT
from ..engine.policies.prefetch import PREFETCH
from ..engine.scenario.scenario import scenario_names
from ..errors import InputError
from ..output.shown import FRAMES
from ..resources.parts.tables import cpus, gpus
from ..resources.profile import profile_names
from ..resources.runtime import runtime_names
from ..words import unknown_name
from ..workloads.fitted import shipped_fits
from ..workloads.importers import shipped_traces
from ..workloads.model import preset_names
from ..workloads.predictors import PREDICTORS

#: What can be listed, and how.
_KINDS: dict[str, Callable[[], Iterable[str]]] = {
    "copy-orders": lambda: COPY_ORDERS,
    "cpus": cpus,
    "evictions": lambda: EVICTION,
    "fits": shipped_fits,
    "gpus": gpus,
    "machines": profile_names,
    "misses": lambda: MISS,
    "models": preset_names,
    "placements": lambda: PLACEMENT,
    "predictors": lambda: PREDICTORS,
    "prefetches": lambda: PREFETCH,
    "runtimes": runtime_names,
    "scenarios": scenario_names,
    "tables": lambda: FRAMES,
    "traces": shipped_traces,
}


def kinds() -> list[str]:
    """Returns what `names` can list."""
    return list(_KINDS)


def names(kind: str) -> list[str]:
    """Returns the names that a scenario may give: of models, machines, traces, evictions, … Raises InputError.

    `kind` is one of copy-orders, cpus, evictions, fits, gpus, machines, misses, models, placements, predictors,
    prefetches, runtimes, scenarios, tables and traces; a policy that was added is among them.
    """
    if kind not in _KINDS:
        raise InputError(unknown_name("kind", kind, _KINDS))
    return sorted(_KINDS[kind]())
