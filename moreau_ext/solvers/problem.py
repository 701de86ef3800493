"""The problem: minimise f_σ(x+δ) + ‖δ‖²/(2ρ) + η·Ω(δ) over δ, for a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.score import Score
from ..ops.layout import Tensors, flat_rows, squared_norm, take_rows
from .penalties import Penalty

# The floor of the relative residual's denominator, as a fraction of rho*||p(0)||: where the solution is zero, the plain
# ratio would stay at 1 until the last zero is exact.
_FLOOR = 1e-3

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Tuning:
    """Settings that are found while solving, because they were asked for by what they lead to; [B] each, or None.

    At a solution δ* = −ρ·S_η(p), p = p(δ*), so the support of δ* is that of S_η(p), and ‖δ*‖ = ρ‖S_η(p)‖. Hence
    η = ``penalty.threshold(p, support)`` and ρ = radius/‖S_η(p)‖ at the p of the solution, and a solver that sets them
    so whenever it knows p better ends at a problem whose solution has what was asked for.

    Args:
        support: features, or groups, that are not to be zero; int64.
        radius: ‖δ*‖₂, float64, in units of the inputs.
    """

    support: Tensor | None = None
    radius: Tensor | None = None

    def take(self, index: Tensor) -> Tuning:
        """The tuning of some of the inputs."""
        return Tuning(*(None if t is None else t[index] for t in (self.support, self.radius)))


@dataclass(frozen=True)
class Start:
    """Where a solver begins, if not at δ = 0.

    Args:
        displacement: per tensor, state dtype.
        gradient2: ‖p(0)‖², float64 [B], which a first step from 0 would have shown.
    """

    displacement: Tensors
    gradient2: Tensor

    def take(self, index: Tensor) -> Start:
        """The start of some of the inputs."""
        return Start(tuple(take_rows(d, index) for d in self.displacement), self.gradient2[index])


@dataclass(frozen=True)
class Problem:
    """minimise over δ: f_σ(x+δ) + ‖δ‖²/(2ρ) + η·Ω(δ), for a batch.

    Args:
        inputs: x, dense tensors [B, *features] that belong to the solver.
        score: f, bound to the inputs.
        value: f(x), [B].
        ids: int64 [B], the names that errors use.
        keys: int64 [B], the noise bank's keys.
        sigma: σ per tensor, state dtype [B].
        rho: ρ, per tensor, state dtype [B].
        penalty: η·Ω, or None.
        tuning: what η and ρ follow, or None where they are as given.
        start: where to begin, or None for δ = 0; then the penalty is absolute.
    """

    inputs: Tensors
    score: Score
    value: Tensor
    ids: Tensor
    keys: Tensor
    sigma: Tensors
    rho: Tensors
    penalty: Penalty | None
    tuning: Tuning | None = None
    start: Start | None = None

    def take(self, index: Tensor) -> Problem:
        """The problem of some of the inputs."""
        return Problem(
            inputs=tuple(take_rows(x, index) for x in self.inputs),
            score=self.score.take(index),
            value=self.value[index],
            ids=self.ids[index],
            keys=self.keys[index],
            sigma=tuple(s[index] for s in self.sigma),
            rho=tuple(r[index] for r in self.rho),
            penalty=None if self.penalty is None else self.penalty.take(index),
            tuning=None if self.tuning is None else self.tuning.take(index),
            start=None if self.start is None else self.start.take(index),
        )

    def tuned(self, gradient: Tensors) -> Problem:
        """The problem with the η and ρ that follow from p, where they follow anything."""
        if self.tuning is None:
            return self
        problem, penalty = self, self.penalty
        if self.tuning.support is not None and penalty is not None:
            eta = penalty.threshold(gradient, self.tuning.support)
            penalty = replace(penalty, eta=tuple(eta.to(r.dtype) for r in self.rho))
            problem = replace(problem, penalty=penalty)
        if self.tuning.radius is not None:
            maps = gradient if penalty is None else penalty.prox(gradient)
            length = squared_norm(maps).sqrt()
            # A map of zeros cannot be made longer: it keeps the rho it has.
            problem = replace(
                problem,
                rho=tuple(
                    torch.where(length > 0, self.tuning.radius / length.clamp_min(_TINY), r).to(r.dtype)
                    for r in self.rho
                ),
            )
        return problem


def objective(problem: Problem, displacement: Tensors, score: Tensor) -> Tensor:
    """H = f_σ(x+δ) + ‖δ‖²/(2ρ) + η·Ω(δ), float64 [B], given f_σ(x+δ)."""
    pull = [
        flat_rows(d).double().square().sum(1) / (2 * r.double()) for d, r in zip(displacement, problem.rho, strict=True)
    ]
    value = score + torch.stack(pull).sum(0)
    return value if problem.penalty is None else value + problem.penalty.value(displacement)


def relative_residual(residual: Tensor, squares: tuple[Tensor, ...], floor: Tensor) -> Tensor:
    """residual / max(norms, floor), given the norms' squares; 0/0 is a score that is flat here, solved by δ = 0."""
    denominator = torch.maximum(torch.stack(squares).amax(0).sqrt(), floor)
    return torch.where(residual == 0, 0.0, residual / denominator)


def residual_floor(problem: Problem, gradient2: Tensor) -> Tensor:
    """10⁻³·ρ·‖p(0)‖, float64 [B], from ‖p(0)‖²."""
    return _FLOOR * torch.stack([r.double() for r in problem.rho]).amax(0) * gradient2.sqrt()
