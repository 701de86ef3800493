"""A model and a target as one score per row, with its gradient.

The only caller of torch.autograd.grad; the explainers run the model only here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._errors import MixingError, OutputRowsError, OutputTypeError
from ..ops.layout import Tensors
from .arguments import Items, take_rows
from .fixed import Fixed
from .memory import Footprint, measure_footprint
from .modes import plain_attention
from .modules import modules_of
from .precision import Precision, autocast, flags
from .target import InOrder, PerRow, one_each, row_scores

ScoreName = Literal["logit", "log_prob", "prob", "margin"]

UnusedInputs = Literal["raise", "zero"]

# In torch's message about an operation in place on a leaf.
_IN_PLACE = "leaf Variable that requires grad"

_SCORES = ("logit", "log_prob", "prob", "margin")


@dataclass(frozen=True)
class Score:
    """One score per row, f(x), of a model's output, with its gradient.

    Made by :func:`moreau_ext.model.bind.bind_score`; ``rows`` are inputs, or noisy copies of them after :meth:`take`.

    Args:
        model: called as ``model(*inputs, *args)``.
        name: which score.
        target: int64 [n, k], one index tuple per row; a callable output -> [n], also :class:`InOrder`; a callable for
            each input; or None for a model with one output.
        args: additional arguments, expanded to the rows where they are per input.
        per_row: which of ``args`` are.
        unused_inputs: what to do when the score does not depend on an input.
        precision: of the model's passes; scores and gradients come back in the dtype of the inputs.
        fixed: features that keep the values of their input, or None.
    """

    model: Callable[..., Any]
    name: ScoreName
    target: Tensor | Callable[[Tensor], Tensor] | InOrder | PerRow | None
    args: tuple[Any, ...]
    per_row: tuple[bool, ...]
    unused_inputs: UnusedInputs
    precision: Precision = "float32"
    fixed: Fixed | None = None

    def take(self, index: Tensor | slice) -> Score:
        """The score for rows index[0], index[1], ...; an index may occur many times."""
        target = self.target
        if isinstance(target, Tensor):
            target = target[index]
        elif isinstance(target, (InOrder, PerRow)):
            target = target.take(index)
        args = tuple([take_rows(a, index) if per else a for a, per in zip(self.args, self.per_row, strict=True)])
        return replace(self, target=target, args=args, fixed=self.fixed and self.fixed.take(index))

    def of_any_output(self) -> Score:
        """The same for a model whose output is no tensor: the callable target reads it, as the last part of the
        model."""
        return replace(self, model=partial(_model_and_target, self.model, self.target), target=None)

    def passing(self, device: torch.device) -> AbstractContextManager[None]:
        """The context of a pass and its gradients."""
        # cuDNN refuses the backward pass of a recurrent layer in eval mode; torch's own kernels do not.
        modules = modules_of(self.model) if device.type == "cuda" else ()
        return flags(self.precision, device, without_cudnn=any(isinstance(m, nn.RNNBase) for m in modules))

    def pass_footprint(
        self, inputs: Tensors, outputs: dict[int, Tensor] | None = None, after: Callable[[], None] = lambda: None
    ) -> Footprint | None:
        """What a pass with a gradient takes, measured on the last input, alone and after the first; the target need
        not be resolved.

        Hooks of the model see two passes, of one and of two rows.

        Args:
            inputs: at least one.
            outputs: the outputs of both passes are put here, by their rows.
            after: called after each.
        """
        seen: dict[int, Tensor] = {} if outputs is None else outputs

        def of_all(output: Tensor) -> Tensor:
            # A score that every number of an output counts in.
            seen[output.shape[0]] = output.detach()
            return output.reshape(output.shape[0], -1).float().sum(1)

        whole = replace(self, name="logit", target=of_all, unused_inputs="zero")

        def run(rows: int) -> None:
            index = sample_rows(rows, inputs)
            try:
                whole.take(index).gradient(tuple(x[index] for x in inputs))
            finally:
                after()

        return measure_footprint(run, inputs[0].device)

    def output(self, inputs: Tensors) -> Tensor:
        """The model's output tensor, checked to have one row per input."""
        args = [a.value if type(a) is Items else a for a in self.args]
        if self.fixed is not None:
            inputs = self.fixed.restored(inputs)
        with autocast(self.precision, inputs[0].device):
            output = self.model(*inputs, *args)
        if not isinstance(output, Tensor):
            held = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
            output = output if held is None else held
        if not isinstance(output, Tensor):
            raise OutputTypeError(
                f"model: expected a tensor (or an object with .logits) as output, got {_made_of(output)}; give "
                "output_fn, such as output_fn=lambda output: output[0], which reads the tensor to explain, or a "
                "callable target that makes one score per input of it"
            )
        rows = inputs[0].shape[0]
        if output.dim() == 0 or output.shape[0] != rows:
            raise OutputRowsError(
                f"model: expected an output with one row per input, [{rows}, ...], got {tuple(output.shape)}",
                folded=output.dim() > 0 and output.shape[0] == 1 and output.numel() % rows == 0,
            )
        return output.float() if self.precision == "bfloat16" and output.dtype == torch.bfloat16 else output

    def _traced(self, inputs: Tensors) -> tuple[list[Tensor], Tensor]:
        """Leaves of a graph, and the output at them: the one way in which the model is run.

        A model may compute something else under torch.no_grad (nn.TransformerEncoder's fast path), or need gradients
        itself, so values come from the graph that gradients come from. It may change its input in place; where autograd
        refuses that for a leaf, the model gets a copy of the leaf.
        """
        leaves = [x.detach().requires_grad_() for x in inputs]
        try:
            return leaves, self.output(tuple(leaves))
        except RuntimeError as error:
            if _IN_PLACE not in str(error):
                raise
        return leaves, self.output(tuple([x.clone() for x in leaves]))

    def whole_output(self, inputs: Tensors) -> Tensors:
        """The model's output as a tuple, without its graph; see :meth:`output`."""
        with torch.enable_grad(), self.passing(inputs[0].device):
            return (self._traced(_copies(inputs))[1].detach(),)

    def unmixed_output(self, inputs: Tensors) -> Tensors:
        """The same, checked to give every input an output of its own.

        Raises:
            MixingError: the output of every other input changes with the inputs between them.
        """
        with torch.enable_grad(), self.passing(inputs[0].device):
            leaves, output = self._traced(_copies(inputs))
            if output.shape[0] > 1 and output.requires_grad:
                flat = output.reshape(output.shape[0], -1)
                # Not their sum, which is constant for a softmax.
                weights = torch.linspace(1, 2, flat.shape[1], dtype=flat.dtype, device=flat.device)
                for some in (0, 1):
                    every_other = (flat[some::2] * weights).sum()
                    found = torch.autograd.grad(every_other, leaves, allow_unused=True, retain_graph=some == 0)
                    if any(g is not None and mixed(g, some) for g in found):
                        raise MixingError
        return (output.detach(),)

    def of_output(self, output: Tensor) -> Tensor:
        """The scores [n] of an output."""
        rows = output.shape[0]
        if self.target is None:
            return output.reshape(rows)
        if isinstance(self.target, (InOrder, PerRow)):
            return self.target.scores(output)
        if not isinstance(self.target, Tensor):
            return row_scores(self.target, output)
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
        """f of every row, ([n],), by one pass."""
        with torch.enable_grad(), self.passing(inputs[0].device):
            return (self.of_output(self._traced(_copies(inputs))[1]).detach(),)

    def gradient(self, inputs: Tensors) -> Tensors:
        """(f, *∇f) of every row by one pass: [n], and one tensor per input. Parameters get no gradient.

        The rows belong to the pass: a model may change them.
        """
        with torch.enable_grad(), self.passing(inputs[0].device):
            leaves, output = self._traced(inputs)
            scores = self.of_output(output)
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
            leaves, output = self._traced(inputs)
            scores = self.of_output(output)
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


