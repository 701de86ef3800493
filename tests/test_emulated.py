"""The CUDA kernels on a GPU of fibers (tests/cpp/emulator) against the CPU kernels: their logic, where there is no GPU.

Indexing, barriers, warp operations, sums of the last block to arrive, ragged sizes and addresses, an input's bits in
and out of its batch. What it cannot see are races between barriers, and speed.
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
# What g++ cannot read, and what the emulator varies.
SPELLINGS = {
    "cuda/launch.cuh": [
        (
            "kernel<<<grid, unsigned(threads), shared, static_cast<cudaStream_t>(stream)>>>(a...);",
            "(void)stream, emulator::run(kernel, grid, unsigned(threads), shared, a...);",
        ),
        ("constexpr int64_t kBusy = int64_t(1) << 17;", "inline const int64_t& kBusy = emulator::limits.busy;"),
        ("std::min<int64_t>(items, 0x7fffffff)", "std::min<int64_t>(items, emulator::limits.grid)"),
    ],
    "cuda/prox_step.cu": [
        (
            "extern __shared__ uint4 staged[];  // for slices alone",
            "uint4* staged = static_cast<uint4*>(emulator::dynamic_memory());",
        ),
        ("constexpr int64_t kMostBlocks = 4096;", "const int64_t& kMostBlocks = emulator::limits.blocks;"),
    ],
    "cuda/momentum.cu": [
        ("constexpr int64_t kMostBlocks = 1024;", "const int64_t& kMostBlocks = emulator::limits.blocks;"),
    ],
}


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
    source = shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "tests/cpp", folder / "tests/cpp")
    for name, spellings in SPELLINGS.items():
        text = (source / name).read_text()
        for ours, theirs in spellings:
            assert ours in text, f"{name} is written otherwise now: {ours}"
            text = text.replace(ours, theirs)
        (source / name).write_text(text)
    # Contraction off on both sides, as in CMakeLists.txt; vectors at addresses that are none end the program.
    options = ["-std=c++17", "-O1", "-mfma", "-ffp-contract=off", "-fno-math-errno", "-c"]
    options += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    emulated = ["-I", str(EMULATOR), "-include", "cuda_runtime.h", "-isystem", str(headers), "-Wno-attributes"]
    files = {path: ["-fopenmp"] for path in (source / "cpu").glob("*.cpp")}
    files |= {path: ["-x", "c++", *emulated] for path in (source / "cuda").glob("*.cu")}
    files |= {folder / "tests/cpp" / name: emulated for name in ("emulator/emulator.cpp", "emulated.cpp")}

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
    assert names == ["prox_step", "perturb", "accumulate", "group_norms", "momentum"]


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
