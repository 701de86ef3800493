"""NumPy arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..preprocess import Preprocess
from .base import Source, choose, reason, to_tensor
from .files import stamp_of

ARRAYS = (".npy", ".npz")


class Arrays(Source):
    """The rows of an array, [N, *features]; the id is the row number.

    Args:
        arrays: by name; ``column`` is explained, ``target`` holds its targets.
        column: which is explained; may be left out where only one is possible.
        where: what it is called in the results.
    """

    def __init__(
        self,
        arrays: dict[str, Any],
        column: str | None = None,
        preprocess: Preprocess | None = None,
        target: str | None = None,
        where: str = "array",
        stamp: str | None = None,
    ):
        self.preprocess, self.target, self._where, self._stamp = preprocess, target, where, stamp
        self._column = choose(column, [n for n in arrays if n != target and np.ndim(arrays[n]) > 1], list(arrays))
        self._values = arrays[self._column]
        if len(self._values) == 0:
            raise ValueError(f"source: {where} has no rows")
        self._targets = None
        if target is not None:
            if target not in arrays:
                raise ValueError(f"target: {where} has no column {target!r}; it has {', '.join(arrays)}")
            self._targets = np.asarray(arrays[target]).reshape(-1)
            if not np.issubdtype(self._targets.dtype, np.integer) or len(self._targets) != len(self._values):
                raise ValueError(
                    f"target: {target!r} must hold one integer per row, {len(self._values)}, got "
                    f"{self._targets.dtype} {self._targets.shape}"
                )

    @classmethod
    def file(
        cls,
        path: str | Path,
        column: str | None = None,
        preprocess: Preprocess | None = None,
        target: str | None = None,
    ) -> Arrays:
        """A .npy (mapped, not read) or .npz file. Pickled objects are refused.

        Raises:
            ValueError: it is damaged, or holds what is no array of numbers.
        """
        path = Path(path)
        try:
            if path.suffix == ".npz":
                # Opened here: numpy leaves a damaged file open.
                with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
                    arrays = {name: held[name] for name in held.files}
            else:
                arrays = {"array": np.load(path, mmap_mode="r", allow_pickle=False)}
        except (ValueError, OSError, EOFError, KeyError) as error:
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"source: {path} is not there") from error
            raise ValueError(f"source: {path} cannot be read: {reason(error)}") from error
        except Exception as error:  # zipfile's and zlib's own errors
            raise ValueError(f"source: {path} is damaged: {reason(error)}") from error
        return cls(arrays, column, preprocess, target, path.name, stamp_of(path))

    def __len__(self) -> int:
        return len(self._values)

    def name(self, row: int) -> str:
        return f"{self._where}:{row}"

    def target_of(self, row: int) -> int | None:
        return None if self._targets is None else int(self._targets[row])

    def read(self, row: int) -> Tensor:
        return to_tensor(self._values[row], self.preprocess)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "array",
            "inputs": len(self),
            "column": self._column,
            "shape": list(np.shape(self._values)),
            "stamp": self._stamp,
        }
