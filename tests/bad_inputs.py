"""Bad inputs over every reader and command: how each is made, the command, and what its one line must say.

`CORPUS` is the table; tests/test_bad_inputs.py runs it. To add one: a row, in the group of its reader. Good files of
every kind are made once, by `make_good`, and a row names those that it needs beside its own.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

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
    "m.json": (("model", "show", "m.json"), ()),
    "m.gguf": (("model", "check", "m.gguf"), ()),
    "n.json": (("model", "import", "n.json", "-o", "new.toml"), ()),
    "n.csv": (("trace", "synth", "--popularity", "n.csv", "-o", "new.npz"), ()),
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
    "b.log": (("trace", "import", "b.log", "--format", "bigmoeonedge", "-o", "new.npz"), ()),
    "a.log": (("trace", "import", "a.log", "--format", "arrays", "-o", "new.npz"), ()),
    "e.log": (("trace", "import", "e.log", "--format", "eval-callback", "--num-experts", "8", "-o", "new.npz"), ()),
    "w.log": (("trace", "import", "w.log", "--format", "rows", "--num-experts", "8", "-o", "new.npz"), ()),
    "o.npy": (("trace", "map", "o.npy", "--model", "olmoe-1b-7b", "-o", "new.npz"), ()),
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
    """Returns what writes a content where another file may be."""

    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


#: A device that never ends, given to what reads a file of text or rows.
_ENDLESS = (
    "plot lines /dev/zero -o new.png",
    "compare /dev/zero.json default",
    "calibrate fit /dev/zero -o new.json",
    "calibrate check-run phone /dev/zero --after 5",
    "trace import /dev/zero --format jsonl -o new.npz",
    "trace info /dev/zero",
    "topology /dev/zero",
    "run /dev/zero",
    "timeline import /dev/zero",
    "calibrate validate --profile h200 --measured /dev/zero -o new",
)


def _endless() -> Iterator[Bad]:
    for words in _ENDLESS:
        yield Bad(words, tuple(words.split()), ("/dev/zero",))


#: What of BROKEN a reader takes for what it may be.
FINE: set[tuple[str, str]] = set()


# Scenarios: a value of every kind that a key does not take, and what does not go together.

_SET: list[tuple[str, str]] = [
    ("seed=-1", "seed = -1"),
    ("seed=1.5", "seed = 1.5"),
    ("seed=9223372036854775808", "seed = 9223372036854775808"),
    ("seed=true", "seed"),
    ("model.preset=mixtrall", "mixtrall"),
    ("model.preset=5", "model.preset = 5"),
    ("model.preset=../x.toml", "x.toml"),
    ("model.layers=0", "model.layers = 0"),
    ("model.layers=1000000", "model.layers = 1000000"),
    ("model.experts=0", "model.experts = 0"),
    ("model.top_k=99", "model.top_k = 99"),
    ("model.dtype=fp99", "model.dtype = 'fp99'"),
    ("model.expert_bytes=0", "model.expert_bytes = 0"),
    ("model.expert_bytes=4611686018427387904", "bytes: must be at most"),
    ("model.sizes=big", "model.sizes = 'big'"),
    ("model.sizes=trace", "model.sizes = 'trace'"),
    ("machine.profile=[1]", "machine.profile"),
    ("machine.profile=none.json", "none.json"),
    ("workload.trace=none.npz", "none.npz"),
    ("workload.trace=7", "workload.trace = 7"),
    ("workload.tokens=0", "workload.tokens = 0"),
    ("workload.tokens=nan", "workload.tokens"),
    ("workload.batch=0", "workload.batch = 0"),
    ("workload.batch=1e3", "workload.batch"),
    ("workload.prefill=maybe", "workload.prefill = 'maybe'"),
    ("workload.chunk_tokens=0", "workload.chunk_tokens = 0"),
    ("workload.synthetic=5", "workload.synthetic = 5"),
    ("workload.synthetic.tokens=-5", "workload.synthetic.tokens = -5"),
    ("workload.synthetic.skew=-1", "workload.synthetic.skew = -1"),
    ("workload.synthetic.skew=21.0", "workload.synthetic.skew = 21.0"),
    ("workload.synthetic.skew=nan", "workload.synthetic.skew"),
    ("workload.synthetic.reuse=1.1", "workload.synthetic.reuse = 1.1"),
    ("workload.synthetic.reuse=inf", "workload.synthetic.reuse"),
    ("workload.synthetic.working_set=1000", "workload.synthetic.working_set = 1000"),
    ("workload.synthetic.sequences=100000", "workload.synthetic.sequences = 100000"),
    ("workload.synthetic.prefill_tokens=-1", "workload.synthetic.prefill_tokens = -1"),
    ("workload.synthetic.fit=none.json", "none.json"),
    ("memory.gpu_budget=-1GiB", "gpu_budget = '-1GiB'"),
    ("memory.gpu_budget=nanGiB", "gpu_budget = 'nanGiB'"),
    ("memory.gpu_budget=0%", ": it must hold one expert"),
    ("memory.gpu_budget=4 gib", "gpu_budget = '4 gib'"),
    ("memory.gpu_budget=99999999999999999999TiB", "more than any machine has"),
    ("memory.gpu_budget=true", "memory.gpu_budget"),
    ("memory.scope=galaxy", "memory.scope = 'galaxy'"),
    ("memory.eviction=LRU", "memory.eviction = 'LRU'"),
    ("memory.eviction=[]", "memory.eviction"),
    ("memory.prefetch_limit=x", "memory.prefetch_limit = 'x'"),
    ("memory.prefetch_share=2.0", "memory.prefetch_share = 2.0"),
    ("memory.caching=maybe", "memory.caching = 'maybe'"),
    ("memory.total_bytes=much", "total_bytes = 'much'"),
    ("memory.total_bytes=1B", "memory.total_bytes = '1B'"),
    ("memory.workspace_bytes=5%", "workspace_bytes = '5%'"),
    ("memory.preload=all", "memory.preload = 'all'"),
    ("memory.cpu_layers=1", "cpu_layers = 1"),
    ("predictor.name=oracel", "did you mean 'oracle'"),
    ("predictor.name=learned", "name = 'learned'"),
    ("predictor.recall=1.01", "predictor.recall = 1.01"),
    ("predictor.recall=-0.1", "predictor.recall = -0.1"),
    ("predictor.context=0", "predictor.context = 0"),
    ("predictor.lane=side", "predictor.lane = 'side'"),
    ("predictor.latency_us=-1", "predictor.latency_us = -1"),
    ("predictor.latency_us=1e300", "predictor.latency_us = 1e+300"),
    ("predictor.latency_us=inf", "predictor.latency_us"),
    ("prefetch.policy=topk", "did you mean 'top-k'"),
    ("prefetch.k=0", "prefetch.k = 0"),
    ("prefetch.k=1000000", "prefetch.k = 1000000"),
    ("prefetch.k=100000000000000000000", "must fit into 64 bits"),
    ("prefetch.lookahead=-1", "prefetch.lookahead = -1"),
    ("prefetch.threshold=5", "prefetch.threshold = 5"),
    ("prefetch.decay=0", "prefetch.decay = 0"),
    ("prefetch.protect=x", "prefetch.protect = 'x'"),
    ("prefetch.issue=x", "prefetch.issue = 'x'"),
    ("dispatch.mode=lazy", "dispatch.mode = 'lazy'"),
    ("dispatch.router_readback=1", "dispatch.router_readback"),
    ("dispatch.expert_order=x", "dispatch.expert_order = 'x'"),
    ("dispatch.expert_kernel=x", "dispatch.expert_kernel = 'x'"),
    ("dispatch.launch_queue_depth=0", "dispatch.launch_queue_depth = 0"),
    ("dispatch.launch_queue_depth=99999999999999999999", "dispatch.launch_queue_depth = 99999999999999999999"),
    ("copy.source=disk", "copy.source = 'disk'"),
    ("copy.discipline=lifo", "copy.discipline = 'lifo'"),
    ("copy.chunk_bytes=-1", "copy.chunk_bytes"),
    ("copy.drop_stale=true", "drop_stale = true"),
    ("copy.host_memory=paged", "copy.host_memory = 'paged'"),
    ("copy.contention=no", "copy.contention = 'no'"),
    ("parallel.stages=0", "parallel.stages = 0"),
    ("parallel.stages=3", "parallel.stages = 3"),
    ("parallel.split=middle", "parallel.split"),
    ("parallel.split=[1, 0]", "parallel.split"),
    ("parallel.micro_batches=4", "parallel.micro_batches = 4"),
    ("parallel.dispatch_threads=two", "parallel.dispatch_threads = 'two'"),
    ("parallel.gpus=0", "parallel.gpus = 0"),
    ("parallel.gpus=2", "parallel.gpus = 2"),
    ("parallel.placement=x", "parallel.placement = 'x'"),
    ("parallel.replicas=0", "parallel.replicas = 0"),
    ("parallel.replica_bytes=50%", "'50%': write"),
    ("parallel.objective=x", "parallel.objective = 'x'"),
    ("parallel.remote=x", "parallel.remote = 'x'"),
    ("parallel.spare_bytes=-1B", "'-1B': write"),
    ("tiers.host_budget=some", "host_budget = 'some'"),
    ("tiers.host_budget=50%", "tiers.host_budget = '50%'"),
    ("tiers.host_policy=x", "tiers.host_policy = 'x'"),
    ("tiers.inclusion=x", "tiers.inclusion = 'x'"),
    ("tiers.inclusion=exclusive", "inclusion = 'exclusive'"),
    ("tiers.io_lanes=0", "tiers.io_lanes = 0"),
    ("tiers.io_lanes=100000", "tiers.io_lanes = 100000"),
    ("tiers.chunk_bytes=-4", "tiers.chunk_bytes"),
    ("tiers.prefetch=host", "prefetch = 'host'"),
    ("miss.policy=ignore", "miss.policy = 'ignore'"),
    ("miss.threshold=-1", "miss.threshold = -1"),
    ("miss.cpu_threads=0", "miss.cpu_threads = 0"),
    ("miss.cpu_max_tokens=-1", "miss.cpu_max_tokens = -1"),
    ("miss.deferred_experts=-1", "miss.deferred_experts = -1"),
    ("miss.deferred_experts=1", "miss: deferred_experts = 1 with policy = 'fetch'"),
    ("miss.cpu_gb_per_s=0", "miss.cpu_gb_per_s = 0"),
    ("miss.cpu_gb_per_s=5e-324", "miss.cpu_gb_per_s = 5e-324"),
    ("miss.low_ratio=1.0", "miss.low_ratio = 1.0"),
    ("miss.low_share=0", "miss.low_share = 0"),
    ("miss.fetch_behind=2", "miss.fetch_behind"),
    ("compression.where=disk", "compression.where = 'disk'"),
    ("compression.where=host", "decompress_gb_per_s"),
    ("compression.ratio=0", "compression.ratio = 0"),
    ("compression.ratio=nan", "compression.ratio"),
    ("compression.decompress_gb_per_s=1e-300", "compression.decompress_gb_per_s = 1e-300"),
    ("compression.decompress_us=-1", "compression.decompress_us = -1"),
    ("compression.lane=x", "compression.lane = 'x'"),
    ("compression.mixed=[[0.5, 0.5]]", "compression.mixed"),
    ("compression.mixed=5", "compression.mixed"),
    ("compression=5", "compression = 5"),
    ("nosuch.key=1", "nosuch"),
    ("memory.nosuch=1", "memory.nosuch"),
    ("memory.eviction.deep=1", "eviction"),
    ("=1", "--set '=1'"),
    ("memory.=1", "--set 'memory.=1'"),
    ("novalue", "--set 'novalue'"),
]
#: Options of commands with values that they do not take: the words, and what the message must say.
_OPTIONS: list[tuple[str, str]] = [
    ("run --replicates -1", "--replicates"),
    ("run --replicates x", "--replicates"),
    ("run --nosuch", "--nosuch"),
    ("run synthetic good.npz", "good.npz"),
    ("run good.npz", "good.npz"),
    ("run rows.jsonl#ab", "rows.jsonl"),
    ("run good.jsonl#zz", "good.jsonl"),
    ("run good.jsonl#", "good.jsonl"),
    ("sweep synthetic --grid prefetch.k=", "prefetch.k"),
    ("sweep synthetic --grid prefetch.k", "prefetch.k"),
    ("sweep synthetic --grid =1", "--grid"),
    ("sweep synthetic --grid prefetch.k=0,-1 -o new.jsonl", "prefetch.k"),
    ("sweep synthetic --grid prefetch.k=1 --sample 0 -o new.jsonl", "sample"),
    ("sweep synthetic --grid prefetch.k=1 --workers 0 -o new.jsonl", "workers"),
    ("sweep synthetic --grid prefetch.k=1 --workers x -o new.jsonl", "--workers"),
    ("sweep synthetic --grid prefetch.k=1 -o none/new.jsonl", "none"),
    ("sweep synthetic --grid prefetch.k=1 -o new.xlsx", "new.xlsx"),
    ("sweep synthetic --grid prefetch.k=1 --grid prefetch.k=2 -o new.jsonl", "prefetch.k"),
    ("suite nosuch", "nosuch"),
    ("suite --workers x", "--workers"),
    ("plot", "Missing argument"),
    ("plot lines", "Missing argument"),
    ("plot lines good.jsonl", "--out"),
    ("plot nosuch good.jsonl -o new.png", "KIND = 'nosuch'"),
    ("plot lines good.jsonl -o new.bmp", "new.bmp"),
    ("plot lines good.jsonl -o none/new.png", "none"),
    ("plot lines good.jsonl --x nosuch -o new.png", "nosuch"),
    ("plot heatmap good.jsonl --by nosuch -o new.png", "nosuch"),
    ("plot lines good.jsonl --figure nosuch -o new.png", "nosuch"),
    ("plot lines good.jsonl --figure scenario.model.preset -o new.png", "scenario.model.preset"),
    ("plot waterfall done -o new.png", "waterfall"),
    ("plot memory done done -o new.png", "memory"),
    ("report done done -o new.html", "done"),
    ("report done done done -o new.html", "3"),
    ("report done -o new.pdf", "new.pdf"),
    ("report done -o none/new.html", "none"),
    ("topology h200", "h200"),
    ("topology nosuch", "nosuch"),
    ("topology h200-x2 -o new.txt", "new.txt"),
    ("topology h200-x2 --result done", "done"),
    ("topology h200-x2 --result none", "none"),
    ("compare done", "two"),
    ("compare done none.json", "none.json"),
    ("compare done done/result.json --plot new.txt", "new.txt"),
    ("compare nosuch default", "nosuch"),
    ("breakeven synthetic --budgets x", "'x'"),
    ("breakeven synthetic --lookaheads x", "prefetch.lookahead"),
    ("breakeven synthetic --lookaheads 0", "lookahead"),
    ("breakeven synthetic --plot new.txt", "new.txt"),
    ("replay good.npz", "--budget"),
    ("replay good.npz --budget -5", "budget '-5'"),
    ("replay good.npz --budget 1B --expert-bytes 10", "budget"),
    ("replay good.npz --budget 1GiB", "model"),
    ("replay good.npz --budget 50% --eviction x", "eviction"),
    ("replay good.npz --budget 50% --scope x", "scope"),
    ("replay good.npz --budget 50% --lookup x", "lookup"),
    ("replay good.npz --budget 50% --batch 0", "batch"),
    ("replay good.npz --budget 50% --model x", "'x'"),
    ("replay good.npz --budget 50% --expert-bytes 0", "expert_bytes"),
    ("replay good.npz --budget 50% --eviction predictive --predictor x", "'x'"),
    ("replay good.npz --budget 50% --eviction predictive --lookahead 0", "lookahead"),
    ("reproduce nosuch", "nosuch"),
    ("mrc good.npz --points 0", "points"),
    ("mrc good.npz --points -3", "points"),
    ("mrc good.npz --capacities x", "'x'"),
    ("mrc good.npz --policies x", "'x'"),
    ("mrc good.npz --scope x", "scope"),
    ("mrc good.npz -o new.txt", "new.txt"),
    ("trace info", "Missing argument"),
    ("trace info good.jsonl", "good.jsonl"),
    ("trace import good.npz -o new.npz --format x", "format = 'x'"),
    ("trace import good.npz -o new.npz", "good.npz"),
    ("trace fit good.npz -o new.json", "a fit needs one of 17"),
    ("trace synth -o new.npz --tokens 0", "tokens = 0"),
    ("trace synth -o new.npz --skew -1", "skew = -1.0"),
    ("trace synth -o new.npz --skew nan", "skew"),
    ("trace synth -o new.npz --reuse inf", "reuse = inf"),
    ("trace synth -o new.npz --working-set 0", "working_set = 0"),
    ("trace synth -o new.npz --sequences 0", "sequences = 0"),
    ("trace synth -o new.npz --prefill-tokens -1", "prefill_tokens = -1"),
    ("trace synth -o new.npz --seed -1", "seed = -1"),
    ("trace synth -o new.npz --model nosuch", "nosuch"),
    ("trace synth -o new.npz --fit none.json", "none.json"),
    ("trace synth -o none/new.npz", "none"),
    ("trace record --model none -o new.npz", "file of text"),
    ("predictor train good.npz -o new --context 0", "context = 0"),
    ("predictor train good.npz -o new --horizons 0", "horizons = 0"),
    ("predictor train good.npz -o new --epochs 0", "epochs = 0"),
    ("predictor train good.npz -o new --held-out 1.5", "held_out = 1.5"),
    ("predictor train good.npz -o new --held-out nan", "held_out"),
    ("predictor train good.npz -o new --seed -1", "seed = -1"),
    ("predictor train good.npz -o new --sequences 9:", "9:"),
    ("predictor measure none", "none"),
    ("predictor evaluate good.npz --weights none", "none"),
    ("predictor evaluate good.npz --predictor x", "'x'"),
    ("predictor evaluate good.npz --predictor transition --horizons 0", "horizons"),
    ("predictor evaluate good.npz --predictor transition --recall 0", "recall"),
    ("predictor evaluate good.npz --predictor transition --sequences x", "'x'"),
    ("timeline import good.npz", "good.npz"),
    ("timeline summary good.jsonl none", "good.jsonl"),
    ("calibrate fit", "Missing argument"),
    ("calibrate fit good.samples.json -o new.json --topology h200", "h200"),
    ("calibrate fit good.samples.json -o new.json --topology nosuch", "nosuch"),
    ("calibrate fit good.samples.json -o new.json --rows-out new.txt", "new.txt"),
    ("calibrate fit-run phone none.csv --tokens 20 -o new.json", "none.csv"),
    ("calibrate fit-run phone none.csv --tokens x -o new.json", "--tokens"),
    ("calibrate check-run phone none.csv --after 5", "none.csv"),
    ("calibrate validate --profile nosuch --measured good.measured.json -o new", "nosuch"),
    ("calibrate validate --profile h200 --measured none -o new", "none"),
    ("calibrate validate --profile h200 --repeats 0 -o new", "--repeats"),
    ("calibrate validate --profile h200 --measured good.measured.json --tolerance -1 -o new", "--tolerance"),
    ("calibrate execute nosuch -o new", "nosuch"),
    ("benchmark transfer --profile nosuch", "nosuch"),
    ("benchmark transfer --profile h200 --samples good.samples.json", "--samples"),
    ("benchmark transfer --profile h200 -o new.txt", "new.txt"),
    ("walk", "walk"),
    ("trace walk", "walk"),
]
_OF_GOOD = ("done", "good.npz", "good.jsonl", "good.samples.json", "good.measured.json")


def _settings() -> Iterator[Bad]:
    for setting, says in _SET:
        yield Bad(f"--set {setting}", ("run", "synthetic", "--set", setting, "-o", "new"), (says,))


def _options() -> Iterator[Bad]:
    for words, says in _OPTIONS:
        needs = tuple(
            name for name in _OF_GOOD if any(word.partition("#")[0].startswith(name) for word in words.split())
        )
        yield Bad(words, tuple(words.split()), (says,), needs=needs)


# Saved runs: numbers that stand for nothing, and figures that are no numbers.


def _with_array(name: str, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Make:
    """Returns what changes one array of a .safetensors file."""

    def make(path: Path) -> None:
        with safetensors.safe_open(path, framework="numpy") as content:
            meta = content.metadata()
            arrays = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        arrays[name] = np.ascontiguousarray(change(arrays[name]))
        path.write_bytes(safetensors.numpy.save(arrays, metadata=meta))

    return make


def _with_meta(change: Callable[[dict[str, Any]], object]) -> Make:
    """Returns what changes the metadata of a .safetensors file."""

    def make(path: Path) -> None:
        with safetensors.safe_open(path, framework="numpy") as content:
            meta = json.loads(content.metadata()["meta"])
            arrays = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        path.write_bytes(safetensors.numpy.save(arrays, metadata={"meta": json.dumps(change(meta))}))

    return make


def _with_key(key: str, value: object) -> Make:
    """Returns what sets a key, such as time.stall_ms, in a JSON file."""

    def make(path: Path) -> None:
        data = json.loads(path.read_bytes())
        inner = data
        *outer, last = key.split(".")
        for part in outer:
            inner = inner[int(part)] if isinstance(inner, list) else inner[part]
        inner[int(last) if isinstance(inner, list) else last] = value
        path.write_text(json.dumps(data), encoding="utf-8")

    return make


_ARRAYS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("span.kind", "a kind that does not exist", lambda array: array * 0 + 99),
    ("span.lane", "a lane that does not exist", lambda array: array * 0 + 500),
    ("span.start_ns", "before the run", lambda array: array * 0 - 1),
    ("span.end_ns", "an end before its start", lambda array: array * 0),
    ("span.visit", "another type", lambda array: array.astype(np.float32)),
    ("span.expert", "one row", lambda array: array[:1]),
    ("access.outcome", "an outcome that does not exist", lambda array: array * 0 + 4),
    ("access.layer", "a layer that does not exist", lambda array: array * 0 + 2),
    ("access.wait_ns", "a wait below 0", lambda array: array * 0 - 5),
    ("copy.fate", "a fate that does not exist", lambda array: array * 0 + 5),
    ("copy.bytes", "bytes below 0", lambda array: array * 0 - 1),
    ("memory.gpu", "a GPU that does not exist", lambda array: array * 0 + 1),
    ("memory.time_ns", "rows of rows", lambda array: array[None]),
    ("token.took_ns", "a time below 0", lambda array: array * 0 - 1),
]
_METAS: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("no object", lambda meta: [1]),
    ("no lanes", lambda meta: {**meta, "lanes": None}),
    ("a lane of one word", lambda meta: {**meta, "lanes": [["gpu0"]]}),
    ("a lane of numbers", lambda meta: {**meta, "lanes": [[1, "compute", 3]]}),
    ("a role that does not exist", lambda meta: {**meta, "lanes": [["gpu0", "cook", "x"]]}),
    ("an endless makespan", lambda meta: {**meta, "makespan_ns": 1e400}),
    ("another makespan", lambda meta: {**meta, "makespan_ns": 1}),
]
_RESULTS: list[tuple[str, object]] = [
    ("makespan_ms", "fast"),
    ("makespan_ms", -1),
    ("makespan_ms", 1e30),
    ("makespan_ms", float("nan")),
    ("time", []),
    ("time.stall_ms", None),
    ("gpus", 5),
    ("gpus", [1]),
    ("gpus.0.device", 3),
    ("gpus.0.time", {}),
    ("model", "mixtral"),
    ("model.layers", 0),
    ("model.layers", 10**12),
    ("model.name", None),
    ("scenario", [1]),
    ("scenario.machine", "h200"),
    ("counts", 4),
    ("counts.miss", "many"),
    ("by_layer", {"0": 1}),
    ("by_layer.0.late", -1),
    ("warnings", "none"),
    ("estimates", ["x"]),
    ("versions", 3),
    ("accesses", 10**30),
    ("hit_rate", "high"),
    ("tokens_per_second", [1, 2]),
    ("links", [5]),
    ("makespan_ms", 0),
    ("hit_rate", {}),
    ("decode_tokens", -1),
    ("decode_tokens", None),
    ("warmup", 5),
    ("warmup", None),
    ("cold", 5),
    ("time_per_output_token_ms", 5),
    ("time_per_output_token_ms", {"p50": 1.0}),
    ("decode_step_ms.p50", None),
    ("inter_token_latency_ms", None),
    ("speedup", None),
    ("resident_ms", 0),
    ("accesses", 0),
    ("expert_bytes_total", 0),
    ("budget_bytes", "many"),
    ("capacity", []),
    ("capacity.resident", None),
    ("capacity.memories", [{}]),
    ("scenario.workload", 5),
    ("scenario.memory.preload", 5),
]


def _saved() -> Iterator[Bad]:
    report = ("report", "done", "-o", "new.html")
    for name, what, change in _ARRAYS:
        files = {"done/run.safetensors": _with_array(name, change)}
        yield Bad(f"run.safetensors: {name}: {what}", report, ("run.safetensors", name.split(".")[0]), files, ("done",))
    for what, meta in _METAS:
        files = {"done/run.safetensors": _with_meta(meta)}
        yield Bad(f"run.safetensors: metadata: {what}", report, ("run.safetensors",), files, ("done",))
    for key, value in _RESULTS:
        files = {"done/result.json": _with_key(key, value)}
        yield Bad(f"result.json: {key} = {value!r}", report, ("result.json",), files, ("done",))


# Files of the right kind, in which one thing is of another.

_IMPORT = "trace import j.jsonl --format jsonl -o new.npz"
_TOKENS = '{"num_experts": 4}\n[[0, 1], [2, 3]]\n'
#: What is written, by the command that reads it, and what the message must say.
_CONTENTS: list[tuple[str, str, str, str]] = [
    ("g.toml", "grid = 5", "sweep g.toml -o new.jsonl --workers 1", "grid = 5: must be a section"),
    ("g.toml", 'grid = ["x"]', "sweep g.toml -o new.jsonl --workers 1", "grid = ['x']: must be a section"),
    ("g.toml", "set = 5\n[grid]", "sweep g.toml -o new.jsonl --workers 1", "set = 5: must be a section"),
    ("g.toml", 'scenario = ["x"]\n[grid]', "sweep g.toml -o new.jsonl --workers 1", "scenario = ['x']: must be a name"),
    ("g.toml", "scenario = 1\n[grid]", "sweep g.toml -o new.jsonl --workers 1", "scenario = 1: must be a name"),
    (
        "j.jsonl",
        _TOKENS + "[[0, 1], [2, 3], [0, 1]]",
        "trace import j.jsonl --format jsonl -o new.npz",
        "line 3: experts: 3 layers: must be 2",
    ),
]


def _contents() -> Iterator[Bad]:
    for name, content, words, says in _CONTENTS:
        yield Bad(f"{name}: {content!r}", tuple(words.split()), (name, says), {name: content})
    for key, value, says in _MEASURED_RUNS:
        words = "calibrate validate --profile h200 --measured good.measured.json -o new"
        file = "good.measured.json"
        yield Bad(
            f"measured run: {key} = {str(value)[:30]}",
            tuple(words.split()),
            (file, says),
            {file: _with_key(key, value)},
            (file,),
        )
    row: dict[str, object] = {"cost": "expert", "key": {"tokens": 1}, "n": 1, "median_ns": 1, "mean_ns": 1, "iqr_ns": 0}
    row |= {"run_medians_ns": [1], "run_means_ns": [1]}
    words = "calibrate fit good.samples.json --in-schedule c.rows.json -o new.json"
    for key, value, says in _ROWS:
        files = {"c.rows.json": json.dumps([{**row, key: value}])}
        command = tuple(words.split())
        yield Bad(f"c.rows.json: {key} = {value!r}", command, ("c.rows.json", says), files, ("good.samples.json",))
    for key, value in (("key", "xyz"), ("key", 5), ("error", 5), ("scenario", []), ("settings", []), ("versions", 1)):
        row = {"key": "ab", "error": None, "scenario": {}, key: value}
        words = "plot lines rows.jsonl -o new.png"
        yield Bad(
            f"a row: {key} = {value!r}",
            tuple(words.split()),
            ("rows.jsonl: line 1",),
            {"rows.jsonl": f"{json.dumps(row)}\n"},
        )


#: One key of the rows from inside schedules, and what the message must say.
_ROWS: list[tuple[str, object, str]] = [
    ("n", 0, "row 0"),
    ("n", None, "row 0"),
    ("key", [], "row 0"),
    ("key", {"tokens": 0}, "row 0"),
    ("key", {"tokens": "x"}, "row 0"),
    ("median_ns", float("nan"), "finite"),
    ("mean_ns", 1e400, "finite"),
    ("run_medians_ns", [], "row 0"),
    ("run_means_ns", 5, "row 0"),
]
_MEASURED_RUNS: list[tuple[str, object, str]] = [
    ("format", 3, "format = 3"),
    ("name", 5, "name = 5"),
    ("scenario", [1], "scenario"),
    ("scenario.seed", -1, "seed = -1"),
    ("machine", [], "machine"),
    ("machine.device", ["H200"], "machine.device"),
    ("machine.versions", {}, "machine.versions.torch: missing"),
    ("makespans_ns", [], "makespans_ns"),
    ("makespans_ns", [0], "makespans_ns.0 = 0"),
    ("makespans_ns", [7], "the median is 7"),
    ("disturbed", -1, "disturbed = -1"),
    ("gpus", [], "gpus"),
    ("spans", [], "spans"),
    ("spans.kind", [0, 1], "must be 2, one a span"),
    ("spans.kind.0", 99, "spans.kind: 99"),
    ("spans.visit.0", -1, "spans.visit.0 = -1"),
    ("spans.visit.0", 2**31, "must have a time for each"),
    ("spans.tokens.0", 0, "0 of a kernel"),
    ("spans.tokens.0", "x", "spans.tokens.0 = 'x'"),
    ("spans.tokens.0", 10**30, "spans.tokens.0"),
    ("repeats", [], "repeats"),
    ("repeats.0.end_ns", [[1, 2], [3]], "repeats.0.end_ns"),
    ("repeats.0.end_ns", [1], "repeats.0.end_ns: 1 times"),
    ("repeats.0.start_ns.0", 10**15, "ends before its start"),
    ("repeats.0.host_end_ns", [], "repeats.0.host_end_ns: 0 times"),
    ("repeats.0.choice_known_ns", [1], "choice_known_ns"),
    ("counts", [], "counts"),
    ("verified", None, "verified"),
]

CORPUS: list[Bad] = [*_broken(), *_settings(), *_options(), *_saved(), *_contents(), *_endless()]
