"""What several GPUs of one machine add to the profile of one: their links, and what is between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...files import write_file
from ...resources.extending import extended
from ...resources.profile import Profile, load_profile, make_profile
from ..measure.samples import Samples

#: The parts of a profile that are of several GPUs alone, and of other parts the costs that are.
_WHOLE = ("peer", "topology")
_COSTS = {
    "compute": ("peer_wait_gap",),
    "host": ("peer_enqueue", "turn"),
    "contention": ("copy_beside_all_gpus", "compute_beside_peer", "peer_beside_copy"),
}


def links_of(fitted: Profile, samples: Samples, base: str) -> dict[str, Any]:
    """Returns a profile that extends `base`, that of one such GPU, with what was fitted of several; as plain data."""
    plain = fitted.model_dump(mode="json", exclude_none=True)
    parts = {part: plain[part] for part in _WHOLE if part in plain}
    for part, names in _COSTS.items():
        if costs := {name: plain[part][name] for name in names if name in plain.get(part, {})}:
            parts[part] = costs
    return {
        "extends": base,
        "name": fitted.name,
        "device": f"{samples.gpus} x {samples.device}",
        "same_device_as": [samples.device],
        "driver": samples.driver,
        "date": samples.date,
        "versions": samples.versions,
        "source": f"the costs of {base}; of several GPUs of one host, measured together on {samples.date}: links, "
        "copies and waits between them, and what the host takes for both (calibrate measure --links, execute, fit)",
        **parts,
    }


def write_links(data: dict[str, Any], path: Path) -> None:
    """Write such a profile as JSON, once it is seen to be one; ProfileError if not."""
    known = load_profile(data["extends"]).model_dump(exclude_none=True)
    make_profile(extended(known, {key: value for key, value in data.items() if key != "extends"}), str(path))
    write_file(path, json.dumps(data, indent=1).encode() + b"\n")
