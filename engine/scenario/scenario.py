"""The scenario: everything that names a run, as TOML, checked as a whole before anything runs.

Sections and keys are those of `sections` and `sections_memory`; a key left out has its default, an unknown key is an
error that names the nearest known one. Any key can be set from outside with `section.key=value`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from ...bounded import parse_toml, read
from ...errors import InputError
from ...plain import beyond_64_bits
from ...resources.parts.section import lay_machine
from ...words import problems, unknown_name
from ...workloads.importers import shipped_traces
from ...workloads.learned import shipped_weights
from ..policies.copy_order import COPY_ORDERS, orders_by_rank
from ..policies.miss import MISS
from .amounts import ScenarioError, parse_bytes
from .rows import find_row
from .section import Section
from .sections import (
    FIT_REPLACES,
    ON_GPU,
    DispatchSection,
    MachineSection,
    ModelSection,
    ParallelSection,
    PredictorSection,
    PrefetchSection,
    WorkloadSection,
)
from .sections_memory import CompressionSection, CopySection, MemorySection, MissSection, TiersSection
from .sections_requests import RequestsSection

#: How many of a scenario's faults are told.
_MOST_PROBLEMS = 20


class Scenario(Section):
    """One run, whole. `model_dump()` gives it back as plain data."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    model: ModelSection = ModelSection()
    machine: MachineSection = MachineSection()
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
    requests: RequestsSection | None = None

    @model_validator(mode="after")
    def _offloading_fits(self) -> Scenario:
        for wrong, text in _unfit(self):
            if wrong:
                raise InputError(text)
        return self

    @model_validator(mode="after")
    def _requests_make_the_steps(self) -> Scenario:
        for wrong, text in _unfit_for_requests(self):
            if wrong:
                raise InputError(text)
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
    def _sharing_is_known(self) -> Scenario:
        """Refuse what GPUs that share the experts cannot do."""
        if self.parallel.gpus == 1:
            return self
        if self.memory.scope not in ("global", "per-layer"):
            raise InputError(f"memory.scope = {self.memory.scope!r}: with parallel.gpus, choose global or per-layer")
        if self.memory.total_bytes is not None:
            raise InputError("memory.total_bytes: with parallel.gpus, give memory.gpu_budget alone")
        if self.memory.preload != "none":
            raise InputError(f"memory.preload = {self.memory.preload!r}: with parallel.gpus, choose none")
        if not self.dispatch.router_readback:
            raise InputError(
                "dispatch.router_readback = false: with parallel.gpus, hosts meet at every choice: set true"
            )
        if parse_bytes(self.parallel.spare_bytes) and not self.memory.caching:
            raise InputError("memory.caching = false: with parallel.spare_bytes, evicted experts are kept: set true")
        if self.copy_.by_rank and self.parallel.lends:
            streams = " or ".join(name for name in COPY_ORDERS if name not in orders_by_rank())
            raise InputError(
                f"copy.discipline = {self.copy_.discipline!r}: where GPUs copy experts from one another, one may be "
                f"waiting for what another puts off: choose {streams}"
            )
        return self

    @model_validator(mode="after")
    def _dropping_knows_the_visit(self) -> Scenario:
        prefetch = self.prefetch
        if not self.memory.caching and (prefetch.protect, prefetch.issue) != ("until_target", "after_launch"):
            raise InputError("memory.caching = false: needs prefetch.protect = 'until_target', issue = 'after_launch'")
        return self

    @model_validator(mode="after")
    def _the_gpu_can_issue_copies(self) -> Scenario:
        if self.prefetch.issued_by != "gpu":
            return self
        copy, lane = self.copy_, self.predictor.lane
        for wrong, text in (
            (lane not in ON_GPU, f"predictor.lane = {lane!r}, where the host has the guesses: choose gpu or compute"),
            (copy.by_rank, f"copy.discipline = {copy.discipline!r}, a queue of the host's: choose another"),
            (copy.host_memory == "pageable", "copy.host_memory = 'pageable', which the host copies: choose pinned"),
            (self.tiers.host_budget != "all", "tiers.host_budget, for reads that the host orders: set it to 'all'"),
            (not self.only_fetches, "[miss] or [compression], whose work the host orders: leave them out"),
            (self.parallel.lends, "copies between GPUs, which the host orders: choose another parallel.remote"),
        ):
            if wrong:
                raise InputError(
                    f"prefetch.issued_by = 'gpu' does not go with {text}, or set prefetch.issued_by = 'host'"
                )
        return self

    @model_validator(mode="after")
    def _host_cache_serves_one_gpu(self) -> Scenario:
        parallel = self.parallel
        if self.tiers.host_budget != "all" and max(parallel.stages, parallel.micro_batches, parallel.gpus) > 1:
            raise InputError(
                f"tiers.host_budget = {self.tiers.host_budget!r}: host memory as a cache serves one GPU without "
                "micro-batches; give 'all', or parallel.stages, parallel.micro_batches and parallel.gpus = 1"
            )
        return self

    @model_validator(mode="after")
    def _a_peer_holds_all_experts_and_does_nothing_else(self) -> Scenario:
        if self.copy_.source == "peer" and max(self.parallel.stages, self.parallel.gpus) > 1:
            raise InputError(
                "copy.source = 'peer': a GPU that holds experts has no stage and no share of them: set parallel.stages "
                "and parallel.gpus = 1"
            )
        if self.copy_.source == "peer" and self.tiers.host_budget != "all":
            raise InputError("copy.source = 'peer': no expert lies in host memory: set tiers.host_budget = 'all'")
        if self.copy_.source == "peer" and not self.only_fetches:
            raise InputError("copy.source = 'peer': no expert lies in host memory: leave out [miss] and [compression]")
        return self

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


