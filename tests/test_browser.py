"""The browser that tests look at pages with sees what is on them, what went wrong, and nothing from elsewhere."""

from pathlib import Path

import pytest
from browser import browsing

pytestmark = pytest.mark.browser

PAGE = """<!doctype html><title>A page</title><p id="p">no script ran</p>
<script>document.getElementById("p").textContent = matchMedia("(prefers-color-scheme: dark)").matches</script>"""


def test_a_page_runs_its_scripts_in_the_color_scheme_asked_for_and_a_good_one_raises_no_error(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(PAGE)
    with browsing(tmp_path, color_scheme="dark") as at:
        at.page.goto(f"{at.url}/page.html")
        assert at.page.title() == "A page"
        assert at.page.text_content("#p") == "true"
        assert (at.console_errors, at.refused) == ([], [])


def test_errors_and_requests_to_elsewhere_are_noted(tmp_path: Path) -> None:
    script = '<script src="http://192.0.2.1/a.js"></script><script>console.error("bad"); throw Error("worse")</script>'
    (tmp_path / "page.html").write_text(PAGE + script)
    with browsing(tmp_path) as at:
        at.page.goto(f"{at.url}/page.html")
        assert at.refused == ["http://192.0.2.1/a.js"]
        assert "bad" in at.console_errors
        assert any("worse" in error for error in at.console_errors)
