"""A profile that extends another, as plain data: a JSON merge patch (RFC 7396) that tells apart what is whose.

Costs that a profile takes over from a profile of another device stay that device's: each carries its name. A cost that
the patch changes is the patch's: what was said of the old numbers goes with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

#: What a cost says of its numbers; all else in it are the numbers.
_SAID = frozenset({"source", "note", "samples", "uncertainty", "spread", "device"})
#: Forms of which a cost has one: a table, or a line.
_FORMS = (frozenset({"points"}), frozenset({"latency_ns", "bytes_per_second"}))
#: What a profile says of its own device alone.
_OWN = ("same_device_as",)


def extended(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """Returns the profile `base` with `patch` merged in; `base` itself may change.

    If the patch names another device, every cost that it leaves as it was carries the base's device.
    """
    device, same = base.get("device"), patch.get("same_device_as")
    if isinstance(device, str) and patch.get("device", device) != device:
        base = {key: value for key, value in base.items() if key not in _OWN}
        if not (isinstance(same, list) and device in same):
            base["source"] = f"costs of {device}, where nothing else is said"
            for cost in _costs(list(base.values())):
                cost.setdefault("device", device)
    merged: dict[str, Any] = _merged(base, patch, top=True)
    return merged


def own(data: dict[str, Any], devices: Collection[str]) -> dict[str, Any]:
    """Returns a profile whose costs that are of one of these devices do not name it."""
    parts = list(data.values())
    if not any(cost.get("device") in devices for cost in _costs(parts)):
        return data
    return {key: _without(value, devices) for key, value in data.items()}


def _costs(waiting: list[Any]) -> Iterator[dict[str, Any]]:
    """Yields every cost within some plain data, which is used up."""
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "source" in value:
                yield value
            waiting += [entry for entry in value.values() if isinstance(entry, dict | list | tuple)]
        elif isinstance(value, list | tuple):
            waiting += [entry for entry in value if isinstance(entry, dict | list | tuple)]


def _without(value: Any, devices: Collection[str]) -> Any:
    if isinstance(value, list | tuple):
        return [_without(entry, devices) for entry in value]
    if not isinstance(value, dict):
        return value
    ours = "source" in value and value.get("device") in devices
    return {key: _without(entry, devices) for key, entry in value.items() if not (ours and key == "device")}


def _merged(base: Any, patch: Any, *, top: bool = False) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged: dict[str, Any] = dict(base) if isinstance(base, dict) else {}
    if not top and "source" in merged:
        merged = _changed(merged, patch)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merged(merged.get(key), value)
    return merged


def _changed(cost: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """Returns what stays of a cost that a patch changes: not what was said of the old numbers, nor their other form."""
    numbers = patch.keys() - _SAID
    if not numbers and "source" not in patch:
        return cost
    if numbers:
        kept = {key: value for key, value in cost.items() if key not in _SAID} | {"source": "assumed"}
    else:  # the same numbers, which the patch says are of its own device
        kept = {key: value for key, value in cost.items() if key not in (_SAID if "device" in cost else ())}
    given = {key for key in numbers if patch[key] is not None}
    for form in _FORMS:
        if given & form:
            others = frozenset().union(*_FORMS) - form
            kept = {key: value for key, value in kept.items() if key not in others - given}
    return kept
