"""What is explained: a model and a target, as one score per input, and the gradient of that score.

The only place that runs a model and the only caller of torch.autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.layout import Tensors, row_chunks
from .memory import Footprint, Limit, attempt, footprint
from .modes import plain_attention, without_inference_tensors
from .precision import Precision, autocast, flags
from .target import Target, target_index

ScoreName = Literal["logit", "log_prob", "prob", "margin"]

UnusedInputs = Literal["raise", "zero"]

_SCORES = ("logit", "log_prob", "prob", "margin")


@dataclass(frozen=True)
class Score:
    """One score per row, f(x), of a model's output, with its gradient.

    Made by :func:`bind_score`; ``rows`` are inputs, or noisy copies of them after :meth:`take`.

    Args:
        model: called as ``model(*inputs, *args)``.
        name: which score.
        target: int64 [n, k], one index tuple per row; a callable output -> [n]; or None for a model with one output.
        args: additional arguments, expanded to the rows where they are per input.
        per_row: which of ``args`` are.
        unused_inputs: what to do when the score does not depend on an input.
        precision: of the model's passes; scores and gradients come back in the dtype of the inputs.
        limit: rows that were found to fit in a pass, shared by all that :meth:`take` makes. A pass that runs out of
            memory is done again in halves.
    """

    model: Callable[..., Any]
    name: ScoreName
    target: Tensor | Callable[[Tensor], Tensor] | None
    args: tuple[Any, ...]
    per_row: tuple[bool, ...]
    unused_inputs: UnusedInputs
    precision: Precision = "float32"
    limit: Limit = field(default_factory=Limit, compare=False, repr=False)

    def take(self, index: Tensor | slice) -> Score:
        """The score for rows index[0], index[1], ...; an index may occur many times."""
        target = self.target[index] if isinstance(self.target, Tensor) else self.target
        args = tuple(a[index] if per else a for a, per in zip(self.args, self.per_row, strict=True))
        return replace(self, target=target, args=args)

    def passing(self, device: torch.device) -> AbstractContextManager[None]:
        """What a pass with its gradients runs under."""
        # cuDNN refuses the backward pass of a recurrent layer in eval mode; torch's own kernels do not.
        modules = self.model.modules() if device.type == "cuda" and isinstance(self.model, nn.Module) else ()
        return flags(self.precision, device, without_cudnn=any(isinstance(m, nn.RNNBase) for m in modules))

    def footprint(self, inputs: Tensors) -> Footprint | None:
        """What a pass with a gradient takes, measured on the first input; the target need not be resolved.

        Hooks of the model see two passes, of one and of two rows.
        """
        whole = replace(self, name="logit", target=_of_all, unused_inputs="zero")

        def run(rows: int) -> None:
            index = torch.zeros(rows, dtype=torch.int64, device=inputs[0].device)
            whole.take(index).gradient_pass(tuple(x[index] for x in inputs))

        return footprint(run, inputs[0].device)

    def _in_passes(self, run: Callable[..., Tensors], *rows: Tensors) -> Tensors:
        """run(score, *rows), in as many passes as memory asks for."""
        count, device = rows[0][0].shape[0], rows[0][0].device
        done: list[Tensors] = []
        start = failed = 0
        while start < count or not done:
            size = min(self.limit.rows or count, count - start)
            if size == count:
                one = partial(run, self, *rows)
            else:
                piece = slice(start, start + size)
                one = partial(run, self.take(piece), *(tuple(t[piece] for t in some) for some in rows))
            part = attempt(one, device, last=False)
            if part is not None:
                done.append(part)
                start += size
                continue
            if size <= 1:
                shapes = ", ".join(str(tuple(t.shape[1:])) for t in rows[0])
                raise MemoryError(
                    f"model: a pass of one input, of shape {shapes}, does not fit into what is free of {device}'s "
                    "memory; free some, give a smaller input or model, or precision='bfloat16'"
                )
            failed = failed or size
            self.limit.lower(size - size // 2)
        if failed:
            self.limit.say(f"{failed} rows in a pass", f"{self.limit.rows}")
        return done[0] if len(done) == 1 else tuple(torch.cat(parts) for parts in zip(*done, strict=True))

    def output(self, inputs: Tensors) -> Tensor:
        """The model's output tensor, checked to have one row per input."""
        with autocast(self.precision, inputs[0].device):
            output = self.model(*inputs, *self.args)
        if not isinstance(output, Tensor):
            output = getattr(output, "logits", output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"model: expected a tensor (or an object with .logits) as output, got {type(output).__name__}; wrap "
                "the model in a function that returns the tensor to explain"
            )
        rows = inputs[0].shape[0]
        if output.dim() == 0 or output.shape[0] != rows:
            raise ValueError(
                f"model: expected an output with one row per input, [{rows}, ...], got {tuple(output.shape)}"
            )
        return output.float() if self.precision == "bfloat16" and output.dtype == torch.bfloat16 else output

    def of_output(self, output: Tensor) -> Tensor:
        """The scores [n] of an output."""
        rows = output.shape[0]
        if self.target is None:
            return output.reshape(rows)
        if not isinstance(self.target, Tensor):
            scores = self.target(output)
            if not isinstance(scores, Tensor) or scores.shape not in ((rows,), (rows, 1)):
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise ValueError(f"target: the callable must return one score per row, [{rows}], got {got}")
            return scores.reshape(rows)
        classes = output
        if self.target.shape[1] > 1:
            row = torch.arange(rows, device=output.device)
            classes = output.movedim(1, -1)[(row, *self.target[:, 1:].unbind(1))]
        index = self.target[:, :1]
        if self.name == "logit":
            return classes.gather(1, index).squeeze(1)
        if classes.dtype in (torch.float16, torch.bfloat16):
            classes = classes.float()
        if self.name == "margin":
            others = classes.scatter(1, index, float("-inf"))
            return classes.gather(1, index).squeeze(1) - others.amax(1)
        log_prob = torch.log_softmax(classes, dim=1).gather(1, index).squeeze(1)
        return log_prob if self.name == "log_prob" else log_prob.exp()

    def value(self, inputs: Tensors) -> Tensor:
        """f of every row, [n], without a gradient."""
        (scores,) = self._in_passes(Score._value, inputs)
        return scores

    def _value(self, inputs: Tensors) -> Tensors:
        with torch.no_grad(), self.passing(inputs[0].device):
            return (self.of_output(self.output(inputs)),)

    def gradient(self, inputs: Tensors) -> tuple[Tensor, Tensors]:
        """f and ∇f of every row: ([n], one tensor per input). Parameters get no gradient."""
        scores, *gradients = self._in_passes(Score.gradient_pass, inputs)
        return scores, tuple(gradients)

    def gradient_pass(self, inputs: Tensors) -> Tensors:
        """(f, *∇f) by one pass, whatever becomes of it."""
        with torch.enable_grad(), self.passing(inputs[0].device):
            leaves = [x.detach().requires_grad_() for x in inputs]
            scores = self.of_output(self.output(tuple(leaves)))
            found: tuple[Tensor | None, ...]
            if scores.requires_grad:
                # Rows do not mix, so the gradient of the sum is the gradient of each.
                found = torch.autograd.grad(scores, leaves, torch.ones_like(scores), allow_unused=True)
            else:
                found = (None,) * len(leaves)
        missing = [i for i, g in enumerate(found) if g is None]
        if missing and self.unused_inputs == "raise":
            which = "inputs" if len(leaves) == 1 else f"inputs[{missing[0]}]"
            raise ValueError(
                f"model: the score does not depend on {which}. Likely causes: the model "
                "detaches its input or computes under torch.no_grad, the output ignores it, or the input is turned "
                "into integers; unused_inputs='zero' gives a zero map instead"
            )
        gradients = tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True))
        return scores.detach(), *gradients

    def hvp(self, inputs: Tensors, vectors: Tensors) -> Tensors:
        """∇²f·v of every row, by two backward passes: one tensor per input, shaped as ``inputs``.

        Exact where f is twice differentiable. Kinks (ReLU, maxima) contribute nothing to it, so for a piecewise linear
        model it is zero; :mod:`moreau_ext.analysis.hessian` says when that means something.

        Raises:
            RuntimeError: from torch, where an operation of the model has no second derivative.

        Example:
            >>> import torch
            >>> from moreau_ext.model.score import bind_score
            >>> x = (torch.tensor([[1.0, 2.0]]),)
            >>> bound, _ = bind_score(lambda x: x.pow(3).sum(1), x, None)
            >>> bound.hvp(x, (torch.ones(1, 2),))[0]
            tensor([[ 6., 12.]])
        """
        return self._in_passes(Score._hvp, inputs, vectors)

    def _hvp(self, inputs: Tensors, vectors: Tensors) -> Tensors:
        with torch.enable_grad(), self.passing(inputs[0].device), plain_attention():
            leaves = [x.detach().requires_grad_() for x in inputs]
            scores = self.of_output(self.output(tuple(leaves)))
            slopes: list[tuple[Tensor, Tensor]] = []
            if scores.requires_grad:
                first = torch.autograd.grad(
                    scores, leaves, torch.ones_like(scores), create_graph=True, allow_unused=True
                )
                slopes = [(g, v) for g, v in zip(first, vectors, strict=True) if g is not None and g.requires_grad]
            found: tuple[Tensor | None, ...] = (None,) * len(leaves)
            if slopes:
                # H is symmetric, so v'H comes out of one more backward pass as Hv.
                found = torch.autograd.grad(
                    [g for g, _ in slopes], leaves, [v.to(g.dtype) for g, v in slopes], allow_unused=True
                )
        return tuple(torch.zeros_like(x) if h is None else h for x, h in zip(inputs, found, strict=True))


