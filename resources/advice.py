"""What of a runtime can be set, as data: the keys that advice searches, their values, and how the runtime writes them.

A part of a runtime's file. Values are listed, or counted by what they depend on: the model's layers, the processor's
cores. Where a value is written otherwise than by its key, `option` says how: the runtime's own command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from pydantic import model_validator

from ..errors import InputError
from .facts import Part

Value = str | int | float | bool


class Tunable(Part):
    """One key that advice may set.

    `values` are listed in order, or counted: "layers" 0 to all of the model's, "threads" one to all cores, doubling,
    and three quarters of them, "top_k" 1 to twice the experts of a token. `option` is what the command line says, with
    {value}; of a value in percent there are {share}, of 1, and {per_layer}, so many experts of a layer. `written` goes
    before it, by value. `also` are keys that go with a value, with {room}: the experts of all other layers, and of one
    more, which is what a large batch is copied to. Values that are not `ordered` have no neighbors. It is not searched
    beside a value of `unless`, by key, which leaves it nothing to do.
    """

    values: tuple[Value, ...] | Literal["layers", "threads", "top_k"]
    option: str = ""
    written: dict[str, str] = {}
    also: dict[str, str] = {}
    ordered: bool = True
    unless: dict[str, Value] = {}

    @model_validator(mode="after")
    def _option_reads(self) -> Tunable:
        try:
            self.option.format(value=1, share=1.0, per_layer=1)
        except (LookupError, ValueError):
            raise InputError(f"option = {self.option!r}: write {{value}}, {{share}} or {{per_layer}}") from None
        if isinstance(self.values, tuple) and len(self.values) < 2:
            raise InputError("values: give two at least: one is no choice")
        return self

    def choices(self, *, layers: int, cores: int | None, top_k: int) -> list[Value]:
        """Returns the values for a model and a machine; none where the machine does not say its cores."""
        if isinstance(self.values, tuple):
            return list(self.values)
        if self.values == "layers":
            return list(range(layers + 1))
        if self.values == "top_k":
            return list(range(1, 2 * top_k + 1))
        return [] if cores is None else list(thread_counts(cores))

    def goes_with(self, value: Any, *, layers: int, experts: int) -> dict[str, str]:
        """Returns what else a value sets, by key."""
        if not self.also or not isinstance(value, int):
            return {}
        room = (layers - value + 1) * experts if value else layers * experts
        return {key: text.format(room=room) for key, text in self.also.items()}

    def words(self, value: Value | None, experts: int) -> str:
        """Returns what the command line says of a value; nothing where it says nothing."""
        text = self.written.get(str(value).lower() if isinstance(value, bool) else str(value))
        if text is None:
            text = self.option
        if value is None or not text:
            return ""
        share = Fraction(value[:-1]) / 100 if isinstance(value, str) and value.endswith("%") else Fraction(0)
        return text.format(value=value, share=f"{float(share):g}", per_layer=int(share * experts))


class Advice(Part):
    """What advice on a runtime goes by: its command, the keys that it begins with, and what may be set (by key)."""

    command: str = ""
    start: dict[str, Value] = {}
    settings: dict[str, Tunable] = {}

    def command_line(self, settings: dict[str, Any], experts: int) -> str:
        """Returns the command with some settings (by key); what it has no word for is not in it."""
        words = [self.command]
        for key, tunable in self.settings.items():
            if key in settings:
                words.append(tunable.words(settings[key], experts))
        return " ".join(word for word in words if word)


def thread_counts(cores: int) -> Sequence[int]:
    """Returns 1, 2, 4, … to all cores, and three quarters of them."""
    doubled = [2**power for power in range(cores.bit_length()) if 2**power < cores]
    return sorted({*doubled, max(1, cores * 3 // 4), cores})
