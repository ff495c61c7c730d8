"""Runs of the runtime: which settings, in what order, and the file of what they took.

Each setting is a scenario that the simulator can run as it stands: its trace is the routing that the run met, saved
beside the results. Repeats are interleaved: every round runs all settings once, in an order of its own.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from random import Random
from statistics import median, quantiles
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...bounded import read
from ...engine.decide.dispatch import Visit
from ...engine.load import load_inputs
from ...engine.loading.deciders import dispatched, make_manager, make_prefetch
from ...engine.scenario.inputs import Inputs
from ...engine.scenario.scenario import Scenario
from ...files import write_file
from ...workloads.batches import DECODE
from ...workloads.importers import open_trace
from ...workloads.trace import RoutingTrace
from ..device.host import Cores
from ..executor.plan import decision_counts
from .deciding import Deciding, Ranked
from .models import DecodeError, Loaded, load
from .runtime import Prompt, Runtime, Steps

Array = npt.NDArray[Any]
#: What the file says it is.
FORMAT = "prestage-decode-1"
#: The routers of the layers ahead, on this layer's input: what prefetches by while the routing is not yet known.
GATES = "gates"
Progress = Callable[[str, int, int], None]


class Point(NamedTuple):
    """One setting: the experts' budget, the sequences that run together, and how many tokens each has cached.

    `prefetch`: how many experts a token each layer ahead gets, 0 for none. `recorded`: whether a trace's choices are
    used, in place of the model's own.
    """

    budget: str = "25%"
    batch: int = 1
    context: int = 100
    prefetch: int = 0
    recorded: bool = False

    @property
    def words(self) -> str:
        """The setting in a name."""
        whose = "recorded" if self.recorded else "own"
        return f"{self.budget.replace('%', 'pct')}-b{self.batch}-c{self.context}-p{self.prefetch}-{whose}"


def parse_point(text: str) -> Point:
    """Returns the setting of '25%,1,8000,0,own': budget, batch, context, prefetch, and own or recorded routing."""
    words = [word.strip() for word in text.split(",")]
    if len(words) != 5 or not all(word.isdigit() for word in words[1:4]) or words[4] not in ("own", "recorded"):
        raise DecodeError(
            f"--run {text!r}: write it as 25%,1,8000,0,own: budget, batch, context, prefetch, own or recorded routing"
        )
    return Point(words[0], int(words[1]), int(words[2]), int(words[3]), words[4] == "recorded")


@dataclass(frozen=True)
class DecodeConfig:
    """What is run: `points`, each `repeats` times behind one run that does not count.

    `tokens` are decoded by each place of a batch, and the first `warmup` steps count in no rate. `predictor`: GATES, or
    with `routing`, a trace, any of the simulator's. `deadline_s`: begin no run after so many seconds.
    """

    model: str
    points: Sequence[Point] = (Point(),)
    tokens: int = 48
    warmup: int = 16
    lookahead: int = 1
    predictor: str = GATES
    eviction: str = "lru"
    routing: Path | None = None
    text: Path | None = None
    layers: int | None = None
    top_k: int | None = None
    repeats: int = 7
    deadline_s: float | None = None
    profile: str = "h200-pcie5"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("tokens", 1), ("warmup", 0), ("lookahead", 1), ("repeats", 1)):
            if getattr(self, name) < low:
                raise DecodeError(f"--{name} {getattr(self, name)}: must be at least {low}")
        if not self.points or len(set(self.points)) < len(self.points):
            raise DecodeError("--run: give at least one setting, and each once")
        for point in self.points:
            if point.batch < 1 or point.context < 1:
                raise DecodeError(f"batch {point.batch}, context {point.context}: must be at least 1 each")
            if point.recorded and self.routing is None:
                raise DecodeError("recorded routing: give --routing, a trace")
        if self.warmup >= self.tokens:
            raise DecodeError(f"--warmup {self.warmup}: must be less than --tokens {self.tokens}")
        if self.predictor != GATES and any(point.prefetch and not point.recorded for point in self.points):
            raise DecodeError(
                f"--predictor {self.predictor}: guesses before the run, of a recorded routing: give --routing, or use "
                f"{GATES}"
            )


@dataclass
class Run:
    """One setting: its scenario, what it is to decide by, and what its repeats took."""

    name: str
    point: Point
    scenario: dict[str, Any]
    inputs: Inputs
    #: Of each: which round it was in and how it went, what it took, and what was decided.
    repeats: list[tuple[dict[str, Any], Steps, dict[str, int]]] = field(default_factory=list)


class Known:
    """The decisions of a run whose routing is given, by the simulator's own guesses of it."""

    horizons = guesses = 0

    def __init__(self, inputs: Inputs) -> None:
        self.manager = make_manager(inputs)
        self._visits = dispatched(inputs, self.manager, make_prefetch(inputs.scenario, inputs.model))

    def visit(self, layer: int, choice: Sequence[Sequence[int]], ranked: Ranked = ()) -> Visit:
        """Returns what is done at the next visit."""
        return next(self._visits)


