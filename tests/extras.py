"""Each extra alone: the wheel with it in an empty environment, without the repository, and the command that needs it.

    python tests/extras.py [EXTRA …] [--python PYTHON …] [--pip OPTION …] [--write]

builds the wheel from a clean copy of what git tracks, installs it into a new environment of each Python, and prints a
table: what each extra brought, what `pip check` said, and whether its command ran there, and how it refused without it.
With --write the table of docs/dependencies.md has these rows, in place of those of the same Python and extra.
Exit status 1 if anything failed. `core` is the wheel without any extra. Packages are fetched if they are not here.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from dependencies import EXTRAS, FOR_TESTS

from prestage.output.markdown import table

ROOT = Path(__file__).parent.parent
_RUN = "prestage run guide --set workload.tokens=20 --no-baselines"
_CLUSTER = """
python -m dask scheduler --host 127.0.0.1 --port 18786 --no-dashboard > scheduler 2>&1 & S=$!
python -m dask worker tcp://127.0.0.1:18786 --host 127.0.0.1 --nthreads 1 --no-nanny --no-dashboard > worker 2>&1 & W=$!
trap 'kill $S $W' EXIT
prestage sweep guide --grid prefetch.k=1,2 --set workload.tokens=20 -o rows.jsonl --cluster tcp://127.0.0.1:18786
"""
_FRAME = """python -c "
import prestage
frame = prestage.simulate('guide', tokens=20).to_pandas('tokens')
assert len(frame) > 0, frame
" """
_MODEL = """python -c "
import torch, transformers
from tokenizers import Tokenizer, models, pre_tokenizers
words = {'<unk>': 0, **{f'w{n}': n for n in range(1, 60)}}
text = Tokenizer(models.WordLevel(words, unk_token='<unk>'))
text.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
transformers.PreTrainedTokenizerFast(tokenizer_object=text, unk_token='<unk>').save_pretrained('model')
sizes = dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
config = transformers.AutoConfig.for_model('mixtral', num_key_value_heads=1, num_local_experts=8, **sizes)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained('model')
open('text.txt', 'w').write(' '.join(f'w{n}' for n in range(1, 40)))
"
prestage trace record --model model --text text.txt --sequence-tokens 12 --prompt-tokens 5 -o t.safetensors
prestage trace info t.safetensors
"""
_TEST = "pytest -q -p no:cacheprovider REPOSITORY/tests/"
#: By extra: what needs it, run by bash in an empty folder whose environment is active. REPOSITORY is a clean copy.
NEEDS = {
    "core": f"{_RUN} -o out && prestage report out -o r.html && prestage reproduce published --source colibri",
    "advise": "prestage advise gpt-oss-20b --gpu rtx3060 --ram '2x DDR4-3200' --runtime llama.cpp --trials 12",
    "cluster": _CLUSTER,
    "docs": "cp -r REPOSITORY site && cd site && mkdocs build --strict -q -d built && ls built/index.html",
    "machine": 'prestage machine detect && prestage doctor && python -c "import psutil, cpuinfo"',
    "notebook": _FRAME,
    "parquet": "prestage sweep guide --grid prefetch.k=1,2 --set workload.tokens=20 -o rows.parquet && ls rows.parquet",
    "record": _MODEL,
    "test": _TEST + "test_eviction.py",
    "timeline-test": 'python -c "import pandas, plotly, psutil, yaml, playwright, viztracer" && prestage doctor',
}
#: By extra: what that command does, as the page says it.
DOES = {
    "core": "`run`, `report`, `reproduce`", "advise": "`advise` finds settings", "docs": "the site, `--strict`",
    "cluster": "a sweep on a Dask scheduler and worker", "machine": "`machine detect`, `doctor`",
    "notebook": "`to_pandas`", "parquet": "a sweep to `rows.parquet`", "record": "`trace record` of a tiny Mixtral",
    "test": "`pytest tests/test_eviction.py`", "timeline-test": "what it brings is imported, `doctor`",
}  # fmt: skip
PAGE = ROOT / "docs" / "dependencies.md"
_COLUMNS = ["Python", "extra", "packages", "pip check", "with it", "without it"]
_MARKED = re.compile(r"(<!-- tests/extras\.py -->\n)(.*?)(\n<!-- end -->)", re.DOTALL)
#: By extra: what refuses without it, if not the same.
WITHOUT = NEEDS | {
    "cluster": _CLUSTER.strip().splitlines()[-1],
    "record": "echo w1 > text.txt && prestage trace record --model m --text text.txt -o t.safetensors",
}
#: Extras whose command is another's, or nobody's, without them: nothing refuses.
_NO_REFUSAL = ("core", "docs", "machine", *FOR_TESTS)


