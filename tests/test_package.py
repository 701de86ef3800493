"""What is shipped: the source distribution builds, the wheel is complete, portable and knows no torch library."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, its source distribution, and the wheel built from that, in build isolation."""
    tree, out = tmp_path_factory.mktemp("tree") / "moreau_ext", tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns(".git", "build", "dist", "*.egg-info", "*.so", ".*_cache", ".hypothesis", ".venv")
    shutil.copytree(ROOT, tree, ignore=ignore)
    environment = {**os.environ, "MOREAU_CUDA": "OFF", "PIP_CONSTRAINT": str(tree / "constraints.txt")}
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(tree)],
        check=True,
        env=environment,
        capture_output=True,
        timeout=600,
    )
    return out


@pytest.mark.slow
def test_the_wheel_is_complete_and_portable(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "moreau_ext/py.typed" in names
    assert any(name.startswith("moreau_ext/_core.") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "benchmarks", "csrc")) for name in names)
    # auditwheel accepts it with libgomp left to torch, and adds no library of its own.
    repair = ["auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", str(tmp_path), str(wheel)]
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-m", *repair], check=True, capture_output=True, env=environment)
    (repaired,) = tmp_path.glob("*manylinux*.whl")
    with zipfile.ZipFile(repaired) as archive:
        assert not any(".libs/" in name for name in archive.namelist())


@pytest.mark.slow
def test_the_source_distribution_holds_what_a_build_needs(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    needed = {".h", ".cpp", ".cu", ".cuh", ".json", ".py"}
    files = (p for folder in ("csrc", "tests") for p in (ROOT / folder).rglob("*"))
    tracked = [p.relative_to(ROOT).as_posix() for p in files if p.suffix in needed]
    assert set(tracked) <= names
    assert {"CMakeLists.txt", "LICENSE", "README.md", "constraints.txt", "tests/ops/test_ops.py"} <= names


def test_the_build_asks_for_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    required = {re.split(r"[><=\[]", r)[0] for r in project["build-system"]["requires"]}
    assert required == {"setuptools", "pybind11", "cmake", "ninja"}
    runtime = {re.split(r"[><=\[]", r)[0] for r in project["project"]["dependencies"]}
    assert runtime == {"torch", "numpy"}


def test_versions_agree() -> None:
    import moreau_ext

    assert importlib.metadata.version("moreau_ext") == moreau_ext.__version__
    assert f"## {moreau_ext.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_cover_what_the_extras_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    named = {re.split(r"[><=\[]", r)[0] for group in extras.values() for r in group}
    named |= {re.split(r"[><=\[]", r)[0] for r in project["project"]["dependencies"]}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if line and not line.startswith("#")}
    assert named <= pinned


@pytest.mark.slow
def test_docstring_examples_run() -> None:
    """Every example in a docstring of the package."""
    import doctest
    import pkgutil
    from importlib import import_module

    import moreau_ext

    attempted = 0
    for module in pkgutil.walk_packages(moreau_ext.__path__, "moreau_ext."):
        if module.name.endswith("__main__"):
            continue  # runs the command line
        result = doctest.testmod(import_module(module.name))
        assert result.failed == 0, module.name
        attempted += result.attempted
    assert attempted > 100
