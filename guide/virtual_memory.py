"""The virtual memory manager of the "Memory Management Simulation Guide": its names and its accounting.

It is a face on the memory manager that the engines drive, and decides nothing. The guesses for an access are
prefetched just before it, and the same decisions are priced twice: with the prefetches' copies hidden, as the guide
does, and with every copy charged. Sizes are MiB.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..engine.decide.dispatch import step_accesses
from ..engine.decide.memory_manager import MemoryManager
from ..engine.measure.memory_log import EVENTS, MemoryEvent, MemoryLog, Prices
from ..engine.policies.eviction import EVICTION, Setting
from ..errors import InputError
from ..resources.profile import Profile, load_profile
from ..words import unknown_name
from ..workloads.batches import DECODE, Step
from ..workloads.guesses import Guesses
from ..workloads.trace import RoutingTrace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

#: Layers of the guide's model, for calls that come without a trace.
GUIDE_LAYERS = 12
#: Guesses are int16.
_MAX_EXPERTS = 1 << 15
_MIB = 2**20


class VirtualMemoryError(InputError):
    """An argument that cannot be right: its name, its value and what would be right."""


class VirtualMemoryManager:
    """Expert prefetching and caching in a limited GPU memory, as the guide tells it.

    Every layer has `num_experts` of `expert_size_mb`; `gpu_memory_limit_mb` is for experts alone. The `prefetch_k`
    surest guesses for an access are prefetched before it. Without `enable_caching`, what was brought for a layer leaves
    after it. `num_layers` None takes the trace's layers (GUIDE_LAYERS in calls without one). `share_across_layers`
    makes experts of one index one expert in all layers. `eviction` names a policy of EVICTION, `seed` is its luck.
    `profile` prices copies (a shipped profile's name or a JSON file's path); with `charge_hits` a hit costs a copy
    within the GPU, as in the guide, else nothing.
    Raises VirtualMemoryError for an argument out of bounds, such as a limit beyond the profile's GPU, ProfileError for
    a profile that cannot be read.
    """

    def __init__(
        self,
        num_experts: int = 128,
        expert_size_mb: float = 27.0,
        gpu_memory_limit_mb: float = 2048,
        prefetch_k: int = 10,
        enable_caching: bool = True,
        *,
        num_layers: int | None = None,
        share_across_layers: bool = False,
        eviction: str = "lru",
        seed: int = 0,
        profile: str = "rtx3090",
        charge_hits: bool = True,
    ) -> None:
        check_whole("num_experts", num_experts, 1, _MAX_EXPERTS)
        check_whole("prefetch_k", prefetch_k, 0, num_experts, " (num_experts)")
        if num_layers is not None:
            check_whole("num_layers", num_layers, 1)
        check_size("expert_size_mb", expert_size_mb, 1 / _MIB, "more than 0")
        check_size("gpu_memory_limit_mb", gpu_memory_limit_mb, expert_size_mb, f"room for one of {expert_size_mb} MiB")
        if eviction not in EVICTION:
            raise VirtualMemoryError(unknown_name("eviction", eviction, EVICTION))
        self.num_experts = int(num_experts)
        self.num_layers = num_layers
        self.prefetch_k = int(prefetch_k)
        self.enable_caching = enable_caching
        self.share_across_layers = share_across_layers
        self.eviction = eviction
        self.seed = seed
        self._expert_bytes = round(expert_size_mb * _MIB)
        self._limit_bytes = round(gpu_memory_limit_mb * _MIB)
        costs = load_profile(profile)
        check_held(gpu_memory_limit_mb, costs)
        self._prices = _prices(costs, self._expert_bytes, charge_hits)
        self._layers = GUIDE_LAYERS if num_layers is None else int(num_layers)
        self._log: MemoryLog | None = None

    @property
    def hit_ms(self) -> float:
        """What an access takes that finds its expert."""
        return self._prices.hit_ns / 1e6

    @property
    def miss_ms(self) -> float:
        """What an access takes that copies its expert from the host, with nothing queued before it."""
        return self._prices.alone_ns / 1e6

    @property
    def events(self) -> list[MemoryEvent]:
        """What happened in the latest run, in order."""
        return self._running().events

    def simulate_inference(
        self,
        routing_traces: RoutingTrace | npt.ArrayLike,
        predictions: npt.ArrayLike | None = None,
        confidence_scores: npt.ArrayLike | None = None,
    ) -> dict[str, Any]:
        """Run a whole trace from an empty memory and return `metrics()`; the log is in `events`.

        `routing_traces` are the true experts: [token][layer], or [token][layer][k] for top-k routers, or a
        RoutingTrace, whose rows run one by one. `predictions[token][layer]` are ranked guesses for that very access,
        best first, -1 = none; `confidence_scores`, of the same shape, put the surest first (ties stay ranked).
        Everything is checked before anything runs: raises VirtualMemoryError or TraceError naming what is wrong.
        """
        trace = _as_trace(routing_traces, self.num_experts)
        if self.num_layers not in (None, trace.layers):
            raise VirtualMemoryError(f"num_layers = {self.num_layers}: routing_traces have {trace.layers} layers")
        ranked = _ranked(trace, predictions, confidence_scores)
        held = _as_one_layer(trace) if self.share_across_layers else trace
        rows = np.arange(held.tokens, dtype=np.int64)
        steps = [Step(DECODE, rows[row : row + 1]) for row in range(held.tokens)]
        guesses = None if ranked is None else _as_guesses(held, ranked)
        self._layers = trace.layers
        log = self._begin(Setting(seed=self.seed, trace=held, steps=steps, guesses=guesses))
        wanted = None if ranked is None else self._numbers(ranked[..., : self.prefetch_k]).tolist()
        accesses = (access for step in steps for access in step_accesses(held, step))
        for place, access in enumerate(accesses):
            token, layer = divmod(place, trace.layers)
            if wanted is not None:
                log.prefetch(wanted[token][layer], layer, token)
            log.visit(access.experts, access.weights, layer, token)
        return self.metrics()

    def prefetch_experts(
        self,
        predicted_experts: Sequence[int],
        confidence_scores: Sequence[float] | None,
        layer_id: int,
        token_id: int,
    ) -> float:
        """Prefetch the `prefetch_k` surest guesses for the next access; return what their copies take, in ms.

        What is on the GPU already, or finds no room, is not copied. Raises VirtualMemoryError on bad arguments.
        """
        layer_id, token_id = self._place(layer_id, token_id)
        guesses = _guesses("predicted_experts", [predicted_experts], self.num_experts)
        if guesses.ndim != 2:
            raise VirtualMemoryError(f"predicted_experts: shape {guesses.shape[1:]}: must be one list of experts")
        ranked = _by_confidence(guesses, None if confidence_scores is None else [confidence_scores])
        wanted = [self._number(index, layer_id) for index in ranked[0, : self.prefetch_k].tolist() if index >= 0]
        return self._running().prefetch(wanted, layer_id, token_id) / 1e6

    def access_expert(self, expert_id: int, layer_id: int, token_id: int) -> tuple[float, str]:
        """Use one expert; return (latency in ms with prefetches hidden, "hit", "cache_hit" or "miss").

        Raises VirtualMemoryError on bad arguments.
        """
        layer_id, token_id = self._place(layer_id, token_id)
        check_whole("expert_id", expert_id, 0, self.num_experts - 1)
        (access,) = self._running().visit([self._number(int(expert_id), layer_id)], [1.0], layer_id, token_id)
        return access.latency_ms, access.event

    def _place(self, layer_id: int, token_id: int) -> tuple[int, int]:
        """Returns a checked layer and token."""
        check_whole("layer_id", layer_id, 0, self._layers - 1)
        check_whole("token_id", token_id, 0)
        return int(layer_id), int(token_id)

    def _number(self, index: int, layer: int) -> int:
        """Returns the manager's number of an expert; layers that share experts are one layer to it."""
        return index if self.share_across_layers else layer * self.num_experts + index

    def _numbers(self, ranked: Array) -> Array:
        """Returns the manager's numbers of guesses (tokens, layers, n), -1 where there is none."""
        first = np.array([self._number(0, layer) for layer in range(self._layers)])
        return np.where(ranked < 0, -1, ranked + first[:, None])

    def _running(self) -> MemoryLog:
        """Returns the latest run; if there is none, one begins."""
        return self._log or self._begin(Setting(seed=self.seed))

    def _begin(self, setting: Setting) -> MemoryLog:
        """Begin a run with an empty memory."""
        manager = MemoryManager(
            [self._expert_bytes] * (1 if self.share_across_layers else self._layers),
            self.num_experts,
            self._limit_bytes,
            EVICTION[self.eviction],
            setting=setting,
            drop_after_visit=not self.enable_caching,
        )
        self._log = MemoryLog(
            manager, self._expert_bytes, self._prices, keeps=self.enable_caching, shared=self.share_across_layers
        )
        return self._log

    def metrics(self) -> dict[str, Any]:
        """Returns what the run so far comes to, as plain data; rates are fractions, None where undefined.

        hit_rate = (prefetch hits + cache hits) / accesses. avg_latency_ms = mean latency of an access.
        memory_utilization = memory in use / limit, weighted by time. prediction_accuracy = accesses whose expert was
        among the guesses prefetched for them / accesses. speedup = baseline_latency_ms / total latency, the baseline
        being every access a miss; efficiency = speedup / memory_utilization. `copies_charged` prices the same run, no
        copy hidden.
        """
        log = self._running()
        counts = Counter(event.event for event in log.events)
        accesses = counts["hit"] + counts["cache_hit"] + counts["miss"]
        return {
            "accesses": accesses,
            "hit_rate": _ratio(counts["hit"] + counts["cache_hit"], accesses),
            "prefetch_hit_rate": _ratio(counts["hit"], accesses),
            "cache_hit_rate": _ratio(counts["cache_hit"], accesses),
            "miss_rate": _ratio(counts["miss"], accesses),
            "prediction_accuracy": _ratio(log.foretold, accesses),
            **self._priced(log, accesses, charged=False),
            "baseline_latency_ms": log.baseline_ns / 1e6,
            "total_prefetch_time_ms": _total_ms(log, "prefetch"),
            "total_miss_penalty_ms": _total_ms(log, "miss"),
            "peak_memory_mb": max((event.memory_mb for event in log.events), default=0.0),
            "event_counts": {name: counts[name] for name in EVENTS},
            "prefetch": {
                "useful": counts["hit"],
                "wasted": counts["prefetch"] - counts["hit"] - len(log.unused),
                "unused": len(log.unused),
                "dropped": log.dropped,
            },
            "copies_charged": self._priced(log, accesses, charged=True),
        }

    def _priced(self, log: MemoryLog, accesses: int, *, charged: bool) -> dict[str, float | None]:
        """Returns what depends on which copies cost time."""
        total_ms = (log.charged_now_ns if charged else log.now_ns) / 1e6
        time_ms, memory_mb = self._memory_over_time(charged)
        held_ms = np.diff(np.append(time_ms, total_ms))
        utilization = _ratio(float(held_ms @ memory_mb) * _MIB / self._limit_bytes, total_ms)
        speedup = _ratio(log.baseline_ns / 1e6, total_ms)
        return {
            "avg_latency_ms": _ratio(total_ms, accesses),
            "total_latency_ms": total_ms,
            "memory_utilization": utilization,
            "speedup": speedup,
            "efficiency": speedup / utilization if speedup is not None and utilization else None,
        }

    def _memory_over_time(self, charged: bool) -> tuple[Array, Array]:
        """Returns (time in ms, MiB in use from then on), each (instants,): what the last event at an instant left."""
        events = self.events
        time_ms = np.array([event.charged_time_ms if charged else event.time_ms for event in events])
        last = np.append(np.diff(time_ms) > 0, True)[: len(events)]
        return time_ms[last], np.array([event.memory_mb for event in events])[last]

    def plot_memory(self, path: str | Path | None = None, *, charged: bool = False) -> Figure:
        """Draw the memory in use over time, with the limit; also write it to `path` (.png, .pdf or .svg)."""
        from ..output.plots import plot_memory

        time_ms, memory_mb = self._memory_over_time(charged)
        times_ns, sizes = np.rint(time_ms * 1e6).astype(np.int64), np.rint(memory_mb * _MIB).astype(np.int64)
        return _saved(plot_memory(times_ns, sizes, self._limit_bytes, title=_title("Expert memory", charged)), path)

    def plot_latency(self, path: str | Path | None = None, *, charged: bool = False) -> Figure:
        """Draw the latency of each kind of event; also write it to `path`. Evictions move no bytes and are left out."""
        from ..output.plots import plot_latency

        latencies_ms: dict[str, list[float]] = {name: [] for name in EVENTS if name != "evict"}
        for event in self.events:
            if event.event in latencies_ms:
                latencies_ms[event.event].append(event.charged_latency_ms if charged else event.latency_ms)
        return _saved(plot_latency(latencies_ms, title=_title("Latency by event", charged)), path)

    def print_report(self) -> None:
        """Print the run in the guide's accounting, and beside it the same run with copies charged."""
        from ..output.tables.guide import print_virtual_memory

        print_virtual_memory(self.metrics())


