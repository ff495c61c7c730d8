"""Functions compiled by Numba: their machine code is cached where there is a place for it, else compiled again.

Numba keeps it beside the sources, or in the user's cache folder (or NUMBA_CACHE_DIR); a function that has neither, as
with an installation that cannot be written and no home, would stop the import. Here it then is kept in a folder of the
user's own among temporary files, or nowhere. Whatever is wrong with what was kept, it is compiled again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numba
from numba.cpython.unsafe import numbers

from . import machine_library
from .collector import collector_off
from .machine_words import REALS, TABLE, UNCOMPILED, WORDS


def _trailing_zeros(word: Any) -> int:
    return (int(word) & -int(word)).bit_length() - 1


#: How many of the lowest bits of a word are 0, before the first that is not.
trailing_zeros: Any = _trailing_zeros if UNCOMPILED else numbers.trailing_zeros

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, **options: Any) -> Function:
    """Returns the function compiled, with these of Numba's options; itself where `NUMBA_DISABLE_JIT` says so."""
    if UNCOMPILED:
        return function
    try:
        fast: Any = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no place to keep it
        try:
            with _kept_in(_temporary_folder()):
                fast = numba.njit(cache=True, **options)(function)
        except (OSError, RuntimeError):
            fast = numba.njit(**options)(function)
    _forgive(fast)
    _know_constants(fast)
    return fast  # type: ignore[no-any-return]


def within(function: Function, **options: Any) -> Function:
    """Returns a function for compiled code alone to call, in whose machine code it then is: nothing else keeps it."""
    options |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return machine_library.within(numba.njit(**options)(function))  # type: ignore[no-any-return]


#: What Numba is told by the annotations of parameters: a word, a float, addresses of words, of floats and of a table.
#: A function of Python's own that compiled code calls, too, says int.
_TYPES = {
    "int": numba.int64,
    "Word": numba.int64,
    "Real": numba.float64,
    "Words": WORDS,
    "Reals": REALS,
    "Table": TABLE,
}


def compiled_once(
    function: Function, types: Mapping[str, Any] = MappingProxyType({}), *, entry: bool = False, **options: Any
) -> Function:
    """Returns the function compiled for the types that its annotations name, and for no others.

    Annotations are of the names in `_TYPES`, or among `types`. Left to itself, Numba makes one version after another:
    of literals, of views, of flags. An `entry`, which Python calls, is compiled now, or loaded.
    Any other is called from compiled code alone: it is compiled when an entry that calls it is, is kept within that
    one's machine code, and costs no time where that was kept.
    """
    if UNCOMPILED:
        return function
    known = {**_TYPES, **types}
    signature = tuple(known[given] for name, given in function.__annotations__.items() if name != "return")
    if entry:
        fast: Any = machine_library.entry(compiled(function, **options))
        with collector_off():
            fast.compile(signature)
        fast.disable_compile()
        return fast  # type: ignore[no-any-return]
    inner: Any = within(function, **options)
    find_template = inner.get_call_template

    def compile_and_find(*given: Any) -> Any:
        if not inner.overloads:
            inner.compile(signature)
            inner.disable_compile()
        return find_template(*given)

    inner.get_call_template = compile_and_find
    return inner  # type: ignore[no-any-return]


#: What machine code is made of.
_SOURCES = (
    "machine_*.py",
    "resources/timeline.py",
    "engine/costs/values.py",
    "engine/policies/*.py",
    "engine/decide/*.py",
    "engine/replay/*.py",
    "engine/timing/*.py",
)


@cache
def sources_digest() -> str:
    """Returns what tells apart the versions of all that machine code is made of: 16 hexadecimal digits."""
    digest = hashlib.sha256(str(numba.__version__).encode())
    for pattern in _SOURCES:
        for path in sorted(Path(__file__).parent.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _know_constants(fast: Any) -> None:
    """Let machine code that was kept be old when any source is another, not only the function's own.

    A constant of another module is within the machine code, and Numba does not look there.
    """
    kept = getattr(getattr(fast, "_cache", None), "_cache_file", None)
    if kept is not None and hasattr(kept, "_source_stamp"):
        kept._source_stamp = (kept._source_stamp, sources_digest())


def kept_in(function: Callable[..., Any]) -> Path | None:
    """Returns the folder in which the machine code of a function would be kept; None if it would be nowhere."""
    path = getattr(getattr(compiled(function), "_cache", None), "cache_path", None)
    return None if path is None else Path(path)


def _temporary_folder() -> Path:
    """Returns a folder that is this user's alone, for what is in it will be run. Raises OSError."""
    folder = Path(tempfile.gettempdir()) / f"prestage-numba-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    mine = not hasattr(os, "getuid") or (about.st_uid == os.getuid() and not about.st_mode & 0o022)
    if not mine or not stat.S_ISDIR(about.st_mode):
        raise PermissionError(f"{folder}: is not this user's alone")
    return folder


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Let Numba keep functions, which it is told of meanwhile, in a folder."""
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = before


def _forgive(fast: Any) -> None:
    """Let a cache that cannot be read or written, as on a full disk, be none."""
    cache = getattr(fast, "_cache", None)
    if cache is None or not hasattr(cache, "save_overload"):
        return
    load, save = cache.load_overload, cache.save_overload

    def load_if_possible(*key: Any) -> Any:
        try:
            return load(*key)
        except Exception:  # files that are cut off or another's raise whatever unpickling does
            return None

    def save_if_possible(*entry: Any) -> None:
        with suppress(Exception):
            save(*entry)

    cache.load_overload, cache.save_overload = load_if_possible, save_if_possible
