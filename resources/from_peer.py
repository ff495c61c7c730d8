"""A machine whose experts lie in another GPU's memory, as the profile of a machine whose host holds them.

What copies take, and what they do to what runs beside them, is that of copies between GPUs; all else stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .profile import Profile
from .profile_costs import ProfileError


def from_peer(profile: Profile) -> Profile:
    """Returns the costs of a machine for copies from another GPU in place of the host; ProfileError if it has none."""
    if profile.peer is None:
        raise ProfileError(f"copy.source = 'peer': profile {profile.name} has no costs of copies between GPUs")
    host, compute = profile.host, profile.compute
    changed: dict[str, Any] = {
        "h2d": {"pinned": profile.peer},
        "host": host.model_copy(update={"copy_enqueue": host.peer_enqueue or host.copy_enqueue}),
        "compute": compute.model_copy(update={"event_wait_gap": compute.peer_wait_gap or compute.event_wait_gap}),
    }
    if profile.contention:  # what several streams from the host get together says nothing of another link
        changed["contention"] = profile.contention.model_copy(update={"copies_sharing": None})
    slowed = profile.contention and profile.contention.compute_beside_peer
    if slowed:
        changed["compute"] = _beside(changed["compute"], slowed.factor)
        changed["host"] = _quiet(changed["host"], ("readback", "synchronize"))
    return profile.model_copy(update=changed)


def _beside(compute: Any, factor: float) -> Any:
    """Returns a compute stream whose kernels take so many times as long beside copies, which disturb nothing else."""
    tables = {
        name: tuple(
            point.model_copy(update={"beside_copy_ns": round(point.ns * factor)}) for point in getattr(compute, name)
        )
        for name in ("experts", "dense", "heads")
    }
    rule = compute.rule.model_copy(update={"beside_copy_factor": factor})
    quiet = _quiet(compute, ("eager_gap", "graph_gap", "event_wait_gap", "launch_latency"))
    return quiet.model_copy(update={**tables, "rule": rule})


def _quiet(part: Any, names: Iterable[str]) -> Any:
    """Returns a part of a profile whose durations of these names are no longer beside a copy."""
    durations = {name: getattr(part, name) for name in names}
    quiet = {name: cost and cost.model_copy(update={"beside_copy_ns": None}) for name, cost in durations.items()}
    return part.model_copy(update=quiet)
