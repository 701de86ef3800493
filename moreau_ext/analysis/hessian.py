"""Products with H = ∇²f_σ(x + δ), the second derivative of the smoothed score.

Two estimates of the same matrix, on a noise bank z_1 .. z_m:

    autograd   H v ≈ (1/m) Σ_i ∇²f(x̃ + σz_i) v                                exact on the bank, if f is smooth
    stein      H v ≈ (1/m) Σ_i ½[g_i (z_i·v) + z_i (g_i·v)]/σ,  g_i = ∇f(x̃ + σz_i)    needs no second derivative

The second is Stein's identity, E[∇f(x̃ + σz) zᵀ] = σ·∇² E f(x̃ + σz), made symmetric. A piecewise linear model (ReLU) has
a zero second derivative almost everywhere, so the first says 0 there and means nothing; the second sees the kinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..model.memory import out_of_memory
from ..model.precision import resolution
from ..model.score import Score
from ..ops.layout import Tensors, flat_rows, like_layout, row_chunks, take
from ..ops.noise import Noise, noise_keys
from ..solvers.problem import Problem

Method = Literal["auto", "autograd", "stein"]

ESTIMATES = ("auto", "autograd", "stein")

# Seeds of the banks that a solver does not see, mixed with its own keys.
_INDEPENDENT, _KINKS, SEED_START = 0x5EED_CE47, 0x5EED_0C1A, 0x5EED_57A7

# Gradients kept between products: 2^26 float32 numbers are 256 MiB. Beyond, they are computed again for every product.
_KEPT = 1 << 26

# Blocks of samples from which the spread within half a bank is estimated.
BLOCKS = 16

# Pairs of noisy copies on which kinks are looked for; the share of a jump's square that may stay unexplained. Measured
# on the zoo: smooth nets miss less than 1e-4 at the median pair, ReLU nets all, and 2e-3 or more under a log-softmax.
_PAIRS, _KINKED = 16, 1e-3

# Gauss-Legendre in three points on each of the four panels of [0, 1]; a node stands for itself and its negative.
_NODES = tuple(
    ((2 * panel + 1 + at) / 8, weight / 8)
    for panel in range(4)
    for at, weight in ((0.0, 8 / 9), (-math.sqrt(0.6), 5 / 9), (math.sqrt(0.6), 5 / 9))
)


def columns(tensors: Tensors, dtype: torch.dtype) -> Tensor:
    """The tensors of a tuple, [n, *features], as one [n, D] in row-major order."""
    return torch.cat([flat_rows(t).to(dtype) for t in tensors], dim=1)


def tensors_of(flat: Tensor, like: Tensors) -> Tensors:
    """The reverse of :func:`columns`: pieces of [n, D], shaped as the tensors of ``like``."""
    pieces = torch.split(flat, [math.prod(x.shape[1:]) for x in like], dim=1)
    return tuple(p.reshape(-1, *x.shape[1:]) for p, x in zip(pieces, like, strict=True))


def common_state(inputs: Tensors) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def independent_keys(keys: Tensor) -> Tensor:
    """Keys of a noise bank that shares no sample with the one of ``keys``, equally a function of seed and id."""
    return noise_keys(_INDEPENDENT, keys)


class Bank:
    """Noisy copies of a problem's inputs at one displacement, chunk by chunk.

    Args:
        problem: the inputs, B of them.
        displacement: δ per tensor, state dtype; None for 0.
        num_samples: m; even where antithetic.
        keys: int64 [B]; :func:`independent_keys` of the problem's by default.
        antithetic: sample 2k + 1 is minus sample 2k, and chunks never part them.
    """

    def __init__(
        self,
        problem: Problem,
        displacement: Tensors | None,
        num_samples: int,
        *,
        keys: Tensor | None = None,
        antithetic: bool = True,
    ) -> None:
        self.problem, self.num_samples, self.antithetic = problem, num_samples, antithetic
        self.dtype = common_state(problem.inputs)
        self.keys = independent_keys(problem.keys) if keys is None else keys
        self.batch = problem.keys.shape[0]
        self.features = sum(math.prod(x.shape[1:]) for x in problem.inputs)
        self.displacement = None
        if displacement is not None:
            self.displacement = tuple(
                like_layout(d.to(ops.state_dtype(x.dtype)), torch.empty_like(x, dtype=ops.state_dtype(x.dtype)))
                for d, x in zip(displacement, problem.inputs, strict=True)
            )
        self._step = torch.zeros(1, dtype=torch.int64, device=problem.keys.device)
        # σ of every column; 1 where there is none, which no formula divides by then.
        sigma = [
            s.to(self.dtype)[:, None].expand(-1, math.prod(x.shape[1:]))
            for s, x in zip(problem.sigma, problem.inputs, strict=True)
        ]
        self.sigma = torch.cat(sigma, dim=1)
        fixed, self._fixed = problem.score.fixed, None
        if fixed is not None:
            self._fixed = torch.cat([flat_rows(mask).expand(self.batch, -1) for mask in fixed.of_rows], dim=1)

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(first sample, count) of pieces that one pass can take, or two samples where it takes but one."""
        most = self.problem.passes.max_rows
        size = stop - start if most is None else max(2, most // self.batch // 2 * 2)
        return ((first, min(size, stop - first)) for first in range(start, stop, size))

    def _draw(self, first: int, count: int, x: Tensors, displacement: Tensors | None, sigma: Tensors) -> Tensors:
        rows, offset = [], 0
        for i, tensor in enumerate(x):
            noise = Noise(self.keys, self._step, sigma[i], count, self.antithetic, offset, first)
            rows.append(ops.perturb(tensor, None if displacement is None else displacement[i], noise))
            offset += tensor[:1].numel()
        return tuple(rows)

    def rows(self, first: int, count: int, scale: float = 1.0) -> Tensors:
        """x + δ + scale·σ·z_i for some of the samples, [B·count, *features]."""
        sigma = tuple(s * scale for s in self.problem.sigma)
        return self._draw(first, count, self.problem.inputs, self.displacement, sigma)

    def normals(self, first: int, count: int) -> Tensor:
        """z_i of some of the samples, [B, count, D]; 0 in fixed features, which have no noise."""
        zeros = tuple(torch.zeros_like(x, dtype=ops.state_dtype(x.dtype)) for x in self.problem.inputs)
        z = self._draw(first, count, zeros, None, tuple(torch.ones_like(s) for s in self.problem.sigma))
        drawn = columns(z, self.dtype).view(self.batch, count, self.features)
        return drawn if self._fixed is None else drawn.masked_fill(self._fixed[:, None], 0.0)

    def _score(self, count: int) -> Score:
        """The score of so many copies of every input."""
        index = torch.arange(self.batch, device=self.problem.keys.device).repeat_interleave(count)
        return self.problem.score.take(index)

    def gradients(self, first: int, count: int) -> Tensor:
        """∇f at some of the noisy copies, [B, count, D]."""
        found = self.problem.passes(Score.gradient, self._score(count), self.rows(first, count))
        return columns(found[1:], self.dtype).view(self.batch, count, self.features)

    def hvps(self, first: int, count: int, vectors: Tensor, scale: float = 1.0) -> Tensor:
        """∇²f·v at some of the noisy copies, [B, count, D], for vectors [B, D] or [B, count, D]."""
        rows = self.rows(first, count, scale)
        each = vectors if vectors.dim() == 3 else vectors.unsqueeze(1).expand(-1, count, -1)
        flat = each.reshape(self.batch * count, self.features).to(self.dtype)
        v = tuple(t.to(r.dtype) for t, r in zip(tensors_of(flat, rows), rows, strict=True))
        found = self.problem.passes(Score.hvp, self._score(count), rows, v)
        return columns(found, self.dtype).view(self.batch, count, self.features)


def find_methods(problem: Problem, displacement: Tensors) -> list[str]:
    """Which estimate of H is right for every input: "autograd", "stein", or "none" where neither is.

    Along an antithetic pair a smooth score obeys ∇f(x̃ + σz) − ∇f(x̃ − σz) = ∫₋₁¹ ∇²f(x̃ + tσz) σz dt. Where 24 points of
    the integral miss more than a thousandth of the left side (in squares, for most of 16 pairs), or the second
    derivative is zero or missing, the gradient jumps, or turns too sharply to tell: "stein". That needs noise; without
    it, "none". Costs 32 gradients and at most 384 second derivatives per input.
    """
    bank = Bank(problem, displacement, 2 * _PAIRS, keys=noise_keys(_KINKS, problem.keys))
    noisy = (bank.sigma > 0).any(1)
    everywhere = (bank.sigma > 0).all(1)
    # A gradient carries a few roundings; a difference of two cannot be judged below them.
    eps = 8 * max(resolution(problem.score.precision, x) for x in problem.inputs)
    curved, explained = torch.zeros_like(noisy), []
    for first, count in bank.chunks(0, 2 * _PAIRS):
        z = bank.normals(first, count)[:, ::2]
        direction = torch.where(noisy[:, None, None], z * bank.sigma[:, None], z)
        both = direction.repeat_interleave(2, dim=1)
        g = bank.gradients(first, count)
        jump = g[:, ::2] - g[:, 1::2]
        integral = torch.zeros_like(jump)
        try:
            for node, weight in _NODES:
                h = bank.hvps(first, count, both, node)
                integral += weight * (h[:, ::2] + h[:, 1::2])
                curved |= (h != 0).flatten(1).any(1)
                if not bool(curved.any()):
                    break  # piecewise linear
        except RuntimeError as error:  # an operation of the model has no second derivative
            if out_of_memory(error):
                raise
            curved = torch.zeros_like(noisy)
            explained.append(torch.zeros_like(jump[:, :, 0], dtype=torch.bool))
            break
        missed = (jump - integral).double().square().sum(2)
        allowed = _KINKED * jump.double().square().sum(2)
        rounding = eps**2 * (g[:, ::2].double().square() + g[:, 1::2].double().square()).sum(2)
        explained.append(missed <= allowed + rounding)
    mostly = torch.cat(explained, dim=1).double().mean(1) >= 0.5
    smooth = curved & (~noisy | mostly)
    return [
        "autograd" if s else "stein" if n else "none" for s, n in zip(smooth.tolist(), everywhere.tolist(), strict=True)
    ]


class SmoothedHessian:
    """H = ∇²f_σ(x + δ) of every input, as products, on a bank that is looked at as two independent halves.

    Args:
        bank: the noisy copies.
        method: "autograd" or "stein".

    Raises:
        ValueError: "stein" where an input has no noise, or a bank of it that is not antithetic.
    """

    def __init__(self, bank: Bank, method: str) -> None:
        self.bank, self.method = bank, method
        if method == "stein":
            flat = ~(bank.sigma > 0).all(1)
            if bool(flat.any()):
                row = int(flat.nonzero()[0])
                raise ValueError(
                    f"method: 'stein' divides by sigma, which is 0 for input id {int(bank.problem.ids[row])}; give "
                    "it noise, or use 'autograd' where the model is smooth"
                )
            if not bank.antithetic:
                raise ValueError("method: 'stein' needs antithetic samples")
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        self._keep = bank.batch * bank.num_samples * bank.features <= _KEPT

    def span(self, half: int | None) -> tuple[int, int]:
        """The samples of one half of the bank (0 or 1), or of all of it (None)."""
        middle = self.bank.num_samples // 4 * 2
        return ((0, middle), (middle, self.bank.num_samples), (0, self.bank.num_samples))[2 if half is None else half]

    def _draw_pairs(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(½(g₊ − g₋), z/σ) of some pairs, [B, pairs, D]: the constant part of ∇f cancels before it can round."""
        g = self.bank.gradients(first, count)
        return (g[:, ::2] - g[:, 1::2]) / 2, self.bank.normals(first, count)[:, ::2] / self.bank.sigma[:, None]

    def _pairs(self, half: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        if not self._keep:
            for chunk in self.bank.chunks(*self.span(half)):
                yield self._draw_pairs(*chunk)
            return
        if self._kept is None:
            self._kept = []
            for h in (0, 1):
                drawn = [self._draw_pairs(*chunk) for chunk in self.bank.chunks(*self.span(h))]
                self._kept.append((torch.cat([g for g, _ in drawn], 1), torch.cat([z for _, z in drawn], 1)))
        yield from self._kept if half is None else (self._kept[half],)

    def product(self, vectors: Tensor, half: int | None = None) -> Tensor:
        """H v, [B, D], for v [B, D]; with one half of the bank, or all of it."""
        v = vectors.to(self.bank.dtype)
        total = torch.zeros_like(v)
        start, stop = self.span(half)
        if self.method == "autograd":
            for first, count in self.bank.chunks(start, stop):
                total += self.bank.hvps(first, count, v).sum(1)
            return total / (stop - start)
        for g, z in self._pairs(half):
            gv, zv = (torch.einsum("bnd,bd->bn", t, v) for t in (g, z))
            total += (torch.einsum("bn,bnd->bd", zv, g) + torch.einsum("bn,bnd->bd", gv, z)) / 2
        return total / ((stop - start) // 2)

    def noise_slope(self, vectors: Tensor) -> Tensor:
        """w·∂p/∂σ for the σ of every tensor, float64 [B, tensors]: how the mean gradient p changes with the noise.

        "autograd": mean (H_i w)·z_i; "stein": mean w·(g_i − p)(‖z_i‖² − d)/σ, both restricted to the tensor's features,
        of which d are free.
        """
        bank, w = self.bank, vectors.to(self.bank.dtype)
        sizes, free = [math.prod(x.shape[1:]) for x in bank.problem.inputs], bank.problem.free
        span = self.span(None)
        if self.method == "autograd":
            total = torch.zeros(bank.batch, len(sizes), dtype=torch.float64, device=w.device)
            for chunk in bank.chunks(*span):
                products = (bank.hvps(*chunk, w) * bank.normals(*chunk)).double().sum(1)
                total += torch.stack([part.sum(1) for part in torch.split(products, sizes, dim=1)], dim=1)
            return total / bank.num_samples
        slopes, squares = [], []
        for chunk in bank.chunks(*span):
            slopes.append(torch.einsum("bnd,bd->bn", bank.gradients(*chunk), w).double())
            z2 = torch.split(bank.normals(*chunk).double().square(), sizes, dim=2)
            squares.append(torch.stack([part.sum(2) for part in z2], dim=2) - free[:, None])
        slope = torch.cat(slopes, dim=1)
        each = (slope - slope.mean(1, keepdim=True))[:, :, None] * torch.cat(squares, dim=1)
        return each.mean(1) / torch.stack([s.double() for s in bank.problem.sigma], dim=1)

    def quadratic_form(self, vectors: Tensor, half: int | None = None) -> tuple[Tensor, Tensor]:
        """(vᵀH v, its standard error from the spread of blocks of samples), float64 [B]."""
        v = vectors.to(self.bank.dtype)
        if self.method == "autograd":
            drawn = (self.bank.hvps(*c, v) for c in self.bank.chunks(*self.span(half)))
            forms = [torch.einsum("bnd,bd->bn", h, v).double() for h in drawn]
        else:
            pairs = ((torch.einsum("bnd,bd->bn", t, v).double() for t in pair) for pair in self._pairs(half))
            forms = [gv * zv for gv, zv in pairs]
        each = torch.cat(forms, dim=1)
        blocks = torch.stack([b.mean(1) for b in each.tensor_split(min(BLOCKS, each.shape[1]), dim=1)], dim=1)
        return each.mean(1), blocks.std(1, correction=1) / math.sqrt(blocks.shape[1])


def by_method(
    problem: Problem,
    displacement: Tensors,
    method: Method,
    *,
    group: Callable[[str], int],
) -> Iterator[tuple[str, Tensor]]:
    """(method, rows) in pieces whose samples one pass can take, ``group(method)`` samples per input."""
    batch, most = problem.batch, problem.passes.max_rows
    names: list[str] = [method] * batch
    if method == "auto":
        size = batch if most is None else max(1, most // (2 * _PAIRS))
        names = []
        for rows in row_chunks(batch, size, problem.keys.device):
            names += find_methods(problem.take(rows), take(displacement, rows))
    for name in ("autograd", "stein", "none"):
        rows = torch.tensor(
            [i for i, n in enumerate(names) if n == name], dtype=torch.int64, device=problem.keys.device
        )
        if len(rows):
            size = len(rows) if most is None else max(1, most // group(name))
            yield from ((name, piece) for piece in torch.split(rows, size))
