"""Passes of the model in pieces that fit into memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch

from .._errors import MemoryWarning
from ..ops.layout import Tensors
from .memory import may_retry, release
from .score import Score

_GRADIENTS = {Score.gradient: 1, Score.hvp: 2}


class PassRunner:
    """Runs passes of at most ``max_rows`` rows; a pass that runs out of memory is retried at half the size.

    One runner belongs to one call. Results agree to the rounding of the model's passes, whatever the sizes.

    Args:
        max_rows: rows per pass at most; None for no limit.

    Attributes:
        max_rows: the same, lowered to the size that worked.
        lowered: whether it was.
        gradients: rows of the passes done, by the gradients that they took: two for a second derivative.
    """

    def __init__(self, max_rows: int | None = None) -> None:
        self.max_rows = max_rows
        self.lowered = False
        self.gradients = 0
        self._warned = False

    def __call__(self, run: Callable[..., Tensors], score: Score, *rows: Tensors) -> Tensors:
        """``run(score, *rows)``, whose tensors have one row for each of the score's.

        Args:
            run: a method of :class:`Score` that makes one pass, e.g. ``Score.gradient``.
            score: bound to the rows.
            rows: tuples of tensors [n, ...].

        Raises:
            MemoryError: a single row does not fit.
        """
        count, device = rows[0][0].shape[0], rows[0][0].device
        done: list[Tensors] = []
        start = failed = 0
        while start < count or not done:
            size = min(self.max_rows or count, count - start)
            if size == count:
                one = partial(run, score, *rows)
            else:
                piece = slice(start, start + size)
                one = partial(run, score.take(piece), *[tuple([t[piece] for t in some]) for some in rows])
            try:
                done.append(one())
                start += size
                self.gradients += size * _GRADIENTS.get(run, 0)
                continue
            except Exception as error:
                if not may_retry(error, device):
                    raise
            # Out of the except block: the error held the frames of the pass, and they its tensors.
            release(device)
            if size <= 1:
                shapes = ", ".join(str(tuple(t.shape[1:])) for t in rows[0])
                raise MemoryError(
                    f"model: a pass of one input, of shape {shapes}, does not fit into what is free of {device}'s "
                    "memory; free some, give a smaller input or model, or precision='bfloat16'"
                )
            failed = failed or size
            self.lower(size - size // 2)
        if failed:
            self.warn(f"{failed} rows in a pass", f"{self.max_rows}")
        return done[0] if len(done) == 1 else tuple([torch.cat(parts) for parts in zip(*done, strict=True)])

    def lower(self, rows: int) -> None:
        """At most so many from now on."""
        self.lowered = True
        self.max_rows = rows if self.max_rows is None else min(self.max_rows, rows)

    def warn(self, before: str, after: str) -> None:
        """Warns once that memory did not suffice."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"out of memory with {before}; went on with {after}. Results agree to rounding; max_batch= (or 'auto') "
                "with less avoids the failed pass",
                MemoryWarning,
                stacklevel=2,
            )
