"""What PyTorch's profiler (Kineto) sees of an execution: the trace that `prestage timeline import` reads.

Profiling costs the host time at every call, so a profiled run shows how things follow each other, and is never one of
the runs whose times count.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import orjson

from ...files import replacing
from ...output.export import packing

#: Runs under the profiler before the one that is kept: its first use loads what it needs.
_WARM_UP = 1


def record_profile(run: Callable[[], object], path: Path) -> None:
    """Call `run` under torch.profiler, the CPU's and the GPU's activities, and write its trace (.json, .json.gz).

    The trace's own name is left out: it is a path on the machine that recorded it.
    """
    from torch import profiler

    with warnings.catch_warnings():
        # Some versions warn that only the last of several cycles is kept; there is one.
        warnings.filterwarnings("ignore", "(?s).*clears events at the end of each cycle", UserWarning)
        for _ in range(_WARM_UP + 1):
            with profiler.profile() as seen:
                run()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(raw))
        trace = orjson.loads(raw.read_bytes())
    trace.pop("traceName", None)
    with replacing(path) as file, packing(file, path) as stream:
        stream.write(orjson.dumps(trace))
