"""The base of all explainers: check, pose the problem, solve, give the maps in the form of the inputs."""

from __future__ import annotations

import math
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_count
from .._errors import BatchWarning, ConvergenceWarning, EmptyMapWarning, MixingError, OutputTypeError
from ..model.arguments import Arguments, arguments_of
from ..model.bind import agree, read_arguments, resolved, sample_output, unresolved, with_reading
from ..model.calling import Called, find_layer, layer_rows
from ..model.forms import named_cure
from ..model.memory import BLIND_ROWS, Footprint, same_random_numbers
from ..model.modes import Evaluating, evaluating, without_inference_tensors
from ..model.passes import PassRunner
from ..model.precision import Precision, check_precision, without_autocast
from ..model.restore import leaves_as_found
from ..model.score import Score, ScoreName, UnusedInputs, check_score_settings, sample_rows
from ..model.target import Target
from ..ops.layout import Tensors, tensors_of
from ..preparation.report import Prepared
from ..solvers.problem import Problem
from ..solvers.solution import Form, Solution
from .inputs import Call, Ids, Inputs, Mask, check_batch, check_fixed, check_ids, check_inputs, empty_solution, in_form
from .settings import per_input_setting

_lowering = threading.Lock()

# Noisy inputs per pass at most: enough to fill small models.
_MAX_BATCH = 1024

# Maps that are held for each row of a pass and each input of a call, beside what the model makes in the pass. Measured:
# up to 12 a row and 12 an input by Gradient, whose every row is an input; the solvers take less. The pass for the
# values keeps an eighth more of a row than those that are measured.
_PER_ROW, _PER_INPUT = 12, 12


def _outside_inference() -> AbstractContextManager[Any]:
    """Outside torch.inference_mode, whose tensors have no gradients."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _in_short(value: Any) -> str:
    """The repr of a setting in at most 100 characters: tensors and maps of groups are long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _kind(score: Score, inputs: Tensors) -> tuple[Any, ...]:
    """Equal for calls whose passes take equal memory."""
    tensors = [(x.shape[1:], x.dtype, x.device) for x in inputs]
    args = [a.shape[per:] for a, per in zip(score.args, score.per_row, strict=True) if isinstance(a, Tensor)]
    return (*tensors, *args, score.fixed is None)


def warn_empty(found: Sequence[Solution]) -> None:
    """Warns once if maps of a call are zero everywhere."""
    empty = sum(int(s.empty.sum()) for s in found)
    if empty:
        warnings.warn(
            f"{empty} of {sum(len(s) for s in found)} maps are zero everywhere: the score is flat there, or eta is at "
            "or above eta_max; Solution.empty says which",
            EmptyMapWarning,
            stacklevel=4,
        )


def warn_unconverged(found: Sequence[Solution], tol: float, budget: str) -> None:
    """Warns once if inputs of a call did not converge.

    Args:
        found: the solutions of the call.
        tol: of the solver; 0 for one that takes all of its steps and makes no claim.
        budget: its setting that buys a smaller residual.
    """
    failed = [~s.converged for s in found]
    count = int(torch.stack([f.sum() for f in failed]).sum())
    if count == 0 or not 0 < tol < math.inf:
        return
    residual = torch.cat([s.relative_residual for s in found])
    needed = torch.cat([s.forecast(tol)[f] for s, f in zip(found, failed, strict=True)])
    spent = torch.cat([s.gradient_evaluations[f] for s, f in zip(found, failed, strict=True)])
    about = int(needed.median())
    takes = f" (noise alone takes about {about:,} gradients, see Solution.forecast)" if about > spent.median() else ""
    warnings.warn(
        f"{count} of {len(residual)} maps did not converge to tol={tol:g}: relative residual "
        f"{float(residual.max()):.2g} at worst, {float(residual.median()):.2g} in the median; raise {budget}{takes} or "
        "tol of the solver",
        ConvergenceWarning,
        stacklevel=4,
    )


