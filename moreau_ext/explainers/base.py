"""The base of all explainers: check, pose the problem, solve, give the maps in the form of the inputs."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from .. import ops
from .._checks import check_count
from .._errors import EmptyMapWarning
from ..model.bind import resolved, unresolved
from ..model.memory import BLIND_ROWS, Footprint, budget
from ..model.modes import evaluating
from ..model.passes import PassRunner
from ..model.precision import Precision, check_precision
from ..model.score import Score, ScoreName, UnusedInputs, check_score_settings
from ..model.target import Target
from ..ops.layout import Tensors, flat_rows
from ..ops.noise import noise_keys
from ..preparation.report import Prepared
from ..solvers.penalties import L1, Penalty
from ..solvers.problem import Problem, Tuning
from ..solvers.solution import Solution
from .inputs import check_ids, check_inputs, empty_solution, in_form
from .settings import Scalar, check_scalar, per_feature, per_input_setting

_lowering = threading.Lock()

# Noisy inputs per pass at most: enough to fill small models.
_MAX_BATCH = 1024

# Maps that are held for each row of a pass and each input of a call, beside what the model makes in the pass. Measured:
# 3.5 a row and 5.9 an input by the adaptive solver, 9.7 and 4.3 by Gradient, whose every row is an input.
_PER_ROW, _PER_INPUT = 10, 7


def _kind(score: Score, inputs: Tensors) -> tuple[Any, ...]:
    """Equal for calls whose passes take equal memory."""
    tensors = [(x.shape[1:], x.dtype, x.device) for x in inputs]
    args = [a.shape[per:] for a, per in zip(score.args, score.per_row, strict=True) if isinstance(a, Tensor)]
    return (*tensors, *args)


@dataclass(frozen=True, eq=False)
class Explainer(ABC):
    """What all explainers share: checking, and leaving the model as it was found.

    An explainer is a frozen record of settings. A call's state is its own, so threads may share one; what calls share,
    the rows that fit and the captured steps, is guarded.
    """

    model: Callable[..., Any] | Prepared
    score: ScoreName = field(default="logit", kw_only=True)
    max_batch: int | Literal["auto"] | None = field(default="auto", kw_only=True)
    unused_inputs: UnusedInputs = field(default="raise", kw_only=True)
    precision: Precision = field(default="float32", kw_only=True)
    # Maps that are held whatever the rows and inputs.
    _held: ClassVar[int] = 0
    # Rows per pass by the kind of inputs: those that fit by measure, or were found to by failing with more.
    _fits: dict[Any, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, Prepared) and not callable(self.model):
            raise TypeError(f"model: expected a callable, got {type(self.model).__name__}")
        if self.max_batch == "auto" and isinstance(self.model, Prepared):
            object.__setattr__(self, "max_batch", self.model.max_batch)
        if self.max_batch is not None and self.max_batch != "auto":
            check_count("max_batch", self.max_batch)
            object.__setattr__(self, "max_batch", int(self.max_batch))  # numpy's too
        check_score_settings(self.score, self.unused_inputs)
        check_precision(self.precision)

    @property
    def _module(self) -> Callable[..., Any]:
        """What is run: the model, or the prepared copy of it."""
        return self.model.model if isinstance(self.model, Prepared) else self.model

    def footprint(self, inputs: Any, additional_forward_args: Any = None) -> Footprint | None:
        """What :meth:`attribute` takes on such inputs, measured by passes of one and of two rows of the first.

        ``footprint(x).peak(rows, inputs)`` predicts, from above, the bytes of the tensors that a call with so many
        inputs and rows per pass (``max_batch``) makes and has alive at once; weights and inputs not counted, and
        nothing of what kernels take inside.

        Args:
            inputs, additional_forward_args: as in :meth:`attribute`; at least one input.

        Returns:
            None for a model that does not run under the counter (torch.compile's do not).

        Raises:
            ValueError, TypeError: see :meth:`attribute`; no inputs.

        Example:
            >>> import torch
            >>> from moreau_ext import MoreauGrad
            >>> taken = MoreauGrad(torch.nn.Linear(3, 2).eval()).footprint(torch.rand(8, 3))
            >>> taken.peak(rows=64, inputs=8) < taken.peak(rows=1024, inputs=8)
            True
        """
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._checked(inputs)
            if tensors[0].shape[0] == 0:
                raise ValueError("inputs: expected at least one to measure passes with, got none")
            with evaluating(self._module):
                return self._footprint(self._unresolved(tensors, None, additional_forward_args), tensors)

    def rows_per_pass(self, inputs: Any, additional_forward_args: Any = None) -> int | None:
        """``max_batch`` as it comes out for such inputs; None for no limit."""
        if self.max_batch != "auto":
            return self.max_batch
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._checked(inputs)
            with evaluating(self._module):
                return self._fit(self._unresolved(tensors, None, additional_forward_args), tensors)

    def _footprint(self, score: Score, inputs: Tensors) -> Footprint | None:
        found = score.footprint(inputs)
        state = sum(x[:1].numel() * ops.state_dtype(x.dtype).itemsize for x in inputs)
        return found and Footprint(
            found.fixed + self._held * state, found.per_row + _PER_ROW * state, _PER_INPUT * state
        )

    def _fit(self, score: Score, inputs: Tensors) -> int:
        """Rows per pass for max_batch="auto": measured once for inputs and arguments of one kind."""
        kind = _kind(score, inputs)
        if inputs[0].shape[0] == 0:
            return _MAX_BATCH  # there is nothing to measure
        if kind not in self._fits:
            found = self._footprint(score, inputs)
            fitting = BLIND_ROWS if found is None else found.rows(budget(inputs[0].device))
            self._fits.setdefault(kind, min(_MAX_BATCH, fitting))
        return self._fits[kind]

    def _passes(self, score: Score, inputs: Tensors) -> PassRunner:
        """The passes of one call; a size that an earlier call found not to fit is not tried again."""
        rows = self._fit(score, inputs) if self.max_batch == "auto" else self.max_batch
        known = self._fits.get(_kind(score, inputs))
        return PassRunner(rows if known is None else min(known, rows or known))

    def _remember(self, problem: Problem) -> None:
        """Keeps the size of passes that worked, where some did not fit; another thread may have found less."""
        rows, kind = problem.passes.max_rows, _kind(problem.score, problem.inputs)
        if problem.passes.lowered and rows is not None:
            with _lowering:
                self._fits[kind] = min(rows, self._fits.get(kind, rows))

    def _checked(self, inputs: Any) -> Tensors:
        layout = self.model.memory_format if isinstance(self.model, Prepared) else torch.preserve_format
        return check_inputs(inputs, self._module, self.precision, layout)

    def _unresolved(self, tensors: Tensors, target: Target, additional_forward_args: Any) -> Score:
        settings = (self.score, additional_forward_args, self.unused_inputs, self.precision)
        return unresolved(self._module, tensors, target, *settings)

    def pose(self, inputs: Tensors, target: Target, additional_forward_args: Any, ids: Tensor) -> Problem:
        """The problem of checked inputs; an explainer replaces the fields that its settings decide.

        Runs the model once, which must be in eval mode.

        Args:
            inputs: at least one, owned by the call.
            target, additional_forward_args: see :meth:`attribute`.
            ids: int64 [B].
        """
        score = self._unresolved(inputs, target, additional_forward_args)
        passes = self._passes(score, inputs)
        score, value = resolved(score, inputs, passes)
        return Problem(
            inputs=inputs,
            score=score,
            value=value,
            ids=ids,
            keys=ids,
            sigma=tuple([per_input_setting("sigma", 0.0, x) for x in inputs]),
            rho=tuple([per_input_setting("rho", 1.0, x) for x in inputs]),
            passes=passes,
        )

    @abstractmethod
    def _solve(self, problem: Problem) -> Solution:
        """The solution of a batch that has at least one input."""

    @contextmanager
    def _posed(
        self, inputs: Any, target: Target, additional_forward_args: Any, ids: Tensor | None
    ) -> Iterator[tuple[Tensors, Problem | None]]:
        """The checked inputs of a call and their problem, with the model in eval mode; no problem for no inputs."""
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._checked(inputs)
            names = check_ids(ids, tensors[0].shape[0], tensors[0].device)
            if tensors[0].shape[0] == 0:
                yield tensors, None
                return
            with evaluating(self._module, depth=3):
                problem = self.pose(tensors, target, additional_forward_args, names)
                try:
                    yield tensors, problem
                finally:
                    self._remember(problem)

    def problem(
        self, inputs: Any, target: Target = None, additional_forward_args: Any = None, *, ids: Tensor | None = None
    ) -> Problem:
        """The problem that :meth:`attribute` solves, with settings that are measured or follow the solution still open.

        A value: inputs, score, σ, ρ, penalty, noise keys. Its passes run the model as it is then: leave it in eval
        mode.

        Args:
            inputs, target, additional_forward_args, ids: see :meth:`attribute`; at least one input.

        Raises:
            ValueError, TypeError: see :meth:`attribute`; no inputs.

        Example:
            >>> import torch
            >>> from moreau_ext import MoreauGrad
            >>> problem = MoreauGrad(torch.nn.Linear(3, 2).eval(), rho=0.5).problem(torch.rand(8, 3), target=1)
            >>> problem.rho[0][0], problem.score.target[0]
            (tensor(0.5000), tensor([1]))
        """
        with self._posed(inputs, target, additional_forward_args, ids) as (_, problem):
            if problem is None:
                raise ValueError("inputs: expected at least one, got none")
            return problem

    @overload
    def attribute(
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        ids: Tensor | None = None,
        return_solution: Literal[False] = False,
    ) -> Any: ...

    @overload
    def attribute(
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        ids: Tensor | None = None,
        return_solution: Literal[True],
    ) -> Solution: ...

    def attribute(
        self,
        inputs: Any,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        ids: Tensor | None = None,
        return_solution: bool = False,
    ) -> Any:
        """The maps of a batch.

        Args:
            inputs: a tensor [B, *features], or a tuple of them, of floating point; any rank >= 1. Each input's map is
                its own: it does not depend on the batch beyond the rounding of the model's passes. A model that mixes
                the inputs of a batch (batch statistics, contrastive heads) is not supported.
            target: what to explain: None (the predicted class; the output itself where there is one per input), an
                int, a tensor or array [B] or [B, 1], a list of B ints or of B tuples, one tuple (outputs of higher
                rank), or a callable output -> [B].
            additional_forward_args: passed to the model after the inputs; tensors whose first axis is B follow the
                inputs.
            ids: int64 [B], each input's name to the noise bank; its position by default. Give them when you split a
                data set into batches, and an input draws the same noise in any of them.
            return_solution: return a :class:`Solution` instead of the maps alone.

        Returns:
            The maps, in the form, shape, dtype and device of ``inputs``; or the Solution.

        Raises:
            ValueError: NaN or infinity in an input, a target out of range or of the wrong length, groups that do not
                fit, a score that does not depend on an input, or a gradient that is not finite.
            TypeError: inputs that are no floating-point tensors, or targets that are no integers.
        """
        with self._posed(inputs, target, additional_forward_args, ids) as (tensors, problem):
            solution = empty_solution(tensors) if problem is None else self._solve(problem)
        solution = in_form(solution, isinstance(inputs, Tensor))
        empty = int(solution.empty.sum())
        if empty:
            warnings.warn(
                f"{empty} of {len(solution.empty)} maps are zero everywhere: the score is flat there, or eta is at or "
                "above eta_max; Solution.empty says which",
                EmptyMapWarning,
                stacklevel=2,
            )
        return solution if return_solution else solution.attribution


@dataclass(frozen=True, eq=False)
class Noisy(Explainer):
    """An explainer that smooths the score with the noise bank."""

    noise_level: Scalar | None = field(default=None, kw_only=True)
    sigma: Scalar | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_level is not None and self.sigma is not None:
            raise ValueError("give noise_level (a fraction of each input's range) or sigma (absolute), not both")
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):  # Integral: numpy's too
            raise TypeError(f"seed: expected an integer, got {self.seed!r}")
        for name in ("noise_level", "sigma"):
            if getattr(self, name) is not None:
                check_scalar(name, getattr(self, name))

    def pose(self, inputs: Tensors, target: Target, additional_forward_args: Any, ids: Tensor) -> Problem:
        problem = super().pose(inputs, target, additional_forward_args, ids)
        return replace(problem, keys=noise_keys(self.seed, ids), sigma=self._sigmas(inputs))

    def _sigmas(self, inputs: Tensors) -> Tensors:
        if self.sigma is not None:
            return tuple(per_input_setting("sigma", self.sigma, x) for x in inputs)
        sigmas = []
        for x, level in zip(inputs, self._levels(inputs), strict=True):
            flat = flat_rows(x).to(level.dtype)
            sigmas.append(level * (flat.amax(1) - flat.amin(1)))
        return tuple(sigmas)

    def _levels(self, inputs: Tensors) -> Tensors:
        """σ as a fraction of the range of each input."""
        level = 0.1 if self.noise_level is None else self.noise_level
        return tuple(per_input_setting("noise_level", level, x) for x in inputs)


@dataclass(frozen=True, eq=False)
class Sparse(Explainer):
    """An explainer with a strength η: absolute, as a fraction of each input's η_max, or by the support it leads to."""

    eta: Scalar | None = field(default=None, kw_only=True)
    eta_ratio: Scalar | None = field(default=None, kw_only=True)
    support: Scalar | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(setting is not None for setting in (self.eta, self.eta_ratio, self.support)) > 1:
            raise ValueError(
                "give one of eta (absolute), eta_ratio (a fraction of each input's eta_max) and support (features or "
                "groups that are not zero)"
            )
        for name in ("eta", "eta_ratio"):
            if getattr(self, name) is not None:
                check_scalar(name, getattr(self, name))
        if self.support is not None:
            check_scalar("support", self.support, positive=True)
            if torch.as_tensor(self.support).is_floating_point() and bool((torch.as_tensor(self.support) > 1).any()):
                raise ValueError(
                    f"support: expected a count (an integer) or a fraction in (0, 1], got {self.support!r}"
                )

    def pose(self, inputs: Tensors, target: Target, additional_forward_args: Any, ids: Tensor) -> Problem:
        problem = super().pose(inputs, target, additional_forward_args, ids)
        problem = replace(problem, penalty=self._penalty(inputs))
        if self.support is None:
            return problem
        asked = torch.as_tensor(self.support)
        support = per_input_setting("support", asked.double(), inputs[0])
        if asked.is_floating_point():
            support = (support.double() * problem.penalty.count(inputs)).round().clamp_min(1)
        return replace(problem, tuning=replace(problem.tuning or Tuning(), support=support.long()))

    def _penalty(self, inputs: Tensors) -> Penalty:
        """L1 unless overridden."""
        if self.eta is not None and torch.as_tensor(self.eta).dim() > 1:
            return L1((per_feature(torch.as_tensor(self.eta, dtype=ops.state_dtype(inputs[0].dtype)), inputs),))
        return L1(*self._strength(inputs))

    def _strength(self, inputs: Tensors) -> tuple[Tensors, bool]:
        """(η or its ratio to η_max per tensor, whether it is the ratio)."""
        if self.support is not None:
            return tuple(per_input_setting("eta", 0.0, x) for x in inputs), False
        if self.eta is None:
            ratio = 0.1 if self.eta_ratio is None else self.eta_ratio
            return tuple(per_input_setting("eta_ratio", ratio, x) for x in inputs), True
        return tuple(per_input_setting("eta", self.eta, x) for x in inputs), False
