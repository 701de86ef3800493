"""The output folder: Parquet shards with one row per input, a manifest, and the functions that read them.

Shards are written atomically, so the names of the shards are the record of the finished rows, and a crash at any moment
leaves it true.
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
from typing import TYPE_CHECKING, Any

import numpy as np

from .._errors import SettingError, SettingFileNotFoundError, one_line
from .._files import write
from ..data import manifest as manifests

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1
ERRORS = "errors.parquet"
_PATTERN = "shard-*.parquet"
# Seconds to wait for a lock: the kernel needs some to end a killed job.
_PATIENCE = 10.0
# Locked folders of this process. A lock is shared with forked processes (readers, a model's own), and would outlive
# this one with them.
_LOCKED: set[int] = set()
_ERRORS = ["id", "source", "reason"]

# Arrow types of all columns but the map's.
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


@dataclass
class Rows:
    """Explained rows.

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
        """All rows of the parts, in their order."""
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

    # zstd takes 1 % of the time of the gradients. It saves a little on dense maps and nearly all zeros of sparse ones.
    # Only names repeat between rows; a dictionary of a map's values would be as large as the map.
    names = [name for name, kind in COLUMNS.items() if kind == "string"]
    how: dict[str, Any] = {"compression": "zstd", "use_dictionary": names, "write_page_checksum": True}
    write(path, lambda file: pq.write_table(made, file, **how))


def read_shard(path: Path, columns: list[str] | None = None) -> Any:
    """Reads a shard and verifies the checksums of its pages.

    Raises:
        OSError, pyarrow.ArrowException: it is damaged.
    """
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=columns, page_checksum_verification=True)


