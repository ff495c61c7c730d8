"""The scenarios that profiles are fitted on, and the others that they are validated on: one line of a table each.

Each has the shapes of a real model, with few enough layers to fit on a GPU and to last some tens of milliseconds, and a
budget at which neither copies nor kernels alone decide how long it takes. No scenario of one set is in another, nor
is its trace: seeds differ. Those of two GPUs are pipelines of two stages, and one GPU whose experts lie in the other's
memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...engine.scenario.scenario import Scenario, make_scenario

#: Settings, as ("section__key", value).
Sections = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class _Shape:
    """A model's preset, how many of its layers run, for how many tokens, over how skewed a trace."""

    preset: str
    layers: int
    tokens: int
    skew: float
    working_set: int
    reuse: float
    budget: str
    #: Experts prefetched a layer where guesses may be wrong: fewer than are chosen, so that they do not fill the link.
    prefetched: int


_SHAPES = {
    "mixtral": _Shape("mixtral-8x7b", 2, 150, 0.5, 8, 0.3, "15experts", 1),
    "qwen": _Shape("qwen3-30b-a3b", 4, 40, 0.5, 24, 0.5, "100experts", 3),
    "switch": _Shape("switch-base-128", 6, 60, 0.5, 24, 0.5, "120experts", 1),
    "deepseek": _Shape("deepseek-v2-lite", 4, 40, 0.5, 16, 0.5, "72experts", 2),
}


@dataclass(frozen=True)
class Line:
    """One scenario: its shape, what the host does, how far and how well it looks ahead, and what else is set."""

    shape: str
    mode: str
    lookahead: int
    recall: float = 1.0
    readback: bool = True
    sections: Sections = ()
    note: str = ""

    @property
    def name(self) -> str:
        """What the scenario is called within its set."""
        parts = [self.shape, self.mode, f"ahead{self.lookahead}"]
        if self.lookahead:
            parts.append(f"recall{round(self.recall * 100)}")
        if not self.readback:
            parts.append("blind")
        return "-".join(parts + ([self.note] if self.note else []))


def as_sections(**keys: Any) -> Sections:
    """Returns settings as `section__key=value`."""
    return tuple(keys.items())


_BATCH = as_sections(workload__batch=4, workload__synthetic__sequences=4)
_PROMPT = as_sections(
    workload__prefill="whole", workload__synthetic__prefill_tokens=32, workload__synthetic__sequences=2,
    workload__synthetic__tokens=104,
)  # fmt: skip
_TWO = as_sections(copy__discipline="two_streams")
_QUEUE = as_sections(copy__discipline="priority")
_PIECES = as_sections(copy__discipline="priority", copy__chunk_bytes=16 * 2**20)


def _stages(micro_batches: int, threads: str = "one", **keys: Any) -> tuple[tuple[str, Any], ...]:
    """Returns settings of a pipeline of two stages over eight sequences, which `micro_batches` divide."""
    return as_sections(
        machine__profile="h200-x2", workload__batch=8, workload__synthetic__sequences=8, parallel__stages=2,
        parallel__micro_batches=micro_batches, parallel__dispatch_threads=threads, **keys,
    )  # fmt: skip


def _pipe(
    shape: str, mode: str, lookahead: int, micro_batches: int, recall: float = 1.0, readback: bool = True,
    threads: str = "one", **keys: Any,
) -> Line:  # fmt: skip
    """Returns a pipeline's scenario; a stage has the budget of `_STAGE_BUDGETS` if `keys` give no other."""
    keys = {"memory__gpu_budget": _STAGE_BUDGETS[shape], **keys}
    note = f"m{micro_batches}" + ("-threads" if threads != "one" else "")
    return Line(shape, mode, lookahead, recall, readback, _stages(micro_batches, threads, **keys), note)


#: Room for a part of a stage's experts.
_STAGE_BUDGETS = {"mixtral": "4experts", "qwen": "60experts", "switch": "60experts", "deepseek": "40experts"}
_PEER = as_sections(machine__profile="h200-x2", copy__source="peer")

_EVERYWHERE = ("mixtral", "qwen", "switch", "deepseek")

FIT = [
    *(Line(shape, mode, 0) for shape in _EVERYWHERE for mode in ("graph", "eager")),
    *(Line(shape, mode, 1, 0.9) for shape in _EVERYWHERE for mode in ("graph", "eager")),
    *(Line(shape, "graph", 1, 0.9, False) for shape in _EVERYWHERE),
    *(Line(shape, "eager", 0, readback=False) for shape in _EVERYWHERE),
    *(Line(shape, "graph", 0, sections=_BATCH, note="batch4") for shape in ("mixtral", "qwen")),
    *(Line("deepseek", mode, 0, sections=_PROMPT, note="prefill") for mode in ("graph", "eager")),
    Line("qwen", "eager", 1, 0.9, sections=_BATCH, note="batch4"),
    Line("qwen", "graph", 1, 0.9, sections=_TWO, note="two-streams"),
]

