"""Where inputs come from: image files, arrays, Parquet columns, torch's data sets. One stable id each.

A source is a list of rows that is cut the same way in every run. What cannot be read becomes a row with a reason.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .preprocess import Preprocess

# What is taken from a folder; files that are named are tried whatever their name.
IMAGES = (".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".jp2")
ARRAYS = (".npy", ".npz")
# Pillow warns above this and refuses twice as many: 89 million pixels, a quarter of a gigabyte in RGB.
MAX_PIXELS = 89_478_485


class Unreadable(Exception):
    """An input that cannot be had, and why."""


@dataclass
class Loaded:
    """Some rows of a source: those that could be read, stacked, and the reasons of the others.

    Args:
        inputs: [n, *features] of the rows in ``good``; None where there are none.
        good: positions in the rows asked for.
        ids, names, targets: of all rows asked for; a target is None where the source has none.
        errors: by position.
    """

    inputs: Tensor | None
    good: list[int]
    ids: list[int]
    names: list[str]
    targets: list[int | None]
    errors: dict[int, str]

    def __len__(self) -> int:
        return len(self.ids)

    def pin_memory(self) -> Loaded:
        """What a DataLoader calls where a GPU is to be fed."""
        if self.inputs is not None:
            self.inputs = self.inputs.pin_memory()
        return self


def path_id(name: str) -> int:
    """The id of a file: the first 8 bytes of blake2b of its relative POSIX path, as a little-endian int64.

    Example:
        >>> from moreau_ext.batch import path_id
        >>> path_id("cats/1.png") == path_id("cats/1.png") != path_id("cats/2.png")
        True
    """
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def reason(error: BaseException) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, Unreadable) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


class Source(ABC):
    """Rows that can be read in any order: ``len``, an id and a name each, and the reading.

    Args:
        preprocess: what is done to every input.
        target: name of the column that holds the target, or None.
    """

    preprocess: Preprocess | None = None
    target: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, row: int) -> str:
        """What the row is called in the results."""

    @abstractmethod
    def read(self, row: int) -> Tensor:
        """The row's input, preprocessed. May raise anything: the caller makes a row of it."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What identifies the source, as JSON holds it: another answer is another source."""

    def id(self, row: int) -> int:
        return row

    def target_of(self, row: int) -> int | None:
        return None

    def load(self, start: int, stop: int) -> Loaded:
        """Rows start ... stop − 1. Never raises for what is in them."""
        rows = range(start, stop)
        found: list[Tensor] = []
        good: list[int] = []
        errors: dict[int, str] = {}
        targets: list[int | None] = []
        for position, row in enumerate(rows):
            label = None
            try:
                if self.target is not None:
                    label = self.target_of(row)
                    if label is None:
                        raise Unreadable(f"has no target: {self.target} is empty")
                found.append(_checked(self.read(row), found))
                good.append(position)
            except Exception as error:  # decoders raise anything on what is damaged, and it is the row's own
                errors[position] = reason(error)
            targets.append(label)
        return Loaded(
            inputs=torch.stack(found) if found else None,
            good=good,
            ids=[self.id(row) for row in rows],
            names=[self.name(row) for row in rows],
            targets=targets,
            errors=errors,
        )


def _checked(value: Tensor, before: list[Tensor]) -> Tensor:
    if not value.is_floating_point():
        raise Unreadable(f"holds {value.dtype}; expected floating point, or a preprocess that scales integers")
    if value.numel() == 0:
        raise Unreadable(f"has no features, shape {tuple(value.shape)}")
    if not bool(value.isfinite().all()):
        raise Unreadable("holds NaN or infinity")
    if before and value.shape != before[0].shape:
        raise Unreadable(_other_shape(value.shape, before[0].shape))
    return value


def _other_shape(got: Sequence[int], expected: Sequence[int]) -> str:
    return (
        f"has shape {tuple(got)} where the first input has {tuple(expected)}; give resize and crop in --preprocess to "
        "bring all to one size"
    )


def to_tensor(value: Any, preprocess: Preprocess | None) -> Tensor:
    """Any tensor, array or nested list as an input: integers are scaled as pixels are."""
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return (preprocess or Preprocess()).tensor(tensor.detach().cpu())


