"""README.md and docs/: Python and shell blocks run, links lead somewhere, benchmark tables are rendered."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, SCRIPT

import moreau_ext
from moreau_ext import cli
from moreau_ext.batch import Config
from moreau_ext.cli import explain

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A Python block, the comment that takes it out of this test where there is one, and the output that is shown below it.
BLOCK = re.compile(
    r"(?P<skip><!-- not tested: .+? -->\n)?^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
SHELL = re.compile(r"(?P<skip><!-- parsed only: .+? -->\n)?^```bash\n(?P<code>.*?)^```\n", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
IMAGE = re.compile(r'<img src="(?!https?:)(?P<path>[^"]+)"')
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def blocks(page: Path) -> list[re.Match[str]]:
    return [block for block in BLOCK.finditer(page.read_text("utf-8")) if not block["skip"]]


def commands(block: str) -> list[list[str]]:
    """The arguments of each ``moreau-ext`` in a shell block."""
    lines = block.replace("\\\n", " ").replace("&&", "\n").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["moreau-ext"]]


def run_python(page: Path, block: re.Match[str], names: dict[str, object]) -> None:
    # Empty lines before the code, so that a traceback names the line of the page.
    code = "\n" * page.read_text("utf-8").count("\n", 0, block.start("code")) + block["code"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(page), "exec"), names)
    if block["output"] is not None:
        assert NUMBER.sub("N", printed.getvalue()) == NUMBER.sub("N", block["output"])
        # Another processor rounds otherwise while the example's net is trained, and that moves its maps a little.
        shown = [float(number) for number in NUMBER.findall(block["output"])]
        assert [float(number) for number in NUMBER.findall(printed.getvalue())] == pytest.approx(shown, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, Python in one namespace, from an empty folder; no file has the place of a tracked one."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    path = f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}"
    text = page.read_text("utf-8")
    for block in sorted([*blocks(page), *SHELL.finditer(text)], key=lambda match: match.start()):
        if block.re is BLOCK:
            run_python(page, block, names)
        elif not block["skip"] and "pip install" not in block["code"]:
            subprocess.run(["bash", "-e", "-c", block["code"]], check=True, env={**os.environ, "PATH": path})
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    for folder in (ROOT, page.parent):
        listed = subprocess.run(["git", "-C", folder, "ls-files"], capture_output=True, text=True, check=False)
        assert not {str(path) for path in made} & {*listed.stdout.splitlines()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_commands_are_understood(page: Path) -> None:
    """Also of blocks that are too expensive to run: every option exists and takes its value."""
    for block in SHELL.finditer(page.read_text("utf-8")):
        for line in commands(block["code"]):
            arguments = argparse.Namespace(command=None)
            cli._Commands().parse(line, arguments)
            if arguments.command == "explain":
                settings = {name: getattr(arguments, name) for name in explain._SETTINGS}
                Config(**settings, target=arguments.target)


def test_every_page_with_python_is_tested() -> None:
    for page in PAGES:
        fences = len(re.findall(r"^ *```python", page.read_text("utf-8"), re.MULTILINE))
        assert fences == len(list(BLOCK.finditer(page.read_text("utf-8")))), page.name


def test_links_lead_somewhere() -> None:
    def anchors(page: Path) -> set[str]:
        """As GitHub makes them from headings."""
        headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def written(page: Path) -> str:
        """Without the code of a notebook."""
        text = page.read_text("utf-8")
        if page.suffix != ".ipynb":
            return text
        return "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")

    notebooks = sorted((ROOT / "examples").glob("*.ipynb"))
    for page in [*PAGES, *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *notebooks]:
        for image in IMAGE.finditer(written(page)):
            assert (page.parent / image["path"]).is_file(), f"{page.name}: {image['path']}"
        for link in LINK.finditer(written(page)):
            target = (page.parent / link["path"]).resolve() if link["path"] else page
            assert target.exists(), f"{page.name}: {link['path']}"
            if link["anchor"]:
                assert link["anchor"] in anchors(target), f"{page.name}: {link['path']}#{link['anchor']}"


def test_the_readme_fits_a_page() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 100
    assert len(text.split()) <= 700


def test_the_api_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: moreau_ext\.(\S+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.MULTILINE)
    public = {f"{where}.{name}" for name, where in moreau_ext._WHERE.items()}
    public |= {f"{name}.{member}" for name in moreau_ext._MODULES for member in getattr(moreau_ext, name).__all__}
    assert sorted(listed) == sorted(public)


def test_benchmark_tables_are_rendered() -> None:
    script = ROOT / "tools" / "render_benchmarks.py"
    checked = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
