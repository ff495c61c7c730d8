"""What following advice would have cost, on settings of llama.cpp that were measured: `python tests/advice_regret.py`.

    llama-bench -m MODEL.gguf -ncmoe 0,2,4,8 -t 4,8,16 -ub 128,512,2048 -p 2048 -n 64 -o jsonl > grid.jsonl
    python tests/advice_regret.py grid.jsonl --profile h200 --cpu-gb-per-s 97

measures a whole grid on a machine, and prints for each file of it, and each number of layers that must stay on the CPU
at least: the setting that advice takes, how much slower it was than the best measured one, and how much slower the
least number of layers at the runtime's own defaults was, which is what `--fit` chooses. Without a file it reads what
llama-bench took on an H200 (calibration/samples/h200-runtimes).
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from prestage.calibration.observe.reality import BENCHED, CPU_GB_PER_S, SAMPLES
from prestage.experiments.advice_space import Request, make_space
from prestage.experiments.advise import Evaluator
from prestage.output.markdown import table

GOAL = "tokens_per_second"
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


def measured(file: Path, prompt: int) -> dict[str, dict[Setting, float]]:
    """Returns tokens a second of a whole request by model file and setting, from medians of both halves."""
    halves: dict[tuple[str, Setting, bool], list[float]] = defaultdict(list)
    for row in rows_of(file):
        if row["n_depth"] == 0 and (row["n_prompt"] == prompt) != (row["n_gen"] > 0):
            memory = "pinned" if row["load_mode"] == "none" else "pageable"
            setting = Setting(row["n_cpu_moe"], row["n_threads"], row["n_ubatch"], memory)
            halves[row["model_filename"], setting, row["n_gen"] > 0].append(row["avg_ts"])
    found: dict[str, dict[Setting, float]] = defaultdict(dict)
    for name, setting, generates in halves:
        if not generates and (name, setting, True) in halves:
            both = median(halves[name, setting, False]), median(halves[name, setting, True])
            found[name][setting] = OUTPUT / (prompt / both[0] + OUTPUT / both[1])
    return found


def predicted(
    model: str, settings: list[Setting], profile: str, prompt: int, cpu_gb_per_s: float
) -> dict[Setting, float]:
    """Returns what each setting is predicted to come to."""
    given = [f"machine.profile={profile}", "runtime.name=llama.cpp", f"model.preset={SAMPLES / 'models' / model}.toml"]
    given += [f"model.layers={BENCHED[model]}", f"miss.cpu_gb_per_s={cpu_gb_per_s}"]
    over = {key: sorted(set(values)) for key, values in zip(KEYS, zip(*settings, strict=True), strict=True)}
    space = make_space("synthetic", given, over=over, request=Request(prompt, OUTPUT))
    evaluate = Evaluator(space, [GOAL])
    return {setting: evaluate(dict(zip(KEYS, setting, strict=True)))[GOAL] for setting in settings}


def regret(file: Path = SAMPLES / "llama-bench.jsonl.gz", profile: str = "h200", prompt: int = 512,
           cpu_gb_per_s: float = CPU_GB_PER_S) -> str:  # fmt: skip
    """The table, as Markdown."""
    rows = []
    for name, speeds in sorted(measured(file, prompt).items()):
        model = next(known for known in BENCHED if name.startswith(known))
        guesses = predicted(model, list(speeds), profile, prompt, cpu_gb_per_s)
        for least in sorted({setting.cpu_layers for setting in speeds}):
            able = [setting for setting in speeds if setting.cpu_layers >= least]
            advised, best = max(able, key=guesses.__getitem__), max(speeds[setting] for setting in able)
            fit = min(able, key=_as_fit_would)
            said = f"{advised.cpu_layers} layers, {advised.threads} threads, {advised.host_memory}"
            lost = [f"{1 - speeds[setting] / best:.1%}" for setting in (advised, fit)]
            rows.append([model, str(least), str(len(able)), said, *lost])
    head = ["model", "layers on the CPU, at least", "settings", "advice", "slower than the best", "`--fit` slower"]
    return table(head, rows)


def _as_fit_would(setting: Setting) -> tuple[object, ...]:
    """Returns what orders settings as `--fit` does: fewest layers, else the defaults."""
    return setting.cpu_layers, -setting.threads, abs(setting.micro_batch - 512), setting.host_memory


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=SAMPLES / "llama-bench.jsonl.gz")
    parser.add_argument("--profile", default="h200")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--cpu-gb-per-s", type=float, default=CPU_GB_PER_S)
    options = parser.parse_args()
    print(regret(options.file, options.profile, options.prompt, options.cpu_gb_per_s))


if __name__ == "__main__":
    main()
