"""How fast are the fused operations against the best in-place eager PyTorch, a copy, and torch.randn?

    OMP_NUM_THREADS=1 python benchmarks/bench_ops.py

Prints ratios of interleaved medians. "eager" is the same step from PyTorch's own in-place operations on reused buffers.
Without noise the step is bound by memory: it and a copy go round a ring of buffers that no cache holds, and both rates
are in bytes of gradients per second (a copy also writes as many; the last column counts all traffic of both). The last
table has the adaptive solver's momentum step, again beside PyTorch's own operations.

On a GPU (--device cuda) a roofline comes first: each variant of the step at sizes from 64 MB of gradients on, with the
bytes it must move, its share of the bandwidth of a copy measured beside it, the same update as eager PyTorch and as
torch.compile (noise on the device in both), and without --quick what nvcc says of its kernel; all as replays of CUDA
graphs, so that no call from Python counts. "perturb" draws and writes the same copies without loading gradients: a step
that overlaps both takes the longer of "no noise" and "perturb", one that does not their sum. Then small sizes: called,
as a replay, and as one of 20 steps in a graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import ptxas_table
import sass_table
import torch
from timing import interleaved, parser, replayed, report, save
from torch import Tensor

from moreau_ext import Pixels, Tiles, ops
from moreau_ext.ops import reference
from moreau_ext.ops.noise import Noise, noise_keys

SHAPES = {
    "[64,32,64]": (64, 32, (1, 8, 8)),
    "[16,32,3072]": (16, 32, (3, 32, 32)),
    "[1,32,150528]": (1, 32, (3, 224, 224)),
}
# On a GPU: 308 MB of float32 gradients (half of bfloat16), 134 MB, and 1.2 GB; and sizes that leave it mostly idle.
LARGE = {
    "[16,32,150528]": (16, 32, (3, 224, 224)),
    "[342,32,3072]": (342, 32, (3, 32, 32)),
    "[64,32,150528]": (64, 32, (3, 224, 224)),
}
SMALL = {"[1,32,64]": (1, 32, (1, 8, 8)), "[1,32,3072]": (1, 32, (3, 32, 32)), "[1,8,150528]": (1, 8, (3, 224, 224))}
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


def fused(b: Buffers, *, noise: Noise | None, structure: Tiles | Pixels | None = None) -> Any:
    groups = None if structure is None else structure.partition(b.x, b.state)
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


def compiled(b: Buffers, antithetic: bool | None) -> Any:
    """The same update by torch.compile; None is without noise."""

    @torch.compile(fullgraph=True, dynamic=False)
    def update(gradients: Tensor, displacement: Tensor, gradient: Tensor, x: Tensor, noisy: Tensor) -> None:
        p = gradients.view(b.batch, b.samples, *x.shape[1:]).to(b.state).mean(1)
        v = (1 - GAMMA / RHO) * displacement - GAMMA * p
        d = v - v.clamp(-GAMMA * ETA, GAMMA * ETA)
        gradient.copy_(p)
        displacement.copy_(d)
        if antithetic is None:
            return
        base = (x + d).unsqueeze(1)
        shape = (b.batch, b.samples // 2 if antithetic else b.samples, *x.shape[1:])
        noise = SIGMA * torch.randn(shape, device=x.device, dtype=b.state)
        if antithetic:
            noise = torch.stack((noise, -noise), 2).flatten(1, 2)
        noisy.copy_((base + noise).flatten(0, 1))

    return lambda: update(b.gradients, b.displacement, b.gradient, b.x, b.noisy)


def momentum(device: str, rounds: int) -> list[dict[str, Any]]:
    """A momentum step of the adaptive solver against the same from PyTorch's own operations."""
    rows: list[dict[str, Any]] = []
    over_features = ("y", "y_prev", "x", "x_prev", "gradient", "last_gradient", "last_step")
    for size, (batch, _, features) in SHAPES.items():
        names = (*over_features, "squares", "points", "gradients")
        case: dict[str, Any] = {name: (torch.zeros(batch, *features, device=device),) for name in names}
        case["sums"] = torch.zeros(batch, len(ops.SUMS), dtype=torch.float64, device=device)
        case["statistics"] = torch.zeros(batch, len(ops.STATISTICS), dtype=torch.float64, device=device)
        case |= {"samples": 8, "momentum": 0.5}
        case["arrivals"] = torch.zeros(batch, dtype=torch.int32, device=device)
        runs = {
            "fused": partial(ops.momentum_step, **case),
            "eager": partial(reference.momentum_step, **case),
        }
        called = interleaved(runs, device, rounds)
        fast = called["fused"]
        row: dict[str, Any] = {"momentum [B,m,d]": size, "fused µs": fast * 1e6, "/ eager": fast / called["eager"]}
        if device == "cuda":
            seconds = interleaved({name: replayed(run) for name, run in runs.items()}, device, rounds)
            row |= {"replayed µs": seconds["fused"] * 1e6, "/ eager replayed": seconds["fused"] / seconds["eager"]}
        rows.append(row)
    return rows


def machine_code() -> dict[str, sass_table.Row]:
    """The static table of this GPU's kernels, where its tools are there."""
    sm = "".join(map(str, torch.cuda.get_device_capability()))
    if ptxas_table.nvcc() is None or sass_table.nvdisasm() is None or sm not in sass_table.LIMITS:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        return {r.kernel: r for r in sass_table.rows(ptxas_table.SOURCES / "prox_step.cu", sm, Path(folder))}


