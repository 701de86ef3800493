"""The operations in plain PyTorch: the specification of every kernel, and what runs where there is no kernel.

Same names and signatures as :mod:`moreau_ext.ops`. Clear before fast: noise is drawn in float64 and held in memory.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .layout import Tensors, flat_rows, in_memory_order, memory_layout, rows_like, state_dtype, tensor_of
from .noise import Noise
from .partition import Partition

STATISTICS = ("residual2", "displacement2", "image2", "gradient2", "nonzero")

PRODUCTS = ("restart_product", "step_dot_last", "last_sq", "dx_dx", "dx_dg", "dg_dg")

SUMS = ("step_dot_last", "last_sq", "differences", "norms", "norms2", "lengths", "weight", "steps")


def per_input(value: Tensor | float, x: Tensor) -> Tensor:
    """A number as one per input of x, state dtype [B]; a tensor as it is, without gaps."""
    if isinstance(value, Tensor) and value.dim():
        return value.contiguous() if value.dim() == 1 else value
    return torch.full((x.shape[0],), float(value), dtype=state_dtype(x.dtype), device=x.device)


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words (the key 64 bits).

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    mask = 0xFFFFFFFF
    k0, k1 = key & mask, (key >> 32) & mask
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64; the bits are right
        c0, c1, c2, c3 = ((p1 >> 32) & mask) ^ c1 ^ k0, p1 & mask, ((p0 >> 32) & mask) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u = (a.double() + 0.5) * 2.0**-32
    gap = ((a ^ 0xFFFFFFFF).double() + 0.5) * 2.0**-32
    radius = torch.sqrt(-2 * torch.where(u < 0.5, torch.log(u), torch.log1p(-gap)))
    angle = torch.where(b < 1 << 31, b, b - (1 << 32)).double() * (math.pi * 2.0**-31)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normals(noise: Noise, features: int) -> Tensor:
    """The bank's standard normals, float64 [B, num_samples, features] in row-major order of the features."""
    device = noise.keys.device
    element = noise.element_offset + torch.arange(features, device=device)
    sample = noise.sample_offset + torch.arange(noise.num_samples, device=device)
    sign = torch.ones_like(sample, dtype=torch.float64)
    if noise.antithetic:
        sign = sign - 2 * (sample % 2)
        sample = sample - sample % 2
    first, last = noise.element_offset // 4, (noise.element_offset + max(features, 1) - 1) // 4
    block = torch.arange(first, last + 1, device=device)
    zero = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    words = philox(
        noise.keys[:, None, None],
        (
            zero + (block & 0xFFFFFFFF),
            zero + (block >> 32),
            zero + (sample & 0xFFFFFFFF)[None, :, None],
            zero + (noise.step & 0xFFFFFFFF)[:, None, None],
        ),
    )
    z = torch.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], dim=-1).flatten(2)
    return z[:, :, element - 4 * first] * sign[None, :, None]


def perturb(x: Tensor, displacement: Tensor | None, noise: Noise, *, out: Tensor | None = None) -> Tensor:
    """Noisy copies of every input, out[b·m + k] = x[b] + δ[b] + σ[b]·z(b, k).

    Args:
        x: [B, *features], contiguous or channels_last; float32, float64, float16 or bfloat16.
        displacement: δ, state dtype (:func:`state_dtype`), shaped and laid out as x; None for 0.
        noise: which normals, and σ.
        out: [B·m, *features] to write to, of the dtype and layout of x.

    Returns:
        out: [B·num_samples, *features]; sums are formed in the state dtype and rounded once.
    """
    out = rows_like(x, x.shape[0] * noise.num_samples) if out is None else out
    base = x.to(state_dtype(x.dtype))
    if displacement is not None:
        base = base + displacement
    rows = base.unsqueeze(1).expand(-1, noise.num_samples, *x.shape[1:])
    if noise.sigma is not None:
        z = normals(noise, math.prod(x.shape[1:])).to(base.dtype).view(rows.shape)
        rows = rows + per_input(noise.sigma, x).view(-1, *[1] * x.dim()) * z
    out.copy_(rows.reshape(out.shape))
    return out


