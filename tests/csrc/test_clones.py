"""The AVX2 and AVX-512 clones give the bits of the portable baseline."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers import CXX, ROOT

pytestmark = pytest.mark.slow


def hashes(folder: Path, *flags: str) -> str:
    # The flags of CMakeLists.txt.
    command = [str(CXX), "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
    program = folder / "clones"
    sources = [str(ROOT / "tests/cpp/clones.cpp"), *map(str, sorted((ROOT / "csrc/cpu").glob("*.cpp")))]
    subprocess.run([*command, *flags, *sources, "-o", str(program)], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(CXX is None, reason="needs the C++ compiler that built the package")
def test_clones_give_the_bits_of_the_baseline(tmp_path: Path) -> None:
    portable = hashes(tmp_path, "-DMOREAU_PORTABLE")
    assert len(portable.splitlines()) == 40
    assert hashes(tmp_path) == portable


@pytest.mark.skipif(CXX is None, reason="needs the C++ compiler that built the package")
def test_the_cpu_core_is_clean_under_sanitizers(tmp_path: Path) -> None:
    """Heap overflows, misaligned and out-of-range accesses, undefined arithmetic; with the bits of the other build."""
    # Without the clones: their resolvers run before the sanitizer's runtime is there.
    checked = ["-DMOREAU_PORTABLE", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    assert hashes(tmp_path, *checked) == hashes(tmp_path, "-DMOREAU_PORTABLE")
