"""The derivative of the map by the implicit function theorem: vᵀ·DA(x), without unrolling a solver.

On the support S of a solution, p(x + δ)_S + δ_S/ρ + η∂Ω(δ)_S = 0. Differentiating, with H = ∇²f_σ(x + δ), A = −δ/ρ, and
M the second derivative of ηΩ on S (0 for L1; η·w_g/‖δ_g‖·(I − uuᵀ) for an active group, u = δ_g/‖δ_g‖):

    (I + ρ(H_SS + M))·dA_S = H_S,:·dx + s·dη + (∂p/∂σ)_S·dσ,      s = ∂Ω(δ)_S,      dA = 0 off S.

H and M are symmetric, so for a vector v the adjoint needs one solve, on the support, and one product:

    (I + ρ(H_SS + M))·w = v_S,      vᵀDA = H_:,S·w + (s·w)·∇η + (wᵀ∂p/∂σ)·∇σ.

The last two terms are there where η is a fraction of η_max(x), or σ one of the input's range, and so moves with x.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.layout import Tensors, flat_rows, memory_layout, take
from ..ops.partition import Partition
from ..solvers.penalties import NoPenalty, Penalty
from ..solvers.problem import Problem
from .hessian import Bank, Method, SmoothedHessian, by_method, columns, tensors_of
from .krylov import minimal_residual


@dataclass(frozen=True)
class _Groups:
    """The groups of all tensors of a tuple, in row-major columns: int64 [B, D] numbers, and weights [B, count]."""

    labels: Tensor
    weights: Tensor

    def sums(self, values: Tensor) -> Tensor:
        """Σ over each group, [B, count]."""
        return torch.zeros_like(self.weights).scatter_add_(1, self.labels, values)

    def norms(self, values: Tensor) -> Tensor:
        return self.sums(values.square()).sqrt()

    def spread(self, per_group: Tensor) -> Tensor:
        """[B, D] from [B, count]."""
        return per_group.gather(1, self.labels)


def _row_major(labels: Tensor, x: Tensor) -> Tensor:
    """[n, D] in the memory order of x, in row-major order."""
    layout = memory_layout(x)
    if layout is None or layout[0] == 1:
        return labels
    channels, positions = layout
    return labels.view(-1, positions, channels).transpose(1, 2).reshape(-1, channels * positions)


def _groups(penalty: Penalty, inputs: Tensors) -> _Groups | None:
    labels, weights, count = [], [], 0
    for i, x in enumerate(inputs):
        partition: Partition | None = penalty.partition(i)
        if partition is None:
            return None
        labels.append(_row_major(partition.labels.long(), x).expand(x.shape[0], -1) + count)
        weights.append(partition.weights.double().expand(x.shape[0], -1))
        count += partition.count
    return _Groups(torch.cat(labels, dim=1), torch.cat(weights, dim=1))


class _Support:
    """Where a displacement is not zero, and the derivatives of Ω there; float64 [B, D]."""

    def __init__(self, problem: Problem, displacement: Tensors) -> None:
        penalty = problem.penalty
        delta = columns(displacement, torch.float64)
        self.groups = _groups(penalty, problem.inputs)
        self.mask = torch.ones_like(delta)
        self.slope = torch.zeros_like(delta)  # s = ∂Ω(δ)
        self.stiffness = self.unit = self.slope
        if isinstance(penalty, NoPenalty):
            return
        if self.groups is None:
            self.mask, self.slope = (delta != 0).double(), delta.sign()
            return
        norms = self.groups.norms(delta)
        active = norms > 0
        safe = torch.where(active, norms, 1.0)
        # An infinite η has no active group.
        eta = torch.cat(
            [
                e.double()[:, None].expand(-1, flat_rows(x).shape[1])
                for e, x in zip(penalty.eta, problem.inputs, strict=True)
            ],
            dim=1,
        )
        self.mask = self.groups.spread(active.double())
        self.unit = delta / self.groups.spread(safe)
        weights = self.groups.spread(self.groups.weights)
        self.slope = weights * self.unit
        self.stiffness = torch.where(self.mask > 0, eta * weights / self.groups.spread(safe), 0.0)

    def curvature(self, w: Tensor) -> Tensor:
        """M w."""
        if self.groups is None:
            return torch.zeros_like(w)
        return self.stiffness * (w - self.unit * self.groups.spread(self.groups.sums(self.unit * w)))


def _range_gradient(low: Tensor, high: Tensor, level: Tensor) -> Tensor:
    """∇σ of σ = level·(max x − min x), [B, D]; see :attr:`Problem.free_values`."""
    gradient = torch.zeros_like(low, dtype=torch.float64)
    gradient.scatter_add_(1, high.argmax(1, keepdim=True), level.double()[:, None])
    return gradient.scatter_add_(1, low.argmin(1, keepdim=True), -level.double()[:, None])


def _pull(hessian: SmoothedHessian, w: Tensor, product: Tensor, levels: Tensors | None) -> Tensor:
    """Hw + (wᵀ∂p/∂σ)·∇σ: how w·p(x) changes with x, where σ may follow it."""
    if levels is None:
        return product
    slopes = hessian.noise_slope(w)
    followed = [
        slopes[:, i : i + 1] * _range_gradient(*ends, level)
        for i, (ends, level) in enumerate(zip(hessian.bank.problem.free_values, levels, strict=True))
    ]
    return product + torch.cat(followed, dim=1)


def _steepest(p: Tensor, groups: _Groups | None) -> Tensor:
    """∂η_max/∂p, [B, D]."""
    if groups is None:
        where = p.abs().argmax(1, keepdim=True)
        return torch.zeros_like(p).scatter_(1, where, p.gather(1, where).sign())
    norms = groups.norms(p)
    which = (norms / groups.weights).argmax(1, keepdim=True)
    size = (norms * groups.weights).gather(1, which)
    return torch.where(groups.labels == which, p / torch.where(size > 0, size, 1.0), 0.0)


def map_vjp(
    problem: Problem,
    displacement: Tensors,
    vectors: Tensors,
    *,
    samples: dict[str, int],
    own_bank: tuple[int, bool] | None = None,
    method: Method = "auto",
    follows: bool = False,
    levels: Tensors | None = None,
    tol: float,
    max_steps: int,
) -> Tensors:
    """vᵀ·DA(x) of every input; :meth:`moreau_ext.MoreauGrad.vjp` is the way to it.

    Args:
        problem: with an absolute η.
        displacement: δ of a solution, per tensor.
        vectors: v, shaped as the inputs.
        samples: of the bank, by method.
        own_bank: (samples, antithetic) of a solver with a fixed bank: where second derivatives exist they are taken
            on that bank, so that the result is the derivative of what was computed.
        method: see :func:`moreau_ext.analysis.curvature.measure_curvature`.
        follows: whether η is a fraction of η_max, and so moves with x: the fraction that the problem's η is.
        levels: σ over the range of the input, per tensor, [B], where σ follows x.
        tol, max_steps: of the solve.

    Returns:
        float64, shaped as the inputs.
    """
    out = torch.zeros_like(columns(vectors, torch.float64))
    counts = dict(samples)
    if own_bank is not None:
        counts["autograd"] = own_bank[0]
    blind, worst = 0, 0.0
    for name, rows in by_method(problem, displacement, method, group=counts.__getitem__):
        if name == "none":
            blind += len(rows)
            continue
        part = problem.take(rows)
        own = name == "autograd" and own_bank is not None
        piece = _Adjoint(
            part,
            take(displacement, rows),
            name,
            counts[name],
            part.keys if own else None,
            own_bank is None or not own or own_bank[1],
        )
        v = columns(tuple(t[rows] for t in vectors), torch.float64)
        some = None if levels is None else tuple(level[rows] for level in levels)
        out[rows], left = piece.pull_back(v, follows, some, tol, max_steps)
        worst = max(worst, left)
    if blind:
        warnings.warn(
            f"the derivative of {blind} maps cannot be measured and is given as 0: their score has no second "
            "derivative and sigma is 0. A score with kinks needs noise",
            stacklevel=3,
        )
    if worst > 10 * tol:
        warnings.warn(
            f"vjp: a linear system was solved to a relative residual of {worst:.1e} only, tol is {tol:.1e}. Likely "
            "causes: rho times the weak convexity near 1, where the map has no derivative; or too few max_steps",
            stacklevel=3,
        )
    return tensors_of(out, problem.inputs)


class _Adjoint:
    """The linear system of some inputs, with one estimate of H."""

    def __init__(
        self,
        problem: Problem,
        displacement: Tensors,
        method: str,
        num_samples: int,
        keys: Tensor | None,
        antithetic: bool,
    ) -> None:
        def hessian(displacement: Tensors | None) -> SmoothedHessian:
            bank = Bank(problem, displacement, num_samples, keys=keys, antithetic=antithetic)
            return SmoothedHessian(bank, method)

        self._hessian, self.problem = hessian, problem
        self.here = hessian(displacement)
        self.support = _Support(problem, displacement)
        self.rho = torch.stack([r.double() for r in problem.rho]).amax(0)[:, None]

    def pull_back(
        self, v: Tensor, follows: bool, levels: Tensors | None, tol: float, max_steps: int
    ) -> tuple[Tensor, float]:
        """(vᵀDA float64 [B, D], the largest relative residual of the solves)."""
        support, mask = self.support, self.support.mask

        def system(w: Tensor, product: Tensor) -> Tensor:
            return w + self.rho * (mask * product + support.curvature(w))

        def operator(w: Tensor) -> Tensor:
            w = mask * w
            return system(w, self.here.product(w).double())

        right = mask * v
        w = mask * minimal_residual(operator, right, tol, max_steps)
        product = self.here.product(w).double()
        norm = right.norm(dim=1)
        left = torch.where(norm > 0, (right - system(w, product)).norm(dim=1) / norm.clamp_min(1e-300), 0.0)
        out = _pull(self.here, w, product, levels)
        if follows:
            out = out + self._through_eta(w, levels)
        return out, float(left.max())

    def _through_eta(self, w: Tensor, levels: Tensors | None) -> Tensor:
        """(s·w)·∇η with η = r·η_max(x), r the fraction that the solution's η is of η_max."""
        start = self._hessian(None)
        bank = start.bank
        total: Any = sum(bank.gradients(*c).double().sum(1) for c in bank.chunks(0, bank.num_samples))
        p: Tensor = total / bank.num_samples
        q = _steepest(p, self.support.groups)
        eta_max = (q * p).sum(1, keepdim=True)
        ratios = []
        for eta, x in zip(self.problem.penalty.eta, self.problem.inputs, strict=True):
            # An infinite η has a map of zeros.
            ratio = torch.where(eta.isfinite(), eta.double(), 0.0)[:, None] / eta_max.clamp_min(1e-300)
            ratios.append(ratio.expand(-1, math.prod(x.shape[1:])))
        strength = (torch.cat(ratios, dim=1) * self.support.slope * w).sum(1, keepdim=True)
        return strength * _pull(start, q, start.product(q).double(), levels)
