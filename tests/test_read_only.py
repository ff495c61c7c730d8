"""Every command where nothing but the working folder and temporary files can be written: as in a container."""

from __future__ import annotations

import compileall
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from numba.core.caching import _CacheLocator
from test_cli import LOG, PROFILED
from test_suite import DEFINITION
from test_terminal import commands  # type: ignore[import-not-found]

ROOT = Path(__file__).parent.parent
#: A small run, and what is made of it before the commands are tried.
SMALL = ["--set", "model.layers=3", "--set", "workload.tokens=4", "--set", "workload.synthetic.tokens=8"]
SMALL += ["--set", "workload.synthetic.prefill_tokens=2"]
CAPACITY = ["--set", "model.layers=2", "--set", "requests.count=6", "--set", "requests.prompt_tokens=4"]
CAPACITY += ["--set", "requests.output_tokens=2", "--replicates", "1", "--precision", "0.9"]
PREPARED = [
    ["trace", "synth", "--model", "olmoe-1b-7b", "--tokens", "30", "--sequences", "3", "-o", "t.npz"],
    ["run", "synthetic", *SMALL, "--out", "run", "--stream", "stream"],
    ["sweep", "synthetic", *SMALL, "--grid", "prefetch.lookahead=0,1", "--workers", "2", "-o", "s.jsonl"],
    ["predictor", "train", "t.npz", "-o", "weights", "--epochs", "1"],
]
MEASURED = sorted((ROOT / "calibration" / "validation" / "h200" / "validation").glob("*.json.gz"))[0]
CONFIG = str(ROOT / "tests" / "data" / "configs" / "OLMoE-1B-7B-0924.json")
#: Arguments by command; those that are refused with 2 want a GPU, a model or a log that is not there.
TRIED: dict[tuple[str, ...], tuple[list[str], int]] = {
    ("compile",): ([], 0),
    ("doctor",): ([], 0),
    ("show",): (["gpt-oss-20b", "--runtime", "llama.cpp", "--gpu", "rtx4090", "--ram", "64GB DDR5-5600"], 0),
    ("machine", "list"): ([], 0),
    ("machine", "show"): (["gpu=rtx4090"], 0),
    ("machine", "make"): (["--gpu", "rtx4090", "-o", "machine.json"], 0),
    ("machine", "detect"): ([], 0),
    ("machine", "shares"): ([], 0),
    ("model", "list"): ([], 0),
    ("model", "show"): (["gpt-oss-120b"], 0),
    ("model", "import"): ([CONFIG, "-o", "model.toml"], 0),
    ("model", "check"): (["gpt-oss-120b"], 0),
    ("trace", "map"): (["t.npz", "--model", "mixtral-8x7b", "-o", "mapped.npz"], 0),
    ("calibrate", "check-kernels"): (["none.json"], 2),
    ("calibrate", "served"): (["none.json"], 2),
    ("calibrate", "fit-beside"): (["none.json", "-o", "profile.json"], 2),
    ("plot",): (["time", "run", "-o", "time.png"], 0),
    ("report",): (["run", "-o", "report.html"], 0),
    ("list",): (["evictions"], 0),
    ("topology",): (["h200-hgx-x8", "-o", "machine.svg"], 0),
    ("compare",): (["run", "run/result.json", "--plot", "fall.png"], 0),
    ("breakeven",): (["synthetic", *SMALL], 0),
    ("advise",): (["synthetic", *SMALL, "--over", "prefetch.lookahead=0,1", "--trials", "2", "--prompt", "4"], 0),
    ("capacity",): (["synthetic", "--slo", "ttft_ms=1", *CAPACITY], 0),
    ("replay",): (["t.npz", "--budget", "25%", "--eviction", "sieve"], 0),
    ("reproduce",): (["transfers"], 0),
    ("mrc",): (["t.npz", "--points", "4", "-o", "mrc.csv"], 0),
    ("suite",): (["small.toml", "--quick", "--workers", "1", "-o", "suite"], 0),
    ("trace", "info"): (["t.npz"], 0),
    ("trace", "import"): (["log.route.csv", "-o", "imported.npz"], 0),
    ("trace", "record"): (["--model", "none", "--text", "log.route.csv", "-o", "recorded.npz"], 2),
    ("trace", "fit"): (["log.route.csv"], 2),
    ("calibrate", "measure"): ([], 2),
    ("calibrate", "fit"): ([str(ROOT / "calibration" / "samples" / "h200.json"), "-o", "mine.json"], 0),
    ("calibrate", "fit-run"): (["phone", "none.log", "--tokens", "3", "-o", "p.json"], 2),
    ("calibrate", "check-run"): (["phone", "none.log", "--after", "3"], 2),
    ("calibrate", "decode"): (["none", "-o", "decoded"], 2),
    ("calibrate", "observe"): (["none.json", "--runtime", "llama.cpp", "-o", "mine.toml"], 2),
    ("calibrate", "execute"): (["validation", "-o", "executed"], 2),
    ("calibrate", "validate"): (["--profile", "h200", "--measured", str(MEASURED), "-o", "validation"], 0),
    ("benchmark", "transfer"): (["--profile", "h200", "-o", "transfer.png"], 0),
    ("predictor", "measure"): (["weights"], 0),
    ("predictor", "evaluate"): (["t.npz", "--weights", "weights"], 0),
    ("timeline", "import"): ([str(PROFILED), "-o", "timeline.json.gz"], 0),
    ("timeline", "summary"): (["run/timeline.json.gz"], 0),
    ("timeline", "late"): (["run"], 0),
}
Restricted = Callable[..., subprocess.CompletedProcess[str]]


