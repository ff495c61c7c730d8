"""How refusals are worded: names that do not exist, data that is not as it must be, names that become files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, get_args

from .errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

#: How many problems of one file are told, and how much of a value is shown.
_MOST_PROBLEMS, _MOST_CHARACTERS = 8, 120
#: A name that becomes a file's, on any system: one step of a path, visible, and short enough to be added to.
_FILE_NAME = re.compile(r"(?![. ])[^\x00-\x1f\x7f/\\:*?\"<>|]{1,100}(?<![. ])")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
#: What pydantic says in words of its own, for people who have never heard of it.
_MESSAGES = {
    "missing": "missing; must be given",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "int_parsing": "must be a valid integer",
    "float_parsing": "must be a valid number",
    "bool_parsing": "must be true or false",
}
_SUBJECT = re.compile(r"(?:Input|Dictionary|List|Tuple|Set|String|Value) should ")


def unknown_name(key: str, given: object, known: Iterable[str]) -> str:
    """Returns `key = 'given': choose one of …`, with the nearest known name if there is one."""
    known = list(known)
    hint = did_you_mean(given, known)
    return f"{key} = {shown(given)}: choose one of {', '.join(known)}" + (f" ({hint})" if hint else "")


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Returns `did you mean 'a' or 'b'?`, or nothing if no known name is near."""
    near = list(map(repr, nearest(str(given), known)))
    return f"did you mean {' or '.join(near)}?" if near else ""


def nearest(given: str, known: Iterable[str]) -> list[str]:
    """Returns the known names that a given one may mean, three at most.

    They are written alike but for case and marks (a repository's owner before it counts for nothing), or near in
    letters, or have it in them.
    """
    plain = {name: _letters(name) for name in known}
    wanted = _letters(given.rpartition("/")[2])
    alike = [name for name, letters in plain.items() if wanted and letters == wanted]
    within = [name for name, letters in plain.items() if len(wanted) > 3 and wanted in letters]
    return (
        alike[:1]
        or difflib.get_close_matches(given, plain, 1, cutoff=0.8)
        or sorted(within, key=len)[:3]
        or difflib.get_close_matches(given, plain, 1)
    )


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Returns `section.key: no such key`, with the nearest known one, or all."""
    known = list(known)
    hint = did_you_mean(key.rpartition(".")[2], known)
    return f"{key}: no such key; " + (hint or f"known keys: {', '.join(known)}")


def shown(value: object) -> str:
    """Returns a value as a message shows it: the whole of it, unless it is long."""
    text = repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def file_name(given: str) -> str:
    """Returns a name that will be part of a file's; InputError, which begins with it, if it could be another file's."""
    if _FILE_NAME.fullmatch(given) is None or given.partition(".")[0].lower() in _RESERVED:
        raise InputError(
            f'{shown(given)}: names a file: give 1 to 100 characters, none of / \\ : * ? " < > |, '
            "and no dot or space at an end"
        )
    return given


def problems(error: ValidationError, model: type[BaseModel], data: object) -> str:
    """Returns what pydantic found wrong with plain data that was to be a `model`: each key, value, what would do."""
    by_place: dict[str, list[dict[str, Any]]] = {}
    found = error.errors(include_url=False)
    within = {problem["loc"][:depth] for problem in found for depth in range(len(problem["loc"]))}
    for problem in found:
        if problem["type"] == "too_short" and problem["loc"] in within:
            continue  # what it lacks is what is wrong inside it
        steps, _ = _walked(problem["loc"], model, data, problem["type"] == "missing")
        by_place.setdefault(".".join(map(str, steps)), []).append(dict(problem))
    lines = [_problem(place, model, data) for place in islice(by_place.values(), _MOST_PROBLEMS)]
    more = len(by_place) - len(lines)
    return "; ".join(lines) + (f"; and {more:,} more like these" if more > 0 else "")


def _problem(place: Iterable[Mapping[str, Any]], model: type[BaseModel], data: object) -> str:
    """Returns what is wrong in one place: where it can be of several forms, what would do for any of them."""
    told: dict[str, list[str]] = {}
    for problem in place:
        key, message = _explained(problem, model, data)
        messages = told.setdefault(key or message, [])
        if message not in messages:
            messages.append(message)
    return "; ".join(f"{'' if key in messages else key}{' or '.join(messages)}" for key, messages in told.items())


def _explained(problem: Mapping[str, Any], model: type[BaseModel], data: object) -> tuple[str, str]:
    """Returns one of pydantic's problems: the key and its value, and what would be right."""
    kind, given, place = problem["type"], problem["input"], problem["loc"]
    steps, models = _walked(place, model, data, kind == "missing")
    key = ".".join(map(str, steps))
    message = _SUBJECT.sub("must ", str(problem["msg"]).removeprefix("Value error, "), count=1)
    message = _MESSAGES.get(kind, message.replace(" after validation", ""))
    if kind == "extra_forbidden":
        return "", unknown_key(key, _keys(models))
    if kind.startswith("union_tag"):
        field = str(problem["ctx"]["discriminator"]).strip("'")
        tags = list(dict.fromkeys(_tags(models, field)))
        if kind == "union_tag_not_found":
            return "", f"{key}.{field}: missing; choose one of {', '.join(tags)}"
        return "", unknown_name(f"{key}.{field}", given.get(field) if isinstance(given, Mapping) else None, tags)
    if kind in ("model_type", "model_attributes_type", "dict_type") and not isinstance(given, Mapping):
        known = [f"{key}.{name}" if key else name for name in _keys(models)]
        message = "must be a section" if key else "must be a table of keys"
        message += f", such as {known[0]}" if known else ""
        return f"{key} = {shown(given)}: " if key else f"{shown(given)}: ", message
    if not key or kind == "missing":
        return f"{key}: " if key else "", message
    if message.startswith(shown(given)):
        return f"{key} = ", message
    return f"{key} = {shown(given)}: " if isinstance(given, str | int | float | None) else f"{key}: ", message


