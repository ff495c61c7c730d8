"""How fast it is, as ratios within one run, held against the committed ones:

    python tests/performance.py          # a table of before and now, and by how much each moved
    python tests/performance.py --write  # what is measured becomes what later changes are held against

Layer visits are in bare SimPy timeouts, replays in the time that others take for the same: lower is better. How fast a
machine is falls out, how busy it is mostly; for the rest tests/test_performance.py lets each be SLOWER times as slow.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import bench_engines
from bench_replay import compiled, libcachesim, measure, ordered_dict

from prestage.engine.decide.lookups import list_lookups
from prestage.engine.load import load_inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.output.markdown import table
from prestage.workloads.batches import plan_steps
from prestage.workloads.synthetic import synthesize

KEPT = Path(__file__).parent / "performance.json"
#: How many times as slow a ratio may become unseen.
SLOWER = 3.0
#: Tokens of each scenario by compiled code, enough that laying out counts little, and by SimPy (0: not by it).
TOKENS = {"speed": (400, 4), "guide": (400, 4), "nvme": (30, 0), "placement-8": (32, 0)}
#: Layers, experts, top-k and accesses of the replays.
REPLAYED = (24, 32, 4, 600_000)


def engines() -> dict[str, float]:
    """Returns what a layer visit takes in bare timeouts, by scenario and engine."""
    found = {}
    for name, (many, few) in TOKENS.items():
        for engine, tokens in (("compiled", many), *([("simpy", few)] if few else [])):
            inputs = load_inputs(load_scenario(name, [f"workload.tokens={tokens}"]))
            bench_engines.run_s(inputs, engine)  # compiles, or loads what was compiled
            found[f"{name}, {engine}"] = bench_engines.timeouts(inputs, bench_engines.run_s, engine)
    return found


def replays() -> dict[str, float]:
    """Returns the time of the compiled replay by that of others, for the same accesses."""
    layers, experts, top_k, count = REPLAYED
    trace = synthesize(count // (layers * top_k), layers, experts, top_k, skew=0.8, reuse=0.3, seed=1)
    accesses = list_lookups(trace, plan_steps(trace.sequence, trace.phase), "single", shared=False).experts
    with tempfile.TemporaryDirectory() as folder:
        others = {"replay by OrderedDict": (ordered_dict(accesses), 3)}
        if find_spec("libcachesim") is not None:
            others["replay by libCacheSim"] = (libcachesim(accesses, Path(folder)), 5)
        ours = compiled(trace)
        ours(layers * experts)
        rates = measure({"ours": (ours, 5), **others}, layers * experts // 2, len(accesses))
    return {name: rates[name] / rates["ours"] for name in others}


def measured() -> dict[str, float]:
    """Returns every ratio, lower is better."""
    return {name: round(ratio, 4) for name, ratio in (engines() | replays()).items()}


def kept() -> dict[str, float]:
    """Returns the committed ratios."""
    said: dict[str, float] = json.loads(KEPT.read_text(encoding="utf-8"))
    return said


def moves(before: dict[str, float], now: dict[str, float]) -> str:
    """Returns a table of what was, what is, and the factor between them."""
    rows = [[name, f"{before[name]:.3g}", f"{now[name]:.3g}", f"{now[name] / before[name]:.2f}"] for name in now]
    return table(["ratio, lower is better", "committed", "now", "times"], rows)


def slower(before: dict[str, float], now: dict[str, float]) -> list[str]:
    """Returns the ratios that grew beyond what is let pass."""
    return [name for name in now if now[name] > SLOWER * before[name]]


def main() -> None:
    """Print what moved, or keep what is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    now = measured()
    if parser.parse_args().write:
        KEPT.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    else:
        print(moves(kept(), now))


if __name__ == "__main__":
    main()
