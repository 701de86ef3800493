"""A faster copy of a model: levers that leave its outputs as they are, each checked, timed and reported.

An explanation is thousands of passes of one model whose weights never change. What can be settled once, before the
first pass, is settled here; the user's own module is never touched.
"""

from __future__ import annotations

import copy
import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from .checks import check_count
from .memory import BLIND_ROWS, BytesAlive, Footprint, attempt, footprint, out_of_memory, same_random_numbers
from .memory import budget as default_budget
from .ops.layout import Tensors
from .precision import Precision, check_dtypes, check_precision
from .scores import Score, evaluating, has_hooks

Model = Callable[..., Any]

# Relative to the output's scale. A folded or re-laid-out float32 net of 20 layers differs by 1e-6; a wrong one by 1e-1.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Where a ReLU sits within rounding of zero, the gradient jumps by that unit's share though the output does not move.
_GRADIENT_SLACK = 100.0
# No slack makes a gradient that is off by this the same gradient.
_GRADIENT_MOST = 0.3
# Rows that a lever is checked on: the example's first ones, filled up with noisy copies.
_LEAST_ROWS, _MOST_ROWS = 8, 16
# Rows per checking pass: two at least where memory allows, because one row has no layout of its own.
_CHECK_CHUNK = 4
_NOISE = 0.1  # of each row's range: the explainers' own default
# A gain is believed beyond what two equal candidates differ by when measured like this on a busy machine, 2-4 %.
_WORTH = 0.95
_ROUNDS = 7
_PASS_SECONDS = 0.02
_LONGEST_PASS_SECONDS = 0.15
_PROBE_SECONDS = 0.8

_PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}
_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# fx swaps nn.Module.__call__ for the whole process while it traces.
_tracing = threading.Lock()


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


@dataclass(frozen=True, eq=False)
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

    def __str__(self) -> str:
        return "\n".join(str(lever) for lever in self.report)