def heed_modes() -> None:
    """Take from root, in a process to come, the right to write where modes forbid it (CAP_DAC_OVERRIDE)."""
    drop_from_bounding_set, dac_override = 24, 1
    if os.getuid() == 0 and ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0):
        raise PermissionError("root may write everywhere here")


def keep_machine_code(package: Path, kept: Path) -> None:
    """Copy what was compiled for these tests to where the copied package keeps it, all but the engine's loop.

    So `compile` has something to compile and to keep, and takes some seconds instead of a minute.
    """
    kept.mkdir(mode=0o700)
    for path in ROOT.glob("**/__pycache__/*.nb[ic]"):
        source = package / path.parent.parent.relative_to(ROOT) / f"{path.name.partition('.')[0]}.py"
        if source.exists() and source.stem != "compiled_loop":
            folder = kept / str(_CacheLocator.get_suitable_cache_subpath(str(source)))  # type: ignore[no-untyped-call]
            folder.mkdir(exist_ok=True)
            shutil.copy2(path, folder)


@pytest.fixture(scope="module")
def restricted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restricted]:
    """`prestage ARGUMENTS…` of a copy that cannot be written, by who has no home."""
    base = tmp_path_factory.mktemp("read-only")
    package = base / "lib" / "prestage"
    skipped = shutil.ignore_patterns("__pycache__", ".*", "tests", "docs", "samples", "validation", "build")
    shutil.copytree(ROOT, package, ignore=skipped)
    compileall.compile_dir(package, quiet=1)  # as an installer does
    for name in ("work", "tmp"):
        (base / name).mkdir()
    (base / "home").mkdir()
    for path in (*package.rglob("*"), package, base / "lib", base / "home"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (base / "work" / "log.route.csv").write_text(LOG)
    (base / "work" / "small.toml").write_text(DEFINITION)
    unset = {"NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "PYTHONDONTWRITEBYTECODE"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(base / "home"), "TMPDIR": str(base / "tmp"), "PYTHONPATH": str(base / "lib")}

    def call(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command, cwd=base / "work", env={**environment, **more}, capture_output=True, text=True,
                preexec_fn=heed_modes,
            )  # fmt: skip
        except subprocess.SubprocessError:
            pytest.skip("nothing keeps this user from writing")

    if call("touch", str(package / "here"), str(base / "home" / "here")).returncode == 0:
        pytest.skip("nothing keeps this user from writing")
    keep_machine_code(package, base / "tmp" / f"prestage-numba-{os.getuid()}")
    for arguments in PREPARED:
        ran = call(sys.executable, "-m", "prestage", *arguments)
        assert (ran.returncode, "Traceback" in ran.stderr) == (0, False), ran.stderr
    yield call
    for path in (package, *package.rglob("*"), base / "lib", base / "home"):
        if path.is_dir():
            path.chmod(0o755)


def test_every_command_is_tried() -> None:
    leaves = {tuple(names) for names in commands() if not [other for other in commands() if other[:-1] == names]}
    assert leaves == {*TRIED, ("trace", "synth"), ("run",), ("sweep",), ("predictor", "train")}


@pytest.mark.process
@pytest.mark.parametrize("command", TRIED, ids=" ".join)
def test_a_command_passes_with_a_read_only_install_and_no_home(
    command: tuple[str, ...], restricted: Restricted
) -> None:
    arguments, status = TRIED[command]
    ran = restricted(sys.executable, "-m", "prestage", *command, *arguments)
    assert "Traceback" not in ran.stderr
    assert ran.returncode == status, ran.stderr


@pytest.mark.process
def test_machine_code_is_kept_among_temporary_files_and_else_nowhere(restricted: Restricted, tmp_path: Path) -> None:
    where = "from prestage.workloads import stacks; print(stacks.next_visits._cache.cache_path)"
    kept = restricted(sys.executable, "-c", where)
    assert Path(kept.stdout.strip()).parent.name == f"prestage-numba-{os.getuid()}", kept.stderr
    (tmp_path / f"prestage-numba-{os.getuid()}").touch()  # what is there already is not this user's folder
    nowhere = restricted(sys.executable, "-c", where, TMPDIR=str(tmp_path))
    assert (nowhere.returncode, nowhere.stdout) == (0, "None\n"), nowhere.stderr
