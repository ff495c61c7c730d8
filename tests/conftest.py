"""What every test may ask for."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("prestage", derandomize=True, deadline=None)
settings.load_profile("prestage")

# What tests start keeps what it compiles, as with users: else each process would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

#: What a test is marked as, if it is slow by what it does: `pytest -m "not slow"` leaves it out.
SLOW_BY_NATURE = ("process", "browser", "docs", "gpu")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the engine, once, before workers that would each do it; collecting alone needs none."""
    if session.config.option.collectonly or hasattr(session.config, "workerinput"):
        return
    from prestage.engine.timing.ready import make_ready

    make_ready()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process a module after another, so that what a module prepares is prepared once."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what is slow by nature, before pytest chooses by marks."""
    for item in items:
        if any(item.get_closest_marker(mark) for mark in SLOW_BY_NATURE):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def default_run() -> Any:
    """Scenario guide's Result, without its baselines."""
    from prestage.engine.scenario.scenario import load_scenario
    from prestage.engine.simulate import simulate

    return simulate(load_scenario("guide"), baselines=False)


@pytest.fixture(scope="session")
def traces() -> Path:
    """The folder of real routing traces; a test that needs them skips where there are none."""
    folder = os.environ.get("PRESTAGE_TRACES")
    if not folder:
        pytest.skip("PRESTAGE_TRACES names no folder of real routing traces")
    return Path(folder)
