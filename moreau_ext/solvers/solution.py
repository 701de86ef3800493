"""The solution of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..ops.layout import Tensors, flat_rows
from .problem import Problem


@dataclass(frozen=True)
class Solution:
    """What an explanation found. Fields over features have the form of the inputs (a tensor or a tuple of tensors);
    the others hold one number per input, [B].

    Args:
        attribution: the map A = S_η(p) ≈ −δ*/ρ, in the dtype of the inputs; units of a gradient; positive raises the
            score.
        displacement: y = −ρ·A, the answer for δ*, state dtype.
        envelope: H = f_σ(x+δ) + ‖δ‖²/(2ρ) + η·Ω(δ) at the last displacement that was evaluated: the envelope F(x),
            from above, with the error of its m samples. float64.
        envelope_gradient: p, the gradient of the envelope; dense where the map is sparse.
        score: f(x), without noise.
        residual: with ProximalGradient ‖δ − y‖₂ of the last displacement evaluated, the noise of its m samples
            included; with AdaptiveProximalGradient an estimate of the answer's own, noise included. float64.
        relative_residual: with ProximalGradient residual / max(‖δ‖, ‖y‖, 10⁻³·ρ·‖p(0)‖); with AdaptiveProximalGradient
            a 95 % bound of the answer's residual, over the same. float64.
        steps: steps taken.
        gradient_evaluations: gradients of the model that the steps took, with those that ``rho="auto"`` did.
        converged: relative_residual ≤ tol. Never True for the gradient baselines, which solve nothing.
        nnz: non-zero entries of the map.
        support: non-zero features, or groups where there are groups.
        empty: nnz == 0.
        eta: η that was used (absolute), 0 without a penalty; [B], or one per feature.
        rho: ρ that was used.
        sigma: σ that was used, per tensor of a tuple.
    """

    attribution: Any
    displacement: Any
    envelope: Tensor
    envelope_gradient: Any
    score: Tensor
    residual: Tensor
    relative_residual: Tensor
    steps: Tensor
    gradient_evaluations: Tensor
    converged: Tensor
    nnz: Tensor
    support: Tensor
    empty: Tensor
    eta: Any
    rho: Tensor
    sigma: Any

    @staticmethod
    def concatenate(parts: Iterable[Solution]) -> Solution:
        """One solution of many, in their order; every field over features must be a tuple of tensors."""
        parts = list(parts)

        def join(values: list[Any]) -> Any:
            if isinstance(values[0], tuple):
                return tuple(join(list(column)) for column in zip(*values, strict=True))
            return torch.cat(values)

        return Solution(**{f.name: join([getattr(p, f.name) for p in parts]) for f in fields(Solution)})

    def take(self, index: Tensor) -> Solution:
        """The solution of some of the inputs."""

        def pick(value: Any) -> Any:
            return tuple(pick(v) for v in value) if isinstance(value, tuple) else value[index]

        return Solution(**{f.name: pick(getattr(self, f.name)) for f in fields(Solution)})


def assemble(
    problem: Problem,
    *,
    eta: Tensors | None,
    maps: Tensors,
    displacement: Tensors,
    gradient: Tensors,
    envelope: Tensor,
    residual: Tensor,
    relative_residual: Tensor,
    steps: int | Tensor,
    evaluations: int,
    tol: float,
) -> Solution:
    """The Solution of what a solver found, with what follows from it."""
    attribution = tuple(a.to(x.dtype) for a, x in zip(maps, problem.inputs, strict=True))
    nnz = torch.stack([flat_rows(a != 0).sum(1) for a in attribution]).sum(0)
    ones = torch.ones_like(nnz)
    none = tuple(torch.zeros_like(r) for r in problem.rho)
    return Solution(
        attribution=attribution,
        displacement=displacement,
        envelope=envelope,
        envelope_gradient=gradient,
        score=problem.value,
        residual=residual,
        relative_residual=relative_residual,
        steps=ones * steps,
        gradient_evaluations=ones * evaluations,
        converged=relative_residual <= tol,
        nnz=nnz,
        support=nnz if problem.penalty is None else (problem.penalty.magnitudes(maps) > 0).sum(1),
        empty=nnz == 0,
        eta=none if eta is None else tuple(rows_of(e, nnz.shape[0]) for e in eta),
        rho=problem.rho[0],
        sigma=problem.sigma,
    )


def in_order(parts: list[tuple[Tensor, Solution]]) -> Solution:
    """Solutions of inputs that were done at different times, by their place in the batch."""
    whole = Solution.concatenate(solution for _, solution in parts)
    return whole.take(torch.cat([where for where, _ in parts]).argsort())


def rows_of(eta: Tensor, batch: int) -> Tensor:
    """One eta per input, also where a row of them serves all."""
    return eta.expand(batch, *eta.shape[1:]) if eta.dim() > 1 else eta
