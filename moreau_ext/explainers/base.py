"""What all explainers share: checking inputs and settings, posing the problem, leaving the model as it was found."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_count
from ..model.memory import BLIND_ROWS, Footprint, Limit, PassRunner, budget
from ..model.modes import evaluating
from ..model.precision import Precision, check_dtypes, check_precision
from ..model.score import Score, ScoreName, UnusedInputs, check_score_settings, resolved, unresolved
from ..model.target import Target
from ..ops.layout import Tensors, flat_rows, memory_layout
from ..ops.noise import noise_keys
from ..preparation.report import Prepared
from ..solvers.penalties import L1, NoPenalty, Penalty
from ..solvers.problem import Problem, Tuning
from ..solvers.solution import Solution
from .settings import Scalar, check_scalar, per_feature, per_input_setting

_lowering = threading.Lock()

# Noisy inputs per pass at most: enough to fill small models.
_MAX_BATCH = 1024

# Maps that are held for each row of a pass and each input of a call, beside what the model makes in the pass. Measured:
# 3.5 a row and 5.9 an input by the adaptive solver, 9.7 and 4.3 by Gradient, whose every row is an input.
_PER_ROW, _PER_INPUT = 10, 7


def _kind(score: Score, inputs: Tensors) -> tuple[Any, ...]:
    """What two calls have in common whose passes take the same."""
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
            tensors = self._check_inputs(inputs)
            if tensors[0].shape[0] == 0:
                raise ValueError("inputs: expected at least one to measure passes with, got none")
            with evaluating(self._module):
                return self._footprint(self._unresolved(tensors, None, additional_forward_args), tensors)

    def rows_per_pass(self, inputs: Any, additional_forward_args: Any = None) -> int | None:
        """``max_batch`` as it comes out for such inputs; None for no limit."""
        if self.max_batch != "auto":
            return self.max_batch
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._check_inputs(inputs)
            with evaluating(self._module):
                score = self._unresolved(tensors, None, additional_forward_args)
                return self._fit(score, tensors)

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

    def _lower(self, kind: Any, rows: int) -> None:
        """What was found not to fit: another thread may know of less."""
        with _lowering:
            self._fits[kind] = min(rows, self._fits.get(kind, rows))

    def _max_rows(self, problem: Problem) -> int | None:
        """Most noisy inputs in one pass."""
        return self._fit(problem.score, problem.inputs) if self.max_batch == "auto" else self.max_batch

    @abstractmethod
    def _solve(self, problem: Problem) -> Solution:
        """The solution of a batch that has at least one input."""

    def _rho(self) -> Scalar:
        return 1.0

    def _keys(self, ids: Tensor) -> Tensor:
        return ids

    def _sigmas(self, inputs: Tensors) -> Tensors:
        """σ of every tensor, [B]."""
        return tuple(per_input_setting("sigma", 0.0, x) for x in inputs)

    def _penalty(self, inputs: Tensors) -> Penalty:
        return NoPenalty()

    def _support(self, inputs: Tensors, penalty: Penalty) -> Tensor | None:
        """Features or groups asked for, int64 [B]."""
        return None

    def _radius(self, inputs: Tensors) -> Tensor | None:
        """‖δ*‖ asked for, float64 [B]."""
        return None

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
        (solution,) = self._run(inputs, target, additional_forward_args, ids, lambda problem: [self._solve(problem)], 1)
        empty = int(solution.empty.sum())
        if empty:
            warnings.warn(
                f"{empty} of {len(solution.empty)} maps are zero everywhere: the score is flat there, or eta is at or "
                "above eta_max; Solution.empty says which",
                stacklevel=2,
            )
        return solution if return_solution else solution.attribution

    def _run(
        self,
        inputs: Any,
        target: Target,
        additional_forward_args: Any,
        ids: Tensor | None,
        solve: Callable[[Problem], list[Solution]],
        count: int,
    ) -> list[Solution]:
        """Checks, poses the problem, and gives back its ``count`` solutions in the form of the inputs."""
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._check_inputs(inputs)
            names = self._check_ids(ids, tensors[0].shape[0], tensors[0].device)
            if tensors[0].shape[0] == 0:
                solutions = [_nothing(tensors)] * count
            else:
                with evaluating(self._module, depth=2):
                    solutions = solve(self._problem(tensors, target, additional_forward_args, names))
        return [_in_form(solution, isinstance(inputs, Tensor)) for solution in solutions]

    def _unresolved(self, tensors: Tensors, target: Target, additional_forward_args: Any) -> Score:
        return unresolved(
            self._module,
            tensors,
            target,
            self.score,
            additional_forward_args,
            self.unused_inputs,
            self.precision,
        )

    def _problem(self, tensors: Tensors, target: Target, additional_forward_args: Any, ids: Tensor) -> Problem:
        """The problem of checked inputs; runs the model once, which must be in eval mode."""
        score = self._unresolved(tensors, target, additional_forward_args)
        rows = self._fit(score, tensors) if self.max_batch == "auto" else self.max_batch
        kind = _kind(score, tensors)
        # What an earlier call found not to fit does not fail again.
        limit = Limit(self._fits.get(kind), partial(self._lower, kind))
        score, value = resolved(replace(score, limit=limit), tensors, rows)
        penalty = self._penalty(tensors)
        support, radius = self._support(tensors, penalty), self._radius(tensors)
        return Problem(
            inputs=tensors,
            score=score,
            value=value,
            ids=ids,
            keys=self._keys(ids),
            sigma=self._sigmas(tensors),
            rho=tuple(per_input_setting("rho", self._rho(), x) for x in tensors),
            penalty=penalty,
            passes=PassRunner(rows),
            tuning=None if support is None and radius is None else Tuning(support, radius),
        )

    def _check_inputs(self, inputs: Any) -> Tensors:
        """Our own dense copies."""
        tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
        if not isinstance(tensors, tuple) or not tensors or not all(isinstance(x, Tensor) for x in tensors):
            raise TypeError(f"inputs: expected a tensor or a tuple of tensors, got {type(inputs).__name__}")
        for i, x in enumerate(tensors):
            name = "inputs" if isinstance(inputs, Tensor) else f"inputs[{i}]"
            if not x.is_floating_point():
                raise TypeError(
                    f"{name}: expected floating point, got {x.dtype}. Token ids cannot be displaced: explain the "
                    "embeddings, with a model that takes them as input; pixels are, as x.float() / 255 or as the model "
                    "takes them"
                )
            if x.layout != torch.strided:
                raise TypeError(f"{name}: expected a dense tensor, got {x.layout}; call .to_dense() first")
            if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
                raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {x.dtype}")
            if x.dim() < 1:
                raise ValueError(f"{name}: expected a batch axis, got a tensor without axes")
            if x.shape[0] != tensors[0].shape[0]:
                raise ValueError(f"{name}: expected {tensors[0].shape[0]} inputs, as in inputs[0], got {x.shape[0]}")
            if x.device != tensors[0].device:
                raise ValueError(
                    f"{name}: expected a tensor on {tensors[0].device}, as inputs[0], got one on {x.device}"
                )
            if x.shape[0] and x.numel() == 0:
                raise ValueError(f"{name}: has no features, shape {tuple(x.shape)}")
            finite = flat_rows(torch.isfinite(x)).all(1)
            if not bool(finite.all()):
                row = int((~finite).nonzero()[0])
                raise ValueError(f"{name}: input {row} holds NaN or infinity")
        model = self._module
        if isinstance(model, nn.Module):
            devices = {p.device for p in model.parameters()}
            if len(devices) == 1 and tensors[0].device not in devices:
                raise ValueError(f"inputs: are on {tensors[0].device}, but the model is on {devices.pop()}")
        check_dtypes(self.precision, tensors)
        layout = self.model.memory_format if isinstance(self.model, Prepared) else torch.preserve_format
        return tuple(_own(x, layout) for x in tensors)

    def _check_ids(self, ids: Tensor | None, batch: int, device: torch.device) -> Tensor:
        if ids is None:
            return torch.arange(batch, device=device)
        try:
            names = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"ids: expected int64, one per input, got {ids!r}") from None
        if names.is_floating_point() or names.is_complex() or names.dtype == torch.bool:
            raise TypeError(f"ids: expected int64, got {names.dtype}")
        if names.shape != (batch,):
            raise ValueError(f"ids: expected one per input, [{batch}], got shape {tuple(names.shape)}")
        return names.to(device=device, dtype=torch.int64)


def _own(x: Tensor, layout: torch.memory_format) -> Tensor:
    copy = x.detach().clone(memory_format=layout if x.dim() == 4 else torch.preserve_format)
    return copy if memory_layout(copy) is not None else copy.contiguous()


def _in_form(solution: Solution, single: bool) -> Solution:
    """A solver's tuples as the inputs were given: one tensor, or a tuple."""
    if single:
        form = ("attribution", "displacement", "envelope_gradient", "eta", "sigma")
        return replace(solution, **{name: getattr(solution, name)[0] for name in form})
    if all(e.dim() == 1 for e in solution.eta):
        return replace(solution, eta=solution.eta[0])
    return solution


