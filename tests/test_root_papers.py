"""What stands at the root beside the README is true: links lead somewhere, named tests exist, one version is cited."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAPERS = ("CONTRIBUTING.md", "SECURITY.md")


def setup() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg", encoding="utf-8")
    return parsed


@pytest.mark.parametrize("paper", PAPERS)
def test_links_and_named_files_exist(paper: str) -> None:
    text = (ROOT / paper).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    named = re.findall(r"(?:tests|docs)/[\w/-]+\.(?:py|md)", text)
    assert [name for name in {*links, *named} if not (ROOT / name).exists()] == []
    assert paper == "SECURITY.md" or len(named) > 5  # the patterns find what is there


def test_marks_that_contributing_names_are_declared() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    line = re.search(r"The marks \(([^)]+)\)", text)
    assert line is not None
    declared = {row.split(":")[0] for row in setup()["tool:pytest"]["markers"].strip().splitlines()}
    assert set(re.findall(r"`(\w+)`", line.group(1))) == declared


def test_citation_names_this_version_and_licence() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    cited = dict(re.findall(r"^([\w-]+): ?(.*)$", text, re.MULTILINE))
    metadata = setup()["metadata"]
    assert (cited["version"], cited["license"]) == (metadata["version"], metadata["license"])
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
