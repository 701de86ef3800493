"""Noisy copies of the inputs, and the gradients there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..model.passes import PassRunner
from ..model.score import Score
from ..ops.layout import Tensors, like_layout, over_features, rows_like, tensor_of
from ..ops.noise import Noise
from .problem import Problem


@dataclass(init=False)
class NoisyCopies:
    """The noisy copies x + δ + σ·z of a problem's inputs, drawn chunk by chunk.

    Args:
        problem: the inputs.
        num_samples: copies of each input.
        antithetic: sample 2k + 1 is minus sample 2k.
        step: of the noise bank, with which the first copies are drawn.

    Attributes:
        inputs: x.
        passes: runs the passes of the model.
        step: int64 [1], the step of the noise bank; advanced in place.
        chunks: (first sample, samples) of each pass.
    """

    inputs: Tensors
    passes: PassRunner
    step: Tensor
    chunks: list[tuple[int, int]]
    _noise: list[Noise]
    _scores: dict[int, Score]

    def __init__(self, problem: Problem, num_samples: int, antithetic: bool, step: int = 0) -> None:
        batch, device = problem.keys.shape[0], problem.keys.device
        # Every input has an equal share of the rows of a pass.
        chunk = (
            num_samples
            if problem.passes.max_rows is None
            else min(num_samples, max(1, problem.passes.max_rows // batch))
        )
        if antithetic:
            # The variance is that of pairs. A pass of fewer rows is split where it is run.
            chunk = max(2, chunk // 2 * 2)
        self.chunks = [(start, min(chunk, num_samples - start)) for start in range(0, num_samples, chunk)]
        self.step = torch.full((1,), step, dtype=torch.int64, device=device)
        self.inputs, self.passes = problem.inputs, problem.passes
        self._noise = []
        offset = 0
        for x, sigma in zip(problem.inputs, problem.sigma, strict=True):
            self._noise.append(Noise(problem.keys, self.step, sigma, num_samples, antithetic, offset))
            offset += x[:1].numel()
        row = torch.arange(batch, device=device)
        self._scores = {size: problem.score.take(row.repeat_interleave(size)) for _, size in self.chunks}

    def noise(self, tensor: int, chunk: int) -> Noise:
        """The noise of one chunk for one tensor of the inputs."""
        return self._noise[tensor].chunk(*self.chunks[chunk])

    def draw(self, chunk: int, displacement: Tensors | None) -> Tensors:
        """The copies of a chunk, [B·samples, *features]."""
        drawn = []
        for i, x in enumerate(self.inputs):
            out = rows_like(x, x.shape[0] * self.chunks[chunk][1])
            ops.perturb(x, None if displacement is None else displacement[i], self.noise(i, chunk), out=out)
            drawn.append(out)
        return tuple(drawn)

    def gradient(self, chunk: int, rows: Tensors) -> tuple[Tensor, Tensors]:
        """Scores [B, samples] and gradients at the copies of a chunk, laid out as these."""
        size = self.chunks[chunk][1]
        scores, *found = self.passes(Score.gradient, self._scores[size], rows)
        return scores.view(-1, size), tuple([like_layout(g, x) for g, x in zip(found, rows, strict=True)])

    @property
    def pairs(self) -> bool:
        """Whether the two samples of every pair z, −z are in one chunk."""
        return self._noise[0].antithetic and all(size % 2 == 0 for _, size in self.chunks)

    def _squares(self, gradients: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """Σ g² over the samples of a chunk, or Σ ((g₊ + g₋)/2)² over its pairs; [B, *features]."""
        each: Tensor = gradients.unflatten(0, (-1, size))  # type: ignore[no-untyped-call]  # torch's
        if self.pairs:
            each = (each[:, 0::2] + each[:, 1::2]) / 2
        squares: Tensor = each.to(dtype).square().sum(1)
        return squares

    def variance(self, squares: Tensors, mean: Tensors) -> tuple[Tensors, int]:
        """V of one sample's gradient, such that V/m is that of the mean of m, and its degrees of freedom.

        NaN of a single sample or pair.

        Args:
            squares: as :meth:`gradients` wrote them.
            mean: the mean gradient of the same samples.
        """
        samples = sum(size for _, size in self.chunks)
        of_one = 2 if self.pairs else 1
        count = samples // of_one
        scale = of_one / (count - 1) if count > 1 else torch.nan
        found = [((s - count * p.square()) * scale).clamp_min(0) for s, p in zip(squares, mean, strict=True)]
        still = [n.sigma is not None and tensor_of(n.sigma) == 0 for n in self._noise]
        return tuple(
            [
                torch.where(over_features(torch.as_tensor(none, device=v.device), v), 0.0, v)
                for v, none in zip(found, still, strict=True)
            ]
        ), count - 1

    def gradients(
        self,
        displacement: Tensors | None,
        into: Tensors,
        score: Tensor,
        first: Tensors | None = None,
        each: Tensor | None = None,
        squares: Tensors = (),
    ) -> Tensors:
        """The gradients of the last chunk at a displacement.

        Args:
            displacement: δ; None for 0.
            into: state dtype; the sum of the gradients of the chunks before the last is written here.
            score: float64 [B]; the sum of all scores is written here.
            first: the copies of the first chunk, where they are drawn already.
            each: [B, samples]; the score of every sample is written here.
            squares: state dtype; the sum of the squared gradients is written here, of pairs where samples are pairs.
        """
        last = len(self.chunks) - 1
        for chunk in range(last + 1):
            rows = first if first is not None and chunk == 0 else self.draw(chunk, displacement)
            scores, gradients = self.gradient(chunk, rows)
            if each is not None:
                start, size = self.chunks[chunk]
                each[:, start : start + size] = scores
            for total, g in zip(squares, gradients, strict=bool(squares)):
                added = self._squares(g, self.chunks[chunk][1], total.dtype)
                total.copy_(added if chunk == 0 else total + added)
            if chunk == 0:
                torch.sum(scores, 1, dtype=torch.float64, out=score)
            else:
                score += scores.sum(1, dtype=torch.float64)
            if chunk < last:
                for g, total in zip(gradients, into, strict=True):
                    ops.accumulate(g, total, carry=chunk > 0)
        return gradients


@dataclass
class GradientSum:
    """The sum of the gradients at one displacement, in place: it may be captured.

    ``run`` writes the sum of the gradients to ``gradient`` and that of the scores, float64 [B], to ``score``; the score
    of every sample to ``each``, [B, samples], and the sum of the squares to ``squares``, where they are given.
    """

    copies: NoisyCopies
    displacement: Tensors | None
    gradient: Tensors
    score: Tensor
    each: Tensor | None = None
    squares: Tensors = ()

    def run(self) -> None:
        last = self.copies.gradients(self.displacement, self.gradient, self.score, each=self.each, squares=self.squares)
        for g, total in zip(last, self.gradient, strict=True):
            ops.accumulate(g, total, carry=len(self.copies.chunks) > 1)