def guesses_for_targets(guesses: Guesses) -> tuple[Array, Array | None]:
    """Turn guesses one layer ahead into guesses for each access, for one sequence whose rows run one by one.

    Returns predictions (tokens, layers, n) and confidences of the same shape (None if there are none): what was
    guessed at the visit before; for the very first access nothing.
    """
    predictions = _one_later(guesses.experts[:, :, 0], -1)
    return predictions, None if guesses.confidences is None else _one_later(guesses.confidences[:, :, 0], 0)


def _one_later(ahead: Array, nothing: int) -> Array:
    flat = ahead.reshape(-1, ahead.shape[-1])
    return np.concatenate([np.full_like(flat[:1], nothing), flat[:-1]]).reshape(ahead.shape)


def _as_guesses(held: RoutingTrace, ranked: Array) -> Guesses:
    """Turn guesses for each access into guesses made at the visit before, as eviction policies may read them."""
    flat = ranked.reshape(-1, ranked.shape[-1]).astype(np.int16)
    ahead = np.concatenate([flat[1:], np.full_like(flat[:1], -1)])
    return Guesses(np.arange(held.tokens, dtype=np.int64), ahead.reshape(held.tokens, held.layers, 1, -1))


def _as_one_layer(trace: RoutingTrace) -> RoutingTrace:
    """Returns the trace of a model with one layer that each token passes as often as there were layers."""
    flat = (-1, 1, trace.k)
    return RoutingTrace(
        trace.experts.reshape(flat),
        trace.num_experts,
        weights=None if trace.weights is None else trace.weights.reshape(flat),
        present=None if trace.present is None else trace.present.reshape(-1, 1, *trace.present.shape[2:]),
        sequence=np.repeat(trace.sequence, trace.layers),
    )


