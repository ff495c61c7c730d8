"""The documentation's code runs as it stands there, a page's Python blocks one after the other in one module."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest

from prestage.engine.policies.eviction import EVICTION

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = sorted(page for page in DOCS.glob("*.md") if BLOCK.search(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path) -> None:
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    with patch.dict(EVICTION):  # what a page adds is gone after it
        exec(compile("\n".join(blocks), page.name, "exec"), {"__name__": page.stem})


def test_the_page_on_policies_adds_one_that_was_not_there() -> None:
    (page,) = [page for page in PAGES if page.name == "add-a-policy.md"]
    assert 'EVICTION["mru"] = Mru' in page.read_text(encoding="utf-8")
    assert "mru" not in EVICTION
