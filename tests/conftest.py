"""What every test may ask for."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("prestage", derandomize=True, deadline=None)
settings.load_profile("prestage")


@pytest.fixture(scope="session")
def default_run() -> Any:
    """The default scenario's Result, without its baselines."""
    from prestage.engine.scenario import load_scenario
    from prestage.engine.simulate import simulate

    return simulate(load_scenario(), baselines=False)


@pytest.fixture(scope="session")
def traces() -> Path:
    """The folder of real routing traces; a test that needs them skips where there are none."""
    folder = os.environ.get("PRESTAGE_TRACES")
    if not folder:
        pytest.skip("PRESTAGE_TRACES names no folder of real routing traces")
    return Path(folder)
