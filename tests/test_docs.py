"""The documentation: its code runs and prints what the page shows; the site builds without loading from elsewhere."""

from __future__ import annotations

import configparser
import contextlib
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from browser import browsing
from docs_pages import DOCS, ROOT, RUNS, Block, blocks, make_folder, with_outputs, without_keys

from prestage import plugins
from prestage.engine.decide.program import Stage
from prestage.engine.decide.sources import EVICTIONS, PREFETCHES
from prestage.engine.policies.copy_order import COPY_ORDERS
from prestage.engine.policies.eviction import EVICTION
from prestage.engine.policies.prefetch import PREFETCH
from prestage.engine.policies.scheduler import SCHEDULERS
from prestage.engine.timing import runs
from prestage.engine.timing.host import CARRY_OUT
from prestage.workloads.importers import IMPORTERS
from prestage.workloads.predictors import PREDICTORS

PAGES = sorted(DOCS.glob("*.md"))
WITH_CODE = [page for page in PAGES if any(block.runs for block in blocks(page.read_text(encoding="utf-8")))]


@pytest.mark.docs
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    with contextlib.ExitStack() as added:  # what a page adds is gone after it
        for table in (EVICTION, PREFETCH, PREDICTORS, IMPORTERS, COPY_ORDERS, CARRY_OUT, SCHEDULERS, plugins._loaded):
            added.enter_context(patch.dict(table))
        added.enter_context(patch.object(runs, "Stage", Stage))
        again = with_outputs(text, make_folder(tmp_path))
    assert without_keys(again) == without_keys(text), f"renew it: python tests/docs_pages.py docs/{page.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_is_not_run_says_why(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(blocks(text)), "every block is whole"
    for block in blocks(text):
        if block.language in RUNS and not block.runs:
            assert block.reason and len(block.reason.split()) >= 3, block.text


@pytest.mark.parametrize(
    ("name", "table", "key"),
    [
        ("add-a-policy", EVICTION, "mru"),
        ("add-a-prefetch-policy", PREFETCH, "agreed"),
        ("add-a-predictor", PREDICTORS, "hot"),
        ("add-an-importer", IMPORTERS, "pipes"),
        ("add-a-copy-order", COPY_ORDERS, "deadline"),
    ],
)
def test_a_page_that_adds_something_adds_what_was_not_there(name: str, table: dict[str, object], key: str) -> None:
    assert f'["{key}"] = ' in (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert key not in table


#: What can be added, each with a page that says how: the code before a sentence that says how many lines it takes.
RECIPES = sorted(DOCS.glob("add-*.md"))
_TAKES = re.compile(r"^It takes one file and (\d+) lines\.", re.MULTILINE)


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.name)
def test_a_recipe_says_how_many_lines_it_takes(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    said = _TAKES.search(text)
    assert said is not None
    lines = [line for block in blocks(text[: said.start()]) if block.runs for line in written(block)]
    assert len(lines) == int(said[1])


def written(block: Block) -> list[str]:
    """The lines of a block that a reader writes to a file: all of Python's, a shell's that go into one."""
    lines = [line for line in block.text.splitlines() if line.strip()]
    if block.language == "python":
        return lines
    first = next(number for number, line in enumerate(lines, 1) if line.endswith("<<'END'"))
    return lines[first : lines.index("END")]


def test_the_code_map_has_every_folder_and_leads_to_every_recipe() -> None:
    text = (DOCS / "code-map.md").read_text(encoding="utf-8")
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    folders = {name.removeprefix("prestage.").replace(".", "/") for name in config["options"]["packages"].split()[1:]}
    table = text.partition("## Folders")[2].partition("<!-- ")[0]
    assert set(re.findall(r"^\| `([\w/.]+)` \|", table, re.MULTILINE)) == folders
    added = text.partition("## Add something")[2]
    assert {f"{name}.md" for name in re.findall(r"\]\(([\w-]+)\.md\)", added)} == {page.name for page in RECIPES}
    for path in re.findall(r"`([\w/]+(?:/[\w.]+)+)` \|$", added, re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_what_the_code_map_says_is_decided_somewhere_is_defined_there() -> None:
    text = (DOCS / "code-map.md").read_text(encoding="utf-8")
    table = text.partition("## Where to look")[2].partition("\n## ")[0]
    rows = re.findall(r"`([\w.]+)` in `([\w/.]+)`", table)
    assert len(rows) > 8
    for name, file in rows:
        defined = rf"^ *(def|class) {name.rpartition('.')[2]}\b|^{name}\b"
        assert re.search(defined, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (name, file)


def test_the_page_of_engines_names_every_policy_that_is_decided_in_python() -> None:
    section = (DOCS / "engines.md").read_text(encoding="utf-8").partition("## Decisions in compiled code")[2]
    named = set(re.findall(r"`([\w-]+)`", section.partition("on GPUs that share experts:")[0]))
    of_python = {name for name, kind in EVICTION.items() if kind not in EVICTIONS}
    of_python |= {name for name, kind in PREFETCH.items() if kind not in PREFETCHES}
    assert of_python == named & {*EVICTION, *PREFETCH} - {"next-layer"}  # which is so over some models alone


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A warning fails: a link that leads nowhere, an anchor that is not there, a page in no menu."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (the extra `docs`)")
    folder = tmp_path_factory.mktemp("site")
    # Without --quiet, which would also keep warnings from being counted.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.process
@pytest.mark.docs
def test_the_site_has_every_page_and_names_nothing_to_load_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']((?:https?:)?//[^"']+)""")
    built = sorted(site.rglob("*.html"))
    assert {f"{page.stem}.html" for page in PAGES} <= {page.name for page in built}
    for page in built:
        assert not loaded.findall(page.read_text(encoding="utf-8")), page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style.name


@pytest.mark.browser
@pytest.mark.process
@pytest.mark.docs
def test_the_site_is_read_in_a_browser_without_a_network(site: Path) -> None:
    with browsing(site) as opened:
        for name in ("index", "tutorial", "suite"):
            opened.page.goto(f"{opened.url}/{name}.html")
            assert opened.page.locator("h1").count() == 1
        assert all(opened.page.evaluate("[...document.images].map(image => image.naturalWidth)"))
    assert (opened.console_errors, opened.refused) == ([], [])