def roofline(rounds: int, static: dict[str, sass_table.Row]) -> Iterator[dict[str, Any]]:
    """What each variant moves and how fast, at sizes where memory should be the limit. A graph holds several steps, so
    that what passes between two replays is not counted as a step's."""
    times = 8
    for size, (batch, samples, features) in LARGE.items():
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            torch.compiler.reset()  # one function is compiled for at most eight sizes
            b = Buffers(batch, samples, features, "cuda", dtype)
            plain, pairs, tile = b.noise(False), b.noise(True), Tiles(14 if features[1] % 14 == 0 else 4)
            runs = {
                "no noise": fused(b, noise=None),
                "noise": fused(b, noise=plain),
                "antithetic": fused(b, noise=pairs),
                f"{tile}": fused(b, noise=plain, structure=tile),
                f"{tile} antithetic": fused(b, noise=pairs, structure=tile),
                f"{tile} no noise": fused(b, noise=None, structure=tile),
                "Pixels()": fused(b, noise=plain, structure=Pixels()),
                "perturb": partial(ops.perturb, b.x, b.displacement, plain, out=b.noisy),
                "perturb antithetic": partial(ops.perturb, b.x, b.displacement, pairs, out=b.noisy),
            }
            others = {
                "eager no noise": partial(eager_step, b),
                "eager noise": eager(b, False),
                "eager antithetic": eager(b, True),
                "compile no noise": compiled(b, None),
                "compile noise": compiled(b, False),
                "compile antithetic": compiled(b, True),
                "copy": partial(b.copy.copy_, b.gradients),
            }
            # But for the copy, which as a node of a graph may go another, slower way.
            steps = {n: partial(repeated, run, times) for n, run in {**runs, **others}.items()}
            graphs = {n: run if n == "copy" else replayed(run) for n, run in steps.items()}
            seconds = {n: s / times for n, s in interleaved(graphs, "cuda", rounds).items()}
            stored, state = b.gradients.element_size(), b.displacement.element_size()
            copy = 2 * stored * b.gradients.numel() / seconds["copy"]
            for variant in runs:
                kind = next(k for k in ("no noise", "antithetic", "noise") if k in variant or k == "noise")
                grouped, alone = "(" in variant, "perturb" in variant
                # Gradients, and copies with x; the mean is written, the displacement read and written.
                moved = stored * b.gradients.numel() + 3 * state * b.x.numel()
                if alone:
                    moved = state * b.x.numel()
                if kind != "no noise":
                    moved += stored * (b.gradients.numel() + b.x.numel())
                kernel = "perturb" if alone else "prox_step_group" if grouped else "prox_step"
                code = static.get(f"{kernel}_kernel<{name}, 1>")
                yield {
                    "[B,m,d]": size,
                    "dtype": name,
                    "variant": variant,
                    "MB moved": moved / 1e6,
                    "ms": seconds[variant] * 1e3,
                    "GB/s": moved / seconds[variant] / 1e9,
                    "share of copy": moved / seconds[variant] / copy,
                    "L1's time / its": seconds[kind] / seconds[variant],
                    # Neither knows groups: they are held against the L1 update.
                    "eager / its": seconds[f"eager {kind}"] / seconds[variant],
                    "compile / its": seconds[f"compile {kind}"] / seconds[variant],
                    "registers": code and code.registers,
                    "spilled": code and code.spilled,
                    "occupancy": code and code.occupancy,
                    "loads in flight": code and code.in_flight,
                    "instructions": code and (code.antithetic if kind == "antithetic" else code.independent),
                }


def repeated(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()


def small(rounds: int) -> Iterator[dict[str, Any]]:
    """Microseconds of a step that cannot fill a GPU: called from Python; as a replay of a CUDA graph; and as one of 20
    in a graph, where nothing waits for the launch of a graph: there a solver's step has its own."""
    for size, (batch, samples, features) in SMALL.items():
        torch.compiler.reset()
        b = Buffers(batch, samples, features, "cuda", torch.float32)
        runs = {
            "fused": fused(b, noise=b.noise(True)),
            "tiles": fused(b, noise=b.noise(True), structure=Tiles(4)),
            "eager": eager(b, True),
            "compile": compiled(b, True),
        }
        called = interleaved(runs, "cuda", rounds)
        ways = {"called": called}
        for how, times in (("replayed", 1), ("one of 20", 20)):
            graphs = {name: replayed(partial(repeated, run, times)) for name, run in runs.items()}
            ways[how] = {name: s / times for name, s in interleaved(graphs, "cuda", rounds).items()}
        for how, seconds in ways.items():
            micro = {f"{name} µs": s * 1e6 for name, s in seconds.items()}
            fast = seconds["fused"]
            ratios = {"eager / fused": seconds["eager"] / fast, "compile / fused": seconds["compile"] / fast}
            yield {"[B,m,d]": size, "how": how, **micro, **ratios}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device, rounds = arguments.device, 5 if arguments.quick else 25
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16]
    rows: list[dict[str, Any]] = []
    bandwidth: list[dict[str, Any]] = []
    if device == "cuda":
        # Which takes half a minute and no GPU.
        static = {} if arguments.quick else machine_code()
        for row in chain(roofline(rounds, static), small(rounds)):
            rows.append(row)
            # After each, so that what was measured stays if the rest is cut off.
            save("ops", device, rows, arguments.json)
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
                    "fused tiles": fused(b, noise=b.noise(False), structure=Tiles(4)),
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
    rows += momentum(device, rounds)
    report("ops", device, rows, arguments.json)


if __name__ == "__main__":
    main()
