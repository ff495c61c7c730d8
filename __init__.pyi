"""What editors and type checkers read of `import prestage`: the names that `__init__.py` loads when they are used."""

from .engine.replay.miss_ratio import miss_ratio_curves as miss_ratio_curves
from .engine.replay.replay import replay_trace as replay_trace
from .engine.scenario.rows import read_rows as read_rows
from .engine.scenario.scenario import Scenario as Scenario
from .engine.scenario.scenario import load_scenario as load_scenario
from .engine.scenario.scenario import make_scenario as make_scenario
from .engine.scenario.scenario import scenario_keys as scenario_keys
from .engine.scenario.scenario import scenario_names as scenario_names
from .experiments.advice_result import Advised as Advised
from .experiments.advise import advise as advise
from .experiments.bench import bench as bench
from .experiments.breakeven import break_even as break_even
from .guide.inference import InferenceConfig as InferenceConfig
from .guide.inference import InferenceSimulator as InferenceSimulator
from .guide.virtual_memory import VirtualMemoryManager as VirtualMemoryManager
from .notebook.lists import names as names
from .notebook.runs import Comparison as Comparison
from .notebook.runs import Result as Result
from .notebook.runs import compare as compare
from .notebook.runs import simulate as simulate
from .notebook.runs import sweep as sweep
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

__all__ = [
    "Advised",
    "Comparison",
    "InferenceConfig",
    "InferenceSimulator",
    "Model",
    "Result",
    "RoutingTrace",
    "Scenario",
    "VirtualMemoryManager",
    "__version__",
    "advise",
    "bench",
    "break_even",
    "compare",
    "load_model",
    "load_plugin",
    "load_profile",
    "load_result",
    "load_scenario",
    "load_timeline",
    "make_scenario",
    "miss_ratio_curves",
    "names",
    "open_trace",
    "plot_miss_ratios",
    "read_rows",
    "record",
    "replay_trace",
    "run_of",
    "scenario_keys",
    "scenario_names",
    "scenario_of",
    "simulate",
    "sweep",
    "synthesize",
    "timeline_summary",
    "write_report",
]
__version__: str
