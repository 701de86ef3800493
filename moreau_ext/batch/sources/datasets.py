"""Sources of Python objects: map-style data sets and streams."""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import data
from torch.utils._pytree import tree_leaves
from torch.utils.data.datapipes.iter.combinatorics import ShufflerIterDataPipe

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
        self,
        dataset: object,
        column: str | None = None,
        preprocess: Preprocess | None = None,
        target: str | None = None,
    ):
        self.preprocess, self.target = preprocess, target
        self._column = column
        self._dataset: Any = dataset
        if len(self) == 0:
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
        ValueError: a DataLoader whose order is not that of its data set, or that leaves rows out; its row numbers would
            name other inputs.
    """

    left_out: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        dataset: object,
        column: str | None = None,
        preprocess: Preprocess | None = None,
        target: str | None = None,
    ):
        self.preprocess, self.target = preprocess, target
        self.column, self.kind = column, type(dataset).__name__
        self._dataset: Any = dataset
        self._batched = False
        if isinstance(dataset, data.DataLoader):
            _check_order(dataset)
            self._batched = dataset.batch_sampler is not None
        for shuffling in (dataset, getattr(dataset, "dataset", None)):
            if isinstance(shuffling, ShufflerIterDataPipe):
                raise _no_number(f"{type(shuffling).__name__} shuffles")

    def describe(self) -> dict[str, Any]:
        """The identity of the source as JSON; it is compared between runs."""
        return {"kind": self.kind, "inputs": None, "column": self.column}

    def _items(self) -> Iterator[Any]:
        loader = isinstance(self._dataset, data.DataLoader)
        for item in _fitting(self._dataset) if loader else self._dataset:
            if not self._batched:
                yield item
            elif isinstance(item, dict):
                columns = _columns(list(item.values()), named=True)
                yield from (dict(zip(item, values, strict=True)) for values in zip(*columns, strict=True))
            elif isinstance(item, (tuple, list)):
                yield from zip(*_columns(list(item)), strict=True)
            else:
                yield from _columns([item])[0]

    def batches(self, size: int) -> Iterator[tuple[int, Loaded]]:
        """(number of the first row, rows), ``size`` rows at a time."""
        items = self._items()
        for start in itertools.count(0, size):
            rows = list(itertools.islice(items, size))
            if not rows:
                return
            yield start, _Rows(rows, self, start).load(0, len(rows))


def _no_number(what: str) -> SettingError:
    return SettingError("source", f"the {what}, so rows have no stable number; give them in the order of the data set")


def _check_order(loader: data.DataLoader[Any]) -> None:
    """Refuses a DataLoader unless it yields every row of its data set once, in order."""
    if type(loader).__iter__ is not data.DataLoader.__iter__:
        raise _no_number(f"{type(loader).__name__} has an order of its own")
    if isinstance(loader.dataset, data.IterableDataset):
        if loader.num_workers > 1:
            raise _no_number(f"DataLoader mixes the rows of {loader.num_workers} workers; use one at most")
    else:
        batches = loader.batch_sampler
        sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
        if batches is not None and type(batches) is not data.BatchSampler:
            raise _no_number(f"DataLoader has the batch_sampler {type(batches).__name__}, whose order is not known")
        if isinstance(sampler, data.RandomSampler):
            raise _no_number("DataLoader shuffles; use shuffle=False")
        if type(sampler) is not data.SequentialSampler:
            raise _no_number(f"DataLoader has the sampler {type(sampler).__name__}, whose order is not known")
    if loader.num_workers and not getattr(loader, "in_order", True):
        raise _no_number("DataLoader has in_order=False")
    batches = loader.batch_sampler
    sized = not isinstance(loader.dataset, data.IterableDataset)
    rows = len(loader.dataset) if sized else 0  # type: ignore[arg-type]  # a Dataset need not declare its length
    whole = sized and batches is not None and rows % getattr(batches, "batch_size", 1) == 0
    if not whole and (loader.drop_last or getattr(batches, "drop_last", False)):
        raise SettingError("source", "the DataLoader leaves out the last rows (drop_last=True); use drop_last=False")


def _fitting(loader: data.DataLoader[Any]) -> data.DataLoader[Any]:
    """The loader, without its workers if their batches do not fit into shared memory.

    torch's workers lose a batch that does not fit, and the loader waits for it for ever. A container has 64 MiB.
    """
    if not loader.num_workers or isinstance(loader.dataset, data.IterableDataset):
        return loader
    rows = getattr(loader.batch_sampler, "batch_size", 1)
    ahead = (loader.prefetch_factor or 2) * loader.num_workers
    needed = rows * ahead * sum(t.nbytes for t in tree_leaves(loader.dataset[0]) if isinstance(t, (Tensor, np.ndarray)))
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    if needed <= free:
        return loader
    warnings.warn(
        f"the DataLoader's workers need {needed >> 20} MiB of shared memory (/dev/shm) and {free >> 20} MiB are free, "
        "so this process reads; give the data set itself, and workers",
        stacklevel=2,
    )
    alone = copy.copy(loader)
    vars(alone).update(num_workers=0, prefetch_factor=None, persistent_workers=False, timeout=0, _iterator=None)
    return alone


def _columns(batch: list[Any], named: bool = False) -> list[Any]:
    """The parts of a batch, each with one value per row.

    Args:
        batch: the inputs, or (inputs, labels, ...), or the values of a mapping.
        named: they are of a mapping, in any order.

    Raises:
        SettingError: a batch that is none, as a collate function of one's own may make it.
    """
    first = next((part for part in (batch if named else batch[:1]) if isinstance(part, (Tensor, np.ndarray))), None)
    if first is None or any(
        isinstance(part, str) or not hasattr(part, "__len__") or len(part) != len(first) for part in batch
    ):
        kinds = ", ".join(type(part).__name__ for part in batch)
        raise SettingError(
            "source",
            f"the DataLoader's batches hold {kinds}, and not an array of inputs beside one value per row; give the "
            "data set itself, or a collate_fn that stacks",
        )
    return batch


class _Rows(Items):
    """Consecutive rows of a stream."""

    def __init__(self, items: list[Any], stream: Stream, start: int):
        super().__init__(items, stream.column, stream.preprocess, stream.target)
        self._kind, self._start = stream.kind, start

    def id(self, row: int) -> int:
        return self._start + row

    def name(self, row: int) -> str:
        return f"{self._kind}:{self._start + row}"
