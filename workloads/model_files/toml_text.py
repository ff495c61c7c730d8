"""TOML of a model's shapes, as `prestage model import` writes it and `load_model` reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .shapes import Shapes

_LINE = 110


def toml_of(shapes: Shapes) -> str:
    """Returns the TOML text of shapes; what has its default is left out."""
    data = shapes.model_dump(exclude_defaults=True, exclude_none=True)
    lines = [
        f"# Made by `prestage model import`. Kernels are assumed, as of the nearest shipped model.\n{_plain(data)}"
    ]
    lines += _sections(data, "")
    return "\n".join(lines).rstrip() + "\n"


def _sections(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in table.items():
        name = f"{prefix}{_key(key)}"
        if isinstance(value, Mapping):
            plain = _plain(value)
            if plain:
                yield f"[{name}]\n{plain}"
            yield from _sections(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield from (f"[[{name}]]\n{_plain(each)}" for each in value)


def _plain(table: Mapping[str, Any]) -> str:
    """Returns the lines of a table's own keys, without those of the tables in it."""
    lines = []
    for key, value in table.items():
        if isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            continue
        lines.append(f"{_key(key)} = {_value(value)}\n")
    return "".join(lines)


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, list):
        one_line = f"[{', '.join(map(_value, value))}]"
        return one_line if len(one_line) <= _LINE else _lines([_value(each) for each in value])
    # JSON's strings, numbers and booleans are TOML's too, but for what is not ASCII, which both may hold as it is.
    return json.dumps(value, ensure_ascii=False)


def _lines(values: list[str]) -> str:
    """Returns a list over as few lines as hold it."""
    lines = [""]
    for value in values:
        if len(lines[-1]) + len(value) > _LINE:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else '    '}{value},"
    return "\n".join(["[", *lines, "]"])