class _Counting:
    """Decides as another does, and keeps its visits."""

    def __init__(self, decides: Deciding | Known) -> None:
        self._decides, self.visits = decides, list[Visit]()
        self.horizons, self.guesses = decides.horizons, decides.guesses

    def visit(self, layer: int, choice: Sequence[Sequence[int]], ranked: Ranked = ()) -> Visit:
        """Returns what the other says."""
        visit = self._decides.visit(layer, choice, ranked)
        self.visits.append(visit)
        return visit

    def counts(self) -> dict[str, int]:
        """Returns what was decided, by number."""
        return decision_counts(self.visits, self._decides.manager)


def decode_all(gpu: Any, config: DecodeConfig, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run all settings, write `decode.json` and a trace a setting into a folder, and return what the file holds.

    What has been measured is written after each round. Raises InputError for what cannot be run.
    """
    began = monotonic()
    loaded = load(gpu, config.model, layers=config.layers, top_k=config.top_k, seed=config.seed)
    recorded = None if config.routing is None else open_trace(config.routing)
    runs = [_run(config, loaded, recorded, point) for point in config.points]
    runtime = Runtime(gpu, loaded, max(slots_of(run.inputs) for run in runs))
    prompts = dict.fromkeys((point.batch, point.context) for point in config.points)
    filled = {key: runtime.fill(_prompt_tokens(config, loaded, *key)) for key in prompts}
    report, cores = _same_for_all(gpu, config, loaded) | {"runs": []}, Cores()
    gc.collect()
    gc.freeze()  # what is loaded stays: a collection before each run need not look at it
    try:
        for number in range(-1, config.repeats):
            order = list(runs)
            Random(config.seed * 1000 + number).shuffle(order)
            for place, run in enumerate(order):
                if config.deadline_s is not None and monotonic() - began > config.deadline_s:
                    break
                if progress is not None:
                    progress("decode", (number + 1) * len(runs) + place, (config.repeats + 1) * len(runs))
                with cores.quietest():
                    steps, counts = _decode(runtime, run, filled[run.point.batch, run.point.context], config)
                    rounds = {"round": number, "place": place, "host_slowdown": round(cores.slowdown(), 3)}
                if number >= 0:  # the round before them is a warm-up
                    run.repeats.append((rounds, steps, counts))
            report["runs"] = [_reported(run, config, out) for run in runs if run.repeats]
            if report["runs"]:
                write_file(out / "decode.json", json.dumps(report, indent=1).encode() + b"\n")
            if config.deadline_s is not None and monotonic() - began > config.deadline_s:
                break
    finally:
        gc.unfreeze()
    if not report["runs"]:
        raise DecodeError(f"--deadline {config.deadline_s}: passed before a run could be counted: give more seconds")
    return report


def slots_of(inputs: Inputs) -> int:
    """Returns how many experts the budget of a run holds."""
    return inputs.budget_bytes // inputs.model.expert_bytes[0]


def _run(config: DecodeConfig, loaded: Loaded, recorded: RoutingTrace | None, point: Point) -> Run:
    """Returns a setting, checked; its scenario names the trace that will lie beside the results."""
    budget, batch, context, prefetch, _ = point
    name = f"{Path(config.model).name.removesuffix('.toml')}-{point.words}"
    scenario: dict[str, Any] = {
        "seed": config.seed,
        "model": {"preset": config.model, "expert_bytes": loaded.layout.expert_bytes}
        | ({"dtype": str(loaded.layout.dtype).split(".")[-1]} if loaded.random else {})
        | ({"layers": loaded.layers} if config.layers is not None else {})
        | ({"top_k": loaded.top_k} if config.top_k is not None else {}),
        "machine": {"profile": config.profile},
        "workload": {
            "trace": f"{name}.safetensors", "prefill": "skip", "batch": batch, "context": context,
            "warmup": f"{config.warmup}steps",
        },
        "memory": {"gpu_budget": budget, "eviction": config.eviction},
        "prefetch": {"policy": "none"},
    }  # fmt: skip
    if prefetch:
        scenario["prefetch"] = {"policy": "top-k", "k": prefetch, "lookahead": config.lookahead}
        gates = config.predictor == GATES
        scenario["predictor"] = {"name": "recorded", "lane": "compute"} if gates else {"name": config.predictor}
    if point.recorded:
        assert recorded is not None
        trace = _cut(config, loaded, recorded, batch)
    else:
        trace = _blank(config, loaded, batch)
    if prefetch and config.predictor == GATES:
        trace = replace(trace, predictions=_no_guesses(config, loaded, trace.tokens, prefetch), confidences=None)
    inputs = load_inputs(Scenario.model_validate(scenario), trace)
    return Run(name, point, scenario, inputs)


def _blank(config: DecodeConfig, loaded: Loaded, batch: int) -> RoutingTrace:
    """Returns a trace of the run's shape, whose choices mean nothing."""
    shape = (batch * config.tokens, loaded.layers, loaded.top_k)
    experts = np.broadcast_to(np.arange(loaded.top_k, dtype=np.uint16), shape)
    return RoutingTrace(experts, loaded.num_experts, sequence=np.repeat(np.arange(batch), config.tokens))


def _no_guesses(config: DecodeConfig, loaded: Loaded, tokens: int, prefetch: int) -> Array:
    return np.full((tokens, loaded.layers, config.lookahead, prefetch), -1, dtype=np.int16)


def _cut(config: DecodeConfig, loaded: Loaded, recorded: RoutingTrace, batch: int) -> RoutingTrace:
    """Returns the first decode tokens of the first sequences that have enough, and the model's layers of them."""
    where = f"--routing {config.routing}"
    fits = (recorded.num_experts, recorded.k) == (loaded.num_experts, loaded.top_k)
    if not fits or recorded.layers < loaded.layers or recorded.present is not None:
        raise DecodeError(
            f"{where}: {recorded.layers} layers of {recorded.num_experts} experts, top-{recorded.k}, but the model "
            f"has {loaded.layers} of {loaded.num_experts}, top-{loaded.top_k}: give a trace of this model, with every "
            "token at every layer (--layers takes the first ones, --top-k another number)"
        )
    kept: list[Array] = []
    decodes = np.flatnonzero(recorded.phase == DECODE)
    for name in dict.fromkeys(recorded.sequence[decodes].tolist()):
        rows = decodes[recorded.sequence[decodes] == name]
        # A long sequence serves as several, one part after the other.
        kept += [rows[at : at + config.tokens] for at in range(0, len(rows) - config.tokens + 1, config.tokens)][:batch]
        if len(kept) >= batch:
            break
    if len(kept) < batch:
        raise DecodeError(f"{where}: holds {len(kept)} times {config.tokens} decode tokens: {batch} are wanted")
    rows = np.concatenate(kept[:batch])
    return RoutingTrace(
        recorded.experts[rows, : loaded.layers],
        recorded.num_experts,
        sequence=np.repeat(np.arange(batch), config.tokens),
        meta={key: value for key, value in recorded.meta.items() if key in ("model", "source", "licence")},
    )


def _prompt_tokens(config: DecodeConfig, loaded: Loaded, batch: int, context: int) -> Any:
    """Returns prompts (batch, context): the text's tokens in order, or random ones."""
    import torch

    device = loaded.model.device
    if config.text is None:
        generator = torch.Generator().manual_seed(config.seed)
        vocabulary = loaded.model.config.vocab_size
        return torch.randint(vocabulary, (batch, context), generator=generator).to(device)
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
        text = read(config.text, DecodeError).decode("utf-8")
    except (OSError, ValueError) as error:
        raise DecodeError(f"--text {config.text}: cannot be read and cut into tokens: {error}") from error
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    if len(tokens) < batch * context:
        raise DecodeError(f"--text {config.text}: {len(tokens)} tokens: {batch} prompts of {context} are wanted")
    return torch.tensor(tokens[: batch * context]).reshape(batch, context).to(device)


def _decode(runtime: Runtime, run: Run, prompt: Prompt, config: DecodeConfig) -> tuple[Steps, dict[str, int]]:
    """Run a setting once; return what it took, and what was decided."""
    by_gates = config.predictor == GATES
    decides = _Counting(Deciding(run.inputs) if by_gates else Known(run.inputs))
    routing = None
    if run.point.recorded:
        experts = run.inputs.trace.experts
        routing = np.stack([experts[step.rows] for step in run.inputs.steps]).astype(np.int64)
    steps = runtime.decode(prompt, decides, config.tokens, routing=routing)
    return steps, decides.counts()


def machine_of(gpu: Any, name: str, loaded: Loaded) -> dict[str, Any]:
    """Returns on what and with which model something was run."""
    machine = gpu.describe()
    machine["versions"] = machine["versions"] | {
        name: metadata.version(name) for name in ("transformers", "prestage") if _is_installed(name)
    }
    return {
        "machine": machine | {"date": f"{datetime.now(UTC):%Y-%m-%d}"},
        "model": {
            "name": name, "layers": loaded.layers, "experts": loaded.num_experts, "top_k": loaded.top_k,
            "expert_bytes": loaded.layout.expert_bytes, "dtype": str(loaded.layout.dtype).split(".")[-1],
            "random_weights": loaded.random, "attention": loaded.model.config._attn_implementation,
        },
    }  # fmt: skip


def _same_for_all(gpu: Any, config: DecodeConfig, loaded: Loaded) -> dict[str, Any]:
    """Returns what is the same for all runs."""
    same = {"format": FORMAT} | machine_of(gpu, config.model, loaded)
    return same | {"tokens": config.tokens, "warmup_steps": config.warmup}


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _reported(run: Run, config: DecodeConfig, out: Path) -> dict[str, Any]:
    """Returns what a setting took, and saves the routing that its first repeat met."""
    rates = [tokens_per_second(steps, config.warmup) for _, steps, _ in run.repeats]
    _, first, _ = run.repeats[0]
    trace = _met(run, first)
    out.mkdir(parents=True, exist_ok=True)
    trace.save(out / f"{run.name}.safetensors")
    content = (out / f"{run.name}.safetensors").read_bytes()
    return {
        "name": run.name,
        "scenario": run.scenario,
        "trace_sha256": hashlib.sha256(content).hexdigest(),
        "same_routing": all(_same(steps.routing, first.routing) for _, steps, _ in run.repeats),
        "counts": [counts for _, _, counts in run.repeats],
        "tokens_per_second": median(rates),
        "spread": quartile_spread(rates),
        "repeats": [
            rounds | {"tokens_per_second": rate, "step_ns": steps.step_ns}
            for rate, (rounds, steps, _) in zip(rates, run.repeats, strict=True)
        ],
    }


def _met(run: Run, steps: Steps) -> RoutingTrace:
    """Returns the trace of what a repeat met: each place's tokens in a row, and what was guessed."""
    trace = run.inputs.trace
    experts, predictions = trace.experts.copy(), trace.predictions
    for step, routing in zip(run.inputs.steps, steps.routing, strict=True):
        experts[step.rows] = routing
    if steps.guessed:
        predictions = np.full((trace.tokens, *steps.guessed[0].shape[1:]), -1, dtype=np.int16)
        for step, guessed in zip(run.inputs.steps, steps.guessed, strict=True):
            predictions[step.rows] = guessed
    return replace(trace, experts=experts, predictions=predictions)


def _same(left: Sequence[Array], right: Sequence[Array]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(left, right, strict=True))


def tokens_per_second(steps: Steps, warmup: int) -> float:
    """Returns decoded tokens over time, behind the warm-up steps."""
    tokens = sum(len(each) for each in steps.tokens[warmup:])
    return tokens * 1e9 / sum(steps.step_ns[warmup:])


def quartile_spread(samples: Sequence[float]) -> float | None:
    """Returns the distance between the quartiles over the median; None for fewer than three samples."""
    if len(samples) < 3:
        return None
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return (high - low) / median(samples)


def summary(report: Mapping[str, Any]) -> list[tuple[str, float, float | None, Mapping[str, int]]]:
    """Returns each setting's name, tokens per second, spread, and counts, as a table shows them."""
    return [(run["name"], run["tokens_per_second"], run["spread"], run["counts"][0]) for run in report["runs"]]
