"""A source by the kind of what is named: files, a folder, arrays, tables, a data set, a stream."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..preprocess import Preprocess
from .arrays import ARRAYS, Arrays
from .base import Source
from .datasets import Items, Stream
from .files import Files, search
from .tables import Table, tables


def open_source(
    source: Any, *, preprocess: Preprocess | None = None, column: str | None = None, target: str | None = None
) -> Source | Stream:
    """What any of the kinds of source is read by.

    Args:
        source: a path or a list of them (image files, folders, globs; one .npy or .npz; Parquet files or a folder of
            them), a tensor or array [N, *features], a sequence, a ``torch.utils.data`` Dataset, IterableDataset or
            DataLoader, or a source as it is.
        preprocess: what is done to each input.
        column: which column is explained (.npz, Parquet, mappings), where several could be.
        target: the column of targets; "class" for image folders, "label" for pairs.

    Raises:
        ValueError: nothing there, mixed kinds, or a column that is not there.
        FileNotFoundError: a path that is not there.
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
    if isinstance(source, (torch.utils.data.IterableDataset, torch.utils.data.DataLoader)):
        return Stream(source, column, **how)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return Items(source, column, **how)
    if isinstance(source, Iterable):
        return Stream(source, column, **how)
    raise TypeError(f"source: expected paths, a tensor, a data set or a DataLoader, got {type(source).__name__}")


def _open_paths(paths: list[Path], column: str | None, how: dict[str, Any]) -> Source:
    def kind(path: Path) -> str:
        if path.suffix in ARRAYS:
            return "array"
        if path.suffix == ".parquet":
            return "table"
        if path.is_dir() and not any(search(path)) and any(tables(path)):
            return "table"
        return "image"

    kinds = {kind(path) for path in paths}
    if len(kinds) > 1:
        raise ValueError(f"source: expected one kind, got {' and '.join(sorted(kinds))} files; run each by itself")
    if kinds == {"array"}:
        if len(paths) > 1:
            raise ValueError(f"source: expected one .npy or .npz file, got {len(paths)}")
        return Arrays.file(paths[0], column, **how)
    if kinds == {"table"}:
        return Table(paths, column, **how)
    if column is not None:
        raise ValueError(f"column: image files have none, got {column!r}")
    return Files(paths, **how)
