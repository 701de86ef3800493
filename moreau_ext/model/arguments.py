"""Additional arguments of a model: which of them follow the inputs, and their rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

# Whether an argument follows the inputs: as a whole, not at all, or in the tensors and arrays that it holds.
Follows = bool | Literal["items"]

# Combinations that are tried where several arguments could be read in two ways.
_READINGS = 16


@dataclass(frozen=True)
class PerInput:
    """Marks an additional argument that has one entry per input, where its shape does not say so.

    Args:
        value: a tensor or array [B, ...], a list of B entries, or a list or dict of such.

    Example:
        >>> import torch
        >>> from moreau_ext import PerInput, SmoothGrad
        >>> model = lambda x, scale: (x * torch.tensor(scale)[:, None]).sum(1)
        >>> SmoothGrad(model, num_samples=4).attribute(torch.ones(2, 3), None, PerInput([1.0, 2.0]))
        tensor([[1., 1., 1.],
                [2., 2., 2.]])
    """

    value: object


@dataclass(frozen=True)
class Shared:
    """Marks an additional argument that all inputs share, though it may have as many rows as there are inputs.

    Args:
        value: passed to the model as it is.

    Example:
        >>> import torch
        >>> from moreau_ext import Shared, SmoothGrad
        >>> model = lambda x, prototypes: x @ prototypes.T
        >>> prototypes = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> SmoothGrad(model, num_samples=4).attribute(torch.ones(2, 2), [0, 1], Shared(prototypes))
        tensor([[1., 2.],
                [3., 4.]])
    """

    value: object


@dataclass(frozen=True)
class Items:
    """A list or dict whose tensors and arrays with ``rows`` rows follow the inputs."""

    value: Any
    rows: int

    def take(self, index: Tensor | slice) -> Items:
        """The same for some of the rows."""
        rows = len(range(*index.indices(self.rows))) if isinstance(index, slice) else len(index)
        return Items(_map_items(self.value, self.rows, lambda leaf: take_rows(leaf, index)), rows)


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0 and value.shape[0] == rows


def _map_items(value: Any, rows: int, change: Callable[[Any], Any]) -> Any:
    if _has_rows(value, rows):
        return change(value)
    if isinstance(value, Mapping):
        made: Any = copy.copy(value)
        for key, held in value.items():
            made[key] = _map_items(held, rows, change)
        return made
    if type(value) in (list, tuple):
        return type(value)(_map_items(held, rows, change) for held in value)
    return value


def _has_items(value: Any, rows: int) -> bool:
    found: list[Any] = []
    _map_items(value, rows, found.append)
    return bool(found)


def take_rows(value: Any, index: Tensor | slice) -> Any:
    """Some rows of a tensor (also sparse), an array or a list."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            return value[index]
        if isinstance(index, slice):
            index = torch.arange(value.shape[0], device=value.device)[index]
        if value.layout == torch.sparse_coo:
            return value.index_select(0, index)
        rows: Any = value
        return rows.to_sparse_coo().index_select(0, index).to_sparse(layout=value.layout)
    if isinstance(value, Items):
        return value.take(index)
    if isinstance(value, np.ndarray):
        return value[index if isinstance(index, slice) else index.cpu().numpy()]
    return value[index] if isinstance(index, slice) else type(value)([value[i] for i in index.tolist()])


def _options(name: str, value: Any, batch: int) -> list[Follows]:
    """The ways to read an argument, the likeliest first."""
    follows: Follows = _has_rows(value, batch) or (type(value) in (list, tuple) and len(value) == batch)
    items = not _has_rows(value, batch) and _has_items(value, batch)
    if isinstance(value, PerInput):
        held = _options(name, value.value, batch)
        if not any(held):
            raise ValueError(f"{name}: PerInput, but it has no axis or entries for {batch} inputs")
        return [next(option for option in held if option)]
    if isinstance(value, Shared):
        return [False]
    if _has_rows(value, batch):
        return [True, False]
    options: list[Follows] = [False]
    if follows:
        options.append(True)
    if items:
        options.append("items")
    return options


@dataclass(frozen=True)
class Arguments:
    """Additional arguments as they were given.

    Args:
        values: without their marks.
        options: the ways to read each, the likeliest first.
    """

    values: tuple[Any, ...]
    options: tuple[list[Follows], ...]

    @property
    def ambiguous(self) -> bool:
        """Whether there is more than one way."""
        return any(len(options) > 1 for options in self.options)

    def kind(self, batch: int) -> tuple[Any, ...]:
        """Equal for arguments that a model reads alike."""
        return tuple([_kind(value, batch) for value in self.values])

    def after(self, inputs: tuple[Any, ...]) -> Arguments:
        """These after inputs that the model gets as they are."""
        own: list[list[Follows]] = [[True] for _ in inputs]
        return Arguments((*inputs, *self.values), (*own, *self.options))

    def readings(self) -> Iterator[tuple[Follows, ...]]:
        """The ways to read all, the likeliest first."""
        return islice(product(*self.options), _READINGS)


def _kind(value: Any, batch: int) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        first = value.shape[:1]
        return (type(value), tuple(first) == (batch,) or first, value.shape[1:])
    if isinstance(value, Mapping):
        return (type(value), tuple((key, _kind(held, batch)) for key, held in value.items()))
    if type(value) in (list, tuple):
        held = tuple(_kind(v, batch) for v in value[:8])
        return (type(value), len(value) == batch, len(value) if len(value) != batch else held)
    return type(value)


def arguments_of(given: Any, batch: int, keywords: Mapping[str, Any] | None = None) -> Arguments:
    """Reads ``additional_forward_args``, and ``forward_kwargs`` after them.

    Raises:
        TypeError: a dict of arguments by position, or none of keywords.
        ValueError: a :class:`PerInput` without entries for so many inputs.
    """
    if isinstance(given, dict):
        raise TypeError(
            "additional_forward_args: expected a value or a tuple of them, passed by position, got a dict; "
            "forward_kwargs= passes keyword arguments, and ({...},) passes the dict itself"
        )
    if keywords is not None and (not isinstance(keywords, Mapping) or not all(isinstance(k, str) for k in keywords)):
        raise TypeError(f"forward_kwargs: expected a dict of arguments by name, got {type(keywords).__name__}")
    values = () if given is None else given
    values = values if isinstance(values, tuple) else (values,)
    names = [f"additional_forward_args[{i}]" for i in range(len(values))]
    if keywords:
        values += tuple(keywords.values())
        names += [f"forward_kwargs[{name!r}]" for name in keywords]
    options = tuple([_options(name, v, batch) for name, v in zip(names, values, strict=True)])
    values = tuple([v.value if isinstance(v, (PerInput, Shared)) else v for v in values])
    return Arguments(tuple([v.clone() if isinstance(v, Tensor) and v.is_inference() else v for v in values]), options)


def read(values: tuple[Any, ...], reading: tuple[Follows, ...], batch: int) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    """(arguments, whether each follows the inputs), for one way to read them."""
    args = tuple([Items(v, batch) if r == "items" else v for v, r in zip(values, reading, strict=True)])
    return args, tuple([bool(r) for r in reading])
