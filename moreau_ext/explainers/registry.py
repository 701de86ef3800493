"""Every method by its name, as all command lines and protocols call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .gradients import Gradient, SmoothGrad, SoftThresholdedSmoothGrad, SparsifiedSmoothGrad
from .moreau import GroupSparseMoreauGrad, MoreauGrad, SparseMoreauGrad


def _integrated_gradients(model: Callable[..., Any], **settings: Any) -> Any:
    from .integrated import IntegratedGradients

    return IntegratedGradients(model, **settings)


METHODS: dict[str, Callable[..., Any]] = {
    "gradient": Gradient,
    "smoothgrad": SmoothGrad,
    "st_smoothgrad": SoftThresholdedSmoothGrad,
    "sparsified_smoothgrad": SparsifiedSmoothGrad,
    "integrated_gradients": _integrated_gradients,
    "moreau": MoreauGrad,
    "sparse": SparseMoreauGrad,
    "group": GroupSparseMoreauGrad,
}


def make_explainer(method: str, model: Callable[..., Any], **settings: Any) -> Any:
    """The explainer of a method by its name, as every command line and protocol calls it.

    Args:
        method: one of ``METHODS``.
        model: the model.
        settings: arguments of that explainer.

    Raises:
        ValueError: an unknown method.

    Example:
        >>> import torch
        >>> from moreau_ext import make_explainer
        >>> make_explainer("sparse", torch.nn.Linear(3, 2), eta_ratio=0.2).eta_ratio
        0.2
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method](model, **settings)
