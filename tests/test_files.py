"""The one writer: files and folders are whole or not there, and an error names what was asked for."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prestage.errors import InputError
from prestage.files import check_file, check_folder, made_folder, naming, replacing, replacing_folder, write_file


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """The operating system refuses to let any file of this process grow larger, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_is_whole_or_what_it_was_before(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert (path.read_bytes(), everything_in(tmp_path)) == (b"old", ["a"])
    write_file(path, b"new")
    assert (path.read_bytes(), everything_in(tmp_path)) == (b"new", ["a"])


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large") as raised:
        write_file(tmp_path / "p.png", bytes(2000))
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / "p.png"))
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("name", ["none/a", "file/a", "folder", "a" * 300])
def test_what_cannot_be_written_is_named_as_it_was_given(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as raised:
        write_file(tmp_path / name, b"")
    assert raised.value.filename == str(tmp_path / name)
    assert everything_in(tmp_path) == ["file", "folder"]


def test_a_name_may_be_as_long_as_the_file_system_lets_it(tmp_path: Path) -> None:
    write_file(tmp_path / ("a" * 255), b"")  # a temporary name that is longer than this would be refused
    assert everything_in(tmp_path) == ["a" * 255]


def test_a_link_goes_on_pointing_to_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/a")
    write_file(tmp_path / "link", b"a")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "a").read_bytes() == b"a"


def test_a_folder_is_whole_or_not_there_nor_its_parents(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with pytest.raises(ValueError, match="half"), replacing_folder(out) as folder:
        write_file(folder / "one", b"1")
        raise ValueError("half")
    assert everything_in(tmp_path) == []
    with replacing_folder(out) as folder:
        write_file(folder / "one", b"1")
    assert everything_in(tmp_path) == ["a", "a/b", "a/b/one"]


def test_a_folder_that_is_there_keeps_what_is_not_written_anew(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    for name in ("mine", "one", "figures/old", "figures/new"):
        (tmp_path / name).write_text("before")
    with replacing_folder(tmp_path) as folder:
        (folder / "figures").mkdir()
        for name in ("one", "figures/new"):
            write_file(folder / name, b"after")
        assert (tmp_path / "one").read_text() == "before"
    now = {name: (tmp_path / name).read_text() for name in everything_in(tmp_path) if name != "figures"}
    assert now == {"mine": "before", "one": "after", "figures/old": "before", "figures/new": "after"}


@pytest.mark.parametrize("way", ["b", "c/d", "c"])
def test_what_is_in_the_way_of_one_file_of_a_folder_keeps_all_of_them_away(tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    if way == "c":
        out.mkdir()
        (out / way).touch()
    else:
        (out / way).mkdir(parents=True)
    before = everything_in(out)
    with pytest.raises(OSError) as raised, replacing_folder(out) as folder:
        (folder / "c").mkdir()
        for name in ("a", "b", "c/d"):
            write_file(folder / name, b"")
    assert isinstance(raised.value, NotADirectoryError if way == "c" else IsADirectoryError)
    assert (raised.value.filename, everything_in(out)) == (str(out / way), before)
    assert everything_in(tmp_path) == ["out", *(f"out/{name}" for name in before)]


def test_an_error_names_the_file_that_the_folder_was_to_hold(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with files_of_at_most(1000), pytest.raises(OSError) as raised, replacing_folder(out) as folder:
        write_file(folder / "run.safetensors", bytes(2000))
    assert raised.value.filename == str(out / "run.safetensors")
    assert everything_in(tmp_path) == []
    out.touch()
    with pytest.raises(NotADirectoryError) as raised, replacing_folder(out):
        pass
    assert raised.value.filename == str(out)


def test_a_folder_that_is_filled_little_by_little_keeps_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), made_folder(tmp_path / "a" / "b") as folder:
        raise KeyboardInterrupt
    assert everything_in(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), made_folder(tmp_path / "a" / "b") as folder:
        write_file(folder / "row", b"1")
        raise KeyboardInterrupt
    assert everything_in(tmp_path) == ["a", "a/b", "a/b/row"]
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt), made_folder(tmp_path / "there"):
        raise KeyboardInterrupt
    assert (tmp_path / "there").is_dir()


@pytest.mark.parametrize("name", ["file", "file/a/b", "/proc/a/b"])
def test_a_folder_that_cannot_be_is_refused_before_anything_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as raised:
        check_folder(tmp_path / name)
    assert raised.value.filename == str(tmp_path / name)
    check_folder(tmp_path / "a" / "b")
    assert everything_in(tmp_path) == ["file"]


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    check_file(tmp_path / "a")
    with pytest.raises(InputError, match=r"none/a: there is no folder .*none$"):
        check_file(tmp_path / "none" / "a")
    with pytest.raises(IsADirectoryError) as raised:
        check_file(tmp_path)
    assert raised.value.filename == str(tmp_path)
    with pytest.raises(OSError) as refused:
        check_file("/proc/a")
    assert refused.value.filename == "/proc/a"
    assert everything_in(tmp_path) == []


def test_errors_that_name_another_file_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised, naming(tmp_path / "out"):
        (tmp_path / "in").read_bytes()
    assert raised.value.filename == str(tmp_path / "in")
