"""The scenario: everything that names a run, as TOML, checked as a whole before anything runs.

Sections and keys are those of `sections` and `sections_memory`; a key left out has its default, an unknown key is an
error that names the nearest known one. Any key can be set from outside with `section.key=value`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from ... import plugins
from ...bounded import parse_toml, read
from ...errors import InputError
from ...plain import beyond_64_bits
from ...resources.parts.section import lay_machine
from ...resources.runtime import load_runtime
from ...words import did_you_mean, problems, shown
from ...workloads.fitted import shipped_fits
from ...workloads.importers import shipped_traces
from ...workloads.learned import shipped_weights
from ...workloads.model import names_model, preset_names
from ..policies.miss import MISS
from .amounts import ScenarioError
from .rows import find_row
from .runtimes import RuntimeSection, refused_by, take_out_all_gpus, with_all_gpus, with_defaults
from .section import Section
from .sections import (
    DRAWN_BY,
    FIT_REPLACES,
    DispatchSection,
    MachineSection,
    ModelSection,
    ParallelSection,
    PredictorSection,
    PrefetchSection,
    RoutingSection,
    WorkloadSection,
)
from .sections_memory import CompressionSection, CopySection, MemorySection, MissSection, TiersSection
from .sections_requests import RequestsSection
from .together import clashes

#: How many of a scenario's faults are told.
_MOST_PROBLEMS = 20
#: What a run of a model by its name begins with.
OF_A_MODEL = "one-gpu"


#: What a key is called by the options of runtimes that are predicted.
_ELSEWHERE = {
    "batch_size": ["workload.batch"],
    "ctx_size": ["workload.context"],
    "n_cpu_moe": ["memory.cpu_layers"],
    "threads": ["miss.cpu_threads"],
}


class Scenario(Section):
    """One run, whole. `model_dump()` gives it back as plain data."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    model: ModelSection = ModelSection()
    machine: MachineSection = MachineSection()
    runtime: RuntimeSection = RuntimeSection()
    workload: WorkloadSection
    memory: MemorySection = MemorySection()
    predictor: PredictorSection = PredictorSection()
    prefetch: PrefetchSection = PrefetchSection()
    dispatch: DispatchSection = DispatchSection()
    copy_: CopySection = Field(default=CopySection(), alias="copy")
    parallel: ParallelSection = ParallelSection()
    tiers: TiersSection = TiersSection()
    miss: MissSection = MissSection()
    compression: CompressionSection = CompressionSection()
    routing: RoutingSection = RoutingSection()
    requests: RequestsSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _runtime_and_gpus_set_what_nobody_says(cls, given: Any) -> Any:
        return with_all_gpus(with_defaults(given, cls)) if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _runtime_can(self) -> Scenario:
        refused = refused_by(self.plain())
        if refused is not None:
            raise InputError(refused)
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> Scenario:
        for text in clashes(self):
            raise InputError(text)
        return self

    @model_validator(mode="after")
    def _a_moving_boundary_divides_a_total(self) -> Scenario:
        if self.requests is not None and self.requests.kv.boundary == "moving" and self.memory.total_bytes is None:
            raise InputError(
                "requests.kv.boundary = 'moving': give memory.total_bytes, of which experts and KV blocks take their "
                "parts"
            )
        return self

    @property
    def only_fetches(self) -> bool:
        """Whether all that happens to experts is that they are copied, as they are, when they are absent."""
        compression = self.compression
        return self.miss.policy == "fetch" and compression.where == "none" and compression.mixed is None

    @property
    def uses_cpu(self) -> bool:
        """Whether misses may be computed on the CPU."""
        return bool(getattr(MISS[self.miss.policy], "uses_cpu", False))

    @model_validator(mode="after")
    def _micro_batches_have_places(self) -> Scenario:
        if self.parallel.micro_batches > self.workload.batch:
            raise InputError(
                f"parallel.micro_batches = {self.parallel.micro_batches}: must be at most workload.batch = "
                f"{self.workload.batch}, whose places they divide"
            )
        return self

    def plain(self) -> dict[str, Any]:
        """Returns the scenario as plain data, by the names that its TOML uses, all defaults filled in."""
        plain = self.model_dump(by_alias=True)
        if self.requests is None:
            del plain["requests"]
        return plain


