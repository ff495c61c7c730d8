"""What `import prestage` gives: every name is listed, described and typed, says its units and what it raises."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import prestage

NAMES = [name for name in prestage.__all__ if not name.startswith("__")]
#: What numbers are of: a unit stands in the name of each, or in the words that describe it.
_UNITS = re.compile(
    r"bytes|tokens|experts|_ms|_ns|_us|_s$|ms\b|ns\b|share|count|number|layers|seed|GiB|MiB|0 to 1|%|k\b"
)
#: Functions that only look things up in memory, and refuse nothing.
_NEVER_RAISE = {"plot_miss_ratios", "run_of", "scenario_keys", "scenario_names", "timeline_summary"}


def members(name: str) -> Iterator[tuple[str, Any]]:
    """A public name, and the public methods and properties of a class."""
    found = getattr(prestage, name)
    yield name, found
    if inspect.isclass(found):
        for key, member in inspect.getmembers(found):
            own = getattr(member, "__module__", getattr(getattr(member, "fget", None), "__module__", ""))
            if not key.startswith("_") and (own or "").startswith("prestage"):
                yield f"{name}.{key}", member


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_says_what_it_is(name: str) -> None:
    for whole, member in members(name):
        if inspect.isroutine(member) or inspect.isclass(member) or isinstance(member, property):
            assert len((inspect.getdoc(member) or "").split()) >= 4, whole


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isfunction(getattr(prestage, name))])
def test_every_function_has_types_and_says_what_it_raises(name: str) -> None:
    function = getattr(prestage, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(each.annotation is not inspect.Parameter.empty for each in signature.parameters.values())
    said = inspect.getdoc(function) or ""
    assert re.search(r"[Rr]aises|Error", said) or name in _NEVER_RAISE


@pytest.mark.parametrize("name", [name for name in NAMES if dataclasses.is_dataclass(getattr(prestage, name))])
def test_numbers_of_what_is_handed_out_have_units(name: str) -> None:
    kind = getattr(prestage, name)
    said = inspect.getdoc(kind) or ""
    for field in dataclasses.fields(kind):
        if str(field.type) in ("int", "float", "int | None", "float | None"):
            assert _UNITS.search(field.name) or re.search(rf"`{field.name}`|\b{field.name}\b", said), (name, field.name)


def test_tab_shows_the_names_and_nothing_else() -> None:
    assert dir(prestage) == prestage.__all__ == sorted(prestage.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", prestage.__version__)


@pytest.mark.parametrize(
    ("name", "near"), [("simulat", "simulate"), ("mrc", "miss_ratio_curves"), ("replay", "replay_trace")]
)
def test_a_wrong_name_says_the_right_one(name: str, near: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute {name!r}; did you mean {near!r}"):
        getattr(prestage, name)
