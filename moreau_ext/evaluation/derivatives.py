"""vᵀ·DA(x), the vector-Jacobian product of the map A of every method, for adaptive attacks.

The maps of MoreauGrad have the implicit derivative, ``explainer.vjp``. The others are means of gradients over a known
noise:

    SmoothGrad, A = p(x) = E ∇f(x + σz)         vᵀDA = vᵀ∇²f_σ(x), MoreauGrad's in the limit ρ → 0
    soft-thresholded, A = S_η(p)                the same limit of SparseMoreauGrad, where δ = −ρ·S_η(p)
    sparsified, A = E τ(|∇f(x + σz)|)           vᵀDA = E (v·τ) z / σ, by Stein's identity
    Integrated Gradients, A = u∘∫∇f(b + tu)dt   v∘∫∇f dt + ∫ t·∇²f(b + tu)(u∘v) dt,  u = x − b

If f is piecewise linear, ∇²f is zero wherever it exists. Then the Hessian of the Gaussian-smoothed f is used, estimated
from gradients ("stein"). The plain gradient of a ReLU net is discontinuous and has no derivative; its attack uses that
of the smoothed net, as Ghorbani et al. use a softplus in place of ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..explainers.base import Explainer
from ..explainers.gradients import Gradient, SmoothGrad, SoftThresholdedSmoothGrad, SparsifiedSmoothGrad
from ..explainers.integrated import IntegratedGradients
from ..explainers.moreau import MoreauGrad, SparseMoreauGrad
from ..solvers.solution import Solution
from .faithfulness import drawn

__all__ = ["explainer_vjp", "find_hessian", "gradient_vjp"]

Hessian = Literal["autograd", "stein"]

# The limit ρ → 0. Large enough for float32: a digit's map of size 10 gives a displacement of 1e-5.
_LIMIT = 1e-6
_PATH = 64  # points on the path of Integrated Gradients
_SPARSIFIED = 0x5EED_5A55


def find_hessian(model: Callable[..., object], inputs: Tensor, *, noise_level: float = 0.1) -> Hessian:
    """The valid second derivative of a model: "autograd" if it is smooth, "stein" if it has kinks.

    The first two inputs are tested by the rule of :meth:`moreau_ext.MoreauGrad.certificate`; a kink at either decides.
    """
    few = inputs[:2]
    explainer = MoreauGrad(model, rho=_LIMIT, noise_level=noise_level)
    found = Gradient(model).attribute(few, return_solution=True)
    certificate = explainer.certificate(few, found, num_samples=64, num_hvp_samples=64, lanczos_steps=1)
    return "autograd" if set(certificate.curvature_method) == {"autograd"} else "stein"


def _limit(explainer: Explainer, **settings: Any) -> dict[str, Any]:
    return {
        "rho": _LIMIT,
        "score": explainer.score,
        "max_batch": explainer.max_batch,
        "unused_inputs": explainer.unused_inputs,
        "precision": explainer.precision,
        **settings,
    }


def gradient_vjp(
    explainer: Explainer,
    inputs: Tensor,
    solution: Solution,
    vectors: Tensor,
    target: Tensor,
    *,
    hessian: Hessian,
    sigma: Tensor,
    ids: Tensor,
    num_samples: int,
) -> Tensor:
    """vᵀ∇²f(x); of the smoothed f if ``hessian`` is "stein".

    Args:
        explainer: its model and score give f.
        inputs, vectors: [B, *features].
        solution: of :class:`Gradient` at these inputs.
        target: int64 [B].
        hessian: "autograd" or "stein".
        sigma: [B], of the smoothing; "autograd" takes the second derivative at the inputs themselves.
        ids: int64 [B], of the noise.
        num_samples: of the smoothing.
    """
    exact = hessian == "autograd"
    adjoint = MoreauGrad(explainer.model, sigma=0.0 if exact else sigma, **_limit(explainer))
    count = 4 if exact else num_samples
    result: Tensor = adjoint.vjp(inputs, solution, vectors, target, ids=ids, num_samples=count, hessian=hessian)
    return result


def explainer_vjp(
    explainer: Explainer,
    inputs: Tensor,
    solution: Solution,
    vectors: Tensor,
    target: Tensor,
    *,
    ids: Tensor,
    hessian: Hessian,
    num_samples: int,
    sigma: Tensor,
) -> Tensor:
    """vᵀ·DA(x) of a method's map A, estimated from ``num_samples`` gradients.

    Args:
        explainer: one of the package; the formulas are in the docstring of the module.
        inputs: [B, *features].
        solution: the explainer's of these inputs.
        vectors: v, shaped as the inputs.
        target: int64 [B].
        ids: int64 [B], of the noise; other ids give other noise.
        hessian: "autograd" for smooth models, "stein" for those with kinks; see :func:`find_hessian`.
        num_samples: gradients, or second derivatives, per input.
        sigma: [B], of the smoothing, for methods without one on models with kinks.

    Returns:
        Shaped as the inputs.

    Raises:
        TypeError: an explainer of another kind.
    """
    common: dict[str, Any] = {"num_samples": num_samples, "hessian": hessian}
    result: Tensor
    if isinstance(explainer, MoreauGrad):
        # Settings that depend on x (η of η_max, σ of the range) are held: they only rescale, and would double the cost.
        result = explainer.vjp(inputs, solution, vectors, target, ids=ids, hold_settings=True, tol=1e-3, **common)
        return result
    if isinstance(explainer, SmoothGrad):
        noise: dict[str, Any] = {"noise_level": explainer.noise_level, "sigma": explainer.sigma, "seed": explainer.seed}
        adjoint: MoreauGrad
        if isinstance(explainer, SoftThresholdedSmoothGrad):
            adjoint = SparseMoreauGrad(explainer.model, **_limit(explainer), **noise, eta=solution.eta)
        else:
            adjoint = MoreauGrad(explainer.model, **_limit(explainer), **noise)
        moved = replace(solution, displacement=-_LIMIT * solution.attribution)
        result = adjoint.vjp(inputs, moved, vectors, target, ids=ids, hold_settings=True, tol=1e-3, **common)
        return result
    if isinstance(explainer, Gradient):
        return gradient_vjp(explainer, inputs, solution, vectors, target, sigma=sigma, ids=ids, **common)
    if isinstance(explainer, SparsifiedSmoothGrad):
        return _sparsified(explainer, inputs, solution, vectors, target, ids, num_samples)
    if isinstance(explainer, IntegratedGradients):
        return _integrated(explainer, inputs, vectors, target, ids, hessian, num_samples, sigma)
    raise TypeError(
        f"explainer: expected one of moreau_ext's, whose derivative is known, got {type(explainer).__name__}"
    )


def _repeat(t: Tensor, count: int) -> Tensor:
    return t.repeat_interleave(count, dim=0)


def _sparsified(
    explainer: SparsifiedSmoothGrad,
    inputs: Tensor,
    solution: Solution,
    vectors: Tensor,
    target: Tensor,
    ids: Tensor,
    num_samples: int,
) -> Tensor:
    """mean ½[v·(τ₊ − τ₋)] z/σ over antithetic pairs."""
    count = -(-num_samples // 2) * 2
    z = drawn(_SPARSIFIED, ids, inputs, count, antithetic=True)
    shape = (-1, *[1] * (inputs.dim() - 1))
    sigma = solution.sigma.to(inputs).view(shape)
    rows = (inputs.unsqueeze(1) + sigma.unsqueeze(1) * z).flatten(0, 1)
    single = SparsifiedSmoothGrad(
        explainer.model,
        sigma=0.0,
        num_samples=1,
        keep=explainer.keep,
        clip=explainer.clip,
        score=explainer.score,
        max_batch=explainer.max_batch,
        unused_inputs=explainer.unused_inputs,
        precision=explainer.precision,
    )
    maps = single.attribute(rows, _repeat(target, count)).view_as(z)
    slope = (maps * vectors.unsqueeze(1)).flatten(2).sum(2)
    pairs = ((slope[:, ::2] - slope[:, 1::2]) / 2).view(inputs.shape[0], -1, *shape[1:])
    out: Tensor = (pairs * z[:, ::2]).mean(1) / sigma.clamp_min(torch.finfo(inputs.dtype).tiny)
    return out


def _integrated(
    explainer: IntegratedGradients,
    inputs: Tensor,
    vectors: Tensor,
    target: Tensor,
    ids: Tensor,
    hessian: Hessian,
    num_samples: int,
    sigma: Tensor,
) -> Tensor:
    """By the midpoint rule on a path of :data:`_PATH` points; every point is smoothed with its own samples."""
    base = torch.as_tensor(0.0 if explainer.baselines is None else explainer.baselines).to(inputs)
    u = inputs - base
    t = (torch.arange(_PATH, device=inputs.device).to(inputs) + 0.5) / _PATH
    view = t.view(1, -1, *[1] * (inputs.dim() - 1))
    rows = (base + view * u.unsqueeze(1)).flatten(0, 1)
    slopes = (view * (u * vectors).unsqueeze(1)).flatten(0, 1)
    classes, wide = _repeat(target, _PATH), (inputs.shape[0], _PATH, *inputs.shape[1:])
    plain = Gradient(
        explainer.model,
        score=explainer.score,
        max_batch=explainer.max_batch,
        unused_inputs=explainer.unused_inputs,
        precision=explainer.precision,
    )
    found = plain.attribute(rows, classes, return_solution=True)
    gradient = found.attribution.view(wide).mean(1)
    # Ids per point, so that their noise is independent.
    points = torch.arange(_PATH, device=ids.device)
    curved = gradient_vjp(
        explainer,
        rows,
        found,
        slopes,
        classes,
        hessian=hessian,
        sigma=_repeat(sigma, _PATH),
        ids=(ids[:, None] * _PATH + points).flatten(),
        num_samples=max(4, num_samples // _PATH),
    )
    out: Tensor = vectors * gradient + curved.view(wide).mean(1)
    return out
