"""The answer of README.md for a model and a card that people own, and what would change it."""

from __future__ import annotations

from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate
from prestage.output.markdown import table
from prestage.output.tables.layout import known_of

#: What the default run is compared with: the scenario that each begins with, and its settings.
OWNED: dict[str, tuple[str, list[str]]] = {
    "a cache of experts on the GPU, prefetching (the default run)": ("default", []),
    "the same without prefetching": ("default", ["prefetch.lookahead=0"]),
    "llama.cpp, `--n-cpu-moe 15`": ("one-gpu", ["runtime.name=llama.cpp", "memory.cpu_layers=15"]),
    "the cache on an RTX 3060 with 12 GB": ("default", ["machine.gpu=rtx3060"]),
    "the cache on an RTX 5060 Ti with 16 GB": ("default", ["machine.gpu=rtx5060ti"]),
}
_OWNED = ["model.preset=gpt-oss-20b", "workload.synthetic.fit=gpt-oss-20b"]
_OWNED += ["machine.gpu=rtx4060", "machine.ram=32GB DDR5-5600"]


def owned() -> str:
    """Returns speeds with their ranges, hits and waiting, in Markdown."""
    rows = []
    for what, (name, settings) in OWNED.items():
        result = simulate(load_scenario(name, [*_OWNED, *settings]), baselines=False)
        assert result.range is not None
        band, data = result.range["tokens_per_second"], result.data
        digits = max(2, min(3, band.digits))
        speed, low, high = (known_of(each, digits) for each in (data["tokens_per_second"], band.p5, band.p95))
        stall = data["time"]["stall_ms"] / data["makespan_ms"]
        rows.append([what, speed, f"{low} to {high}", f"{data['hit_rate']:.0%}", f"{stall:.0%}"])
    return table(["gpt-oss-20b, one user", "tokens/s", "p5 to p95", "found on the GPU", "waiting for experts"], rows)
