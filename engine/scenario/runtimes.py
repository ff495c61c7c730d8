"""Settings that a scenario's runtime, or its machine's GPUs, give where the user does not; what a runtime cannot do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ...resources.parts.section import gpus_of
from ...resources.runtime import DEFAULT, Runtime, RuntimeFileError, load_runtime
from ...words import problems, unknown_name
from .section import Section

#: Either says what a machine's GPUs do.
_GPU_KEYS = frozenset({"stages", "gpus"})


class RuntimeSection(Section):
    """The software that is predicted: a shipped runtime's name, or a TOML or JSON file's path.

    It sets the keys of other sections that the scenario leaves out, as its file says, and costs what its file says. A
    scenario without it is our own executor, `prestage`, on which nothing comes beyond the machine's costs.
    """

    name: str = DEFAULT


def with_defaults(given: Mapping[str, Any], scenario: type[BaseModel]) -> Mapping[str, Any]:
    """Returns a scenario's plain data with what its runtime sets, under what is given."""
    named = given.get("runtime")
    name = named.get("name", DEFAULT) if isinstance(named, Mapping) else getattr(named, "name", DEFAULT)
    if not isinstance(name, str):
        return given  # what is wrong with it is told with all else
    runtime = load_runtime(name)
    _check_keys(runtime, scenario)
    laid = dict(given)
    for section, keys in runtime.defaults.items():
        own = _said(laid, section)
        if own is not None:
            laid[section] = {**keys, **own}
    return laid


def with_all_gpus(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a scenario's plain data in which all GPUs that its machine's parts count are at work.

    Where nothing says how, they are the stages of a pipeline, as runtimes give whole layers to GPUs; but [requests]
    are served by one GPU, and one that experts are copied from does nothing else.
    """
    parallel, stages = _said(given, "parallel"), _stages_of_gpus(given)
    if parallel is None or _GPU_KEYS & parallel.keys() or stages == 1:
        return given
    return {**given, "parallel": {**parallel, "stages": stages}}


def take_out_all_gpus(data: dict[str, Any]) -> None:
    """Take out of a scenario's plain data with all keys what `with_all_gpus` has laid there or left as it is.

    Then it is worked out anew, of another machine or beside other keys.
    """
    parallel = data.get("parallel")
    if not isinstance(parallel, Mapping) or not parallel.keys() >= _GPU_KEYS:
        return
    if (parallel["stages"], parallel["gpus"]) == (_stages_of_gpus(data), 1):
        data["parallel"] = {key: value for key, value in parallel.items() if key not in _GPU_KEYS}


def _stages_of_gpus(given: Mapping[str, Any]) -> int:
    """Returns how many stages the GPUs of a scenario's plain data are where nothing says what they do."""
    machine, copies = _said(given, "machine"), _said(given, "copy") or {}
    if machine is None or given.get("requests") is not None or copies.get("source") == "peer":
        return 1
    return gpus_of(machine)


def _said(given: Mapping[str, Any], section: str) -> Mapping[str, Any] | None:
    """Returns what a scenario's plain data say in a section; None if it is none, which is told with all else."""
    own = given.get(section, {})
    if isinstance(own, Section):
        return own.model_dump(by_alias=True, exclude_unset=True)
    return own if isinstance(own, Mapping) else None


def refused_by(scenario: Mapping[str, Any]) -> str | None:
    """Returns why a scenario's runtime cannot do what it asks; None if it can."""
    runtime = load_runtime(scenario["runtime"]["name"])
    for key, only in runtime.only.items():
        section, _, name = key.partition(".")
        value = scenario[section][name]
        if value not in only.values:
            choose = " or ".join(map(repr, only.values))
            title = runtime.title or runtime.name
            return f"{key} = {value!r}: {title} {only.why}: set {choose}, or choose another runtime.name"
    return None


def _check_keys(runtime: Runtime, scenario: type[BaseModel]) -> None:
    """Refuse a runtime that names sections or keys that no scenario has."""
    sections = {field.alias or name: field.annotation for name, field in scenario.model_fields.items()}
    asked: list[tuple[str, str, Collection[str]]] = [
        (f"defaults.{section}", section, keys) for section, keys in runtime.defaults.items()
    ]
    asked += [(f"only.{key}", key.partition(".")[0], [key.partition(".")[2]]) for key in runtime.only]
    for place, section, keys in asked:
        known = sections.get(section)
        if not (isinstance(known, type) and issubclass(known, BaseModel)) or section == "runtime":
            wanted = [name for name in sections if name not in ("seed", "runtime")]
            raise RuntimeFileError(f"runtime {runtime.name}: {unknown_name(place, section, wanted)}")
        for key in keys:
            if key not in known.model_fields:
                raise RuntimeFileError(f"runtime {runtime.name}: {unknown_name(place, key, known.model_fields)}")
        if isinstance(keys, Mapping):
            _check_values(runtime, place, known, keys)


def _check_values(runtime: Runtime, place: str, section: type[BaseModel], keys: Mapping[str, Any]) -> None:
    """Refuse values that no scenario may have; what several keys come to is the scenario's."""
    try:
        section.model_validate(dict(keys))
    except ValidationError as error:
        if any(problem["loc"] for problem in error.errors()):
            told = problems(error, section, dict(keys))
            raise RuntimeFileError(f"runtime {runtime.name}: {place}: {told}") from None
