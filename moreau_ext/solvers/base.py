"""The protocol of a solver: init, schedule, estimate, next, resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .problem import Problem
from .solution import Answer


class Runner(Protocol):
    """Runs the steps of a solver, one by one or as captured graphs; see :mod:`moreau_ext.capture.runner`."""

    def repeat(self, body: Callable[..., None], record: Any, times: int, **options: Any) -> None:
        """``body(record, **options)``, ``times`` times; it changes the tensors of the record in place."""

    def call(self, body: Callable[[Any], Any], record: Any) -> Any:
        """``body(record)``, which changes nothing."""

    def bucket(self, count: int, full: int, elements: int) -> int:
        """The size to pad ``count`` inputs of ``full`` to."""


@dataclass(frozen=True)
class Steps:
    """Equal steps, one after the other.

    Args:
        step: changes the tensors of the iterate in place.
        times: how often.
        options: keyword arguments of ``step``.
    """

    step: Callable[..., None]
    times: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class State:
    """Where a solver is, for some inputs at one level; solvers add to it.

    Args:
        problem: of these inputs, with η and ρ as they are now.
        iterate: the record of tensors that a step changes in place; it may be captured.
        carried: the tensors [B, ...] that inputs take along from level to level, among them ``steps``, int64 [B].
        samples: noisy copies per input and step.
        level: number of levels done.
        evaluations: gradients taken of each input.
    """

    problem: Problem
    iterate: Any
    carried: Any
    samples: int
    level: int = 0
    evaluations: int = 0


@runtime_checkable
class Solver(Protocol):
    """The interface that :func:`moreau_ext.solvers.loop.solve` uses; a frozen record of settings."""

    @property
    def tol(self) -> float:
        """An input leaves once its relative residual is ≤ tol."""

    @property
    def progress(self) -> bool:
        """Whether to show a progress bar."""

    @property
    def rows(self) -> int:
        """Rows of one input in a pass, from which the size of a group of inputs follows."""

    @property
    def budget(self) -> str:
        """The setting that limits the gradients of an input, by its name."""

    def init(self, problem: Problem, runner: Runner) -> State:
        """The state at the start."""

    def schedule(self, state: Any) -> Iterator[Steps]:
        """The steps of one level. Code between two ``yield`` runs between the steps."""

    def estimate(self, state: Any, runner: Runner) -> Answer | None:
        """The current answer of each input, or None if it is too early."""

    def next(self, state: Any, answer: Answer | None) -> Tensor:
        """Samples per step of each input's next level, int64 [B]; 0: done."""

    def resume(self, problem: Problem, carried: Any, last: Any, samples: int) -> State:
        """The state of some inputs at their next level. ``last``: a state that some of them come from."""
