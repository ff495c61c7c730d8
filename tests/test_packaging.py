"""What a user installs: the wheel has every file of the packages and runs without the repository; its papers agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import dependencies
import pytest
from test_root_papers import setup

from prestage.cli import doctor

ROOT = Path(__file__).parent.parent
#: What a package's folder has for those alone who have the repository.
NOT_PACKAGED = (".sh",)
#: Builds the source archive of the folder that it is started in, and a wheel from what that archive unpacks to.
BUILD = """import os, sys, tarfile
from pathlib import Path
from setuptools import build_meta
out = Path(sys.argv[1])
with tarfile.open(out / build_meta.build_sdist(str(out))) as archive:
    archive.extractall(out, filter="data")
os.chdir(next(path for path in out.iterdir() if path.is_dir()))
build_meta.build_wheel(str(out))
"""
#: Runs commands from an unpacked wheel alone, as if no extra were installed.
RUN_ALONE = """import sys
site, extras = sys.argv[1], sys.argv[2].split(",")
sys.modules.update(dict.fromkeys(extras))  # None: not to be found
sys.path.insert(0, site)
import prestage
from prestage.cli import main
assert prestage.__file__.startswith(site), prestage.__file__
for command in sys.argv[3:]:
    sys.argv = ["prestage", *command.split()]
    try:
        main()
    except SystemExit as left:
        assert not left.code, (command, left.code)
"""
ALONE = (
    "run guide --set workload.tokens=20 --no-baselines --engine simpy -o done",
    "report done -o report.html",
    "reproduce published --source colibri --json",
)


def tracked() -> list[str]:
    """Returns the repository's files, with those that will be: git knows which are ignored."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("what is to be packaged is what git tracks: this is no checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def packages() -> list[str]:
    """Returns the folders that setup.cfg lists as packages, "." first."""
    names: list[str] = setup()["options"]["packages"].split()
    return [name.removeprefix("prestage").removeprefix(".").replace(".", "/") or "." for name in names]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel made from it."""
    pytest.importorskip("setuptools")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    for name in tracked():
        if not name.startswith(("calibration/validation/", "calibration/samples/", "docs/")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    done = subprocess.run([sys.executable, "-I", "-c", BUILD, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.mark.process
def test_the_wheel_has_every_file_of_the_packages_and_no_other(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    held = {name.removeprefix("prestage/") for name in names if name.startswith("prestage/")}
    folders = packages()
    inside = {name for name in tracked() if str(Path(name).parent) in folders[1:] and not name.endswith(NOT_PACKAGED)}
    root = {name for name in tracked() if "/" not in name and (name.endswith((".py", ".pyi")) or name == "py.typed")}
    assert held == inside | root
    said = f"prestage-{setup()['metadata']['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"prestage", said}
    assert f"{said}/licenses/LICENSE" in names and f"{said}/entry_points.txt" in names


@pytest.mark.process
def test_the_source_archive_has_the_papers_and_no_half_of_the_tests(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    papers = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"}
    assert papers <= names and not any(name.startswith("tests") for name in names)


@pytest.mark.process
def test_the_wheel_runs_without_the_repository_and_without_any_extra(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    extras = dependencies.imports_of_extras()
    command = [sys.executable, "-I", "-c", RUN_ALONE, str(tmp_path / "site"), ",".join(extras), *ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "report.html").stat().st_size > 50_000 and '"R27-both"' in done.stdout


def test_the_doctor_looks_for_what_is_required_and_for_every_extra_of_users() -> None:
    wanted = {name for name, extra in dependencies.required() if extra == ""}
    assert set(doctor.NEEDED) == wanted
    known = {(name, extra) for name, (_, extra) in doctor.EXTRAS.items()}
    assert known == {each for each in dependencies.required() if each[1] in dependencies.EXTRAS} - {("dask", "cluster")}


def test_the_first_heading_of_the_changelog_is_this_version_or_what_is_to_come() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0].split()[0] == setup()["metadata"]["version"]


def test_the_page_names_every_package() -> None:
    table, _, _ = dependencies.PAGE.read_text(encoding="utf-8").partition("<!-- end -->")
    named = re.findall(r"^\| `([\w.-]+)` \|", table, re.MULTILINE)
    assert named == list(dict.fromkeys(name for name, _ in dependencies.required()))


def test_no_licence_of_what_is_installed_with_it_forbids_its_own() -> None:
    for name, extra in dependencies.required():
        if extra not in dependencies.FOR_TESTS:
            licence = dependencies.licence(metadata.metadata(name)) if dependencies.installed(name) else ""
            assert not re.search(r"(?<!L)GPL|AGPL|non-?commercial", licence, re.IGNORECASE), (name, licence)