def prepare(
    model: Model,
    example: Tensor | Tensors,
    *,
    additional_forward_args: Any = None,
    fold_batchnorm: bool = True,
    channels_last: bool | Literal["auto"] = "auto",
    freeze: bool = True,
    compile: bool | Mapping[str, Any] = False,
    probe: bool = True,
    max_batch: int | None = 1024,
    memory_budget: int | None = None,
    tolerance: float | None = None,
    precision: Precision = "float32",
) -> Prepared:
    """A faster copy of ``model`` with the same outputs, and the number of rows it takes fastest in one pass.

    Every lever is tried on a copy of its own, compared with the model as given (outputs and input gradients, on the
    example's first 16 rows, filled up to 8 with noisy copies), and left out when it fails, differs, or cannot be used.

    Args:
        model: an nn.Module; or any callable, for which only ``max_batch`` is found. Its parameters, buffers, hooks and
            flags stay as they are, and it is not run unless it cannot be copied. Hooks go along to the copy, and what
            they do is done in the passes made here too.
        example: inputs to measure with, [B, ...] of floating point, or a tuple of them, as they will be explained: B of
            a few is enough. Take real ones: dead units and flat scores would pass unseen.
        additional_forward_args: passed after the inputs; tensors whose first axis is B follow the rows.
        fold_batchnorm: w' = w·γ/√(v + ε), b' = (b − μ)·γ/√(v + ε) + β into the Conv or Linear before it. Not folded:
            batch statistics, hooks, modules used twice, and a layer whose output is used elsewhere.
        channels_last: convolution weights in that layout; "auto": where it is at least 5 % faster.
        freeze: parameters of the copy without gradient, so that what only their gradients need is not kept.
        compile: torch.compile the copy; a mapping is passed on as its arguments. Costs seconds to minutes.
        probe: time chunks of 1, 2, 4, ... rows; else as many as ``memory_budget`` and ``max_batch`` allow.
        max_batch: most rows in a pass; None for no limit but memory.
        memory_budget: bytes for the tensors of one pass, weights and inputs not counted; by default a quarter of what
            is free on the CPU, half on a GPU. Scratch inside a library's kernels is not seen. One row is taken even
            where it does not fit.
        tolerance: largest output difference of a lever, relative to the largest output; by default 1e-10 (float64),
            1e-4 (float32), 2e-2 (float16), 1e-1 (bfloat16). Gradients are held to 100 times that, or to 0.3 where that
            is less.
        precision: of the passes that are timed and whose memory is counted, as the explainer will have it; results are
            compared in "float32". A prepared model works with any.

    Returns:
        The :class:`Prepared`: a value, which knows nothing of later changes to your model's weights. Give it to an
        explainer in the model's place.

    Raises:
        ValueError, TypeError: a setting or an example out of range, by name.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from moreau_ext.prepare import prepare
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> ready = prepare(net, torch.rand(4, 3, 8, 8), channels_last=False, memory_budget=10_000_000)
        >>> ready.report[1].applied, ready.report[1].reason
        (True, '1 of 1 folded')
        >>> ready.model(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 10])

    What depends on timing, ``max_batch``, channels_last="auto" and whether inputs are converted with the weights, may
    differ from run to run, and results then by rounding; a number and channels_last=False give the same bits. Random
    generators are as before afterwards; what another thread draws from torch's default ones meanwhile, is drawn again.
    A second call in another thread waits. While a model that has BatchNorm is traced (milliseconds), no other thread
    may run a module: torch.fx swaps ``nn.Module.__call__`` for the process. Memory for up to four more copies of the
    weights is taken meanwhile.
    """
    inputs, args, per_row = _check_example(model, example, additional_forward_args)
    for name, value in (("fold_batchnorm", fold_batchnorm), ("freeze", freeze), ("probe", probe)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    if channels_last != "auto" and not isinstance(channels_last, bool):
        raise ValueError(f"channels_last: expected True, False or 'auto', got {channels_last!r}")
    if not isinstance(compile, (bool, Mapping)):
        raise TypeError(f"compile: expected True, False or arguments of torch.compile, got {compile!r}")
    for name, count in (("max_batch", max_batch), ("memory_budget", memory_budget)):
        check_count(name, count, optional=True)
    check_precision(precision)
    check_dtypes(precision, inputs, "example")
    if tolerance is None:
        tolerance = _default_tolerance(model, inputs)
    elif isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance: expected a positive finite number or None, got {tolerance!r}")

    device = inputs[0].device
    budget = default_budget(device) if memory_budget is None else int(memory_budget)
    with torch.inference_mode(False), torch.no_grad(), same_random_numbers(device):
        clean, why = _copy(model)
        report = [Lever("copy", clean is not None, why)]
        subject: Model = model if clean is None else _again(clean)
        with evaluating(subject):
            rows = _Rows(tuple(x.clone() for x in inputs), args, per_row, precision)
            taken = _footprint(subject, rows)
            workshop = _Workshop(clean, subject, rows, tolerance, _fitting(taken, budget))
            if fold_batchnorm:
                report.append(workshop.try_lever("fold_batchnorm", lambda trial: _fold(trial, rows)))
            else:
                report.append(Lever("fold_batchnorm", False, "switched off"))
            if channels_last is False:
                report.append(Lever("channels_last", False, "switched off"))
            else:
                report.append(workshop.try_channels_last(asked=channels_last is True))
            if freeze:
                report.append(workshop.try_lever("freeze", _freeze))
            else:
                report.append(Lever("freeze", False, "switched off"))
            if workshop.clean is not None:
                taken = _footprint(workshop.runner, workshop.rows)
            if compile is not False:
                options = dict(compile) if isinstance(compile, Mapping) else {}
                report.append(workshop.try_compile(options))
            else:
                report.append(Lever("compile", False, "switched off"))
            chunk, lever, timed = _probe(
                workshop.runner, workshop.rows, taken, budget, None if max_batch is None else int(max_batch), probe
            )
            report.append(lever)
    return Prepared(
        model=model if workshop.clean is None else workshop.clean,
        max_batch=chunk,
        memory_format=workshop.memory_format,
        report=tuple(report),
        row_seconds=timed,
        row_bytes=None if taken is None else taken.peak(1),
    )


def _check_example(model: Model, example: Any, additional: Any) -> tuple[Tensors, tuple[Any, ...], tuple[bool, ...]]:
    """(inputs, additional arguments, which of these follow the rows)."""
    if not callable(model):
        raise TypeError(f"model: expected a callable, got {type(model).__name__}")
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, tuple) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"example: expected a tensor or a tuple of tensors, got {type(example).__name__}")
    for i, x in enumerate(inputs):
        name = "example" if isinstance(example, Tensor) else f"example[{i}]"
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected floating point, got {x.dtype}")
        if x.dim() < 1 or x.numel() == 0:
            raise ValueError(f"{name}: expected at least one input, [B, ...], got shape {tuple(x.shape)}")
        if x.shape[0] != inputs[0].shape[0]:
            raise ValueError(f"{name}: expected {inputs[0].shape[0]} inputs, as in example[0], got {x.shape[0]}")
        if x.device != inputs[0].device:
            raise ValueError(f"{name}: expected a tensor on {inputs[0].device}, as example[0], got one on {x.device}")
    if isinstance(model, nn.Module):
        devices = {p.device for p in model.parameters()}
        if len(devices) == 1 and inputs[0].device not in devices:
            raise ValueError(f"example: is on {inputs[0].device}, but the model is on {devices.pop()}")
    args = () if additional is None else additional
    args = args if isinstance(args, tuple) else (args,)
    args = tuple(a.detach().clone() if isinstance(a, Tensor) and a.is_inference() else a for a in args)
    batch = inputs[0].shape[0]
    return inputs, args, tuple(isinstance(a, Tensor) and a.dim() > 0 and a.shape[0] == batch for a in args)


