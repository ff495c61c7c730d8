"""What following advice would have cost, on settings of llama.cpp that were measured: `python tests/advice_regret.py`.

    llama-bench -m MODEL.gguf -ncmoe 0,2,4,8 -t 4,8,16 -ub 128,512,2048 -p 2048 -n 64 -o jsonl > grid.jsonl
    python tests/advice_regret.py grid.jsonl --profile h200 --cpu-gb-per-s 97

measures a whole grid on a machine, and prints for each file of it, and each number of layers that must stay on the CPU
at least: the setting that advice takes, how much slower it was than the best measured one, and how much slower the
least number of layers at the runtime's own defaults was, which is what `--fit` chooses. Where the file has rows of
`--fit` itself, it prints what they came to, and the best of the grid beside it. Without a file it reads what
llama-bench took on an H200 (calibration/samples/h200-runtimes): of a few layers, or, with --whole, of whole models.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from prestage.calibration.observe.reality import BENCH, BENCHED, CPU_GB_PER_S, SAMPLES
from prestage.experiments.advice_space import Request, make_space
from prestage.experiments.advise import Evaluator
from prestage.output.markdown import table

GOAL = "tokens_per_second"
#: Grids of whole models: n-cpu-moe, threads and micro-batch (calibration/measure_advice.sh).
GRID, GRID_PROMPT = SAMPLES / "llama-grid.jsonl.gz", 2048
MACHINE = ("machine.profile=h200", f"miss.cpu_gb_per_s={CPU_GB_PER_S}")
#: Tokens of an answer; the prompt is the one that was measured.
OUTPUT = 128
KEYS = ("memory.cpu_layers", "miss.cpu_threads", "workload.chunk_tokens", "copy.host_memory")


class Setting(NamedTuple):
    """What llama-bench was told."""

    cpu_layers: int
    threads: int
    micro_batch: int
    host_memory: str


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """Yields llama-bench's rows, printed by it or kept by `calibration.llama_cpp.bench`."""
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
    for line in filter(None, text.splitlines()):
        row = json.loads(line)
        yield from row.get("rows", ()) if "model_filename" not in row else (row,)


def model_of(name: str) -> str:
    """Returns the file of shapes of a GGUF file's model, by the beginnings of their names."""
    known = [shapes.stem for shapes in (SAMPLES / "models").glob("*.toml") if name.startswith(shapes.stem)]
    return max(known, key=len)


def measured(file: Path, prompt: int, *, by_fit: bool = False) -> dict[str, dict[Setting, float]]:
    """Returns tokens a second of a whole request by model file and setting, from medians of both halves.

    With `by_fit`, of the rows whose layers `--fit` chose.
    """
    halves: dict[tuple[str, Setting, bool], list[float]] = defaultdict(list)
    for row in rows_of(file):
        if (
            bool(row["fit_target"]) == by_fit
            and row["n_depth"] == 0
            and (row["n_prompt"] == prompt) != (row["n_gen"] > 0)
        ):
            memory = "pinned" if row["load_mode"] == "none" else "pageable"
            setting = Setting(row["n_cpu_moe"], row["n_threads"], row["n_ubatch"], memory)
            halves[row["model_filename"], setting, row["n_gen"] > 0].append(row["avg_ts"])
    found: dict[str, dict[Setting, float]] = defaultdict(dict)
    for name, setting, generates in halves:
        if not generates and (name, setting, True) in halves:
            both = median(halves[name, setting, False]), median(halves[name, setting, True])
            found[name][setting] = OUTPUT / (prompt / both[0] + OUTPUT / both[1])
    return found


def predicted(name: str, settings: list[Setting], machine: list[str], prompt: int) -> dict[Setting, float]:
    """Returns what each setting of a file is predicted to come to, on a machine as scenarios name it."""
    given = ["runtime.name=llama.cpp", f"model.preset={SAMPLES / 'models' / model_of(name)}.toml", *machine]
    over = {key: sorted(set(values)) for key, values in zip(KEYS, zip(*settings, strict=True), strict=True)}
    space = make_space("synthetic", given, over=over, request=Request(prompt, OUTPUT))
    evaluate = Evaluator(space, [GOAL])
    return {setting: evaluate(dict(zip(KEYS, setting, strict=True)))[GOAL] for setting in settings}


def regret(file: Path = BENCH, prompt: int = 512, machine: Sequence[str] = MACHINE, *, whole: bool = False) -> str:
    """The table, as Markdown; `whole`: the files have all layers of their models."""
    rows = []
    for name, speeds in sorted(measured(file, prompt).items()):
        layers = [] if whole else [f"model.layers={BENCHED[model_of(name)]}"]
        guesses = predicted(name, list(speeds), [*machine, *layers], prompt)
        for least in sorted({setting.cpu_layers for setting in speeds}):
            able = [setting for setting in speeds if setting.cpu_layers >= least]
            advised, best = max(able, key=guesses.__getitem__), max(speeds[setting] for setting in able)
            fit = min(able, key=_as_fit_would)
            said = f"{advised.cpu_layers} layers, {advised.threads} threads, "
            said += f"micro-batch {advised.micro_batch}" if whole else advised.host_memory
            lost = [f"{1 - speeds[setting] / best:.1%}" for setting in (advised, fit)]
            rows.append([model_of(name), str(least), str(len(able)), said, *lost])
    head = ["model", "layers on the CPU, at least", "settings", "advice", "slower than the best", "`--fit` slower"]
    return table(head, rows)


def whole_models() -> str:
    """The same of whole models, over layers, threads and micro-batch."""
    return regret(GRID, GRID_PROMPT, whole=True)


def beside_fit(file: Path = GRID, prompt: int = GRID_PROMPT) -> str:
    """What `--fit` itself came to, by micro-batch, beside the best of the grid, as Markdown."""
    grid, rows = measured(file, prompt), []
    for name, speeds in sorted(measured(file, prompt, by_fit=True).items()):
        best = max(grid[name], key=grid[name].__getitem__)
        for setting, speed in sorted(speeds.items(), key=lambda each: each[0].micro_batch):
            told = f"{best.cpu_layers} layers, {best.threads} threads, micro-batch {best.micro_batch}"
            rows.append([model_of(name), str(setting.micro_batch), f"{speed:.1f}", told, f"{grid[name][best]:.1f}"])
    return table(["model", "micro-batch", "`--fit`, tokens/s", "best of the grid", "tokens/s"], rows)


def _as_fit_would(setting: Setting) -> tuple[object, ...]:
    """Returns what orders settings as `--fit` does: fewest layers, else the defaults."""
    return setting.cpu_layers, -setting.threads, abs(setting.micro_batch - 512), setting.host_memory


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--profile", default="h200")
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--cpu-gb-per-s", type=float, default=CPU_GB_PER_S)
    parser.add_argument("--whole", action="store_true", help="the files have all layers of their models")
    options = parser.parse_args()
    file = options.file or (GRID if options.whole else BENCH)
    prompt = options.prompt or (GRID_PROMPT if options.whole else 512)
    machine = [f"machine.profile={options.profile}", f"miss.cpu_gb_per_s={options.cpu_gb_per_s}"]
    print(regret(file, prompt, machine, whole=options.whole))
    if measured(file, prompt, by_fit=True):
        print("\n" + beside_fit(file, prompt))


if __name__ == "__main__":
    main()
