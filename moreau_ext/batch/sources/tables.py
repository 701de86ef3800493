"""Sources of tables: Parquet files and data frames."""

from __future__ import annotations

import bisect
import hashlib
import io
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..._errors import SettingError, one_line
from ..preprocess import Preprocess
from .base import Source, Unreadable, choose_column, image_input, stamp_of, to_tensor
from .paths import find

TABLES = (".parquet", ".parq", ".pq")


class Table(Source):
    """A column of images or tensors, or one number per column, of Parquet files or a data frame.

    The id is the row number, over all files sorted by name. An image is an encoded file (binary), or a struct with
    ``bytes`` as Hugging Face writes it. A tensor is a fixed-shape tensor of Arrow, or nested lists of numbers. If no
    column holds inputs, all columns but the target are the features: numbers, in the order of the columns, unscaled.

    Args:
        paths: Parquet files, folders of them, or globs.
        frame: a pyarrow Table in place of ``paths``.
        where: name of the frame in the results.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        column: str | None = None,
        preprocess: Preprocess | None = None,
        target: str | None = None,
        frame: Any = None,
        where: str = "table",
    ):
        import pyarrow.parquet as pq

        self.preprocess, self.target = preprocess, target
        left_out: Counter[str] = Counter()
        self._frame = frame
        self._files: list[tuple[str, Path]] = [] if frame is None else [(where, Path(where))]
        for given in paths:
            part = find(Path(given), TABLES)
            self._files += part.files
            left_out += part.left_out
        self.left_out = left_out
        self._files.sort(key=lambda file: file[1])
        # (rows before it, file, row group) of every row group.
        self._groups: list[tuple[int, int, int]] = []
        self._starts: list[int] = []
        count = 0
        for number, (name, path) in enumerate(self._files):
            if frame is None:
                try:
                    about = pq.read_metadata(path)
                    schema, rows = (
                        pq.read_schema(path),
                        [about.row_group(g).num_rows for g in range(about.num_row_groups)],
                    )
                except Exception as error:
                    raise SettingError("source", f"{path} cannot be read: {one_line(error)}") from error
                rows = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
            else:
                schema, rows = frame.schema, [frame.num_rows]
            if number == 0:
                self._columns, self._features = _inputs(schema, column, target)
                small = {"float", "halffloat", "int8", "int16", "uint8", "uint16", "bool"}  # float32 holds them exactly
                narrow = all(str(schema.field(name).type) in small for name in self._columns if name in schema.names)
                self._dtype: Any = np.float32 if narrow else np.float64
            for needed in (*self._columns, *([target] if target else [])):
                if needed not in schema.names:
                    setting = "target" if needed == target else "column"
                    raise SettingError(setting, f"{name} has no column {needed!r}; it has {', '.join(schema.names)}")
            self._starts.append(count)
            for group, more in enumerate(rows):
                self._groups.append((count, number, group))
                count += more
        if count == 0:
            raise SettingError("source", f"no rows in {', '.join(n for n, _ in self._files) or 'no Parquet files'}")
        self._count = count
        # (number, table) of the row group that was read last; rows come in order.
        self._last: tuple[int, Any] | None = None

    @classmethod
    def frame(
        cls, frame: Any, column: str | None = None, preprocess: Preprocess | None = None, target: str | None = None
    ) -> Table:
        """Opens a data frame of pandas or polars, or a pyarrow Table. The index of pandas is no feature.

        Raises:
            SettingError: a column that Arrow cannot hold.
        """
        import pyarrow as pa

        try:
            if isinstance(frame, pa.Table):
                table = frame
            elif hasattr(frame, "to_arrow"):
                table = frame.to_arrow()
            else:
                table = pa.Table.from_pandas(frame, preserve_index=False)
        except (pa.ArrowException, TypeError) as error:
            raise SettingError("source", f"the data frame cannot be read: {one_line(error)}") from error
        return cls([], column, preprocess, target, table, type(frame).__name__)

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def _place(self, row: int) -> tuple[Any, int]:
        """(table of the row group that holds a row, position of the row in it)."""
        import pyarrow.parquet as pq

        index = bisect.bisect_right(self._groups, (row, len(self._files), 0)) - 1
        start, number, group = self._groups[index]
        if self._frame is not None:
            return self._frame, row
        if self._last is None or self._last[0] != index:
            columns = [*self._columns, *([self.target] if self.target else [])]
            with pq.ParquetFile(self._files[number][1]) as file:
                self._last = (index, file.read_row_group(group, columns=columns))
        return self._last[1], row - start

    def name(self, row: int) -> str:
        number = bisect.bisect_right(self._starts, row) - 1
        return f"{self._files[number][0]}:{row - self._starts[number]}"

    def target_of(self, row: int) -> int | None:
        table, position = self._place(row)
        value = table[self.target][position].as_py()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise Unreadable(f"has no target: {self.target} holds {value!r}, expected an integer")
        return value

    def read(self, row: int) -> Tensor:
        table, position = self._place(row)
        if self._features:
            return self._numbers(table, position)
        column = self._columns[0]
        scalar = table[column][position]
        if not scalar.is_valid:
            raise Unreadable(f"{column} is empty")
        if hasattr(scalar, "to_numpy"):  # a fixed-shape tensor
            return to_tensor(scalar.to_numpy(), self.preprocess)
        value, kind = scalar.as_py(), scalar.type
        if isinstance(value, dict):
            value = value.get("bytes")
            if value is None:
                raise Unreadable(f"{column}.bytes is empty")
        if isinstance(value, bytes):
            return image_input(io.BytesIO(value), self.preprocess)
        while hasattr(kind, "value_type"):
            kind = kind.value_type
        return to_tensor(np.asarray(value, kind.to_pandas_dtype()), self.preprocess)

    def _numbers(self, table: Any, position: int) -> Tensor:
        values = [table[name][position].as_py() for name in self._columns]
        empty = [name for name, value in zip(self._columns, values, strict=True) if value is None]
        if empty:
            raise Unreadable(f"{', '.join(empty[:4])} is empty")
        return to_tensor(np.asarray(values, self._dtype), self.preprocess)

    def describe(self) -> dict[str, Any]:
        files = "\n".join(f"{name} {stamp_of(path)}" for name, path in self._files)
        return {
            "kind": "parquet" if self._frame is None else "frame",
            "inputs": len(self),
            "column": ", ".join(self._columns),
            "files": len(self._files),
            "digest": hashlib.blake2b(files.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest(),
        }


def _inputs(schema: Any, column: str | None, target: str | None) -> tuple[list[str], bool]:
    """(columns of the inputs, whether each holds one feature)."""
    import pyarrow.types as types

    others = [field for field in schema if field.name != target]
    possible = [field.name for field in others if _holds_inputs(field.type)]
    if column is None and not possible:
        numbers = [
            f.name
            for f in others
            if types.is_integer(f.type)
            or types.is_floating(f.type)
            or types.is_boolean(f.type)
            or types.is_decimal(f.type)
        ]
        if others and len(numbers) == len(others):
            return numbers, True
        if numbers:
            no = [f"{field.name} ({field.type})" for field in others if field.name not in numbers]
            raise SettingError(
                "column",
                f"no column holds images or tensors, and not all hold numbers that could be features: "
                f"{', '.join(no[:4])}; leave these out of the table, or name a column",
            )
    return [choose_column(column, possible, schema.names)], False


def _holds_inputs(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _holds_inputs(kind.value_type)
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    text = str(kind)  # no pyarrow has a test for every kind of list
    lists = text.startswith(("list", "large_list", "fixed_size_list")) and "string" not in text
    return bool(hasattr(kind, "shape") or text.startswith(("binary", "large_binary", "fixed_size_binary")) or lists)
