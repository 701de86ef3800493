"""The gradient baselines, with the call of the explainers, so that they can stand beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import ops
from .._checks import check_count
from ..capture.runner import Runner
from ..ops.layout import Tensors, flat_rows
from ..solvers.errors import Errors
from ..solvers.fixed import ProximalGradient
from ..solvers.loop import check_finite, in_groups, solve
from ..solvers.problem import Problem
from ..solvers.samples import NoisyCopies
from ..solvers.solution import Answer, Solution, assemble
from .base import Explainer
from .noisy import Noisy
from .sparse import Sparse


def at_zero(solution: Solution) -> Solution:
    """What a baseline's Solution describes is the point δ = 0: the displacement is zero, the envelope f_σ(x), the
    residual NaN, and nothing is converged, since nothing is solved."""
    nan, error = torch.full_like(solution.residual, math.nan), solution.error
    return replace(
        solution,
        displacement=tuple(torch.zeros_like(d) for d in solution.displacement),
        residual=nan,
        relative_residual=nan,
        converged=torch.zeros_like(solution.converged),
        error=replace(error, settling=torch.zeros_like(error.total), total=error.sampling),
    )


def unsolved(
    problem: Problem, maps: Tensors, evaluations: int, gradient: Tensors | None = None, value: Tensor | None = None
) -> Solution:
    """The Solution of maps that no problem has for its answer.

    Args:
        problem: the inputs.
        maps: in the state dtype.
        evaluations: gradients per input.
        gradient: p(0), where it is known; NaN otherwise.
        value: f_σ(x), float64 [B], where it is known; NaN otherwise.
    """
    nan = torch.full_like(problem.value, math.nan, dtype=torch.float64)
    answer = Answer(
        rho=problem.rho,
        eta=(),
        maps=maps,
        displacement=maps,
        gradient=tuple(torch.full_like(a, math.nan) for a in maps) if gradient is None else gradient,
        envelope=nan if value is None else value,
        residual=nan,
        relative_residual=nan,
        evaluations=torch.full_like(problem.keys, evaluations),
        variance=tuple([torch.full_like(a, math.nan) for a in maps]),
        freedom=nan,
        dependence=nan,
        error=Errors.unknown(nan),
    )
    return at_zero(assemble(problem, answer, steps=1, tol=0.0))


def _one_step(problem: Problem, num_samples: int, antithetic: bool) -> Solution:
    """The first step of a solver is an averaged gradient, shrunk where there is a penalty."""
    solver = ProximalGradient(num_samples=num_samples, max_steps=1, antithetic=antithetic, average_last=1, tol=0.0)
    return at_zero(solve(problem, solver, Runner()))


@dataclass(frozen=True, eq=False, repr=False)
class Gradient(Explainer):
    """The plain gradient, A(x) = ∇f(x).

    Args:
        model, score, max_batch, unused_inputs, precision, output_fn, layer: see :class:`MoreauGrad`.

    Example:
        >>> import torch
        >>> from moreau_ext import Gradient
        >>> Gradient(lambda x: x.square().sum(1)).attribute(torch.tensor([[1.0, 2.0]]))
        tensor([[2., 4.]])

    Source: Simonyan et al., arXiv 1312.6034 (signed, without the maximum over channels).
    """

    def _solve(self, problem: Problem) -> Solution:
        return _one_step(problem, 1, False)


@dataclass(frozen=True, eq=False, repr=False)
class SmoothGrad(Noisy):
    """The mean gradient over noisy copies, A(x) = (1/m) Σ_i ∇f(x + σz_i).

    Args:
        model, noise_level, sigma, seed, score, max_batch, unused_inputs, precision, output_fn, layer: see
            :class:`MoreauGrad`.
        num_samples: m; the default costs about as much as MoreauGrad does on small networks.
        antithetic: samples in pairs z, −z.

    The noise is the bank of step 0, so MoreauGrad with one step of size ρ gives the same map.

    Example:
        >>> import torch
        >>> from moreau_ext import SmoothGrad
        >>> f = SmoothGrad(lambda x: x.square().sum(1), num_samples=2, antithetic=True)
        >>> f.attribute(torch.tensor([[1.0, 2.0]]))
        tensor([[2., 4.]])

    Source: Smilkov et al., arXiv 1706.03825.
    """

    num_samples: int = field(default=480, kw_only=True)
    antithetic: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_samples", self.num_samples)

    def _solve(self, problem: Problem) -> Solution:
        return _one_step(problem, self.num_samples, self.antithetic)


@dataclass(frozen=True, eq=False, repr=False)
class SoftThresholdedSmoothGrad(Sparse, SmoothGrad):
    """SmoothGrad, soft-thresholded: A(x) = S_η(mean gradient), the cheapest sparse rival: one step of SparseMoreauGrad.

    Args:
        model, noise_level, sigma, num_samples, antithetic, seed, score, max_batch, unused_inputs, precision, output_fn,
            layer: see :class:`SmoothGrad`.
        eta, eta_ratio, support: see :class:`SparseMoreauGrad`.

    Example:
        >>> import torch
        >>> from moreau_ext import SoftThresholdedSmoothGrad
        >>> f = SoftThresholdedSmoothGrad(lambda x: (x * torch.tensor([3.0, 0.1])).sum(1), eta=1.0, num_samples=2)
        >>> f.attribute(torch.ones(1, 2))
        tensor([[2., 0.]])
    """


@dataclass(frozen=True, eq=False, repr=False)
class SparsifiedSmoothGrad(Noisy):
    """The mean over noisy copies of sparsified gradients, A(x) = (1/m) Σ_i τ(|∇f(x + σz_i)|).

    τ keeps the ⌈keep·d⌉ largest entries, clips them at the ⌈clip·d⌉-th largest, and divides by it. So the map is
    non-negative, in [0, 1], and says nothing about sign or size.

    Args:
        model, noise_level, sigma, seed, score, max_batch, unused_inputs, precision, output_fn, layer: see
            :class:`MoreauGrad`.
        num_samples: m; 256 in the paper's comparison.
        keep: fraction of features kept per sample.
        clip: fraction of features that are clipped.

    Example:
        >>> import torch
        >>> from moreau_ext import SparsifiedSmoothGrad
        >>> f = SparsifiedSmoothGrad(lambda x: (x * torch.tensor([3.0, 0.1])).sum(1), keep=0.5, num_samples=2)
        >>> f.attribute(torch.ones(1, 2))
        tensor([[1., 0.]])

    Source: Levine, Singla, Feizi, arXiv 1905.12105; settings of arXiv 2302.05294.
    """

    num_samples: int = field(default=256, kw_only=True)
    keep: float = field(default=0.1, kw_only=True)
    clip: float = field(default=0.01, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_samples", self.num_samples)
        if not 0 < self.clip <= self.keep <= 1:
            raise ValueError(f"keep, clip: expected 0 < clip <= keep <= 1, got keep={self.keep!r}, clip={self.clip!r}")

    def _solve(self, problem: Problem) -> Solution:
        return in_groups(problem, self.num_samples, self._some)

    def _some(self, problem: Problem) -> Solution:
        batch = problem.keys.shape[0]
        copies = NoisyCopies(problem, self.num_samples, False)
        shapes = [x.shape[1:] for x in problem.inputs]
        sizes = [math.prod(shape) for shape in shapes]
        features, free = sum(sizes), problem.free.sum(1).clamp_min(1).double()
        keep, clip = (self.keep * free).ceil().long(), (self.clip * free).ceil().long()
        state = ops.state_dtype(problem.inputs[0].dtype)
        value = torch.zeros(batch, dtype=torch.float64, device=problem.keys.device)
        mean = torch.zeros(batch, features, dtype=state, device=problem.keys.device)
        p = torch.zeros_like(mean)
        for chunk in range(len(copies.chunks)):
            scores, gradients = copies.gradient(chunk, copies.draw(chunk, None))
            flat = torch.cat([flat_rows(g).to(state) for g in gradients], dim=1)
            largest = flat.abs().view(batch, -1).amax(1, keepdim=True)
            check_finite(largest, scores.sum(1), problem.ids, torch.ones_like(problem.keys))
            each = flat.shape[0] // batch
            top, where = flat.abs().topk(int(keep.max()), dim=1)
            level = top.gather(1, clip.repeat_interleave(each)[:, None] - 1)
            kept = torch.arange(top.shape[1], device=top.device) < keep.repeat_interleave(each)[:, None]
            scaled = torch.where(kept & (level > 0), top.minimum(level) / level, 0.0)
            sparse = torch.zeros_like(flat).scatter_(1, where, scaled)
            value += scores.sum(1, dtype=torch.float64)
            mean += sparse.view(batch, -1, features).sum(1)
            p += flat.view(batch, -1, features).sum(1)

        def tensors(flat: Tensor) -> Tensors:
            pieces = torch.split(flat, sizes, dim=1)
            return tuple(t.reshape(batch, *shape) for t, shape in zip(pieces, shapes, strict=True))

        n = self.num_samples
        return unsolved(problem, tensors(mean / n), n, gradient=tensors(p / n), value=value / n)
