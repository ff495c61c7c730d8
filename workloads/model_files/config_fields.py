"""Fields of a config.json: reading them with an error that names file, field, value and what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...words import shown
from ..model import ModelError
from ..trace_limits import MAX_LAYERS

_MOST = 2**40


class Config:
    """The facts of a config.json, or of a section of it; a field may go by several names, and null is none.

    `usual` are the defaults of the family's class in transformers, for fields that are missing, and not for null ones.
    A section has them for every field, for it is written without those that are the class's own. A whole file has them
    only for fields that may be missing; without its sizes it is taken to be damaged.
    """

    def __init__(
        self, where: str, data: Mapping[str, Any], outer: Config | None = None, usual: Mapping[str, Any] | None = None
    ) -> None:
        self.where = where
        self.data = data
        self._outer = outer
        self._usual = usual or {}

    def with_usual(self, usual: Mapping[str, Any]) -> Config:
        """Returns these facts with a class's defaults."""
        return Config(self.where, self.data, self._outer, usual)

    def get(self, *names: str) -> Any:
        """Returns the first field that is given under one of these names, here or around this section; else None."""
        for name in names:
            if self.data.get(name) is not None:
                return self.data[name]
        return None if self._outer is None else self._outer.get(*names)

    def _missing(self, names: tuple[str, ...], default: Any) -> Any:
        """Returns what a field is that is not given: its class's default, unless it is null; else `default`."""
        if any(name in self.data for name in names) or (default is None and not self.is_part):
            return default
        return next((self._usual[name] for name in names if name in self._usual), default)

    def count(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """Returns a whole number; of a list of several that are all the same, that. ModelError if it is none."""
        value, default = self.get(*names), self._missing(names, default)
        names = (next((name for name in names if self.get(name) is not None), names[0]),)
        if isinstance(value, list) and len(value) > 1 and value[0] is not None and all(v == value[0] for v in value):
            value = value[0]
        if value is None:
            if default is None:
                raise ModelError(f"{self.where}: {names[0]}: missing; must be given")
            return default
        if isinstance(value, list):
            raise ModelError(
                f"{self.where}: {names[0]} = {shown(value)}: must be one number; of experts, choices, shared experts "
                "and their widths also a list with one a layer"
            )
        if type(value) is not int or not least <= value <= _MOST:
            raise ModelError(f"{self.where}: {names[0]} = {shown(value)}: must be an integer of at least {least}")
        return value

    def at(self, block: tuple[int, int], moe_layer: tuple[int, int]) -> Config:
        """Returns these fields as they are of one block: of a list by block, or by MoE layer, its entry.

        Both are a number, from 0, and how many there are.
        """
        data = dict(self.data)
        for key, value in self.data.items():
            if isinstance(value, list) and not any(isinstance(each, list | dict) for each in value):
                if len(value) == moe_layer[1]:
                    data[key] = value[moe_layer[0]]
                elif len(value) >= block[1]:
                    data[key] = value[block[0]]
        return Config(self.where, data, None if self._outer is None else self._outer.at(block, moe_layer), self._usual)

    def flag(self, *names: str, default: bool = False) -> bool:
        """Returns true or false; ModelError for anything else."""
        value = self.get(*names)
        if value is None:
            return bool(self._missing(names, default))
        if type(value) is not bool:
            raise ModelError(f"{self.where}: {names[0]} = {shown(value)}: must be true or false")
        return value

    def entries(self, *names: str) -> list[Any] | None:
        """Returns a list of single values, or None where it is not given; ModelError for anything else."""
        value = self.get(*names)
        if value is not None and not (isinstance(value, list) and not any(isinstance(v, list | dict) for v in value)):
            raise ModelError(f"{self.where}: {names[0]} = {shown(value)}: must be a list of numbers or words")
        return value

    def section(self, name: str) -> Config:
        """Returns a section of this one; ModelError if there is none."""
        value = self.get(name)
        if not isinstance(value, Mapping):
            raise ModelError(f"{self.where}: {name} = {shown(value)}: must be an object")
        return Config(f"{self.where}: {name}", value)

    @property
    def whole(self) -> Config:
        """The whole file's, which for all parts says whether its head is the embedding."""
        return self if self._outer is None else self._outer.whole

    @property
    def is_part(self) -> bool:
        """Whether it is a section whose missing fields are looked for around it."""
        return self._outer is not None

    @property
    def blocks(self) -> int:
        """The number of blocks; where only their kinds are listed, so many."""
        listed = self.get("layers_block_type", "hybrid_override_pattern", "layer_types")
        default = len(listed) if isinstance(listed, list | str) else None
        found = self.count("num_hidden_layers", "n_layers", "num_layers", "n_layer", default=default)
        if found > MAX_LAYERS:
            raise ModelError(f"{self.where}: num_hidden_layers = {found}: must be at most {MAX_LAYERS}")
        return found

    @property
    def hidden(self) -> int:
        """The width of the model."""
        return self.count("hidden_size", "d_model", "n_embd")

    def of_blocks(self, *names: str) -> list[Any] | None:
        """Returns a list with an entry for each block (longer ones also cover draft layers), or None."""
        found = self.entries(*names)
        if found is not None and len(found) < self.blocks:
            raise ModelError(f"{self.where}: {names[0]}: {len(found)} entries: must have one a layer, {self.blocks}")
        return None if found is None else found[: self.blocks]
