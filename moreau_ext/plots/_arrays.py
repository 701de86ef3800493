"""Arguments of pictures as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..ops.layout import tensor_of
from ..solvers.groups import Groups

Array = np.ndarray[Any, Any]
# Numbers to draw.
Drawn = Tensor | ArrayLike
_SHAPES = {1: "[features]", 2: "[H, W]", 3: "[channels, H, W]", 4: "[B, channels, H, W]"}


def finite(value: Any, name: str, axes: tuple[int, ...]) -> Array:
    """A tensor, array or list of real numbers as a float64 array.

    Args:
        name: of the argument, for errors.
        axes: how many it may have.
    """
    given = value.detach() if isinstance(value, Tensor) else np.asarray(value)
    if given.ndim not in axes or 0 in given.shape:
        raise ValueError(f"{name}: expected {' or '.join(_SHAPES[n] for n in axes)}, got shape {tuple(given.shape)}")
    if isinstance(given, Tensor):
        small = given.dtype == torch.uint8
        array: Array = given.to("cpu", torch.float64).numpy() if not given.is_complex() else np.array("complex")
    else:
        small = given.dtype == np.uint8
        array = given
    if array.dtype.kind not in "buif":
        raise TypeError(f"{name}: expected real numbers, got {given.dtype}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(1)))
        what = f"input {row}" if array.ndim == max(axes) else "it"
        raise ValueError(f"{name}: {what} holds NaN or infinity, which no colour can show")
    return array / 255 if small else array


def as_batch(value: Any, name: str, rows: int | None = None) -> Array:
    """[B, channels, H, W]; three axes are one image, or ``rows`` images of one channel."""
    array = finite(value, name, (2, 3, 4))
    if array.ndim == 3 and rows is not None and len(array) == rows:
        return array[:, None]
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def drawable(batch: Array) -> tuple[list[Array], bool]:
    """(what to draw of each image: [H, W] or [H, W, 3] in [0, 1], whether colours were scaled to that)."""
    if batch.shape[1] != 3:
        return list(batch.mean(1) if batch.shape[1] > 1 else batch[:, 0]), False
    scaled = bool(batch.min() < -1e-6 or batch.max() > 1 + 1e-6)
    if scaled:
        low, high = batch.min((1, 2, 3), keepdims=True), batch.max((1, 2, 3), keepdims=True)
        batch = (batch - low) / np.where(high > low, high - low, 1)
    return list(batch.clip(0, 1).transpose(0, 2, 3, 1)), scaled


def gray_of(picture: Array) -> Array:
    """[H, W] in [0, 1]."""
    gray = picture @ np.array([0.299, 0.587, 0.114]) if picture.ndim == 3 else picture
    if picture.ndim == 2:
        span = gray.max() - gray.min()
        gray = (gray - gray.min()) / span if span > 0 else np.full_like(gray, 0.5)
    return np.asarray(gray)


def rows_of(batch: Any, name: str, rows: int) -> Array:
    """[B, channels, H, W] of a gallery, where three axes are images without channels."""
    shape = tuple(np.shape(batch))
    if len(shape) not in (3, 4) or shape[0] != rows or 0 in shape:
        raise ValueError(f"{name}: expected {rows} images, [B, H, W] or [B, channels, H, W], got shape {shape}")
    if len(shape) == 3:
        batch = batch[:, None]
    return finite(batch, name, (4,))


def labels_of(groups: Any, shape: tuple[int, ...]) -> Array:
    """The group of each pixel, int [B, H, W]."""
    if isinstance(groups, Groups):
        found = groups.labels(torch.Size(shape), torch.device("cpu"))
        if bool((found != found[:, :1]).any()):
            raise ValueError("groups: they differ between channels, which one picture cannot show")
        return np.broadcast_to(found[:, 0].numpy(), (shape[0], *shape[2:]))
    found = tensor_of(groups)
    if found.is_floating_point() or tuple(found.shape[-2:]) != shape[2:] or found.dim() not in (2, 3):
        raise ValueError(
            f"groups: expected Groups, or whole numbers {list(shape[2:])}, got {found.dtype} {tuple(found.shape)}"
        )
    numbers = np.unique(found.cpu().numpy(), return_inverse=True)[1].reshape(found.shape)
    return np.broadcast_to(numbers, (shape[0], *shape[2:]))


def norms_of(maps: Array, labels: Array) -> Array:
    """The length of each group's values, in place of the values: [B, H, W]."""
    found = np.empty(labels.shape)
    for row, (values, of) in enumerate(zip(maps, labels, strict=True)):
        _, at = np.unique(of, return_inverse=True)
        squares = np.bincount(at.ravel(), (values**2).sum(0).ravel())
        found[row] = np.sqrt(squares)[at.reshape(of.shape)]
    return found


def scale_of(values: Array, percentile: float) -> float:
    """The value with full colour: a percentile of the non-zero |values|; 0 if there is none."""
    size = np.abs(values[values != 0])
    return float(np.percentile(size, percentile)) if size.size else 0.0