def decode(file: Any, preprocess: Preprocess | None) -> Tensor:
    """An image file (a path or a binary file) as an input. The first frame of an animation.

    Raises:
        Unreadable: more than :data:`MAX_PIXELS` pixels.
        OSError, ValueError, ...: whatever Pillow finds wrong.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}: a bomb?")
            image.load()
            return (preprocess or Preprocess()).image(image)


class Files(Source):
    """Image files. The id of one is :func:`path_id` of its name, which is relative to the folder (or to the part of the
    glob without wildcards) that it was found by; a file given by itself is called by its name alone.

    Args:
        paths: files, folders (searched below, hidden ones left out) and globs.
        target: "class" for the number of a file's uppermost folder among the sorted ones (as in ImageFolder).

    Raises:
        ValueError: nothing found, one id twice, or ``target`` without folders.
        FileNotFoundError: a path that is not there.
    """

    def __init__(self, paths: Iterable[str | Path], preprocess: Preprocess | None = None, target: str | None = None):
        self.preprocess, self.target = preprocess, target
        found: dict[str, Path] = {}
        for given in paths:
            for name, path in sorted(_search(Path(given))):
                if name in found and found[name] != path:
                    raise ValueError(
                        f"source: {found[name]} and {path} are both called {name}, which makes their ids equal; give "
                        "the folder that holds both"
                    )
                found[name] = path
        if not found:
            raise ValueError(f"source: no image files in {', '.join(map(str, paths))}")
        # Sorted as a whole, so that the order of arguments does not matter.
        self._names = sorted(found)
        self._paths = [found[name] for name in self._names]
        ids = {path_id(name): name for name in self._names}
        if len(ids) < len(self._names):
            twice = next(name for name in self._names if ids[path_id(name)] != name)
            raise ValueError(f"source: {twice} and {ids[path_id(twice)]} have the same id; rename one of them")
        self.classes: list[str] = []
        if target is not None:
            if target != "class":
                raise ValueError(f"target: image files have the column 'class' (their folder) alone, got {target!r}")
            self.classes = sorted({PurePosixPath(name).parts[0] for name in self._names if "/" in name})
            if not self.classes:
                raise ValueError("target: 'class' is the folder of a file, and none lies in a folder below the source")

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, row: int) -> str:
        # Names that are no Unicode are legal in a file system and not in Parquet.
        return self._names[row].encode("utf-8", "backslashreplace").decode()

    def id(self, row: int) -> int:
        return path_id(self._names[row])

    def target_of(self, row: int) -> int | None:
        folder = PurePosixPath(self._names[row]).parts[0] if "/" in self._names[row] else None
        return None if folder is None else self.classes.index(folder)

    def read(self, row: int) -> Tensor:
        path = self._paths[row]
        if not path.is_file():  # a pipe or a device would wait for ever
            raise Unreadable("is no file" if path.exists() else "is not there")
        return decode(path, self.preprocess)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        for name, path in zip(self._names, self._paths, strict=True):
            digest.update(f"{name}\0{_stamp(path)}\n".encode("utf-8", "surrogateescape"))
        described: dict[str, Any] = {"kind": "images", "inputs": len(self), "digest": digest.hexdigest()}
        return {**described, "classes": self.classes} if self.classes else described


def _stamp(path: Path) -> str:
    """Size and time of change: what tells a file from another without reading it."""
    try:
        status = path.stat()
    except OSError:
        return "?"
    return f"{status.st_size} {status.st_mtime_ns}"


def _search(given: Path) -> Iterator[tuple[str, Path]]:
    """(name, path) of what a path, folder or glob stands for."""
    if given.is_dir():
        for folder, below, names in os.walk(given, followlinks=True):
            below[:] = [name for name in below if not name.startswith(".")]
            for name in names:
                if Path(name).suffix.lower() in IMAGES and not name.startswith("."):
                    path = Path(folder, name)
                    yield path.relative_to(given).as_posix(), path
    elif given.is_file():
        yield given.name, given
    elif glob.has_magic(str(given)):
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
        for match in glob.iglob(str(given), recursive=True):
            if Path(match).is_file():
                yield Path(match).relative_to(fixed).as_posix(), Path(match)
    elif given.exists():
        yield given.name, given
    else:
        raise FileNotFoundError(f"source: {given} is not there")


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
        self._column = _choose(column, [n for n in arrays if n != target and np.ndim(arrays[n]) > 1], list(arrays))
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
        return cls(arrays, column, preprocess, target, path.name, _stamp(path))

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


def _choose(column: str | None, possible: list[str], all_of: list[str]) -> str:
    if column is not None:
        if column not in all_of:
            raise ValueError(f"column: there is no {column!r}; expected one of {', '.join(all_of)}")
        return column
    if len(possible) != 1:
        raise ValueError(
            f"column: expected one that holds images or tensors, found {', '.join(possible) or 'none'} of "
            f"{', '.join(all_of)}; name it"
        )
    return possible[0]


class Table(Source):
    """An image or tensor column of Parquet files; the id is the row number, counted through the sorted files.

    An image is binary (an encoded file) or, as Hugging Face writes it, a struct with ``bytes``; a tensor is a
    fixed-shape tensor of Arrow, or lists (of lists) of numbers.
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
        self._paths = sorted(path for given in paths for path in _tables(Path(given)))
        # (rows before it, file, row group) of every row group.
        self._groups: list[tuple[int, int, int]] = []
        self._starts: list[int] = []
        count = 0
        for number, path in enumerate(self._paths):
            try:
                about = pq.read_metadata(path)
                schema = pq.read_schema(path)
            except FileNotFoundError:
                raise FileNotFoundError(f"source: {path} is not there") from None
            except Exception as error:
                raise ValueError(f"source: {path} cannot be read: {reason(error)}") from error
            if number == 0:
                possible = [f.name for f in schema if f.name != target and _holds_inputs(f.type)]
                self._column = _choose(column, possible, schema.names)
            for needed in (self._column, *([target] if target else [])):
                if needed not in schema.names:
                    what = "target" if needed == target else "column"
                    raise ValueError(f"{what}: {path} has no column {needed!r}; it has {', '.join(schema.names)}")
            self._starts.append(count)
            for group in range(about.num_row_groups):
                self._groups.append((count, number, group))
                count += about.row_group(group).num_rows
        if count == 0:
            raise ValueError(f"source: no rows in {', '.join(map(str, self._paths)) or 'no Parquet files'}")
        self._count = count
        self._held: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def _place(self, row: int) -> tuple[Any, int]:
        """(the table of the row group that holds a row, its position in it): one is kept, since rows come in order."""
        import bisect

        import pyarrow.parquet as pq

        index = bisect.bisect_right(self._groups, (row, len(self._paths), 0)) - 1
        start, number, group = self._groups[index]
        if self._held is None or self._held[0] != index:
            columns = [self._column, *([self.target] if self.target else [])]
            with pq.ParquetFile(self._paths[number]) as file:
                self._held = (index, file.read_row_group(group, columns=columns))
        return self._held[1], row - start

    def name(self, row: int) -> str:
        import bisect

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
            return decode(io.BytesIO(value), self.preprocess)
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
                "\n".join(f"{path.name} {_stamp(path)}" for path in self._paths).encode(), digest_size=16
            ).hexdigest(),
        }