def _default_tolerance(model: Model, inputs: Tensors) -> float:
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    return max(_TOLERANCE.get(t.dtype, 0.0) for t in chain(inputs, weights)) or _TOLERANCE[torch.float32]


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# Copies. A copy that has run may hold what its forward stored on it, which cannot be copied any more, and buffers that
# moved. So one copy of each state never runs ("clean"), and what runs is copied from it.


def _again(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    for part in made.modules():
        # The flag alone: train() may be overridden to do more.
        part.training = False
    return made


def _copy(model: Model) -> tuple[nn.Module | None, str]:
    """(a copy in eval mode that shares nothing with the model, or None; how it went)."""
    if not isinstance(model, nn.Module):
        return None, f"a {type(model).__name__} is no nn.Module, used as it is"
    try:
        # Twice, because what runs is a copy of the copy.
        made = copy.deepcopy(model)
        if type(made) is type(model) and not _shared(model, made):
            made = _again(made)
            return made, "a copy in eval mode"
    except Exception as error:  # __deepcopy__ and __reduce__ are the user's and may raise anything
        return None, f"cannot be copied, used as it is: {_short(error)}"
    return None, "its copy shares modules, parameters or buffers with it, used as it is"


def _shared(one: nn.Module, other: nn.Module) -> bool:
    # Lists, so that the parts live while their ids are compared.
    ours, theirs = (list(chain(m.modules(), m.parameters(), m.buffers())) for m in (one, other))
    return not {id(part) for part in ours}.isdisjoint(id(part) for part in theirs)


# Passes.


class _Rows:
    """What the passes run on: rows of the example, and noisy copies of them as the explainers make them."""

    def __init__(self, inputs: Tensors, args: tuple[Any, ...], per_row: tuple[bool, ...], precision: Precision) -> None:
        self.inputs, self.args, self.per_row, self.precision = inputs, args, per_row, precision
        self.batch = inputs[0].shape[0]
        self.device = inputs[0].device
        self._weights: dict[tuple[int, ...], Tensor] = {}

    def take(self, count: int, start: int = 0) -> tuple[Tensors, tuple[Any, ...]]:
        """Rows start .. start + count: the example's own, then noisy copies of them in turn."""
        number = torch.arange(start, start + count, device=self.device)
        index = number % self.batch
        noisy = number >= self.batch
        taken = []
        for i, x in enumerate(self.inputs):
            rows = _take_rows(x, index)
            generator = torch.Generator("cpu").manual_seed(1_000_003 * i + start)
            # Device and dtype said, because their defaults are the user's to change.
            noise = torch.randn(rows.shape, generator=generator, device="cpu", dtype=torch.float32)
            noise = noise.to(device=x.device, dtype=x.dtype)
            flat = rows.reshape(count, -1)
            scale = _NOISE * (flat.amax(1) - flat.amin(1)) * noisy
            rows += noise.mul_(scale.reshape(-1, *(1,) * (x.dim() - 1)))
            taken.append(rows)
        args = tuple(a[index] if per else a for a, per in zip(self.args, self.per_row, strict=True))
        return tuple(taken), args

    def in_format(self, layout: torch.memory_format) -> _Rows:
        """The same rows, 4-D ones in another layout."""
        inputs = tuple(x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in self.inputs)
        return _Rows(inputs, self.args, self.per_row, self.precision)

    def run(
        self, model: Model, inputs: Tensors, args: tuple[Any, ...], precision: Precision | None = None
    ) -> tuple[Tensor, Tensors]:
        """The output, and the gradient of one combination of its numbers: a sum would be flat for a softmax."""
        seen: list[Tensor] = []

        def combine(output: Tensor) -> Tensor:
            seen.append(output.detach())
            flat = output.reshape(output.shape[0], -1)
            flat = flat if flat.dtype == torch.float64 else flat.float()
            key = (flat.shape[1],)
            if key not in self._weights:
                generator = torch.Generator("cpu").manual_seed(0)
                drawn = torch.randn(key, generator=generator, device="cpu", dtype=torch.float64)
                self._weights[key] = drawn.to(device=flat.device, dtype=flat.dtype)
            return flat @ self._weights[key]

        score = Score(model, "logit", combine, args, self.per_row, "zero", precision or self.precision)
        gradients = score.gradient_pass(inputs)[1:]
        return seen[0], gradients

    def timed(self, model: Model, count: int) -> Callable[[], float]:
        """Seconds of one pass of ``count`` rows."""
        inputs, args = self.take(count)

        def run() -> float:
            _wait(self.device)
            start = time.perf_counter()
            self.run(model, inputs, args)
            _wait(self.device)
            return time.perf_counter() - start

        return run


def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] in the layout of x, which indexing does not promise."""
    rows = x[index]
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return rows.contiguous(memory_format=torch.channels_last) if last else rows.contiguous()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _results(model: Model, rows: _Rows, chunk: int) -> tuple[Tensor, Tensors]:
    """Outputs and gradients of the rows that levers are checked on, as float64."""
    count = min(max(rows.batch, _LEAST_ROWS), _MOST_ROWS)
    with same_random_numbers(rows.device):
        pieces = (rows.take(min(chunk, count - start), start) for start in range(0, count, chunk))
        found = [rows.run(model, *piece, "float32") for piece in pieces]
    outputs = torch.cat([output for output, _ in found]).double().flatten(1)
    gradients = zip(*(gradient for _, gradient in found), strict=True)
    return outputs, tuple(torch.cat(each).double().flatten(1) for each in gradients)


def _difference(before: Tensor, after: Tensor) -> Tensor:
    """after − before; what is infinite or NaN in the same places does not differ, elsewhere it does without bound."""
    difference = after - before
    same = (before == after) | (before.isnan() & after.isnan())
    return torch.where(same, 0.0, torch.where(difference.isnan(), math.inf, difference))


def _compare(before: tuple[Tensor, Tensors], after: tuple[Tensor, Tensors]) -> tuple[float, float, float]:
    """Differences relative to scale: of the outputs, of the gradient's largest row, of its median row."""
    if before[0].shape != after[0].shape:
        return math.inf, math.inf, math.inf

    def ratio(part: Tensor, whole: Tensor) -> Tensor:
        return torch.where(part == 0, 0.0, part / whole)

    scale = before[0].nan_to_num(0.0, 0.0, 0.0).abs().amax()
    output = float(ratio(_difference(before[0], after[0]).abs().amax(), scale))
    worst = median = 0.0
    for one, other in zip(before[1], after[1], strict=True):
        norms = one.nan_to_num(0.0, 0.0, 0.0).norm(dim=1)
        # A row whose gradient is all rounding has no scale of its own.
        each = ratio(_difference(one, other).norm(dim=1), norms.clamp_min(1e-6 * float(norms.amax())))
        worst, median = max(worst, float(each.amax())), max(median, float(each.median()))
    return output, worst, median


