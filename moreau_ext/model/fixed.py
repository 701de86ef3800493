"""Fixed features: a score in which some features keep the values of their input."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.layout import Tensors, take


@dataclass(frozen=True)
class Fixed:
    """Features that keep the values of their input, whatever is done to a copy of it.

    The score becomes f(Fx + (I − F)x̃), F the projection on the fixed features. It does not depend on their noise or
    displacement, and its gradients and second derivatives are exact zeros there: what follows from these is that of
    the problem restricted to the free features.

    Args:
        masks: bool per tensor, True where a feature is fixed; [B, *features], or [1, *features] for all inputs.
        values: x per tensor, [B, *features].
        place: int64 [n], the input that each row is a copy of.
    """

    masks: Tensors
    values: Tensors
    place: Tensor

    def take(self, index: Tensor | slice) -> Fixed:
        """The same for some of the rows."""
        return replace(self, place=self.place[index])

    @property
    def of_rows(self) -> Tensors:
        """The masks of the rows, [n, *features] or [1, *features]."""
        return tuple([mask if mask.shape[0] == 1 else take(mask, self.place) for mask in self.masks])

    def restored(self, rows: Tensors) -> Tensors:
        """The rows with the fixed features of their inputs."""
        masked = zip(self.of_rows, self.values, rows, strict=True)
        return tuple([torch.where(mask, take(x, self.place), row) for mask, x, row in masked])
