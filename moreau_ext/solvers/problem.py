"""The problem: minimise f_σ(x+δ) + ‖δ‖²/(2ρ) + η·Ω(δ) over δ, for a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..model.passes import PassRunner
from ..model.score import Score
from ..ops.layout import Tensors, copy_into, flat_rows, inner, over_features, take
from .penalties import NoPenalty, Penalty

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
        count: features, or groups, that may be in the map, where there is a ``support``; int64.
        radius: ‖δ*‖₂, float64, in units of the inputs.
    """

    support: Tensor | None = None
    count: Tensor | None = None
    radius: Tensor | None = None


@dataclass(frozen=True)
class Start:
    """Where a solver begins, if not at δ = 0.

    Args:
        displacement: per tensor, state dtype.
        gradient2: ‖p(0)‖², float64 [B], which a first step from 0 would have shown.
    """

    displacement: Tensors
    gradient2: Tensor


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
        penalty: η·Ω.
        tuning: what η and ρ follow, or None where they are as given.
        start: where to begin, or None for δ = 0; then the penalty is absolute.
        passes: runs the passes of the model; owned by the call.
    """

    inputs: Tensors
    score: Score
    value: Tensor
    ids: Tensor
    keys: Tensor
    sigma: Tensors
    rho: Tensors
    penalty: Penalty = field(default_factory=NoPenalty)
    tuning: Tuning | None = None
    start: Start | None = None
    passes: PassRunner = field(default_factory=PassRunner, compare=False, repr=False)

    def take(self, index: Tensor) -> Problem:
        """The problem of some of the inputs."""
        own: dict[str, Any] = {
            "score": self.score.take(index),
            "penalty": self.penalty.take(index),
            "passes": self.passes,
        }
        rest = {f.name: take(getattr(self, f.name), index) for f in fields(self) if f.name not in own}
        return replace(self, **own, **rest)

    @property
    def batch(self) -> int:
        """B."""
        return self.keys.shape[0]

    @property
    def features(self) -> int:
        """Features of an input, of all its tensors."""
        return sum(math.prod(x.shape[1:]) for x in self.inputs)

    @property
    def free(self) -> Tensor:
        """Features of each input that may move, of each of its tensors; int64 [B, tensors]."""
        counts = torch.stack([self.keys.new_full((self.batch,), math.prod(x.shape[1:])) for x in self.inputs], dim=1)
        if self.score.fixed is None:
            return counts
        fixed = [flat_rows(mask).sum(1).expand(self.batch) for mask in self.score.fixed.of_rows]
        return counts - torch.stack(fixed, dim=1)

    @property
    def free_values(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The inputs for minima and for maxima, [B, features] per tensor: fixed features are +∞ in the first and −∞ in
        the second."""
        for i, x in enumerate(self.inputs):
            flat = flat_rows(x)
            if self.score.fixed is None:
                yield flat, flat
            else:
                mask = flat_rows(self.score.fixed.of_rows[i])
                yield flat.masked_fill(mask, math.inf), flat.masked_fill(mask, -math.inf)

    @property
    def rho_of_input(self) -> Tensor:
        """ρ, float64 [B]."""
        return torch.stack([r.double() for r in self.rho]).amax(0)

    def image(self, gradient: Tensors) -> tuple[Tensors, Tensors]:
        """(A, y) of a mean gradient p: the map A = S_η(p) and the KKT image y = −ρ·A, which is δ* where p is p(δ*)."""
        maps = self.penalty.prox(gradient)
        return maps, tuple(-over_features(r, a) * a for a, r in zip(maps, self.rho, strict=True))

    def denoised(self, gradient: Tensors, variance: Tensors) -> tuple[Problem, Tensors, Tensors]:
        """The problem that is answered, with its η and ρ, and (A, y) of a mean gradient without its sampling noise.

        Noise adds to magnitudes, E‖p̄_g‖² = ‖p_g‖² + Σ V_j: it lifts features and groups over the threshold, and makes
        the map longer. So magnitudes are taken without it, and directions shrunk, see :meth:`Penalty.denoised`. Both
        fade out as V does.

        Args:
            gradient: p̄.
            variance: V, of this mean.
        """
        u, after = self.penalty.denoised(gradient, variance)
        tuned = self.tuned(u)
        maps = tuple([c * a for c, a in zip(after, tuned.penalty.prox(u), strict=True)])
        tuned = tuned.of_radius(maps)
        return tuned, maps, tuple([-over_features(r, a) * a for a, r in zip(maps, tuned.rho, strict=True)])

    def of_radius(self, maps: Tensors) -> Problem:
        """The problem with the ρ for which a map's displacement has the length that was asked for, if one was."""
        if self.tuning is None or self.tuning.radius is None:
            return self
        length = inner(maps, maps).sqrt()
        # A map of zeros cannot be made longer: it keeps the rho it has.
        rho = [torch.where(length > 0, self.tuning.radius / length.clamp_min(_TINY), r).to(r.dtype) for r in self.rho]
        return replace(self, rho=tuple(rho))

    def objective(self, displacement: Tensors, score: Tensor) -> Tensor:
        """H = f_σ(x+δ) + ‖δ‖²/(2ρ) + η·Ω(δ), float64 [B], given f_σ(x+δ)."""
        pull = [
            flat_rows(d).double().square().sum(1) / (2 * r.double())
            for d, r in zip(displacement, self.rho, strict=True)
        ]
        return score + torch.stack(pull).sum(0) + self.penalty.value(displacement)

    def residual_floor(self, gradient2: Tensor) -> Tensor:
        """10⁻³·ρ·‖p(0)‖, float64 [B], from ‖p(0)‖²: the least denominator of a relative residual."""
        return _FLOOR * self.rho_of_input * gradient2.sqrt()

    def tuned(self, gradient: Tensors) -> Problem:
        """The problem with the η and ρ that follow from p, where they follow anything."""
        if self.tuning is None:
            return self
        problem, penalty = self, self.penalty
        if self.tuning.support is not None:
            eta = penalty.threshold(gradient, self.tuning.support, self.tuning.count)
            penalty = replace(penalty, eta=tuple([eta.to(r.dtype) for r in self.rho]))
            problem = replace(problem, penalty=penalty)
        return problem.of_radius(penalty.prox(gradient)) if self.tuning.radius is not None else problem

    def retune(self, gradient: Tensors) -> None:
        """The same in place, for a problem whose η and ρ belong to the solver."""
        tuned = self.tuned(gradient)
        copy_into(self.rho, tuned.rho)
        if self.tuning is not None and self.tuning.support is not None:
            copy_into(self.penalty.eta, tuned.penalty.eta)

    def own_settings(self) -> Problem:
        """The problem with copies of the η and ρ that :meth:`retune` writes."""
        if self.tuning is None:
            return self
        eta = tuple([e.clone() for e in self.penalty.eta])
        return replace(self, rho=tuple([r.clone() for r in self.rho]), penalty=replace(self.penalty, eta=eta))


def relative_residual(residual: Tensor, squares: tuple[Tensor, ...], floor: Tensor) -> Tensor:
    """residual / max(norms, floor), given the norms' squares; 0/0 is a score that is flat here, solved by δ = 0."""
    denominator = torch.maximum(torch.stack(squares).amax(0).sqrt(), floor)
    return torch.where(residual == 0, 0.0, residual / denominator)