def _unfit(scenario: Scenario) -> Iterator[tuple[bool, str]]:
    """Yields (whether it is so, what to say) of what does not go together with misses that are not fetched."""
    memory, miss, compression = scenario.memory, scenario.miss, scenario.compression
    policy, packed, mixed = miss.policy, compression.where != "none", compression.mixed is not None
    low = policy == "low_precision"
    shared, grouped = memory.scope == "shared", scenario.dispatch.expert_kernel == "grouped"
    chosen = f"miss.policy = {policy!r}" if policy != "fetch" else "[compression]"
    beyond = not scenario.only_fetches
    yield shared and beyond, f"{chosen}: with memory.scope = 'shared', choose miss.policy = 'fetch' and no compression"
    yield shared and memory.preload != "none", "memory.scope = 'shared': needs memory.preload = 'none'"
    yield mixed and memory.scope != "global", f"compression.mixed: needs memory.scope = 'global' (not {memory.scope!r})"
    several = max(scenario.parallel.stages, scenario.parallel.micro_batches, scenario.parallel.gpus) > 1
    yield several and beyond, f"{chosen}: with [parallel], choose miss.policy = 'fetch' and no compression"
    tiered = scenario.tiers.host_budget != "all"
    yield tiered and beyond, f"{chosen}: with tiers.host_budget, choose miss.policy = 'fetch' and no compression"
    yield (
        several and memory.cpu_layers is not None,
        f"memory.cpu_layers = {memory.cpu_layers}: with [parallel], leave it out",
    )
    yield low and (mixed or packed), "miss.policy = 'low_precision': needs compression.where = 'none' and no mixed"
    one_by_one = "needs dispatch.expert_kernel = 'separate': what a group of such kernels takes is not known"
    yield grouped and low, f"miss.policy = 'low_precision': {one_by_one}"
    yield grouped and (mixed or packed), f"[compression]: {one_by_one}"
    yield (
        low and memory.total_bytes is not None,
        "miss.policy = 'low_precision': give memory.gpu_budget alone, no total",
    )
    yield (
        low and miss.fetch_behind and not memory.caching,
        "miss.fetch_behind = true: needs memory.caching = true, else what it fetches leaves before it is used",
    )


