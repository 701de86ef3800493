"""Curvature of the smoothed score: extreme eigenvalues of H = ∇²f_σ(x + δ), and a ρ that keeps the problem convex."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from statistics import NormalDist

import torch
from torch import Tensor

from .. import ops
from ..model.precision import resolution
from ..ops.layout import Tensors, take
from ..ops.noise import noise_keys
from ..solvers.problem import Problem
from ..solvers.samples import GradientSum, NoisyCopies
from .hessian import (
    BLOCKS,
    SEED_START,
    Bank,
    Method,
    SmoothedHessian,
    by_method,
    columns,
    independent_keys,
    tensors_of,
)
from .krylov import extreme_eigenvalues


def student_quantile(confidence: float, freedom: int) -> float:
    """t with P(|T| <= t) = confidence, by the expansion of Cornish and Fisher (0.2 % off at 5 degrees of freedom).

    Example:
        >>> round(student_quantile(0.95, 15), 2)
        2.13
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + (z**3 + z) / (4 * freedom) + second / freedom**2 + third / freedom**3


@dataclass(frozen=True)
class Curvature:
    """λ and β of the smoothed score at one displacement, measured; all float64 [B].

    An eigenvalue of a noisy estimate of H is on average further out than H's own, and the value of uᵀHu on samples that
    did not choose u is on average further in. ``high`` is the first on the whole bank, ``low`` the second across its
    halves; each is moved outwards by the standard error of its quadratic form, times Student's t, and ``high`` by what
    Lanczos left open. The value between them is the jackknife of the first.

    Args:
        weak_convexity: λ = max(−λ_min(H), 0).
        smoothness: β = max |λ(H)|.
        weak_convexity_low, weak_convexity_high, smoothness_low, smoothness_high: see above.
        method: "autograd", "stein", or "none" (not measurable: NaN), per input.
    """

    weak_convexity: Tensor
    weak_convexity_low: Tensor
    weak_convexity_high: Tensor
    smoothness: Tensor
    smoothness_low: Tensor
    smoothness_high: Tensor
    method: tuple[str, ...]


def measure_curvature(
    problem: Problem,
    displacement: Tensors,
    *,
    num_samples: int,
    num_hvp_samples: int = 128,
    steps: int = 20,
    method: Method = "auto",
    confidence: float = 0.95,
) -> Curvature:
    """λ and β of f_σ at x + δ by Lanczos; see :class:`Curvature`.

    What is measured holds at this point. It is no bound on the curvature elsewhere, not even nearby.

    Args:
        problem: inputs, score, noise.
        displacement: δ per tensor, state dtype.
        num_samples: bank of "stein": one gradient each; a multiple of 64.
        num_hvp_samples: bank of "autograd": two second derivatives per Lanczos step each; a multiple of 64.
        steps: of Lanczos.
        method: "autograd", "stein", or "auto" (see :func:`find_methods`).
        confidence: of the standard errors.

    Raises:
        ValueError: "stein" without noise.
    """
    samples = {"autograd": num_hvp_samples, "stein": num_samples, "none": 1}
    batch = problem.keys.shape[0]
    out = {f.name: problem.value.new_full((batch,), math.nan, dtype=torch.float64) for f in fields(Curvature)[:-1]}
    names = ["none"] * batch
    for name, rows in by_method(problem, displacement, method, group=samples.__getitem__):
        if name != "none":
            part, where = problem.take(rows), take(displacement, rows)
            hessian = SmoothedHessian(Bank(part, where, samples[name]), name)
            for key, value in _ends(hessian, steps, confidence).items():
                out[key][rows] = value
        for row in rows.tolist():
            names[row] = name
    return Curvature(**out, method=tuple(names))


def _ends(hessian: SmoothedHessian, steps: int, confidence: float) -> dict[str, Tensor]:
    bank = hessian.bank
    start = Bank(bank.problem, None, 1, keys=noise_keys(SEED_START, bank.problem.keys), antithetic=False).normals(0, 1)[
        :, 0
    ]
    t = student_quantile(confidence, BLOCKS - 1)
    whole, vectors, left = extreme_eigenvalues(hessian.product, start, steps)
    halves, across, variance = [], [], []
    for half in (0, 1):
        value, chosen, _ = extreme_eigenvalues(partial(hessian.product, half=half), start, steps)
        forms = [hessian.quadratic_form(chosen[:, end], 1 - half) for end in (0, 1)]
        halves.append(value)
        across.append(torch.stack([form for form, _ in forms], dim=1))
        variance.append(torch.stack([error.square() for _, error in forms], dim=1))
    outer_error = torch.stack([hessian.quadratic_form(vectors[:, end])[1] for end in (0, 1)], dim=1)
    inner, inner_error = (across[0] + across[1]) / 2, (variance[0] + variance[1]).sqrt() / 2
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64, device=whole.device)  # outwards
    high = sign * whole + left + t * outer_error
    low = torch.minimum(sign * inner - t * inner_error, high)
    middle = (sign * (2 * whole - (halves[0] + halves[1]) / 2)).clamp(low, high)
    named = {"": middle, "_low": low, "_high": high}
    return {f"weak_convexity{k}": v[:, 0].clamp_min(0) for k, v in named.items()} | {
        f"smoothness{k}": v.amax(1).clamp_min(0) for k, v in named.items()
    }


