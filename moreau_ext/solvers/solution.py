"""The solution of a batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.layout import Tensors, flat_rows, join, take
from .problem import Problem


@dataclass(frozen=True)
class Solution:
    """The result of an explanation. Fields over features have the form of the inputs (a tensor or a tuple of tensors);
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
        gradient_evaluations: gradients of the model per input: of the steps, of η_max, of the estimates, and of
            ``rho="auto"``; retried passes do not count.
        converged: relative_residual ≤ tol. Never True for the gradient baselines, which solve nothing.
        nnz: non-zero entries of the map.
        support: non-zero features, or groups where there are groups.
        empty: nnz == 0.
        eta: η that was used (absolute), 0 without a penalty; [B], or one per feature.
        rho: ρ that was used.
        sigma: σ that was used, per tensor of a tuple.
        target: what was explained, int64 [B, k], k indices into the axes of the output behind the batch; None for a
            callable target, and for a model with one output per input.
        ids: int64 [B], the names of the inputs to the noise bank.
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
    target: Tensor | None
    ids: Tensor

    @staticmethod
    def concatenate(parts: Iterable[Solution]) -> Solution:
        """One solution of many, in their order."""
        whole: Solution = join(list(parts))
        return whole

    def take(self, index: Tensor) -> Solution:
        """The solution of some of the inputs."""
        return replace(self, **{f.name: take(getattr(self, f.name), index) for f in fields(self)})


@dataclass
class Answer:
    """An answer to a problem, per input.

    Args:
        rho, eta: of the problem that is answered, per tensor; η as reported, () without a penalty.
        maps: A = S_η(p), state dtype.
        displacement: the answer for δ*.
        gradient: p.
        envelope: H, float64 [B].
        residual, relative_residual: float64 [B].
    """

    rho: Tensors
    eta: Tensors
    maps: Tensors
    displacement: Tensors
    gradient: Tensors
    envelope: Tensor
    residual: Tensor
    relative_residual: Tensor


def assemble(problem: Problem, answer: Answer, *, steps: int | Tensor, evaluations: int, tol: float) -> Solution:
    """The Solution of an answer, with what follows from it."""
    attribution = tuple([a.to(x.dtype) for a, x in zip(answer.maps, problem.inputs, strict=True)])
    nnz = torch.stack([flat_rows(a != 0).sum(1) for a in attribution]).sum(0)
    ones = torch.ones_like(nnz)
    eta = answer.eta or tuple([torch.zeros_like(r) for r in answer.rho])
    return Solution(
        attribution=attribution,
        displacement=answer.displacement,
        envelope=answer.envelope,
        envelope_gradient=answer.gradient,
        score=problem.value,
        residual=answer.residual,
        relative_residual=answer.relative_residual,
        steps=ones * steps,
        gradient_evaluations=ones * evaluations,
        converged=answer.relative_residual <= tol,
        nnz=nnz,
        support=(problem.penalty.magnitudes(answer.maps) > 0).sum(1),
        empty=nnz == 0,
        # One eta per input, also where a row of them serves all.
        eta=tuple([e.expand(problem.batch, *e.shape[1:]) if e.dim() > 1 else e for e in eta]),
        rho=answer.rho[0],
        sigma=problem.sigma,
        target=problem.score.target if isinstance(problem.score.target, Tensor) else None,
        ids=problem.ids,
    )


# A Solution is tensors and numbers: torch.load takes it at its default.
torch.serialization.add_safe_globals([Solution])