def _peak_bytes(model: Model, rows: _Rows, count: int) -> int | None:
    """Peak of the tensors in one pass of ``count`` rows, or None for a model that does not run under the counter."""
    inputs, args = rows.take(count)
    counter = BytesAlive()
    try:
        with same_random_numbers(rows.device), counter:
            rows.run(model, inputs, args)
    except Exception as error:
        if out_of_memory(error):
            raise
        # If it is the model that fails and not the counter, this says so.
        rows.run(model, inputs, args)
        return None
    return max(1, counter.peak)


def _footprint(model: Model, rows: _Rows) -> Footprint | None:
    """What passes take, or None for a model that does not run under the counter."""
    return footprint(lambda count: rows.run(model, *rows.take(count)), rows.device)


def _fitting(taken: Footprint | None, budget: int) -> int:
    """Rows per pass that the budget holds, one at least."""
    return BLIND_ROWS if taken is None else max(1, (budget - taken.fixed) // taken.per_row)


# Levers.


class _Workshop:
    """The copy so far, and the trying of one more lever on it."""

    def __init__(self, clean: nn.Module | None, runner: Model, rows: _Rows, tolerance: float, fitting: int) -> None:
        self.clean, self.runner, self.rows = clean, runner, rows
        self.memory_format = torch.preserve_format
        self._tolerance = tolerance
        self._chunk = min(_CHECK_CHUNK, fitting)
        self._timed_rows = 0
        if clean is not None:
            while (
                given := attempt(partial(_results, runner, rows, self._chunk), rows.device, self._chunk == 1)
            ) is None:
                self._chunk = self._chunk // 2
            self._given = given
            self._timed_rows = _rows_for_timing(runner, rows, min(fitting, BLIND_ROWS))

    def try_lever(self, name: str, pull: Callable[[nn.Module], tuple[bool, str]]) -> Lever:
        """Tries a lever that is kept whenever the results are equal."""
        if self.clean is None:
            return _uncopied(name)
        try:
            clean = _again(self.clean)
            usable, reason = pull(clean)
            if not usable:
                return Lever(name, False, reason)
            runner = _again(clean)
            lever = self._checked(name, reason, runner, self.rows)
            if lever.applied:
                self.clean, self.runner = clean, runner
            return lever
        except Exception as error:  # a model under a lever may fail in any way; it is used without it
            return _failed(name, error)

    def try_channels_last(self, asked: bool) -> Lever:
        name = "channels_last"
        if self.clean is None:
            return _uncopied(name)
        try:
            clean = _again(self.clean)
            if not any(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in clean.modules()):
                return Lever(name, False, "no Conv2d")
            # torch's own, and untyped. The weights decide the layout of everything behind the first convolution.
            convert: Any = convert_conv2d_weight_memory_format
            convert(clean, torch.channels_last)
            runner = _again(clean)
            converted = self.rows.in_format(torch.channels_last)
            given = self._checked(name, "weights converted", runner, self.rows)
            if not given.applied:
                return given
            last = self._checked(name, "weights and inputs converted", runner, converted)
            worth_converting = last.applied and _lower(last.time_ratio, given.time_ratio)
            best = last if worth_converting else given
            if not asked and not _lower(best.time_ratio, 1.0):
                return _but(best, "not faster")
            self.clean, self.runner = clean, runner
            if worth_converting:
                self.rows, self.memory_format = converted, torch.channels_last
            return best
        except Exception as error:
            return _failed(name, error)

    def try_compile(self, options: dict[str, Any]) -> Lever:
        """The copy that ran is the one that is kept: another would be compiled again."""
        name = "compile"
        if self.clean is None:
            return _uncopied(name)
        try:
            clean = _again(self.clean)
            # Not clean.compile(): Dynamo skips torch's own forwards, and a Sequential would be left as it is.
            compiled: Any = torch.compile(clean, **options)
            # A compiled pass does not run under the counter of memory.
            lever = self._checked(name, "compiled", compiled, self.rows, count_memory=False)
            if lever.applied:
                self.clean = self.runner = compiled
            return lever
        except Exception as error:
            return _failed(name, error)

    def _checked(self, name: str, reason: str, runner: nn.Module, rows: _Rows, count_memory: bool = True) -> Lever:
        """The lever, applied if it left the results equal; measured in any case."""
        output, worst, median = _compare(self._given, _results(runner, rows, self._chunk))
        allowed = max(self._tolerance, min(self._tolerance * _GRADIENT_SLACK, _GRADIENT_MOST))
        if not output <= self._tolerance or not median <= allowed:
            what = (
                f"outputs differ by {output:.2g} of their scale, allowed are {self._tolerance:.2g}"
                if not output <= self._tolerance
                else f"gradients differ by {median:.2g} of their norm, allowed are {allowed:.2g}"
            )
            return Lever(name, False, what, output, worst)
        count = self._timed_rows
        before, after = _alternating(self.rows.timed(self.runner, count), rows.timed(runner, count))
        memory = None
        if count_memory:
            sizes = _peak_bytes(self.runner, self.rows, count), _peak_bytes(runner, rows, count)
            memory = sizes[1] / sizes[0] if sizes[0] is not None and sizes[1] is not None else None
        return Lever(name, True, reason, output, worst, after / before, memory)


def _uncopied(name: str) -> Lever:
    return Lever(name, False, "the model was not copied")


def _failed(name: str, error: BaseException) -> Lever:
    return Lever(name, False, f"failed: {_short(error)}")


def _but(lever: Lever, reason: str) -> Lever:
    """The lever's measurements, and that it was left out all the same."""
    return Lever(
        lever.name,
        False,
        reason,
        lever.output_difference,
        lever.gradient_difference,
        lever.time_ratio,
        lever.memory_ratio,
    )


def _lower(time_ratio: float | None, than: float | None) -> bool:
    return time_ratio is not None and than is not None and time_ratio < _WORTH * than


def _freeze(module: nn.Module) -> tuple[bool, str]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    if not parameters:
        return False, "no parameter requires a gradient"
    return True, f"{len(parameters)} parameters frozen"


def _fold(module: nn.Module, rows: _Rows) -> tuple[bool, str]:
    """Folds what can be folded in place; the modules' own forward stays, with nn.Identity where a BatchNorm was."""
    norms = {name: m for name, m in module.named_modules() if isinstance(m, _BATCHNORMS)}
    if not norms:
        return False, "no BatchNorm"
    aliases = Counter(id(m) for _, m in module.named_modules(remove_duplicate=False))
    calls, ranks = _calls(module, rows)
    pairs, refusals, traced = _adjacent(module)
    left: dict[str, str] = {}
    folded = 0
    for name, norm in norms.items():
        before = pairs.get(name)
        layer = None if before is None else module.get_submodule(before)
        if before is None or layer is None:
            left[name] = refusals.get(name, "no Conv or Linear of its kind straight before it")
        elif any(_hooked(m) for m in (layer, norm)):
            left[name] = "hooks, or a forward of its own"
        elif norm.running_mean is None or norm.running_var is None or not norm.track_running_stats:
            left[name] = "uses the batch's own statistics"
        elif any(aliases[id(m)] != 1 for m in (layer, norm)) or (calls[before], calls[name]) != (1, 1):
            left[name] = "not used exactly once"
        elif isinstance(layer, nn.Linear) and ranks[name] != 2:
            # BatchNorm's channels are axis 1, Linear's the last.
            left[name] = "a Linear with more than one axis of features"
        else:
            _fold_pair(layer, norm)
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, nn.Identity().train(False))
            folded += 1
    reason = f"{folded} of {len(norms)} folded"
    if left:
        some = [f"{name}: {why}" for name, why in left.items()]
        reason += "; left alone " + ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")
    if not traced:
        reason += "; cannot be traced, looked at neighbours in Sequential only"
    return folded > 0, reason