def _of_all(output: Tensor) -> Tensor:
    """A score that every number of an output counts in."""
    return output.reshape(output.shape[0], -1).float().sum(1)


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
    return resolved(bound, inputs, max_batch)


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


def resolved(score: Score, inputs: Tensors, max_batch: int | None) -> tuple[Score, Tensor]:
    """The score with its target checked, and f(x); runs the model once on the inputs as they are."""

    def output(score: Score, inputs: Tensors) -> Tensors:
        return (score.output(inputs),)

    device = inputs[0].device
    with torch.no_grad(), score.passing(device):
        # On copies (indexing makes them), for a model that changes its input in place.
        outputs = [
            score.take(rows)._in_passes(output, tuple(x[rows] for x in inputs))[0]
            for rows in row_chunks(inputs[0].shape[0], max_batch, device)
        ]
        whole = torch.cat(outputs)
        bound = replace(score, target=_resolve(score, whole))
        return bound, bound.of_output(whole)


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


def check_score_settings(score: str, unused_inputs: str) -> None:
    """Raises ValueError for an unknown name."""
    if score not in _SCORES:
        raise ValueError(f"score: expected one of {', '.join(_SCORES)}, got {score!r}")
    if unused_inputs not in ("raise", "zero"):
        raise ValueError(f"unused_inputs: expected 'raise' or 'zero', got {unused_inputs!r}")
