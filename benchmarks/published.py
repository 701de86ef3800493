"""The published loop (arXiv 2302.05294, algorithm 1) in plain PyTorch, which benchmarks compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moreau_ext.solvers.penalties import Penalty


def published(
    model: Callable[..., Any],
    x: Tensor,
    target: Tensor,
    sigma: Tensor,
    *,
    rho: float,
    penalty: Penalty | None = None,
    steps: int = 300,
    samples: int = 32,
    seed: int = 0,
    host_noise: bool = True,
    average: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(δ_t, what the loop would return) for every step, for some inputs at once; as written it takes one.

    Args:
        model: any callable.
        x: [B, ...].
        target: int64 [B].
        sigma: σ, [B].
        rho: the step size is a tenth of it.
        penalty: η·Ω, absolute.
        steps, samples: of the schedule.
        seed: of the noise.
        host_noise: drawn on the CPU and copied, as the published code does; else on the device.
        average: the mean of the last 101 iterates; else δ_t twice, which costs nothing.
    """
    rate, batch = 0.1 * rho, len(x)
    generator = torch.Generator("cpu" if host_noise else x.device).manual_seed(seed)
    step = torch.full((batch,), rate, device=x.device)
    one = [1] * (x.dim() - 1)
    delta, last = torch.zeros_like(x), []
    every = target.repeat_interleave(samples)[:, None]
    for _ in range(steps):
        noise = torch.randn(batch, samples, *x.shape[1:], generator=generator, device=generator.device).to(x.device)
        leaf = delta.detach().requires_grad_()
        noisy = (x + leaf).unsqueeze(1) + sigma.view(-1, 1, *one) * noise
        score = model(noisy.flatten(0, 1)).gather(1, every).sum() / samples
        (gradient,) = torch.autograd.grad(score + 0.5 * leaf.square().sum() / rho, leaf)
        delta = delta - rate * gradient
        if penalty is not None:
            (delta,) = penalty.prox((delta,), step)
        if average:
            last = [*last[-100:], delta]
        yield delta, torch.stack(last).mean(0) if average else delta
