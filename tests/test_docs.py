"""README.md and docs/: Python blocks run, links lead somewhere, benchmark tables are rendered."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A Python block, the comment that takes it out of this test where there is one, and the output that is shown below it.
BLOCK = re.compile(
    r"(?P<skip><!-- not tested: .+? -->\n)?^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def blocks(page: Path) -> list[re.Match[str]]:
    return [block for block in BLOCK.finditer(page.read_text("utf-8")) if not block["skip"]]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text("utf-8"), {"__name__": "__main__"}
    for block in blocks(page):
        # Empty lines before the code, so that a traceback names the line of the page.
        code = "\n" * text.count("\n", 0, block.start("code")) + block["code"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), names)
        if block["output"] is not None:
            assert NUMBER.sub("N", printed.getvalue()) == NUMBER.sub("N", block["output"])
            # Another processor rounds otherwise while the example's net is trained, and that moves its maps a little.
            shown = [float(number) for number in NUMBER.findall(block["output"])]
            assert [float(number) for number in NUMBER.findall(printed.getvalue())] == pytest.approx(shown, rel=0.25)


def test_every_page_with_python_is_tested() -> None:
    for page in PAGES:
        fences = len(re.findall(r"^ *```python", page.read_text("utf-8"), re.MULTILINE))
        assert fences == len(list(BLOCK.finditer(page.read_text("utf-8")))), page.name


def test_links_lead_somewhere() -> None:
    def anchors(page: Path) -> set[str]:
        """As GitHub makes them from headings."""
        headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    for page in [*PAGES, *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"]:
        for link in LINK.finditer(page.read_text("utf-8")):
            target = (page.parent / link["path"]).resolve() if link["path"] else page
            assert target.exists(), f"{page.name}: {link['path']}"
            if link["anchor"]:
                assert link["anchor"] in anchors(target), f"{page.name}: {link['path']}#{link['anchor']}"


def test_the_readme_fits_a_page() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 100
    assert len(text.split()) <= 700


def test_benchmark_tables_are_rendered() -> None:
    script = ROOT / "tools" / "render_benchmarks.py"
    checked = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
