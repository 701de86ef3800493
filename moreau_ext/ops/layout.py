"""Batches of tensors: their memory layouts, their rows, and inner products over their features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def tensor_of(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A setting as a tensor: one that is a tensor stays where it is, everything else is made on the CPU, whatever
    torch's default device and dtype are."""
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    with suppress(TypeError, RuntimeError):  # of tensors on a GPU, in a list
        value = np.asarray(value)
    return torch.as_tensor(value, dtype=dtype, device="cpu")


def memory_layout(x: Tensor) -> tuple[int, int] | None:
    """(channels, positions) of a dense batch: channels = 1 for contiguous memory, > 1 for channels_last, else None.

    Feature (c, s) lies at offset s·channels + c within its input and has the row-major index c·positions + s.
    """
    features = math.prod(x.shape[1:])
    if x.is_contiguous():
        return 1, features
    if x.dim() >= 3 and x.movedim(1, -1).is_contiguous():
        channels = x.shape[1]
        return channels, features // channels
    return None


def flat_rows(x: Tensor) -> Tensor:
    """[B, features] in row-major order; unlike flatten(1), also of a tensor whose only axis is the batch."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def in_memory_order(x: Tensor) -> Tensor:
    """[B, features] view of a dense batch whose columns run through memory."""
    layout = memory_layout(x)
    if layout is None:
        raise ValueError(
            f"expected a contiguous or channels_last tensor, got strides {x.stride()}, shape {tuple(x.shape)}"
        )
    return (x if layout[0] == 1 else x.movedim(1, -1)).reshape(x.shape[0], layout[0] * layout[1])


def rows_like(x: Tensor, rows: int) -> Tensor:
    """An uninitialised [rows, *features] of the dtype, device and memory layout of x."""
    layout = memory_layout(x)
    if layout is None or layout[0] == 1:
        return x.new_empty(rows, *x.shape[1:])
    return x.new_empty(rows, *x.shape[2:], x.shape[1]).movedim(-1, 1)


def over_features(value: Tensor, like: Tensor) -> Tensor:
    """[B] viewed so that it broadcasts over [B, *features]."""
    return value.view(-1, *[1] * (like.dim() - 1)) if value.dim() == 1 else value


Tensors = tuple[Tensor, ...]


def inner(a: Tensors, b: Tensors) -> Tensor:
    """⟨a, b⟩ of every input over all its tensors, float64 [B]."""
    return total(tuple([u.double() * v.double() for u, v in zip(a, b, strict=True)]))


def total(tensors: Tensors) -> Tensor:
    """The sum of every input over all features of all its tensors, float64 [B]."""
    return torch.stack([flat_rows(t).sum(1, dtype=torch.float64) for t in tensors]).sum(0)


def subtract(a: Tensors, b: Tensors) -> Tensors:
    """a − b."""
    return tuple([u - v for u, v in zip(a, b, strict=True)])


def divide(tensors: Tensors, by: Tensor) -> Tensors:
    """tensors / by, [B]."""
    return tuple([t / over_features(by.to(t.dtype), t) for t in tensors])


def copy_into(targets: Tensors, values: Tensors) -> None:
    """Copies in place."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def tensors_of(value: Any) -> Tensors:
    """The tensors of one, of a tuple or of a dict, in their order."""
    if isinstance(value, Tensor):
        return (value,)
    return tuple(value.values()) if isinstance(value, Mapping) else tuple(value)


def in_form_of(like: Any, tensors: Tensors) -> Any:
    """Tensors in the form of a tensor, a tuple or a dict; the reverse of :func:`tensors_of`."""
    if isinstance(like, Tensor):
        return tensors[0]
    return dict(zip(like, tensors, strict=True)) if isinstance(like, Mapping) else tensors


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor changed, or all those of a tuple, of a dict or of a record.

    A record is a dataclass. Numbers and None are as they are.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple([each_tensor(v, change) for v in value])
    if isinstance(value, dict):
        return {key: each_tensor(v, change) for key, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: each_tensor(getattr(value, f.name), change) for f in fields(value)})
    return value


def take(value: Any, index: Tensor) -> Any:
    """Some inputs of a batch: of a tensor [B, ...], in its memory layout, of a tuple, a dict or a record of such."""

    def rows(tensor: Tensor) -> Tensor:
        layout = memory_layout(tensor)
        if layout is None or layout[0] == 1:
            return tensor[index]
        return tensor.movedim(1, -1)[index].movedim(-1, 1)

    return each_tensor(value, rows)


def join(parts: list[Any]) -> Any:
    """One batch of several, the reverse of :func:`take`; numbers and None are those of the first."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        layout = memory_layout(first)
        if layout is None or layout[0] == 1:
            return torch.cat(parts)
        return torch.cat([x.movedim(1, -1) for x in parts]).movedim(-1, 1)
    if isinstance(first, tuple):
        return tuple([join(list(column)) for column in zip(*parts, strict=True)])
    if isinstance(first, dict):
        return {key: join([part[key] for part in parts]) for key in first}
    if is_dataclass(first) and not isinstance(first, type):
        return replace(first, **{f.name: join([getattr(p, f.name) for p in parts]) for f in fields(first)})
    return first


def like_layout(gradient: Tensor, x: Tensor) -> Tensor:
    """``gradient`` in the memory layout of x (a model may hand back another, or one expanded number)."""
    if memory_layout(gradient) == memory_layout(x):
        return gradient
    return torch.empty_like(x).copy_(gradient)


def states_like(inputs: Tensors) -> Tensors:
    """Zeros of the inputs' shapes and layouts, in the state dtype."""
    return tuple([torch.zeros_like(x, dtype=state_dtype(x.dtype)) for x in inputs])


def row_chunks(batch: int, size: int | None, device: torch.device) -> list[Tensor]:
    """The row numbers 0 .. batch - 1 in pieces of at most ``size``."""
    rows = torch.arange(batch, device=device)
    size = batch if size is None else size
    return [rows[start : start + size] for start in range(0, batch, size)]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of displacement, averages and scalars for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
