"""Penalties η·Ω(δ): value, proximal map, and the strength at which the map becomes zero.

Small frozen records over a tuple of tensors [B, *features]; one η per input, shared by its tensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..ops.layout import Tensors, flat_rows, in_memory_order, inner, over_features, total
from ..ops.partition import Partition
from .errors import normal_of_gamma, normal_of_student, upper_tail


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

    def eta_max(self, gradient: Tensors) -> Tensor:
        """The least η for which δ* = 0, from p(0): [B]."""
        return self.magnitudes(gradient).amax(1)

    def count(self, free: Tensor) -> Tensor:
        """How much may be in the map of every input: its free features, or their groups; int64 [B].

        Args:
            free: features of each tensor, int64 [B, tensors].
        """
        return free.sum(1)

    @abstractmethod
    def gain(self, gradient: Tensors, maps: Tensors, variance: Tensors) -> Tensors:
        """The share of the noise of p that S_η lets through, shaped as p.

        Independent noise of variance V_j in p becomes about Σ_j V_j·gain_j in ‖S_η(p)‖².

        On the support it is (J²)_jj of J = ∂S_η/∂p. Off it, the expected square of what noise lifts over the threshold:
        (1 + z²)Φ(−z) − zφ(z) for a magnitude z standard deviations below it.

        Args:
            gradient: p.
            maps: S_η(p).
            variance: V, of the mean p.
        """

    @abstractmethod
    def p_values(self, gradient: Tensors, variance: Tensors, freedom: Tensor, dependence: Tensor) -> Tensors:
        """P(a mean as large as p̄ | the true magnitude is at the threshold), shaped as p.

        It is small where a feature, or a group, is in the map beyond sampling noise.

        Args:
            gradient: p̄, a mean of samples.
            variance: V, of that mean.
            freedom: float64 [B], the degrees of freedom with which V is known.
            dependence: float64 [B], how many times as many features move together as would if all were independent.
        """

    @abstractmethod
    def denoised(self, gradient: Tensors, variance: Tensors) -> tuple[Tensors, Tensors]:
        """(u, c): a mean gradient with magnitudes that noise does not lift, and what S_η(u) is to be multiplied by.

        Both factors go to 1 as the samples grow.

        Args:
            gradient: p̄, a mean of samples.
            variance: V, of that mean.
        """

    @abstractmethod
    def magnitudes(self, gradient: Tensors) -> Tensor:
        """What η is compared with, of every feature or group of all tensors, [B, count]: it is zero in S_η(p) where its
        magnitude is ≤ η."""

    def threshold(self, gradient: Tensors, support: Tensor, count: Tensor | None = None) -> Tensor:
        """The η [B] for which ``support`` int64 [B] features, or groups, of S_η(p) are not zero.

        It lies in the middle between the magnitudes it separates. Where these are equal (a tie) no η does, and it goes
        to the side of the tie that is nearer to ``support``, above it where both are as near. 0 where all are wanted.

        Args:
            gradient: p, zero in fixed features.
            support: see above.
            count: of the features or groups that may be in the map, int64 [B], see :meth:`count`; all of them by
                default.
        """
        values = self.magnitudes(gradient).sort(dim=1, descending=True).values
        most = values.shape[1]
        count = torch.full_like(support, most)[:, None] if count is None else count[:, None]
        padded = torch.nn.functional.pad(values, (1, 1))  # rank 0 is never reached, rank count + 1 is 0
        padded[:, 0] = 2 * values[:, 0]
        wanted = support[:, None].clamp_min(0).minimum(count)
        # Where one value ends and the next smaller one begins: the only places where η can go. Behind the last one that
        # may be in the map there is always one.
        place = torch.arange(most + 1, device=values.device)
        border = torch.nn.functional.pad(values[:, :-1] > values[:, 1:], (1, 1), value=True) | (place == count)
        distance = (place - wanted).abs().masked_fill(~border | (place > count), most + 1)
        at = distance.argmin(dim=1, keepdim=True)  # the first: the smaller support
        eta = (padded.gather(1, at) + padded.gather(1, at + 1)) / 2
        return torch.where(at < count, eta, 0).squeeze(1)

    def strength(self, tensor: int) -> Tensor | None:
        """η of one tensor; None without a penalty."""
        return self.eta[tensor]

    def partition(self, tensor: int) -> Partition | None:
        """The groups of one tensor, where there are groups."""
        return None

    def resolve(self, gradient: Tensors, variance: Tensors | None = None) -> tuple[Penalty, Tensors]:
        """The penalty with an absolute η from p(0), and the η to report.

        Given the variance of p(0), the noise that lengthens groups is taken out of it first.

        At a ratio ≥ 1 the answer is zero by definition: the threshold used is infinite, since rounding of η_max and of
        the norms it is compared with would leave specks.
        """
        if not self.relative:
            return self, self.eta
        limit = self.eta_max(gradient if variance is None else self.denoised(gradient, variance)[0])
        reported = tuple(r * over_features(limit.to(r.dtype), r) for r in self.eta)  # the tensors of a tuple may differ
        used = tuple(e.masked_fill(r >= 1, float("inf")) for r, e in zip(self.eta, reported, strict=True))
        return replace(self, eta=used, relative=False), reported

    def take(self, index: Tensor) -> Penalty:
        """The penalty of some of the inputs."""
        return replace(self, eta=self._eta_of(index))

    def _eta_of(self, index: Tensor) -> Tensors:
        return tuple(e if e.shape[0] == 1 and e.dim() > 1 else e[index] for e in self.eta)


@dataclass(frozen=True)
class NoPenalty(Penalty):
    """Ω = 0: the identity as proximal map, and every feature in the map."""

    eta: Tensors = ()

    def strength(self, tensor: int) -> Tensor | None:
        return None

    def value(self, displacement: Tensors) -> Tensor:
        return torch.zeros(displacement[0].shape[0], dtype=torch.float64, device=displacement[0].device)

    def prox(self, v: Tensors, step: Tensor | None = None) -> Tensors:
        return v

    def gain(self, gradient: Tensors, maps: Tensors, variance: Tensors) -> Tensors:
        return tuple([torch.ones_like(p) for p in gradient])

    def p_values(self, gradient: Tensors, variance: Tensors, freedom: Tensor, dependence: Tensor) -> Tensors:
        return tuple(
            [
                _two_sided(p, v, torch.zeros((), dtype=p.dtype, device=p.device), freedom)
                for p, v in zip(gradient, variance, strict=True)
            ]
        )

    def denoised(self, gradient: Tensors, variance: Tensors) -> tuple[Tensors, Tensors]:
        return _shrunk(gradient, variance)

    def magnitudes(self, gradient: Tensors) -> Tensor:
        return _absolute(gradient)

    def resolve(self, gradient: Tensors, variance: Tensors | None = None) -> tuple[Penalty, Tensors]:
        return self, ()


def _lifted(gap: Tensor, variance: Tensor) -> Tensor:
    """E(s·ξ − gap)₊²/s² for a standard normal ξ and s² the variance; 0 where there is none, or the gap is infinite."""
    z = gap / variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
    tail = torch.special.ndtr(-z)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    found = ((1 + z.square()) * tail - z * density).clamp(0, 1)
    return torch.where((variance > 0) & (z < 30), found, 0.0)


def _two_sided(p: Tensor, variance: Tensor, eta: Tensor, freedom: Tensor) -> Tensor:
    """P(|p + ε| ≥ |p̄|) for a true |p| = η, by Student's distribution."""
    s, size, freedom = variance.sqrt(), p.abs(), over_features(freedom.to(p.dtype), p)
    least = torch.finfo(p.dtype).tiny
    found = torch.where(size <= eta, 1.0, 0.0)
    for sign in (-1, 1):
        tail = upper_tail(normal_of_student((size + sign * eta) / s.clamp_min(least), freedom))
        found = torch.where(s > 0, tail if sign < 0 else found + tail, found)
    # An unknown variance leaves it unknown: 0·NaN is NaN.
    return found.clamp_max_(1.0).add_(0 * s)


