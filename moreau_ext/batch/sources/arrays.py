"""Sources of NumPy arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..._errors import SettingError, SettingFileNotFoundError, one_line
from ..preprocess import Preprocess
from .base import Source, choose_column, stamp_of, to_tensor

ARRAYS = (".npy", ".npz")


class Arrays(Source):
    """The rows of an array [N, *features]. The id is the row number.

    Args:
        arrays: by name.
        column: name of the array to explain; may be left out if only one is possible.
        target: name of the array of targets, or None.
        where: name of the source in the results.
        stamp: of the file, compared between runs.
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
        possible = [name for name in arrays if name != target and np.ndim(arrays[name]) > 1]
        self._column = choose_column(column, possible, list(arrays))
        self._values = arrays[self._column]
        if len(self._values) == 0:
            raise SettingError("source", f"{where} has no rows")
        self._targets = None
        if target is not None:
            if target not in arrays:
                raise SettingError("target", f"{where} has no column {target!r}; it has {', '.join(arrays)}")
            self._targets = np.asarray(arrays[target]).reshape(-1)
            if not np.issubdtype(self._targets.dtype, np.integer) or len(self._targets) != len(self._values):
                raise SettingError(
                    "target",
                    f"{target!r} must hold one integer per row, {len(self._values)}, got {self._targets.dtype} "
                    f"{self._targets.shape}",
                )

    @classmethod
    def file(
        cls,
        path: str | Path,
        column: str | None = None,
        preprocess: Preprocess | None = None,
        target: str | None = None,
    ) -> Arrays:
        """Opens a .npy file, which is mapped into memory, or a .npz file. Pickled objects are refused.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file, or one that does not hold arrays of numbers.
        """
        path = Path(path)
        try:
            if path.suffix.lower() == ".npz":
                # Opened here: numpy leaves a damaged file open.
                with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
                    arrays = {name: held[name] for name in held.files}
            else:
                arrays = {"array": np.load(path, mmap_mode="r", allow_pickle=False)}
        except (ValueError, OSError, EOFError, KeyError) as error:
            if isinstance(error, FileNotFoundError):
                raise SettingFileNotFoundError("source", f"{path} is not there") from error
            raise SettingError("source", f"{path} cannot be read: {one_line(error)}") from error
        except Exception as error:  # zipfile's and zlib's own errors
            raise SettingError("source", f"{path} is damaged: {one_line(error)}") from error
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