def accumulate(gradients: Tensor, total: Tensor, *, carry: bool) -> Tensor:
    """Sum over samples, total[b] (+)= Σ_k gradients[b·m + k], in the state dtype and in the order of k.

    Args:
        gradients: [B·m, *features].
        total: [B, *features], state dtype, overwritten (carry=False) or added to (carry=True).
        carry: whether ``total`` holds the sum of earlier chunks.

    Returns:
        total.
    """
    if not carry:
        total.zero_()
    samples = gradients.shape[0] // max(total.shape[0], 1)
    for row in gradients.view(total.shape[0], samples, *total.shape[1:]).unbind(1):
        total += row
    return total


def group_norms(v: Tensor, groups: Partition) -> Tensor:
    """Euclidean norms of the groups, ‖v_g‖₂ = √Σ_{i∈g} v_i², summed in float64.

    Args:
        v: [B, *features], float32 or float64.
        groups: a partition of the features in the memory order of v.

    Returns:
        float64 [B, count]; 0 for an empty group.
    """
    flat = in_memory_order(v).double()
    labels = groups.labels.long().expand(flat.shape[0], -1)
    squares = torch.zeros(flat.shape[0], groups.count, dtype=torch.float64, device=v.device)
    return squares.scatter_add_(1, labels, flat.square()).sqrt()


def soft_threshold(v: Tensor, threshold: Tensor) -> Tensor:
    """S_t(v) = sign(v)·max(|v| − t, 0), written v − clip(v, −t, t): exactly +0 inside, exactly v for t = 0."""
    return v - torch.minimum(torch.maximum(v, -threshold), threshold)


def group_factors(norms: Tensor, threshold: Tensor) -> Tensor:
    """max(1 − t/‖v_g‖, 0), formed in float64; 1 where t = 0 and 0 where ‖v_g‖ ≤ t, so never 0/0."""
    norm, t = norms.double(), threshold.double().expand_as(norms)
    kept = torch.where(norm <= t, 0.0, 1 - t / torch.where(norm <= t, 1.0, norm))
    return torch.where(t == 0, 1.0, kept)


def _shrink(v: Tensor, eta: Tensor | None, scale: Tensor | float, groups: Partition | None) -> Tensor:
    """The prox of scale·η·Ω at v; all tensors in memory order, [B, features]."""
    if eta is None:
        return v
    if groups is None:
        return soft_threshold(v, (scale * eta).expand_as(v))
    labels = groups.labels.long().expand(v.shape[0], -1)
    squares = torch.zeros(v.shape[0], groups.count, dtype=torch.float64, device=v.device)
    squares.scatter_add_(1, labels, v.double().square())
    threshold = tensor_of(scale).double() * (eta.double() * groups.weights.double())
    factors = group_factors(squares.sqrt(), threshold).to(v.dtype).gather(1, labels)
    return torch.where(factors == 0, 0 * (v - v), v * factors)


def shrink(v: Tensor, eta: Tensor, groups: Partition | None = None) -> Tensor:
    """The proximal map S_η(v) of η·Ω.

    L1 (no groups): sign(v)·max(|v| − η, 0). Groups: v_g·max(1 − η·w_g/‖v_g‖, 0).

    Args:
        v: [B, *features], float32 or float64, contiguous or channels_last.
        eta: state dtype [B]; for L1 also [1, *features] or [B, *features].
        groups: the partition, for the group penalty.

    Returns:
        As v; zeros are exact, NaN stays NaN, η = 0 returns v.
    """
    flat = in_memory_order(v)
    out = _shrink(flat, eta_columns(eta, v), 1.0, groups)
    if out is flat:
        return v.clone()
    layout = memory_layout(v)
    if layout is not None and layout[0] > 1:
        return out.view(v.shape[0], *v.shape[2:], v.shape[1]).movedim(-1, 1)
    return out.view(v.shape)


