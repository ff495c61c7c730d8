"""Mutation testing: small changes to the code, one at a time, and whether the tests of that code notice.

    python tests/mutate.py [--count 60] [--seed 0] [--module NAME …] [--journal FILE] [--quick] [--again]
                           [--seconds S] [--part I/N]

prints every change that no test noticed, and how many were. Changes are drawn from all of the TARGETS by the seed:
another comparison, operator, number, truth or end of a condition, a statement less. Each runs in a process of its
own (tests/mutated.py); files stay as they are, and machine code that is made there is not kept. The journal holds a
line of JSON for each change that was tried; the same command goes on where it ended.
A module's own tests are asked first, then those of the other modules that run the changed function.
With --quick no test is asked that is marked slow, or that does not run the changed function. With --again those
changes of the journal that nobody noticed are tried once more, and no others. With --seconds only so many tests are
asked about a change as take that long as the code is: a change that a later one would notice then counts as one that
nobody did. With --part 1/2 every second change is tried, from the first on: several processes can share a journal.
Modules that are compiled are no targets: that they do as their Python does is tested elsewhere, on random runs.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mutated

ROOT = Path(__file__).parent.parent
#: By module: the tests that are to notice, quickest first.
TARGETS: dict[str, tuple[str, ...]] = {
    "engine/policies/copy_order.py": ("test_copy_order", "test_tiers"),
    "engine/policies/eviction.py": ("test_eviction", "test_memory_manager", "test_replay"),
    "engine/policies/eviction_base.py": ("test_eviction", "test_memory_manager"),
    "engine/policies/eviction_informed.py": ("test_eviction", "test_memory_manager", "test_decisions"),
    "engine/policies/eviction_queues.py": ("test_eviction", "test_libcachesim"),
    "engine/policies/miss.py": ("test_miss", "test_miss_upload"),
    "engine/policies/pinned.py": ("test_pinned",),
    "engine/policies/placement.py": ("test_placement", "test_expert_parallel"),
    "engine/policies/prefetch.py": ("test_prefetch", "test_prefetch_share", "test_dispatch"),
    "engine/policies/prefetch_share.py": ("test_prefetch_share",),
    "engine/policies/preload.py": ("test_preload", "test_composition"),
    "engine/policies/router.py": ("test_replicas",),
    "engine/policies/routing.py": ("test_routing",),
    "engine/policies/scheduler.py": ("test_scheduler", "test_requests_run", "test_serving"),
    "engine/policies/split.py": ("test_split", "test_stages"),
    "engine/decide/dispatch.py": ("test_dispatch", "test_by_layer", "test_decisions"),
    "engine/decide/expert_parallel.py": ("test_expert_parallel", "test_lockstep"),
    "engine/decide/guessed.py": ("test_prefetch", "test_decisions", "test_simulate"),
    "engine/decide/host_memory.py": ("test_tiers",),
    "engine/decide/lookups.py": ("test_dispatch", "test_simulate", "test_accounting"),
    "engine/decide/memory_manager.py": (
        "test_memory_manager", "test_preload", "test_dispatch", "test_partition", "test_eviction",
    ),
    "engine/decide/partition.py": ("test_partition",),
    "engine/decide/pipeline.py": ("test_pipeline", "test_stages"),
    "engine/decide/pools.py": ("test_memory_manager", "test_partition"),
    "engine/decide/program.py": ("test_engines", "test_tiers", "test_decisions"),
    "engine/decide/pulled.py": ("test_pulled",),
    "engine/decide/sources.py": ("test_expert_parallel", "test_compiled_misses", "test_decisions"),
    "engine/decide/spare_memory.py": ("test_expert_parallel",),
    "engine/measure/accesses.py": ("test_accounting", "test_engine_equals_replay"),
    "engine/measure/comparison.py": ("test_compare", "test_stages"),
    "engine/measure/insights.py": ("test_insights",),
    "engine/measure/memory_log.py": ("test_virtual_memory", "test_tiers"),
    "engine/measure/merge.py": ("test_pipeline", "test_stages", "test_composition"),
    "engine/measure/metrics.py": ("test_simulate", "test_accounting", "test_speed", "test_tiers"),
    "engine/measure/misses.py": ("test_accounting", "test_by_layer", "test_compression"),
    "engine/measure/recording.py": ("test_accounting", "test_about", "test_tiers"),
    "engine/measure/request_metrics.py": ("test_request_metrics",),
    "engine/measure/speed.py": ("test_speed",),
    "engine/measure/time_split.py": ("test_accounting", "test_by_layer", "test_decoder", "test_split"),
    "engine/measure/traffic.py": ("test_expert_parallel", "test_lockstep"),
    "engine/costs/all_to_all.py": ("test_lockstep",),
    "engine/costs/attention.py": ("test_context", "test_beside_costs", "test_served"),
    "engine/costs/costs.py": ("test_beside_costs", "test_measured_costs", "test_context", "test_miss"),
    "engine/costs/cpu_streams.py": ("test_runtimes", "test_beside_costs", "test_miss"),
    "engine/costs/offload_costs.py": ("test_miss", "test_extends", "test_compression"),
    "engine/costs/ranges.py": ("test_prediction",),
    "engine/costs/runtime_costs.py": ("test_runtimes", "test_measured_costs"),
    "engine/costs/scatter.py": ("test_measured_costs",),
    "engine/costs/surface_costs.py": ("test_surface",),
    "engine/costs/tiled_products.py": ("test_tiled_products",),
    "engine/costs/uncertainty.py": ("test_measured_costs", "test_prediction", "test_extends"),
    "engine/timing/deciding.py": ("test_about", "test_pulled", "test_decode", "test_serving"),
    "engine/timing/host.py": ("test_copy_order", "test_lane", "test_engines", "test_simulate"),
    "engine/timing/host_state.py": ("test_copy_order", "test_decoder", "test_engines"),
    "engine/timing/lanes.py": ("test_lane", "test_copy_order", "test_network"),
    "engine/timing/machine.py": ("test_topology", "test_engines", "test_tiers"),
    "engine/timing/memory.py": ("test_tiers", "test_engines", "test_accounting"),
    "engine/timing/runs.py": ("test_requests_run", "test_stages", "test_speed"),
    "engine/timing/simulation.py": ("test_engines", "test_decisions", "test_tiers"),
}  # fmt: skip
#: Tests of whole runs, which are asked about every module's functions that they run.
WHOLE_RUNS = (
    "test_drawn", "test_composition", "test_accepted_runs", "test_engine_properties", "test_golden", "test_statistics",
    "test_inference", "test_show", "test_sweep", "test_capacity", "test_reality", "test_from_peer", "test_exclusive",
    "test_memory_total", "test_grouped_kernels", "test_request_load", "test_late", "test_drafting", "test_uncompiled",
    "test_served", "test_spool",
)  # fmt: skip
_OTHER: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,), ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.FloorDiv,), ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,), ast.And: (ast.Or,), ast.Or: (ast.And,), ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}  # fmt: skip
_NOT_RUN = ("annotation", "returns", "decorator_list", "type_params")
_CALLED = {"min": "max", "max": "min", "any": "all", "all": "any", "append": "extend"}


def places(tree: ast.Module) -> list[ast.AST]:
    """Returns the nodes that can be changed, in the order of the source: none of a refusal's words, or of a type."""
    return [node for node in _walk(tree) if _changes(node)]


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params") or isinstance(
            node, ast.Raise | ast.Assert
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from _walk(child)


