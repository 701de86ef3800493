"""A model and a target as one score per row, with its gradient.

The only caller of torch.autograd.grad; the explainers run the model only here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.layout import Tensors
from .memory import Footprint, measure_footprint
from .modes import plain_attention
from .precision import Precision, autocast, flags

ScoreName = Literal["logit", "log_prob", "prob", "margin"]

UnusedInputs = Literal["raise", "zero"]

_SCORES = ("logit", "log_prob", "prob", "margin")


@dataclass(frozen=True)
class Score:
    """One score per row, f(x), of a model's output, with its gradient.

    Made by :func:`moreau_ext.model.bind.bind_score`; ``rows`` are inputs, or noisy copies of them after :meth:`take`.

    Args:
        model: called as ``model(*inputs, *args)``.
        name: which score.
        target: int64 [n, k], one index tuple per row; a callable output -> [n]; or None for a model with one output.
        args: additional arguments, expanded to the rows where they are per input.
        per_row: which of ``args`` are.
        unused_inputs: what to do when the score does not depend on an input.
        precision: of the model's passes; scores and gradients come back in the dtype of the inputs.
    """

    model: Callable[..., Any]
    name: ScoreName
    target: Tensor | Callable[[Tensor], Tensor] | None
    args: tuple[Any, ...]
    per_row: tuple[bool, ...]
    unused_inputs: UnusedInputs
    precision: Precision = "float32"

    def take(self, index: Tensor | slice) -> Score:
        """The score for rows index[0], index[1], ...; an index may occur many times."""
        target = self.target[index] if isinstance(self.target, Tensor) else self.target
        args = tuple(a[index] if per else a for a, per in zip(self.args, self.per_row, strict=True))
        return replace(self, target=target, args=args)

    def passing(self, device: torch.device) -> AbstractContextManager[None]:
        """The context of a pass and its gradients."""
        # cuDNN refuses the backward pass of a recurrent layer in eval mode; torch's own kernels do not.
        modules = self.model.modules() if device.type == "cuda" and isinstance(self.model, nn.Module) else ()
        return flags(self.precision, device, without_cudnn=any(isinstance(m, nn.RNNBase) for m in modules))

    def pass_footprint(self, inputs: Tensors) -> Footprint | None:
        """What a pass with a gradient takes, measured on the first input; the target need not be resolved.

        Hooks of the model see two passes, of one and of two rows.
        """
        whole = replace(self, name="logit", target=_of_all, unused_inputs="zero")

        def run(rows: int) -> None:
            index = torch.zeros(rows, dtype=torch.int64, device=inputs[0].device)
            whole.take(index).gradient(tuple(x[index] for x in inputs))

        return measure_footprint(run, inputs[0].device)

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

    def whole_output(self, inputs: Tensors) -> Tensors:
        """The model's output as a tuple; see :meth:`output`."""
        return (self.output(inputs),)

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

    def value(self, inputs: Tensors) -> Tensors:
        """f of every row, ([n],), by one pass without a gradient."""
        with torch.no_grad(), self.passing(inputs[0].device):
            return (self.of_output(self.output(inputs)),)

    def gradient(self, inputs: Tensors) -> Tensors:
        """(f, *∇f) of every row by one pass: [n], and one tensor per input. Parameters get no gradient."""
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
            >>> from moreau_ext.model.bind import bind_score
            >>> x = (torch.tensor([[1.0, 2.0]]),)
            >>> bound, _ = bind_score(lambda x: x.pow(3).sum(1), x, None)
            >>> bound.hvp(x, (torch.ones(1, 2),))[0]
            tensor([[ 6., 12.]])
        """
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


def check_score_settings(score: str, unused_inputs: str) -> None:
    """Raises ValueError for an unknown name."""
    if score not in _SCORES:
        raise ValueError(f"score: expected one of {', '.join(_SCORES)}, got {score!r}")
    if unused_inputs not in ("raise", "zero"):
        raise ValueError(f"unused_inputs: expected 'raise' or 'zero', got {unused_inputs!r}")
