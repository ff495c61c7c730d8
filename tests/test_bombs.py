"""Small files and large numbers that would take gigabytes or never end: refused in a line, or read within bounds.

Each case writes one file under 4 MB, or gives one number. The command runs in a process of its own, whose processor
time and peak memory are what the operating system measured. What is refused says so in one line.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from prestage.bounded import (
    MOST_ASKED_BYTES,
    allowed_bytes,
    check_memory,
    parse_toml,
    read_json,
    read_npz,
    unpacked,
)
from prestage.errors import InputError
from prestage.units import bytes_words

MOST_FILE_BYTES, MOST_BYTES, MOST_S = 4_000_000, 1 << 30, 10
#: How many millions of bytes a bomb may have.
MB = 1_000_000
Make = Callable[[Path], object]


def text(content: str) -> Make:
    return lambda path: path.write_text(content, encoding="utf-8")


def npz(**arrays: np.ndarray) -> Make:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array)

    return write


def npy_that_says(shape: tuple[int, ...], content: bytes = b"") -> Make:
    """An archive of one array whose header names this shape of bytes, whatever follows."""

    def write(path: Path) -> None:
        head = BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("experts.npy", head.getvalue() + content)
            meta = BytesIO()
            np.save(meta, np.array('{"num_experts": 8}'))
            archive.writestr("meta.npy", meta.getvalue())

    return write


def safetensors_of(meta: dict[str, object], **arrays: np.ndarray) -> Make:
    return lambda path: path.write_bytes(safetensors.numpy.save(arrays, metadata={"meta": json.dumps(meta)}))


def header_of(shape: list[int]) -> Make:
    """A safetensors file of no bytes whose header names an empty array of this shape."""
    head = json.dumps(
        {
            "__metadata__": {"meta": '{"num_experts": 8}'},
            "experts": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]},
        }
    ).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(head)) + head)


def gz(head: bytes, part: bytes, times: int, tail: bytes) -> Make:
    """A .gz file of a part, so many times, between two others; no more than a million bytes are made at once."""

    def write(path: Path) -> None:
        at_once = MB // len(part)
        with gzip.open(path, "wb", 1) as file:
            file.write(head)
            for done in range(0, times, at_once):
                file.write(part * min(at_once, times - done))
            file.write(tail)

    return write


def model(old: str, new: str) -> Make:
    from importlib import resources

    shipped = (resources.files("prestage.workloads") / "models" / "mixtral-8x7b.toml").read_text("utf-8")
    assert old in shipped
    return text(shipped.replace(old, new))


ROUTE = "# model=m arch=a n_layer={layers} n_expert={experts} n_expert_used={k}\n"
COLUMNS = "turn,phase,step,layer,slot,expert\n"
#: As many tokens as lines, each at a layer of its own, of as many layers as a header names.
SPARSE_ROUTE = ROUTE.format(layers=60_000, experts=1, k=1)
SPARSE_ROUTE += "".join(f"# layer={layer} expert_bytes=1 dense_bytes=0\n" for layer in range(40_000))
SPARSE_ROUTE += COLUMNS + "".join(f"0,1,{step},{step % 40_000},0,0\n" for step in range(80_000))
#: Weights whose shape names a thousand million blocks.
SHAPE = {"layers": 1, "experts": 2, "top_k": 1, "horizons": 1, "context": 1, "width": 4, "heads": 1, "blocks": 10**9}
ROW: dict[str, object] = {"key": "0" * 32, "error": None, "scenario": {}, "tokens_per_second": 1.0}
IMPORT = ["trace", "import", "{file}", "-o", "out.npz", "--num-experts", "64", "--format"]
INFO = ["trace", "info", "{file}"]
#: The file's name, what makes it, the command, and what it says; None where it is read, or refused in other words.
FILES: dict[str, tuple[str, Make, list[str], str | None]] = {
    "npz of zeros": ("t.npz", npz(experts=np.zeros((400 * MB, 1, 1), np.uint8)), INFO, "unpack to"),
    "npz of more rows than it is large": (
        "t.npz",
        npz(experts=np.zeros((60 * MB, 1, 1), np.uint8), meta=np.array('{"num_experts": 2}')),
        INFO,
        "60,000,000 tokens would take",
    ),
    "npz whose header lies": ("t.npz", npy_that_says((10**9, 64, 8)), INFO, "needs 512,000,000,000 bytes"),
    "npz of an empty array with a length": ("t.npz", npy_that_says((10**12, 0, 1)), INFO, "experts: shape"),
    "safetensors of an empty array with a length": (
        "t.safetensors",
        header_of([10**12, 0, 1]),
        INFO,
        "experts: shape (1000000000000, 0, 1)",
    ),
    "a trace of a top-k of thousands": (
        "t.npz",
        npz(experts=np.arange(60_000, dtype=np.uint16)[None, None], meta=np.array('{"num_experts": 60000}')),
        INFO,
        "k = 60,000: must be at most 512",
    ),
    "a trace of more experts than any model": (
        "t.npz",
        npz(experts=np.zeros((1, 60_000, 1), np.uint8), meta=np.array('{"num_experts": 60000}')),
        INFO,
        "60,000 layers of 60,000 experts",
    ),
    "route of 65,536 slots": (
        "t.route.csv",
        text(ROUTE.format(layers=65536, experts=65536, k=65536) + COLUMNS + "0,0,0,0,0,0\n"),
        INFO,
        "n_expert_used 1..n_expert, and at most 512",
    ),
    "route of many tokens and many layers": ("t.route.csv", text(SPARSE_ROUTE), INFO, "would take"),
    "route with a header of spaces": ("t.route.csv", text("# model=" + " " * (3 * MB)), INFO, "no header"),
    "route of commas": ("t.route.csv", text(ROUTE.format(layers=1, experts=2, k=1) + "," * (3 * MB)), INFO, None),
    "jsonl of short lines": ("log", text("[0]\n" * 900_000), [*IMPORT, "jsonl"], None),
    "jsonl of one token with layers that it passes": (
        "log",
        text("[" + "null," * 400_000 + str([list(range(64))])[1:]),
        [*IMPORT, "jsonl"],
        "1 tokens x 400,001 layers x 64 ids would take",
    ),
    "guide of empty lists": ("log", text("[" + "[],[[]]," * 400_000 + "[1]]"), [*IMPORT, "guide"], "must be a list"),
    "guide of brackets": ("log", text("[" * (3 * MB)), [*IMPORT, "guide"], "not JSON"),
    "printed ids: spaces": ("log", text("topk_ids" + " " * (3 * MB)), [*IMPORT, "topk-ids"], "no topk_ids found"),
    "printed ids: spaces behind tensor": (
        "log",
        text("topk_ids=tensor" + " " * (3 * MB)),
        [*IMPORT, "topk-ids"],
        "no topk_ids found",
    ),
    "printed ids: brackets that open": (
        "log",
        text("layer 0 topk_ids [[ " * 150_000),
        [*IMPORT, "topk-ids"],
        "no topk_ids found",
    ),
    "printed ids: brackets that nearly close": (
        "log",
        text("layer 0 topk_ids [[" + "] " * (MB + 500_000)),
        [*IMPORT, "topk-ids"],
        "no tokens",
    ),
    "printed ids: signs behind layer": (
        "log",
        text("layer " + "=" * (3 * MB) + " topk_ids [[1]]"),
        [*IMPORT, "topk-ids"],
        "no layer is named before it",
    ),
    "printed ids: a valid log of 15,000 tensors": (
        "log",
        text("".join(f"layer {n % 8} topk_ids: tensor([[3, 1]], device='cuda')\n" for n in range(15_000))),
        [*IMPORT, "topk-ids"],
        None,
    ),
    "printed ids: every layer once, and as many steps": (
        "log",
        text("".join(f"layer {n} topk_ids [[1]]\n" for n in range(60_000)) + "layer 0 topk_ids [[1]]\n" * 60_000),
        [*IMPORT, "topk-ids"],
        "60,001 tokens x 60,000 layers would take",
    ),
    "a model of 50 million blocks": ("m.toml", model("blocks = 32", "blocks = 50000000"), [], "less than or equal"),
    "a model of many stacks": (
        "m.toml",
        model("[[stacks]]", "[[stacks]]\nblocks = 60000\n[[stacks]]\nblocks = 60000\n[[stacks]]"),
        [],
        "120,032 blocks in all",
    ),
    "a model of a million experts": ("m.toml", model("experts = 8", "experts = 1000000"), [], "experts in all of them"),
    "weights of 10^9 blocks": (
        "w.safetensors",
        safetensors_of(
            {"format": "prestage-predictor-1", "shape": SHAPE, "made": {}}, norm=np.zeros((2, 4), np.float16)
        ),
        ["predictor", "measure", "{file}"],
        "blocks = 1,000,000,000: must be at most",
    ),
    "a timeline of packed zeros": (
        "t.json.gz",
        gz(b"", b"\0", 400 * MB, b""),
        ["timeline", "summary", "{file}"],
        "unpack",
    ),
    "a timeline of packed lists": (
        "t.json.gz",
        gz(b'{"traceEvents": [', b"[],{},", 10 * MB, b"[]]}"),
        ["timeline", "summary", "{file}"],
        "packs more than 2,000,000 lists and objects",
    ),
    "a timeline of packed lists beside the events": (
        "t.json.gz",
        gz(b'{"about": [', b"[0],", 15 * MB, b'0], "traceEvents": []}'),
        ["timeline", "summary", "{file}"],
        "packs more than 2,000,000 lists and objects",
    ),
    "a timeline of packed numbers": (
        "t.json.gz",
        gz(b"[", b"0,", 30 * MB, b"0]"),
        ["timeline", "summary", "{file}"],
        "packs more than 2,000,000 events",
    ),
    "a measured run of packed zeros": (
        "m.json.gz",
        gz(b"", b"\0", 400 * MB, b""),
        ["calibrate", "validate", "--profile", "h200", "-o", "v", "--measured", "{file}"],
        "unpack",
    ),
    "a scenario whose key has a million parts": (
        "s.toml",
        text("a." * 400_000 + "a = 1"),
        ["run", "{file}"],
        "a key of 400,001 parts",
    ),
    "a scenario of quoted parts": ("s.toml", text('"a".' * 200_000 + "a = 1"), ["run", "{file}"], "200,001 parts"),
    "a scenario of 3 MB": ("s.toml", text("# \n" * MB), ["run", "{file}"], "of TOML: must be at most"),
    "a scenario of unknown keys": (
        "s.toml",
        text("".join(f"k{n} = 1\n" for n in range(50_000))),
        ["run", "{file}"],
        "and 49,993 more",  # its workload is missing, too
    ),
    "a journal of 15,000 keys": (
        "s.jsonl",
        text("".join(json.dumps({**ROW, "settings": {f"k{n}": n}}) + "\n" for n in range(15_000))),
        ["plot", "tornado", "{file}", "-o", "x.png"],
        "its rows vary 15,000 keys",
    ),
    "a journal of 15,000 lines to draw": (
        "s.jsonl",
        text("".join(json.dumps({**ROW, "settings": {"a": n, "b": n}}) + "\n" for n in range(15_000))),
        ["plot", "lines", "{file}", "-o", "x.png"],
        "b has 15,000 values: at most 200",
    ),
    "a fit of many layers": (
        "f.json",
        text(
            json.dumps(
                {
                    "format": "prestage fitted routing 1",
                    "model": "m",
                    "num_experts": 65536,
                    "top_k": 1,
                    "echo": [0] * 16,
                    "layers": [{"common": 0, "popularity": 0, "drift": 0, "recency": [0] * 33}] * 20_000,
                }
            )
        ),
        ["trace", "synth", "--fit", "{file}", "-o", "o.npz"],
        None,
    ),
}


def run(arguments: list[str], folder: Path) -> tuple[int, str, float, int]:
    """Run a command in `folder`: its status, what it said, its processor time in seconds, and its peak in bytes."""
    command = [sys.executable, "-I", "-S", "-c", MEASURE, str(folder / "said"), START, str(folder), *arguments]
    measured = subprocess.run(command, capture_output=True, text=True, check=True)
    status, took_s, peak = json.loads(measured.stdout)
    peak_bytes = peak * (1 if sys.platform == "darwin" else 1024)
    return status, (folder / "said").read_text("utf-8"), took_s, peak_bytes


#: Starts the command from a process that is small: the peak of one just started is at least what its parent holds.
MEASURE = """import json, os, sys
to = [(os.POSIX_SPAWN_OPEN, 1, sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o600), (os.POSIX_SPAWN_DUP2, 1, 2)]
command = [sys.executable, "-c", *sys.argv[2:]]
_, status, usage = os.wait4(os.posix_spawn(sys.executable, command, os.environ, file_actions=to), 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""
#: What never ends is ended by the operating system, after three times what is allowed.
START = f"""import os, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({3 * MOST_S}, {3 * MOST_S}))
os.chdir(sys.argv.pop(1))
from prestage.cli import main
main()
"""


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "posix_spawn"), reason="measures processes as Unix does")
@pytest.mark.parametrize("name", FILES)
def test_no_small_file_takes_much_memory_or_time(tmp_path: Path, name: str) -> None:
    file, make, arguments, message = FILES[name]
    make(tmp_path / file)
    assert (tmp_path / file).stat().st_size < MOST_FILE_BYTES
    arguments = arguments or ["run", "synthetic", "--set", "model.preset={file}"]
    given = [argument.format(file=f"./{file}") for argument in arguments]
    status, said, took_s, peak_bytes = run(given, tmp_path)
    assert (took_s < MOST_S, peak_bytes < MOST_BYTES) == (True, True), (took_s, bytes_words(peak_bytes))
    if message is not None:
        assert (status, said.count("\n")) == (2, 1), said[:1000]
        assert message in said
    assert "Traceback" not in said


