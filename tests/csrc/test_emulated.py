"""The CUDA kernels on an emulated GPU (tests/cpp/emulator) against the CPU kernels; needs no GPU.

The emulator compiles the unedited sources of csrc/cuda. It tests indexing, barriers, warp operations, the sums of the
last block to arrive, ragged sizes and addresses, and that an input's bits do not depend on its batch. It cannot test
races between barriers, nor speed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

EMULATOR = ROOT / "tests/cpp/emulator"
CXX = os.environ.get("CXX") or shutil.which("g++")


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    found = (Path(home) / "include" for home in homes if home)
    return next((folder for folder in found if (folder / "cuda_fp16.h").exists()), None)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    headers = cuda_headers()
    if sys.platform != "linux" or platform.machine() != "x86_64" or CXX is None or headers is None:
        pytest.skip("needs Linux on x86-64, g++ and CUDA's headers")
    folder = tmp_path_factory.mktemp("emulated")
    # Contraction off on both sides, as in CMakeLists.txt; a misaligned vector ends the program.
    options = ["-std=c++17", "-O1", "-mfma", "-ffp-contract=off", "-fno-math-errno", "-c"]
    options += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    emulated = ["-I", str(EMULATOR), "-include", "cuda_runtime.h", "-isystem", str(headers), "-Wno-attributes"]
    files = {path: ["-fopenmp"] for path in (ROOT / "csrc/cpu").glob("*.cpp")}
    files |= {path: ["-x", "c++", *emulated] for path in (ROOT / "csrc/cuda").glob("*.cu")}
    files |= {ROOT / "tests/cpp" / name: emulated for name in ("emulator/emulator.cpp", "emulated.cpp")}

    def compiled(path: Path) -> str:
        target = folder / f"{path.parent.name}-{path.stem}.o"
        command = [str(CXX), *options, *files[path], str(path), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        objects = list(workers.map(compiled, sorted(files, key=lambda path: -path.stat().st_size)))
    subprocess.run([str(CXX), *objects, "-fopenmp", "-fsanitize=alignment", "-o", str(folder / "run")], check=True)
    return folder / "run"


@pytest.mark.parametrize("seed", [1, 2])
def test_the_cuda_kernels_give_what_the_cpu_kernels_give(program: Path, seed: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([program, "150", str(seed)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["prox_step", "perturb", "accumulate", "group_norms", "momentum_step"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("barrier", "threads disagree about a barrier"),
        ("warp", "threads disagree about a barrier or a warp operation"),
        ("crossed", "threads disagree about a barrier or a warp operation"),
        ("vector", "no multiple of its size"),
        ("pack", "misaligned address"),
        ("large", "a launch that no GPU takes"),
    ],
)
def test_the_emulator_sees_a_fault(program: Path, name: str, words: str) -> None:
    done = subprocess.run([program, "fault", name], capture_output=True, text=True)
    assert done.returncode in (1, 3)
    assert words in done.stdout + done.stderr


def test_a_block_finds_nothing_of_another_in_shared_memory(program: Path) -> None:
    done = subprocess.run([program, "fault", "leftovers"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