def _place_of(folder: Path) -> tuple[int, int]:
    """The identity of a folder, whatever its name."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _release_in_child() -> None:
    for handle in _LOCKED:
        with contextlib.suppress(OSError):
            os.close(handle)
    _LOCKED.clear()


os.register_at_fork(after_in_child=_release_in_child)


def _lock(handle: int) -> None:
    """Locks an open file, or raises BlockingIOError after :data:`_PATIENCE` seconds."""
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
        folder: created if it does not exist.

    Raises:
        OSError: it cannot be created or written to.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._place = _place_of(self.folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder against other jobs, and removes temporary files of killed ones.

        The kernel releases the lock when this process has ended, in whatever way.

        Raises:
            SettingError: another process is writing there, or the folder holds something else.
        """
        handle = os.open(self.folder, os.O_RDONLY)
        _LOCKED.add(handle)
        try:
            try:
                _lock(handle)
            except BlockingIOError:
                raise SettingError("out", f"another process is writing to {self.folder}") from None
            except OSError as error:  # some network file systems have no locks
                warnings.warn(f"{self.folder} cannot be locked ({error}); start no second job on it", stacklevel=3)
            self._check_foreign()
            self.sweep()
            yield
        finally:
            _LOCKED.discard(handle)
            os.close(handle)

    def check_place(self) -> None:
        """Raises OSError if the folder was deleted or replaced since it was opened: earlier shards went with it."""
        try:
            place = _place_of(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            place = None
        if place != self._place:
            raise OSError(errno.ESTALE, "was deleted or replaced while the job ran; start it again", str(self.folder))

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """Calls :meth:`check_place` before the block, and if a file is missing in it: the folder may go at any time."""
        self.check_place()
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            self.check_place()
            raise

    def check_complete(self, count: int) -> None:
        """Raises OSError unless the manifest and the first ``count`` shards are there.

        Args:
            count: shards of the finished job.
        """
        self.check_place()
        paths = [self.folder / manifests.NAME, *map(self.shard, range(count))]
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise OSError(
                errno.ESTALE,
                f"{missing[0]} was deleted while the job ran ({len(missing)} files); run it again to make them",
                str(self.folder),
            )

    def _check_foreign(self) -> None:
        if (self.folder / manifests.NAME).exists():
            return
        others = sorted(p.name for p in self.folder.iterdir() if not _ours(p.name))
        shards = any(self.folder.glob(_PATTERN))
        if others or shards:
            content = "shards without a manifest" if shards else f"{others[0]}, which is none of ours"
            raise SettingError("out", f"{self.folder} holds {content}; give a new or empty folder")

    def sweep(self) -> None:
        """Removes temporary files of killed processes."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def resume(self, configuration: dict[str, Any]) -> dict[str, Any] | None:
        """The manifest of the job to resume; None if there is none, or if it has no finished shard and another
        configuration.

        Args:
            configuration: every setting that determines the results.

        Raises:
            Differs: the folder belongs to another configuration; the text lists the differences.
        """
        manifest = manifests.read_manifest(self.folder)
        if manifest is None:
            return None
        if manifest.get("format") != FORMAT:
            raise manifests.Differs(
                "out", f"{self.folder} has format {manifest.get('format')}, this version writes {FORMAT}"
            )
        found = manifests.differences(manifest.get("configuration", {}), configuration)
        if found and not self.shards():
            return None
        manifests.check_same(self.folder, found)
        return manifest

    def begin(self, configuration: dict[str, Any], choices: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the manifest of a new job.

        Args:
            configuration: every setting that determines the results.
            choices: made by the first run and kept by later ones.
        """
        return manifests.write_manifest(self.folder, {"format": FORMAT, "configuration": configuration, **choices})

    def shard(self, key: int) -> Path:
        """The path of a shard."""
        return self.folder / f"shard-{key:06d}.parquet"

    def shards(self) -> list[Path]:
        """The paths of the finished shards, in order."""
        return sorted(self.folder.glob(_PATTERN))

    def rows_in(self, key: int, manifest: Mapping[str, Any]) -> int | None:
        """The number of rows of a shard; None if it is missing or, with a warning, damaged.

        All pages are read, and their checksums verified.

        Args:
            key: its number.
            manifest: of the job.
        """
        import pyarrow.parquet as pq

        path = self.shard(key)
        if not path.exists():
            return None
        try:
            found = read_shard(path)
            configuration, shape = manifest["configuration"], manifest["shape"]
            expected = schema(tuple(shape), configuration["map_dtype"], configuration["map_format"] == "sparse")
            if not found.schema.equals(expected):
                raise ValueError("its columns are not those of this job")
            # The file holds the metadata twice, and readers differ in which they take.
            for metadata in (found.schema.metadata, pq.read_metadata(path).metadata):
                about = json.loads(metadata[b"moreau_ext"])
                if {**about, "run": None} != {**manifest, "run": None, "map_shape": shape}:
                    raise ValueError("its manifest is not that of this job")
            return int(found.num_rows)
        except Exception as error:
            warnings.warn(f"{path} is damaged and is made again ({one_line(error)[:200]})", stacklevel=2)
            return None

    def write(self, key: int, rows: Rows, manifest: Mapping[str, Any], about: Mapping[str, Any]) -> int:
        """Writes a shard and returns its size in bytes.

        Args:
            key: its number.
            rows: its rows.
            manifest: of the job; a part of the metadata.
            about: the writer, see :func:`moreau_ext.batch.job.about_job`; a part of the metadata.
        """
        configuration = manifest["configuration"]
        metadata = {"moreau_ext": json.dumps({**manifest, "run": dict(about), "map_shape": rows.maps.shape[1:]})}
        with self._in_place():
            made = table(rows, configuration["map_dtype"], configuration["map_format"] == "sparse", metadata)
            _write_table(self.shard(key), made)
            return self.shard(key).stat().st_size

    def write_errors(self, more: Sequence[tuple[int, str, str]] = ()) -> int:
        """Collects the rows with an error in errors.parquet, and returns their number.

        Args:
            more: (id, source, reason) of inputs that are in no shard.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        ids, names, reasons = zip(*more, strict=True) if more else ((), (), ())
        found = [pa.table([pa.array(ids, pa.int64()), *(pa.array(v, pa.string()) for v in (names, reasons))], _ERRORS)]
        with self._in_place():
            for path in self.shards():
                part = _read_or_name(path, ["id", "source", "error"])
                failed = part.filter(pc.is_valid(part["error"]))
                found.append(pa.table(failed.columns, _ERRORS))
            errors = pa.concat_tables(found)
            _write_table(self.folder / ERRORS, errors)
            return int(errors.num_rows)


def _ours(name: str) -> bool:
    return name in (manifests.NAME, ERRORS) or (name.startswith(".") and name.endswith(".tmp"))


def read(out: str | Path, columns: list[str] | None = None) -> pyarrow.Table:
    """Reads the results of a folder as one Arrow table, in the order of the source, with the rows that have an error.

    The map is a fixed-shape tensor: ``read(out)["map"].combine_chunks().to_numpy_ndarray()`` is [N, *features].

    Args:
        out: the folder.
        columns: names of the columns; all by default.

    Raises:
        FileNotFoundError: no finished shard.
        ValueError: a shard is damaged: the checksum of a page is wrong, or it is no Parquet file. The same job makes it
            again.

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

    folder = Path(out)
    paths = sorted(folder.glob(_PATTERN)) if folder.is_dir() else []
    if not paths:
        raise SettingFileNotFoundError("out", f"{out} holds no finished shard")
    parts = [_read_or_name(path, columns) for path in paths]
    return pa.concat_tables([p.replace_schema_metadata(parts[0].schema.metadata) for p in parts])


def _read_or_name(path: Path, columns: list[str] | None) -> Any:
    """A shard; the error of a damaged one names it."""
    try:
        return read_shard(path, columns)
    except Exception as error:
        if isinstance(error, (FileNotFoundError, MemoryError)):
            raise
        raise SettingError(
            "out",
            f"{path} is damaged ({one_line(error)[:200]}); the job that wrote it makes it again if it is repeated",
        ) from error


def manifest(out: str | Path) -> dict[str, Any]:
    """Reads the manifest of a folder of results.

    Raises:
        FileNotFoundError: there is none.
    """
    found = manifests.read_manifest(Path(out))
    if found is None:
        raise SettingFileNotFoundError("out", f"{out} holds no {manifests.NAME}, so no results of a batch job")
    return found


def dense(row: Mapping[str, object], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The map of a row as an array, from either format.

    Args:
        row: by column, as ``table.to_pylist()`` returns it.
        shape: of the map.
    """
    of: Mapping[str, Any] = row
    if "map_indices" in of:
        flat = np.zeros(math.prod(shape), np.float32)
        flat[np.asarray(of["map_indices"], int)] = of["map_values"]
        return flat.reshape(shape)
    return np.asarray(of["map"], np.float32).reshape(shape)


def output_error(error: OSError, folder: Path) -> OSError | None:
    """The error with the output folder as its file name and a text in words; None if it is about something else."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not full and error.errno not in (errno.EROFS, errno.EFBIG):
        path = error.filename
        if path is None or not Path(os.fsdecode(path)).is_relative_to(folder):
            return None
    text = "the disk is full; finished shards are kept, and the same call resumes after them"
    return OSError(error.errno, text if full else error.strerror or str(error), str(folder))
