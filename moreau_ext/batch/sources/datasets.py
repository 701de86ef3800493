"""Sources of Python objects: map-style data sets and streams."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._errors import SettingError
from ..preprocess import Preprocess
from .base import Loaded, Source, Unreadable, choose_column, to_tensor


class Items(Source):
    """A map-style ``torch.utils.data.Dataset`` or any sequence. The id is the row number.

    An item is an input, a pair (input, label) or a mapping. Only the length is compared between runs.

    Args:
        dataset: with ``len`` and ``[]``.
        column: the key of the input, if items are mappings.
        target: "label" for the second of a pair, or a key of a mapping.
    """

    def __init__(
        self, dataset: Any, column: str | None = None, preprocess: Preprocess | None = None, target: str | None = None
    ):
        self.preprocess, self.target = preprocess, target
        self._dataset, self._column = dataset, column
        if len(dataset) == 0:
            raise SettingError("source", "the data set is empty")
        # (row, item) of the last read: the target and the input of a row come from one item.
        self._last: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def name(self, row: int) -> str:
        return f"{type(self._dataset).__name__}:{row}"

    def _item(self, row: int) -> Any:
        if self._last is None or self._last[0] != row:
            self._last = None  # frees the old item before the new one is made
            self._last = (row, self._dataset[row])
        return self._last[1]

    def target_of(self, row: int) -> int | None:
        return label_of(self._item(row), self.target)

    def read(self, row: int) -> Tensor:
        return input_of(self._item(row), self._column, self.preprocess)

    def describe(self) -> dict[str, Any]:
        return {"kind": type(self._dataset).__name__, "inputs": len(self), "column": self._column}


def input_of(item: Any, column: str | None, preprocess: Preprocess | None) -> Tensor:
    """The input of an item of a data set."""
    if isinstance(item, dict):
        value = item[choose_column(column, [k for k, v in item.items() if np.ndim(v) > 0 or _is_image(v)], list(item))]
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
    """An iterable data set or a DataLoader: rows in one order, numbered as they come.

    A repeated job reads the finished rows without explaining them, so the order must be the same each time. The batches
    of a DataLoader are split into rows; its own workers read.

    Raises:
        ValueError: a DataLoader that shuffles; its row numbers would name other inputs each time.
    """

    def __init__(
        self, dataset: Any, column: str | None = None, preprocess: Preprocess | None = None, target: str | None = None
    ):
        self.preprocess, self.target = preprocess, target
        self.column, self.kind = column, type(dataset).__name__
        self._dataset = dataset
        self._batched = isinstance(dataset, torch.utils.data.DataLoader) and dataset.batch_size is not None
        sampler = getattr(dataset, "sampler", None)
        if isinstance(sampler, torch.utils.data.RandomSampler):
            raise SettingError("source", "the DataLoader shuffles, so rows have no stable number; use shuffle=False")

    def describe(self) -> dict[str, Any]:
        """The identity of the source as JSON; it is compared between runs."""
        return {"kind": self.kind, "inputs": None, "column": self.column}

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
        """(number of the first row, rows), ``size`` rows at a time."""
        items = self._items()
        for start in itertools.count(0, size):
            rows = list(itertools.islice(items, size))
            if not rows:
                return
            yield start, _Rows(rows, self, start).load(0, len(rows))


class _Rows(Items):
    """Consecutive rows of a stream."""

    def __init__(self, items: list[Any], stream: Stream, start: int):
        super().__init__(items, stream.column, stream.preprocess, stream.target)
        self._kind, self._start = stream.kind, start

    def id(self, row: int) -> int:
        return self._start + row

    def name(self, row: int) -> str:
        return f"{self._kind}:{self._start + row}"
