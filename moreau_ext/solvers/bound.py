"""The bound of the residual of an answer, from averages over steps. Pure functions of these averages.

Let x_t be the points where gradients were taken, p_t = ∇f_σ(x+x_t) + ε_t the m-sample means, and x̄, p̄ their averages
weighted by samples (Polyak-Ruppert). The answer is y = −ρ S_η(p̄). The square of its residual has three parts:

- bias²: ‖x̄ − y‖², observed: the iteration has not settled yet. It selects the window; the solver then replaces it by
  that of y itself, ρ²‖S_η(p(y)) − S_η(p̄)‖².
- variance: of ρS_η(p̄), by the delta method: Σ_j ρ²·gain_j·V_j/N, V_j the variance of one sample's gradient, N the
  samples averaged, and gain_j what S_η lets through (features that are zero in the map, and most of what turns a group
  without lengthening it, do not contribute). V comes from von Neumann's successive differences, ½E(p_t − p_{t−1})²·m,
  which drift does not bias once the steps are small.
- nonlinearity²: the gradient at x̄ is not the mean of the gradients; half of the radius by which the points spread,
  beyond what noise explains.

The bound puts the 95 % quantile of the variance in place of the variance: a weighted sum of χ² is taken for a scaled χ²
(Welch-Satterthwaite), whose quantile is that of Wilson and Hilferty.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.layout import Tensors, divide, inner, over_features, subtract, total
from .problem import Problem

# Over points that wander the gradient is not linear, so its mean there is not the gradient at their mean. On digits the
# residual this leaves was 0.3 to 1 times the radius of the points.
_ALLOWANCE = 0.5
# gamma = 0.7/(1/rho + L): the largest curvature measured is a lower bound of the largest there is.
DAMPING = 0.7
# Where in ops.SUMS begin those of all squared differences, and those of a window.
DIFFERENCES, LENGTHS = ops.SUMS.index("differences"), ops.SUMS.index("lengths")
# One-sided 95 % of a normal.
_QUANTILE = 1.645
_TINY = torch.finfo(torch.float64).tiny


@dataclass
class Window:
    """Sums over some successive steps, weighted by their samples.

    Args:
        points: Σ m·x_t, state dtype.
        gradients: Σ m·p_t.
        counts: float64 [B, 3], the last of ops.SUMS: Σ m‖x_t‖², Σ m, and the number of steps.
    """

    points: Tensors
    gradients: Tensors
    counts: Tensor

    def __add__(self, other: Window) -> Window:
        """The sums over the steps of both."""
        return Window(
            tuple([a + b for a, b in zip(self.points, other.points, strict=True)]),
            tuple([a + b for a, b in zip(self.gradients, other.gradients, strict=True)]),
            self.counts + other.counts,
        )


@dataclass
class Averages:
    """The averages of a level.

    Args:
        problem: with the η and ρ of the steps.
        windows: the steps with fresh noise, oldest first.
        squares: Σ m/2·(p_t − p_{t−1})², per feature.
        sums: float64 [B, 8], see ops.SUMS.
        curvature: float64 [B], the largest measured.
        at_zero: float64 [B], ‖p(0)‖².
    """

    problem: Problem
    windows: tuple[Window, ...]
    squares: Tensors
    sums: Tensor
    curvature: Tensor
    at_zero: Tensor


@dataclass
class Estimate:
    """An answer and the parts of its squared residual; float64 [B].

    Args:
        point: x̄.
        gradient, maps, displacement: p̄, S_η(p̄) and y = −ρS_η(p̄).
        rho, eta: of the problem that is answered; eta is () without a penalty.
        bias2, nonlinearity2, variance: the parts.
        variance_upper: the 95 % quantile of the squared noise whose mean is ``variance``.
        scale: what the residual is compared with, max(‖y‖, 10⁻³ρ‖p(0)‖).
        samples: N, of the window.
        way2: ‖x̄ − y‖².
        reach2: the larger of it and the squared radius of the points about x̄.
    """

    point: Tensors
    gradient: Tensors
    maps: Tensors
    displacement: Tensors
    rho: Tensors
    eta: Tensors
    bias2: Tensor
    nonlinearity2: Tensor
    variance: Tensor
    variance_upper: Tensor
    scale: Tensor
    samples: Tensor
    way2: Tensor
    reach2: Tensor

    @property
    def residual(self) -> Tensor:
        """The root of the sum of the parts."""
        return (self.bias2 + self.nonlinearity2 + self.variance).sqrt()

    @property
    def bound(self) -> Tensor:
        """The one-sided 95 % bound of the relative residual."""
        upper = (self.bias2 + self.nonlinearity2 + self.variance_upper).sqrt()
        return torch.where(upper == 0, 0.0, upper / self.scale)

    def or_better(self, other: Estimate) -> Estimate:
        """For each input this estimate, or the other where its bound is smaller."""
        mine = self.bound <= other.bound

        def pick(a: Any, b: Any) -> Any:
            if isinstance(a, tuple):
                return tuple([pick(u, v) for u, v in zip(a, b, strict=True)])
            # An eta that serves all inputs has one row, and no tuning: it is the same in both.
            return a if a.shape[0] != mine.shape[0] else torch.where(mine.view(-1, *[1] * (a.dim() - 1)), a, b)

        return replace(self, **{f.name: pick(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    def problem(self, problem: Problem) -> Problem:
        """The problem that this answers."""
        if problem.tuning is None:
            return problem
        return replace(problem, rho=self.rho, penalty=replace(problem.penalty, eta=self.eta))


def best_estimate(seen: Averages) -> Estimate:
    """The estimate of each input's best window: of the last few steps, as many as give the smallest bound."""
    window = seen.windows[-1]
    best = estimate(seen, window)
    for older in reversed(seen.windows[:-1]):
        window = window + older
        best = best.or_better(estimate(seen, window))
    return best


