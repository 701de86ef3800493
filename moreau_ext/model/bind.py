"""Binding of a model and a target to inputs: the target is resolved and checked against the model's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.layout import Tensors
from .arguments import Arguments, Follows, arguments_of, read
from .memory import out_of_memory, same_random_numbers
from .modes import without_inference_tensors
from .passes import PassRunner
from .precision import Precision, resolution
from .score import Score, ScoreName, UnusedInputs, sample_rows, slope_of
from .target import InOrder, PerRow, Target, read_target, row_scores


def bind_score(
    model: Callable[..., Any],
    inputs: Tensors,
    target: Target,
    *,
    score: ScoreName = "logit",
    additional_forward_args: Any = None,
    unused_inputs: UnusedInputs = "raise",
    max_batch: int | None = None,
    precision: Precision = "float32",
) -> tuple[Score, Tensor]:
    """Runs the model once on the inputs as they are, resolves and checks the target.

    Args:
        model: any callable; an nn.Module must be in eval mode (see ``evaluating``).
        inputs: tensors [B, ...].
        target: None (the predicted class, or the output itself where there is one per input), an int, a tensor or array
            [B], [B, 1] or of one element, a list of B ints or tuples, a tuple (outputs of higher rank), a callable
            output -> [rows], or a list of B callables row -> number.
        score: "logit" f = o_t; "log_prob" log softmax(o)_t; "prob" softmax(o)_t; "margin" o_t − max_{c≠t} o_c.
        additional_forward_args: passed on after the inputs; see :func:`read_arguments`.
        unused_inputs: "raise", or "zero" for a zero gradient.
        max_batch: rows per forward pass.
        precision: of the model's passes.

    Returns:
        The score bound to the inputs, and f(x), [B].

    Raises:
        ValueError: target out of range, of the wrong length, or missing for an output of higher rank.
        TypeError: target not of integers, or an output that is no tensor.
    """
    batch = inputs[0].shape[0]
    arguments = arguments_of(additional_forward_args, batch)
    bound = unresolved(model, inputs, target, score, arguments, unused_inputs, precision)
    passes = PassRunner(max_batch)
    if arguments.ambiguous:
        bound = with_reading(bound, read_arguments(bound, arguments, inputs, passes), arguments, batch)
    bound, value, _ = resolved(bound, inputs, passes)
    return bound, value


def unresolved(
    model: Callable[..., Any],
    inputs: Tensors,
    target: Target,
    score: ScoreName,
    arguments: Arguments,
    unused_inputs: UnusedInputs,
    precision: Precision,
) -> Score:
    """The score of :func:`bind_score` before the model has run, which its target may have to wait for, with its
    arguments in their likeliest reading."""
    batch = inputs[0].shape[0]
    index = read_target(target, batch, inputs[0].device)
    bound = Score(without_inference_tensors(model), score, index, (), (), unused_inputs, precision)
    return with_reading(bound, next(arguments.readings()), arguments, batch)


def with_reading(score: Score, reading: tuple[Follows, ...], arguments: Arguments, batch: int) -> Score:
    """The score with its arguments read in one way."""
    args, per_row = read(arguments.values, reading, batch)
    return replace(score, args=args, per_row=per_row)


def read_arguments(score: Score, arguments: Arguments, inputs: Tensors, passes: PassRunner) -> tuple[Follows, ...]:
    """Which arguments follow the inputs: the first reading under which the last input has the same output alone as
    after the first input; the likeliest where there is none.

    An argument that all inputs share has other rows taken from it in the two passes if it is read as one per input, and
    one per input does not fit the passes if it is read as shared.
    """
    readings = list(arguments.readings())
    with same_random_numbers(inputs[0].device):
        for reading in readings:
            trial = with_reading(score, reading, arguments, inputs[0].shape[0])
            try:
                one, two = (sample_output(trial, inputs, rows, passes) for rows in (1, 2))
            except Exception as error:  # the wrong reading may fail in any way
                if out_of_memory(error):
                    return readings[0]
                continue
            if agree(one[-1], two[-1], score.precision, inputs):
                return reading
    return readings[0]


def sample_output(score: Score, inputs: Tensors, rows: int, passes: PassRunner) -> Tensor:
    """The output of the last input, alone or after the first, in one pass."""
    index = sample_rows(rows, inputs)
    return passes.once(Score.whole_output, score.take(index), tuple([x[index] for x in inputs]))[0]


def agree(one: Tensor, other: Tensor, precision: str, inputs: Tensors) -> bool:
    """Whether two outputs of one input are equal up to far more than rounding."""
    if one.shape != other.shape:
        return False
    share = max(0.01, 16 * max(resolution(precision, x) for x in inputs))
    one, other = one.double(), other.double()
    size = torch.maximum(one.abs(), other.abs()).nan_to_num(0, 0, 0)
    near = (one - other).abs() <= share * (size.amax() if size.numel() else size) + 1e-6
    return bool((near | (one == other) | (one.isnan() & other.isnan())).all())


def resolved(score: Score, inputs: Tensors, passes: PassRunner, first: bool = False) -> tuple[Score, Tensor, Tensor]:
    """The score with its target checked, f(x) [B], and the outputs; runs the model once on the inputs as they are.

    Args:
        score: see :func:`unresolved`.
        inputs: as they are.
        passes: of the call.
        first: whether to check that the model does not mix its inputs, for the price of a gradient.
    """
    (output,) = passes(Score.unmixed_output if first else Score.whole_output, score, inputs)
    bound = replace(score, target=_resolve(score, output))
    return bound, bound.of_output(output), output


def _resolve(score: Score, output: Tensor) -> Tensor | Callable[[Tensor], Tensor] | InOrder | PerRow | None:
    """The target as an index that fits the output."""
    target, shape = score.target, tuple(output.shape)
    if isinstance(target, InOrder):
        return target
    if callable(target) or isinstance(target, PerRow):
        if score.name != "logit":
            raise ValueError(f"score: {score.name!r} needs a class as target; a callable target is the score itself")
        return target if isinstance(target, PerRow) else _of_rows(target, output)
    single = output.dim() == 1 or (output.dim() == 2 and shape[1] == 1)
    if single:
        if score.name != "logit":
            raise ValueError(
                f"score: {score.name!r} compares classes, but the model returns one number per input, {shape}"
            )
        if target is not None and (output.dim() == 1 or target.shape[1] != 1 or bool((target != 0).any())):
            raise ValueError(f"target: the model returns one number per input, {shape}; leave the target out")
        return None
    if target is None:
        if output.dim() > 2:
            raise ValueError(f"target: an output of shape {shape} needs one, a tuple of {output.dim() - 1} indices")
        return output.argmax(1, keepdim=True)
    if target.shape[1] != output.dim() - 1:
        raise ValueError(
            f"target: an output of shape {shape} needs {output.dim() - 1} indices per input, got {target.shape[1]}"
        )
    if score.name != "logit" and shape[1] == 1:
        raise ValueError(
            f"score: {score.name!r} compares the classes of axis 1, and an output of shape {shape} has one"
        )
    limits = torch.tensor(shape[1:], device=target.device)
    wrong = ((target < 0) | (target >= limits)).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        got = target[row].tolist()
        raise ValueError(
            f"target: {got[0] if len(got) == 1 else tuple(got)} of input {row} is out of range for an output of shape "
            f"{shape}: expected 0 <= target < {shape[1] if len(shape) == 2 else shape[1:]}"
        )
    return target


def _of_rows(target: Callable[[Tensor], Tensor], output: Tensor) -> Callable[[Tensor], Tensor] | InOrder:
    """A callable target as it is, if it gives every row the score and gradient of that row's output, in any number and
    order of rows; otherwise with the outputs of all inputs in their order.

    Raises:
        ValueError: it mixes the rows, or returns other than one score for each.
    """
    scores, gradient = _scored(target, output)
    batch, device = output.shape[0], output.device
    rolled = torch.arange(batch, device=device).roll(1)
    # More rows than inputs, in another order; the last one alone, because a callable may index by position.
    for index in (torch.cat([rolled, rolled, rolled[:1]]), rolled[:1]):
        try:
            again, slope = _scored(target, output[index])
        except Exception:  # it does not take so many rows
            break
        if not _same(again, scores[index]) or not _same(slope, gradient[index]):
            break
    else:
        return target
    last = torch.full((batch,), batch - 1, device=device)
    last[-1] = 0
    for row, others in ((0, last.flip(0)), (batch - 1, batch - 1 - last.flip(0))):
        # One row as it is, the output of another one in all other places.
        others[row] = row
        again, _ = _scored(target, output[others])
        if not _same(again[row], scores[row]):
            raise ValueError(
                "target: the callable mixes the rows of the outputs: the score of one changes with another. Likely "
                "causes: a softmax, mean or maximum along the first axis"
            )
    return InOrder(target, output, torch.arange(batch, device=device))


def _scored(target: Callable[[Tensor], Tensor], output: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and their gradients in the outputs."""
    return slope_of(lambda o: row_scores(target, o), output)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-6, equal_nan=True)
