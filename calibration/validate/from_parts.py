"""Machines from parts against the same machines measured: cost by cost, and on the schedules that were executed.

A measured machine is put together from its parts once more, its own measurements left out, and everything that it gives
is set beside what was measured: how far off would somebody have been who had only the datasheets and another machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...dtypes import bits_of
from ...engine.costs.surface_costs import SurfaceCosts, dense_kernels, expert_kernels, head_kernels
from ...resources.parts.assemble import assembled
from ...resources.parts.kernels import DECODE_TOKENS, EXPERT_KERNELS, EXPERT_PRODUCTS, groups
from ...resources.parts.reached import MEASURED, measured, nearest
from ...resources.profile import Profile, load_profile, make_profile
from ...resources.profile_costs import CopyCosts, KernelPoint, ProfileError
from ...workloads.model import Model, load_model, preset_names
from ..executor.measured import load_all
from .validate import compare, predicted_ms

#: What is put together in place of each measured machine.
PARTS = {"h200": "gpu=h200", "h100-x2": "gpu=2x h100, ram=1TB 105GB/s"}
#: Copies that are compared: as large as small and large experts.
_COPIED_BYTES = (2**20, 9_437_184, 352_321_536)
#: Durations under a microsecond are differences of others.
_LEAST_NS = 1000


class Ratios(NamedTuple):
    """Ratios of what is put together to what was measured, of costs of one kind."""

    what: str
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.ratios)


def from_parts(name: str) -> Profile:
    """Returns a measured machine as put together from its parts without its own measurements."""
    return make_profile(assembled(PARTS[name], without=(name,)), f"{name} from parts")


def cost_ratios(name: str) -> list[Ratios]:
    """Returns how the costs of a measured machine, as put together from parts, compare with those measured."""
    made, own = from_parts(name), load_profile(name)
    families: dict[str, list[float]] = {}
    for family, tokens, ratio in _kernels(name, made):
        long = f"over {DECODE_TOKENS} tokens" if tokens > DECODE_TOKENS else f"up to {DECODE_TOKENS} tokens"
        families.setdefault(f"{family}, {long}", []).append(ratio)
    for memory, copies in made.h2d.items():
        families[f"copies to the GPU, {memory}"] = list(_copies(copies, own.h2d[memory]))
    families["lanes' gaps and latencies"] = list(_durations(made.compute, own.compute))
    families["the host's calls"] = list(_durations(made.host, own.host))
    return [Ratios(what, tuple(ratios)) for what, ratios in families.items()]


def attention_ratios(name: str) -> list[Ratios]:
    """Returns how dense parts of one token with what the surface says of attention compare with those measured.

    By context; the surface is the machine's own, or that which its parts give it. The model of each measured shape says
    what a layer attends to; the dense part without context is as measured. Latent attention was measured expanded, as
    no engine decodes it, and does not count.
    """
    profile = load_profile(name)
    surface = profile.compute.surface or from_parts(name).compute.surface
    if surface is None:
        raise ProfileError(f"profile {name}: neither it nor its parts have a surface")
    costs = SurfaceCosts(surface, "graph")
    models = [load_model(preset) for preset in preset_names()]
    families: dict[int, list[float]] = {}
    bare = {_dense_shape(point): point.ns for point in profile.compute.dense if not point.context and point.tokens == 1}
    for point in profile.compute.dense:
        of = [each for each in models if _is_of(point, each)]
        if point.context and of and point.tokens == 1:
            attends = of[0].attention_of(of[0].dense_bytes.index(point.weight_bytes))
            if not any(each.latent_dim for each in attends):
                added_ns = sum(costs.cached_ns(1, each.kv_heads, each.key_bytes, point.context) for each in attends)
                ratio = (bare[_dense_shape(point)] + added_ns) / point.ns
                families.setdefault(point.context, []).append(ratio)
    return [Ratios(f"dense part at {context:,} positions", tuple(found)) for context, found in sorted(families.items())]


def _is_of(point: KernelPoint, model: Model) -> bool:
    """Whether a measured dense part is that of most layers of a model of 16-bit weights."""
    shape = (model.hidden, model.dense_dtype, model.dense_kernels, "bfloat16")
    return (point.hidden, point.dtype, point.kernels, point.dtype) == shape and point.weight_bytes in model.dense_bytes


def _dense_shape(point: KernelPoint) -> tuple[int, int, str, int, str]:
    return point.hidden, point.weight_bytes, point.dtype, point.kernels, point.dispatch


def schedules(name: str, folder: Path, replicates: int = 0) -> list[dict[str, Any]]:
    """Return, for each schedule of a folder that was executed on a machine, how it compares on the one from parts.

    Each has `scenario`, `dispatch` and `error`, simulated / measured - 1; with `replicates`, `inside` says whether the
    measured makespan lies between their p5 and p95. Raises ValueError if a schedule cannot be read.
    """
    profile = from_parts(name)
    rows = []
    for run in load_all([folder]):
        row = compare(run, profile)
        kept = {"scenario": row["scenario"], "dispatch": row["dispatch"], "error": row["makespan_error"]}
        if replicates:
            drawn = predicted_ms(run, profile, replicates)
            kept["inside"] = drawn["p5"] <= row["measured_ms"] <= drawn["p95"]
        rows.append(kept)
    return rows


def schedule_summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, by dispatch, the number of schedules, the median of their errors and its size, and the range."""
    found = []
    for dispatch in dict.fromkeys(row["dispatch"] for row in rows):
        of = [row for row in rows if row["dispatch"] == dispatch]
        errors = [row["error"] for row in of]
        found.append(
            {
                "dispatch": dispatch,
                "schedules": len(of),
                "median": statistics.median(errors),
                "median_size": statistics.median(map(abs, errors)),
                "least": min(errors),
                "most": max(errors),
                "inside": sum(row["inside"] for row in of) if all("inside" in row for row in of) else None,
            }
        )
    return found


