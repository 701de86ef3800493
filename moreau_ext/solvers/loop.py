"""The loop of all solvers: groups of inputs that fit into memory, levels, and inputs that leave when they are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..model.memory import may_retry, release
from ..ops.layout import join, row_chunks, take
from .base import Runner, Solver, State
from .problem import Problem
from .solution import Solution, assemble


def solve(problem: Problem, solver: Solver, runner: Runner) -> Solution:
    """Solves a problem in groups of as many inputs as a pass of ``problem.passes`` takes.

    Results agree to the rounding of the model's passes, whatever the groups.

    Args:
        problem: the batch.
        solver: the method.
        runner: runs the steps, captured or not.

    Raises:
        ValueError: the model gave a gradient that is not finite; names the id of the input.
        MemoryError, torch.OutOfMemoryError: not even one row fits.
    """
    bar = _progress_bar(problem.batch) if solver.progress else None
    try:
        return in_groups(problem, solver.rows, partial(_solve_group, solver=solver, runner=runner, bar=bar))
    finally:
        if bar is not None:
            bar.close()


def _solve_group(problem: Problem, solver: Solver, runner: Runner, bar: Any) -> Solution:
    state = solver.init(problem, runner)
    problem = state.problem
    everyone = torch.arange(problem.batch, device=problem.keys.device)
    groups = [_Group(state, everyone, problem.batch)]
    finished: list[tuple[Tensor, Solution]] = []
    while groups:
        # All inputs have taken the same number of gradients when a level ends. Those that take as many samples in the
        # next one go on together, so that a pass is large.
        pieces: dict[int, list[tuple[_Group, Tensor]]] = {}
        for group in groups:
            state = group.state
            for steps in solver.schedule(state):
                runner.repeat(steps.step, state.iterate, steps.times, **steps.options)
            n, iterate = group.count, state.iterate
            check_finite(iterate.statistics[:n], iterate.score[:n], state.problem.ids[:n], state.carried.steps[:n])
            if bar is not None:
                bar.set_postfix_str(f"{state.evaluations} gradients each")
            answer = solver.estimate(state, runner)
            samples = solver.next(state, answer)[: group.count]
            for count in sorted(set(samples.tolist())):
                rows = (samples == count).nonzero().squeeze(1)
                if count or answer is None:
                    pieces.setdefault(count, []).append((group, rows))
                    continue
                solution = assemble(state.problem, answer, steps=state.carried.steps, tol=solver.tol)
                if len(rows) == state.problem.batch:
                    finished.append((group.where, solution))
                else:
                    finished.append((group.where[rows], solution.take(rows)))
                if bar is not None:
                    bar.update(len(rows))
        groups = [_regroup(problem, solver, runner, some, count) for count, some in sorted(pieces.items())]
    # Inputs were done at different times; here they go back to their places.
    if finished[0][0] is everyone:
        return finished[0][1]
    whole = Solution.concatenate([solution for _, solution in finished])
    return whole.take(torch.cat([where for where, _ in finished]).argsort())


@dataclass
class _Group:
    """Inputs that take the same steps.

    Args:
        state: of these inputs; rows beyond ``count`` are copies that pad them to a size with a captured graph.
        where: their positions in the problem.
        count: inputs.
    """

    state: State
    where: Tensor
    count: int


def _regroup(
    problem: Problem, solver: Solver, runner: Runner, pieces: list[tuple[_Group, Tensor]], samples: int
) -> _Group:
    """The inputs of the pieces at their next level."""
    group, rows = pieces[-1]
    count = sum(len(r) for _, r in pieces)
    if len(pieces) == 1 and count == group.count and samples == group.state.samples:
        return group
    size = runner.bucket(count, problem.batch, samples * problem.features)
    # Copies of one of the inputs; nobody reads their results.
    pieces = [*pieces[:-1], (group, torch.cat([rows, rows[-1:].expand(size - count)]))]
    where = torch.cat([g.where[r] for g, r in pieces])
    some: Problem = problem.take(where)
    if problem.tuning is not None:
        rho = join([take(g.state.problem.rho, r) for g, r in pieces])
        penalty = some.penalty
        if problem.tuning.support is not None:
            penalty = replace(penalty, eta=join([take(g.state.problem.penalty.eta, r) for g, r in pieces]))
        some = replace(some, rho=rho, penalty=penalty)
    carried = join([take(g.state.carried, r) for g, r in pieces])
    return _Group(solver.resume(some, carried, group.state, samples), where, count)


def in_groups(problem: Problem, rows: int, solve_group: Callable[[Problem], Solution]) -> Solution:
    """Solves a problem in groups of as many inputs as one pass takes.

    A pass that runs out of memory is halved by ``problem.passes``. What is held between passes belongs to the solver:
    a group that does not fit is solved again in two halves, or alone, with half the rows per pass.

    Args:
        problem: the batch.
        rows: of each input in a pass.
        solve_group: the solution of some of the inputs.
    """
    passes, device = problem.passes, problem.keys.device
    size = problem.batch if passes.max_rows is None else max(1, passes.max_rows // rows)
    todo = row_chunks(problem.batch, size, device)[::-1]
    done: list[Solution] = []
    failed = 0
    while todo:
        index = todo.pop()
        count = len(index)
        some = problem if count == problem.batch else problem.take(index)
        try:
            done.append(solve_group(some))
            continue
        except Exception as error:
            if (count == 1 and passes.max_rows == 1) or not may_retry(error, device):
                raise
        # Out of the except block: the error held the frames of the pass, and they its tensors.
        release(device)
        failed = failed or count
        passes.lower(max(1, (rows * count if passes.max_rows is None else passes.max_rows) // 2))
        # The groups still to come are of the size that failed: all are split, and the limit is lowered once.
        half = max(1, count // 2)
        rest = [index, *reversed(todo)]
        todo = [piece for part in rest for piece in part.split(half)][::-1]  # type: ignore[no-untyped-call]  # torch's
    if failed:
        passes.warn(f"{failed} inputs at once", "half of them, or half the rows in a pass, as often as it took")
    return Solution.concatenate(done)


def check_finite(statistics: Tensor, scores: Tensor, ids: Tensor, steps: Tensor) -> None:
    """Raises ValueError, naming the inputs, where statistics [n, k] or scores [n] are not finite.

    Args:
        statistics, scores: of the last step.
        ids: int64 [n].
        steps: int64 [n], taken so far.
    """
    wrong = ~(torch.isfinite(statistics).all(1) & torch.isfinite(scores))
    if bool(wrong.any()):
        which, step = ids[wrong].tolist(), int(steps.max())
        shown = ", ".join(map(str, which[:5])) + (", ..." if len(which) > 5 else "")
        raise ValueError(
            f"model: the gradient or the score for input id {shown} is not finite (seen at step {step}). Likely "
            "causes: overflow in half precision, a square root or logarithm at 0 in the model, or a step_size too "
            "large for this rho"
        )


def _progress_bar(inputs: int) -> Any:
    """A bar on stderr, by tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    return tqdm(total=inputs, unit="input", leave=False)
