"""A machine from parts as a file: a profile of its own, in which every cost stands and can be changed."""

from __future__ import annotations

import json
from pathlib import Path

from ...files import write_file
from ..profile import make_profile
from .assemble import assembled


def write_profile(machine: str, name: str, path: Path) -> None:
    """Write the profile of a machine that a name tells the parts of, under another name. Raises PartError, OSError."""
    data = {**assembled(machine), "name": name}
    make_profile(data, f"machine {machine}")
    write_file(path, json.dumps(data, indent=1, ensure_ascii=False).encode() + b"\n")
