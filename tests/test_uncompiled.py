"""Compiled code as plain Python, where every index is checked: `NUMBA_DISABLE_JIT=1`, for debuggers and coverage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
#: A drive read in many requests, pipelines, GPUs that share experts, contention; decisions; curves of misses.
CHOSEN = (
    "test_engines.py::test_random_scenarios_of_all_sections_end_alike[40]",
    "test_composition.py::test_an_expert_read_in_a_hundred_requests_finds_room_for_all_that_waits_for_them",
    "test_compiled_misses.py::test_misses_are_those_of_the_memory_manager[waves]",
    "test_compiled_lru.py::test_one_walk_misses_what_the_memory_manager_does[0-3-per-layer]",
    "test_miss_ratio.py::test_given_capacities_are_those_of_the_replay_in_layers_of_several_sizes",
)


@pytest.mark.slow
@pytest.mark.process
def test_what_is_compiled_runs_as_python_too() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    found = subprocess.run(
        [*command, *(str(TESTS / one) for one in CHOSEN)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stdout[-3000:]