def _tables(given: Path) -> list[Path]:
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


class Items(Source):
    """A map-style ``torch.utils.data.Dataset``, or any sequence: items are inputs, (input, label) or mappings. The id
    is the row number. What it holds is not compared between runs, only its length.

    Args:
        dataset: with ``len`` and ``[]``.
        column: the input's key where items are mappings.
        target: "label" for the second of a pair, or a key of a mapping.
    """

    def __init__(
        self, dataset: Any, column: str | None = None, preprocess: Preprocess | None = None, target: str | None = None
    ):
        self.preprocess, self.target = preprocess, target
        self._dataset, self._column = dataset, column
        if len(dataset) == 0:
            raise ValueError("source: the data set is empty")
        # The last item, because a row's target and its input come from one reading.
        self._held: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def name(self, row: int) -> str:
        return f"{type(self._dataset).__name__}:{row}"

    def _item(self, row: int) -> Any:
        if self._held is None or self._held[0] != row:
            self._held = None
            self._held = (row, self._dataset[row])
        return self._held[1]

    def target_of(self, row: int) -> int | None:
        return label_of(self._item(row), self.target)

    def read(self, row: int) -> Tensor:
        return input_of(self._item(row), self._column, self.preprocess)

    def describe(self) -> dict[str, Any]:
        return {"kind": type(self._dataset).__name__, "inputs": len(self), "column": self._column}


