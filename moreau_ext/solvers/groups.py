"""Which features belong together: the groups of the group penalty, as a partition of every input's features."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops.layout import memory_layout, tensor_of
from ..ops.partition import Partition

Weights = Literal["unit", "sqrt"]


def _partition(labels: Tensor, count: int, weights: Weights, dtype: torch.dtype, fixed: Tensor | None) -> Partition:
    """From group numbers and fixed features in memory order, [rows, features]."""
    if labels.shape[1] >= 1 << 31:
        raise ValueError(f"groups support up to 2^31 - 1 features per input, got {labels.shape[1]}")
    order = torch.argsort(labels, dim=1, stable=True)
    sizes = labels.new_zeros(labels.shape[0], count).scatter_add_(1, labels, torch.ones_like(labels))
    free = sizes if fixed is None else sizes - torch.zeros_like(sizes).scatter_add_(1, labels, fixed.to(labels.dtype))
    offsets = torch.nn.functional.pad(sizes.cumsum(1), (1, 0))
    w = free.to(dtype).sqrt().clamp_min(1) if weights == "sqrt" else torch.ones_like(sizes, dtype=dtype)
    return Partition(
        labels.to(torch.int32).contiguous(), order.to(torch.int32), offsets.to(torch.int32).contiguous(), w.contiguous()
    )


def _consecutive(labels: Tensor) -> Tensor:
    """Group numbers from 0 without gaps, within each input: their number does not depend on the batch."""
    return torch.stack([torch.unique(row, return_inverse=True)[1] for row in labels])


class Groups(ABC):
    """A rule that says which features of an input belong together."""

    weights: Weights

    @abstractmethod
    def labels(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Group number of every feature, int64, [1 or B, *features], counted from 0."""

    def partition(self, x: Tensor, dtype: torch.dtype, fixed: Tensor | None = None) -> Partition:
        """The groups of a batch, in its memory order, with weights in ``dtype``.

        Fixed features have no displacement, so that it does not matter which group they are in: they join one that has
        free features. Groups of fixed features alone are none, and weights count free features.

        Args:
            x: [B, *features].
            dtype: of the weights.
            fixed: bool [1 or B, *features].
        """
        labels = self.labels(x.shape, x.device).expand(-1, *x.shape[1:])
        layout = memory_layout(x)

        def flat(values: Tensor) -> Tensor:
            ordered = values if layout is None or layout[0] == 1 else values.movedim(1, -1)
            return ordered.reshape(values.shape[0], math.prod(x.shape[1:]))

        numbers, held = flat(labels), None
        if fixed is not None and numbers.numel():
            rows = max(numbers.shape[0], fixed.shape[0])
            numbers, held = numbers.expand(rows, -1), flat(fixed).expand(rows, -1)
            free = held.long().argmin(1, keepdim=True)
            numbers = _consecutive(torch.where(held, numbers.gather(1, free), numbers))
        count = int(numbers.max()) + 1 if numbers.numel() else 0
        return _partition(numbers, count, self.weights, dtype, held)


def _check_weights(weights: str) -> None:
    if weights not in ("unit", "sqrt"):
        raise ValueError(f"weights must be 'unit' (w_g = 1) or 'sqrt' (w_g = √|g|), got {weights!r}")


