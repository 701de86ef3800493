"""The path of solutions over η: from sparse to dense, each solved from where the one before it ended."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from ..capture.runner import Graphs
from ..ops.layout import like_layout, row_chunks, squared_norm, states_like
from .penalties import Penalty
from .problem import Problem, Start
from .samples import NoisyCopies
from .solution import Solution

# Samples of p(0), which gives the eta_max that all ratios share.
_AT_ZERO = 64


def solve_path(
    problem: Problem,
    penalty: Penalty,
    ratios: list[float],
    solver: Any,
    *,
    max_batch: int | None = None,
    graphs: Graphs | None = None,
) -> list[Solution]:
    """The solutions for η = ratio·η_max, in the order of ``ratios``; the largest ratio is solved first, from δ = 0,
    every other one from the solution before it.

    Args:
        problem: the batch; its own penalty does not count.
        penalty: of any strength.
        ratios: ≥ 0.
        solver: with ``solve(problem, max_batch=..., graphs=...)``.
        max_batch: most rows in one pass of the model.
        graphs: captured steps to replay, and to keep.
    """
    batch = problem.keys.shape[0]
    total = states_like(problem.inputs)
    with (graphs or Graphs(False)).steps(problem.score.model, problem.keys.device) as steps:
        for index in row_chunks(batch, max_batch, problem.keys.device):
            some = problem if len(index) == batch else problem.take(index)
            chunk = _AT_ZERO if max_batch is None else min(_AT_ZERO, max(1, max_batch // len(index)))
            part = states_like(some.inputs)
            score = torch.empty_like(some.value, dtype=torch.float64)
            NoisyCopies(some, _AT_ZERO, True, chunk).total(None, part, score, steps)
            for whole, of_some in zip(total, part, strict=True):
                whole[index] = of_some
    p = tuple(t / _AT_ZERO for t in total)
    limit = penalty.eta_max(p)
    square = squared_norm(p)
    displacement = tuple(torch.zeros_like(g) for g in p)
    found: dict[int, Solution] = {}
    for i in sorted(range(len(ratios)), key=lambda i: -ratios[i]):
        eta = torch.full_like(limit, math.inf) if ratios[i] >= 1 else ratios[i] * limit
        strength = tuple(eta.to(g.dtype) for g in p)
        start = Start(displacement, square)
        one = replace(problem, penalty=replace(penalty, eta=strength, relative=False), start=start)
        solution = solver.solve(one, max_batch=max_batch, graphs=graphs)
        if ratios[i] >= 1:
            solution = replace(solution, eta=tuple((ratios[i] * limit).to(g.dtype) for g in p))
        if not found:
            spent = solution.gradient_evaluations + _AT_ZERO
            solution = replace(solution, gradient_evaluations=spent)
        found[i] = solution
        displacement = tuple(like_layout(d, g) for d, g in zip(solution.displacement, p, strict=True))
    return [found[i] for i in range(len(ratios))]
