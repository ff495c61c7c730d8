"""Advice as it is printed: what to set, what it gains, what binds, what to buy next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from .layout import columns_of, plain_console, print_rows

#: What a verdict begins with.
VERDICTS = {
    "recommend": "Recommended",
    "keep": "Keep what is there",
    "measure": "No advice before a measurement",
    "none": "Nothing runs",
}
#: So many points of the front are printed.
_FRONT = 8


def print_advice(data: Mapping[str, Any]) -> None:
    """Print advice."""
    console = plain_console()
    console.print(Text(f"{VERDICTS[data['verdict']]}: {data['why']}", style="bold"))
    request = data["request"]
    lengths = f", {request['prompt']:,} tokens of prompt and {request['output']:,} of answer" if request else ""
    refused = f", {data['infeasible']} of them refused" if data["infeasible"] else ""
    console.print(f"{data['runtime']}: {data['trials']} of {data['space']:,} settings tried{refused}{lengths}")
    if data["verdict"] == "none":
        return
    if data["settings"]:
        print_rows(console, "Settings", ((key, str(value), "") for key, value in data["settings"].items()))
    if data["command"]:
        console.print(f"\n{data['command']}", soft_wrap=True)
    print_rows(console, "What it comes to", (_figure(data, name) for name in data["goals"]))
    print_rows(console, "What binds", ((what, f"{share:.0%}", "") for what, share in data["binds"].items()))
    bought = sorted(data["upgrades"].items(), key=lambda pair: -pair[1])
    print_rows(console, "What to buy next", ((what, f"{gain:.2f}x", "") for what, gain in bought))
    for each in data["deciding"]:
        row = f"{each['cost']} ({each['source']}): {each['least']:.2f} to {each['most']:.2f} times; {each['measure']}"
        console.print(f"decides: {row}", soft_wrap=True)
    if len(data["goals"]) > 1:
        _print_front(data)


def _figure(data: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    """Returns a goal, what it comes to, and how that compares."""
    said = f"{data['figures'][name]:.4g} {data['units'][name]}"
    if data["base"] is None:
        return name, said, f"as it stands: {data['base_refused']}"
    note = f"as it stands {data['base'][name]:.4g}"
    gain = data["gain"]
    if name == data["goals"][0] and gain is not None:
        note += f"; {gain['p50']:.2f} times as good ({gain['p5']:.2f} to {gain['p95']:.2f})"
    return name, said, note


def _print_front(data: Mapping[str, Any]) -> None:
    """Print the settings that no other beats in all goals."""
    console = plain_console()
    table = columns_of("settings", *data["goals"])
    for point in data["front"][:_FRONT]:
        words = ", ".join(f"{key}={value}" for key, value in point["settings"].items())
        table.add_row(words, *(f"{point['figures'][name]:.4g}" for name in data["goals"]))
    console.print(Text("\nNo other setting is better in all of these", style="bold"))
    console.print(table)