VALIDATION = [
    *(Line(shape, mode, 0) for shape in _EVERYWHERE for mode in ("graph", "eager")),
    *(Line(shape, mode, 1, 0.8) for shape in _EVERYWHERE for mode in ("graph", "eager")),
    *(Line(shape, "graph", 3, 1.0) for shape in _EVERYWHERE),
    *(Line(shape, "graph", 1, 0.6, False) for shape in ("mixtral", "qwen")),
    *(Line(shape, "eager", 3, 0.6) for shape in ("mixtral", "switch")),
    *(Line(shape, "eager", 1, 1.0, False) for shape in ("qwen", "deepseek")),
    Line("qwen", "graph", 1, 0.8, sections=_TWO, note="two-streams"),
    Line("switch", "graph", 1, 0.8, sections=_TWO, note="two-streams"),
    Line("deepseek", "graph", 3, 0.6, sections=_QUEUE, note="priority"),
    Line("mixtral", "graph", 1, 0.8, sections=_PIECES, note="priority-pieces"),
    Line("qwen", "graph", 1, 0.8, sections=(*_BATCH, *as_sections(memory__gpu_budget="320experts")), note="batch4"),
    Line("mixtral", "eager", 0, sections=_BATCH, note="batch4"),
    Line("deepseek", "graph", 1, 0.8, sections=_PROMPT, note="prefill"),
    Line("qwen", "graph", 0, sections=(*_BATCH, *as_sections(memory__gpu_budget="24experts")), note="waves"),
    Line("deepseek", "graph", 0, sections=as_sections(dispatch__expert_order="resident_first"), note="resident-first"),
]

FIT_TWO_GPUS = [
    _pipe("qwen", "graph", 1, 2, 0.9),
    _pipe("deepseek", "graph", 0, 4),
    _pipe("switch", "graph", 0, 2),
    _pipe("mixtral", "graph", 0, 2, readback=False, workload__synthetic__tokens=56),
    _pipe("qwen", "graph", 0, 4, readback=False),
    _pipe("deepseek", "graph", 1, 2, 0.9, readback=False),
    _pipe("deepseek", "eager", 0, 4),
    _pipe("switch", "graph", 0, 4, threads="per-gpu"),
    *(Line(shape, "graph", 0, sections=_PEER, note="peer") for shape in _EVERYWHERE),
    *(Line(shape, "graph", 1, 0.9, sections=_PEER, note="peer") for shape in _EVERYWHERE),
    Line("deepseek", "eager", 0, sections=_PEER, note="peer"),
]

TWO_GPUS = [
    *(_pipe("qwen", "graph", 0, micro_batches) for micro_batches in (1, 2, 4, 8)),
    *(_pipe("qwen", "graph", 1, micro_batches, 0.8, readback=False) for micro_batches in (1, 2, 4, 8)),
    _pipe("deepseek", "graph", 1, 2, 0.8),
    _pipe("deepseek", "graph", 0, 4, readback=False),
    _pipe("switch", "graph", 1, 8, 0.8, readback=False),
    _pipe("deepseek", "eager", 0, 2),
    *(
        _pipe("mixtral", "graph", 0, micro_batches, readback=False, workload__synthetic__tokens=48)
        for micro_batches in (4, 8)
    ),
    _pipe("mixtral", "graph", 1, 4, 0.8, readback=False, workload__synthetic__tokens=48),
    _pipe("qwen", "graph", 0, 4, threads="per-gpu"),
    _pipe("deepseek", "graph", 0, 2, threads="per-gpu"),
    *(Line(shape, "graph", 0, sections=_PEER, note="peer") for shape in ("mixtral", "deepseek")),
    *(Line(shape, "graph", 1, 0.8, sections=_PEER, note="peer") for shape in ("qwen", "switch")),
    Line("qwen", "graph", 1, 0.8, False, sections=_PEER, note="peer"),
]

_LINES = {"fit": FIT, "validation": VALIDATION, "fit-two-gpus": FIT_TWO_GPUS, "two-gpus": TWO_GPUS}
#: The sets by name, each with the seed of its traces and what its scenarios' names begin with: of streams and host
#: alone, of pipelines, of what runs beside (`scenario_sets_beside`), and of two GPUs that share every layer's experts.
SETS = {
    "fit": (11, "fit-"),
    "validation": (23, ""),
    "fit-two-gpus": (37, "fit-two-"),
    "two-gpus": (41, "two-"),
    "fit-beside": (43, "fit-beside-"),
    "beside": (47, "beside-"),
    "fit-shared": (53, "fit-shared-"),
    "shared": (59, "shared-"),
}


def scenarios(set_name: str) -> dict[str, Scenario]:
    """Returns the scenarios of one of SETS by name."""
    from .scenario_sets_beside import BESIDE, FIT_BESIDE, FIT_SHARED, SHARED

    of_set = {"fit-beside": FIT_BESIDE, "beside": BESIDE, "fit-shared": FIT_SHARED, "shared": SHARED}
    lines, (seed, prefix) = of_set.get(set_name, _LINES.get(set_name, [])), SETS[set_name]
    return {prefix + line.name: _scenario(line, seed) for line in lines}


def _how_many(line: Line, shape: _Shape) -> dict[str, int]:
    return {"k": shape.prefetched} if line.recall < 1 else {}


def _scenario(line: Line, seed: int) -> Scenario:
    shape = _SHAPES[line.shape]
    data: dict[str, Any] = {
        "seed": seed,
        "model": {"preset": shape.preset, "layers": shape.layers},
        "workload": {
            "synthetic": {
                "tokens": shape.tokens,
                "skew": shape.skew,
                "working_set": shape.working_set,
                "reuse": shape.reuse,
            }
        },
        "memory": {"gpu_budget": shape.budget},
        "predictor": {"recall": line.recall, "latency_us": 0.0},
        "prefetch": {"lookahead": line.lookahead, **_how_many(line, shape)},
        "dispatch": {"mode": line.mode, "router_readback": line.readback},
    }
    for path, value in line.sections:
        *sections, key = path.split("__")
        section = data
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value
    return make_scenario(data, f"scenario {line.name}")
