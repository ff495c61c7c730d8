"""Whether the compiled engine's machine code is cached on this machine, so that a run need not wait for compiling.

Compiling takes some tens of seconds, once after installation. A mark beside the machine code says that it was done for
these very sources.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ...machine_code import kept_in, sources_digest

#: What `make_ready` calls itself.
COMPILING = "compile the engine, once after installation"
#: Called with what is going on, and how much of how much is done.
Progress = Callable[[str, int, int], None]


def is_ready() -> bool:
    """Whether the compiled engine can run without compiling first: it has been loaded, or its machine code is kept."""
    mark = _mark()
    return f"{__package__}.deciding" in sys.modules or (mark is not None and mark.exists())


def make_ready(progress: Progress | None = None) -> None:
    """Make all machine code of the compiled engine where it is not kept yet; `progress` is told of it."""
    if is_ready():
        return
    if progress is not None:
        progress(COMPILING, 0, 1)
    # These compile when they are imported first.
    with _imported_beside(f"{__package__}.compiled_clock"):
        from ..decide import compiled_lru, compiled_misses, compiled_shared  # noqa: F401
    from . import deciding  # noqa: F401

    note_ready()
    if progress is not None:
        progress(COMPILING, 1, 1)


@contextmanager
def _imported_beside(module: str) -> Iterator[None]:
    """Import a module in another process meanwhile, for the machine code that it keeps; where it cannot, do nothing."""
    if _mark() is None or not sys.executable:
        yield
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"import {module}"]
    none = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdin=none, stdout=none, stderr=none) as process:
        try:
            yield
        except BaseException:
            process.kill()
            raise


def note_ready() -> None:
    """Note that all machine code has been made; where nothing can be kept, nothing is."""
    mark = _mark()
    if mark is not None and not mark.exists():
        with suppress(OSError):
            mark.touch()


@cache
def _mark() -> Path | None:
    """Returns the file that says it; None where machine code is not kept."""
    folder = kept_in(is_ready)
    if folder is None:
        return None
    return folder / f"prestage-{sources_digest()}.compiled"
