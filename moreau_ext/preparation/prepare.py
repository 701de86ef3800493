"""A faster copy of a model: levers that leave its outputs as they are, each checked, timed and reported.

An explanation is thousands of passes of one model whose weights never change. What can be settled once, before the
first pass, is settled here; the user's own module is never touched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from .._checks import check_count
from ..model.memory import BLIND_ROWS, attempt, same_random_numbers
from ..model.memory import budget as default_budget
from ..model.modes import evaluating
from ..model.precision import Precision, check_dtypes, check_precision
from ..ops.layout import Tensors
from .fold import fold_pairs
from .passes import Rows, again, compare, footprint_of_rows, peak_bytes, results, rows_that_fit
from .probe import WORTH, alternating, probe_rows, rows_for_timing
from .report import Lever, Model, Prepared

# Relative to the output's scale. A folded or re-laid-out float32 net of 20 layers differs by 1e-6; a wrong one by 1e-1.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# Where a ReLU sits within rounding of zero, the gradient jumps by that unit's share though the output does not move.
_GRADIENT_SLACK = 100.0

# No slack makes a gradient that is off by this the same gradient.
_GRADIENT_MOST = 0.3

# Rows per checking pass: two at least where memory allows, because one row has no layout of its own.
_CHECK_CHUNK = 4


def prepare(
    model: Model,
    example: Tensor | Tensors,
    *,
    additional_forward_args: object = None,
    fold_batchnorm: bool = True,
    channels_last: bool | Literal["auto"] = "auto",
    freeze: bool = True,
    compile: bool | Mapping[str, object] = False,
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
        fold_batchnorm: w' = w·γ/√(v + ε), b' = (b − μ)·γ/√(v + ε) + β into the Conv or Linear before it. A layer of a
            subclass is folded where the folded layer gives the same numbers. Not folded: batch statistics, hooks,
            modules used twice, and a layer whose output is used elsewhere.
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
        >>> from moreau_ext import prepare
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
        subject: Model = model if clean is None else again(clean)
        with evaluating(subject):
            rows = Rows(tuple(x.clone() for x in inputs), args, per_row, precision)
            taken = footprint_of_rows(subject, rows)
            workshop = _Workshop(clean, subject, rows, tolerance, rows_that_fit(taken, budget))
            if fold_batchnorm:
                report.append(workshop.try_fold(tolerance))
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
                taken = footprint_of_rows(workshop.runner, workshop.rows)
            if compile is not False:
                options = dict(compile) if isinstance(compile, Mapping) else {}
                report.append(workshop.try_compile(options))
            else:
                report.append(Lever("compile", False, "switched off"))
            chunk, lever, timed = probe_rows(
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


def _copy(model: Model) -> tuple[nn.Module | None, str]:
    """(a copy in eval mode that shares nothing with the model, or None; how it went)."""
    if not isinstance(model, nn.Module):
        return None, f"a {type(model).__name__} is no nn.Module, used as it is"
    try:
        # Twice, because what runs is a copy of the copy.
        made = copy.deepcopy(model)
        if type(made) is type(model) and not _shared(model, made):
            made = again(made)
            return made, "a copy in eval mode"
    except Exception as error:  # __deepcopy__ and __reduce__ are the user's and may raise anything
        return None, f"cannot be copied, used as it is: {_short(error)}"
    return None, "its copy shares modules, parameters or buffers with it, used as it is"


def _shared(one: nn.Module, other: nn.Module) -> bool:
    # Lists, so that the parts live while their ids are compared.
    ours, theirs = (list(chain(m.modules(), m.parameters(), m.buffers())) for m in (one, other))
    return not {id(part) for part in ours}.isdisjoint(id(part) for part in theirs)


class _Workshop:
    """The copy so far, and the trying of one more lever on it."""

    def __init__(self, clean: nn.Module | None, runner: Model, rows: Rows, tolerance: float, fitting: int) -> None:
        self.clean, self.runner, self.rows = clean, runner, rows
        self.memory_format = torch.preserve_format
        self._tolerance = tolerance
        self._chunk = min(_CHECK_CHUNK, fitting)
        self._timed_rows = 0
        if clean is not None:
            while (
                given := attempt(partial(results, runner, rows, self._chunk), rows.device, self._chunk == 1)
            ) is None:
                self._chunk = self._chunk // 2
            self._given = given
            self._timed_rows = rows_for_timing(runner, rows, min(fitting, BLIND_ROWS))

    def try_lever(self, name: str, pull: Callable[[nn.Module], tuple[bool, str]]) -> Lever:
        """Tries a lever that is kept whenever the results are equal."""
        if self.clean is None:
            return _uncopied(name)
        try:
            clean = again(self.clean)
            usable, reason = pull(clean)
            if not usable:
                return Lever(name, False, reason)
            runner = again(clean)
            lever = self._checked(name, reason, runner, self.rows)
            if lever.applied:
                self.clean, self.runner = clean, runner
            return lever
        except Exception as error:  # a model under a lever may fail in any way; it is used without it
            return _failed(name, error)

    def try_fold(self, tolerance: float) -> Lever:
        """Folds BatchNorm; where the whole differs, without the layers of subclasses, which were tried one by one."""
        name, rows = "fold_batchnorm", self.rows
        lever = self.try_lever(name, lambda trial: fold_pairs(trial, rows, tolerance))
        if lever.applied or lever.output_difference is None:
            return lever
        plain = self.try_lever(name, lambda trial: fold_pairs(trial, rows, tolerance, subclasses=False))
        return plain if plain.applied else lever

    def try_channels_last(self, asked: bool) -> Lever:
        name = "channels_last"
        if self.clean is None:
            return _uncopied(name)
        try:
            clean = again(self.clean)
            if not any(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in clean.modules()):
                return Lever(name, False, "no Conv2d")
            # torch's own, and untyped. The weights decide the layout of everything behind the first convolution.
            convert: Any = convert_conv2d_weight_memory_format
            convert(clean, torch.channels_last)
            runner = again(clean)
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
            clean = again(self.clean)
            # Not clean.compile(): Dynamo skips torch's own forwards, and a Sequential would be left as it is.
            compiled: Any = torch.compile(clean, **options)
            # A compiled pass does not run under the counter of memory.
            lever = self._checked(name, "compiled", compiled, self.rows, count_memory=False)
            if lever.applied:
                self.clean = self.runner = compiled
            return lever
        except Exception as error:
            return _failed(name, error)

    def _checked(self, name: str, reason: str, runner: nn.Module, rows: Rows, count_memory: bool = True) -> Lever:
        """The lever, applied if it left the results equal; measured in any case."""
        output, worst, median = compare(self._given, results(runner, rows, self._chunk))
        allowed = max(self._tolerance, min(self._tolerance * _GRADIENT_SLACK, _GRADIENT_MOST))
        if not output <= self._tolerance or not median <= allowed:
            what = (
                f"outputs differ by {output:.2g} of their scale, allowed are {self._tolerance:.2g}"
                if not output <= self._tolerance
                else f"gradients differ by {median:.2g} of their norm, allowed are {allowed:.2g}"
            )
            return Lever(name, False, what, output, worst)
        count = self._timed_rows
        before, after = alternating(self.rows.timed(self.runner, count), rows.timed(runner, count))
        memory = None
        if count_memory:
            sizes = peak_bytes(self.runner, self.rows, count), peak_bytes(runner, rows, count)
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
    return time_ratio is not None and than is not None and time_ratio < WORTH * than


def _freeze(module: nn.Module) -> tuple[bool, str]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    if not parameters:
        return False, "no parameter requires a gradient"
    return True, f"{len(parameters)} parameters frozen"
