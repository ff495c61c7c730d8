"""The scenario: what is refused and how, budgets, `--set`, and that everything shipped is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prestage.engine.load import load_inputs
from prestage.engine.scenario.amounts import ScenarioError, parse_budget, parse_bytes
from prestage.engine.scenario.scenario import Scenario, load_scenario, make_scenario, scenario_names
from prestage.engine.scenario.sections import SyntheticSection
from prestage.experiments.grid import make_grid
from prestage.resources.profile import profile_names
from prestage.workloads.model import MOST_BYTES, preset_names

TRACE = '[workload]\ntrace = "t.npz"\n'
MIB = 2**20


def toml(folder: Path, text: str) -> Path:
    path = folder / "s.toml"
    path.write_text(text, encoding="utf-8")
    return path


def leaves(sections: dict[str, Any], at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every key of a scenario with its value."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in sections.items():
        found += leaves(value, (*at, key)) if isinstance(value, dict) else [((*at, key), value)]
    return found


FULL = load_scenario("synthetic").plain()
KEYS = [path for path, _ in leaves(FULL)]
#: Keys that may have a list.
LISTS = [("parallel", "split"), ("model", "expert_bytes"), ("predictor", "recall_by_horizon")]
SECTIONS = sorted({path[:-1] for path in KEYS})


# What is refused.


@pytest.mark.parametrize("section", SECTIONS, ids=".".join)
def test_every_section_refuses_a_key_it_does_not_have(section: tuple[str, ...]) -> None:
    setting = ".".join([*section, "zzz"]) + "=1"
    with pytest.raises(ScenarioError, match=rf"^scenario 'synthetic': {setting[:-2]}: no such key; known keys: \w+"):
        load_scenario("synthetic", [setting])


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_every_key_misspelled_is_told_the_nearest(path: tuple[str, ...]) -> None:
    wrong = path[-1] + "x"
    with pytest.raises(ScenarioError) as error:
        load_scenario("synthetic", [f"{'.'.join([*path[:-1], wrong])}=1"])
    assert f"{wrong}: no such key; did you mean {path[-1]!r}?" in str(error.value)


@pytest.mark.parametrize("path", [path for path in KEYS if path not in LISTS], ids=".".join)
def test_every_key_refuses_a_value_of_another_type_naming_key_and_value(path: tuple[str, ...]) -> None:
    name = ".".join(path)
    with pytest.raises(ScenarioError) as error:
        load_scenario("synthetic", [f"{name}=[1]"])
    assert str(error.value).startswith(f"scenario 'synthetic': {name}: must be ")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("", "seed", -1, "seed = -1: must be greater than or equal to 0"),
        ("", "seed", 2**63, "seed = 9223372036854775808: must fit into 64 bits: at most 9223372036854775807"),
        ("", "seed", True, "seed = True: must be a valid integer"),
        ("model", "layers", 0, "model.layers = 0: must be greater than or equal to 1"),
        ("model", "top_k", 1.5, "model.top_k = 1.5: must be a valid integer"),
        ("workload", "batch", 0, "workload.batch = 0: must be greater than or equal to 1"),
        ("workload", "batch", "1", "workload.batch = '1': must be a valid integer"),
        ("workload", "prefill", "some", "workload.prefill = 'some': choose one of skip, whole, chunked"),
        ("workload", "tokens", 0, "workload.tokens = 0: must be greater than or equal to 1"),
        (
            "memory",
            "scope",
            "layer",
            "memory.scope = 'layer': choose one of global, per-layer, benefit, shared (did you mean 'per-l",
        ),
        ("memory", "eviction", "lrv", "memory.eviction = 'lrv': choose one of "),
        ("memory", "gpu_budget", "25", "memory: gpu_budget = '25': write it as '25%', '4GiB' or '512experts'"),
        ("memory", "gpu_budget", "4 gib", "memory: gpu_budget = '4 gib': write it as"),
        ("memory", "gpu_budget", "-1%", "memory: gpu_budget = '-1%': write it as"),
        ("memory", "gpu_budget", 4, "memory.gpu_budget = 4: must be a valid string"),
        ("predictor", "name", "orcale", "predictor.name = 'orcale': choose one of "),
        ("predictor", "name", "orcale", "(did you mean 'oracle'?)"),
        ("predictor", "recall", 1.01, "predictor.recall = 1.01: must be less than or equal to 1"),
        ("predictor", "recall", float("nan"), "predictor.recall = nan: must be a finite number"),
        ("predictor", "latency_us", -0.5, "predictor.latency_us = -0.5: must be greater than or equal to 0"),
        ("predictor", "lane", "cpu", "predictor.lane = 'cpu': choose one of gpu, compute, host, free"),
        ("prefetch", "policy", "top", "prefetch.policy = 'top': choose one of "),
        ("prefetch", "k", 0, "prefetch.k = 0: must be greater than or equal to 1"),
        ("prefetch", "lookahead", -1, "prefetch.lookahead = -1: must be greater than or equal to 0"),
        ("prefetch", "protect", "yes", "prefetch.protect = 'yes': choose one of "),
        ("prefetch", "issue", "now", "prefetch.issue = 'now': choose one of "),
        ("dispatch", "mode", "lazy", "dispatch.mode = 'lazy': choose one of eager, graph, free"),
        ("dispatch", "router_readback", "no", "dispatch.router_readback = 'no': must be a valid boolean"),
        ("dispatch", "expert_order", "id", "dispatch.expert_order = 'id': choose one of router, resident_first"),
        ("dispatch", "expert_kernel", "one", "dispatch.expert_kernel = 'one': choose one of separate, grouped"),
        ("dispatch", "launch_queue_depth", 0, "dispatch.launch_queue_depth = 0: must be greater than or equal to 1"),
        ("copy", "discipline", "lifo", "copy.discipline = 'lifo': choose one of fifo, two_streams, priority (did you"),
        ("copy", "chunk_bytes", -1, "copy.chunk_bytes = -1: must be greater than or equal to 0"),
        ("copy", "drop_stale", True, "copy: drop_stale = true needs discipline = 'priority' (given 'fifo')"),
        ("parallel", "stages", 0, "parallel.stages = 0: must be greater than or equal to 1"),
        (
            "parallel",
            "split",
            "even",
            "parallel.split = 'even': choose one of equal, compute, memory, searched, or ",
        ),
        (
            "parallel",
            "split",
            [3, 0],
            "parallel.split: choose one of equal, compute, memory, searched, or give ",
        ),
        ("parallel", "split", [3, 1], "parallel: split = [3, 1]: give one number for each of the 1 stages"),
        ("parallel", "micro_batches", 2, "parallel.micro_batches = 2: must be at most workload.batch = 1"),
        ("parallel", "dispatch_threads", "two", "parallel.dispatch_threads = 'two': choose one of per-gpu, one"),
        ("copy", "host_memory", "paged", "copy.host_memory = 'paged': must be 'pinned' or 'pageable'"),
    ],
)
def test_a_bad_value_is_refused_saying_what_would_do(section: str, key: str, value: Any, message: str) -> None:
    data: dict[str, Any] = {"workload": {"trace": "t.npz"}}
    (data.setdefault(section, {}) if section else data)[key] = value
    with pytest.raises(ScenarioError) as error:
        make_scenario(data, "mine")
    assert message in str(error.value)
    assert str(error.value).startswith("mine: ") and "\n" not in str(error.value)


def test_what_is_wrong_between_sections_names_its_keys_and_the_scenario_once() -> None:
    with pytest.raises(ScenarioError) as error:
        make_scenario({"parallel": {"micro_batches": 5}, "workload": {"trace": "none"}}, "mine.toml")
    assert str(error.value).startswith("mine.toml: parallel.micro_batches = 5: must be at most workload.batch = 1")


@pytest.mark.parametrize("data", [[], None, 3])
def test_what_is_no_scenario_at_all_is_refused(data: Any) -> None:
    with pytest.raises(ScenarioError, match=r"^mine.toml: .*: must be a table of keys, such as seed$"):
        make_scenario(data, "mine.toml")


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"predictor": {"lane": "host"}}, "predictor.lane = 'host'"),
        ({"copy": {"discipline": "priority"}}, "copy.discipline = 'priority'"),
        ({"copy": {"host_memory": "pageable"}}, "copy.host_memory = 'pageable'"),
        ({"tiers": {"host_budget": "50%"}}, "tiers.host_budget = '50%'"),
        ({"miss": {"policy": "cpu"}}, "miss.policy = 'cpu'"),
        ({"parallel": {"gpus": 2, "remote": "peer"}}, "parallel.remote = 'peer'"),
    ],
)
def test_the_gpu_issues_no_copies_that_take_the_host(sections: dict[str, Any], says: str) -> None:
    data = {"workload": {"trace": "none"}, "prefetch": {"issued_by": "gpu"}}
    make_scenario(data)
    with pytest.raises(ScenarioError) as error:
        make_scenario({**data, **sections})
    assert str(error.value) == (
        f"scenario: prefetch.issued_by = 'gpu' with {says}: these are made by the host, and the GPU issues plain "
        "copies behind its own guesses alone: leave them out, or set prefetch.issued_by = 'host'"
    )


def test_all_problems_are_told_at_once() -> None:
    data = {"workload": {"trace": "t", "batch": 0}, "prefetch": {"polcy": "none"}, "sed": 1}
    with pytest.raises(ScenarioError) as error:
        make_scenario(data)
    said = str(error.value)
    assert all(part in said for part in ("workload.batch = 0", "prefetch.polcy: no such key", "sed: no such key"))


@pytest.mark.parametrize(
    "workload", ["", '[workload]\ntrace = "t"\n[workload.synthetic]\ntokens = 3\n', "[workload]\n"]
)
def test_a_workload_is_a_trace_or_a_synthetic_one(tmp_path: Path, workload: str) -> None:
    with pytest.raises(ScenarioError, match="workload: "):
        load_scenario(toml(tmp_path, workload))


@pytest.mark.parametrize("setting", ["prefetch.protect=none", "prefetch.issue=before_launch"])
def test_dropping_what_a_visit_brought_needs_to_know_the_visit(setting: str) -> None:
    load_scenario("synthetic", ["memory.caching=false"])
    with pytest.raises(
        ScenarioError,
        match=r"memory\.caching = false with prefetch\.\w+ = '\w+': without caching, an expert is dropped",
    ):
        load_scenario("synthetic", ["memory.caching=false", setting])


def test_a_file_that_is_not_there_or_not_text_or_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"none\.toml': cannot be read: No such file or directory"):
        load_scenario(tmp_path / "none.toml")
    with pytest.raises(ScenarioError, match=r"s\.toml': not TOML: .* \(at line 2, column 8\)"):
        load_scenario(toml(tmp_path, "# Mine.\nseed = x\n"))
    (tmp_path / "s.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ScenarioError, match="not UTF-8 text"):
        load_scenario(tmp_path / "s.toml")
    with pytest.raises(ScenarioError, match=r"scenario = 'sped': choose one of .* \(did you mean 'speed'\?\)"):
        load_scenario("sped")


# Budgets.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25%", 8 * (30 + 10) // 4),  # of 8 experts in each of two layers, of 30 and of 10 bytes
        ("100%", 320),
        ("12.5%", 40),
        ("0.1%", 0),  # rounded down: the manager refuses what holds no expert
        ("3experts", 90),  # room for any three: of the largest
        ("2.5experts", 75),
        ("7B", 7),
        ("1KiB", 1024),
        ("1.5MiB", MIB + MIB // 2),
        ("4GiB", 4 * 2**30),
        ("1TiB", 2**40),
        ("2KB", 2000),
        ("3MB", 3 * 10**6),
        ("4 GB", 4 * 10**9),
        (" 25 % ", 80),
    ],
)
def test_a_budget_reads(text: str, expected: int) -> None:
    assert parse_budget(text, [30, 10], 8) == expected


@pytest.mark.parametrize(
    "text", ["", "25", "%", "-1%", "1e3B", "4Gib", "4 gigabytes", "1,5GiB", "25%%", "experts", ".5%"]
)
def test_a_budget_that_does_not_read_is_refused(text: str) -> None:
    with pytest.raises(ScenarioError) as error:
        parse_budget(text, [1], 1)
    assert str(error.value) == f"budget {text!r}: write it as '25%', '4GiB' or '512experts'"


@given(st.integers(0, 10**5), st.integers(0, 9), st.lists(st.integers(1, 10**12), min_size=1), st.integers(1, 512))
def test_a_percentage_is_exact_at_any_size(whole: int, tenths: int, sizes: list[int], experts: int) -> None:
    # In integers: floats would lose bytes of models beyond 2^53 bytes x percent.
    text, budget_bytes = f"{whole}.{tenths}%", (10 * whole + tenths) * sum(sizes) * experts // 1000
    if budget_bytes <= MOST_BYTES:
        assert parse_budget(text, sizes, experts) == budget_bytes
    else:
        with pytest.raises(ScenarioError, match="more than any machine has"):
            parse_budget(text, sizes, experts)


def test_a_budget_of_an_exbibyte_reads_and_a_byte_more_does_not() -> None:
    assert parse_budget("100%", [MOST_BYTES], 1) == MOST_BYTES
    with pytest.raises(ScenarioError, match=f"^budget '100%': more than any machine has: at most {MOST_BYTES} bytes$"):
        parse_budget("100%", [MOST_BYTES + 1], 1)


def test_bytes_are_bytes_not_shares() -> None:
    assert parse_bytes("24GiB") == 24 * 2**30
    for text in ("25%", "3experts", "24"):
        with pytest.raises(ScenarioError, match="write bytes as '24GiB'"):
            parse_bytes(text)


# --set.


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("seed=7", ("seed",), 7),
        (" prefetch.lookahead = 3 ", ("prefetch", "lookahead"), 3),
        ("memory.gpu_budget=50%", ("memory", "gpu_budget"), "50%"),
        ("predictor.recall=1", ("predictor", "recall"), 1.0),
        ("predictor.name=previous-token", ("predictor", "name"), "previous-token"),
        ('predictor.name="oracle"', ("predictor", "name"), "oracle"),
        ("dispatch.router_readback=false", ("dispatch", "router_readback"), False),
        ("workload.synthetic.tokens=9", ("workload", "synthetic", "tokens"), 9),
        ("copy.host_memory=pinned", ("copy", "host_memory"), "pinned"),
        ("copy.chunk_bytes=4_194_304", ("copy", "chunk_bytes"), 4 * MIB),
    ],
)
def test_a_setting_is_read_as_toml_or_else_as_a_bare_string(setting: str, path: tuple[str, ...], value: Any) -> None:
    assert dict(leaves(load_scenario("synthetic", [setting]).plain()))[path] == value


def test_a_setting_changes_nothing_else() -> None:
    changed = dict(leaves(load_scenario("synthetic", ["prefetch.lookahead=3"]).plain()))
    assert {path for path, value in leaves(FULL) if changed[path] != value} == {("prefetch", "lookahead")}


def test_a_trace_set_from_outside_takes_the_place_of_the_synthetic_one() -> None:
    workload = load_scenario("synthetic", ["workload.trace=there/t.npz"]).workload
    assert (workload.trace, workload.synthetic) == ("there/t.npz", None)


@pytest.mark.parametrize("setting", ["seed", "=3", "a..b=3", ".seed=1"])
def test_a_setting_that_does_not_read_is_refused(setting: str) -> None:
    with pytest.raises(ScenarioError, match=r"write it as section\.key=value"):
        load_scenario("synthetic", [setting])


def test_a_value_is_not_a_section() -> None:
    with pytest.raises(ScenarioError, match=r"seed.x: 'seed' is a value, not a section"):
        load_scenario("synthetic", ["seed=1", "seed.x=3"])
    with pytest.raises(ScenarioError, match=r"memory = 3: must be a section, such as memory\.gpu_budget"):
        load_scenario("synthetic", ["memory=3"])


# Files.


def test_a_trace_named_in_a_file_lies_beside_it(tmp_path: Path) -> None:
    assert load_scenario(toml(tmp_path, TRACE)).workload.trace == str(tmp_path / "t.npz")
    absolute = tmp_path / "elsewhere" / "t.npz"
    assert load_scenario(toml(tmp_path, f"[workload]\ntrace = {str(absolute)!r}\n")).workload.trace == str(absolute)


def test_what_a_scenario_says_of_itself_is_that_scenario() -> None:
    for name in scenario_names():
        scenario = load_scenario(name)
        assert make_scenario(scenario.plain()) == scenario


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    scenario = load_scenario(toml(tmp_path, TRACE))
    assert scenario == Scenario.model_validate({"workload": {"trace": str(tmp_path / "t.npz")}})
    assert (scenario.memory.gpu_budget, scenario.prefetch.lookahead, scenario.copy_.discipline) == ("25%", 1, "fifo")


def test_a_scenario_never_changes() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_scenario().seed = 1


# Everything shipped.


@pytest.mark.parametrize("name", scenario_names())
def test_every_shipped_scenario_loads_and_fits_together(name: str) -> None:
    inputs = load_inputs(load_scenario(name, ["workload.tokens=3"]))
    assert inputs.layer_visits >= inputs.model.layers
    assert inputs.budget_bytes >= max(inputs.model.expert_bytes)


def test_without_a_name_the_default_is_loaded() -> None:
    assert load_scenario() == load_scenario("default")
    assert {"default", "gpt-oss-20b", "speed"} <= set(scenario_names())


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("preset", preset_names())
def test_every_model_runs_on_every_machine_as_far_as_its_inputs(preset: str, profile: str) -> None:
    synthetic = ["workload.synthetic.tokens=2", "workload.synthetic.working_set=none"]
    small = [*synthetic, "workload.synthetic.sequences=1", "workload.synthetic.prefill_tokens=0", "workload.tokens=2"]
    settings = [*small, f"model.preset={preset}", f"machine.profile={profile}", "memory.capacity=ignore"]
    inputs = load_inputs(load_scenario("synthetic", settings))
    assert (inputs.model.name, inputs.profile.name) == (preset, profile)
    assert inputs.trace.experts.shape == (2, inputs.model.layers, inputs.model.top_k)


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ("copy.chunk_bytes=4MiB", 4 * 2**20),
        ("copy.chunk_bytes=4194304", 4 * 2**20),
        ("copy.chunk_bytes=1e6", 10**6),
        ("tiers.chunk_bytes=1.5KiB", 1536),
        ("model.expert_bytes=27MiB", 27 * 2**20),
        ("memory.total_bytes=1024", "1024B"),
        ("memory.workspace_bytes=2TB", "2TB"),
        ("parallel.replica_bytes=8", "8B"),
        ("parallel.spare_bytes=1GiB", "1GiB"),
        ("miss.cpu_gb_per_s=60GB/s", 60.0),
        ("compression.decompress_gb_per_s=2000MB/s", 2.0),
    ],
)
def test_every_size_and_rate_takes_a_unit_or_a_plain_number(setting: str, kept: object) -> None:
    section, _, key = setting.partition("=")[0].partition(".")
    assert load_scenario("synthetic", [setting]).plain()[section][key] == kept


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("copy.chunk_bytes=4Mb", "copy.chunk_bytes = '4Mb': write it as a whole number of bytes, or as '24GiB'"),
        ("copy.chunk_bytes=1.5", "copy.chunk_bytes = 1.5: must be a valid integer"),
        ("tiers.chunk_bytes=25%", "tiers.chunk_bytes = '25%': write it as a whole number of bytes"),
        (
            "memory.gpu_budget=4294967296",
            "gpu_budget = 4294967296: must be a valid string with its unit: write it as '25%', '4GiB'",
        ),
        (
            "tiers.host_budget=16",
            "tiers.host_budget = 16: must be a valid string with its unit: write it as 'all', '50%'",
        ),
        ("memory.total_bytes=-1", "memory.total_bytes = -1: must be a valid string"),
        ("miss.cpu_gb_per_s=60GB", "miss.cpu_gb_per_s = '60GB': write it as a number of GB/s, or as '55.3GB/s'"),
        ("memory.gpu_budget=" + "9" * 5000 + "GiB", "write it as '25%', '4GiB' or '512experts'"),
    ],
)
def test_a_size_that_does_not_read_is_refused_with_one_that_would(setting: str, message: str) -> None:
    with pytest.raises(ScenarioError) as error:
        load_scenario("synthetic", [setting])
    assert message in str(error.value)


# Taking keys out.


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        (["prefetch.k=3", "prefetch.k="], "prefetch.k", None),
        (["prefetch.k=3", "prefetch.k=none"], "prefetch.k", None),
        (["seed=7", "seed="], "seed", 0),
        (["memory.eviction=lfu", 'memory.eviction=""'], "memory.eviction", "lru"),
        (["workload.tokens=9", "workload.tokens=none"], "workload.tokens", None),
        (["prefetch.policy=none"], "prefetch.policy", "none"),  # a name of its own
        (["compression.mixed=none"], "compression.mixed", None),
        (["copy.chunk_bytes=4096", "copy="], "copy.chunk_bytes", 0),
        (["parallel.stages="], "parallel.stages", 1),
    ],
)
def test_a_key_without_a_value_has_its_default_again(settings: list[str], key: str, value: Any) -> None:
    section: Any = load_scenario("synthetic", settings).plain()
    for part in key.split("."):
        section = section[part]
    assert section == value


@pytest.mark.parametrize("nothing", ["", "none"])
def test_without_its_trace_a_workload_is_drawn(nothing: str) -> None:
    assert load_scenario("guide").workload.trace == "guide"
    workload = load_scenario("guide", [f"workload.trace={nothing}"]).workload
    assert (workload.trace, workload.synthetic) == (None, SyntheticSection())
    kept = load_scenario("synthetic", [f"workload.trace={nothing}"]).workload.synthetic
    assert kept == load_scenario("synthetic").workload.synthetic


@pytest.mark.parametrize("setting", ["workload.trcae=", "wrkload.trace=none", "prefetch.policy.x="])
def test_a_key_that_does_not_exist_cannot_be_taken_out(setting: str) -> None:
    with pytest.raises(ScenarioError, match=r"no such key|is a value, not a section"):
        load_scenario("synthetic", [setting])


def test_a_grid_may_take_a_key_out() -> None:
    grid = make_grid("synthetic", {"workload.tokens": ["none", 5]})
    assert [grid.scenario(point).workload.tokens for point in grid.points()] == [None, 5]
    over = make_grid("guide", {"workload.synthetic.tokens": [10, 20]})  # in place of its trace
    assert [grid.scenario(point).workload.synthetic for grid, point in [(over, next(over.points()))]] == [
        SyntheticSection(tokens=10)
    ]
