"""Targets: the output that is explained, as indices or as callables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

Target = (
    int
    | Tensor
    | np.ndarray[Any, Any]
    | Sequence[int]
    | Sequence[np.integer[Any]]
    | Sequence[Tensor]
    | Sequence[tuple[int, ...]]
    | Sequence[Callable[[Tensor], Tensor]]
    | Callable[[Tensor], Tensor]
    | None
)


@dataclass(frozen=True)
class InOrder:
    """A callable target whose scores depend on the places of the rows, such as a class or a mask for each input.

    It is called with the outputs of all inputs of the call, in their order: those of some rows in the places of their
    inputs, and the outputs at the inputs themselves elsewhere; once for each copy of an input.

    Args:
        score: output [B, ...] -> [B].
        outputs: at the inputs, [B, ...].
        place: int64 [n], the input that each row is a copy of.
    """

    score: Callable[[Tensor], Tensor]
    outputs: Tensor
    place: Tensor

    def take(self, index: Tensor | slice) -> InOrder:
        """The same for some of the rows."""
        return replace(self, place=self.place[index])

    def scores(self, output: Tensor) -> Tensor:
        """The scores [n] of an output [n, ...]."""
        place = self.place
        order = place.argsort(stable=True)
        first = torch.searchsorted(place[order], place[order])
        copy = torch.empty_like(place)
        copy[order] = torch.arange(len(place), device=place.device) - first
        rows = [(copy == k).nonzero().squeeze(1) for k in range(int(copy.max()) + 1)]
        outputs = self.outputs.to(output.dtype)
        found = [row_scores(self.score, outputs.index_copy(0, place[r], output[r]))[place[r]] for r in rows]
        return torch.cat(found)[torch.cat(rows).argsort()]


@dataclass(frozen=True)
class PerRow:
    """A callable for each input, called with one row of the output: that of its input, or of a noisy copy of it.

    Args:
        scores_of: B callables, row [...] -> one number.
        place: int64 [n], the input that each row is a copy of.
    """

    scores_of: tuple[Callable[[Tensor], Tensor], ...]
    place: Tensor

    def take(self, index: Tensor | slice) -> PerRow:
        """The same for some of the rows."""
        return replace(self, place=self.place[index])

    def scores(self, output: Tensor) -> Tensor:
        """The scores [n] of an output [n, ...].

        Raises:
            ValueError: not one number for a row.
        """
        found = []
        for place, row in zip(self.place.tolist(), output, strict=True):
            score = self.scores_of[place](row)
            if not isinstance(score, Tensor) or score.numel() != 1:
                got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
                raise ValueError(f"target: callable {place} of the list must return one number, got {got}")
            found.append(score.reshape(()))
        return torch.stack(found)


def of_rows(target: Target) -> TypeGuard[Sequence[Callable[[Tensor], Tensor]]]:
    """Whether a target is a list of callables, one per input."""
    return isinstance(target, (list, tuple)) and bool(target) and all(callable(t) for t in target)


def read_target(
    target: Target, batch: int, device: torch.device
) -> Tensor | Callable[[Tensor], Tensor] | PerRow | None:
    """A target before the model has run: indices int64 [B, k], or what makes the scores; None as it is.

    Raises:
        TypeError, ValueError: by name.
    """
    if target is None or callable(target):
        return target
    if not of_rows(target):
        return target_index(target, batch).to(device)
    if len(target) != batch:
        raise ValueError(f"target: expected one callable per input, {batch}, got {len(target)}")
    return PerRow(tuple(target), torch.arange(batch, device=device))


def row_scores(score: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    """The scores [n] of a callable target, checked.

    Raises:
        ValueError: not one score per row.
    """
    return one_each(score(output), output.shape[0])


def one_each(scores: Any, rows: int) -> Tensor:
    """What a callable target returned, [rows], checked."""
    if not isinstance(scores, Tensor) or scores.shape not in ((rows,), (rows, 1)):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"target: the callable must return one score per row, [{rows}], got {got}")
    return scores.reshape(rows)


def target_index(target: Any, batch: int) -> Tensor:
    """A target as int64 [B, k], k indices into the axes behind the batch."""
    if isinstance(target, (bool, np.bool_)):
        raise TypeError(f"target: expected a class index, got {target!r}")
    if isinstance(target, (int, np.integer)):
        return torch.full((batch, 1), int(target), dtype=torch.int64, device="cpu")
    if isinstance(target, tuple):
        return _indices([target], "a tuple").expand(batch, -1)
    if isinstance(target, list) and target and isinstance(target[0], tuple):
        index = _indices(target, "a list of tuples")
    else:
        try:
            values = target if isinstance(target, Tensor) else torch.as_tensor(target, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                "target: expected None, an int, a tensor or array of integers, a list of ints, tuples or callables, a "
                f"tuple, or a callable, got {target!r}"
            ) from None
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            if values.numel():
                raise TypeError(f"target: expected integers, got {values.dtype}")
            values = values.to(torch.int64)
        if values.numel() == 1 and not isinstance(target, list):
            values = values.reshape(())
        if values.dim() > 2 or (values.dim() == 2 and values.shape[1] != 1):
            raise ValueError(f"target: expected shape [{batch}] or [{batch}, 1], got {tuple(values.shape)}")
        index = values.to(torch.int64).reshape(-1, 1)
        if values.dim() == 0:
            index = index.expand(batch, 1)
    if index.shape[0] != batch:
        raise ValueError(f"target: expected one per input, {batch}, got {index.shape[0]}")
    return index


def _indices(tuples: list[Any], what: str) -> Tensor:
    if not all(isinstance(t, tuple) for t in tuples):
        raise TypeError(f"target: expected {what}, got {tuples!r}")
    if any(isinstance(i, bool) or not isinstance(i, (int, np.integer)) for t in tuples for i in t):
        raise TypeError(f"target: expected {what} of integers, got {tuples[0]!r}")
    if len({len(t) for t in tuples}) > 1:
        raise ValueError("target: the tuples of a list must all have the same length")
    return torch.tensor(tuples, dtype=torch.int64, device="cpu")
