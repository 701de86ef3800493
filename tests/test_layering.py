"""The house rules, by reading the imports: arrows point down, and some things stand in one place only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers import ROOT

from moreau_ext import _WHERE

PACKAGE = ROOT / "moreau_ext"

# A package may import from those before it, and from the names at the top level. `capture` knows no solver.
ORDER = (
    "ops",
    "model",
    "capture",
    "preparation",
    "solvers",
    "analysis",
    "explainers",
    "plots",
    "integrations",
    "zoo",
    "data",
    "batch",
    "evaluation",
    "cli",
)
# Beside the order: the numerics know nothing of captures, a runner is passed in.
FORBIDDEN = {"solvers": {"capture", "preparation"}, "capture": {"preparation"}}
# Modules of the top level that every package may use, and entry points that may use every package.
BASE, ENTRY = {"_core", "_checks", "_files", "_errors"}, {"__init__", "__main__"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            found.append((parts[0], path))
    return found


def imports(path: Path) -> set[str]:
    """Packages and top-level modules of ours that a file imports, anywhere in it; its own folder does not count."""
    depth = len(path.relative_to(PACKAGE).parts)
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level < depth:
                continue  # within its folder
            base = (node.module or "").split(".")[0]
            named |= {base} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moreau_ext":
            rest = (node.module or "").split(".")[1:]
            named |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            named |= {a.name.split(".")[1] for a in node.names if a.name.startswith("moreau_ext.")}
    return {_WHERE[n].split(".")[0] if n in _WHERE else n for n in named} - {"__version__"}


def external(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_imports_point_down(name: str, path: Path) -> None:
    if name in BASE | ENTRY:
        assert imports(path) <= (BASE if name in BASE else BASE | {*ORDER})
        return
    assert name in ORDER, f"{name} has no place: add it here and in CONTRIBUTING.md"
    allowed = BASE | {*ORDER[: ORDER.index(name)]} - FORBIDDEN.get(name, set())
    assert imports(path) - {name} <= allowed


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_some_things_stand_in_one_place(name: str, path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if name != "ops":
        assert "data_ptr" not in attributes
        # The command line's `info` reads what was built; nobody else needs the core.
        assert "_core" not in imports(path) or name == "cli"
    if path.relative_to(PACKAGE).as_posix() != "model/score.py":
        # Training in the zoo calls backward() on a loss; gradients of scores are taken in one place.
        assert "autograd" not in attributes
        assert "backward" not in attributes or name == "zoo"
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "errors for users, not bare assert"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_importing_costs_torch_and_numpy_alone(name: str, path: Path) -> None:
    heavy = {"captum", "matplotlib", "sklearn", "tqdm", "torchvision", "scipy", "PIL", "skimage", "pyarrow", "pandas"}
    heavy |= {"selenium", "ray", "safetensors", "transformers", "quantus", "zennit", "pytorch_grad_cam", "inseq"}
    assert not external(path, top_level_only=True) & heavy
    if name in ("cli", "__main__"):
        assert "torch" not in external(path, top_level_only=True)


def test_core_does_not_know_torch() -> None:
    sources = [*PACKAGE.parent.glob("csrc/**/*.*"), PACKAGE.parent / "CMakeLists.txt"]
    assert len(sources) > 10
    for path in sources:
        for line in path.read_text().splitlines():
            assert "torch/" not in line
            assert "ATen" not in line
            if "#include" in line and path.parent.name in ("cpu", "cuda"):
                assert not any(folder in line for folder in ("../cuda", "../cpu"))
