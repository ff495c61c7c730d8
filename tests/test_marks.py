"""Marks: a test that starts processes or a browser says so, so that `pytest -m "not slow"` starts none."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

#: A mark, and the names that nothing without it may come to: of modules, functions and methods.
WHATS_MARKED = {"process": {"subprocess", "posix_spawn"}, "browser": {"browsing"}}
FILES = sorted(Path(__file__).parent.glob("test_*.py"))


def names_in(node: ast.AST) -> set[str]:
    """Returns every name that is used within a node: of variables, parameters (fixtures) and attributes."""
    names: set[str] = set()
    for part in ast.walk(node):
        match part:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                names.add(name)
    return names


def those_that_come_to(names: set[str], module: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yields the tests that use these names, by themselves or through what the module defines."""
    defined = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    uses = {name: names_in(node) for name, node in defined.items()}
    reached: set[str] = set()
    more = names
    while more:
        more = {name for name in uses if name not in reached and uses[name] & (names | reached)}
        reached |= more
    for name in reached:
        node = defined[name]
        if isinstance(node, ast.FunctionDef) and name.startswith("test_"):
            yield node


def marks_of(test: ast.FunctionDef, module: ast.Module) -> set[str]:
    """Returns the names in a test's decorators, and in the marks of its module."""
    of_all = [node.value for node in module.body if isinstance(node, ast.Assign) and "pytestmark" in names_in(node)]
    return set().union(*(names_in(node) for node in (*test.decorator_list, *of_all)))


@pytest.mark.parametrize("mark", WHATS_MARKED)
def test_what_starts_processes_or_a_browser_is_marked(mark: str) -> None:
    found = 0
    for file in FILES:
        module = ast.parse(file.read_text(encoding="utf-8"))
        for test in those_that_come_to(WHATS_MARKED[mark], module):
            found += 1
            assert mark in marks_of(test, module), f"{file.name}: {test.name} needs @pytest.mark.{mark}"
    assert found > 5


def test_what_is_marked_by_what_it_does_is_slow(request: pytest.FixtureRequest) -> None:
    by_nature = {"process", "browser", "docs", "gpu"}
    for item in request.session.items:
        marks = {mark.name for mark in item.iter_markers()}
        assert "slow" in marks or not marks & by_nature, item.nodeid
