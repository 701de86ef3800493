"""Model passes: their results, their differences, their memory."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model.memory import BLIND_ROWS, BytesAlive, Footprint, measure_footprint, out_of_memory, same_random_numbers
from ..model.precision import Precision
from ..model.score import Score
from ..ops.layout import Tensors
from .report import Model

# Rows that a lever is checked on: the example's first ones, filled up with noisy copies.
_LEAST_ROWS, _MOST_ROWS = 8, 16

_NOISE = 0.1  # of each row's range: the explainers' own default


def again(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    for part in made.modules():
        # The flag alone: train() may be overridden to do more.
        part.training = False
    return made


class Rows:
    """What the passes run on: rows of the example, and noisy copies of them as the explainers make them."""

    def __init__(self, inputs: Tensors, args: tuple[Any, ...], per_row: tuple[bool, ...], precision: Precision) -> None:
        self.inputs, self.args, self.per_row, self.precision = inputs, args, per_row, precision
        self.batch = inputs[0].shape[0]
        self.device = inputs[0].device
        self._weights: dict[tuple[int, ...], Tensor] = {}

    def take(self, count: int, start: int = 0) -> tuple[Tensors, tuple[Any, ...]]:
        """Rows start .. start + count: the example's own, then noisy copies of them in turn."""
        number = torch.arange(start, start + count, device=self.device)
        index = number % self.batch
        noisy = number >= self.batch
        taken = []
        for i, x in enumerate(self.inputs):
            rows = _take_rows(x, index)
            generator = torch.Generator("cpu").manual_seed(1_000_003 * i + start)
            # Device and dtype said, because their defaults are the user's to change.
            noise = torch.randn(rows.shape, generator=generator, device="cpu", dtype=torch.float32)
            noise = noise.to(device=x.device, dtype=x.dtype)
            flat = rows.reshape(count, -1)
            scale = _NOISE * (flat.amax(1) - flat.amin(1)) * noisy
            rows += noise.mul_(scale.reshape(-1, *(1,) * (x.dim() - 1)))
            taken.append(rows)
        args = tuple(a[index] if per else a for a, per in zip(self.args, self.per_row, strict=True))
        return tuple(taken), args

    def in_format(self, layout: torch.memory_format) -> Rows:
        """The same rows, 4-D ones in another layout."""
        inputs = tuple(x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in self.inputs)
        return Rows(inputs, self.args, self.per_row, self.precision)

    def run(
        self, model: Model, inputs: Tensors, args: tuple[Any, ...], precision: Precision | None = None
    ) -> tuple[Tensor, Tensors]:
        """The output, and the gradient of one combination of its numbers: a sum would be flat for a softmax."""
        seen: list[Tensor] = []

        def combine(output: Tensor) -> Tensor:
            seen.append(output.detach())
            flat = output.reshape(output.shape[0], -1)
            flat = flat if flat.dtype == torch.float64 else flat.float()
            key = (flat.shape[1],)
            if key not in self._weights:
                generator = torch.Generator("cpu").manual_seed(0)
                drawn = torch.randn(key, generator=generator, device="cpu", dtype=torch.float64)
                self._weights[key] = drawn.to(device=flat.device, dtype=flat.dtype)
            return flat @ self._weights[key]

        score = Score(model, "logit", combine, args, self.per_row, "zero", precision or self.precision)
        gradients = score.gradient(inputs)[1:]
        return seen[0], gradients

    def timed(self, model: Model, count: int) -> Callable[[], float]:
        """Seconds of one pass of ``count`` rows."""
        inputs, args = self.take(count)

        def run() -> float:
            _wait(self.device)
            start = time.perf_counter()
            self.run(model, inputs, args)
            _wait(self.device)
            return time.perf_counter() - start

        return run


def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] in the layout of x, which indexing does not promise."""
    rows = x[index]
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return rows.contiguous(memory_format=torch.channels_last) if last else rows.contiguous()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def results(model: Model, rows: Rows, chunk: int) -> tuple[Tensor, Tensors]:
    """Outputs and gradients of the rows that levers are checked on, as float64."""
    count = min(max(rows.batch, _LEAST_ROWS), _MOST_ROWS)
    with same_random_numbers(rows.device):
        pieces = (rows.take(min(chunk, count - start), start) for start in range(0, count, chunk))
        found = [rows.run(model, *piece, "float32") for piece in pieces]
    outputs = torch.cat([output for output, _ in found]).double().flatten(1)
    gradients = zip(*(gradient for _, gradient in found), strict=True)
    return outputs, tuple(torch.cat(each).double().flatten(1) for each in gradients)


def _difference(before: Tensor, after: Tensor) -> Tensor:
    """after − before; what is infinite or NaN in the same places does not differ, elsewhere it does without bound."""
    difference = after - before
    same = (before == after) | (before.isnan() & after.isnan())
    return torch.where(same, 0.0, torch.where(difference.isnan(), math.inf, difference))


def compare(before: tuple[Tensor, Tensors], after: tuple[Tensor, Tensors]) -> tuple[float, float, float]:
    """Differences relative to scale: of the outputs, of the gradient's largest row, of its median row."""
    if before[0].shape != after[0].shape:
        return math.inf, math.inf, math.inf

    def ratio(part: Tensor, whole: Tensor) -> Tensor:
        return torch.where(part == 0, 0.0, part / whole)

    scale = before[0].nan_to_num(0.0, 0.0, 0.0).abs().amax()
    output = float(ratio(_difference(before[0], after[0]).abs().amax(), scale))
    worst = median = 0.0
    for one, other in zip(before[1], after[1], strict=True):
        norms = one.nan_to_num(0.0, 0.0, 0.0).norm(dim=1)
        # A row whose gradient is all rounding has no scale of its own.
        each = ratio(_difference(one, other).norm(dim=1), norms.clamp_min(1e-6 * float(norms.amax())))
        worst, median = max(worst, float(each.amax())), max(median, float(each.median()))
    return output, worst, median


def peak_bytes(model: Model, rows: Rows, count: int) -> int | None:
    """Peak of the tensors in one pass of ``count`` rows, or None for a model that does not run under the counter."""
    inputs, args = rows.take(count)
    counter = BytesAlive()
    try:
        with same_random_numbers(rows.device), counter:
            rows.run(model, inputs, args)
    except Exception as error:
        if out_of_memory(error):
            raise
        # If it is the model that fails and not the counter, this says so.
        rows.run(model, inputs, args)
        return None
    return max(1, counter.peak)


def footprint_of_rows(model: Model, rows: Rows) -> Footprint | None:
    """What passes take, or None for a model that does not run under the counter."""
    return measure_footprint(lambda count: rows.run(model, *rows.take(count)), rows.device)


def rows_that_fit(taken: Footprint | None, budget: int) -> int:
    """Rows per pass that the budget holds, one at least."""
    return BLIND_ROWS if taken is None else max(1, (budget - taken.fixed) // taken.per_row)