# Lanczos products of convex_rho, and samples at either end of each: 64 gradients.
_RHO_STEPS, _RHO_SAMPLES = 8, 4


def convex_rho(problem: Problem, unknown: float | None = None) -> tuple[Tensor, Tensor]:
    """ρ = ½ / max(λ, β/10), float64 [B], and the gradients of each input that it took, int64 [B]: half of the largest ρ
    for which the problem is strongly convex at x.

    λ and β are those of the Lanczos process with products of 8 gradients, Hv = (p(x + σv) − p(x − σv))/(2σ): on a bank
    of 4 samples of its own, where both are on average larger than those of the expectation. At x the problem's second
    derivative is then about 1/(2ρ) or more in every direction; elsewhere it may be less, which a certificate at the
    solution tells. The second term keeps ρβ ≤ 5 where the score is convex, and 1 is taken where it is linear, when the
    map is the same for every ρ. Inputs without noise have second derivatives instead, by autograd, which are counted as
    two gradients each.

    Args:
        problem: the inputs, their score and noise.
        unknown: ρ of an input without noise whose score has kinks, and so no curvature; None raises an error.

    Raises:
        ValueError: there is such an input, and no ``unknown``.
    """
    noisy = torch.stack(problem.sigma).amin(0) > 0
    out, cost = torch.ones_like(problem.value, dtype=torch.float64), torch.zeros_like(problem.keys)
    for measure, where in ((_by_differences, noisy), (_by_autograd, ~noisy)):
        rows = where.nonzero().squeeze(1)
        if not len(rows):
            continue
        before = problem.passes.gradients
        weak, smooth = measure(problem.take(rows))
        cost[rows] = (problem.passes.gradients - before) // len(rows)
        limit = torch.maximum(weak, smooth / 10)
        no_curvature = limit.isnan()
        if unknown is None and bool(no_curvature.any()):
            which = int(problem.ids[rows[no_curvature]][0])
            raise ValueError(
                f"rho: 'auto' measures the curvature of the smoothed score, and input id {which} has no noise while "
                "its score has kinks. Likely cause: a constant input, whose range is 0; give sigma, or a number for rho"
            )
        found = torch.where(limit > 0, 0.5 / limit.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
        out[rows] = found if unknown is None else torch.where(no_curvature, unknown, found)
    return out, cost


def _by_differences(problem: Problem) -> tuple[Tensor, Tensor]:
    """λ and β at x, float64 [B] each, from differences of gradients over ±σ."""
    nowhere = tuple(torch.zeros_like(x, dtype=ops.state_dtype(x.dtype)) for x in problem.inputs)
    own = replace(problem, keys=independent_keys(problem.keys))
    copies = NoisyCopies(own, _RHO_SAMPLES, True)
    start = Bank(problem, None, 1, keys=noise_keys(SEED_START, problem.keys), antithetic=False).normals(0, 1)[:, 0]
    reach = torch.stack([s.double() for s in problem.sigma]).amin(0)[:, None]

    def product(vectors: Tensor) -> Tensor:
        ends = []
        for side in (1.0, -1.0):
            place = tensors_of(side * reach * vectors, nowhere)
            where = tuple(torch.empty_like(n).copy_(p) for n, p in zip(nowhere, place, strict=True))
            total = GradientSum(copies, where, tuple(torch.zeros_like(n) for n in nowhere), torch.zeros_like(out))
            total.run()
            ends.append(columns(total.gradient, torch.float64) / _RHO_SAMPLES)
        size.copy_(torch.maximum(size, ends[0].norm(dim=1)))
        return (ends[0] - ends[1]) / (2 * reach)

    out, size = torch.zeros(2, problem.batch, dtype=torch.float64, device=problem.keys.device)
    values, _, _ = extreme_eigenvalues(product, start, _RHO_STEPS)
    # Differences of gradients that are equal leave their rounding.
    eps = max(resolution(problem.score.precision, x) for x in problem.inputs)
    values = torch.where(values.abs() <= (64 * eps * size / reach[:, 0])[:, None], 0.0, values)
    return (-values[:, 0]).clamp_min(0), values.abs().amax(1)


def _by_autograd(problem: Problem) -> tuple[Tensor, Tensor]:
    """The same for inputs without noise."""
    nowhere = tuple(torch.zeros_like(x, dtype=ops.state_dtype(x.dtype)) for x in problem.inputs)
    found = measure_curvature(problem, nowhere, num_samples=64, num_hvp_samples=64, steps=_RHO_STEPS)
    return found.weak_convexity_high, found.smoothness_high
