"""What llama-bench measures, predicted: `pp512`, a prompt's tokens a second, and `tg128`, generated tokens a second.

Each by itself and from an empty KV cache, as llama-bench has it: a prompt in one go, then tokens without a prompt.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..engine.prediction import Range
from ..engine.run import Progress
from ..engine.scenario.amounts import ScenarioError
from ..engine.scenario.scenario import Scenario, lay, make_scenario
from ..engine.simulate import Result, simulate
from ..workloads.model import load_model
from ..workloads.model_files.checkpoint import weight_bytes

#: Tokens of the prompt, and generated ones: llama-bench's own.
PROMPT, GENERATED = 512, 128


@dataclass(frozen=True)
class BenchRow:
    """One test: its tokens per second, and from p5 to p95 what they may be where not all costs were measured."""

    test: str
    tokens_per_second: float
    range: dict[str, float] | None


def bench(
    scenario: Scenario, prompt: int = PROMPT, generated: int = GENERATED, progress: Progress | None = None
) -> dict[str, Any]:
    """Returns the two tests of a scenario as plain data: the model, the machine, the runtime and `rows` (BenchRow).

    The scenario draws its routing; batch and requests are left out. Raises ScenarioError where it names a trace.
    """
    prompted = simulate(_of(scenario, prompt, 1), baselines=False, progress=progress)
    generating = simulate(_of(scenario, 0, generated), baselines=False, progress=progress)
    for result in (prompted, generating):
        result.draw_range(progress)
    first_ms = prompted.data["time_to_first_token_ms"]["p50"]
    rows = [
        BenchRow(f"pp{prompt}", prompt / first_ms * 1e3, _rates(prompted, prompt)),
        BenchRow(f"tg{generated}", generating.data["tokens_per_second"], _drawn(generating, "tokens_per_second")),
    ]
    model = load_model(scenario.model.preset, **scenario.model.overrides())
    return {
        "model": {"name": model.name, "dtype": model.expert_dtype, "bytes": weight_bytes(model)}
        | {"parameters": model.parameters},
        "machine": scenario.machine.profile,
        "runtime": scenario.runtime.name,
        "cpu_layers": scenario.memory.cpu_layers,
        "rows": [asdict(row) for row in rows],
    }


def _of(scenario: Scenario, prompt: int, generated: int) -> Scenario:
    """Returns the scenario of one sequence with so many tokens of a prompt and after it."""
    data = scenario.plain()
    workload = data["workload"]
    if workload["trace"] is not None:
        raise ScenarioError(
            f"workload.trace = {workload['trace']!r}: a bench draws its routing: take it out (--set workload.trace=)"
        )
    lay(data, "requests", None)
    drawn = {**workload["synthetic"], "tokens": prompt + generated, "prefill_tokens": prompt, "sequences": 1}
    workload |= {"tokens": generated, "batch": 1, "prefill": "whole", "warmup": "0tokens", "synthetic": drawn}
    if workload["context"] is not None:
        workload["context"] = 0
    return make_scenario(data)


def _drawn(result: Result, figure: str) -> dict[str, float] | None:
    band = (result.range or {}).get(figure)
    return None if band is None else band._asdict()


def _rates(result: Result, prompt: int) -> dict[str, float] | None:
    """Returns the range of a prompt's rate: of that of the time to its end, turned round."""
    band = (result.range or {}).get("time_to_first_token_ms")
    if band is None:
        return None
    return Range(*(prompt / ms * 1e3 for ms in (band.p95, band.p50, band.p5)))._asdict()
