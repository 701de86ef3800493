"""What all sources share: loaded rows, ids, decoding."""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..preprocess import Preprocess

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


def choose(column: str | None, possible: list[str], all_of: list[str]) -> str:
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
