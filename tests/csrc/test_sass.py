"""The machine code of the vector kernels: no local memory, 16-byte loads, as many in flight as were asked for, and
normals within their budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

BENCHMARKS = ROOT / "benchmarks"


def test_the_vector_kernels_in_machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one architecture; `benchmarks/ptxas_table.py` looks for spills on all."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sass_table

    if sass_table.nvcc() is None or sass_table.nvdisasm() is None:
        pytest.skip("needs nvcc and nvdisasm")
    path = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / "sass_table.py"), "--sources", "prox_step,perturb", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["kernel"]: row for row in json.loads(path.read_text())}
    # A copy at 8.6 bytes a feature leaves an H200 about 60 instructions for each, 80 at three quarters of it.
    kernels = [f"prox_step{kind}_kernel<{dtype}, 1>" for kind in ("", "_group") for dtype in ("float32", "bfloat16")]
    for kernel in kernels:
        assert rows[kernel]["in_flight"] >= 8  # rows of gradients: the registers must not split them
    for kernel in [*kernels, "perturb_kernel<float32, 1>"]:
        assert rows[kernel]["independent"] <= 40
        assert rows[kernel]["antithetic"] <= 22
