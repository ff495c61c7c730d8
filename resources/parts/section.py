"""A machine's parts as the keys of a section: beside one another, where a profile's name has them in one text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...words import shown
from .tables import PartError
from .written import PARTS, is_of_parts, joined_parts, split_parts


def of_parts(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a section whose parts, if it has some, are in its `profile`: the name of the machine of these parts.

    Raises PartError if it names a profile too, or parts without a GPU. Values of other types stay, to be refused.
    """
    parts = {key: section[key] for key in PARTS if section.get(key) is not None}
    if not parts or any(type(value) not in ((int,) if key == "gpus" else (str, int)) for key, value in parts.items()):
        return dict(section)
    if section.get("profile") is not None:
        raise PartError(f"profile = {shown(section['profile'])} and {', '.join(parts)}: give a profile, or parts")
    if "gpu" not in parts:
        raise PartError(f"{', '.join(parts)}: name the gpu too, such as rtx4090")
    rest = {key: value for key, value in section.items() if key not in PARTS}
    return {**rest, "profile": joined_parts({key: str(value) for key, value in parts.items()})}


def lay_machine(section: dict[str, Any], key: str, *, out: bool = False) -> None:
    """Make room in a section, as plain data, for a key: a part takes the place of a profile, a profile that of parts.

    Where the profile's name tells parts, the others stay. A part that is to be taken `out` leaves another profile.
    """
    name = section.get("profile")
    told: dict[str, Any] = dict(split_parts(name)) if isinstance(name, str) and is_of_parts(name) else {}
    if told.get("gpus", "").isdecimal():
        told["gpus"] = int(told["gpus"])
    if key == "profile":
        for part in PARTS:
            section.pop(part, None)
    elif key in PARTS and (told or not out):
        section.pop("profile", None)
        section.update({**told, **section})
