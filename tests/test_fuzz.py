"""Damaged files of every reader are read, or refused in a line: a few of each here, as many as wanted by fuzz.py."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import fuzz
import pytest

from prestage.errors import InputError

#: Damages of each reader here.
TRIES = 40


@pytest.mark.parametrize("name", fuzz.READERS)
def test_a_damaged_file_is_read_or_refused_in_a_line(name: str, tmp_path: Path) -> None:
    reader = fuzz.READERS[name]
    valid = reader.make()
    (tmp_path / reader.name).write_bytes(valid)
    reader.read(tmp_path / reader.name)  # what is damaged was valid
    for seed in range(TRIES):
        error = fuzz.crash(reader, fuzz.damaged(reader, seed, valid), tmp_path)
        assert error is None, f"seed {seed}: {error!r}"


def _npz_of_a_header(text: str) -> bytes:
    """An archive whose array has a header of its own words."""
    written, stream = text.encode(), io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("experts.npy", b"\x93NUMPY\x01\x00" + len(written).to_bytes(2, "little") + written)
    return stream.getvalue()


def _blocks(count: int) -> bytes:
    """A config of so many blocks, of which the last alone is of experts."""
    config = json.loads((fuzz.CONFIGS / "DeepSeek-V3.json").read_text())
    return json.dumps(config | {"num_hidden_layers": count, "first_k_dense_replace": count - 1}).encode()


def _sampled(samples: list[float]) -> bytes:
    """Rows of llama-bench, the first with these samples."""
    rows = json.loads(fuzz.READERS["llama-bench"].make())
    return json.dumps([rows[0] | {"n_prompt": 0, "n_gen": 8, "samples_ns": samples}, *rows[1:]]).encode()


def _log(token: str) -> bytes:
    return f'{{"req_id": "r1", "token_idx": {token}, "layer": 0, "topk_ids": [1, 7]}}\n'.encode()


_YEARS = "TIMESTAMP,ContextTokens,GeneratedTokens\n9999-11-16 18:17:03.9799600,4808,10\n"
_LARGE = '{"timestamp": 1, "input_length": 1' + "0" * 400 + ', "output_length": 52, "hash_ids": [46]}\n'
#: What was found: by reader, what is read, and what is said of it (None: nothing, within a second or so).
FOUND = {
    "a header that breaks off within brackets": (
        "trace.npz",
        _npz_of_a_header("{'descr': (\n"),
        "experts: damaged",
    ),
    "a header indented as no program is": ("trace.npz", _npz_of_a_header("{}\n  1\n 2\n"), "experts: damaged"),
    "the number of a token that is infinite": ("log: a row a token and layer", _log("1e400"), "token_idx = 'inf'"),
    "a year that 64 bits of ns do not reach": ("azure", _YEARS.encode(), "TIMESTAMP = '9999"),
    "tokens that no float holds": ("mooncake", _LARGE.encode(), "input_length = 1000"),
    "a row of no samples": ("llama-bench", _sampled([]), r"samples_ns = \[\]"),
    "65,536 blocks of a pattern that never repeats": ("config.json of MLA", _blocks(65536), None),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_is_read_or_refused_in_a_line(what: str, tmp_path: Path) -> None:
    name, content, says = FOUND[what]
    reader = fuzz.READERS[name]
    assert fuzz.crash(reader, content, tmp_path) is None
    if says is not None:
        with pytest.raises(InputError, match=says):
            reader.read(tmp_path / reader.name)