def estimate(seen: Averages, window: Window) -> Estimate:
    """The answer of one window and the parts of its residual."""
    lengths, weight, steps = window.counts.unbind(1)
    p, point = divide(window.gradients, weight), divide(window.points, weight)
    problem = seen.problem.tuned(p)
    maps, y = problem.image(p)
    variance, variance_upper = sampling_noise(problem, p, maps, seen.squares, seen.sums, weight)
    gap = subtract(point, y)
    gap2, spread2 = inner(gap, gap), (lengths / weight - inner(point, point)).clamp_min(0)
    # Noise alone spreads the points by (γ/ρ) times its variance in a step; a gradient is nearly linear over that.
    scatter = DAMPING / (1 + problem.rho_of_input * seen.curvature) * variance * steps
    return Estimate(
        point=point,
        gradient=p,
        maps=maps,
        displacement=y,
        rho=problem.rho,
        eta=problem.penalty.eta,
        bias2=gap2,
        nonlinearity2=_ALLOWANCE**2 * (spread2 - scatter).clamp_min(0),
        variance=variance,
        variance_upper=variance_upper,
        scale=torch.maximum(inner(y, y).sqrt(), problem.residual_floor(seen.at_zero)),
        samples=weight,
        way2=gap2,
        reach2=torch.maximum(gap2, spread2),
    )


def sampling_noise(
    problem: Problem, gradient: Tensors, maps: Tensors, squares: Tensors, sums: Tensor, samples: Tensor
) -> tuple[Tensor, Tensor]:
    """E‖ρS_η(p + ε) − ρS_η(p)‖² for the mean of so many samples, and its 95 % quantile; float64 [B].

    Args:
        problem: the problem.
        gradient, maps: p and S_η(p).
        squares: Σ m/2·(p_t − p_{t−1})², per feature.
        sums: float64 [B, 8], see ops.SUMS; as in :func:`variance_quantile`.
        samples: float64 [B].
    """
    of_mean = divide(squares, sums[:, DIFFERENCES] * samples)
    per_feature = tuple(
        [
            (v * c).double() * over_features(r.double().square(), v)
            for c, v, r in zip(problem.penalty.gain(gradient, maps, of_mean), of_mean, problem.rho, strict=True)
        ]
    )
    variance = total(per_feature)
    return variance, variance_quantile(sums, variance, inner(per_feature, per_feature))


def variance_quantile(sums: Tensor, variance: Tensor, crossed: Tensor) -> Tensor:
    """The 95 % quantile of ‖ρε̄‖², about variance·χ²_r/r: features that are noisy together count as one.

    r = 2·mean²/variance of the squared norms of the differences (Welch-Satterthwaite), at most what independent
    features would give. The χ² by Wilson and Hilferty; that its scale is only known from the differences widens it as
    it does an F distribution.

    Args:
        sums: float64 [B, 8], see ops.SUMS; the count of the differences, the sum of their squared norms and of the
            squares of these are used.
        variance: float64 [B], the mean of ‖ρε̄‖².
        crossed: float64 [B], the sum of the squares of the features' variances.
    """
    count = sums[:, DIFFERENCES]
    independent = variance.square() / crossed.clamp_min(_TINY)
    rank = torch.minimum(_rank(sums, independent), independent).clamp_min(1)
    ninth = 2 / (9 * rank)
    quantile = (1 - ninth + _QUANTILE * ninth.sqrt()) ** 3
    # Successive differences share a gradient: three carry the information of two.
    freedom = (rank * count / 1.5).clamp_min(4)
    return variance * quantile * freedom / (freedom - 2)


def _rank(sums: Tensor, otherwise: Tensor) -> Tensor:
    """2·mean²/variance of the squared norms of the differences: how many features seem to move by themselves."""
    count, norms, norms2 = sums[:, DIFFERENCES : DIFFERENCES + 3].unbind(1)
    mean = norms / count
    norms_variance = (norms2 - count * mean.square()) / (count - 1)
    return torch.where(norms_variance > 0, 2 * mean.square() / norms_variance.clamp_min(_TINY), otherwise)


def dependence(sums: Tensor, variance: Tensors) -> Tensor:
    """How many times as many features move together as would if all were independent, float64 [B], at least 1."""
    independent = total(variance).square() / inner(variance, variance).clamp_min(_TINY)
    return (independent / _rank(sums, independent).clamp_min(1)).clamp_min(1)