def _prices(profile: Profile, expert_bytes: int, charge_hits: bool) -> Prices:
    """Returns what one expert costs: pinned host memory where the profile has it."""
    if charge_hits and profile.d2d is None:
        raise VirtualMemoryError(f"charge_hits = True: profile {profile.name!r} has no d2d cost: set charge_hits=False")
    h2d = profile.h2d.get("pinned") or profile.h2d["pageable"]
    hit_ns = profile.d2d.alone.ns(expert_bytes) if charge_hits and profile.d2d is not None else 0
    return Prices(h2d.alone.ns(expert_bytes), h2d.queued.ns(expert_bytes) + h2d.gap.ns, hit_ns)


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    from ..output.pictures import save

    if path is not None:
        save(figure, path)
    return figure


def _title(what: str, charged: bool) -> str:
    return f"{what}, {'every copy charged' if charged else 'prefetches hidden'}"


def _total_ms(log: MemoryLog, name: str) -> float:
    return math.fsum(event.latency_ms for event in log.events if event.event == name)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def check_whole(name: str, value: object, low: int, high: int | None = None, note: str = "") -> None:
    """Raise VirtualMemoryError unless an argument is an integer within its bounds."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (whole and low <= int(value) and (high is None or int(value) <= high)):  # type: ignore[call-overload]
        allowed = f"at least {low}" if high is None else f"{low}..{high}{note}"
        raise VirtualMemoryError(f"{name} = {value!r}: must be an integer, {allowed}")


def check_size(name: str, value: object, least: float, wanted: str) -> None:
    """Raise VirtualMemoryError unless an argument is a size in MiB, `least` or more."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and least <= float(value) < math.inf):  # type: ignore[arg-type]
        raise VirtualMemoryError(f"{name} = {value!r}: must be a size in MiB, {wanted}")


