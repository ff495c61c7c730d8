"""Requests served by the runtime in real time: the simulator's own server makes the steps, a real model runs them.

Who arrives when, the scheduler, the KV blocks, what each position's experts are and what the memory manager does are
those of the scenario's simulation, decided as the real clock goes. What is written is what ran when, so that a
simulation can be held against it: of the same steps, and of the same requests by its own clock.
"""

from __future__ import annotations

import gc
import heapq
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter_ns, sleep
from typing import Any

import numpy as np

from ...engine.load import load_inputs
from ...engine.measure.request_metrics import run_requests
from ...engine.scenario.inputs import Inputs
from ...engine.scenario.scenario import Scenario, load_scenario, make_scenario
from ...files import write_file
from ...workloads.requests.request import Part, RequestStep, Wait
from ...workloads.requests.server import Server
from ...workloads.torch_threads import one_thread
from ..device.host import Cores
from .models import DecodeError, Loaded, load
from .packed import PackedCache, masks
from .runs import Known, machine_of, slots_of
from .runtime import PackedRows, Runtime

#: What the file says it is.
FORMAT = "prestage-served-1"
#: What the runtime does, and no more: keys of a scenario with the only value that each may have.
_ONLY: dict[str, Any] = {
    "dispatch.mode": "eager", "dispatch.router_readback": True, "dispatch.expert_order": "router",
    "dispatch.expert_kernel": "separate", "copy.discipline": "fifo", "copy.source": "host", "miss.policy": "fetch",
    "compression.where": "none", "tiers.host_budget": "all", "parallel.gpus": 1, "parallel.stages": 1,
    "requests.speculation": None, "requests.kv.prefix_caching": False, "requests.kv.swap_budget": "0B",
    "requests.kv.boundary": "fixed", "requests.replicas": 1, "prefetch.issue": "after_launch",
}  # fmt: skip
#: The last so many ns of a wait are spent looking at the clock.
_SPIN_NS = 2_000_000
#: Copies of experts by which the link is measured, before and behind a repeat.
_COPIES = 32
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ServeConfig:
    """What is served: a scenario with [requests], by a model of which it is; `repeats` behind one that does not count.

    `deadline_s`: begin no repeat after so many seconds.
    """

    model: str
    scenario: str
    settings: tuple[str, ...] = ()
    layers: int | None = None
    top_k: int | None = None
    repeats: int = 3
    deadline_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise DecodeError(f"--repeats {self.repeats}: must be at least 1")


@dataclass
class Ran:
    """One repeat: who made the steps, these as (from, until, parts) in ns since it began, and when nothing ran."""

    server: Server
    steps: list[tuple[int, int, tuple[Part, ...]]] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    scheduling_ns: list[int] = field(default_factory=list)
    idle: list[tuple[int, int]] = field(default_factory=list)