def _changes(node: ast.AST) -> list[Any]:
    """Returns the ways to change a node."""
    match node:
        case ast.Compare(ops=[op]) | ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op):
            return list(_OTHER.get(type(op), ()))
        case ast.Constant(value=bool()):
            return ["not"]
        case ast.Constant(value=int() | float()):
            return ["more"]
        case ast.If() | ast.While() | ast.IfExp():
            return ["negated"]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in _CALLED:
            return ["called"]
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            return ["nothing"]
        case ast.Expr(value=ast.Call()):
            return ["left out"]
    return []


def changed(tree: ast.Module, at: int, how: Any) -> tuple[ast.Module, str]:
    """Returns a module with the place of a number changed in a way, and what was: "line: before -> after"."""
    tree = copy.deepcopy(tree)
    node: Any = places(tree)[at]
    before, line = ast.unparse(node), node.lineno
    match how:
        case "not":
            node.value = not node.value
        case "more":
            node.value += 1
        case "negated":
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case "called":
            name = "id" if isinstance(node.func, ast.Name) else "attr"
            setattr(node.func, name, _CALLED[getattr(node.func, name)])
        case "nothing":
            node.value = ast.Constant(None)
        case "left out":
            node.value = ast.Constant(None)
        case _ if isinstance(node, ast.Compare):
            node.ops = [how()]
        case _:
            node.op = how()
    ast.fix_missing_locations(tree)
    first = [text.splitlines()[0] for text in (before, ast.unparse(node))]
    return tree, f"{line}: {first[0]} -> {first[1]}"


