"""Binding of a model and a target to inputs: the target is resolved and checked against the model's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.layout import Tensors
from .modes import without_inference_tensors
from .passes import PassRunner
from .precision import Precision
from .score import Score, ScoreName, UnusedInputs
from .target import Target, target_index


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
            [B] or [B, 1], a list of B ints or tuples, a tuple (outputs of higher rank), or a callable output -> [rows].
        score: "logit" f = o_t; "log_prob" log softmax(o)_t; "prob" softmax(o)_t; "margin" o_t − max_{c≠t} o_c.
        additional_forward_args: passed on after the inputs; tensors whose first axis is B are repeated with the inputs.
        unused_inputs: "raise", or "zero" for a zero gradient.
        max_batch: rows per forward pass.
        precision: of the model's passes.

    Returns:
        The score bound to the inputs, and f(x), [B].

    Raises:
        ValueError: target out of range, of the wrong length, or missing for an output of higher rank.
        TypeError: target not of integers, or an output that is no tensor.
    """
    bound = unresolved(model, inputs, target, score, additional_forward_args, unused_inputs, precision)
    return resolved(bound, inputs, PassRunner(max_batch))


def unresolved(
    model: Callable[..., Any],
    inputs: Tensors,
    target: Target,
    score: ScoreName,
    additional_forward_args: Any,
    unused_inputs: UnusedInputs,
    precision: Precision,
) -> Score:
    """The score of :func:`bind_score` before the model has run, which its target may have to wait for."""
    batch = inputs[0].shape[0]
    if isinstance(additional_forward_args, dict):
        raise TypeError("additional_forward_args: expected a value or a tuple of them, passed by position, got a dict")
    args = () if additional_forward_args is None else additional_forward_args
    args = args if isinstance(args, tuple) else (args,)
    args = tuple(a.clone() if isinstance(a, Tensor) and a.is_inference() else a for a in args)
    per_row = tuple(isinstance(a, Tensor) and a.dim() > 0 and a.shape[0] == batch for a in args)
    index: Tensor | Callable[[Tensor], Tensor] | None
    index = target if target is None or callable(target) else target_index(target, batch).to(inputs[0].device)
    return Score(without_inference_tensors(model), score, index, args, per_row, unused_inputs, precision)


def resolved(score: Score, inputs: Tensors, passes: PassRunner) -> tuple[Score, Tensor]:
    """The score with its target checked, and f(x), [B]; runs the model once on the inputs as they are."""
    with torch.no_grad(), score.passing(inputs[0].device):
        # On copies, for a model that changes its input in place.
        (output,) = passes(Score.whole_output, score, tuple([x.clone() for x in inputs]))
        bound = replace(score, target=_resolve(score, output))
        return bound, bound.of_output(output)


def _resolve(score: Score, output: Tensor) -> Tensor | Callable[[Tensor], Tensor] | None:
    """The target as an index that fits the output."""
    target, shape = score.target, tuple(output.shape)
    if callable(target):
        if score.name != "logit":
            raise ValueError(f"score: {score.name!r} needs a class as target; a callable target is the score itself")
        return target
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
