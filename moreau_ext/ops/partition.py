"""Groups of features, laid out for the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """Groups laid out for the kernels; built by :meth:`Groups.partition`, for one shape and memory layout.

    Args:
        labels: int32 [rows, features], group of each memory offset; rows is 1 (shared) or B (per input).
        order: int32 [rows, features], memory offsets sorted by group, ascending within one.
        offsets: int32 [rows, count + 1], where each group starts in ``order``.
        weights: state dtype [rows, count], w_g.
    """

    labels: Tensor
    order: Tensor
    offsets: Tensor
    weights: Tensor

    @property
    def count(self) -> int:
        return self.weights.shape[1]

    @property
    def per_input(self) -> bool:
        return self.labels.shape[0] > 1

    def take(self, index: Tensor) -> Partition:
        """The partition of some of the inputs."""
        if not self.per_input:
            return self
        return replace(
            self,
            labels=self.labels[index],
            order=self.order[index],
            offsets=self.offsets[index],
            weights=self.weights[index],
        )
