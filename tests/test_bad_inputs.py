"""Whatever is bad ends in one line that names what is bad, with exit status 2, and leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from bad_inputs import CORPUS, Bad, make_good

from prestage.cli import main


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of good files, made by the commands that make them."""
    folder = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)

        def call(*words: str) -> None:
            patch.setattr(sys, "argv", ["prestage", *words])
            with pytest.raises(SystemExit) as left:
                main()
            assert not left.value.code, words

        make_good(folder, call)
    return folder


@pytest.mark.parametrize("bad", CORPUS, ids=[bad.name for bad in CORPUS])
def test_a_bad_input_is_one_line_that_names_it(
    bad: Bad, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad.lay_out(tmp_path, good)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prestage", *bad.command])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (2, ""), err
    assert err.startswith("prestage: ") and len(err.splitlines()) == 1, err
    assert all(part in err for part in bad.says), err
    assert len(err) < 2000, err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_corpus_is_as_large_as_it_must_be_and_names_nothing_twice() -> None:
    assert len(CORPUS) >= 300
    assert len({bad.name for bad in CORPUS}) == len(CORPUS)
