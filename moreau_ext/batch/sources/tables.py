"""Sources of Parquet tables."""

from __future__ import annotations

import bisect
import glob
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..._errors import SettingError, SettingFileNotFoundError, one_line
from ..preprocess import Preprocess
from .base import Source, Unreadable, choose_column, image_input, stamp_of, to_tensor


class Table(Source):
    """An image or tensor column of Parquet files. The id is the row number over all files, which are sorted.

    An image is an encoded file (binary), or a struct with ``bytes`` as Hugging Face writes it. A tensor is a
    fixed-shape tensor of Arrow, or nested lists of numbers.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        column: str | None = None,
        preprocess: Preprocess | None = None,
        target: str | None = None,
    ):
        import pyarrow.parquet as pq

        self.preprocess, self.target = preprocess, target
        self._paths = sorted(path for given in paths for path in find_tables(Path(given)))
        # (rows before it, file, row group) of every row group.
        self._groups: list[tuple[int, int, int]] = []
        self._starts: list[int] = []
        count = 0
        for number, path in enumerate(self._paths):
            try:
                about = pq.read_metadata(path)
                schema = pq.read_schema(path)
            except FileNotFoundError:
                raise SettingFileNotFoundError("source", f"{path} is not there") from None
            except Exception as error:
                raise SettingError("source", f"{path} cannot be read: {one_line(error)}") from error
            if number == 0:
                possible = [f.name for f in schema if f.name != target and _holds_inputs(f.type)]
                self._column = choose_column(column, possible, schema.names)
            for needed in (self._column, *([target] if target else [])):
                if needed not in schema.names:
                    setting = "target" if needed == target else "column"
                    raise SettingError(setting, f"{path} has no column {needed!r}; it has {', '.join(schema.names)}")
            self._starts.append(count)
            for group in range(about.num_row_groups):
                self._groups.append((count, number, group))
                count += about.row_group(group).num_rows
        if count == 0:
            raise SettingError("source", f"no rows in {', '.join(map(str, self._paths)) or 'no Parquet files'}")
        self._count = count
        # (number, table) of the row group that was read last; rows come in order.
        self._last: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def _place(self, row: int) -> tuple[Any, int]:
        """(table of the row group that holds a row, position of the row in it)."""
        import pyarrow.parquet as pq

        index = bisect.bisect_right(self._groups, (row, len(self._paths), 0)) - 1
        start, number, group = self._groups[index]
        if self._last is None or self._last[0] != index:
            columns = [self._column, *([self.target] if self.target else [])]
            with pq.ParquetFile(self._paths[number]) as file:
                self._last = (index, file.read_row_group(group, columns=columns))
        return self._last[1], row - start

    def name(self, row: int) -> str:
        number = bisect.bisect_right(self._starts, row) - 1
        return f"{self._paths[number].name}:{row - self._starts[number]}"

    def target_of(self, row: int) -> int | None:
        table, position = self._place(row)
        value = table[self.target][position].as_py()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise Unreadable(f"has no target: {self.target} holds {value!r}, expected an integer")
        return value

    def read(self, row: int) -> Tensor:
        table, position = self._place(row)
        scalar = table[self._column][position]
        if not scalar.is_valid:
            raise Unreadable(f"{self._column} is empty")
        if hasattr(scalar, "to_numpy"):  # a fixed-shape tensor
            return to_tensor(scalar.to_numpy(), self.preprocess)
        value = scalar.as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
            if value is None:
                raise Unreadable(f"{self._column}.bytes is empty")
        if isinstance(value, bytes):
            return image_input(io.BytesIO(value), self.preprocess)
        number = scalar.type
        while hasattr(number, "value_type"):
            number = number.value_type
        return to_tensor(np.asarray(value, number.to_pandas_dtype()), self.preprocess)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "parquet",
            "inputs": len(self),
            "column": self._column,
            "files": len(self._paths),
            "digest": hashlib.blake2b(
                "\n".join(f"{path.name} {stamp_of(path)}" for path in self._paths).encode(), digest_size=16
            ).hexdigest(),
        }


def find_tables(given: Path) -> list[Path]:
    """The Parquet files of a file, folder or glob."""
    if given.is_dir():
        return [path for path in given.rglob("*.parquet") if not path.name.startswith(".")]
    return [Path(match) for match in glob.glob(str(given), recursive=True)] if glob.has_magic(str(given)) else [given]


def _holds_inputs(kind: Any) -> bool:
    import pyarrow.types as types

    if hasattr(kind, "shape") or types.is_binary(kind) or types.is_large_binary(kind):
        return True
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