@dataclass
class _Known:
    """What earlier calls found out about the model, by the kind of inputs and arguments.

    Args:
        fits: rows per pass by measure, or fewer where that many did not fit.
        exact: rows of a pass, for a model that takes no other number.
        readings: which arguments follow the inputs.
        unmixed: kinds whose inputs do not mix.
        structured: whether the model's output is no tensor, so that a callable target reads it.
        called: how the model is called, by the names of inputs and arguments; one object, so that captures know it.
    """

    fits: dict[Any, int] = field(default_factory=dict)
    exact: dict[Any, int] = field(default_factory=dict)
    readings: dict[Any, Any] = field(default_factory=dict)
    unmixed: set[Any] = field(default_factory=set)
    structured: bool = False
    called: dict[Any, Called] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class Explainer(ABC):
    """What all explainers share: checking, and leaving the model as it was found.

    An explainer is a frozen record of settings. A call's state is its own, so threads may share one; what calls share,
    the rows that fit and the captured steps, is guarded.
    """

    model: Callable[..., object] | Prepared
    score: ScoreName = field(default="logit", kw_only=True)
    max_batch: int | Literal["auto"] | None = field(default="auto", kw_only=True)
    unused_inputs: UnusedInputs = field(default="raise", kw_only=True)
    precision: Precision = field(default="float32", kw_only=True)
    output_fn: Callable[[Any], Tensor] | None = field(default=None, kw_only=True)
    layer: str | nn.Module | None = field(default=None, kw_only=True)
    # Maps that are held whatever the rows and inputs.
    _held: ClassVar[int] = 0
    _known: _Known = field(default_factory=_Known, init=False, repr=False)

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
        if self.output_fn is not None and not callable(self.output_fn):
            raise TypeError(f"output_fn: expected a callable, got {type(self.output_fn).__name__}")
        if self.layer is not None:
            find_layer(self._module, self.layer)

    def __repr__(self) -> str:
        """The settings; of the model its name alone."""
        model = self.model
        name = repr(model) if isinstance(model, Prepared) else getattr(model, "__qualname__", type(model).__name__)
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "model"}
        settings = [f"{n}={_in_short(v)}" for n, v in given.items() if v is not None]
        return f"{type(self).__name__}({', '.join([name, *settings])})"

    @property
    def _module(self) -> Callable[..., Any]:
        """What is run: the model, or the prepared copy of it."""
        return self.model.model if isinstance(self.model, Prepared) else self.model

    @leaves_as_found
    def footprint(
        self,
        inputs: Inputs,
        additional_forward_args: object = None,
        *,
        fixed: Mask = None,
        forward_kwargs: Mapping[str, object] | None = None,
    ) -> Footprint | None:
        """What :meth:`attribute` takes on such inputs, measured by passes of one and of two rows of the first.

        ``footprint(x).peak(rows, inputs)`` predicts, from above, the bytes of the tensors that a call with so many
        inputs and rows per pass (``max_batch``) makes and has alive at once; weights and inputs not counted, and
        nothing of what kernels take inside.

        Args:
            inputs, additional_forward_args, fixed, forward_kwargs: as in :meth:`attribute`; at least one input.

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
        with _outside_inference(), torch.no_grad():
            call = Call(inputs, None, additional_forward_args, forward_kwargs, None, fixed)
            tensors = self._displaced(call)
            if tensors[0].shape[0] == 0:
                raise ValueError("inputs: expected at least one to measure passes with, got none")
            with self._evaluating(depth=2) as found:
                return self._footprint(self._unresolved(tensors, call, found), tensors, found, {})

    @leaves_as_found
    def rows_per_pass(
        self,
        inputs: Inputs,
        additional_forward_args: object = None,
        *,
        fixed: Mask = None,
        forward_kwargs: Mapping[str, object] | None = None,
    ) -> int | None:
        """``max_batch`` as it comes out for such inputs; None for no limit. Raises what the model raises where it takes
        neither one or two of them nor all."""
        if self.max_batch != "auto":
            return self.max_batch
        with _outside_inference(), torch.no_grad():
            call = Call(inputs, None, additional_forward_args, forward_kwargs, None, fixed)
            tensors = self._displaced(call)
            with self._evaluating(depth=2) as found:
                score = self._unresolved(tensors, call, found)
                rows = self._fit(score, tensors, found)[0]
                if tensors[0].shape[0] and _kind(score, tensors) not in self._known.fits:
                    score.whole_output(tensors)
                return rows

    def _footprint(
        self, score: Score, inputs: Tensors, found: Evaluating, outputs: dict[int, Tensor]
    ) -> Footprint | None:
        with same_random_numbers(inputs[0].device):
            taken: Footprint | None = score.pass_footprint(inputs, outputs, found.restore_buffers)
        state = sum(x[:1].numel() * ops.state_dtype(x.dtype).itemsize for x in inputs)
        return taken and Footprint(
            taken.fixed + self._held * state, taken.per_row * 9 // 8 + _PER_ROW * state, _PER_INPUT * state
        )

    def _fit(self, score: Score, inputs: Tensors, found: Evaluating) -> tuple[int, dict[int, Tensor]]:
        """Rows per pass for max_batch="auto", measured once for inputs and arguments of one kind; and the outputs of
        the passes that were measured, by their rows."""
        kind, fits = _kind(score, inputs), self._known.fits
        outputs: dict[int, Tensor] = {}
        if inputs[0].shape[0] == 0:
            return _MAX_BATCH, outputs  # there is nothing to measure
        if kind not in fits:
            try:
                taken = self._footprint(score, inputs, found, outputs)
            except Exception as error:
                if isinstance(error, torch.AcceleratorError):
                    raise
                # A model that does not take one or two rows may take those that were given.
                return max(BLIND_ROWS, inputs[0].shape[0]), {}
            fits.setdefault(kind, BLIND_ROWS if taken is None else taken.fast_rows(inputs[0].device, _MAX_BATCH))
        return fits[kind], outputs

    def _begin(self, score: Score, inputs: Tensors, found: Evaluating) -> tuple[PassRunner, Score, Tensor]:
        """:meth:`_first`, where the output may be no tensor if the target is a callable.

        Raises:
            ValueError, TypeError: naming the cure where the model takes the inputs in another form alone.
        """
        asked = callable(score.target)
        try:
            if asked and self._known.structured:
                score = score.of_any_output()
            return self._first(score, inputs, found)
        except OutputTypeError:
            if not asked:
                raise
            self._known.structured = True
        except Exception as error:
            cure = named_cure(score, inputs, error)
            found.restore_buffers()
            if cure is None:
                raise
            raise cure from error
        return self._begin(score, inputs, found)

    def _first(self, score: Score, inputs: Tensors, found: Evaluating) -> tuple[PassRunner, Score, Tensor]:
        """The passes of one call, the score with its target, and its values. A size that an earlier call found not to
        fit is not tried again.

        The first call of a kind checks that every input has an output of its own.
        """
        known, kind = self._known, _kind(score, inputs)
        rows, outputs = self._fit(score, inputs, found) if self.max_batch == "auto" else (self.max_batch, {})
        limit = known.fits.get(kind)
        rows = rows if limit is None else min(limit, rows or limit)
        passes = PassRunner(rows, exact=known.exact.get(kind), after=found.restore_buffers)
        first = (kind, inputs[0].shape[0] > 1) not in known.unmixed
        score, value, output = resolved(score, inputs, passes, first)
        if outputs:
            self._compare(score, inputs, output, outputs, found, passes)
            if inputs[0].shape[0] == 1 and passes.exact is None:
                self._check_copies(score, inputs, passes)
        known.unmixed.add((kind, inputs[0].shape[0] > 1))
        return passes, score, value

    def _compare(
        self,
        score: Score,
        inputs: Tensors,
        output: Tensor,
        outputs: dict[int, Tensor],
        found: Evaluating,
        passes: PassRunner,
    ) -> None:
        """Checks that the last input has the same output in passes of any size.

        A single input of a model that mixes rows is explained in passes of one row.

        Raises:
            ValueError: it has not, although the same pass gives the same output again.
        """
        one = output[-1]
        if all(agree(o[-1], one, score.precision, inputs) for o in outputs.values()):
            return
        with same_random_numbers(inputs[0].device):
            again = [sample_output(score, inputs, 1, passes)[-1] for _ in range(2)]
        if found.moved or not torch.equal(*again):
            warnings.warn(
                "the model's passes cannot be repeated: it draws random numbers, or changes a state that is not a "
                "buffer (Likely causes: dropout that is always on, or a module in train mode that could not be found). "
                "A map is then one draw",
                BatchWarning,
                stacklevel=5,
            )
            return
        if inputs[0].shape[0] == 1:
            self._one_row(passes)
            return
        raise ValueError(
            "model: the output for an input changes with its place in a pass or with the number of rows. Likely "
            "causes: something for each input that the model holds itself (give it in additional_forward_args), a "
            "number of inputs that it divides by, or the nodes of a graph given as a batch"
        )

    def _check_copies(self, score: Score, inputs: Tensors, passes: PassRunner) -> None:
        """Looks whether a model mixes two copies of its one input."""
        index = sample_rows(2, inputs)
        try:
            with same_random_numbers(inputs[0].device):
                passes.once(Score.unmixed_output, score.take(index), tuple([x[index] for x in inputs]))
        except MixingError:
            self._one_row(passes)

    def _one_row(self, passes: PassRunner) -> None:
        passes.exact = 1
        warnings.warn(
            "the model mixes the rows of a pass; its one input is explained in passes of one row",
            BatchWarning,
            stacklevel=6,
        )

    def _remember(self, problem: Problem) -> None:
        """Keeps the size of passes that worked, where some did not fit; another thread may have found less."""
        rows, kind = problem.passes.max_rows, _kind(problem.score, problem.inputs)
        if problem.passes.lowered and rows is not None:
            with _lowering:
                self._known.fits[kind] = min(rows, self._known.fits.get(kind, rows))
        if problem.passes.exact is not None:
            self._known.exact[kind] = problem.passes.exact

    def _evaluating(self, depth: int | None) -> Evaluating:
        """The model in eval mode, with what reads its output."""
        # A tuple of both is no module itself, whose flag would be compared first.
        model: Any = self._module if self.output_fn is None else (self._module, self.output_fn)
        return evaluating(model, depth)

    def _called(self, call: Call) -> Callable[..., Any]:
        """The model as a function of values by position."""
        names = tuple(call.inputs) if isinstance(call.inputs, Mapping) else ()
        keywords = tuple(call.keywords or ())
        if both := set(names) & set(keywords):
            raise ValueError(f"forward_kwargs: {', '.join(map(repr, sorted(both)))} is the name of an input too")
        if not names and not keywords and self.layer is None:
            return self._read_model
        model = without_inference_tensors(self._module)
        layer = None if self.layer is None else find_layer(model, self.layer)
        shared = 0 if layer is None else len(tensors_of(call.inputs))
        called = Called(model, self.output_fn, names, keywords, layer, shared)
        return self._kept(called)

    @property
    def _read_model(self) -> Callable[..., Any]:
        """The model, with ``output_fn`` read from what it returns."""
        if self.output_fn is None:
            return self._module
        return self._kept(Called(without_inference_tensors(self._module), self.output_fn))

    def _kept(self, called: Called) -> Called:
        """One object for all calls of one form, so that captures know it."""
        if called.model is not self._module:  # a copy of this call
            return called
        key, kept = (called.names, called.keywords, called.shared), self._known.called
        if key not in kept or kept[key].layer is not called.layer:  # its name may be another layer's by now
            kept[key] = called
        return kept[key]

    def _displaced(self, call: Call) -> Tensors:
        """What is displaced, checked: the inputs, or the output of the layer at them."""
        layout = self.model.memory_format if isinstance(self.model, Prepared) else torch.preserve_format
        if self.layer is None:
            return check_inputs(call.inputs, self._module, self.precision, layout)
        inputs = check_batch(call.inputs)
        batch, device = inputs[0].shape[0], inputs[0].device
        if batch == 0:
            raise ValueError("inputs: expected at least one: a layer's output has no shape without")
        arguments = self._arguments(call, batch)
        limit = BLIND_ROWS if self.max_batch == "auto" else self.max_batch
        # The use that follows warns.
        with without_autocast(device), self._evaluating(depth=None) as found:
            score = unresolved(
                self._called(call), inputs, None, self.score, arguments, self.unused_inputs, self.precision
            )
            passes = PassRunner(limit, after=found.restore_buffers)
            rows = (torch.arange(batch, dtype=torch.float32, device=device),)
            score = self._as_read(score, arguments, rows, call, passes, layer_rows)
            output = passes(layer_rows, score, rows)[0]
            self._check_layer(score, rows, output, passes)
        return check_inputs(output, self._module, self.precision, layout, "layer: its output")

    def _arguments(self, call: Call, batch: int) -> Arguments:
        """What follows the displaced tensors in a pass."""
        arguments = arguments_of(call.arguments, batch, call.keywords)
        return arguments if self.layer is None else arguments.after(tensors_of(call.inputs))

    def _check_layer(self, score: Score, rows: Tensors, output: Tensor, passes: PassRunner) -> None:
        """Checks, in the first call of a kind, that a layer's output at the last input is that of a pass of it alone.

        Raises:
            MixingError: it is not, although that pass gives the same output again.
        """
        kind = (layer_rows, _kind(score, rows))
        if len(output) == 1 or not output.is_floating_point() or kind in self._known.unmixed:
            return
        try:
            with same_random_numbers(output.device):
                one, again = [sample_output(score, rows, 1, passes, layer_rows)[-1] for _ in range(2)]
        except Exception as error:  # it does not take one row
            if isinstance(error, torch.AcceleratorError):
                raise
        else:
            if torch.equal(one, again) and not agree(one, output[-1], score.precision, (output,)):
                raise MixingError
        self._known.unmixed.add(kind)

    def _unresolved(self, tensors: Tensors, call: Call, found: Evaluating) -> Score:
        arguments = self._arguments(call, tensors[0].shape[0])
        score = unresolved(
            self._called(call), tensors, call.target, self.score, arguments, self.unused_inputs, self.precision
        )
        score = replace(score, fixed=check_fixed(call.fixed, self._like(call, tensors), tensors))
        return self._as_read(score, arguments, tensors, call, PassRunner(after=found.restore_buffers))

    def _as_read(
        self,
        score: Score,
        arguments: Arguments,
        inputs: Tensors,
        call: Call,
        passes: PassRunner,
        run: Callable[..., Any] = Score.whole_output,
    ) -> Score:
        """The score with its arguments read in the way that earlier calls of this kind, or trial passes, found."""
        if not arguments.ambiguous:
            return score
        batch, readings = inputs[0].shape[0], self._known.readings
        kind = (_kind(score, inputs), arguments.kind(batch), tuple(call.keywords or ()), run)
        if kind not in readings:
            readings.setdefault(kind, read_arguments(score, arguments, inputs, passes, run))
        return with_reading(score, readings[kind], arguments, batch)

    def _like(self, call: Call, tensors: Tensors) -> Inputs:
        """What maps have the form of."""
        return call.inputs if self.layer is None else tensors[0]

    def pose(self, problem: Problem) -> Problem:
        """The problem with the settings of this explainer; as it comes, it has σ = 0, ρ = 1 and no penalty."""
        return problem

    @property
    def _claim(self) -> tuple[float, str]:
        """(tol, the setting that buys a smaller residual); a tol of 0 for methods that claim no convergence."""
        return 0.0, ""

    @abstractmethod
    def _solve(self, problem: Problem) -> Solution:
        """The solution of a batch that has at least one input."""

    @contextmanager
    def _posed(self, call: Call) -> Iterator[tuple[Tensors, Problem | None]]:
        """What a call displaces and the problem, with the model in eval mode; no problem for no inputs."""
        with _outside_inference(), torch.no_grad():
            tensors = self._displaced(call)
            names = check_ids(call.ids, tensors[0].shape[0], tensors[0].device)
            if tensors[0].shape[0] == 0:
                check_fixed(call.fixed, call.inputs, tensors)
                yield tensors, None
                return
            with without_autocast(tensors[0].device), self._evaluating(depth=4) as found:
                score = self._unresolved(tensors, call, found)
                passes, score, value = self._begin(score, tensors, found)
                sigma = tuple([per_input_setting("sigma", 0.0, x) for x in tensors])
                rho = tuple([per_input_setting("rho", 1.0, x) for x in tensors])
                problem = Problem(tensors, score, value, names, names, sigma, rho, passes=passes)
                try:
                    yield tensors, self.pose(problem)
                finally:
                    self._remember(problem)

    @leaves_as_found
    def problem(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        ids: Ids = None,
        fixed: Mask = None,
        forward_kwargs: Mapping[str, object] | None = None,
    ) -> Problem:
        """The problem that :meth:`attribute` solves, with settings that are measured or follow the solution still open.

        A value: inputs, score, σ, ρ, penalty, noise keys. Its passes run the model as it is then: leave it in eval
        mode.

        Args:
            inputs, target, additional_forward_args, ids, fixed, forward_kwargs: see :meth:`attribute`; at least one
                input.

        Raises:
            ValueError, TypeError: see :meth:`attribute`; no inputs.

        Example:
            >>> import torch
            >>> from moreau_ext import MoreauGrad
            >>> problem = MoreauGrad(torch.nn.Linear(3, 2).eval(), rho=0.5).problem(torch.rand(8, 3), target=1)
            >>> problem.rho[0][0], problem.score.target[0]
            (tensor(0.5000), tensor([1]))
        """
        with self._posed(Call(inputs, target, additional_forward_args, forward_kwargs, ids, fixed)) as (_, problem):
            if problem is None:
                raise ValueError("inputs: expected at least one, got none")
            return problem

    @overload
    def attribute(
        self,
        inputs: Tensor,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        ids: Ids = None,
        fixed: Mask = None,
        forward_kwargs: Mapping[str, object] | None = None,
        return_solution: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def attribute(
        self,
        inputs: tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object = None,
        *,
        ids: Ids = None,
        fixed: Mask = None,
        forward_kwargs: Mapping[str, object] | None = None,
        return_solution: Literal[False] = False,
    ) -> tuple[Tensor, ...]: ...

    @overload
    def attribute(
        self,
        inputs: Mapping[str, Tensor],
        target: Target = None,
        additional_forward_args: object = None,
        *,
        ids: Ids = None,
        fixed: Mask = None,
        forward_kwargs: Mapping[str, object] | None = None,
        return_solution: Literal[False] = False,
    ) -> dict[str, Tensor]: ...

    @overload
    def attribute(
        self,
        inputs: Form,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        ids: Ids = None,
        fixed: Mask = None,
        forward_kwargs: Mapping[str, object] | None = None,
        return_solution: Literal[True],
    ) -> Solution[Form]: ...

    @overload
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        ids: Ids = None,
        fixed: Mask = None,
        forward_kwargs: Mapping[str, object] | None = None,
        return_solution: bool,
    ) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor] | Solution: ...

    @leaves_as_found
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        ids: Ids = None,
        fixed: Mask = None,
        forward_kwargs: Mapping[str, object] | None = None,
        return_solution: bool = False,
    ) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor] | Solution:
        """The maps of a batch.

        Args:
            inputs: a tensor [B, *features], a tuple of them (passed by position) or a dict (passed by name), of
                floating point; any rank >= 1. With ``layer`` also integers. Each input's map is its own: it does not
                depend on the batch beyond the rounding of the model's passes. A model that mixes the inputs of a batch
                (batch statistics, contrastive heads, the nodes of one graph) is refused.
            target: what to explain: None (the predicted class; the output itself where there is one per input), an int,
                a tensor or array [B], [B, 1] or of one element, a list of B ints or of B tuples, one tuple (outputs of
                higher rank), a list of B callables row -> number, or a callable output -> [B]. A callable is called
                with the outputs of noisy copies, in any number and order, if each of its scores depends on its own row
                alone. If it holds something for each input (a class, a mask), it is called with the outputs of all
                inputs in their order, once per copy: give that in ``additional_forward_args`` to a model that returns
                the score, which takes fewer calls. One that mixes rows is refused.
            additional_forward_args: passed to the model after the inputs, a value or a tuple of them. Tensors, arrays,
                lists, and dicts or lists of tensors with one entry per input follow the inputs. Where a shared argument
                happens to have B entries, two small passes of the first call decide; :class:`PerInput` and
                :class:`Shared` say it.
            forward_kwargs: arguments that the model gets by name, read in the same way: an attention mask, a flag.
            ids: int64 [B], each input's name to the noise bank; its position by default. Give them when you split a
                data set into batches, and an input draws the same noise in any of them. One integer gives all inputs
                the same noise: maps of copies or neighbours of an input then differ by the inputs alone, which is what
                robustness metrics compare.
            fixed: the features that may not move, bool: padding, special tokens, a background, all outside a region. A
                mask that broadcasts to the features ([H, W] of images, [T, 1] of embeddings) serves all inputs; one
                with as many axes as the inputs is a mask for each. Several inputs have as many masks, or None. The
                model sees fixed features as they are, without noise; the map is zero there; and they count in no norm,
                range, group, support, error or p-value, so that the map of the others is that of the problem restricted
                to them. An input without free features has an empty map.
            return_solution: return a :class:`Solution` instead of the maps alone.

        Returns:
            The maps, in the form, shape, dtype and device of ``inputs`` (of the output of ``layer``); or the Solution.

        Raises:
            ValueError: NaN or infinity in an input, a target out of range or of the wrong length, groups or a mask that
                do not fit, a score that does not depend on an input, a gradient that is not finite, or a model that
                mixes the inputs of a batch or treats them by their places.
            TypeError: inputs that are no floating-point tensors, targets that are no integers, or a mask that is not of
                bool.
        """
        call = Call(inputs, target, additional_forward_args, forward_kwargs, ids, fixed)
        with self._posed(call) as (tensors, problem):
            solution = empty_solution(tensors) if problem is None else self._solve(problem)
        solution = in_form(solution, self._like(call, solution.attribution))
        warn_empty([solution])
        warn_unconverged([solution], *self._claim)
        found: Tensor | tuple[Tensor, ...] | dict[str, Tensor] = solution.attribution
        return solution if return_solution else found