def _model_and_target(model: Callable[..., Any], target: Any, x: Tensor, *more: Any) -> Tensor:
    return one_each(target(model(x, *more)), x.shape[0])


def _made_of(output: Any) -> str:
    """The type of an output that is no tensor, and what it holds."""
    name = type(output).__name__
    if isinstance(output, Mapping):
        return f"{name} of {', '.join([str(key) for key in output][:8])}"
    if isinstance(output, (tuple, list)):
        return f"{name} of {', '.join([type(held).__name__ for held in output][:8])}"
    return name


def _copies(inputs: Tensors) -> Tensors:
    # The inputs of the caller, which the model may change in place.
    return tuple([x.clone() for x in inputs])


def slope_of(scores: Callable[[Tensor], Tensor], output: Tensor) -> tuple[Tensor, Tensor]:
    """(scores, gradient of their sum in the output)."""
    with torch.enable_grad():
        leaf = output.detach().requires_grad_(output.is_floating_point())
        found = scores(leaf * 1)
        gradient = torch.autograd.grad(found.sum(), leaf, allow_unused=True)[0] if found.requires_grad else None
    return found.detach(), torch.zeros_like(output) if gradient is None else gradient


def sample_rows(rows: int, inputs: Tensors) -> Tensor:
    """Row numbers of the last input, after the first one in two rows."""
    last = inputs[0].shape[0] - 1
    return torch.tensor([0, last][-rows:], dtype=torch.int64, device=inputs[0].device)


def mixed(gradient: Tensor, some: int) -> bool:
    """Whether a gradient [n, ...] of the outputs of rows some, some + 2, ... is not zero in the rows between them.

    It is zero there to the bit where rows do not mix; a share of rounding is let pass all the same.
    """
    size = gradient.abs().reshape(gradient.shape[0], -1).amax(1)
    return bool(size[1 - some :: 2].amax() > 1e-6 * size[some::2].amax())


def check_score_settings(score: str, unused_inputs: str) -> None:
    """Raises ValueError for an unknown name."""
    if score not in _SCORES:
        raise ValueError(f"score: expected one of {', '.join(_SCORES)}, got {score!r}")
    if unused_inputs not in ("raise", "zero"):
        raise ValueError(f"unused_inputs: expected 'raise' or 'zero', got {unused_inputs!r}")
