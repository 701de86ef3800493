"""Groups of inputs that fit into memory; compaction; progress."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..capture.runner import Steps
from ..model.memory import attempt
from ..ops.layout import row_chunks
from .problem import Problem
from .solution import Solution


def in_groups(
    problem: Problem, rows: int, max_batch: int | None, solve: Callable[[Problem, int | None], Solution]
) -> Solution:
    """Solves a problem in groups of as many inputs as one pass takes.

    Passes that run out of memory are halved by the score. What is held between them belongs to the solver: a group
    that does not fit is solved again in two halves, or alone, with half the rows per pass.

    Args:
        problem: the batch.
        rows: of each input in a pass.
        max_batch: most rows in one pass of the model.
        solve: the solution of a group with so many rows per pass.
    """
    batch, device, limit = problem.keys.shape[0], problem.keys.device, problem.score.limit
    size = batch if max_batch is None else max(1, max_batch // rows)
    todo = [(index, max_batch) for index in reversed(row_chunks(batch, size, device))]
    done = []
    failed = 0
    while todo:
        index, most = todo.pop()
        count = len(index)
        some = problem if count == batch else problem.take(index)
        part = attempt(partial(solve, some, most), device, last=count == 1 and most == 1)
        if part is not None:
            done.append(part)
            continue
        failed = failed or count
        half = max(1, (rows * count if most is None else most) // 2)
        todo += [(piece, half) for piece in reversed(index.tensor_split(2)) if len(piece)]
    if failed:
        limit.say(f"{failed} inputs at once", "half of them, or half the rows in a pass, as often as it took")
    return Solution.concatenate(done)


def filled(alive: Tensor, steps: Steps, full: int, elements: int) -> tuple[Tensor, int]:
    """The rows that are alive, filled up with the first of them to a size that ``steps`` likes; and how many are."""
    keep = alive.nonzero().squeeze(1)
    left = len(keep)
    size = min(steps.size(left, full, elements), len(alive))
    return torch.cat([keep, keep[:1].expand(size - left)]), left


def check_finite(statistics: Tensor, scores: Tensor, ids: Tensor, steps: int | Tensor) -> None:
    """Raises ValueError, naming the inputs, where a step's statistics or scores are not finite. ``steps``: so far."""
    wrong = ~(torch.isfinite(statistics).all(1) & torch.isfinite(scores))
    if bool(wrong.any()):
        which, step = ids[wrong].tolist(), int(torch.as_tensor(steps).max())
        shown = ", ".join(map(str, which[:5])) + (", ..." if len(which) > 5 else "")
        raise ValueError(
            f"model: the gradient or the score for input id {shown} is not finite (seen at step {step}). Likely "
            "causes: overflow in half precision, a square root or logarithm at 0 in the model, or a step_size too "
            "large for this rho"
        )


def progress_bar(steps: int, unit: str = "step") -> Any:
    """A bar on stderr, by tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    return tqdm(total=steps, unit=unit, leave=False)