def check_held(gpu_memory_limit_mb: float, profile: Profile) -> None:
    """Raise VirtualMemoryError if a limit in MiB is beyond all that the profile's GPU has."""
    held_mb = profile.gpu_memory_bytes / _MIB
    if gpu_memory_limit_mb > held_mb:
        given = f"gpu_memory_limit_mb = {gpu_memory_limit_mb!r}"
        raise VirtualMemoryError(f"{given}: the GPU of profile {profile.name} has {held_mb:,.0f} MiB in all")


def _as_trace(given: RoutingTrace | npt.ArrayLike, num_experts: int) -> RoutingTrace:
    """Returns checked routing choices."""
    if isinstance(given, RoutingTrace):
        trace = given
        if trace.num_experts != num_experts:
            raise VirtualMemoryError(f"num_experts = {num_experts}: routing_traces are of {trace.num_experts} experts")
    else:
        experts = _whole_array("routing_traces", given, "[token][layer] or [token][layer][k]")
        trace = RoutingTrace(experts[..., None] if experts.ndim == 2 else experts, num_experts)
    trace.check("routing_traces")
    return trace


def _ranked(
    trace: RoutingTrace, predictions: npt.ArrayLike | None, confidence_scores: npt.ArrayLike | None
) -> Array | None:
    """Returns the guesses for each access (tokens, layers, n), surest first; None without predictions."""
    if predictions is None:
        if confidence_scores is not None:
            raise VirtualMemoryError("confidence_scores: given without predictions: give both, or neither")
        return None
    guesses = _guesses("predictions", predictions, trace.num_experts)
    if guesses.ndim != 3 or guesses.shape[:2] != (trace.tokens, trace.layers):
        raise VirtualMemoryError(
            f"predictions: shape {guesses.shape}: must be (tokens, layers, n) = ({trace.tokens}, {trace.layers}, n)"
        )
    return _by_confidence(guesses, confidence_scores)