def _shrunk(gradient: Tensors, variance: Tensors) -> tuple[Tensors, Tensors]:
    """p̄ as it is, and the factor 1 − Σ V/‖p̄‖² of James and Stein over all features of all tensors, at least 0.

    It multiplies the map, not p̄: entries far above the threshold hold less noise than the mean one.
    """
    square, noise = inner(gradient, gradient), total(variance)
    factor = torch.where(square > 0, 1 - noise / square.clamp_min(torch.finfo(torch.float64).tiny), 1.0).clamp_min(0)
    return gradient, tuple([over_features(factor.to(p.dtype), p) for p in gradient])


def _absolute(tensors: Tensors) -> Tensor:
    return torch.cat([flat_rows(t).abs() for t in tensors], dim=1)


@dataclass(frozen=True)
class L1(Penalty):
    """η‖δ‖₁, or Σ_i η_i|δ_i| with one η per feature. Prox: soft-thresholding; η_max = ‖p(0)‖_∞.

    Example:
        >>> import torch
        >>> from moreau_ext.solvers.penalties import L1
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

    def gain(self, gradient: Tensors, maps: Tensors, variance: Tensors) -> Tensors:
        return tuple(
            torch.where(a != 0, 1.0, _lifted(over_features(e, p) - p.abs(), v)).to(p.dtype)
            for a, p, e, v in zip(maps, gradient, self.eta, variance, strict=True)
        )

    def p_values(self, gradient: Tensors, variance: Tensors, freedom: Tensor, dependence: Tensor) -> Tensors:
        return tuple(
            [
                _two_sided(p, v, over_features(e, p), freedom)
                for p, v, e in zip(gradient, variance, self.eta, strict=True)
            ]
        )

    def denoised(self, gradient: Tensors, variance: Tensors) -> tuple[Tensors, Tensors]:
        return _shrunk(gradient, variance)

    def magnitudes(self, gradient: Tensors) -> Tensor:
        return _absolute(gradient)


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

    def count(self, free: Tensor) -> Tensor:
        # Groups are numbered from 0 within an input, without gaps.
        found = [(g.labels.amax(1).long() + 1).expand(free.shape[0]) for g in self.groups]
        return (torch.stack(found, dim=1) * (free > 0)).sum(1)

    def gain(self, gradient: Tensors, maps: Tensors, variance: Tensors) -> Tensors:
        # J = φI + (1 − φ)uuᵀ within a group, u = p_g/‖p_g‖ and φ the factor that shrinks it.
        found = []
        for p, a, e, v, groups in zip(gradient, maps, self.eta, variance, self.groups, strict=True):
            flat, out = in_memory_order(p), torch.empty_like(p)
            labels = groups.labels.long().expand(flat.shape[0], -1)
            each = ops.group_norms(p, groups).to(p.dtype)
            norms = each.gather(1, labels)
            on = in_memory_order(a) != 0
            factor2 = torch.where(on, in_memory_order(a) / flat, 0).square()
            radial = torch.where(norms > 0, flat / norms, 0).square()
            # The variance of a group's norm, to first order.
            of_norm = torch.zeros_like(each).scatter_add_(1, labels, radial * in_memory_order(v).to(p.dtype))
            lifted = _lifted(e[:, None] * groups.weights - each, of_norm).to(p.dtype).gather(1, labels)
            in_memory_order(out).copy_(torch.where(on, factor2 + (1 - factor2) * radial, lifted * radial))
            found.append(out)
        return tuple(found)

    def p_values(self, gradient: Tensors, variance: Tensors, freedom: Tensor, dependence: Tensor) -> Tensors:
        found = []
        for p, v, e, groups in zip(gradient, variance, self.eta, self.groups, strict=True):
            labels = groups.labels.long().expand(p.shape[0], -1)
            g, s2 = in_memory_order(p).double(), in_memory_order(v).double()

            def of_group(
                values: Tensor, labels: Tensor = labels, like: Tensor = e, count: int = groups.count
            ) -> Tensor:
                return values.new_zeros(like.shape[0], count).scatter_add_(1, labels, values)

            norm2, noise2, crossed = of_group(g.square()), of_group(s2), of_group(s2.square())
            radial = torch.where(norm2 > 0, of_group(g.square() * s2) / norm2, 0.0)
            limit2 = (e[:, None] * groups.weights).double().square()
            crossed = torch.minimum(crossed * dependence[:, None], noise2.square())
            mean = limit2 + noise2
            # Of ‖p + ε‖², and of the estimate of its mean.
            spread = 2 * crossed + 4 * limit2 * radial + 2 * crossed / freedom[:, None]
            tail = upper_tail(normal_of_gamma(norm2, mean, spread))
            tail = (torch.where(noise2 > 0, tail, (norm2 <= limit2).double()) + 0 * noise2).gather(1, labels)
            out = torch.empty_like(p, dtype=torch.float64)
            in_memory_order(out).copy_(tail)
            found.append(out)
        return tuple(found)

    def denoised(self, gradient: Tensors, variance: Tensors) -> tuple[Tensors, Tensors]:
        lifted, after = [], []
        for p, v, groups in zip(gradient, variance, self.groups, strict=True):
            labels = groups.labels.long().expand(p.shape[0], -1)
            norms = ops.group_norms(p, groups).to(p.dtype)
            noise2 = torch.zeros_like(norms).scatter_add_(1, labels, in_memory_order(v).to(p.dtype))
            kept = torch.where(norms > 0, 1 - noise2 / norms.square(), 1.0).clamp_min(0).sqrt().gather(1, labels)
            factor = torch.empty_like(p)
            in_memory_order(factor).copy_(kept)
            lifted.append(p * factor)
            after.append(factor)
        return tuple(lifted), tuple(after)

    def magnitudes(self, gradient: Tensors) -> Tensor:
        both = [ops.group_norms(p, g).to(p.dtype) / g.weights for p, g in zip(gradient, self.groups, strict=True)]
        return torch.cat(both, dim=1)

    def partition(self, tensor: int) -> Partition | None:
        return self.groups[tensor]

    def take(self, index: Tensor) -> Penalty:
        return replace(self, eta=self._eta_of(index), groups=tuple(g.take(index) for g in self.groups))
