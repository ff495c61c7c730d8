"""A machine's parts as the keys of a section: beside one another, where a profile's name has them in one text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...words import shown
from .chosen import choose
from .tables import PartError
from .written import PARTS, is_of_parts, joined_parts, split_parts, times


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


def gpus_of(section: Mapping[str, Any]) -> int:
    """Returns how many GPUs the parts of a section are: 1 where it has none, or what cannot be read.

    What is wrong with it is told when the machine is made.
    """
    try:
        profile = of_parts(section).get("profile")
        parts = split_parts(profile) if isinstance(profile, str) and is_of_parts(profile) else {}
        return int(parts["gpus"]) if "gpus" in parts else times(parts.get("gpu", ""))[0]
    except ValueError:
        return 1


def serves_copies(profile: str, part: str) -> bool:
    """Returns whether a part that a profile's name tells has a say in what copies to a GPU, or all of it, reach."""
    chosen = choose(profile)
    if chosen.link is None:
        return True  # of one memory
    others = choose(joined_parts({key: value for key, value in split_parts(profile).items() if key != part}))
    return chosen.copies.bytes_per_second != others.copies.bytes_per_second
