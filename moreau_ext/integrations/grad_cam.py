"""Explainers in the place of pytorch-grad-cam's CAM objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..explainers.base import Explainer
from ..explainers.inputs import Ids, Mask
from ..model.target import Target


class Cam:
    """An explainer that is called as pytorch-grad-cam's objects are: ``cam(input_tensor=x, targets=targets)``.

    For every image it gives the length of the map over the channels, m_p = ‖A_p‖₂ / max_q ‖A_q‖₂, in [0, 1] as
    ``show_cam_on_image`` takes it. There is no sign in it, as there is none in a CAM, and a blank map stays blank.

    Args:
        explainer: any explainer of this package, of a model of images [B, C, H, W].

    Raises:
        TypeError: not an explainer.

    Example:
        >>> import torch
        >>> from moreau_ext import SparseMoreauGrad
        >>> from moreau_ext.integrations.grad_cam import Cam
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
        >>> cam = Cam(SparseMoreauGrad(model))
        >>> cam(input_tensor=torch.rand(2, 3, 4, 4)).shape
        (2, 4, 4)

    Source: pytorch_grad_cam.base_cam.BaseCAM.
    """

    def __init__(self, explainer: Explainer) -> None:
        if not isinstance(explainer, Explainer):
            raise TypeError(
                f"explainer: expected an explainer such as MoreauGrad(model), got {type(explainer).__name__}; target "
                "layers are not needed, the map is of the input"
            )
        self.explainer = explainer

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Tensor], Tensor]] | None = None,
        *,
        ids: Ids = 0,
        fixed: Mask = None,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The maps of a batch of images.

        Args:
            input_tensor: [B, C, H, W].
            targets: one callable per image that takes its row of the output, as ``ClassifierOutputTarget(3)``; None for
                the predicted classes.
            ids: as in :meth:`moreau_ext.Explainer.attribute`; by default one noise for all inputs.
            fixed: as in :meth:`moreau_ext.Explainer.attribute`; such as a background, bool [H, W].

        Returns:
            float32 [B, H, W] in [0, 1].

        Raises:
            ValueError: inputs that are no images, or another number of targets than of images.
            ValueError, TypeError: see :meth:`moreau_ext.Explainer.attribute`.
        """
        if not isinstance(input_tensor, Tensor) or input_tensor.dim() != 4:
            got = tuple(input_tensor.shape) if isinstance(input_tensor, Tensor) else type(input_tensor).__name__
            raise ValueError(f"input_tensor: expected images [B, C, H, W], got {got}")
        if targets is not None and len(targets) != len(input_tensor):
            raise ValueError(f"targets: expected one per image, {len(input_tensor)}, got {len(targets)}")
        length = self.explainer.attribute(input_tensor, _target_of(targets), ids=ids, fixed=fixed).float().norm(dim=1)
        largest = length.amax((1, 2), keepdim=True)
        scaled = torch.where(largest > 0, length / largest, 0.0)
        maps: np.ndarray[Any, np.dtype[np.float32]] = scaled.cpu().numpy()
        return maps


def _target_of(targets: Sequence[Callable[[Tensor], Tensor]] | None) -> Target:
    """The targets of grad-cam as one of ours."""
    if targets is None:
        return None
    if all(type(t).__name__ == "ClassifierOutputTarget" for t in targets):
        # A class index needs no call of Python for each row.
        return [int(t.category) for t in targets]  # type: ignore[attr-defined]  # checked above
    return list(targets)
