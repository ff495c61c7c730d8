"""Whether the machine code of the compiled engine is kept on this machine, so that a run need not wait for compiling.

Compiling takes some tens of seconds, once after installation. A mark beside the machine code says that it was done for
these very sources.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from ...machine_code import compiler_version, kept_in

_PACKAGE = Path(__file__).parents[2]
#: What machine code is made of.
_SOURCES = (
    "machine_code.py",
    "resources/timeline.py",
    "engine/policies/*.py",
    "engine/decide/*.py",
    "engine/timing/*.py",
)


def is_ready() -> bool:
    """Whether the compiled engine can run without compiling first: it has been loaded, or its machine code is kept."""
    mark = _mark()
    return f"{__package__}.deciding" in sys.modules or (mark is not None and mark.exists())


def note_ready() -> None:
    """Note that all machine code has been made; where nothing can be kept, nothing is."""
    mark = _mark()
    if mark is not None and not mark.exists():
        with suppress(OSError):
            mark.touch()


@cache
def _mark() -> Path | None:
    """Return the file that says it; None where machine code is not kept."""
    folder = kept_in(is_ready)
    if folder is None:
        return None
    sources = hashlib.sha256(compiler_version().encode())
    for pattern in _SOURCES:
        for path in sorted(_PACKAGE.glob(pattern)):
            sources.update(path.read_bytes())
    return folder / f"prestage-{sources.hexdigest()[:16]}.compiled"