def _fold_pair(layer: Any, norm: Any) -> None:
    scale = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    layer.weight, layer.bias = fuse(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, scale, shift
    )


def _hooked(module: nn.Module) -> bool:
    """Whether calling the module may do more than its class says."""
    return "forward" in vars(module) or has_hooks(module)


def _calls(module: nn.Module, rows: _Rows) -> tuple[Counter[str], dict[str, int]]:
    """How often each submodule runs in one pass, and the rank of its input: seen on a copy of its own."""
    watched = _again(module)
    calls: Counter[str] = Counter()
    ranks: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def count(_: nn.Module, args: tuple[Any, ...]) -> None:
            calls[name] += 1
            ranks[name] = args[0].dim() if args and isinstance(args[0], Tensor) else -1

        return count

    for name, part in watched.named_modules():
        part.register_forward_pre_hook(watch(name))
    inputs, args = rows.take(1)
    with same_random_numbers(rows.device):
        rows.run(watched, inputs, args)
    return calls, ranks


def _adjacent(module: nn.Module) -> tuple[dict[str, str], dict[str, str], bool]:
    """(name of a BatchNorm -> name of the only layer that feeds it and feeds nothing else, why not, whether by fx)."""
    modules = dict(module.named_modules())
    try:
        with _tracing:
            # On a copy: a forward that stores what it computes would leave proxies behind.
            graph = fx.Tracer().trace(_again(module))
    except Exception:  # fx raises whatever the model's own code raises on a proxy
        return _in_sequentials(modules), {}, False
    # A weight that the forward itself reads must stay as it is.
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    uses = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    pairs: dict[str, str] = {}
    refusals: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules.get(str(node.target)), _BATCHNORMS):
            continue
        name, source = str(node.target), node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        before = str(source.target)
        if _PAIRS.get(type(modules[before])) is not type(modules[name]):
            continue
        if len(source.users) > 1:
            refusals[name] = f"the output of {before} is used elsewhere"
        elif uses[before] != 1 or uses[name] != 1:
            refusals[name] = "not used exactly once"
        elif read & {before, name}:
            refusals[name] = "the model reads its weights"
        else:
            pairs[name] = before
    return pairs, refusals, True