def _unfit_for_requests(scenario: Scenario) -> Iterator[tuple[bool, str]]:
    """Yields (whether it is so, what to say) of what does not go together with [requests]."""
    requests, workload, parallel = scenario.requests, scenario.workload, scenario.parallel
    if requests is None:
        return
    for key, given, wanted in (
        ("workload.batch", workload.batch, 1),
        ("workload.tokens", workload.tokens, None),
        ("workload.context", workload.context, None),
        ("parallel.stages", parallel.stages, 1),
        ("parallel.micro_batches", parallel.micro_batches, 1),
        ("parallel.gpus", parallel.gpus, 1),
    ):
        yield (
            given != wanted,
            f"{key} = {given}: with [requests], whose scheduler makes the steps of one GPU: leave it out",
        )
    yield (
        requests.kv.boundary == "moving" and scenario.memory.total_bytes is None,
        "requests.kv.boundary = 'moving': give memory.total_bytes, of which experts and KV blocks take their parts",
    )


def scenario_names() -> list[str]:
    """Returns the names of the shipped scenarios."""
    folder = resources.files("prestage") / "engine" / "scenario" / "shipped"
    return sorted(entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_scenario(name: str | Path | None = None, settings: Iterable[str] = ()) -> Scenario:
    """Returns a scenario: a TOML file's, a shipped one's by name, the embedded default's, or a sweep's row's.

    A row is named by its journal and the beginning of its key, `results.jsonl#1f3a`.

    `settings` are `section.key=value` strings laid over it; a value is read as TOML, or as a bare string; without one
    (`section.key=`) the key is taken out, and has its default again. A trace, a fit or weights named in a file are
    looked for beside that file; named in a setting, in the current folder. Raises ScenarioError.
    """
    source = "scenario 'default'" if name is None else f"scenario {str(name)!r}"
    data = _read(name, source)
    for setting in settings:
        apply_setting(data, setting)
    return make_scenario(data, source)


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
        data: dict[str, Any] = find_row(file, key)["scenario"]
        return data
    if path is not None and (path.suffix == ".toml" or path.is_file()):
        try:
            text = read(path, ScenarioError).decode("utf-8")
        except OSError as error:
            raise ScenarioError(f"{source}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ScenarioError(f"{source}: not UTF-8 text") from None
        folder = path.parent
    else:
        shipped = "default" if name is None else str(name)
        if shipped not in scenario_names():
            raise ScenarioError(unknown_name("scenario", shipped, [*scenario_names(), "FILE.toml"]))
        text = (resources.files("prestage") / "engine" / "scenario" / "shipped" / f"{shipped}.toml").read_text("utf-8")
        folder = None
    data = parse_toml(text, source, ScenarioError)
    if folder is not None:
        workload = data.get("workload")
        _find_beside(folder, workload, "trace")
        _find_beside(folder, workload.get("synthetic") if isinstance(workload, dict) else None, "fit")
        _find_beside(folder, data.get("predictor"), "weights")
        requests = data.get("requests")
        _find_beside(folder, requests, "trace")
        speculation = requests.get("speculation") if isinstance(requests, dict) else None
        _find_beside(folder, speculation, "acceptance")
    return data


def _find_beside(folder: Path, section: Any, key: str) -> None:
    """Make a file that a section names relative to the folder of the scenario, unless it is one that ships."""
    named = section.get(key) if isinstance(section, dict) else None
    if isinstance(named, str) and named not in (*shipped_traces(), *shipped_weights()):
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
    if parts[0] == "machine" and isinstance(data.get("machine"), dict):
        lay_machine(data["machine"], parts[-1], out=value in ("", None))
    if field is not None and (value in ("", None) or (value == "none" and _may_be_missing(field))):
        _take_out(data, parts)
        return
    _drop_replaced(data, parts, value)
    for part in parts[:-1]:
        if data.get(part) is None:
            data[part] = {}
        data = data[part]
        if not isinstance(data, dict):
            raise ScenarioError(f"{key}: {part!r} is a value, not a section")
    data[parts[-1]] = value


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
        if parts[1:] == ["trace"]:
            workload.pop("synthetic", None)
        elif parts[1:2] == ["synthetic"]:
            workload.pop("trace", None)
        synthetic = workload.get("synthetic")
        if parts[1:] == ["synthetic", "fit"] and isinstance(synthetic, dict):
            for key in FIT_REPLACES:
                synthetic.pop(key, None)
    if parts == ["predictor", "name"] and value != "learned" and isinstance(predictor, dict):
        predictor.pop("weights", None)
