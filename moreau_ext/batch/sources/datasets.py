"""Data sets and streams of Python objects."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..preprocess import Preprocess
from .base import Loaded, Source, Unreadable, choose, to_tensor


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
        value = item[choose(column, [k for k, v in item.items() if np.ndim(v) > 0 or _is_image(v)], list(item))]
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
