"""The bound of the residual, from averages over steps."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.layout import Tensors, flat_rows, over_features
from .problem import Problem, residual_floor

# gamma = 0.7/(1/rho + L): the largest curvature met is a lower bound of the largest there is.
DAMPING = 0.7

# Over points that wander the gradient is not linear, so its mean there is not the gradient at their mean. On digits the
# residual this leaves was 0.3 to 1 times the radius of the points.
_ALLOWANCE = 0.5

# Where in ops.SUMS begin those of all squared differences, and those of a window.
DIFFERENCES, LENGTHS = ops.SUMS.index("differences"), ops.SUMS.index("lengths")

# One-sided 95 % of a normal.
_QUANTILE = 1.645


def _sums(tensors: Tensors) -> Tensor:
    """Sum over all features of all tensors, float64 [B]."""
    return torch.stack([flat_rows(t).sum(1, dtype=torch.float64) for t in tensors]).sum(0)


def inner(a: Tensors, b: Tensors) -> Tensor:
    return _sums(tuple(u.double() * v.double() for u, v in zip(a, b, strict=True)))


def minus(a: Tensors, b: Tensors) -> Tensors:
    return tuple(u - v for u, v in zip(a, b, strict=True))


@dataclass
class Window:
    """Sums over some successive steps, weighted by their samples."""

    points: Tensors
    gradients: Tensors
    counts: Tensor  # float64 [B, 3], the last of ops.SUMS: of ‖point‖², of 1, and how many steps

    @property
    def lengths(self) -> Tensor:
        return self.counts[:, 0]

    @property
    def weight(self) -> Tensor:
        return self.counts[:, 1]

    @property
    def steps(self) -> Tensor:
        return self.counts[:, 2]

    def __add__(self, other: Window) -> Window:
        """Over the steps of both."""

        def sums(a: Tensors, b: Tensors) -> Tensors:
            return tuple(u + v for u, v in zip(a, b, strict=True))

        return Window(
            sums(self.points, other.points), sums(self.gradients, other.gradients), self.counts + other.counts
        )


@dataclass
class Answer:
    """What the averages of a window say. settled, spread, noise: the parts of the residual's square; float64 [B]."""

    point: Tensors
    gradient: Tensors
    maps: Tensors
    displacement: Tensors
    rho: Tensors
    eta: Tensors  # empty without a penalty
    settled: Tensor
    spread: Tensor
    noise: Tensor
    most_noise: Tensor  # what noise is with a probability of 95 %
    size: Tensor  # what the residual is compared with

    @property
    def bound(self) -> Tensor:
        """Of the relative residual."""
        upper = (self.settled + self.spread + self.most_noise).sqrt()
        return torch.where(upper == 0, 0.0, upper / self.size)

    def or_better(self, other: Answer) -> Answer:
        """For each input this answer, or the other where its bound is smaller."""
        mine = self.bound <= other.bound

        def pick(a: Any, b: Any) -> Any:
            if isinstance(a, tuple):
                return tuple(pick(u, v) for u, v in zip(a, b, strict=True))
            # An eta that serves all inputs has one row, and no tuning: it is the same in both.
            return a if a.shape[0] != mine.shape[0] else torch.where(mine.view(-1, *[1] * (a.dim() - 1)), a, b)

        return Answer(**{f.name: pick(getattr(self, f.name), getattr(other, f.name)) for f in fields(Answer)})

    def problem(self, problem: Problem) -> Problem:
        """The problem that this answers."""
        if problem.tuning is None:
            return problem
        penalty = None if problem.penalty is None else replace(problem.penalty, eta=self.eta)
        return replace(problem, rho=self.rho, penalty=penalty)


@dataclass
class Seen:
    """What the end of a level is judged by; see :class:`_State`."""

    problem: Problem
    windows: tuple[Window, ...]
    squares: Tensors
    sums: Tensor
    curvature: Tensor
    at_zero: Tensor


def best_answer(seen: Seen) -> Answer:
    """The answer of each input's best window."""
    total = seen.windows[-1]
    best = _judge(seen, total)
    for window in reversed(seen.windows[:-1]):
        total = total + window
        best = best.or_better(_judge(seen, total))
    return best


def _judge(seen: Seen, window: Window) -> Answer:
    p = tuple(g / over_features(window.weight.to(g.dtype), g) for g in window.gradients)
    point = tuple(d / over_features(window.weight.to(d.dtype), d) for d in window.points)
    problem = seen.problem.tuned(p)
    maps = p if problem.penalty is None else problem.penalty.prox(p)
    y = tuple(-over_features(r, a) * a for a, r in zip(maps, problem.rho, strict=True))
    # Variance of rho * S(p̄) per feature.
    gain = tuple(torch.ones_like(a) for a in p) if problem.penalty is None else problem.penalty.gain(p, maps)
    variance = tuple(
        (q * c).double() * over_features(r.double().square() / (seen.sums[:, DIFFERENCES] * window.weight), q)
        for c, q, r in zip(gain, seen.squares, problem.rho, strict=True)
    )
    noise = _sums(variance)
    gap = minus(point, y)
    point2, y2 = inner(point, point), inner(y, y)
    # Noise alone spreads the points by (γ/ρ) times its variance in a step; a gradient is nearly linear over that.
    rho = torch.stack([r.double() for r in problem.rho]).amax(0)
    scatter = DAMPING / (1 + rho * seen.curvature) * noise * window.steps
    return Answer(
        point=point,
        gradient=p,
        maps=maps,
        displacement=y,
        rho=problem.rho,
        eta=() if problem.penalty is None else problem.penalty.eta,
        settled=inner(gap, gap),
        spread=_ALLOWANCE**2 * (window.lengths / window.weight - point2 - scatter).clamp_min(0),
        noise=noise,
        most_noise=_upper(seen, noise, inner(variance, variance)),
        size=torch.maximum(torch.maximum(point2, y2).sqrt(), residual_floor(problem, seen.at_zero)),
    )


def _upper(seen: Seen, noise: Tensor, crossed: Tensor) -> Tensor:
    """The 95 % quantile of ‖ρε̄‖², about noise·χ²_r/r: features that are noisy together count as one.

    r = 2·mean²/variance of the squared norms of the differences, at most what independent features would give. The χ²
    by Wilson and Hilferty; that its scale is only known from the differences widens it as it does an F distribution.
    """
    count, norms, norms2 = seen.sums[:, DIFFERENCES : DIFFERENCES + 3].unbind(1)
    mean = norms / count
    variance = (norms2 - count * mean.square()) / (count - 1)
    tiny = torch.finfo(torch.float64).tiny
    independent = noise.square() / crossed.clamp_min(tiny)
    rank = torch.where(variance > 0, 2 * mean.square() / variance.clamp_min(tiny), independent)
    rank = torch.minimum(rank, independent).clamp_min(1)
    ninth = 2 / (9 * rank)
    quantile = (1 - ninth + _QUANTILE * ninth.sqrt()) ** 3
    # Successive differences share a gradient: three of them tell as much as two.
    freedom = (rank * count / 1.5).clamp_min(4)
    return noise * quantile * freedom / (freedom - 2)
