"""``open_source``: the source for a value, by its kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._errors import SettingError
from ...data.images import SUFFIXES
from ..preprocess import Preprocess
from .arrays import ARRAYS, Arrays
from .base import Source
from .datasets import Items, Stream
from .files import Files
from .paths import walk
from .tables import TABLES, Table


def open_source(
    source: object, *, preprocess: Preprocess | None = None, column: str | None = None, target: str | None = None
) -> Source | Stream:
    """Opens a source.

    Args:
        source: a path or a list of paths (image files, folders, globs; one .npy or .npz file; Parquet files or a folder
            of them), a tensor or array [N, *features] or a dict of them, a data frame, a sequence, a
            ``torch.utils.data`` Dataset, IterableDataset or DataLoader, or a source, which is returned as it is.
        preprocess: applied to each input.
        column: the column to explain (.npz, Parquet, mappings), if several are possible.
        target: the column of targets; "class" for image folders, "label" for pairs.

    Raises:
        ValueError: an empty source, mixed kinds, or no such column.
        FileNotFoundError: no such path.
        TypeError: a value of another kind.
    """
    how: dict[str, Any] = {"preprocess": preprocess, "target": target}
    if isinstance(source, (Source, Stream)):
        return source
    if isinstance(source, (str, Path)):
        source = [source]
    if isinstance(source, (list, tuple)) and source and all(isinstance(s, (str, Path)) for s in source):
        return _open_paths([Path(s) for s in source], column, how)
    if isinstance(source, (Tensor, np.ndarray)):
        return Arrays({"array": source.numpy(force=True) if isinstance(source, Tensor) else source}, None, **how)
    if isinstance(source, Mapping) or type(source).__name__ == "NpzFile":
        arrays: Any = source
        return Arrays({str(name): np.asarray(arrays[name]) for name in arrays}, column, **how)
    if hasattr(source, "columns") and (hasattr(source, "to_numpy") or hasattr(source, "to_pandas")):
        return Table.frame(source, column, **how)
    if hasattr(source, "__array__") and hasattr(source, "ndim"):
        values = np.asarray(source)
        if values.dtype == object:  # a Series of arrays
            values = np.stack([np.asarray(value) for value in values])
        return Arrays({"array": values}, None, **how)
    if isinstance(source, (Set, frozenset)):
        raise SettingError("source", f"a {type(source).__name__} has no order, so its rows have no stable number")
    if isinstance(source, (torch.utils.data.IterableDataset, torch.utils.data.DataLoader)):
        return Stream(source, column, **how)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return Items(source, column, **how)
    if isinstance(source, Iterable):
        return Stream(source, column, **how)
    raise TypeError(f"source: expected paths, a tensor, a data set or a DataLoader, got {type(source).__name__}")


def _open_paths(paths: list[Path], column: str | None, how: dict[str, Any]) -> Source:
    def kind(path: Path) -> str:
        suffix = path.suffix.lower()
        if path.is_dir():
            holds = {below.suffix.lower() for _, below in walk(path)}
            return "table" if holds & {*TABLES} and not holds & {*SUFFIXES} else "image"
        return "array" if suffix in ARRAYS else "table" if suffix in TABLES else "image"

    kinds = {kind(path) for path in paths}
    if len(kinds) > 1:
        raise SettingError("source", f"expected one kind, got {' and '.join(sorted(kinds))} files; run each by itself")
    if kinds == {"array"}:
        if len(paths) > 1:
            raise SettingError("source", f"expected one .npy or .npz file, got {len(paths)}")
        return Arrays.file(paths[0], column, **how)
    if kinds == {"table"}:
        return Table(paths, column, **how)
    if column is not None:
        raise SettingError("column", f"image files have none, got {column!r}")
    return Files(paths, **how)
