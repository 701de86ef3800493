"""Passes of the model in pieces that fit into memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from .._errors import BatchWarning, MemoryWarning, MixingError, OutputRowsError, one_line
from ..ops.layout import Tensors, take
from .memory import may_retry, release
from .score import Score

_GRADIENTS = {Score.gradient: 1, Score.hvp: 2}


def _nothing() -> None:
    pass


class PassRunner:
    """Runs passes of at most ``max_rows`` rows; a pass that runs out of memory is retried at half the size.

    One runner belongs to one call. Results agree to the rounding of the model's passes, whatever the sizes.

    Args:
        max_rows: rows per pass at most; None for no limit.
        exact: rows of every pass, for a model that takes no other number; smaller passes are filled up.
        after: called after every pass.

    Attributes:
        max_rows: the same, lowered to the size that worked.
        exact: the same, or what was found when a pass of another size failed.
        lowered: whether it was.
        gradients: rows of the passes done, by the gradients that they took: two for a second derivative.
    """

    def __init__(self, max_rows: int | None = None, *, exact: int | None = None, after: Callable[[], None] = _nothing):
        self.max_rows = max_rows
        self.exact = exact
        self.lowered = False
        self._after = after
        self.gradients = 0
        self._warned = False
        self._worked = 0

    def once(self, run: Callable[..., Tensors], score: Score, *rows: Tensors) -> Tensors:
        """``run(score, *rows)`` in one pass of whatever size."""
        try:
            return run(score, *rows)
        finally:
            self._after()

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
            size = min(self.max_rows or count, self.exact or count, count - start)
            try:
                if size == count and self.exact in (None, size):
                    done.append(self.once(run, score, *rows))
                else:
                    done.append(self._piece(run, score, rows, start, size))
                self._worked = max(self._worked, size)
                start += size
                self.gradients += size * _GRADIENTS.get(run, 0)
                continue
            except MixingError:
                raise
            except Exception as error:
                if not may_retry(error, device):
                    if not self._takes_one_size(run, score, rows, start, size, error):
                        raise
                    continue
            # Out of the except block: the error held the frames of the pass, and they its tensors.
            release(device)
            if size <= 1 or self.exact:
                shapes = ", ".join(str(tuple(t.shape[1:])) for t in rows[0])
                raise MemoryError(
                    f"model: a pass of {'one input' if size <= 1 else f'{self.exact} inputs'}, of shape {shapes}, does "
                    f"not fit into what is free of {device}'s memory; free some, give a smaller input or model, or "
                    "precision='bfloat16'"
                )
            failed = failed or size
            self.lower(size - size // 2)
        if failed:
            self.warn(f"{failed} rows in a pass", f"{self.max_rows}")
        return done[0] if len(done) == 1 else tuple([torch.cat(parts) for parts in zip(*done, strict=True)])

    def _piece(
        self, run: Callable[..., Tensors], score: Score, rows: tuple[Tensors, ...], start: int, size: int
    ) -> Any:
        """A pass of some rows, filled up with the last of them to ``exact``."""
        if self.exact in (None, size):
            piece = slice(start, start + size)
            return self.once(run, score.take(piece), *[tuple([t[piece] for t in some]) for some in rows])
        index = torch.arange(start, start + self.exact, device=rows[0][0].device).clamp_max(start + size - 1)
        found = self.once(run, score.take(index), *[take(some, index) for some in rows])
        return tuple([t[:size] for t in found])

    def _takes_one_size(
        self, run: Callable[..., Tensors], score: Score, rows: tuple[Tensors, ...], start: int, size: int, error: Any
    ) -> bool:
        """Whether the model takes passes of one row, or of as many as have worked, and of no other size; ``exact`` is
        that size then.

        Raises:
            ValueError: it does, and treats the rows of a pass by their position.
        """
        device, left = rows[0][0].device, rows[0][0].shape[0] - start
        captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if isinstance(error, torch.AcceleratorError) or (isinstance(error, OutputRowsError) and not error.folded):
            return False
        if self.exact or captured:
            return False
        for exact in sorted({1, self._worked} - {0, size}):
            last = start + min(exact, left) - 1
            index = torch.arange(start, start + exact, device=device).clamp_max(last)
            try:
                # In the second pass other rows are in the places of all but the last.
                one, other = (
                    self.once(run, score.take(i), *[take(some, i) for some in rows])[0]
                    for i in (index, torch.full_like(index, last))
                )
            except Exception:  # neither does it take so many
                continue
            if not torch.allclose(other.double(), one[last - start].double().expand_as(other), 1e-2, 1e-6, True):
                raise ValueError(
                    f"model: fails on {size} rows ({one_line(error)[:200]}), and gives the rows of a pass of {exact} "
                    "outputs that depend on their places. Likely causes: something for each input that the model holds "
                    "itself (give it in additional_forward_args); an argument in additional_forward_args that follows "
                    "the inputs along another axis than its first (give the state of an LSTM as [B, layers, H], and "
                    "transpose it in the model)"
                ) from error
            self.exact = exact
            warnings.warn(
                f"the model does not take {size} rows in a pass ({one_line(error)[:200]}); its passes are of {exact}",
                BatchWarning,
                stacklevel=2,
            )
            return True
        if score.args:
            error.add_note(
                "If it is about the number of inputs: tensors in additional_forward_args whose first axis is the batch "
                "follow the inputs; moreau_ext.PerInput and moreau_ext.Shared say which others do"
            )
        return False

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