def _in_sequentials(modules: dict[str, nn.Module]) -> dict[str, str]:
    pairs = {}
    for name, module in modules.items():
        if type(module).forward is not nn.Sequential.forward or "forward" in vars(module):
            continue
        prefix = f"{name}." if name else ""
        for (before, layer), (after, norm) in pairwise(module.named_children()):
            if _PAIRS.get(type(layer)) is type(norm):
                pairs[prefix + after] = prefix + before
    return pairs


# Times.


def _rows_for_timing(model: Model, rows: _Rows, most: int) -> int:
    """Rows whose pass is long enough to time."""
    count = 1
    while count * 2 <= most:
        seconds = attempt(partial(_least, rows.timed(model, count), 2), rows.device, last=count == 1)
        if seconds is None:
            return count // 2
        if seconds > _PASS_SECONDS:
            break
        count *= 2
    return count


def _least(run: Callable[[], float], times: int) -> float:
    """The least of the seconds of some runs, the first left out."""
    return min([run() for _ in range(times)][1:])


def _alternating(one: Callable[[], float], other: Callable[[], float]) -> tuple[float, float]:
    """Median seconds of both, by turns, so that a machine that changes speed changes it for both."""
    one(), other()
    first = max(one(), 1e-7)
    repeat = min(20, max(1, int(_PASS_SECONDS / 2 / first)))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for run, times in zip((one, other), seconds, strict=True):
            times.append(sum(run() for _ in range(repeat)))
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _probe(
    model: Model, rows: _Rows, taken: Footprint | None, budget: int, limit: int | None, timing: bool
) -> tuple[int, Lever, tuple[tuple[int, float], ...]]:
    """(rows per pass, the report, seconds per row by rows per pass)."""
    fitting = _fitting(taken, budget)
    most = fitting if limit is None else min(limit, fitting)
    if taken is None:
        memory = f"memory could not be measured, {BLIND_ROWS} at most"
    elif taken.peak(1) > budget:
        memory = f"one row takes {taken.peak(1):,} bytes, more than the budget of {budget:,}"
    else:
        memory = f"{budget:,} bytes hold {fitting:,}"
    if not timing:
        return most, Lever("max_batch", True, f"{most} rows, not timed; {memory}"), ()
    runs: dict[int, Callable[[], float]] = {}
    seconds: dict[int, list[float]] = {}
    best, count = math.inf, 1
    while count <= most:
        run = rows.timed(model, count)
        spent = attempt(partial(_least, run, 4), rows.device, last=count == 1)
        if spent is None:
            break
        runs[count], seconds[count] = run, [spent]
        best = min(best, spent / count)
        # Not where two sizes look worse: on a busy machine that ended the search of a transformer at two rows.
        if spent > _LONGEST_PASS_SECONDS:
            break
        count *= 2
    close = [c for c in runs if seconds[c][0] / c < 1.3 * best]
    end = time.perf_counter() + _PROBE_SECONDS
    for _ in range(_ROUNDS):
        if time.perf_counter() > end:
            break
        for c in close:
            repeat = min(20, max(1, int(_PASS_SECONDS / 4 / seconds[c][0])))
            seconds[c].append(sum(runs[c]() for _ in range(repeat)) / repeat)
    # The least: what others do on the machine only ever adds, and a long pass is measured too seldom for a median.
    timed = {c: min(s) / c for c, s in seconds.items()}
    fastest = min(timed.values())
    # The smaller of equals: less memory, and less lost where the rows do not fill the last chunk.
    chosen = min(c for c, s in timed.items() if s <= fastest / _WORTH)
    reason = f"{chosen} rows, the fewest within 5 % of the fastest of {', '.join(map(str, timed))}; {memory}"
    lever = Lever("max_batch", True, reason, time_ratio=timed[chosen] / timed[1])
    return chosen, lever, tuple(timed.items())