def _walked(
    place: Sequence[int | str], model: type[BaseModel], data: object, missing: bool
) -> tuple[list[int | str], list[type[BaseModel]]]:
    """Returns the steps of a place that are keys and indices of the data, and the models that may be there.

    Where data can be of several forms, pydantic's places also name the form; those steps are left out. Of a key that
    does not exist, the models are those of what it stands in.
    """
    steps: list[int | str] = []
    models = [model]
    for number, part in enumerate(place):
        last = number == len(place) - 1
        inside = (
            part in data if isinstance(data, Mapping) else isinstance(data, list | tuple) and part in range(len(data))
        )
        if not inside and not (last and missing) and not _has_attribute(data, part):
            models = [each for each in models if part in (each.__name__, *_literals(each))] or models
            continue
        steps.append(part)
        fields = [f for each in models for n, f in each.model_fields.items() if part in (n, f.alias)]
        if fields:
            models = [found for field in fields for found in _models(field.annotation)]
        data = data[part] if inside else getattr(data, str(part), None)  # type: ignore[index]
    return steps, models


def _has_attribute(data: object, part: int | str) -> bool:
    return hasattr(type(data), "model_fields") and hasattr(data, str(part))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yields the models in a type, however deep in lists, unions and annotations."""
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _literals(model: type[BaseModel]) -> list[object]:
    return [value for field in model.model_fields.values() for value in get_args(field.annotation)]


def _tags(models: Iterable[type[BaseModel]], field: str) -> Iterator[str]:
    for model in models:
        yield from map(str, get_args(model.model_fields[field].annotation) if field in model.model_fields else ())


def _keys(models: Iterable[type[BaseModel]]) -> list[str]:
    """Returns the keys that models know, by the names that a file gives them."""
    return list(dict.fromkeys(f.alias or name for each in models for name, f in each.model_fields.items()))
