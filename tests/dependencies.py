"""What is installed with Prestage, by extra, and under which licence: the table of docs/dependencies.md.

    python tests/readme_tables.py dependencies --write

Licences are what the installed packages say themselves; a package that is not installed keeps the line it has.
"""

from __future__ import annotations

import configparser
import re
from email.message import Message
from importlib import metadata
from pathlib import Path

from prestage.output.markdown import table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "dependencies.md"
#: Extras of users, and those with which the project is tested and its site built.
EXTRAS = ("advise", "cluster", "docs", "machine", "notebook", "parquet", "record")
FOR_TESTS = ("test", "timeline-test")
#: Packages that are imported under another name.
_IMPORTED = {"py-cpuinfo": "cpuinfo"}


def required() -> list[tuple[str, str]]:
    """Returns (package, extra) of setup.cfg in order; extra "" is what every run needs."""
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg", encoding="utf-8")
    groups = {"": parsed["options"]["install_requires"], **parsed["options.extras_require"]}
    return [
        (_name(line), extra)
        for extra, lines in groups.items()
        for line in lines.splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]


def _name(requirement: str) -> str:
    found = re.match(r"\s*([\w.-]+)", requirement)
    assert found is not None, requirement
    return found[1]


def imports_of_extras() -> list[str]:
    """Returns the modules of packages that only an extra brings."""
    core = {name for name, extra in required() if not extra}
    return sorted({_IMPORTED.get(name, name) for name, extra in required() if extra in EXTRAS and name not in core})


def installed(name: str) -> bool:
    """Returns whether a package is installed."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def licence(about: Message) -> str:
    """Returns a package's licence as it says it: an SPDX expression, its classifiers, or its first line."""
    if about.get("License-Expression"):
        return str(about["License-Expression"])
    classified = [line.split(" :: ")[-1] for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    said = [one for one in classified if one not in ("OSI Approved", "DFSG approved")]
    return " or ".join(said) or str(about.get("License", "")).strip().splitlines()[0]


def dependencies_table() -> str:
    """Every package, the extras that bring it, and its licence."""
    extras: dict[str, list[str]] = {}
    for name, extra in required():
        extras.setdefault(name, []).append(f"`{extra}`" if extra else "every installation")
    rows = [[f"`{name}`", ", ".join(brought), _licence_of(name)] for name, brought in extras.items()]
    return table(["package", "comes with", "licence"], rows)


def _licence_of(name: str) -> str:
    """Returns a package's licence, or what the page says where it is not installed."""
    if installed(name):
        return licence(metadata.metadata(name))  # type: ignore[arg-type]
    said = re.search(rf"^\| `{re.escape(name)}` \|.*\| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return said[1] if said else "?"
