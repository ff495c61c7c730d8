"""Prestage: a calibrated discrete-event simulator of Mixture-of-Experts inference with expert offloading.

What a notebook imports: `simulate(load_scenario(...))`, and what goes in and comes out of it. Names are loaded when
they are first used, so that `import prestage` is quick.
"""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.replay.miss_ratio import miss_ratio_curves as miss_ratio_curves
    from .engine.replay.replay import replay_trace as replay_trace
    from .engine.scenario.rows import read_rows as read_rows
    from .engine.scenario.scenario import Scenario as Scenario
    from .engine.scenario.scenario import load_scenario as load_scenario
    from .engine.scenario.scenario import make_scenario as make_scenario
    from .engine.scenario.scenario import scenario_names as scenario_names
    from .experiments.advice_result import Advised as Advised
    from .experiments.advise import advise as advise
    from .experiments.bench import bench as bench
    from .experiments.breakeven import break_even as break_even
    from .experiments.sweep import sweep as sweep
    from .guide.inference import InferenceConfig as InferenceConfig
    from .guide.inference import InferenceSimulator as InferenceSimulator
    from .guide.virtual_memory import VirtualMemoryManager as VirtualMemoryManager
    from .notebook.lists import names as names
    from .notebook.runs import Comparison as Comparison
    from .notebook.runs import Result as Result
    from .notebook.runs import compare as compare
    from .notebook.runs import simulate as simulate
    from .notebook.settings import scenario_keys as scenario_keys
    from .notebook.settings import scenario_of as scenario_of
    from .output.plots import plot_miss_ratios as plot_miss_ratios
    from .output.profiler_trace import load_timeline as load_timeline
    from .output.report import write_report as write_report
    from .output.saved import load_result as load_result
    from .output.saved import run_of as run_of
    from .output.summary import timeline_summary as timeline_summary
    from .plugins import load_plugin as load_plugin
    from .resources.profile import load_profile as load_profile
    from .workloads.importers import open_trace as open_trace
    from .workloads.model import Model as Model
    from .workloads.model import load_model as load_model
    from .workloads.recorder import record as record
    from .workloads.synthetic import synthesize as synthesize
    from .workloads.trace import RoutingTrace as RoutingTrace

_HOME = {
    "load_plugin": "plugins",
    "Comparison": "notebook.runs",
    "miss_ratio_curves": "engine.replay.miss_ratio",
    "plot_miss_ratios": "output.plots",
    "scenario_keys": "notebook.settings",
    "scenario_names": "engine.scenario.scenario",
    "scenario_of": "notebook.settings",
    "Advised": "experiments.advice_result",
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
    "load_profile": "resources.profile",
    "load_result": "output.saved",
    "load_scenario": "engine.scenario.scenario",
    "load_timeline": "output.profiler_trace",
    "make_scenario": "engine.scenario.scenario",
    "names": "notebook.lists",
    "open_trace": "workloads.importers",
    "read_rows": "engine.scenario.rows",
    "record": "workloads.recorder",
    "replay_trace": "engine.replay.replay",
    "run_of": "output.saved",
    "simulate": "notebook.runs",
    "sweep": "experiments.sweep",
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