def tracked() -> list[Path]:
    """Returns what git tracks and what is new, as paths below the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def wheel(python: str, folder: Path) -> tuple[Path, Path]:
    """Returns the wheel of what is here, changes included, and the folder of the copy that it is made of."""
    copy = folder / "repository"
    for path in tracked():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(copy)]
    subprocess.run(command, check=True)
    (found,) = folder.glob("prestage-*.whl")
    return found, copy


def bash(environment: Path, folder: Path, command: str) -> tuple[bool, str]:
    """Returns whether a command ended well in a folder with an environment active, and what it said last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = f"export PATH={environment}/bin:$PATH VIRTUAL_ENV={environment}; unset PYTHONPATH; set -e\n"
    script = ["bash", "-c", path + command]
    done = subprocess.run(script, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return done.returncode == 0, said[-1] if said else ""


def tried(python: str, extras: list[str], pip: list[str], folder: Path) -> list[list[str]]:
    """Returns a row for each extra, which has an environment of its own: the core is installed once, and copied."""
    made, repository = wheel(python, folder)
    core = folder / "core"
    subprocess.run([python, "-m", "venv", str(core)], check=True)
    began = perf_counter()
    install(core, str(made), pip)
    seconds, rows = perf_counter() - began, []
    version = bash(core, folder / "work", "python -c 'import platform; print(platform.python_version())'")[1]
    for extra in extras:
        environment = folder / "environment"
        command = NEEDS[extra].replace("REPOSITORY", str(repository))
        refused = "" if extra in _NO_REFUSAL else refusal(core, folder, WITHOUT[extra], extra)
        before = packages(core)
        copied(core, environment)
        if extra != "core":
            began = perf_counter()
            install(environment, f"{made}[{extra}]", pip)
            seconds = perf_counter() - began
        brought = len(packages(environment)) - (len(before) if extra != "core" else 0)
        clean, said = bash(environment, folder / "work", "python -m pip check")
        ran, last = bash(environment, folder / "work", command)
        cells = [
            f"{seconds:.0f} s",
            "clean" if clean else f"failed: {said}",
            "ran" if ran else f"failed: {last}",
            refused,
        ]
        rows.append([version, f"`{extra}`", str(brought), *cells])
        print(rows[-1], file=sys.stderr, flush=True)
        shutil.rmtree(environment)
    return rows


def install(environment: Path, what: str, pip: list[str]) -> None:
    """Install with the committed versions; the environment's own pip does it, whose scripts may be another's."""
    constraints = str(ROOT / "constraints.txt")
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "-qq", "-c", constraints, *pip, what]
    subprocess.run(command, check=True)


def refusal(core: Path, folder: Path, command: str, extra: str) -> str:
    """Returns how the core alone refuses a command: it must name the extra."""
    ran, said = bash(core, folder / "work", command)
    if not ran and f"prestage[{extra}]" in said:
        return f"names `prestage[{extra}]`"
    return f"failed: {said}" if not ran else "failed: ran without it"


def packages(environment: Path) -> list[str]:
    """Returns the packages of an environment."""
    command = [str(environment / "bin" / "python"), "-m", "pip", "list", "--format=freeze"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def copied(core: Path, environment: Path) -> None:
    """Copy an environment by links to its files; its programs are to start the copy's own Python."""
    shutil.copytree(core, environment, symlinks=True, copy_function=_link)
    for program in (environment / "bin").iterdir():
        if program.is_file() and program.read_bytes().startswith(f"#!{core}/".encode()):
            text = program.read_text(encoding="utf-8").replace(f"#!{core}/", f"#!{environment}/", 1)
            program.unlink()
            program.write_text(text, encoding="utf-8")
            program.chmod(0o755)


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def on_page(rows: list[list[str]], page: str) -> str:
    """Returns a page whose table has rows of `tried`, each in the place of the one of its Python and extra."""
    found = _MARKED.search(page)
    assert found is not None
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[2].splitlines()[2:]]
    kept = {(line[0], line[1]): line for line in lines}
    for version, extra, brought, _, clean, ran, without in rows:
        does = DOES[extra.strip("`")] if ran == "ran" else ran
        kept[version, extra] = [version, extra, brought, clean, does, without]
    return _MARKED.sub(lambda match: match[1] + table(_COLUMNS, [*kept.values()]) + match[3], page)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", help="core, or an extra of setup.cfg; all without one")
    parser.add_argument("--python", action="append", help="another Python, once for each")
    parser.add_argument("--pip", action="append", default=[], help="an option of pip install, such as --pip=--no-index")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    rows = []
    for python in given.python or [sys.executable]:
        with tempfile.TemporaryDirectory() as folder:
            rows += tried(python, given.extras or ["core", *EXTRAS, *FOR_TESTS], given.pip, Path(folder))
    if given.write:
        PAGE.write_text(on_page(rows, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(table(["Python", "extra", "packages", "installed in", "pip check", "its command", "without it"], rows))
    sys.exit(any("failed" in cell for row in rows for cell in row))


if __name__ == "__main__":
    main()
