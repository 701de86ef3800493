"""Explainers in the place of captum's attribution methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn, TypeVar

from torch import Tensor

from ..explainers.base import Explainer
from ..explainers.inputs import Ids, Mask
from ..explainers.integrated import IntegratedGradients
from ..explainers.moreau import GroupSparseMoreauGrad
from ..model.restore import leaves_as_found
from ..model.target import Target
from ..solvers.groups import Groups, Labels

Inputs = TypeVar("Inputs", Tensor, tuple[Tensor, ...])


class CaptumAttribution:
    """An explainer that captum's wrappers and metrics take for one of captum's own ``Attribution``.

    Args:
        explainer: any explainer of this package.

    Raises:
        TypeError: not an explainer.

    Example:
        >>> import torch
        >>> from captum.attr import NoiseTunnel
        >>> from moreau_ext import MoreauGrad
        >>> from moreau_ext.integrations.captum import CaptumAttribution
        >>> method = CaptumAttribution(MoreauGrad(torch.nn.Linear(3, 2).eval()))
        >>> NoiseTunnel(method).attribute(torch.rand(4, 3), target=1, nt_samples=2, stdevs=0.1).shape
        torch.Size([4, 3])

    It has captum's attributes and is no subclass, so that captum is not imported here. Source: captum.attr.Attribution.
    """

    def __init__(self, explainer: Explainer) -> None:
        if not isinstance(explainer, Explainer):
            raise TypeError(
                f"explainer: expected an explainer such as MoreauGrad(model), got {type(explainer).__name__}"
            )
        self.explainer = explainer

    @property
    def forward_func(self) -> Callable[..., object]:
        """The model."""
        return self.explainer._module

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether maps are gradients times inputs; of the methods here Integrated Gradients' alone."""
        return isinstance(self.explainer, IntegratedGradients)

    def has_convergence_delta(self) -> bool:
        """False: gradients do not add up to a difference of outputs."""
        return False

    def compute_convergence_delta(self, *_: object, **__: object) -> NoReturn:
        """Raises NotImplementedError."""
        raise NotImplementedError(
            "compute_convergence_delta: gradients do not add up to a difference of outputs, so there is no delta (for "
            "Integrated Gradients use captum.attr.IntegratedGradients). How well a map is solved is in "
            "Solution.relative_residual and Solution.error: explainer.attribute(..., return_solution=True)"
        )

    def attribute_future(self, *_: object, **__: object) -> NoReturn:
        """Raises NotImplementedError, as most methods of captum do."""
        raise NotImplementedError("attribute_future: a map takes several passes; use attribute")

    # NoiseTunnel calls attribute.__wrapped__, so a decorator there must be.
    @leaves_as_found
    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: object = None,
        *,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        ids: Ids = 0,
        fixed: Mask = None,
    ) -> Inputs:
        """The maps of a batch.

        Args:
            inputs, target: as in :meth:`moreau_ext.Explainer.attribute`, which takes captum's forms. Without a target
                the predicted class is explained, where captum refuses.
            additional_forward_args: as captum takes them: a tuple holds one argument each, anything else is one.
            feature_mask: integers that number the features, [1, ...] or [B, ...] per tensor: the groups of a
                :class:`moreau_ext.GroupSparseMoreauGrad`, in place of its own.
            ids: as in :meth:`moreau_ext.Explainer.attribute`; by default one noise for all inputs, so that metrics
                which repeat or nudge an input do not measure the noise. None for a noise of its own at every place.
            fixed: as in :meth:`moreau_ext.Explainer.attribute`; one mask for all inputs where a metric repeats them.

        Returns:
            The maps, in the form and shape of ``inputs``, with their sign: ``captum.attr.Saliency`` takes the absolute
            value unless ``abs=False``.

        Raises:
            ValueError, TypeError: see :meth:`moreau_ext.Explainer.attribute`; a feature mask for an explainer without
            groups, or one whose numbers are in several tensors.
        """
        explainer = self.explainer if feature_mask is None else self._grouped(inputs, feature_mask)
        arguments = additional_forward_args
        if arguments is not None and not isinstance(arguments, tuple):
            arguments = (arguments,)
        maps: Inputs = explainer.attribute(inputs, target, arguments, ids=ids, fixed=fixed)
        return maps

    def _grouped(
        self, inputs: Tensor | tuple[Tensor, ...], feature_mask: Tensor | tuple[Tensor, ...]
    ) -> GroupSparseMoreauGrad:
        """The explainer with a feature mask as its groups."""
        explainer = self.explainer
        if not isinstance(explainer, GroupSparseMoreauGrad):
            raise TypeError(
                f"feature_mask: {type(explainer).__name__} has no groups; use GroupSparseMoreauGrad, or leave the mask "
                "out"
            )
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        masks = feature_mask if isinstance(feature_mask, tuple) else (feature_mask,)
        if len(masks) != len(tensors):
            raise ValueError(f"feature_mask: expected one per input tensor, {len(tensors)}, got {len(masks)}")
        numbers = [set(mask.flatten().tolist()) for mask in masks]
        if sum(map(len, numbers)) > len(set().union(*numbers)):
            raise ValueError(
                "feature_mask: the same number is in the masks of several tensors, and a group lies in one; give every "
                "tensor numbers of its own, such as mask + 1000"
            )
        own = explainer.groups if isinstance(explainer.groups, tuple) else (explainer.groups,) * len(masks)
        groups: list[Groups] = [
            Labels(mask[0] if mask.dim() == x.dim() and mask.shape[0] == 1 else mask, weights=g.weights)
            for mask, x, g in zip(masks, tensors, own, strict=True)
        ]
        return replace(explainer, groups=tuple(groups))