#: Numbers that would take memory or time by their value, in the default synthetic scenario; what is said of them.
NUMBERS: dict[str, str] = {
    "workload.synthetic.tokens=1000000000000": "tokens = 1,000,000,000,000",
    "prefetch.lookahead=1000000000": "prefetch.lookahead = 1000000000: must be less than or equal to 1024",
    "prefetch.k=1000000000": "prefetch.k = 1000000000: a layer has 32 experts",
    "predictor.context=1000000000": "predictor.context = 1000000000: must be less than or equal to 1024",
    "model.layers=1000000000": "model.layers = 1000000000",
    "model.experts=1000000000": "experts in all of them",
    "parallel.gpus=1000000000": "parallel.gpus = 1000000000: must be less than or equal to 1024",
    "parallel.stages=1000000000": "parallel.stages = 1000000000: must be less than or equal to 1024",
    "parallel.replicas=1000000000": "parallel.replicas = 1000000000: must be less than or equal to 1024",
    "parallel.micro_batches=1000000000": "parallel.micro_batches = 1000000000: must be less than or equal to 1024",
    "tiers.io_lanes=1000000000": "tiers.io_lanes = 1000000000: must be less than or equal to 1024",
    "copy.chunk_bytes=1": "copy.chunk_bytes = 1: an expert of",
    "tiers.chunk_bytes=1": "tiers.chunk_bytes = 1: an expert of",
}