def input_of(item: Any, column: str | None, preprocess: Preprocess | None) -> Tensor:
    """The input of an item of a data set."""
    if isinstance(item, dict):
        value = item[_choose(column, [k for k, v in item.items() if np.ndim(v) > 0 or _is_image(v)], list(item))]
    else:
        value = item[0] if isinstance(item, (tuple, list)) else item
    return (preprocess or Preprocess()).image(value) if _is_image(value) else to_tensor(value, preprocess)


def _is_image(value: Any) -> bool:
    return hasattr(value, "convert") and hasattr(value, "size")


def label_of(item: Any, target: str | None) -> int | None:
    """The target of an item of a data set."""
    if isinstance(item, dict):
        value = item.get(target)
    elif isinstance(item, (tuple, list)) and len(item) > 1 and target == "label":
        value = item[1]
    else:
        raise Unreadable(f"has no target {target!r}; items are {type(item).__name__}")
    if value is None:
        return None
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool) or not isinstance(number, int):
        raise Unreadable(f"has no target: {target} holds {number!r}, expected an integer")
    return number


class Stream:
    """An iterable data set or a DataLoader: rows that come in one order only, numbered as they come. A rerun walks
    through what is done without explaining it, so the order must be the same each time.

    A DataLoader's batches are taken apart; its own workers do the reading.

    Raises:
        ValueError: a DataLoader that shuffles: row numbers would name other inputs each time.
    """

    def __init__(
        self, dataset: Any, column: str | None = None, preprocess: Preprocess | None = None, target: str | None = None
    ):
        self.preprocess, self.target = preprocess, target
        self._dataset, self._column = dataset, column
        self._batched = isinstance(dataset, torch.utils.data.DataLoader) and dataset.batch_size is not None
        sampler = getattr(dataset, "sampler", None)
        if isinstance(sampler, torch.utils.data.RandomSampler):
            raise ValueError("source: the DataLoader shuffles, so that rows have no stable number; use shuffle=False")

    def describe(self) -> dict[str, Any]:
        return {"kind": type(self._dataset).__name__, "inputs": None, "column": self._column}

    def _items(self) -> Iterator[Any]:
        for item in self._dataset:
            if not self._batched:
                yield item
            elif isinstance(item, dict):
                yield from (dict(zip(item, values, strict=True)) for values in zip(*item.values(), strict=True))
            elif isinstance(item, (tuple, list)):
                yield from zip(*item, strict=True)
            else:
                yield from item

    def batches(self, size: int) -> Iterator[tuple[int, Loaded]]:
        """(row of the first, rows) in pieces of ``size``."""
        items = self._items()
        for start in itertools.count(0, size):
            held = list(itertools.islice(items, size))
            if not held:
                return
            yield start, _Held(held, self, start).load(0, len(held))


class _Held(Source):
    """A piece of a stream, as a source."""

    def __init__(self, items: list[Any], stream: Stream, start: int):
        self._items, self._stream, self._start = items, stream, start
        self.preprocess, self.target = stream.preprocess, stream.target

    def __len__(self) -> int:
        return len(self._items)

    def id(self, row: int) -> int:
        return self._start + row

    def name(self, row: int) -> str:
        return f"{type(self._stream._dataset).__name__}:{self._start + row}"

    def target_of(self, row: int) -> int | None:
        return label_of(self._items[row], self.target)

    def read(self, row: int) -> Tensor:
        return input_of(self._items[row], self._stream._column, self.preprocess)

    def describe(self) -> dict[str, Any]:
        return self._stream.describe()


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
        if path.is_dir() and not any(_search(path)) and any(_tables(path)):
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
