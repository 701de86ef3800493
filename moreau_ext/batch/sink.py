"""What is written: Parquet shards, one row per input, and a manifest that says what they are the results of.

A shard is there wholly or not at all: written to a temporary name, flushed to the disk, renamed. So the names of the
shards are the only record of what is done, and no moment of a crash can contradict it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._files import write
from .sources.base import reason

FORMAT = 1
MANIFEST = "manifest.json"
ERRORS = "errors.parquet"
_PATTERN = "shard-*.parquet"
# Seconds to wait for a lock: readers that a killed job started hold it until they see that it is gone, some 5 later.
_PATIENCE = 10.0
_ERRORS = ["id", "source", "reason"]

# (name, Arrow type, what it is) of every column but the map's.
COLUMNS: dict[str, str] = {
    "id": "int64",
    "source": "string",
    "target": "int64",
    "predicted": "int64",
    "score": "float64",
    "residual": "float64",
    "relative_residual": "float64",
    "converged": "bool",
    "steps": "int32",
    "gradient_evaluations": "int32",
    "nnz": "int64",
    "support": "int64",
    "eta": "float64",
    "rho": "float64",
    "sigma": "float64",
    "seed": "int64",
    "error": "string",
}


class Differs(ValueError):
    """The output belongs to another configuration."""


@dataclass
class Rows:
    """Explained rows on their way to a file.

    Args:
        columns: by the names of :data:`COLUMNS`, lists of equal length.
        maps: [n, *features], NaN in rows with an error.
    """

    columns: dict[str, list[Any]]
    maps: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.columns["id"])

    @staticmethod
    def concatenate(parts: list[Rows]) -> Rows:
        columns = {name: [v for p in parts for v in p.columns[name]] for name in COLUMNS}
        return Rows(columns, np.concatenate([p.maps for p in parts]))


def schema(shape: tuple[int, ...], dtype: str, sparse: bool) -> Any:
    """The Arrow schema of a shard.

    Args:
        shape: of one map.
        dtype: "float32" or "float16", of the map's values.
        sparse: ``map_indices`` (positions in row-major order) and ``map_values`` instead of ``map``.
    """
    import pyarrow as pa

    value = pa.from_numpy_dtype(np.dtype(dtype))
    kinds = {"string": pa.string(), "bool": pa.bool_()}
    fields = [pa.field(name, kinds.get(kind) or getattr(pa, kind)()) for name, kind in COLUMNS.items()]
    if sparse:
        fields += [pa.field("map_indices", pa.list_(pa.int32())), pa.field("map_values", pa.list_(value))]
    else:
        fields.append(pa.field("map", pa.fixed_shape_tensor(value, shape)))
    return pa.schema(fields)


def table(rows: Rows, dtype: str, sparse: bool, metadata: Mapping[str, str]) -> Any:
    """Rows as an Arrow table with the file's metadata."""
    import pyarrow as pa

    shape = rows.maps.shape[1:]
    made = schema(shape, dtype, sparse)
    columns = [pa.array(rows.columns[name], made.field(name).type) for name in COLUMNS]
    flat = rows.maps.reshape(len(rows), -1)
    if sparse:
        failed = np.array([error is not None for error in rows.columns["error"]])
        row, index = np.nonzero((flat != 0) & ~failed[:, None])
        offsets = np.searchsorted(row, np.arange(len(rows) + 1)).astype(np.int32)
        values = pa.array(flat[row, index].astype(dtype))
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(index.astype(np.int32))))
        columns.append(pa.ListArray.from_arrays(offsets, values))
    else:
        storage = pa.FixedSizeListArray.from_arrays(pa.array(flat.astype(dtype).reshape(-1)), flat.shape[1])
        columns.append(pa.ExtensionArray.from_storage(made.field("map").type, storage))
    return pa.Table.from_arrays(columns, schema=made.with_metadata(dict(metadata)))


def _write_table(path: Path, made: Any) -> None:
    import pyarrow.parquet as pq

    # zstd makes little of dense maps and almost nothing of the zeros of sparse ones, at 1 % of the gradients' time.
    # Of the columns only names repeat; a dictionary of a map's values is as large as the map.
    names = [name for name, kind in COLUMNS.items() if kind == "string"]
    write(path, lambda file: pq.write_table(made, file, compression="zstd", use_dictionary=names))


def _lock(handle: int) -> None:
    """Locks an open file, or raises BlockingIOError after a while."""
    last = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= last:
                raise
        time.sleep(0.1)


