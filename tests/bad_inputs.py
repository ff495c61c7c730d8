"""Bad inputs over every reader and command: how each is made, the command, and what its one line must say.

`CORPUS` is the table; tests/test_bad_inputs.py runs it. To add one: a row, in the group of its reader. Good files of
every kind are made once, by `make_good`, and a row names those that it needs beside its own.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
#: Writes a file, in place of what is there.
Make = Callable[[Path], object]
Content = bytes | str | Make


@dataclass(frozen=True)
class Bad:
    """One bad input: its files by name, the command, what the message must say, and the good files that it needs."""

    name: str
    command: tuple[str, ...]
    says: tuple[str, ...]
    files: Mapping[str, Content] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def lay_out(self, folder: Path, good: Path) -> None:
        """Write all files to an empty folder."""
        for name in self.needs:
            if (good / name).is_dir():
                shutil.copytree(good / name, folder / name)
            else:
                shutil.copy(good / name, folder / name)
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            if callable(content):
                content(path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)


#: A scenario, so small that accepting it by mistake costs nothing.
SMALL = """
[model]
preset = "olmoe-1b-7b"
layers = 2
[workload.synthetic]
tokens = 4
"""
SETTINGS = ("model.layers=2", "workload.synthetic.tokens=8", "workload.synthetic.prefill_tokens=1")
SMALL_RUN = ("run", "synthetic", "--no-baselines", *(word for one in SETTINGS for word in ("--set", one)))
#: Samples and rows that are kept with the sources.
SAMPLES = ROOT / "calibration" / "samples" / "h200-two-gpus.json"
MEASURED = ROOT / "calibration" / "validation" / "h200"


def make_good(folder: Path, call: Callable[..., object]) -> None:
    """Write one good file of every kind into a folder; `call` runs a command there."""
    from random_scenarios import some_fit

    from prestage.workloads.learned import Weights
    from prestage.workloads.network import Shape
    from prestage.workloads.synthetic import synthesize

    call(*SMALL_RUN, "-o", "done")
    trace = synthesize(12, 2, 8, 2, sequences=3, reuse=0.3)
    for name in ("good.npz", "good.safetensors"):
        trace.save(folder / name)
    some_fit(2, 8, 2).save(folder / "good.fit.json")
    shape = Shape(2, 8, 2, horizons=1, context=1, width=4, heads=1, blocks=1)
    arrays = {name: np.zeros(size, np.float16) for name, size in shape.arrays().items()}
    Weights(shape, arrays, {}).save(folder / "good-weights.safetensors")
    grid = ("--grid", "prefetch.k=1,2", "--grid", "memory.gpu_budget=25%,50%", "--workers", "1")
    call("sweep", *SMALL_RUN[1:2], *SMALL_RUN[3:], *grid, "--no-baselines", "-o", "good.jsonl")
    (folder / "good.samples.json").write_bytes(SAMPLES.read_bytes())
    measured = min(MEASURED.rglob("*.json.gz"), key=lambda path: path.stat().st_size)
    (folder / "good.measured.json").write_bytes(gzip.decompress(measured.read_bytes()))


# What is no file of any kind, given to every reader: its message names the file.


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _nothing(_: Path) -> None:
    """Leave it missing."""


BROKEN: dict[str, Content] = {
    "empty": b"",
    "NUL bytes": b"\0" * 64,
    "bytes of no meaning": bytes(range(256)) * 8,
    "UTF-16": "seed = 1\n".encode("utf-16"),
    "a folder": _folder,
    "missing": _nothing,
    "a link to itself": _loop,
    "brackets in brackets": b"[" * 100_000,
    "a broken gzip": gzip.compress(b"abc" * 100)[:-9],
    "a number": b"5",
    "text": b'"text"',
    "null": b"null",
}
#: Every reader: the file, the command that reads it, and the good files that the command needs besides.
READERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "s.toml": (("run", "s.toml", "-o", "new"), ()),
    "b.toml": (("breakeven", "b.toml"), ()),
    "c.toml": (("compare", "c.toml", "default"), ()),
    "g.toml": (("sweep", "g.toml", "-o", "new.jsonl", "--workers", "1"), ()),
    "u.toml": (("suite", "u.toml", "-o", "new", "--workers", "1"), ()),
    "m.toml": (("trace", "synth", "--model", "./m.toml", "-o", "new.npz"), ()),
    "p.json": (("topology", "p.json"), ()),
    "q.json": (("benchmark", "transfer", "--profile", "q.json"), ()),
    "t.npz": (("trace", "info", "t.npz"), ()),
    "t.safetensors": (("replay", "t.safetensors", "--budget", "25%"), ()),
    "i.npz": (("mrc", "i.npz", "-o", "new.png"), ()),
    "e.npz": (("predictor", "evaluate", "e.npz", "--predictor", "transition"), ()),
    "l.npz": (("predictor", "train", "l.npz", "-o", "new"), ()),
    "d.npz": (("trace", "fit", "d.npz", "-o", "new.json"), ()),
    "t.route.csv": (("trace", "info", "t.route.csv"), ()),
    "j.log": (("trace", "import", "j.log", "--format", "jsonl", "--num-experts", "8", "-o", "new.npz"), ()),
    "k.log": (("trace", "import", "k.log", "--format", "topk-ids", "--num-experts", "8", "-o", "new.npz"), ()),
    "h.log": (("trace", "import", "h.log", "--format", "guide", "--num-experts", "8", "-o", "new.npz"), ()),
    "r.log": (("trace", "import", "r.log", "-o", "new.npz"), ()),
    "f.json": (("trace", "synth", "--fit", "f.json", "-o", "new.npz"), ()),
    "w.safetensors": (("predictor", "evaluate", "good.npz", "--weights", "w.safetensors"), ("good.npz",)),
    "done/result.json": (("report", "done", "-o", "new.html"), ("done",)),
    "done/run.safetensors": (("plot", "lanes", "done", "-o", "new.png"), ("done",)),
    "x.json": (("compare", "x.json", "default"), ()),
    "y.json": (("topology", "h200-x2", "--result", "y.json"), ()),
    "rows.jsonl": (("plot", "lines", "rows.jsonl", "-o", "new.png"), ()),
    "o.jsonl": (("run", "o.jsonl#ab", "-o", "new"), ()),
    "timeline.json": (("timeline", "summary", "timeline.json"), ()),
    "timeline.json.gz": (("timeline", "import", "timeline.json.gz", "-o", "new.png"), ()),
    "samples.json": (("calibrate", "fit", "samples.json", "-o", "new.json"), ()),
    "z.json": (("benchmark", "transfer", "--samples", "z.json"), ()),
    "c.rows.json": (
        ("calibrate", "fit", "good.samples.json", "--in-schedule", "c.rows.json", "-o", "new.json"),
        ("good.samples.json",),
    ),
    "run.json": (("calibrate", "validate", "--profile", "h200", "--measured", "run.json", "-o", "new"), ()),
    "log.csv": (("calibrate", "fit-run", "phone", "log.csv", "--tokens", "20", "-o", "new.json"), ()),
    "v.csv": (("calibrate", "check-run", "phone", "v.csv", "--after", "5"), ()),
}


def _broken() -> Iterator[Bad]:
    for file, (command, needs) in READERS.items():
        for what, content in BROKEN.items():
            if (file, what) not in FINE:
                says = Path(file).stem if file.endswith("jsonl") else Path(file).name
                yield Bad(f"{file}: {what}", command, (says,), {file: _in_place(content)}, needs)


def _in_place(content: Content) -> Make:
    """Return what writes a content where another file may be."""

    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


#: What of BROKEN a reader takes for what it may be.
FINE: set[tuple[str, str]] = set()
CORPUS: list[Bad] = [*_broken()]
