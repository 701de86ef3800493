"""How fast are the fused operations against the best in-place eager PyTorch, a copy, and torch.randn?

    OMP_NUM_THREADS=1 python benchmarks/bench_ops.py

Prints ratios of interleaved medians. "eager" is the same step from PyTorch's own in-place operations on reused buffers.
Without noise the step is bound by memory: it and a copy go round a ring of buffers that no cache holds, and both rates
are in bytes of gradients per second (a copy also writes as many; the last column counts all traffic of both).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timing import interleaved, parser, report
from torch import Tensor

from moreau_ext import Tiles, ops
from moreau_ext.noise import Noise, noise_keys

SHAPES = {
    "[64,32,64]": (64, 32, (1, 8, 8)),
    "[16,32,3072]": (16, 32, (3, 32, 32)),
    "[1,32,150528]": (1, 32, (3, 224, 224)),
}
RHO, GAMMA, ETA, SIGMA = 1.0, 0.1, 5e-3, 0.1
# Bytes of gradients in the ring, well above any last-level cache.
RING = 256 << 20


class Buffers:
    """Inputs, gradients and state of one size."""

    def __init__(self, batch: int, samples: int, features: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
        state = ops.state_dtype(dtype)
        self.x = torch.randn(batch, *features, device=device).to(dtype)
        self.gradients = torch.randn(batch * samples, *features, device=device).to(dtype)
        self.noisy = torch.empty_like(self.gradients)
        self.displacement = torch.zeros_like(self.x, dtype=state)
        self.gradient = torch.zeros_like(self.displacement)
        self.copy = torch.empty_like(self.gradients)
        self.batch, self.samples, self.state = batch, samples, state
        self.arrivals = torch.zeros(batch, dtype=torch.int32, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.keys = noise_keys(0, torch.arange(batch, device=device))

    def full(self, value: float) -> Tensor:
        return torch.full((self.batch,), value, dtype=self.state, device=self.x.device)

    def noise(self, antithetic: bool) -> Noise:
        return Noise(self.keys, self.step, self.full(SIGMA), self.samples, antithetic)


def fused(b: Buffers, *, noise: Noise | None, tiles: int | None = None) -> Any:
    groups = None if tiles is None else Tiles(tiles).partition(b.x, b.state)
    rho, gamma, eta = b.full(RHO), b.full(GAMMA), b.full(ETA)

    def run() -> None:
        ops.prox_step(
            b.gradients,
            b.gradient,
            b.displacement,
            count=b.samples,
            rho=rho,
            step_size=gamma,
            eta=eta,
            groups=groups,
            x=None if noise is None else b.x,
            noise=noise,
            out=None if noise is None else b.noisy,
            arrivals=b.arrivals if b.x.is_cuda else None,
        )

    return run


def around(runs: list[Any]) -> Any:
    """One call of each: every buffer has left the caches when its turn comes again."""

    def run() -> None:
        for each in runs:
            each()

    return run


def eager_step(b: Buffers) -> None:
    """The same update in place: mean, pull, soft threshold."""
    torch.mean(b.gradients.view(b.batch, b.samples, *b.x.shape[1:]), dim=1, out=b.gradient)
    d = b.displacement
    d.mul_(1 - GAMMA / RHO).add_(b.gradient, alpha=-GAMMA)
    d.sub_(d.clamp(-GAMMA * ETA, GAMMA * ETA))


def eager(b: Buffers, antithetic: bool) -> Any:
    noisy = b.noisy.view(b.batch, b.samples, *b.x.shape[1:])
    half = torch.empty_like(noisy[:, ::2])
    base = torch.empty_like(b.displacement)

    def run() -> None:
        eager_step(b)
        torch.add(b.x, b.displacement, out=base)
        if antithetic:
            half.normal_().mul_(SIGMA)
            torch.add(base.unsqueeze(1), half, out=noisy[:, ::2])
            torch.sub(base.unsqueeze(1), half, out=noisy[:, 1::2])
        else:
            noisy.normal_().mul_(SIGMA).add_(base.unsqueeze(1))

    return run


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device, rounds = arguments.device, 5 if arguments.quick else 25
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
    rows: list[dict[str, Any]] = []
    bandwidth: list[dict[str, Any]] = []
    for dtype in dtypes:
        for name, (batch, samples, features) in SHAPES.items():
            b = Buffers(batch, samples, features, device, dtype)
            bytes_read = b.gradients.numel() * b.gradients.element_size()

            ring = [b]
            while len(ring) * bytes_read < RING:
                ring.append(Buffers(batch, samples, features, device, dtype))
            seconds = interleaved(
                {
                    "fused": fused(b, noise=b.noise(False)),
                    "eager": eager(b, False),
                    "fused antithetic": fused(b, noise=b.noise(True)),
                    "eager antithetic": eager(b, True),
                    "fused tiles": fused(b, noise=b.noise(False), tiles=4),
                    "fused, no noise": around([fused(each, noise=None) for each in ring]),
                    "copy": around([partial(each.copy.copy_, each.gradients) for each in ring]),
                },
                device,
                rounds,
            )
            ms = {k: v * 1e3 for k, v in seconds.items()}
            total = bytes_read * len(ring)
            rate, copied = total / seconds["fused, no noise"], total / seconds["copy"]
            # The step also reads and writes the displacement and the mean.
            traffic = 1 + 4 * b.displacement.element_size() / (samples * b.gradients.element_size())
            size = {"[B,m,d]": name, "dtype": str(dtype).removeprefix("torch.")}
            rows.append(
                {
                    **size,
                    "fused ms": ms["fused"],
                    "/ eager": ms["fused"] / ms["eager"],
                    "antithetic ms": ms["fused antithetic"],
                    "/ independent eager": ms["fused antithetic"] / ms["eager"],
                    "/ antithetic eager": ms["fused antithetic"] / ms["eager antithetic"],
                    "tiles / L1": ms["fused tiles"] / ms["fused"],
                }
            )
            bandwidth.append(
                {
                    **size,
                    "without noise GB/s": rate / 1e9,
                    "copy GB/s": copied / 1e9,
                    "ratio": rate / copied,
                    "ratio of all traffic": rate * traffic / (2 * copied),
                }
            )
    count = 1 << 20
    zeros = torch.zeros(1, 1 << 15, device=device)
    drawn = torch.empty(count, device=device)
    noise = Noise(
        noise_keys(0, torch.zeros(1, dtype=torch.int64, device=device)),
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.ones(1, device=device),
        count // zeros.numel(),
    )
    out = torch.empty(noise.num_samples, zeros.numel(), device=device)
    seconds = interleaved(
        {"ours": lambda: ops.perturb(zeros, None, noise, out=out), "torch": lambda: drawn.normal_()}, device, rounds
    )
    rows += bandwidth
    rows.append(
        {
            "normals": f"{count}",
            "ours ns each": seconds["ours"] / count * 1e9,
            "torch.randn ns each": seconds["torch"] / count * 1e9,
            "ratio": seconds["ours"] / seconds["torch"],
        }
    )
    report("ops", device, rows, arguments.json)


if __name__ == "__main__":
    main()
