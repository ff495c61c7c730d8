"""What one could buy: the same machine with twice of one part. To add one: a function of a profile, in UPGRADES."""

from __future__ import annotations

from collections.abc import Callable

from ..engine.costs.ranges import profile_times
from ..resources.profile import Profile


def link(profile: Profile) -> Profile | None:
    """Returns a machine whose copies between host and GPU take half as long."""
    return profile_times(profile, lambda path, _: 0.5 if path.startswith(("profile.h2d", "profile.d2h")) else 1.0)


def memory_bandwidth(profile: Profile) -> Profile | None:
    """Returns a machine whose processors read memory twice as fast, with twice of it; None where neither is stated."""
    stated = profile.host_memory
    if profile.processor is None and stated is None:
        return None
    faster = profile_times(profile, lambda path, _: 0.5 if path.startswith("profile.processor") else 1.0)
    if stated is None:
        return faster
    return faster.model_copy(
        update={"host_memory": stated.model_copy(update={"capacity_bytes": 2 * stated.capacity_bytes})}
    )


def gpu_memory(profile: Profile) -> Profile | None:
    """Returns a machine whose GPUs hold twice as much."""
    update: dict[str, object] = {"gpu_memory_bytes": 2 * profile.gpu_memory_bytes}
    if profile.topology is not None:
        nodes = tuple(
            node.model_copy(update={"capacity_bytes": 2 * node.capacity_bytes})
            if node.kind == "gpu" and node.capacity_bytes is not None
            else node
            for node in profile.topology.nodes
        )
        update["topology"] = profile.topology.model_copy(update={"nodes": nodes})
    return profile.model_copy(update=update)


def gpu_speed(profile: Profile) -> Profile | None:
    """Returns a machine whose GPU takes half as long for every kernel."""
    return profile_times(profile, lambda path, _: 0.5 if path.startswith("profile.compute") else 1.0)


#: By what one says that one buys.
UPGRADES: dict[str, Callable[[Profile], Profile | None]] = {
    "twice the link": link,
    "twice the memory's bandwidth": memory_bandwidth,
    "twice the GPU's memory": gpu_memory,
    "a GPU twice as fast": gpu_speed,
}
