"""Noisy copies of the inputs and the gradients there."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from ..capture.records import READ, SCRATCH
from ..capture.runner import Steps
from ..model.score import Score
from ..ops.layout import Tensors, like_layout, rows_like
from ..ops.noise import Noise
from .problem import Problem


@dataclass(init=False)
class NoisyCopies:
    """The noisy rows of a problem at a displacement, made chunk by chunk in buffers that are used again."""

    inputs: Tensors = field(metadata=READ)
    chunks: list[tuple[int, int]]  # (first sample, samples)
    step: Tensor
    _noise: list[Noise] = field(metadata=READ)
    _scores: dict[int, Score] = field(metadata=READ)
    _rows: dict[int, Tensors] = field(metadata=SCRATCH)

    def __init__(self, problem: Problem, num_samples: int, antithetic: bool, chunk: int) -> None:
        self.inputs = problem.inputs
        self.chunks = [(start, min(chunk, num_samples - start)) for start in range(0, num_samples, chunk)]
        self.step = torch.zeros(1, dtype=torch.int64, device=problem.keys.device)
        self._noise = []
        offset = 0
        for x, sigma in zip(problem.inputs, problem.sigma, strict=True):
            self._noise.append(Noise(problem.keys, self.step, sigma, num_samples, antithetic, offset))
            offset += x[:1].numel()
        batch = problem.keys.shape[0]
        row = torch.arange(batch, device=problem.keys.device)
        self._scores = {size: problem.score.take(row.repeat_interleave(size)) for _, size in self.chunks}
        self._rows = {size: tuple(rows_like(x, batch * size) for x in problem.inputs) for _, size in self.chunks}

    def noise(self, tensor: int, chunk: int) -> Noise:
        return self._noise[tensor].chunk(*self.chunks[chunk])

    def rows(self, chunk: int) -> Tensors:
        return self._rows[self.chunks[chunk][1]]

    def write(self, chunk: int, displacement: Tensors | None) -> None:
        """Draws a chunk of noisy copies into its buffer."""
        for i, (x, out) in enumerate(zip(self.inputs, self.rows(chunk), strict=True)):
            d = None if displacement is None else displacement[i]
            ops.perturb(x, d, self.noise(i, chunk), out=out)

    def gradient(self, chunk: int) -> tuple[Tensor, Tensors]:
        """Scores [B, samples] and gradients at what the buffer of a chunk holds."""
        rows = self.rows(chunk)
        size = self.chunks[chunk][1]
        scores, gradients = self._scores[size].gradient(rows)
        return scores.view(-1, size), tuple(like_layout(g, x) for g, x in zip(gradients, rows, strict=True))

    def chunked_gradients(
        self, displacement: Tensors | None, into: Tensors, score: Tensor, *, drawn: bool = False
    ) -> Tensors:
        """The gradients of the last chunk at a displacement; the sum of those of the chunks before it is written
        ``into`` tensors of the state dtype, the sum of all scores into ``score``, float64 [B]. ``drawn``: the buffer of
        the first chunk holds its noisy copies already."""
        last = len(self.chunks) - 1
        for c in range(last + 1):
            if c or not drawn:
                self.write(c, displacement)
            scores, gradients = self.gradient(c)
            if c == 0:
                torch.sum(scores, 1, dtype=torch.float64, out=score)
            else:
                score += scores.sum(1, dtype=torch.float64)
            if c == last:
                break
            for g, sum_of in zip(gradients, into, strict=True):
                ops.accumulate(g, sum_of, carry=c > 0)
        return gradients

    def total(self, displacement: Tensors | None, into: Tensors, score: Tensor, steps: Steps) -> None:
        """The same with all gradients in the sum."""
        samples = sum(size for _, size in self.chunks)
        elements = samples * sum(x.numel() for x in self.inputs)
        steps.run(_Total.form, _Total(self, displacement, into, score), 1, key=samples, elements=elements)


@dataclass
class _Total:
    """A sum of gradients at a displacement, in place: it may be captured."""

    copies: NoisyCopies
    displacement: Tensors | None = field(metadata=READ)
    into: Tensors
    score: Tensor

    def form(self) -> None:
        gradients = self.copies.chunked_gradients(self.displacement, self.into, self.score)
        for g, sum_of in zip(gradients, self.into, strict=True):
            ops.accumulate(g, sum_of, carry=len(self.copies.chunks) > 1)
