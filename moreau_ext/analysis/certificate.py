"""How good an answer is, measured on samples that the solver never saw: residual, curvature, and what they imply."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..ops.layout import Tensors, over_features, row_chunks, take
from ..solvers.penalties import NoPenalty, Penalty
from ..solvers.problem import Problem
from .curvature import Curvature, measure_curvature, student_quantile
from .hessian import Bank, Method, columns, tensors_of

BOUND, MEASURED, FAILED = "bound", "measured locally", "premise not satisfied"

# Blocks of samples whose means give the residual's standard error.
_BLOCKS = 32


@dataclass(frozen=True, eq=False, repr=False)
class Certificate:
    """What can be said about a displacement δ that was returned, per input; all tensors are float64 [B].

    The residual ‖δ − y‖, y = −ρ·S_η(p(δ)), is zero exactly at stationary points of the problem with the *expected*
    smoothed score. It is measured on a noise bank that the solver did not use, with a confidence interval.

    λ (weak convexity, −min(λ_min(H), 0)) and β (max |λ(H)|) of H = ∇²f_σ are measured *at this δ*. **That is not a
    global modulus**: between δ and the solution the curvature may be larger, and another basin may lie further off. So
    what follows from them is labelled "measured locally": a bound if no larger curvature occurs on the way. "bound" is
    said only where constants that hold everywhere were given, and what is measured does not contradict them. Where
    ρλ < 1 is not shown (at the upper end of λ), all that needs it is infinite and labelled "premise not satisfied".

    With the upper ends of r, λ and β:

        ‖δ − δ*‖ ≤ r·(1 + ρ(β − λ))/(1 − ρλ)        ‖y − δ*‖ ≤ ρβ·r/(1 − ρλ)
        ‖A(x) − A(x')‖ ≤ β/(1 − ρλ)·‖x − x'‖         without a penalty also 1/min{ρ, 1/λ − ρ}

    Args:
        residual, residual_low, residual_high: r, with the sampling noise subtracted from its square, and its interval.
        relative_residual, relative_low, relative_high: the same over max(‖δ‖, ‖y‖, 10⁻³·ρ·‖p(0)‖).
        noise_floor: what r would read on this bank at an exact solution, before the noise is subtracted.
        weak_convexity, weak_convexity_low, weak_convexity_high: λ at δ, see
            :class:`moreau_ext.analysis.curvature.Curvature`.
        smoothness, smoothness_low, smoothness_high: β at δ.
        rho: ρ.
        premise: bool; whether ρλ < 1 is shown, for the λ that the label is about.
        distance: the bound on ‖δ − δ*‖, in units of x; divide by ρ for the map.
        image_distance: the bound on ‖y − δ*‖ for the y of this δ: how close one more, noiseless, step would be.
        map_lipschitz: the bound on the Lipschitz constant of the map.
        status: "bound", "measured locally" or "premise not satisfied": the label of the last three.
        curvature_method: how λ and β were measured: "autograd", "stein", or "none" (NaN: a score without a second
            derivative, and no noise to smooth it).
        num_samples: of the residual's bank.
        confidence: of the intervals.
    """

    residual: Tensor
    residual_low: Tensor
    residual_high: Tensor
    relative_residual: Tensor
    relative_low: Tensor
    relative_high: Tensor
    noise_floor: Tensor
    weak_convexity: Tensor
    weak_convexity_low: Tensor
    weak_convexity_high: Tensor
    smoothness: Tensor
    smoothness_low: Tensor
    smoothness_high: Tensor
    rho: Tensor
    premise: Tensor
    distance: Tensor
    image_distance: Tensor
    map_lipschitz: Tensor
    status: tuple[str, ...]
    curvature_method: tuple[str, ...]
    num_samples: int
    confidence: float

    @classmethod
    def empty(cls, device: torch.device, num_samples: int, confidence: float) -> Certificate:
        """Of no inputs."""
        none = torch.empty(0, dtype=torch.float64, device=device)
        values: dict[str, Any] = {f.name: none for f in fields(cls) if f.type == "Tensor"}
        values |= {"premise": none.bool(), "status": (), "curvature_method": ()}
        return cls(**values, num_samples=num_samples, confidence=confidence)

    def summary(self, limit: int = 10) -> str:
        """A table, at most ``limit`` inputs long, that says what kind of statement each number is."""
        count = len(self.status)
        columns = ("residual/size", "interval", "lambda", "beta", "rho*lambda", "|d-d*| <=", "Lipschitz <=", "label")
        lines = [
            f"certificate of {count} inputs: {self.num_samples} samples each, {100 * self.confidence:g} % intervals",
            f"{'input':>5} {columns[0]:>13} {columns[1]:>20} {columns[2]:>20} {columns[3]:>20} {columns[4]:>10} "
            f"{columns[5]:>10} {columns[6]:>12}  {columns[7]}",
        ]

        def between(low: Tensor, high: Tensor, row: int) -> str:
            return f"[{float(low[row]):.2e}, {float(high[row]):.2e}]"

        lines += [
            f"{row:>5} {float(self.relative_residual[row]):>13.2e} "
            f"{between(self.relative_low, self.relative_high, row):>20} "
            f"{between(self.weak_convexity_low, self.weak_convexity_high, row):>20} "
            f"{between(self.smoothness_low, self.smoothness_high, row):>20} "
            f"{float(self.rho[row] * self.weak_convexity_high[row]):>10.2e} {float(self.distance[row]):>10.2e} "
            f"{float(self.map_lipschitz[row]):>12.2e}  {self.status[row]}"
            for row in range(min(count, limit))
        ]
        if count > limit:
            lines.append(f"  ... and {count - limit} more")
        if MEASURED in self.status:
            lines.append(
                "measured locally: lambda and beta are those at the returned displacement. They are not global moduli; "
                "the distance and the Lipschitz constant hold only as far as the curvature is no larger on the way."
            )
        if BOUND in self.status:
            lines.append(
                "bound: from constants you gave as valid everywhere, at the upper end of the residual's interval."
            )
        if FAILED in self.status:
            lines.append(
                "premise not satisfied: rho*lambda < 1 is not shown; a small residual need not mean a near minimum."
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.summary())}</pre>"


def measure_residual(
    problem: Problem,
    displacement: Tensors,
    num_samples: int,
    confidence: float,
) -> dict[str, Tensor]:
    """r² = ‖δ + ρS_η(p)‖² without the noise of p, and its interval.

    With p̂ = p + ζ, r̂² = ‖δ + ρS_η(p̂)‖² has about the mean r² + tr C and the variance 4r²c + 2 tr C², C the covariance
    of ρS_η(p̂) and c its value along the residual. Both come from blocks: each block's deviation, scaled to the noise of
    the whole mean, is sent through S_η, so a feature near the threshold counts by as much as it moves. The interval
    holds the r that this r̂ does not reject.
    """
    bank = Bank(problem, displacement, num_samples)
    batch, features = bank.batch, bank.features
    sums = torch.zeros(batch, _BLOCKS, features, dtype=torch.float64, device=problem.keys.device)
    size = num_samples // _BLOCKS
    for first, count in bank.chunks(0, num_samples):
        block = torch.arange(first, first + count, device=sums.device) // size
        sums.index_add_(1, block, bank.gradients(first, count).double())
    means = sums / size
    p = means.mean(1)
    delta = columns(displacement, torch.float64)
    rho = torch.stack([r.double() for r in problem.rho]).amax(0)[:, None]

    def image(p: Tensor) -> Tensor:
        """−ρS_η(p)."""
        tensors = tuple(
            torch.empty_like(d).copy_(t) for t, d in zip(tensors_of(p, displacement), displacement, strict=True)
        )
        return -rho * columns(problem.penalty.prox(tensors), torch.float64)

    y = image(p)
    residual = delta - y
    moved = (means - p[:, None]) / math.sqrt(_BLOCKS)
    noise = torch.stack([(image(p + m) - image(p - m)) / 2 for m in moved.unbind(1)], dim=1)
    freedom = _BLOCKS - 1
    gram = torch.einsum("bkd,bld->bkl", noise, noise)
    trace = gram.diagonal(dim1=1, dim2=2).sum(1) / freedom
    # tr C² without the bias of few blocks (Srivastava 2005).
    crossed = gram.square().sum((1, 2)) / freedom**2
    crossed = freedom**2 / ((freedom - 1) * (freedom + 2)) * (crossed - trace.square() / freedom)
    crossed = crossed.clamp_min(0).maximum(trace.square() / problem.free.sum(1).clamp_min(1))
    observed = residual.square().sum(1)
    along = torch.einsum("bkd,bd->bk", noise, residual).square().sum(1) / freedom
    c = torch.maximum(
        torch.where(observed > 0, along / observed, 0.0), torch.where(trace > 0, crossed / trace, 0.0)
    ).nan_to_num(0.0)
    t = student_quantile(confidence, freedom)
    clean = observed - trace
    # A sum of few squares is skewed: its upper quantile by Wilson and Hilferty, as a variance for the lower limit.
    ninth = 2 * crossed / (9 * trace.square().maximum(crossed)).clamp_min(torch.finfo(torch.float64).tiny)
    excess = trace * ((1 - ninth + t * ninth.sqrt()) ** 3 - 1)
    skewed = torch.maximum(crossed, (excess / t).square() / 2)
    lowest, highest = _interval(clean, c, skewed, t)[0], _interval(clean, c, crossed, t)[1]
    size_of = torch.maximum(delta.norm(dim=1), y.norm(dim=1))
    return {
        "residual": clean.clamp_min(0).sqrt(),
        "residual_low": lowest,
        "residual_high": highest,
        "noise_floor": trace.sqrt(),
        "size": size_of,
    }


def _interval(clean: Tensor, along: Tensor, crossed: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """The s with |clean − s²| ≤ t·√(4s²·along + 2·crossed): where the square is solved for s²."""

    def root(a: Tensor, sign: float) -> Tensor:
        middle = a + 2 * t * t * along
        return (middle + sign * (middle.square() - a.square() + 2 * t * t * crossed).clamp_min(0).sqrt()).clamp_min(0)

    low = torch.where(clean > t * (2 * crossed).sqrt(), root(clean, -1.0), 0.0)
    # Less than the noise explains says that the noise was small, not that the residual is.
    return low.sqrt(), root(clean.clamp_min(0), 1.0).sqrt()


def _scale_at_zero(problem: Problem) -> Tensor:
    """10⁻³·ρ·‖p(0)‖, from a few samples: a floor needs no more."""
    bank = Bank(problem, None, 64)
    p = torch.stack([bank.gradients(*c).double().sum(1) for c in bank.chunks(0, 64)]).sum(0) / 64
    return problem.residual_floor(p.square().sum(1))


def certify(
    problem: Problem,
    displacement: Tensors,
    *,
    num_samples: int,
    num_hvp_samples: int = 128,
    steps: int = 20,
    method: Method = "auto",
    confidence: float = 0.95,
    lipschitz: Tensor | None = None,
    moduli: tuple[Tensor, Tensor] | None = None,
) -> Certificate:
    """The certificate of a displacement; :meth:`moreau_ext.MoreauGrad.certificate` is the way to it.

    Args:
        problem: with an absolute η.
        displacement: δ per tensor, state dtype.
        num_samples: rounded up to a multiple of 64.
        num_hvp_samples: likewise.
        steps: of Lanczos.
        method: see :func:`moreau_ext.analysis.curvature.measure_curvature`.
        confidence: of the intervals.
        lipschitz: L of f, [B], where known: then λ, β ≤ L·√(2/π)/σ everywhere.
        moduli: (λ, β) of f_σ, [B] each, where known to hold everywhere.
    """
    num_samples, num_hvp_samples = (-(-n // 64) * 64 for n in (num_samples, num_hvp_samples))
    size = problem.batch if problem.passes.max_rows is None else max(1, problem.passes.max_rows // num_samples)
    parts = []
    for rows in row_chunks(problem.keys.shape[0], size, problem.keys.device):
        some, where = problem.take(rows), take(displacement, rows)
        part = measure_residual(some, where, num_samples, confidence)
        part["size"] = torch.maximum(part["size"], _scale_at_zero(some))
        parts.append(part)
    found: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    extent = found.pop("size")
    relative: dict[str, Any] = {
        name: torch.where(found[f"residual{end}"] == 0, 0.0, found[f"residual{end}"] / extent)
        for name, end in (("relative_residual", ""), ("relative_low", "_low"), ("relative_high", "_high"))
    }
    curvature = measure_curvature(
        problem,
        displacement,
        num_samples=num_samples,
        num_hvp_samples=num_hvp_samples,
        steps=steps,
        method=method,
        confidence=confidence,
    )
    measured: dict[str, Any] = {k: v for k, v in vars(curvature).items() if k != "method"}
    rho = torch.stack([r.double() for r in problem.rho]).amax(0)
    known = _known(problem, lipschitz, moduli)
    implied = _implied(found["residual_high"], rho, curvature, known, isinstance(problem.penalty, NoPenalty))
    return Certificate(
        **found,
        **relative,
        **measured,
        **implied,
        rho=rho,
        curvature_method=curvature.method,
        num_samples=num_samples,
        confidence=confidence,
    )


def _known(
    problem: Problem, lipschitz: Tensor | None, moduli: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor] | None:
    """(λ, β) that hold everywhere, or None."""
    if moduli is not None:
        return moduli
    if lipschitz is None:
        return None
    # ∇²f_σ = E[∇f (z/σ)ᵀ], and E|z·u| = √(2/π)·‖u‖: the smallest σ of a tuple bounds ‖v/σ‖.
    sigma = torch.stack([s.double() for s in problem.sigma]).amin(0)
    beta = lipschitz.double() * math.sqrt(2 / math.pi) / sigma
    return beta, beta


def _implied(
    residual: Tensor, rho: Tensor, curvature: Curvature, known: tuple[Tensor, Tensor] | None, vanilla: bool
) -> dict[str, Any]:
    lam, beta = curvature.weak_convexity_high, curvature.smoothness_high
    proven = torch.zeros_like(rho, dtype=torch.bool)
    if known is not None:
        # Constants that the measurement contradicts prove nothing; a thousandth is left to rounding.
        refuted = (curvature.weak_convexity_low > 1.001 * known[0]) | (curvature.smoothness_low > 1.001 * known[1])
        proven = (rho * known[0] < 1) & ~refuted
        lam, beta = torch.where(proven, known[0], lam), torch.where(proven, known[1], beta)
    premise = rho * lam < 1  # False for NaN
    lam, beta = torch.where(premise, lam, 0.0), torch.where(premise, beta, 0.0)
    gap = 1 - rho * lam
    infinite = torch.full_like(rho, math.inf)
    slope = beta / gap
    if vanilla:
        slope = torch.minimum(slope, 1 / torch.minimum(rho, torch.where(lam > 0, 1 / lam - rho, infinite)))
    labels = zip(proven.tolist(), premise.tolist(), strict=True)
    return {
        "premise": premise,
        "distance": torch.where(premise, residual * (1 + rho * (beta - lam)) / gap, infinite),
        "image_distance": torch.where(premise, residual * rho * beta / gap, infinite),
        "map_lipschitz": torch.where(premise, slope, infinite),
        "status": tuple(BOUND if p else MEASURED if ok else FAILED for p, ok in labels),
    }


def absolute(penalty: Penalty, eta: Tensors) -> Penalty:
    """A penalty with the absolute η that a solution reports; infinite where the ratio to η_max was 1 or more."""
    if penalty.relative:
        eta = tuple(e.masked_fill(over_features(r >= 1, e), math.inf) for e, r in zip(eta, penalty.eta, strict=True))
    return replace(penalty, eta=eta, relative=False)