class Output:
    """A folder of results.

    Args:
        folder: made where it is missing.

    Raises:
        OSError: it cannot be made or written to.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out for as long as this one lives; the kernel opens the lock however it ends, when
        those that it started to read have seen that too. What a killed one left half-written is removed.

        Raises:
            ValueError: another process is writing there, or the folder holds something else.
        """
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                _lock(handle)
            except BlockingIOError:
                raise ValueError(f"--out {self.folder}: another process is writing there") from None
            except OSError as error:  # some network file systems have no locks
                warnings.warn(f"{self.folder} cannot be locked ({error}); start no second job on it", stacklevel=3)
            self._check_foreign()
            self.sweep()
            yield
        finally:
            os.close(handle)

    def _check_foreign(self) -> None:
        if (self.folder / MANIFEST).exists():
            return
        others = [p.name for p in self.folder.iterdir() if not _ours(p.name)]
        shards = any(self.folder.glob(_PATTERN))
        if others or shards:
            held = "shards without a manifest" if shards else f"{others[0]}, which is none of ours"
            raise ValueError(f"--out {self.folder}: holds {held}; give a new or empty folder")

    def sweep(self) -> None:
        """Removes temporary files of processes that were killed."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def held(self, configuration: dict[str, Any]) -> dict[str, Any] | None:
        """The manifest that is there, if its configuration is this one; None where nothing was begun, or nothing came
        of it.

        Args:
            configuration: all that decides the results.

        Raises:
            Differs: it belongs to another configuration; says what differs.
        """
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        try:
            manifest: dict[str, Any] = json.loads(path.read_text())
            before = manifest["configuration"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--out {self.folder}: {MANIFEST} is damaged ({reason(error)})") from error
        if manifest.get("format") != FORMAT:
            raise Differs(f"--out {self.folder}: has format {manifest.get('format')}, this version writes {FORMAT}")
        found = differences(before, json.loads(json.dumps(configuration)))
        if found and not self.shards():
            return None
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            raise Differs(
                f"--out {self.folder}: belongs to another configuration: {'; '.join(found[:4])}{more}. Repeat the "
                "first one, or give a new folder"
            )
        return manifest

    def begin(self, configuration: dict[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the manifest of a new job: its configuration, and what its first run chose and later ones keep."""
        text = json.dumps({"format": FORMAT, "configuration": configuration, **chosen}, indent=2) + "\n"
        write(self.folder / MANIFEST, lambda file: file.write(text.encode()))
        made: dict[str, Any] = json.loads(text)
        return made

    def shard(self, key: int) -> Path:
        return self.folder / f"shard-{key:06d}.parquet"

    def shards(self) -> list[Path]:
        return sorted(self.folder.glob(_PATTERN))

    def rows_in(self, key: int) -> int | None:
        """Rows of a shard; None where it is missing. One that was damaged afterwards is missing, with a warning."""
        import pyarrow.parquet as pq

        path = self.shard(key)
        if not path.exists():
            return None
        try:
            return int(pq.read_metadata(path).num_rows)
        except Exception as error:
            warnings.warn(f"{path} is damaged and is made again ({reason(error)})", stacklevel=2)
            return None

    def write(self, key: int, rows: Rows, manifest: Mapping[str, Any], about: Mapping[str, Any]) -> int:
        """Writes a shard and returns its bytes."""
        chosen = manifest["configuration"]
        metadata = {"moreau_ext": json.dumps({**manifest, "run": dict(about), "map_shape": rows.maps.shape[1:]})}
        made = table(rows, chosen["map_dtype"], chosen["map_format"] == "sparse", metadata)
        _write_table(self.shard(key), made)
        return self.shard(key).stat().st_size

    def write_errors(self, more: Sequence[tuple[int, str, str]] = ()) -> int:
        """Collects the rows with an error into errors.parquet; returns how many they are.

        Args:
            more: (id, source, reason) of inputs that stand in no shard.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        ids, names, reasons = zip(*more, strict=True) if more else ((), (), ())
        found = [pa.table([pa.array(ids, pa.int64()), *(pa.array(v, pa.string()) for v in (names, reasons))], _ERRORS)]
        for path in self.shards():
            part = pq.read_table(path, columns=["id", "source", "error"])
            failed = part.filter(pc.is_valid(part["error"]))
            found.append(pa.table(failed.columns, _ERRORS))
        errors = pa.concat_tables(found)
        _write_table(self.folder / ERRORS, errors)
        return int(errors.num_rows)


def _ours(name: str) -> bool:
    return name in (MANIFEST, ERRORS) or (name.startswith(".") and name.endswith(".tmp"))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def differences(held: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configurations, one phrase each."""
    found = []
    for name in [*held, *(n for n in given if n not in held)]:
        before, now = held.get(name), given.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{prefix}{name}.")
        elif before != now:
            found.append(f"{prefix}{name} was {_short(before)} and is {_short(now)}")
    return found


def read(out: str | Path, columns: list[str] | None = None) -> Any:
    """The results of a folder as one Arrow table, sorted as they were explained; rows with an error included.

    The map is a fixed-shape tensor: ``read(out)["map"].combine_chunks().to_numpy_ndarray()`` is [N, *features].

    Args:
        out: the folder.
        columns: which columns; all of them by default.

    Raises:
        FileNotFoundError: no finished shard there.

    Example:
        >>> import tempfile, torch
        >>> from moreau_ext import Gradient
        >>> from moreau_ext.batch import explain_dataset, read
        >>> with tempfile.TemporaryDirectory() as out:
        ...     _ = explain_dataset(Gradient(lambda x: x.square().sum(1)), torch.ones(5, 3), out)
        ...     read(out)["map"].combine_chunks().to_numpy_ndarray()[0]
        array([2., 2., 2.], dtype=float32)
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(out)
    paths = Output(folder).shards() if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"{out}: holds no finished shard")
    parts = [pq.read_table(path, columns=columns) for path in paths]
    return pa.concat_tables([p.replace_schema_metadata(parts[0].schema.metadata) for p in parts])


def manifest(out: str | Path) -> dict[str, Any]:
    """The manifest of a folder of results.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(out) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{out}: holds no {MANIFEST}, so no results of moreau-ext explain")
    held: dict[str, Any] = json.loads(path.read_text())
    return held


def dense(row: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The map of a row (a dict, as ``table.to_pylist()`` gives them) as an array, from either format."""
    if "map_indices" in row:
        flat = np.zeros(math.prod(shape), np.float32)
        flat[np.asarray(row["map_indices"], int)] = row["map_values"]
        return flat.reshape(shape)
    return np.asarray(row["map"], np.float32).reshape(shape)


def concerns(error: OSError, folder: Path) -> bool:
    """Whether it is the output that an error is about."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return True
    return error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(folder)


def explain_os_error(error: OSError, folder: Path) -> str:
    """What went wrong with the output, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"--out {folder}: the disk is full; finished shards are kept, and the same command goes on from there"
    return f"--out {folder}: {error.strerror or error}"
