"""The prepared model and the report of what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Model = Callable[..., object]


@dataclass(frozen=True)
class Lever:
    """What became of one lever. None stands for what was not measured.

    Args:
        name: "copy", "fold_batchnorm", "channels_last", "freeze", "compile" or "max_batch".
        applied: whether :attr:`Prepared.model` has it.
        reason: what was done, or why it was not.
        output_difference: max |o' − o| / max |o| over the checked rows, against the model as it was given.
        gradient_difference: the largest ‖g' − g‖ / ‖g‖ of a row, g the input gradient of one fixed random combination
            of the outputs. Refused is by the median row: a unit that switches within rounding moves single rows.
        time_ratio: seconds of a forward and backward pass with the lever over those without it; for "max_batch" per
            row, over passes of one row.
        memory_ratio: the same for the peak of the tensors alive in a pass.
    """

    name: str
    applied: bool
    reason: str
    output_difference: float | None = None
    gradient_difference: float | None = None
    time_ratio: float | None = None
    memory_ratio: float | None = None

    def __str__(self) -> str:
        numbers = (
            ("output", self.output_difference, ".1e"),
            ("gradient", self.gradient_difference, ".1e"),
            ("time", self.time_ratio, ".2f"),
            ("memory", self.memory_ratio, ".2f"),
        )
        measured = ", ".join(f"{what} {value:{form}}" for what, value, form in numbers if value is not None)
        line = f"{self.name}: {'yes' if self.applied else 'no'}, {self.reason}"
        return f"{line} ({measured})" if measured else line


@dataclass(frozen=True, eq=False, repr=False)
class Prepared:
    """A model made ready for many passes, and how.

    Args:
        model: a copy in eval mode with the weights of that moment; or the model that was given, where the lever "copy"
            says that it could not be copied. It takes inputs in any memory layout.
        max_batch: rows per pass.
        memory_format: what to convert 4-D inputs to, as in ``x.to(memory_format=...)``, because it was measured
            faster; ``torch.preserve_format`` means as they are.
        report: one :class:`Lever` each, in the order in which they were tried.
        row_seconds: (rows per pass, seconds per row) of the chunks that were timed.
        row_bytes: peak of the tensors that a pass of one row makes; None where it could not be measured.
    """

    model: Model
    max_batch: int
    memory_format: torch.memory_format
    report: tuple[Lever, ...]
    row_seconds: tuple[tuple[int, float], ...]
    row_bytes: int | None

    @property
    def used(self) -> list[str]:
        """The levers that the model has, and the rows per pass."""
        levers = [lever.name for lever in self.report if lever.applied and lever.name not in ("copy", "max_batch")]
        return [*levers, f"{self.max_batch} rows per pass"]

    def __repr__(self) -> str:
        return f"Prepared({type(self.model).__name__}: {', '.join(self.used)})"

    def __str__(self) -> str:
        return "\n".join(str(lever) for lever in self.report)
