"""The path of solutions over η: from sparse to dense, each solved from where the one before it ended."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..ops.layout import inner, like_layout, row_chunks, states_like
from .base import Runner, Solver
from .loop import solve
from .problem import Problem, Start
from .samples import GradientSum, NoisyCopies
from .solution import Solution

# Samples of p(0), which gives the eta_max that all ratios share: twice as many as for a single solution, once a path.
_PATH_AT_ZERO = 64


def solve_path(problem: Problem, ratios: list[float], solver: Solver, runner: Runner) -> list[Solution]:
    """The solutions for η = ratio·η_max, in the order of ``ratios``; the largest ratio is solved first, from δ = 0,
    every other one from the solution before it.

    Args:
        problem: the batch; the strength of its penalty does not count.
        ratios: ≥ 0.
        solver: the method.
        runner: runs the steps; see :func:`moreau_ext.solvers.loop.solve`.
    """
    penalty = problem.penalty
    total = states_like(problem.inputs)
    for index in row_chunks(problem.batch, problem.passes.max_rows, problem.keys.device):
        some = problem if len(index) == problem.batch else problem.take(index)
        score = torch.empty_like(some.value, dtype=torch.float64)
        mean = GradientSum(NoisyCopies(some, _PATH_AT_ZERO, True), None, states_like(some.inputs), score)
        runner.repeat(GradientSum.run, mean, 1)
        for whole, part in zip(total, mean.gradient, strict=True):
            whole[index] = part
    p = tuple(t / _PATH_AT_ZERO for t in total)
    limit = penalty.eta_max(p)
    square = inner(p, p)
    displacement = tuple(torch.zeros_like(g) for g in p)
    found: dict[int, Solution] = {}
    for i in sorted(range(len(ratios)), key=lambda i: -ratios[i]):
        eta = torch.full_like(limit, math.inf) if ratios[i] >= 1 else ratios[i] * limit
        strength = tuple(eta.to(g.dtype) for g in p)
        start = Start(displacement, square)
        one = replace(problem, penalty=replace(penalty, eta=strength, relative=False), start=start)
        solution = solve(one, solver, runner)
        if ratios[i] >= 1:
            solution = replace(solution, eta=tuple((ratios[i] * limit).to(g.dtype) for g in p))
        if not found:
            spent = solution.gradient_evaluations + _PATH_AT_ZERO
            solution = replace(solution, gradient_evaluations=spent)
        found[i] = solution
        displacement = tuple(like_layout(d, g) for d, g in zip(solution.displacement, p, strict=True))
    return [found[i] for i in range(len(ratios))]