@pytest.mark.parametrize("setting", NUMBERS)
def test_no_number_of_a_scenario_takes_memory_by_its_value(setting: str) -> None:
    from prestage.engine.load import load_inputs
    from prestage.engine.scenario.scenario import load_scenario

    with pytest.raises(InputError) as caught:
        load_inputs(load_scenario("synthetic", [setting]))
    assert NUMBERS[setting] in str(caught.value)


def test_more_places_than_sequences_take_no_memory() -> None:
    from prestage.workloads.batches import plan_steps

    sequence, phase = np.array([0, 0, 1]), np.ones(3, dtype=np.uint8)
    wide, narrow = (plan_steps(sequence, phase, batch=batch, micro_batches=1) for batch in (10**12, 2))
    assert [step.rows.tolist() for step in wide] == [step.rows.tolist() for step in narrow] == [[0, 2], [1]]


OPTIONS: dict[str, tuple[list[str], str]] = {
    "points": (["mrc", "guide", "--points", "1000000000"], "points = 1000000000: must be at least 1, and at most"),
    "horizons": (["predictor", "evaluate", "guide", "--horizons", "1000000000"], "horizons = 1,000,000,000"),
    "recall": (["predictor", "evaluate", "guide", "--recall", "1000000000"], "would take"),
    "replay": (
        ["replay", "guide", "--budget", "25%", "--eviction", "guess-informed", "--lookahead", "1000000000"],
        "",
    ),
    "context": (["predictor", "train", "guide", "-o", "w", "--context", "1000000000"], "context = 1,000,000,000"),
    "epochs": (["predictor", "train", "guide", "-o", "w", "--epochs", "1000000000"], "epochs = 1000000000"),
    "tokens": (["trace", "synth", "-o", "t.npz", "--tokens", "1000000000000"], "tokens = 1,000,000,000,000"),
    "sequences": (["trace", "synth", "-o", "t.npz", "--sequences", "1000000000000"], "sequences = 1000000000000"),
    "replicates": (["run", "synthetic", "--replicates", "1000000000"], "'--replicates'"),
    "repeats": (["calibrate", "execute", "default", "-o", "e", "--repeats", "1000000000"], "'--repeats'"),
    "workers": (["sweep", "synthetic", "--grid", "seed=1,2", "--workers", "1000000000"], "workers = 1,000,000,000"),
    "sample": (["sweep", "synthetic", "--grid", "seed=1,2", "--sample", "1000000000"], "sample = 1000000000"),
    "layers": (["trace", "import", "x", "-o", "t.npz", "--layers", "1000000000"], "layers = 1000000000"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_number_of_an_option_takes_memory_by_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from prestage import cli

    arguments, message = OPTIONS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["prestage", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr()
    assert (caught.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert message in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_grid_of_more_than_can_be_run_is_refused_and_a_sample_of_it_is_not() -> None:
    from prestage.experiments.grid import GridError, make_grid

    values = {key: list(range(1, 1001)) for key in ("seed", "workload.batch", "workload.chunk_tokens")}
    with pytest.raises(GridError, match="1,000,000,000 combinations: at most 1,000,000 are run: sample them"):
        make_grid("synthetic", values)
    assert len(make_grid("synthetic", values, sample=5)) == 5
    with pytest.raises(GridError, match="20,000 values: must be at most 10,000"):
        make_grid("synthetic", {"seed": list(range(20_000))})


# The functions themselves.


def test_what_a_file_may_ask_for_grows_with_its_size() -> None:
    assert allowed_bytes(1) == allowed_bytes(4 << 20) == 512 << 20
    assert allowed_bytes(40 << 20) == 128 * (40 << 20)


def test_what_is_packed_like_real_data_is_read(tmp_path: Path) -> None:
    content = json.dumps([{"name": f"kernel {n % 7}", "ts": n * 1.25, "dur": 3} for n in range(50_000)]).encode()
    packed = gzip.compress(content)
    assert len(content) > 10 * len(packed)
    assert unpacked(packed, "it") == content
    (tmp_path / "t.json.gz").write_bytes(packed)
    assert read_json(tmp_path / "t.json.gz") == content
    assert unpacked(b"plain", "it") == b"plain"


def test_a_broken_gz_file_is_one_line() -> None:
    packed = gzip.compress(b"some text" * 1000)
    for broken in (packed[:-9], packed[:10] + b"\xff" * 20, packed[:-8] + b"12345678"):
        with pytest.raises(InputError, match=r"^it: a broken .gz file: "):
            unpacked(broken, "it")


def test_npz_arrays_come_back_as_they_are(tmp_path: Path) -> None:
    arrays = {"a": np.arange(12).reshape(3, 4), "b": np.array("text"), "c": np.asfortranarray(np.eye(3))}
    np.savez_compressed(tmp_path / "t.npz", **arrays)  # type: ignore[arg-type]
    read = read_npz(tmp_path / "t.npz")
    assert read.keys() == arrays.keys()
    assert all(np.array_equal(read[name], value) for name, value in arrays.items())


def test_memory_that_nobody_has_is_refused_and_what_is_needed_is_not() -> None:
    check_memory("so much", 1000)
    with pytest.raises(InputError, match=r"^so much: would take 8\.00 PiB of memory, and at most .*: ask for less$"):
        check_memory("so much", MOST_ASKED_BYTES << 20)


def test_toml_of_long_texts_with_many_dots_is_read() -> None:
    said = "." * 500
    assert parse_toml(f"a = '{said}' # {said}\nb.c = 1.5", "it") == {"a": said, "b": {"c": 1.5}}
    with pytest.raises(InputError, match=r"^it: not TOML: "):
        parse_toml("a = ", "it")


def test_sizes_are_written_as_people_do() -> None:
    assert [bytes_words(size) for size in (0, 1, 1023, 1024, 1536, 4_724_464_026, 1 << 62)] == [
        "0 bytes", "1 byte", "1,023 bytes", "1.00 KiB", "1.50 KiB", "4.40 GiB", "4,096.00 PiB",
    ]  # fmt: skip
