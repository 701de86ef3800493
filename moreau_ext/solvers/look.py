"""Looks at an answer y: fresh gradients at y itself, and whether the scores agree with the gradients seen.

The solver's bound rests on gradients near the answer, and on the variance that they show. Two faults can hide from it.

- The gradient at y is not what the averages over other points suggest. Fresh gradients at y, q = p(y) + ε, measure the
  residual of y without bias: E‖ρS_η(q) − ρS_η(p̄)‖² = ‖y + ρS_η(p(y))‖² + E‖ρS_η(p(y) + ε) − ρS_η(p(y))‖².
- Few samples see a steep step, so no gradient shows it: neither the mean nor its variance. The scores show it, since
  every pair of samples z, −z on either side of the step differs by its height. With f_o(z) = (f(y+σz) − f(y−σz))/2 and
  h(z) = f_o(z) − σp̄·z, Gaussian integration by parts gives E h(z)z = σ(p(y) − p̄), and the expansion of f_o in Hermite
  polynomials, of which degrees 3, 5, ... are left, gives

      E h² ≤ σ²‖p(y) − p̄‖² + σ²·tr V/6,    E h² ≥ σ²‖p(y) − p̄‖²

  with V the variance of one gradient (a pair's mean has half of it, and degree k contributes k times as much to the
  gradient's variance as to the score's). So what E h² exceeds the variance seen by is an error of the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..model.precision import resolution
from ..ops.layout import Tensors, inner, states_like, subtract, total
from .base import Runner
from .bound import DIFFERENCES, sampling_noise
from .problem import Problem
from .samples import GradientSum, NoisyCopies

# Scores that a level keeps, of its last samples. Of n pairs all miss what a pair sees with probability 3/n in one case
# of twenty.
SCORES = 256
# Samples of a block of a look.
BLOCK = 8
# How many times tr V/6 is still taken for variance: E h² comes from few pairs.
_EXPLAINED = 2
# Differences that a variance must rest on to be taken for what all samples have. One rare gradient makes two.
_SPREAD = 16
# Scores are exact to this many spacings of their numbers.
_ROUNDING = 64


def keep_scores(kept: Tensor, scores: Tensor, draw: Tensor) -> None:
    """Writes the scores [B, m] of the samples of one step to their places in ``kept`` [B, SCORES].

    Args:
        draw: int64 [1], the number of the step within its level. m is a power of two: places are never split.
    """
    count = min(scores.shape[1], kept.shape[1])
    first = draw * scores.shape[1] % kept.shape[1]
    kept.index_copy_(1, first + torch.arange(count, device=kept.device), scores[:, :count])


@dataclass
class Look:
    """Fresh gradients at an answer.

    Args:
        gradient: q, their mean.
        squares: Σ m/2·(q_b − q_{b−1})² over blocks of m, per feature.
        sums: float64 [B, 8], see ops.SUMS; those of the differences.
        scores: [B, samples].
        samples: of an input.
    """

    gradient: Tensors
    squares: Tensors
    sums: Tensor
    scores: Tensor
    samples: int


def look(problem: Problem, displacement: Tensors, samples: int, step: int, runner: Runner) -> Look:
    """Fresh gradients at a displacement, in blocks, from which their variance follows.

    Args:
        problem: the inputs.
        displacement: y.
        samples: a multiple of BLOCK, two blocks at least.
        step: of the noise bank, for the first block.
        runner: runs the passes.
    """
    summed, squares, last = states_like(problem.inputs), states_like(problem.inputs), states_like(problem.inputs)
    sums = torch.zeros(problem.batch, len(ops.SUMS), dtype=torch.float64, device=problem.keys.device)
    scores = problem.value.new_empty(problem.batch, samples)
    each = scores.new_empty(problem.batch, BLOCK)
    block = GradientSum(
        NoisyCopies(problem, BLOCK, True, step), displacement, states_like(problem.inputs), sums[:, 0].clone(), each
    )
    for first in range(0, samples, BLOCK):
        runner.repeat(GradientSum.run, block, 1)
        block.copies.step += 1
        scores[:, first : first + BLOCK] = each
        change2 = tuple([((g - p) / BLOCK).square() * (BLOCK / 2) for g, p in zip(block.gradient, last, strict=True)])
        if first > 0:
            norm = total(change2)
            sums[:, DIFFERENCES : DIFFERENCES + 3] += torch.stack([torch.ones_like(norm), norm, norm.square()], dim=1)
        for g, t, s, p, c in zip(block.gradient, summed, squares, last, change2, strict=True):
            t += g
            if first > 0:
                s += c
            p.copy_(g)
    return Look(tuple([t / samples for t in summed]), squares, sums, scores, samples)


def upper_residual2(
    problem: Problem, maps: Tensors, seen: Look, squares: Tensors, sums: Tensor, certainty: float
) -> Tensor:
    """ρ²‖S_η(q) − S_η(p̄)‖² less the noise of q: the squared residual of y = −ρS_η(p̄), moved up; float64 [B].

    Args:
        problem: the problem that y answers.
        maps: S_η(p̄).
        seen: the look at y.
        squares, sums: of differences between gradients, those of the look and of others: the noise follows from them.
        certainty: moved up by this share of the way from the mean of the noise to its 95 % quantile; 1: a 95 % bound
            of residuals that are no larger than the noise.
    """
    image = problem.image(seen.gradient)[0]
    gap = subtract(image, maps)
    count = torch.full_like(problem.value, seen.samples, dtype=torch.float64)
    noise2, quantile2 = sampling_noise(problem, seen.gradient, image, squares, sums, count)
    return problem.rho_of_input.square() * inner(gap, gap) - noise2 + certainty * (quantile2 - noise2)


def unexplained2(
    problem: Problem,
    gradient: Tensors,
    variance: Tensors,
    sums: Tensor,
    scores: Tensor,
    samples: int,
    steps: range,
    first: int,
) -> Tensor:
    """What the scores say ‖p(y) − p̄‖² is at least, beyond what the variance explains; float64 [B].

    Args:
        problem: the inputs.
        gradient: p̄.
        variance: V of one sample's gradient, per feature.
        sums: float64 [B, 8], see ops.SUMS: of the differences that V comes from. A V that rests on few of them, a rare
            gradient, does not explain what all scores say.
        scores: [B, SCORES], where :func:`keep_scores` put them.
        samples: m, of a step.
        steps: numbers of the steps whose scores are there.
        first: the noise bank's step at the beginning of the level.
    """
    kept = min(samples, scores.shape[1])
    copies = NoisyCopies(problem, kept, True)
    squares = torch.zeros_like(problem.value, dtype=torch.float64)
    largest = torch.zeros_like(squares)
    for step in steps:
        copies.step.fill_(first + step)
        along = []
        for chunk, (_, size) in enumerate(copies.chunks):
            parts = []
            for rows, x, g in zip(copies.draw(chunk, None), problem.inputs, gradient, strict=True):
                moved = rows.unflatten(0, (-1, size)) - x[:, None]  # type: ignore[no-untyped-call]  # torch's
                parts.append((moved.double() * g[:, None].double()).reshape(len(x), size, -1).sum(2))
            along.append(torch.stack(parts).sum(0))
        linear = torch.cat(along, 1)
        at = step * samples % scores.shape[1]
        seen = scores[:, at : at + kept].double()
        gap = seen - linear
        squares += ((gap[:, 0::2] - gap[:, 1::2]) / 2).square().sum(1)
        largest = torch.maximum(largest, seen.abs().amax(1))
    pairs = len(steps) * (kept // 2)
    _, once, twice = sums[:, DIFFERENCES : DIFFERENCES + 3].unbind(1)
    spread = (once.square() / twice.clamp_min(torch.finfo(twice.dtype).tiny) / _SPREAD).clamp_max(1)
    explained = spread * sum(s.double().square() * total((v,)) for s, v in zip(problem.sigma, variance, strict=True))
    eps = max(resolution(problem.score.precision, x) for x in problem.inputs)
    excess = (squares / pairs - _EXPLAINED / 6 * explained - (_ROUNDING * eps * largest).square()).clamp_min(0)
    # Without noise in a tensor its gradient is not averaged, and there is nothing to miss.
    sigma = torch.stack([torch.where(s > 0, s.double(), torch.inf) for s in problem.sigma]).amin(0)
    return excess / sigma.square()


def steps_kept(length: int, samples: int) -> range:
    """The steps of a level whose scores :func:`keep_scores` has kept."""
    return range(max(0, length - max(1, SCORES // samples)), length)


def subset(problem: Problem, rows: Tensor) -> Problem:
    """Some of the inputs, or the problem itself for all of them."""
    return problem if len(rows) == problem.batch else problem.take(rows)
