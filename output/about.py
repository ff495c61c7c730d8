"""What a run's timeline file says beyond the spans: sizes, outcomes, memory and the machine, off the recording."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..engine.measure.metrics import memory_steps, span_bytes
from ..engine.measure.recording import FATES, MISS, OUTCOMES, Recording
from ..resources.profile import load_profile
from ..resources.timeline import EXPERT, PREFETCH
from .export import About

if TYPE_CHECKING:
    from ..engine.simulate import Result

Array = npt.NDArray[Any]

#: What an expert's kernel says of its access, and a prefetch of its fate, by number; 0 is nothing.
SPAN_OUTCOMES = ("", *OUTCOMES, *FATES)


def about_run(result: Result) -> About:
    """Returns what `export_timeline` takes beside a finished run's timeline."""
    data, recordings = result.data, result.recordings
    scenario = data["scenario"]
    profile = load_profile(scenario["machine"]["profile"])
    return About(
        experts_per_layer=data["model"]["experts"],
        layers=data["model"]["layers"],
        metadata={"scenario": scenario, "versions": data["versions"]},
        gpus={"name": f"{profile.device} (simulated)", "totalGlobalMem": profile.gpu_memory_bytes},
        graphs=scenario["dispatch"]["mode"] == "graph",
        pinned=scenario["copy"]["host_memory"] != "pageable",
        span_bytes=np.concatenate([span_bytes(recording) for recording in recordings]),
        span_outcomes=np.concatenate([span_outcomes(recording) for recording in recordings]),
        outcome_names=SPAN_OUTCOMES,
        requests={} if result.serving.log is None else result.serving.log.requests,
        steps={} if result.serving.log is None else result.serving.log.steps,
        memory={recording.device: resident_steps(recording) for recording in recordings},
    )


def span_outcomes(recording: Recording) -> Array:
    """Returns what each expert's access turned out to be and how each prefetch ended, as numbers in SPAN_OUTCOMES."""
    spans, accesses = recording.spans, recording.decoded.accesses
    numbers = np.zeros(len(spans), dtype=np.int8)
    prefetches = spans["kind"] == PREFETCH
    fates = recording.copy_fates[spans["copy"][prefetches]]
    numbers[prefetches] = np.where(fates >= 0, SPAN_OUTCOMES.index(FATES[0], 1 + len(OUTCOMES)) + fates, 0)
    copies = len(recording.copy_reason)
    of_one = (spans["kind"] == EXPERT) & (spans["expert"] >= 0)
    numbers[of_one & (spans["copy"] < 0)] = 1 + MISS  # in low precision
    kernels = np.flatnonzero(of_one & (spans["copy"] >= 0))
    if len(kernels):
        keys = accesses["visit"].astype(np.int64) * copies + accesses["copy"]
        order = np.argsort(keys, kind="stable")
        wanted = spans["visit"][kernels].astype(np.int64) * copies + spans["copy"][kernels]
        found = order[np.searchsorted(keys, wanted, sorter=order)]
        numbers[kernels] = 1 + recording.outcomes[found]
    return numbers


def resident_steps(recording: Recording) -> tuple[Array, Array, Array]:
    """Returns (time_ns, resident_bytes, arriving_bytes), all (samples,), in order of time.

    Arriving are the bytes that copies under way, from the visit that ordered them, will have brought; resident is what
    is assigned but for those.
    """
    visit_ns, assigned_bytes, _ = memory_steps(recording)
    spans = recording.copy_spans
    numbers, first = np.unique(spans["copy"], return_index=True)
    manager = recording.manager
    sizes = np.array(manager.size_of, dtype=np.int64)[np.array(manager.copy_expert, dtype=np.int64)[numbers]]
    ordered_ns = visit_ns[spans["visit"][first]]
    change_ns = np.concatenate([ordered_ns, recording.copy_end_ns[numbers]])
    order = np.argsort(change_ns, kind="stable")
    under_way = np.concatenate([[0], np.cumsum(np.concatenate([sizes, -sizes])[order])])
    time_ns = np.unique(np.concatenate([visit_ns, change_ns]))
    arriving = under_way[np.searchsorted(change_ns[order], time_ns, side="right")]
    assigned = np.concatenate([[0], assigned_bytes])[np.searchsorted(visit_ns, time_ns, side="right")]
    arriving = np.minimum(arriving, assigned)  # a copy whose room is taken back before it has ended brings nothing
    return time_ns, assigned - arriving, arriving