def names() -> list[str]:
    """Returns the measured machines that are put together from parts."""
    return [name for name in MEASURED if name in PARTS]


def _kernels(name: str, made: Profile) -> Iterator[tuple[str, int, float]]:
    """Yields (part, tokens, ratio) of every measured group of kernels, by the surface put together, else the rule."""
    machine, own, surface = measured(name), load_profile(name).compute, made.compute.surface
    if surface is None:
        fit = nearest(machine.gpu, (name,)).kernels
        for group in groups(machine.data["compute"]):
            yield group.family, group.tokens, fit.ns(machine.gpu, group) / group.ns
        return
    costs = {dispatch: SurfaceCosts(surface, dispatch) for dispatch in ("eager", "graph")}
    for expert in own.experts:
        weights = EXPERT_PRODUCTS * expert.hidden * expert.expert_ff
        size_bytes = int(weights * bits_of(expert.dtype) / 8)
        shape = (expert.hidden, expert.expert_ff, expert.dtype, EXPERT_PRODUCTS, EXPERT_KERNELS)
        made_ns = costs[expert.dispatch].time(expert_kernels(*shape, size_bytes), expert.tokens).ns
        yield "expert", expert.tokens, made_ns / expert.ns
    for part, points in (("dense part", own.dense), ("head", own.heads)):
        for point in (each for each in points if not each.context):
            kernels = head_kernels(point.hidden, point.dtype, point.weight_bytes)
            if part == "dense part":
                kernels = dense_kernels(point.hidden, point.dtype, point.kernels, point.weight_bytes)
            yield part, point.tokens, costs[point.dispatch].time(kernels, point.tokens).ns / point.ns


def _copies(made: CopyCosts, measured: CopyCosts) -> Iterator[float]:
    for size_bytes in _COPIED_BYTES:
        for queued in (False, True):
            costs = [copies.queued if queued else copies.alone for copies in (made, measured)]
            yield costs[0].ns(size_bytes) / costs[1].ns(size_bytes)


def _durations(made: Any, measured: Any) -> Iterator[float]:
    """Yields the ratio of each duration that two parts of profiles both have."""
    for field in type(made).model_fields:
        first, second = (getattr(getattr(part, field), "ns", None) for part in (made, measured))
        if isinstance(first, int) and isinstance(second, int) and min(first, second) >= _LEAST_NS:
            yield first / second
