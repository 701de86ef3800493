"""The base class of sources, loaded rows, ids, and the conversion of values to inputs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ..._errors import SettingError, one_line
from ...data.images import read_image
from ..preprocess import Preprocess


class Unreadable(Exception):
    """An input that cannot be read; the text is the reason."""


@dataclass
class Loaded:
    """Consecutive rows of a source: the readable ones stacked, the reasons of the others.

    Args:
        inputs: [n, *features] of the rows in ``good``; None if there are none.
        good: positions of the readable rows among all of them.
        ids, names, targets: of all rows; a target is None if the source has none.
        errors: reasons by position.
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
        """Called by a DataLoader with ``pin_memory=True``."""
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


def stamp_of(path: Path) -> str:
    """Size and modification time of a file, to notice a change without reading it."""
    try:
        status = path.stat()
    except OSError:
        return "?"
    return f"{status.st_size} {status.st_mtime_ns}"


def reason(error: BaseException) -> str:
    """The error of a row as one line; the class of :class:`Unreadable` is left out."""
    return " ".join(str(error).split()) if isinstance(error, Unreadable) else one_line(error)


def in_words(left_out: Mapping[str, int]) -> str:
    """Counts by reason in words, as "2 left out: suffix .txt; 1 left out: hidden"."""
    return "; ".join(f"{count} left out: {why}" for why, count in sorted(left_out.items()))


class Source(ABC):
    """Rows that can be read in any order. Each has an id and a name.

    Args:
        preprocess: applied to every input.
        target: name of the column of targets, or None.
    """

    preprocess: Preprocess | None = None
    target: str | None = None
    # Number of the entries of the source that are no rows, by the reason.
    left_out: Mapping[str, int] = MappingProxyType({})

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, row: int) -> str:
        """The name of a row in the results."""

    @abstractmethod
    def read(self, row: int) -> Tensor:
        """The preprocessed input of a row. May raise anything; the row then carries the error."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The identity of the source as JSON; it is compared between runs."""

    def id(self, row: int) -> int:
        """The id of a row, which keys its noise; by default its number."""
        return row

    def target_of(self, row: int) -> int | None:
        """The target of a row, or None."""
        return None

    def batches(self, size: int) -> Iterator[tuple[int, Loaded]]:
        """(number of the first row, rows), ``size`` rows at a time."""
        for start in range(0, len(self), size):
            yield start, self.load(start, min(start + size, len(self)))

    def load(self, start: int, stop: int) -> Loaded:
        """Loads rows start ... stop − 1. A row that cannot be read becomes an error, never an exception."""
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
            except Exception as error:  # decoders of damaged files raise nearly anything
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
        raise Unreadable(shape_differs(value.shape, before[0].shape))
    return value


def shape_differs(got: Sequence[int], expected: Sequence[int]) -> str:
    """The reason of an input whose shape is not that of the first one."""
    return (
        f"has shape {tuple(got)} where the first input has {tuple(expected)}; resize and crop of preprocess bring all "
        "inputs to one size"
    )


def to_tensor(value: Any, preprocess: Preprocess | None) -> Tensor:
    """A tensor, array or nested list as an input; see :meth:`Preprocess.tensor`.

    Raises:
        Unreadable: no numbers, or integers that are no pixels.
    """
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
    else:
        array = np.array(value)
        if array.dtype.kind not in "buif":
            raise Unreadable(f"holds {array.dtype}; expected real numbers")
        if array.dtype.kind == "f" and array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    try:
        return (preprocess or Preprocess()).tensor(tensor)
    except TypeError as error:
        raise Unreadable(str(error)) from error


def image_input(file: str | Path | IO[bytes], preprocess: Preprocess | None) -> Tensor:
    """An image file as an input; see :func:`moreau_ext.data.images.read_image`."""
    return (preprocess or Preprocess()).image(read_image(file))


def choose_column(column: str | None, possible: list[str], names: list[str]) -> str:
    """The column to explain.

    Args:
        column: as asked for; None chooses the only possible one.
        possible: the columns that hold inputs.
        names: all columns.

    Raises:
        SettingError: no such column, or several are possible.
    """
    if column is not None:
        if column not in names:
            raise SettingError("column", f"there is no {column!r}; expected one of {', '.join(names)}")
        return column
    if len(possible) != 1:
        raise SettingError(
            "column",
            f"expected one that holds images or tensors, found {', '.join(possible) or 'none'} of {', '.join(names)}; "
            "name it",
        )
    return possible[0]
