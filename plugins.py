"""Plug-ins: Python from outside the package that adds rows to its tables: policies, predictors, copy orders, importers.

A plug-in is a file or a module that, when it is loaded, adds itself (`EVICTION["mine"] = Mine`). It is loaded by
`load_plugin`, by `--plugin`, by the environment variable PRESTAGE_PLUGINS (names with the system's path separator
between), or as an entry point of the group `prestage.plugins` of an installed package; never because a scenario, a row
or another file of data names it, since loading runs its code. Workers of a sweep load what the process that asks them
has loaded.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

from .errors import InputError

#: The group of entry points, and the variable of the environment.
GROUP, VARIABLE = "prestage.plugins", "PRESTAGE_PLUGINS"


class Plugin(NamedTuple):
    """A plug-in that is loaded: its file or module, and the SHA-256 of its source."""

    name: str
    sha256: str


_loaded: dict[str, Plugin] = {}
_asked: set[str] = set()


def load_plugin(name: str | Path) -> Plugin:
    """Load a plug-in: a Python file, or a module by its dotted name; a file that has changed is loaded anew.

    Raises InputError, with the line of the plug-in, if it cannot be loaded.
    """
    name = str(name)
    path = Path(name)
    if path.suffix == ".py":
        return _load_file(name, path)
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise InputError(f"plugin {name!r}: neither a Python file (…/mine.py) nor a module that can be imported")
    if name not in _loaded:
        _run(name, lambda: importlib.import_module(name))
        source = Path(found.origin) if found.origin else None
        _loaded[name] = Plugin(name, _digest(source.read_bytes() if source and source.is_file() else b""))
    return _loaded[name]


def load_asked() -> None:
    """Load the entry points of installed packages, and what the environment names; each once."""
    named = [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    for name in [*_installed(), *named]:
        if name not in _asked:
            _asked.add(name)
            load_plugin(name)


@cache
def _installed() -> tuple[str, ...]:
    """Returns the modules that installed packages name: looked up once, for that reads the metadata of them all."""
    return tuple(point.value.partition(":")[0] for point in entry_points(group=GROUP))


def loaded() -> tuple[Plugin, ...]:
    """Returns the plug-ins that are loaded, in the order of loading."""
    return tuple(_loaded.values())


def whose_fault() -> str:
    """Returns what an error that nobody foresaw is called: a fault of what was added, where something was, or ours."""
    if not _loaded:
        return "a fault of Prestage, not of what it was given; please report it"
    return f"a fault of {' or '.join(_loaded)}, or of Prestage; `prestage.testing.check` tries what was added"


def load_same(plugins: Iterable[Plugin]) -> None:
    """Load what another process has loaded. Raises InputError where a plug-in is not there, or is another here."""
    for plugin in plugins:
        if load_plugin(plugin.name) != plugin:
            raise InputError(f"plugin {plugin.name!r}: this worker finds another file there than the one that began")


def digest() -> str | None:
    """Returns what identifies the plug-ins that are loaded; None without any."""
    return _digest("".join(sorted(plugin.sha256 for plugin in loaded())).encode()) if _loaded else None


def _load_file(name: str, path: Path) -> Plugin:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise InputError(f"plugin {name!r}: cannot be read: {error.strerror}") from None
    plugin = Plugin(str(path.resolve()), _digest(source))
    if _loaded.get(plugin.name) == plugin:
        return plugin
    module_name = f"prestage_plugin_{path.stem}_{_digest(plugin.name.encode())[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"plugin {name!r}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickles look their module up
    try:
        _run(name, lambda: exec(compile(source, plugin.name, "exec"), module.__dict__))
    except InputError:
        del sys.modules[module_name]
        raise
    _loaded[plugin.name] = plugin
    return plugin


def _run(name: str, how: Callable[[], object]) -> None:
    """Run a plug-in's code. Raises InputError for whatever it raises, with where."""
    try:
        how()
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)
        own = [place for place in places if Path(place.filename).resolve() == Path(name).resolve()]
        place = [*places, *own][-1]  # where it is the file's own, and not that of a library that it calls
        line = getattr(error, "lineno", None) or place.lineno
        file = getattr(error, "filename", None) or place.filename
        raise InputError(f"plugin {name!r}: {file}, line {line}: {_told(error)}") from None


def _told(error: Exception) -> str:
    """Returns an error in words: of a row that is refused, what is wrong with each of its values."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    found = ((".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")) for each in error.errors())
    return f"{error.title}: {'; '.join(': '.join(filter(None, each)) for each in found)}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
