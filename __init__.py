"""Prestage: a calibrated discrete-event simulator of Mixture-of-Experts inference with expert offloading.

What a notebook imports: `simulate(load_scenario(...))`, and what goes in and comes out of it. Names are loaded when
they are first used, so that `import prestage` is quick; `__init__.pyi` beside it names the same for editors.
"""

from difflib import get_close_matches
from importlib import import_module
from typing import Any

_HOME = {
    "Advised": "experiments.advice_result",
    "Comparison": "notebook.runs",
    "InferenceConfig": "guide.inference",
    "InferenceSimulator": "guide.inference",
    "Model": "workloads.model",
    "Result": "notebook.runs",
    "RoutingTrace": "workloads.trace",
    "Scenario": "engine.scenario.scenario",
    "VirtualMemoryManager": "guide.virtual_memory",
    "advise": "experiments.advise",
    "bench": "experiments.bench",
    "break_even": "experiments.breakeven",
    "compare": "notebook.runs",
    "load_model": "workloads.model",
    "load_plugin": "plugins",
    "load_profile": "resources.profile",
    "load_result": "output.saved",
    "load_scenario": "engine.scenario.scenario",
    "load_timeline": "output.profiler_trace",
    "make_scenario": "engine.scenario.scenario",
    "miss_ratio_curves": "engine.replay.miss_ratio",
    "names": "notebook.lists",
    "open_trace": "workloads.importers",
    "plot_miss_ratios": "output.plots",
    "read_rows": "engine.scenario.rows",
    "record": "workloads.recorder",
    "replay_trace": "engine.replay.replay",
    "run_of": "output.saved",
    "scenario_keys": "engine.scenario.scenario",
    "scenario_names": "engine.scenario.scenario",
    "scenario_of": "notebook.settings",
    "simulate": "notebook.runs",
    "sweep": "notebook.runs",
    "synthesize": "workloads.synthetic",
    "timeline_summary": "output.summary",
    "write_report": "output.report",
}
#: What commands are called here, where that is another name.
_COMMANDS = {"mrc": "miss_ratio_curves", "replay": "replay_trace", "run": "simulate", "report": "write_report"}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("prestage")
    if name not in _HOME:
        near = _COMMANDS.get(name) or next(iter(get_close_matches(name, _HOME, 1)), None)
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}" + (f"; did you mean {near!r}?" if near else "")
        )
    import_module(".plugins", __name__).load_asked()
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