def serve_all(gpu: Any, config: ServeConfig, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Serve a scenario's requests in real time, write `served.json`, and return what it holds.

    The first repeat does not count; what its scheduler took in the median is written into the scenario. Raises
    InputError for what cannot be run.
    """
    began = monotonic()
    chosen = _checked(load_scenario(config.scenario, config.settings))
    loaded = load(gpu, config.model, layers=config.layers, top_k=config.top_k, seed=config.seed)
    scenario = _of_model(chosen, config, loaded)
    inputs = load_inputs(scenario)
    runtime = Runtime(gpu, loaded, slots_of(inputs))
    report: dict[str, Any] = {}
    cores, repeats = Cores(), []
    gc.collect()
    gc.freeze()
    try:
        for number in range(-1, config.repeats):
            if config.deadline_s is not None and monotonic() - began > config.deadline_s:
                break
            if progress is not None:
                progress("serve", number + 1, config.repeats + 1)
            with cores.quietest(), one_thread():
                before_ns = runtime.copy_ns(_COPIES)
                ran = serve_once(gpu, runtime, loaded, inputs)
                slowdown, copies_ns = round(cores.slowdown(), 3), [before_ns, runtime.copy_ns(_COPIES)]
            if number < 0:
                scenario = _scheduling(scenario, ran)
                inputs = load_inputs(scenario)
                continue
            repeats.append(_reported(ran, inputs) | {"host_slowdown": slowdown, "copy_ns": copies_ns})
            report = machine_of(gpu, config.model, loaded) | {
                "format": FORMAT, "scenario": scenario.plain(), "repeats": repeats,
            }  # fmt: skip
            out.mkdir(parents=True, exist_ok=True)
            write_file(out / "served.json", json.dumps(report).encode() + b"\n")
    finally:
        gc.unfreeze()
    if not report:
        raise DecodeError(f"--deadline {config.deadline_s}: passed before a repeat could be counted: give more seconds")
    return report


def _checked(scenario: Scenario) -> Scenario:
    """Returns a scenario that the runtime can serve; DecodeError for what it cannot."""
    if scenario.requests is None:
        raise DecodeError("--requests: the scenario has no [requests]: give one that has")
    data = scenario.plain()
    for key, only in _ONLY.items():
        value: Any = data
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value != only:
            wanted = "must not be set" if only is None else f"must be {only!r}"
            raise DecodeError(f"--requests: {key} = {value!r}: {wanted} for a real model to serve it")
    if scenario.requests.scheduler.name == "expert-aware":
        raise DecodeError("--requests: requests.scheduler.name = 'expert-aware': looks at the simulated link")
    return scenario


def _of_model(scenario: Scenario, config: ServeConfig, loaded: Loaded) -> Scenario:
    """Returns the scenario for what was loaded: the bytes that an expert takes there, its type, its blocks."""
    data = scenario.plain()
    data["model"] = {"preset": config.model, "expert_bytes": loaded.layout.expert_bytes}
    if loaded.random:
        data["model"]["dtype"] = str(loaded.layout.dtype).split(".")[-1]
    data["model"] |= {"layers": loaded.layers} if config.layers is not None else {}
    data["model"] |= {"top_k": loaded.top_k} if config.top_k is not None else {}
    return make_scenario(data)


def _scheduling(scenario: Scenario, ran: Ran) -> Scenario:
    """Returns the scenario with what the scheduler has taken in the median."""
    data = scenario.plain()
    data["requests"]["scheduler"]["step_us"] = median(ran.scheduling_ns) / 1000
    return make_scenario(data)


def serve_once(gpu: Any, runtime: Runtime, loaded: Loaded, inputs: Inputs) -> Ran:
    """Serve all requests once, by the clock that there is."""
    begun = inputs.begun()
    pulled = begun.pulled
    assert pulled is not None and isinstance(pulled.source, Server)
    ran, texts = Ran(pulled.source), Texts(int(loaded.model.config.vocab_size), inputs.scenario.seed)
    cache = PackedCache(gpu, loaded, places_of(inputs))
    with runtime.serving(Known(begun)):
        zero_ns = perf_counter_ns()
        while True:
            asked_ns = perf_counter_ns() - zero_ns
            found = pulled.next(asked_ns)
            if ran.steps and ran.steps[-1][1] < 0:
                ran.steps[-1] = (ran.steps[-1][0], asked_ns, ran.steps[-1][2])
            if found is None:
                return ran
            if isinstance(found, Wait):
                ran.idle.append((asked_ns, found.until_ns))
                _wait(zero_ns + found.until_ns)
                continue
            assert isinstance(found, RequestStep)
            ran.scheduling_ns.append(perf_counter_ns() - zero_ns - asked_ns)
            ran.steps.append((asked_ns, -1, found.parts))
            ran.rows.append(found.rows.tolist())
            cache.keep({live.request.number for live in ran.server.queue.running})
            packed = _packed(found, loaded, cache, texts)
            routing = inputs.trace.experts[found.rows].astype(np.int64)
            texts.add(found.parts, runtime.packed_step(packed, routing, cache))


def _wait(until_ns: int) -> None:
    """Wait until an instant of the clock."""
    while (left_ns := until_ns - perf_counter_ns()) > 0:
        if left_ns > _SPIN_NS:
            sleep((left_ns - _SPIN_NS) / 1e9)


class Texts:
    """The tokens of requests: prompts are random ones, by request and position; then what they were given."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._vocabulary, self._seed = vocabulary, seed
        self._given: dict[tuple[int, int], int] = {}
        self._prompts: dict[int, Any] = {}

    def tokens(self, part: Part) -> list[int]:
        """Returns the tokens of a part's positions."""
        return [self._token(part.request, at) for at in range(part.first, part.first + part.tokens)]

    def _token(self, request: int, position: int) -> int:
        given = self._given.get((request, position))
        if given is not None:
            return given
        drawn = self._prompts.get(request)
        if drawn is None or len(drawn) <= position:
            count = 2 * position + 64
            drawn = np.random.default_rng([self._seed, request]).integers(self._vocabulary, size=count)
            self._prompts[request] = drawn
        return int(drawn[position])

    def add(self, parts: Iterable[Part], following: list[int]) -> None:
        """Take the tokens that parts with logits were given, in order."""
        given = iter(following)
        for part in parts:
            if part.sampled:
                self._given[part.request, part.first + part.tokens] = next(given)


def _packed(step: RequestStep, loaded: Loaded, cache: PackedCache, texts: Texts) -> PackedRows:
    """Returns a step as the model is given it."""
    request = np.repeat([part.request for part in step.parts], [part.tokens for part in step.parts])
    position = np.concatenate([np.arange(part.first, part.first + part.tokens) for part in step.parts])
    last = np.cumsum([part.tokens for part in step.parts]) - 1
    # A chunk that ends no prompt has no logits that anybody looks at; where there are no others, one row has.
    sampled = last[[part.sampled > 0 for part in step.parts]]
    seen = cache.lay_out(request, position)
    tokens = np.array([token for part in step.parts for token in texts.tokens(part)], dtype=np.int64)
    return PackedRows(tokens, position, masks(loaded, cache, seen, position), sampled if len(sampled) else last[-1:])


def places_of(inputs: Inputs) -> int:
    """Returns how many positions the requests that run at once have at most."""
    pulls, section = inputs.pulls, inputs.scenario.requests
    assert pulls is not None and section is not None
    server = pulls.source()
    assert isinstance(server, Server)
    most = heapq.nlargest(section.scheduler.max_num_seqs, (one.most_positions for one in server.source.requests))
    kv = server.queue.kv
    return min(sum(most), kv.blocks * kv.block_tokens)


def _reported(ran: Ran, inputs: Inputs) -> dict[str, Any]:
    """Returns what a repeat is written as."""
    log, section = ran.server.log, inputs.scenario.requests
    assert section is not None
    requests = log.requests
    return {
        "requests": run_requests(log, section),
        "admitted": requests["number"][np.argsort(requests["started_ns"], kind="stable")].tolist(),
        "idle": ran.idle,
        "steps": [
            {"from_ns": begin, "until_ns": end, "parts": [list(part) for part in parts], "rows": rows}
            for (begin, end, parts), rows in zip(ran.steps, ran.rows, strict=True)
        ],
    }
