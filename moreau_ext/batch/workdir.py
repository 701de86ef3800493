"""Modules of the current folder: the one that is named, and those that its own source imports.

The folder is not put on ``sys.path``. It may be a data set that was downloaded, and a file ``torch.py`` or ``wandb.py``
in it would run whenever any package imports that name, also one that is not installed.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class _Folder:
    """A finder that is asked last, and answers for some names alone."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._names = folder, {name}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if path is not None or name not in self._names:
            return None
        spec: ModuleSpec | None = PathFinder.find_spec(name, [str(self._folder)])
        if spec is not None:
            self._names |= set(_imported(self._folder, name))
        return spec


def _imported(folder: Path, name: str) -> Iterator[str]:
    """Names of the modules that a module or package of the folder imports, by its source."""
    for path in [folder / f"{name}.py", *(folder / name).rglob("*.py")]:
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.split(".")[0]


def import_named(name: str) -> ModuleType:
    """Imports a module by its full name; the current folder is searched last, for it and what its source imports.

    Raises:
        ImportError: there is none, or it imports something that is missing.
    """
    top = name.split(".")[0]
    folder = Path.cwd()
    finder: Any = _Folder(folder, top)
    there = (folder / f"{top}.py").is_file() or (folder / top).is_dir()
    if there and not any(isinstance(f, _Folder) and f._folder == folder and top in f._names for f in sys.meta_path):
        # It stays: functions of the module may import when they are called.
        sys.meta_path.append(finder)
    importlib.invalidate_caches()
    return importlib.import_module(name)