def eta_columns(eta: Tensor, v: Tensor) -> Tensor:
    """η as [B or 1, 1 or features] in the memory order of v, from [B] or [1 or B, *features]."""
    if eta.dim() == 1:
        return eta[:, None]
    layout = memory_layout(v)
    ordered = eta if layout is None or layout[0] == 1 else eta.movedim(1, -1)
    return ordered.reshape(eta.shape[0], math.prod(v.shape[1:]))


def prox_step(
    gradients: Tensor | None,
    gradient: Tensor,
    displacement: Tensor,
    *,
    count: int,
    rho: Tensor | float,
    step_size: Tensor | float,
    carry: bool = False,
    eta: Tensor | float | None = None,
    groups: Partition | None = None,
    total: Tensor | None = None,
    total_of: Literal["gradient", "displacement"] = "gradient",
    x: Tensor | None = None,
    noise: Noise | None = None,
    out: Tensor | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """One step of the proximal gradient method, in place, fused into one pass.

    p  = (Σ_k g_k) / count                     the averaged gradient
    y  = −ρ·S_η(p)                             the KKT image of δ
    δ⁺ = S_{γη}((1 − γ/ρ)·δ − γ·p)             the new displacement
    out[k] = x + δ⁺ + σ·z_k                    the next noisy copies

    Args:
        gradients: [B·m, *features] in the dtype of the model; None when all are in ``gradient`` already.
        gradient: state dtype [B, *features]. On entry, with ``carry``, the sum of earlier chunks; on return p.
        displacement: δ, state dtype [B, *features], replaced by δ⁺.
        count: how many gradients the sum holds in all.
        rho: ρ, a number or state dtype [B].
        step_size: γ, a number or state dtype [B].
        carry: see ``gradient``.
        eta: η, a number or state dtype [B]; for L1 also [1, *features] or [B, *features]. None: no penalty.
        groups: the partition, for the group penalty.
        total: state dtype [B, *features] to which p or δ⁺ is added.
        total_of: which of the two.
        x: [B, *features], the inputs; needed with ``noise``.
        noise: the next noisy copies; None writes none.
        out: [B·num_samples, *features], where they go.
        arrivals: int32 zeros [B], scratch of the CUDA kernel, of one call at a time; None allocates it.

    Returns:
        float64 [B, 5], of the displacement that came in: ‖δ − y‖², ‖δ‖², ‖y‖², ‖p‖², and the non-zeros of y.

    Source: arXiv 2302.05294, algorithm 1, with the residual of Karush-Kuhn-Tucker conditions beside it.
    """
    if gradients is not None:
        accumulate(gradients, gradient, carry=carry)
    gradient /= count
    p, d = in_memory_order(gradient), in_memory_order(displacement)
    gamma, r = per_input(step_size, displacement)[:, None], per_input(rho, displacement)[:, None]
    columns = None if eta is None else eta_columns(per_input(eta, displacement), displacement)
    y = -r * _shrink(p, columns, 1.0, groups)
    v = (1 - gamma / r) * d - gamma * p
    statistics = torch.stack(
        [
            (d.double() - y.double()).square().sum(1),
            d.double().square().sum(1),
            y.double().square().sum(1),
            p.double().square().sum(1),
            (y != 0).sum(1).double(),
        ],
        dim=1,
    )
    d.copy_(_shrink(v, columns, gamma, groups))
    if total is not None:
        total += gradient if total_of == "gradient" else displacement
    if noise is not None and noise.num_samples:
        if x is None or out is None:
            raise ValueError("noise: writing noisy copies needs x and out")
        perturb(x, displacement, noise, out=out)
    return statistics


def momentum_step(
    y: Tensors,
    y_prev: Tensors,
    x: Tensors,
    x_prev: Tensors,
    gradient: Tensors,
    last_gradient: Tensors,
    last_step: Tensors,
    *,
    sums: Tensor,
    statistics: Tensor,
    samples: int,
    momentum: float,
    squares: Tensors = (),
    points: Tensors = (),
    gradients: Tensors = (),
    first: bool = False,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Nesterov's momentum after a proximal step, with gradient restart, in place; and running sums of the iteration.

    y_{t+1}                             the displacement that a proximal step from x_t made
    s = y_{t+1} − y_t                   the step
    dx = x_t − x_{t−1},  dg = p_t − p_{t−1}
    x_{t+1} = y_{t+1} + β·s             β = 0 where ⟨x_t − y_{t+1}, s⟩ > 0: there the momentum points uphill
    squares += m/2·dg²                  estimates the variance of one gradient where noise alone changes p
    points += m·x_t, gradients += m·p_t

    Args:
        y: y_{t+1}; becomes x_{t+1}, where the next proximal step starts. This and the following are tuples of tensors
            [B, *features] of float32 or float64; the i-th tensors of all have one shape, dtype and layout.
        y_prev: y_t; becomes y_{t+1}.
        x: x_t, where the gradients were taken; becomes x_{t+1}.
        x_prev: x_{t−1}; becomes x_t.
        gradient: p_t, the average of the gradients at x_t.
        last_gradient: p_{t−1}; becomes p_t.
        last_step: y_t − y_{t−1}; becomes s.
        sums: float64 [B, 8], added to: ⟨s, last step⟩ and ‖last step‖² unless ``first``; 1, (m/2)‖dg‖² and its square
            with ``squares``; m‖x_t‖², m and 1 with ``points``. Named by ``SUMS``.
        statistics: float64 [B, 5] of the proximal step.
        samples: m, the number of gradients in an average.
        momentum: β.
        squares: sums of squared changes of the gradient, or ().
        points, gradients: sums of points and of gradients, or ().
        first: there is no last step; ``x_prev``, ``last_gradient`` and ``last_step`` hold zeros.
        arrivals: int32 zeros [B], scratch of the CUDA kernel, for one call at a time; None allocates it.

    Returns:
        float64 [B, 6], over all tensors: ⟨x_t − y_{t+1}, s⟩, ⟨s, last step⟩, ‖last step‖², ‖dx‖², ⟨dx, dg⟩, ‖dg‖².
        Named by ``PRODUCTS``.

    Source: O'Donoghue and Candès, "Adaptive restart for accelerated gradient schemes", 2015.
    """

    def differences(a: Tensors, b: Tensors) -> Tensors:
        return tuple(u - v for u, v in zip(a, b, strict=True))

    def inner(a: Tensors, b: Tensors) -> Tensor:
        parts = [(flat_rows(u).double() * flat_rows(v).double()).sum(1) for u, v in zip(a, b, strict=True)]
        return torch.stack(parts).sum(0)

    step, dx, dg = differences(y, y_prev), differences(x, x_prev), differences(gradient, last_gradient)
    pairs = [
        (differences(x, y), step),
        (step, last_step),
        (last_step, last_step),
        (dx, dx),
        (dx, dg),
        (dg, dg),
    ]
    products = torch.stack([inner(*pair) for pair in pairs], dim=1)
    if not first:
        sums[:, :2] += products[:, 1:3]
    if squares:
        square = products[:, 5] * (samples / 2)
        sums[:, 2:5] += torch.stack([torch.ones_like(square), square, square.square()], dim=1)
        for total, q in zip(squares, dg, strict=True):
            total += samples / 2 * q * q
    if points:
        ones = torch.ones_like(statistics[:, 1])
        sums[:, 5:] += torch.stack([samples * statistics[:, 1], samples * ones, ones], dim=1)
        for total, value in zip((*points, *gradients), (*x, *gradient), strict=True):
            total += samples * value
    beta = momentum * (~(products[:, 0] > 0)).double()
    for i, s in enumerate(step):
        x_prev[i].copy_(x[i])
        y_prev[i].copy_(y[i])
        last_gradient[i].copy_(gradient[i])
        last_step[i].copy_(s)
        x[i].copy_(y[i] + beta.to(s.dtype).view(-1, *[1] * (s.dim() - 1)) * s)
        y[i].copy_(x[i])
    return products