def _nothing(inputs: Tensors) -> Solution:
    """The solution of an empty batch."""
    device = inputs[0].device
    states = tuple(x.to(ops.state_dtype(x.dtype)) for x in inputs)
    scalars = tuple(s.new_empty(0) for s in states)
    numbers, counts = (
        torch.empty(0, dtype=torch.float64, device=device),
        torch.empty(0, dtype=torch.int64, device=device),
    )
    flags = torch.empty(0, dtype=torch.bool, device=device)
    return Solution(
        attribution=inputs,
        displacement=states,
        envelope=numbers,
        envelope_gradient=states,
        score=inputs[0].new_empty(0),
        residual=numbers,
        relative_residual=numbers,
        steps=counts,
        gradient_evaluations=counts,
        converged=flags,
        nnz=counts,
        support=counts,
        empty=flags,
        eta=scalars,
        rho=scalars[0],
        sigma=scalars,
    )


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

    def _keys(self, ids: Tensor) -> Tensor:
        return noise_keys(self.seed, ids)

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

    def _support(self, inputs: Tensors, penalty: Penalty) -> Tensor | None:
        if self.support is None:
            return None
        asked = torch.as_tensor(self.support)
        if not asked.is_floating_point():
            return per_input_setting("support", asked.double(), inputs[0]).long()
        share = per_input_setting("support", asked.double(), inputs[0]).double()
        return (share * penalty.count(inputs)).round().long().clamp_min(1)

    def _l1(self, inputs: Tensors) -> L1:
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
