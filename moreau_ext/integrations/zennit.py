"""Explainers in the place of zennit's attributors."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

from ..explainers.base import Explainer
from ..explainers.inputs import Ids, Mask
from ..model.modes import evaluating
from ..model.restore import leaves_as_found

# What the output is weighed with: the weights, or a function of the output that gives them.
Weights = Tensor | Callable[[Tensor], Tensor]


class Attributor:
    """An explainer that is called as zennit's attributors are: ``output, maps = attributor(input, attr_output)``.

    The score is f(x′) = ⟨w, model(x′)⟩, with the weights w of ``attr_output`` at the input.

    Args:
        explainer: any explainer of this package, with the default ``score``. A composite of zennit is registered on the
            model: call within ``with composite.context(model):``.
        attr_output: the weights, shaped as the output, or a function of the output that gives them; the output itself
            by default, as in zennit.
        ids: as in :meth:`moreau_ext.Explainer.attribute`; by default one noise for all inputs.
        fixed: as in :meth:`moreau_ext.Explainer.attribute`.

    Raises:
        TypeError: not an explainer.
        ValueError: an explainer of another score than the logit, which ``attr_output`` takes the place of.

    Example:
        >>> import torch
        >>> from moreau_ext import Gradient
        >>> from moreau_ext.integrations.zennit import Attributor
        >>> with Attributor(Gradient(lambda x: x @ torch.tensor([[2.0, 3.0]]))) as attributor:
        ...     output, maps = attributor(torch.ones(1, 1), torch.tensor([[0.0, 1.0]]))
        >>> output.tolist(), maps.tolist()
        ([[2.0, 3.0]], [[3.0]])

    Source: zennit.attribution.Attributor.
    """

    def __init__(
        self, explainer: Explainer, attr_output: Weights | None = None, *, ids: Ids = 0, fixed: Mask = None
    ) -> None:
        if not isinstance(explainer, Explainer):
            raise TypeError(
                f"explainer: expected an explainer such as MoreauGrad(model), got {type(explainer).__name__}"
            )
        if explainer.score != "logit":
            raise ValueError(
                f"explainer: its score is {explainer.score!r}, but attr_output is the score; leave score out, and give "
                "the weights of the outputs"
            )
        self.explainer = explainer
        self.attr_output = attr_output
        self.ids = ids
        self.fixed = fixed

    def __enter__(self) -> Attributor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """There is nothing to remove."""

    @leaves_as_found
    def __call__(self, input: Tensor, attr_output: Weights | None = None) -> tuple[Tensor, Tensor]:
        """The model's output [B, ...] without a graph, and the maps, shaped as ``input``.

        Args:
            input: [B, *features].
            attr_output: instead of the weights given before.

        Raises:
            ValueError: weights of another shape than the output.
            ValueError, TypeError: see :meth:`moreau_ext.Explainer.attribute`.
        """
        given = self.attr_output if attr_output is None else attr_output
        with torch.no_grad(), evaluating(self.explainer._module, depth=3) as found:
            output: Tensor = self.explainer._module(input.detach().clone())
            found.restore_buffers()
        weights = output if given is None else given(output) if callable(given) else given.to(output)
        if weights.shape != output.shape:
            raise ValueError(
                f"attr_output: expected the shape of the output, {tuple(output.shape)}, got {tuple(weights.shape)}"
            )
        weights = weights.detach()

        def score(rows: Tensor) -> Tensor:
            return (rows * weights).flatten(1).sum(1)

        maps: Tensor = self.explainer.attribute(input, score, ids=self.ids, fixed=self.fixed)
        return output, maps