def _guesses(name: str, given: npt.ArrayLike, num_experts: int) -> Array:
    guesses = _whole_array(name, given, "[token][layer][rank], -1 = none")
    wrong = np.argwhere((guesses < -1) | (guesses >= num_experts))
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise VirtualMemoryError(f"{name} at {at}: {guesses[at]}: must be -1 (none) or 0..{num_experts - 1}")
    return guesses


def _by_confidence(guesses: Array, confidence_scores: npt.ArrayLike | None) -> Array:
    """Returns the guesses, surest first along the last axis; equal confidences stay ranked, and -1 comes last."""
    if confidence_scores is None:
        return guesses
    try:
        scores = np.asarray(confidence_scores, dtype=np.float64)
    except (TypeError, ValueError):
        raise VirtualMemoryError(
            f"confidence_scores: ragged or not numbers: must be of the predictions' shape, {guesses.shape}"
        ) from None
    if scores.shape != guesses.shape:
        raise VirtualMemoryError(
            f"confidence_scores: shape {scores.shape}: must be of the predictions' shape, {guesses.shape}"
        )
    wrong = np.argwhere(~np.isfinite(scores))
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise VirtualMemoryError(f"confidence_scores at {at}: {scores[at]}: must be a finite number")
    order = np.argsort(np.where(guesses < 0, np.inf, -scores), axis=-1, kind="stable")
    return np.take_along_axis(guesses, order, axis=-1)


def _whole_array(name: str, given: npt.ArrayLike, shape: str) -> Array:
    """Returns an array of integers; VirtualMemoryError if it is ragged, empty or of anything else."""
    try:
        array = np.asarray(given)
    except ValueError:
        raise VirtualMemoryError(f"{name}: {_ragged(given)}: must be {shape}, lists of one length") from None
    if not array.size:
        raise VirtualMemoryError(f"{name}: empty, shape {array.shape}: must be {shape}")
    if array.dtype.kind not in "iu":
        raise VirtualMemoryError(f"{name}: dtype {array.dtype}: must be integers, {shape}")
    return array


def _ragged(given: Any) -> str:
    """Say which token is not shaped as the first one."""
    shapes: list[tuple[int, ...]] = []
    for token, row in enumerate(given):
        try:
            shapes.append(np.shape(row))
        except ValueError:
            return f"token {token} is ragged"
        if shapes[-1] != shapes[0]:
            return f"token {token} has shape {shapes[-1]}, token 0 {shapes[0]}"
    return "ragged"