@dataclass(frozen=True)
class Tiles(Groups):
    """Rectangular tiles over the positions, each spanning all channels; the last ones are smaller where the size does
    not divide the image.

    Args:
        size: edge length in positions, one integer or one per position axis.
        weights: "unit" for w_g = 1 (the paper), "sqrt" for w_g = √|g|, which treats ragged tiles alike.
        channel_axis: the axis of the batch that holds channels (1 for images; -1 for a sequence of embeddings).

    Example:
        >>> import torch
        >>> from moreau_ext import Tiles
        >>> Tiles(2).labels(torch.Size([1, 1, 3, 3]), torch.device("cpu"))[0, 0].tolist()
        [[0, 0, 1], [0, 0, 1], [2, 2, 3]]

    Source: arXiv 2302.05294, section 4.2 (14 x 14 tiles).
    """

    size: int | tuple[int, ...]
    weights: Weights = "unit"
    channel_axis: int = 1

    def __post_init__(self) -> None:
        sizes = self.size if isinstance(self.size, tuple) else (self.size,)
        if not sizes or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
            raise ValueError(f"Tiles: size must be a positive integer or a tuple of them, got {self.size!r}")
        _check_weights(self.weights)

    def labels(self, shape: torch.Size, device: torch.device) -> Tensor:
        rank = len(shape)
        name = type(self).__name__
        if rank < 3:
            raise ValueError(
                f"{name} needs a channel axis and at least one position axis, got an input of shape {tuple(shape)}; "
                "for table rows give Labels(map) or SparseMoreauGrad"
            )
        channel = self.channel_axis % rank
        if not -rank <= self.channel_axis < rank or channel == 0:
            raise ValueError(f"{name}: channel_axis {self.channel_axis} is no feature axis of shape {tuple(shape)}")
        axes = [axis for axis in range(1, rank) if axis != channel]
        sizes = self.size if isinstance(self.size, tuple) else (self.size,) * len(axes)
        if len(sizes) != len(axes):
            raise ValueError(
                f"{name}: size {self.size} has {len(sizes)} entries, {tuple(shape)} has {len(axes)} position axes"
            )
        labels = torch.zeros([1] * rank, dtype=torch.int64, device=device)
        for axis, size in zip(axes, sizes, strict=True):
            tile = torch.arange(shape[axis], device=device) // size
            view = [1] * rank
            view[axis] = shape[axis]
            labels = labels * -(-shape[axis] // size) + tile.view(view)
        return labels.expand(1, *shape[1:])


@dataclass(frozen=True)
class Pixels(Groups):
    """One group per position, holding its channels: a pixel of an image, a token of an embedded sequence.

    Args:
        weights: "unit" for w_g = 1, "sqrt" for w_g = √|g|.
        channel_axis: the axis of the batch that holds channels (1 for images; -1 for [B, tokens, embedding]).

    Example:
        >>> import torch
        >>> from moreau_ext import Pixels
        >>> Pixels().labels(torch.Size([1, 3, 1, 2]), torch.device("cpu"))[0, :, 0].tolist()
        [[0, 1], [0, 1], [0, 1]]
    """

    weights: Weights = "unit"
    channel_axis: int = 1

    def __post_init__(self) -> None:
        _check_weights(self.weights)

    def labels(self, shape: torch.Size, device: torch.device) -> Tensor:
        if len(shape) < 3:
            raise ValueError(
                f"Pixels needs a channel axis and at least one position axis, got an input of shape {tuple(shape)}; "
                "for table rows give groups=Labels(map) or use SparseMoreauGrad"
            )
        return Tiles(1, self.weights, self.channel_axis).labels(shape, device)


@dataclass(frozen=True, eq=False)
class Labels(Groups):
    """Any grouping, as an integer map: superpixels, tokens, table columns.

    Args:
        map: integer tensor (or array). With fewer axes than the batch it serves every input and is broadcast over the
            features by the usual rules ([H, W] serves all channels, [T, 1] groups an embedding by token); with as many
            axes its first one is the batch. Equal numbers form a group; the numbers themselves do not matter.
        weights: "unit" for w_g = 1, "sqrt" for w_g = √|g|.

    Raises:
        TypeError: the map is not of integers.
        ValueError: the map does not broadcast to the features.

    Example:
        >>> import torch
        >>> from moreau_ext import Labels
        >>> Labels(torch.tensor([7, 7, 9])).labels(torch.Size([4, 3]), torch.device("cpu")).tolist()
        [[0, 0, 1]]
    """

    map: Tensor
    weights: Weights = "unit"

    def __post_init__(self) -> None:
        _check_weights(self.weights)
        values = tensor_of(self.map)
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"Labels: map must hold integers, got {values.dtype}")
        object.__setattr__(self, "map", values)

    def labels(self, shape: torch.Size, device: torch.device) -> Tensor:
        values = self.map.to(device=device, dtype=torch.int64)
        per_input = values.dim() == len(shape)
        target = shape if per_input else shape[1:]
        try:
            full = values.expand(target)
        except RuntimeError:
            raise ValueError(
                f"Labels: a map of shape {tuple(self.map.shape)} does not fit inputs of shape {tuple(shape)}; expected "
                f"one that broadcasts to {tuple(shape[1:])}, or to {tuple(shape)} with one map per input"
            ) from None
        if not per_input:
            full = full.unsqueeze(0)
        if full.numel() == 0:
            return full
        return _consecutive(full)
