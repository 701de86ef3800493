"""Penalties η·Ω(δ): value, proximal map, and the strength at which the map becomes zero.

Small frozen records over a tuple of tensors [B, *features]; one η per input, shared by its tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import ops
from .groups import Partition, flat_rows

Tensors = tuple[Tensor, ...]


def over_features(value: Tensor, like: Tensor) -> Tensor:
    """[B] viewed so that it broadcasts over [B, *features]."""
    return value.view(-1, *[1] * (like.dim() - 1)) if value.dim() == 1 else value


@dataclass(frozen=True)
class Penalty(ABC):
    """η·Ω with the strength still absolute or relative.

    Args:
        eta: per tensor, state dtype [B] or (L1) [1 or B, *features]; η, or with ``relative`` the ratio η/η_max.
        relative: see ``eta``. :meth:`resolve` makes it absolute.
    """

    eta: Tensors
    relative: bool = False

    @abstractmethod
    def value(self, displacement: Tensors) -> Tensor:
        """η·Ω(δ), float64 [B]."""

    @abstractmethod
    def prox(self, v: Tensors, step: Tensor | None = None) -> Tensors:
        """argmin_u ‖u − v‖²/2 + step·η·Ω(u), with ``step`` [B] (1 if None)."""

    @abstractmethod
    def eta_max(self, gradient: Tensors) -> Tensor:
        """The least η for which δ* = 0, from p(0): [B]."""

    def partition(self, tensor: int) -> Partition | None:
        """The groups of one tensor, where there are groups."""
        return None

    def resolve(self, gradient: Tensors) -> tuple[Penalty, Tensors]:
        """The penalty with an absolute η from p(0), and the η to report.

        At a ratio ≥ 1 the answer is zero by definition: the threshold used is infinite, since rounding of η_max and of
        the norms it is compared with would leave specks.
        """
        if not self.relative:
            return self, self.eta
        limit = self.eta_max(gradient)
        reported = tuple(r * over_features(limit.to(r.dtype), r) for r in self.eta)  # the tensors of a tuple may differ
        used = tuple(e.masked_fill(r >= 1, float("inf")) for r, e in zip(self.eta, reported, strict=True))
        return replace(self, eta=used, relative=False), reported

    def take(self, index: Tensor) -> Penalty:
        """The penalty of some of the inputs."""
        return replace(self, eta=self._eta_of(index))

    def _eta_of(self, index: Tensor) -> Tensors:
        return tuple(e if e.shape[0] == 1 and e.dim() > 1 else e[index] for e in self.eta)


@dataclass(frozen=True)
class L1(Penalty):
    """η‖δ‖₁, or Σ_i η_i|δ_i| with one η per feature. Prox: soft-thresholding; η_max = ‖p(0)‖_∞.

    Example:
        >>> import torch
        >>> from moreau_ext.penalties import L1
        >>> L1((torch.tensor([1.0]),)).prox((torch.tensor([[3.0, -0.5]]),))[0]
        tensor([[2., 0.]])
    """

    def value(self, displacement: Tensors) -> Tensor:
        parts = [
            flat_rows(torch.where(d == 0, 0, d.abs() * over_features(e, d)).double()).sum(1)  # where η is infinite too
            for d, e in zip(displacement, self.eta, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def prox(self, v: Tensors, step: Tensor | None = None) -> Tensors:
        return tuple(
            ops.shrink(u, e if step is None else e * over_features(step, e)) for u, e in zip(v, self.eta, strict=True)
        )

    def eta_max(self, gradient: Tensors) -> Tensor:
        return torch.stack([flat_rows(g).abs().amax(1) for g in gradient]).amax(0)


@dataclass(frozen=True)
class GroupL2(Penalty):
    """η Σ_g w_g‖δ_g‖₂. Prox: δ_g·max(1 − η·w_g/‖δ_g‖, 0); η_max = max_g ‖p_g(0)‖/w_g.

    Args:
        groups: a partition per tensor, in its memory order.
    """

    groups: tuple[Partition, ...] = ()

    def value(self, displacement: Tensors) -> Tensor:
        parts = [
            (ops.group_norms(d, g).double() * g.weights).sum(1) for d, g in zip(displacement, self.groups, strict=True)
        ]
        omega = torch.stack(parts).sum(0)
        return torch.where(omega == 0, 0.0, self.eta[0].double() * omega)

    def prox(self, v: Tensors, step: Tensor | None = None) -> Tensors:
        return tuple(
            ops.shrink(u, e if step is None else e * step, g) for u, e, g in zip(v, self.eta, self.groups, strict=True)
        )

    def eta_max(self, gradient: Tensors) -> Tensor:
        return torch.stack(
            [
                (ops.group_norms(p, g) / g.weights).amax(1).to(p.dtype)
                for p, g in zip(gradient, self.groups, strict=True)
            ]
        ).amax(0)

    def partition(self, tensor: int) -> Partition | None:
        return self.groups[tensor]

    def take(self, index: Tensor) -> Penalty:
        return replace(self, eta=self._eta_of(index), groups=tuple(g.take(index) for g in self.groups))