def scenario_names() -> list[str]:
    """Returns the names of the shipped scenarios."""
    folder = resources.files("prestage") / "engine" / "scenario" / "shipped"
    return sorted(entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_scenario(name: str | Path | None = None, settings: Iterable[str] = ()) -> Scenario:
    """Returns a scenario: a TOML file's, a shipped one's by name, the embedded default's, or a sweep's row's.

    A row is named by its journal and the beginning of its key, `results.jsonl#1f3a`. A shipped model's name that is no
    scenario's is the scenario `one-gpu` with that model.

    `settings` are `section.key=value` strings laid over it; a value is read as TOML, or as a bare string; without one
    (`section.key=`) the key is taken out, and has its default again. A trace, a fit or weights named in a file are
    looked for beside that file; named in a setting, in the current folder. Raises ScenarioError.
    """
    data, source = scenario_data(name)
    for setting in in_order(settings):
        apply_setting(data, setting)
    return make_scenario(data, source)


def in_order(settings: Iterable[str]) -> list[str]:
    """Returns settings as they are laid over a scenario: a runtime brings keys of its own, other settings follow."""
    if isinstance(settings, str):
        raise ScenarioError(f"settings = {settings!r}: give a list of them: [{settings!r}]")
    if isinstance(settings, Mapping):
        raise ScenarioError(
            f"settings = {shown(settings)}: give a list, such as ['workload.tokens=20']; `simulate` takes a dict"
        )
    return sorted(settings, key=lambda each: not each.strip().startswith("runtime.name"))


def scenario_data(name: str | Path | None = None) -> tuple[dict[str, Any], str]:
    """Returns a scenario's plain data, as it was written, and what messages call it. Raises ScenarioError."""
    source = "scenario 'default'" if name is None else f"scenario {str(name)!r}"
    return _read(name, source), source


def make_scenario(data: Mapping[str, Any], source: str = "scenario") -> Scenario:
    """Returns the scenario that plain data describes; ScenarioError names `source` and every bad key."""
    too_large = beyond_64_bits(data)
    if too_large is not None:
        raise ScenarioError(f"{source}: {too_large}")
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        raise ScenarioError(f"{source}: {problems(error, Scenario, data)}") from None


def _read(name: str | Path | None, source: str) -> dict[str, Any]:
    path = Path(name) if name is not None else None
    if path is not None and ".jsonl#" in path.name:
        file, _, key = str(path).rpartition("#")
        row = find_row(file, key)
        missing = set(row.get("plugins", ())) - {plugin.name for plugin in plugins.loaded()}
        if missing:
            raise ScenarioError(f"{source}: ran with plug-ins: add --plugin {' --plugin '.join(sorted(missing))}")
        data: dict[str, Any] = row["scenario"]
        return data
    if path is not None and (path.suffix == ".toml" or path.is_file()) and not names_model(str(name)):
        try:
            text = read(path, ScenarioError).decode("utf-8")
        except OSError as error:
            raise ScenarioError(f"{source}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ScenarioError(f"{source}: not UTF-8 text") from None
        folder = path.parent
    else:
        return _shipped("default" if name is None else str(name), source)
    data = parse_toml(text, source, ScenarioError)
    workload = data.get("workload")
    runtime = data.get("runtime")
    if isinstance(runtime, dict) and str(runtime.get("name")).endswith((".toml", ".json")):
        _find_beside(folder, runtime, "name")
    _find_beside(folder, workload, "trace")
    for key in DRAWN_BY:
        _find_beside(folder, workload.get("synthetic") if isinstance(workload, dict) else None, key)
    _find_beside(folder, data.get("predictor"), "weights")
    requests = data.get("requests")
    _find_beside(folder, requests, "trace")
    speculation = requests.get("speculation") if isinstance(requests, dict) else None
    _find_beside(folder, speculation, "acceptance")
    return data


def _shipped(name: str, source: str) -> dict[str, Any]:
    """Returns the plain data of a shipped scenario, or of the one that runs a model."""
    model = name if names_model(name) and name not in scenario_names() else None
    if model is None and name not in scenario_names():
        if Path(name).is_dir():
            raise ScenarioError(f"scenario = {shown(name)}: is a folder: give a scenario's name, a model or FILE.toml")
        hint = did_you_mean(name, [*scenario_names(), *preset_names()])
        choices = ", ".join([*scenario_names(), "a model's name", "FILE.toml"])
        raise ScenarioError(f"scenario = {shown(name)}: choose one of {choices}" + (f" ({hint})" if hint else ""))
    file = resources.files("prestage") / "engine" / "scenario" / "shipped" / f"{OF_A_MODEL if model else name}.toml"
    data = parse_toml(file.read_text("utf-8"), source, ScenarioError)
    if model is not None:
        name_model(data, model)
    return data


def name_model(data: dict[str, Any], model: str) -> None:
    """Lay a model over plain data; where the routing is drawn, it is by the fit to that model's, if one ships."""
    data.setdefault("model", {})["preset"] = model
    if model in shipped_fits() and data.get("workload", {}).get("synthetic") is not None:
        lay(data, "workload.synthetic.fit", model)


def _find_beside(folder: Path, section: Any, key: str) -> None:
    """Make a file that a section names relative to the folder of the scenario, unless it is one that ships."""
    named = section.get(key) if isinstance(section, dict) else None
    if isinstance(named, str) and named not in (*shipped_traces(), *shipped_weights(), *shipped_fits()):
        section[key] = str(folder / named)


def apply_setting(data: dict[str, Any], setting: str) -> None:
    """Lay one `section.key=value` over plain data."""
    key, equals, text = setting.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ScenarioError(f"--set {setting!r}: write it as section.key=value")
    lay(data, key.strip(), parse_value(text))


def parse_value(text: str) -> Any:
    """Returns what a value means that is given outside a file: TOML, or else the bare string."""
    try:
        return parse_toml(f"value = {text.strip()}", "value")["value"]
    except InputError:
        return text.strip()


def lay(data: dict[str, Any], key: str, value: Any) -> None:
    """Lay a value over plain data under `section.key`. Raises ScenarioError.

    An empty value takes the key out, so that it has its default again; so does 'none', of a key that may be left out
    and has no default.
    """
    parts = key.split(".")
    field = _field(parts)
    if field is None and len(parts) == 1 and (meant := keys_named(key)):
        raise ScenarioError(f"{key}: no such key; did you mean {' or '.join(map(repr, meant))}?")
    take_out_all_gpus(data)
    if parts[0] == "machine" and isinstance(data.get("machine"), dict):
        lay_machine(data["machine"], parts[-1], out=value in ("", None))
    if field is not None and (value in ("", None) or (value == "none" and _may_be_missing(field))):
        _take_out(data, parts)
        return
    _drop_replaced(data, parts, value)
    if parts == ["runtime", "name"] and isinstance(value, str):
        for section, keys in load_runtime(value).defaults.items():
            for name in keys:
                _take_out(data, [section, name])
    for part in parts[:-1]:
        if data.get(part) is None:
            data[part] = {}
        data = data[part]
        if not isinstance(data, dict):
            raise ScenarioError(f"{key}: {part!r} is a value, not a section")
    data[parts[-1]] = value


def scenario_keys() -> list[str]:
    """Returns every key of a scenario, as `section.key`."""
    return list(_keys(Scenario, ""))


def keys_named(name: str) -> list[str]:
    """Returns the keys that are called so in their sections; those of an outer section go before an inner one's."""
    found = [key for key in scenario_keys() if key.rpartition(".")[2] == name] or _ELSEWHERE.get(name, [])
    least = min((key.count(".") for key in found), default=0)
    return [key for key in found if key.count(".") == least]  # `tokens` is the workload's, before synthetic's


def _keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        yield from [key] if inner is None else _keys(inner, f"{key}.")


def _field(parts: Sequence[str]) -> FieldInfo | None:
    """Returns what the scenario says of a section or a key; None if it has no such."""
    section: type[BaseModel] | None = Scenario
    field = None
    for part in parts:
        named = section.model_fields.items() if section is not None else ()
        field = next((field for name, field in named if part == (field.alias or name)), None)
        if field is None:
            return None
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return field


def _may_be_missing(field: FieldInfo) -> bool:
    return field.default is None


def _take_out(data: dict[str, Any], parts: Sequence[str]) -> None:
    """Take a key out of plain data. Without its trace, a workload is drawn."""
    section: Any = data
    for part in parts[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if isinstance(section, dict):
        section.pop(parts[-1], None)
        if list(parts) == ["workload", "trace"] and section.get("synthetic") is None:
            section["synthetic"] = {}


def _drop_replaced(data: dict[str, Any], parts: list[str], value: Any) -> None:
    """Take out what a setting replaces: a trace and a synthetic one, weights of another predictor, a fixed batch."""
    workload, predictor = (data.get(section) for section in ("workload", "predictor"))
    if parts[0] == "requests" and data.get("requests") is None and isinstance(workload, dict):
        for key in ("batch", "tokens", "context", "warmup"):
            workload.pop(key, None)
    if parts[:1] == ["workload"] and isinstance(workload, dict):
        _drop_of_workload(workload, parts[1:])
    if parts == ["model", "preset"] and isinstance(workload, dict):
        _drop_shipped_fit(workload.get("synthetic"))
    if parts == ["predictor", "name"] and value != "learned" and isinstance(predictor, dict):
        predictor.pop("weights", None)


def _drop_of_workload(workload: dict[str, Any], parts: list[str]) -> None:
    """Take out what a setting of the workload replaces: a trace and a synthetic one, and what that is drawn by."""
    if parts == ["trace"]:
        workload.pop("synthetic", None)
    if parts[:1] != ["synthetic"]:
        return
    workload.pop("trace", None)
    synthetic = workload.get("synthetic")
    if parts[-1] in DRAWN_BY and isinstance(synthetic, dict):
        for key in {*FIT_REPLACES, *DRAWN_BY} - {parts[-1]}:
            synthetic.pop(key, None)
    if parts[-1] in FIT_REPLACES:
        _drop_shipped_fit(synthetic)


def _drop_shipped_fit(synthetic: Any) -> None:
    """Take a shipped fit out of what is drawn: it is of one model, which another takes the place of."""
    if isinstance(synthetic, dict) and synthetic.get("fit") in shipped_fits():
        del synthetic["fit"]