def main() -> None:
    """Draw changes, run the tests on each, and print those that nobody noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", action="append", choices=TARGETS)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--part", default="1/1")
    given = parser.parse_args()
    part, parts = map(int, given.part.split("/"))
    scratch = Path(os.environ.get("TMPDIR", "/tmp")) / f"mutate-{os.getpid()}.log"
    journal: Path = given.journal or scratch.with_suffix(".jsonl")
    targets = {module: TARGETS[module] for module in given.module or TARGETS}
    trees = {module: ast.parse((ROOT / module).read_text(encoding="utf-8")) for module in targets}
    ways = {module: [_changes(node) for node in places(tree)] for module, tree in trees.items()}
    every = [(module, at) for module, of_places in ways.items() for at in range(len(of_places))]
    draw = random.Random(given.seed)
    chosen = draw.sample(every, min(given.count, len(every)))
    hows = [draw.choice(ways[module][at]) for module, at in chosen]

    def work(noticed: Callable[..., tuple[bool, str]]) -> None:
        done, survived = _read(journal), 0
        again = {change for change, fails in done.items() if given.again and not fails}
        number = 0
        for (module, at), how in list(zip(chosen, hows, strict=True))[part - 1 :: parts]:
            tree, what = changed(trees[module], at, how)
            if given.again and (module, what) not in done:
                continue
            if (module, what) in again or (module, what) not in done:
                begun = time.monotonic()
                fails, by = noticed(module, trees[module], tree)
                row = {"module": module, "change": what, "noticed": fails, "by": by}
                with journal.open("a", encoding="utf-8") as file:
                    print(json.dumps(row | {"seconds": round(time.monotonic() - begun, 1)}), file=file)
                done[module, what] = fails
            number += 1
            if not done[module, what]:
                survived += 1
                print(f"{module}:{what}: nobody noticed", flush=True)
            print(f"{number - survived} of {number} noticed", file=sys.stderr, flush=True)
        print(f"{number - survived} of {number} noticed, of {len(every)} possible", flush=True)

    asked = mutated.Asked(mutated.MARKS + " and not slow" * given.quick, given.seconds)
    first = journal.with_suffix(".first" if given.quick else ".first-slow")
    mutated.tried(targets, WHOLE_RUNS, work, asked, (scratch, first))


def _read(journal: Path) -> dict[tuple[str, str], bool]:
    """Returns what the journal knows: by module and change, whether a test noticed."""
    if not journal.exists():
        return {}
    rows = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    return {(row["module"], row["change"]): row["noticed"] for row in rows}


if __name__ == "__main__":
    main()
