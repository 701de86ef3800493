"""benchmarks/gpu.sh on a machine without a GPU: its parts run by stubs; and the benchmarks that it calls take its
options, write rows that tools/render_benchmarks.py can render, and end in time."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from torch import nn

from moreau_ext.preparation.prepare import prepare

BENCHMARKS = ROOT / "benchmarks"
PARTS = [
    *("tests", "explainers", "ops", "resnet50", "vit", "efficientnet", "convnext", "folder"),
    *("racecheck", "memcheck", "synccheck", "initcheck", "ncu", "precision"),
]

TORCH = """
__version__ = "2.11.0"
class cuda:
    is_available = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda: "Stub GPU")
    get_device_capability = staticmethod(lambda: (9, 0))
"""
# Instead of a benchmark: one dies of a signal, one outlasts its limit after the first row, one is to be called again.
PYTHON = """#!/usr/bin/env bash
[[ $* != *"-m pip"* ]] || { while [[ $1 != --target ]]; do shift; done; mkdir -p "$2"; exit 0; }
[[ $* != *"-m pytest"* ]] || { echo "$*" >>"$STUBS/calls"; echo "3 passed in 1 s"; exit 0; }
[[ $1 == *.py && $1 == */benchmarks/* ]] || exec "$REAL_PYTHON" "$@"
echo "$*" >>"$STUBS/calls"
while [[ $1 != --json ]]; do shift; done
echo '{"benchmark": "stub", "machine": {}, "rows": []}' >"$2"
case $2 in
  *ops.json) kill -SEGV $$ ;;
  *precision.json) sleep 60 ;;
  *vit.json) exit 75 ;;
esac
"""


def rendering() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "render_benchmarks.py"))


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """An environment where everything that the script needs is a stub."""
    places = tmp_path / "modules", tmp_path / "commands"
    for place in places:
        place.mkdir()
    for name in ("torch", "numpy", "pytest", "pip", "setuptools", "pybind11", "captum"):
        (places[0] / f"{name}.py").write_text(TORCH if name == "torch" else "")
    for name, version in (("setuptools", "80.1"), ("pybind11", "3.0.1")):
        folder = places[0] / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    commands = dict.fromkeys(("nvcc", "cmake", "ninja", "ncu", "nvidia-smi"), "#!/bin/sh\necho stub\n")
    commands["compute-sanitizer"] = '#!/bin/sh\necho "$*" >>"$STUBS/calls"\necho "ERROR SUMMARY: 0 errors"\n'
    for name, text in {**commands, "python": PYTHON}.items():
        (places[1] / name).write_text(text)
        (places[1] / name).chmod(0o755)
    return {
        **{name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ},
        "PATH": f"{places[1]}:/usr/bin:/bin",
        "PYTHONPATH": str(places[0]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHON": str(places[1] / "python"),
        "REAL_PYTHON": sys.executable,
        "STUBS": str(tmp_path),
        "RESULTS": str(tmp_path / "results"),
        "KEPT": str(tmp_path / "kept"),
        "COMMIT": "0123456789",
    }


def called(stubs: dict[str, str], *parts: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [BENCHMARKS / "gpu.sh", *parts]
    return subprocess.run(command, env={**stubs, **more}, capture_output=True, text=True, cwd=stubs["STUBS"])


def result(stubs: dict[str, str]) -> dict[str, Any]:
    (path,) = Path(stubs["RESULTS"]).glob("stub-gpu-*-0123456.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.slow
def test_every_part_runs_and_is_recorded_whatever_the_others_do(stubs: dict[str, str]) -> None:
    done = called(stubs, LIMIT="2")
    assert done.returncode == 1, done.stdout + done.stderr
    found = result(stubs)
    statuses = {name: part["status"] for name, part in found["parts"].items()}
    failing = {"ops": "failed", "precision": "failed", "vit": "partial"}
    assert statuses == {"build": "passed", **dict.fromkeys(PARTS, "passed"), **failing}
    assert list(found["parts"]) == ["build", *PARTS]  # in the order of their worth
    # What was written before the end came is there.
    assert found["ops"]["rows"] == found["precision"]["rows"] == []
    assert found["racecheck"] == ["ERROR SUMMARY: 0 errors"]
    assert "3 passed" in (Path(stubs["RESULTS"]) / "gpu.log").read_text()
    # A second call runs what did not pass, if there is time, and keeps the rest.
    calls = Path(stubs["STUBS"]) / "calls"
    before = calls.read_text()
    assert "ops: no time" in called(stubs, TOTAL="1").stdout
    assert calls.read_text() == before
    assert "the build of the call before" in called(stubs, LIMIT="2").stdout
    again = calls.read_text()[len(before) :].splitlines()
    assert [line.split(".json")[0].rsplit("/", 1)[1] for line in again] == ["ops", "vit", "precision"]
    assert list(result(stubs)["parts"]) == list(found["parts"])
    # The page takes any such file.
    render = rendering()
    assert "Stub GPU" in render["gpu"]("stub.json", result(stubs))
    known = render["load"](render["H200"])["ops"]["rows"]
    alone = [{**row, "variant": "perturb"} for row in known if row.get("variant") == "noise"]
    assert "full overlap" in render["gpu_ops"]({"ops": {"rows": [*known, *alone]}})

    class Parsed(Exception):
        pass

    def parse(
        parser: argparse.ArgumentParser, given: Any = None, _inner: Any = argparse.ArgumentParser.parse_args
    ) -> Any:
        _inner(parser, given)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        for line in before.splitlines():
            script, *options = line.split()
            if script.endswith(".py"):
                patch.setattr(sys, "argv", [script, *options])
                with pytest.raises(Parsed):
                    runpy.run_path(script, run_name="__main__")


def test_what_is_missing_is_said_at_once(stubs: dict[str, str]) -> None:
    modules = Path(stubs["STUBS"]) / "modules"
    (modules / "setuptools-80.1.dist-info" / "METADATA").write_text("Name: setuptools\nVersion: 65.5\n")
    done = called(stubs)
    assert done.returncode == 2
    assert "lacks: setuptools>=77 (has 65.5);" in done.stderr
    assert not Path(stubs["RESULTS"]).exists()
    assert "no part opps" in called(stubs, "opps").stderr


@pytest.mark.slow
def test_networks_are_measured_in_slices_that_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_real
    import nets

    def tiny() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))

    monkeypatch.setitem(nets.NETS, "resnet20", nets.Net("tiny", tiny, edge=16, tile=4))
    monkeypatch.setattr(bench_real, "FINER", 4)
    monkeypatch.setattr(bench_real, "prepare", partial(prepare, channels_last=False, probe=False, max_batch=64))
    path = tmp_path / "real.json"
    given = ["bench_real.py", "--nets", "resnet20", "--batches", "1", "--precisions", "float32", "--quick"]
    for seconds, status, said in (("0", 75, "no time for"), ("1000", 0, "complete"), ("1000", 0, "complete")):
        monkeypatch.setattr(sys, "argv", [*given, "--json", str(path), "--seconds", seconds])
        with pytest.raises(SystemExit) as ended:
            bench_real.main()
        assert ended.value.code == status
        assert said in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert {row["slice"] for row in rows} == {"all, float32, 1", "errors, float32, 1"}
    speeds = {row["method"]: row for row in rows if "method" in row}
    assert {"SmoothGrad", "MoreauGrad", "sparse", "group", "bare passes", "published loop"} <= set(speeds)
    assert speeds["bare passes"]["of bare passes"] == 1
    assert len([row for row in rows if "method" in row]) == len(speeds)
    # Reference and maps have the same limit.
    assert all(row["error"] < 0.5 for row in rows if "error of" in row)
    text = rendering()["gpu_networks"](rows) + rendering()["gpu_errors"](rows)
    assert "tiny, float32, 1" in text
    assert "MoreauGrad is there with" in text
    assert torch.is_grad_enabled()
