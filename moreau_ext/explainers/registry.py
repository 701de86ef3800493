"""Every method by its name, as all command lines and protocols call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from ..preparation.report import Prepared
from .base import Explainer
from .gradients import Gradient, SmoothGrad, SoftThresholdedSmoothGrad, SparsifiedSmoothGrad
from .moreau import GroupSparseMoreauGrad, MoreauGrad, SparseMoreauGrad

# As explainers take it.
Model = Callable[..., object] | Prepared


def _integrated_gradients(model: Callable[..., object], **settings: Any) -> Explainer:
    from .integrated import IntegratedGradients

    return IntegratedGradients(model, **settings)


METHODS: dict[str, Callable[..., Explainer]] = {
    "gradient": Gradient,
    "smoothgrad": SmoothGrad,
    "st_smoothgrad": SoftThresholdedSmoothGrad,
    "sparsified_smoothgrad": SparsifiedSmoothGrad,
    "integrated_gradients": _integrated_gradients,
    "moreau": MoreauGrad,
    "sparse": SparseMoreauGrad,
    "group": GroupSparseMoreauGrad,
}


@overload
def make_explainer(method: Literal["moreau"], model: Model, **settings: object) -> MoreauGrad: ...


@overload
def make_explainer(method: Literal["sparse"], model: Model, **settings: object) -> SparseMoreauGrad: ...


@overload
def make_explainer(method: Literal["group"], model: Model, **settings: object) -> GroupSparseMoreauGrad: ...


@overload
def make_explainer(method: str, model: Model, **settings: object) -> Explainer: ...


def make_explainer(method: str, model: Model, **settings: object) -> Explainer:
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
